//! The Tasks service.

use davit_model::Filter;
use davit_model::filter::Adaptor;
use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::services::tasks::v1 as wire;
use davit_proto::containerd::services::tasks::v1::tasks_server::Tasks as TasksApi;
use davit_proto::containerd::{types, v1};
use std::borrow::Cow;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{any_from_wire, any_to_wire, mount_from_wire, time_to_wire};
use super::status::{from, invalid};
use crate::checkpoint::{self, Checkpoints};
use crate::metadata::{Metadata, Scope};
use crate::rooted::RootedTasks;
use crate::runtime::{
    Checkpoint, CreateOptions, Error as TaskError, ExecOptions, Process, Status as TaskStatus, Stdio, Tasks,
    UpdateOptions,
};

/// The annotation of a checkpoint's descriptor that names a folder instead of content (containerd `client.Restore`).
const RESTORE_FROM_PATH: &str = "RestoreFromPath";

/// Serves what runs.
pub struct TasksService {
    metadata: Metadata,
    tasks: Tasks,
    rooted: RootedTasks,
    checkpoints: Checkpoints,
}

impl TasksService {
    /// A service over `tasks` and their `checkpoints`, which reads the containers' records in `metadata`.
    pub fn new(metadata: Metadata, tasks: Tasks, checkpoints: Checkpoints) -> TasksService {
        let rooted = RootedTasks::new(metadata.clone(), tasks.clone());
        TasksService { metadata, tasks, rooted, checkpoints }
    }

    /// What a new task is to be restored from: a folder that its options name (`Options.criu_image_path`), a folder that
    /// the request names, or content.
    async fn checkpoint_of(
        &self,
        scope: &Scope,
        wanted: Option<&types::Descriptor>,
        options: &Options,
    ) -> Result<Checkpoint, Status> {
        if let Some(path) = wanted.and_then(|wanted| wanted.annotations.get(RESTORE_FROM_PATH)) {
            return Ok(Checkpoint::FolderAndRootfs(path.into()));
        }
        if !options.criu_image_path.is_empty() {
            return Ok(Checkpoint::Folder(options.criu_image_path.clone().into()));
        }
        let Some(wanted) = wanted else { return Ok(Checkpoint::None) };
        let unpacked = self.checkpoints.unpack(scope, &wanted.media_type, &wanted.digest).await;
        Ok(Checkpoint::Unpacked(unpacked.map_err(from)?))
    }
}

fn process_to_wire(process: Process) -> v1::types::Process {
    let status = match process.status {
        TaskStatus::Unknown => v1::types::Status::Unknown,
        TaskStatus::Created => v1::types::Status::Created,
        TaskStatus::Running => v1::types::Status::Running,
        TaskStatus::Stopped => v1::types::Status::Stopped,
        TaskStatus::Paused => v1::types::Status::Paused,
        TaskStatus::Pausing => v1::types::Status::Pausing,
    };
    v1::types::Process {
        // containerd leaves the container's id out.
        container_id: String::new(),
        id: process.id,
        pid: process.pid,
        status: status.into(),
        stdin: process.stdio.stdin,
        stdout: process.stdio.stdout,
        stderr: process.stdio.stderr,
        terminal: process.stdio.terminal,
        exit_status: process.exit_status,
        exited_at: time_to_wire(process.exited_at),
    }
}

/// What a filter of metrics may ask of a task.
struct ById<'a> {
    id: &'a str,
    namespace: &'a str,
}

impl Adaptor for ById<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "id" => Some(Cow::Borrowed(self.id)),
            "namespace" => Some(Cow::Borrowed(self.namespace)),
            _ => None,
        }
    }
}

#[tonic::async_trait]
impl TasksApi for TasksService {
    async fn create(
        &self,
        request: Request<wire::CreateTaskRequest>,
    ) -> Result<Response<wire::CreateTaskResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let request = request.into_inner();
        let container = self.metadata.containers(&scope).get(&request.container_id).map_err(from)?;
        if request.checkpoint.is_some() && self.tasks.exists(scope.namespace(), &request.container_id) {
            return Err(from(TaskError::AlreadyExists { id: request.container_id }));
        }
        // What is no such message is the shim's to refuse.
        let given = request.options.as_ref().and_then(|options| any::unpack::<Options>(options).ok()?);
        let given = given.unwrap_or_default();
        let checkpoint = self.checkpoint_of(&scope, request.checkpoint.as_ref(), &given).await?;
        // Clients of containerd 2.0 and 2.1 say it in the options alone.
        let (mut task_api_address, mut task_api_version) =
            (request.task_api_address, request.task_api_version);
        if task_api_address.is_empty() {
            task_api_address = given.task_api_address;
        }
        if task_api_version == 0 {
            task_api_version = given.task_api_version;
        }
        let runtime =
            if request.runtime_path.is_empty() { container.runtime.name } else { request.runtime_path };
        let options = CreateOptions {
            container_id: request.container_id,
            spec: container.spec,
            rootfs: request.rootfs.into_iter().map(mount_from_wire).collect(),
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            checkpoint,
            runtime,
            task_options: request.options.map(any_from_wire),
            runtime_options: container.runtime.options,
            sandbox_id: container.sandbox,
            task_api_address,
            task_api_version,
        };
        let container_id = options.container_id.clone();
        let pid = self.rooted.create(&scope, options).await.map_err(from)?;
        Ok(Response::new(wire::CreateTaskResponse { container_id, pid }))
    }

    async fn start(
        &self,
        request: Request<wire::StartRequest>,
    ) -> Result<Response<wire::StartResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::StartRequest { container_id, exec_id } = request.into_inner();
        let pid = self.tasks.start(scope.namespace(), &container_id, &exec_id).await.map_err(from)?;
        Ok(Response::new(wire::StartResponse { pid }))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteTaskRequest>,
    ) -> Result<Response<wire::DeleteResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let id = request.into_inner().container_id;
        let exit = self.rooted.delete(&scope, &id).await.map_err(from)?;
        let exited_at = time_to_wire(exit.exited_at);
        // containerd leaves the id out here, and sets it for an exec.
        let (id, pid, exit_status) = (String::new(), exit.pid, exit.status);
        Ok(Response::new(wire::DeleteResponse { id, pid, exit_status, exited_at }))
    }

    async fn delete_process(
        &self,
        request: Request<wire::DeleteProcessRequest>,
    ) -> Result<Response<wire::DeleteResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::DeleteProcessRequest { container_id, exec_id } = request.into_inner();
        let exit =
            self.tasks.delete_process(scope.namespace(), &container_id, &exec_id).await.map_err(from)?;
        let exited_at = time_to_wire(exit.exited_at);
        let (pid, exit_status) = (exit.pid, exit.status);
        Ok(Response::new(wire::DeleteResponse { id: exec_id, pid, exit_status, exited_at }))
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<wire::GetResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::GetRequest { container_id, exec_id } = request.into_inner();
        let process = self.tasks.state(scope.namespace(), &container_id, &exec_id).await.map_err(from)?;
        Ok(Response::new(wire::GetResponse { process: Some(process_to_wire(process)) }))
    }

    async fn list(
        &self,
        request: Request<wire::ListTasksRequest>,
    ) -> Result<Response<wire::ListTasksResponse>, Status> {
        // containerd ignores the filter of this call.
        let scope = Context::of(&request).scope()?;
        let tasks = self.tasks.list(scope.namespace()).await;
        Ok(Response::new(wire::ListTasksResponse { tasks: tasks.into_iter().map(process_to_wire).collect() }))
    }

    async fn kill(&self, request: Request<wire::KillRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::KillRequest { container_id, exec_id, signal, all } = request.into_inner();
        self.tasks.kill(scope.namespace(), &container_id, &exec_id, signal, all).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn exec(&self, request: Request<wire::ExecProcessRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let request = request.into_inner();
        let options = ExecOptions {
            exec_id: request.exec_id,
            spec: request.spec.map(any_from_wire),
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        self.tasks.exec(scope.namespace(), &request.container_id, options).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn resize_pty(&self, request: Request<wire::ResizePtyRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::ResizePtyRequest { container_id, exec_id, width, height } = request.into_inner();
        let resize = self.tasks.resize_pty(scope.namespace(), &container_id, &exec_id, width, height);
        resize.await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn close_io(&self, request: Request<wire::CloseIoRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::CloseIoRequest { container_id, exec_id, stdin } = request.into_inner();
        self.tasks.close_io(scope.namespace(), &container_id, &exec_id, stdin).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn pause(&self, request: Request<wire::PauseTaskRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        self.tasks.pause(scope.namespace(), &request.into_inner().container_id).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn resume(&self, request: Request<wire::ResumeTaskRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        self.tasks.resume(scope.namespace(), &request.into_inner().container_id).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn list_pids(
        &self,
        request: Request<wire::ListPidsRequest>,
    ) -> Result<Response<wire::ListPidsResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let pids =
            self.tasks.pids(scope.namespace(), &request.into_inner().container_id).await.map_err(from)?;
        let processes = pids
            .into_iter()
            .map(|process| v1::types::ProcessInfo { pid: process.pid, info: process.info.map(any_to_wire) })
            .collect();
        Ok(Response::new(wire::ListPidsResponse { processes }))
    }

    async fn checkpoint(
        &self,
        request: Request<wire::CheckpointTaskRequest>,
    ) -> Result<Response<wire::CheckpointTaskResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::CheckpointTaskRequest { container_id, options, .. } = request.into_inner();
        let blobs =
            self.checkpoints.take(&scope, &container_id, options.map(any_from_wire)).await.map_err(from)?;
        let descriptor = |blob: checkpoint::Blob| types::Descriptor {
            media_type: blob.media_type.to_owned(),
            digest: blob.digest.to_string(),
            size: i64::try_from(blob.size).unwrap_or(i64::MAX),
            ..Default::default()
        };
        Ok(Response::new(wire::CheckpointTaskResponse {
            descriptors: blobs.into_iter().map(descriptor).collect(),
        }))
    }

    async fn update(&self, request: Request<wire::UpdateTaskRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::UpdateTaskRequest { container_id, resources, annotations } = request.into_inner();
        let resources = resources.ok_or_else(|| invalid("resources are required"))?;
        let options = UpdateOptions { resources: Some(any_from_wire(resources)), annotations };
        self.tasks.update(scope.namespace(), &container_id, options).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn metrics(
        &self,
        request: Request<wire::MetricsRequest>,
    ) -> Result<Response<wire::MetricsResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let filter = Filter::parse(&request.into_inner().filters).map_err(invalid)?;
        let namespace = scope.namespace();
        let metrics = self.tasks.metrics(namespace, |id| filter.matches(&ById { id, namespace })).await;
        let metrics = metrics
            .into_iter()
            .map(|metric| types::Metric {
                timestamp: Some(metric.timestamp.into()),
                id: metric.id,
                data: metric.data.map(any_to_wire),
            })
            .collect();
        Ok(Response::new(wire::MetricsResponse { metrics }))
    }

    async fn wait(
        &self,
        request: Request<wire::WaitRequest>,
    ) -> Result<Response<wire::WaitResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::WaitRequest { container_id, exec_id } = request.into_inner();
        let exit = self.tasks.wait(scope.namespace(), &container_id, &exec_id).await.map_err(from)?;
        let exited_at = time_to_wire(exit.exited_at);
        Ok(Response::new(wire::WaitResponse { exit_status: exit.status, exited_at }))
    }
}
