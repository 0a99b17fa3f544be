//! The steps of a container's life, one call each, for tests and runs that break off anywhere in between.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::services::containers::v1::container::Runtime;
use davit_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest,
};
use davit_proto::containerd::services::snapshots::v1::{
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use davit_proto::containerd::services::tasks::v1::{
    CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest, GetRequest, KillRequest,
    PauseTaskRequest, ResumeTaskRequest, StartRequest, WaitRequest,
};
use davit_proto::containerd::v1::types::Process;
use nix::unistd::Pid;
use prost::Message;
use serde_json::json;
use tonic::{Code, Status};

use crate::client::{Client, spec};
use crate::wait;

/// What a container is to be.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// What it runs.
    pub args: Vec<String>,
    /// It has a terminal.
    pub terminal: bool,
    /// The shim's group; empty for a shim of its own.
    pub group: String,
    /// It sees the processes of the host.
    pub host_pids: bool,
    /// The OCI runtime; empty for the default one.
    pub runtime: String,
    /// The folder of the OCI runtime's state; empty for the default one.
    pub runtime_root: String,
}

impl Wish {
    /// A container that runs a line of shell.
    pub fn shell(line: &str) -> Wish {
        Wish { args: ["sh", "-c", line].map(str::to_owned).into(), ..Wish::default() }
    }
}

/// A client that goes through lives step by step. Every method is one call, and fails with its status.
#[derive(Clone)]
pub struct Steps {
    /// The connection.
    pub client: Client,
    namespace: String,
    parent: String,
}

impl Steps {
    /// Over this connection, with root filesystems on the snapshot `parent` of overlayfs.
    pub fn new(client: Client, namespace: &str, parent: &str) -> Steps {
        Steps { client, namespace: namespace.to_owned(), parent: parent.to_owned() }
    }

    /// The record of the container and its snapshot. What is there already, from a call whose answer was lost, is right.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn record(&mut self, id: &str, wish: &Wish) -> Result<(), Status> {
        let args: Vec<&str> = wish.args.iter().map(String::as_str).collect();
        let mut document = spec(&format!("/{}/{id}", self.namespace), &args);
        document["process"]["terminal"] = json!(wish.terminal);
        if wish.terminal {
            let mount = json!({ "type": "devpts", "source": "devpts", "destination": "/dev/pts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] });
            if let Some(mounts) = document["mounts"].as_array_mut() {
                mounts.push(mount);
            }
        }
        if !wish.group.is_empty() {
            document["annotations"] = json!({ "io.containerd.runc.v2.group": wish.group });
        }
        if wish.host_pids
            && let Some(namespaces) = document["linux"]["namespaces"].as_array_mut()
        {
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }
        let options = Options {
            binary_name: wish.runtime.clone(),
            root: wish.runtime_root.clone(),
            ..Options::default()
        };
        let container = Container {
            id: id.into(),
            runtime: Some(Runtime {
                name: self.client.runtime.clone(),
                options: (options != Options::default()).then(|| any::pack(&options)),
            }),
            spec: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                value: document.to_string().into_bytes(),
            }),
            snapshotter: "overlayfs".into(),
            snapshot_key: id.into(),
            ..Default::default()
        };
        there(self.client.containers.create(CreateContainerRequest { container: Some(container) }).await)?;
        let prepare = PrepareSnapshotRequest {
            snapshotter: "overlayfs".into(),
            key: id.into(),
            parent: self.parent.clone(),
            ..Default::default()
        };
        there(self.client.snapshots.prepare(prepare).await)
    }

    /// Creates the task, with an address for its standard output.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn create(&mut self, id: &str, stdout: &str, terminal: bool) -> Result<u32, Status> {
        let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: id.into() };
        let rootfs = self.client.snapshots.mounts(mounts).await?.into_inner().mounts;
        let request = CreateTaskRequest {
            container_id: id.into(),
            rootfs,
            stdout: stdout.into(),
            terminal,
            ..Default::default()
        };
        Ok(self.client.tasks.create(request).await?.into_inner().pid)
    }

    /// Starts the init process, or an exec.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn start(&mut self, id: &str, exec_id: &str) -> Result<u32, Status> {
        let request = StartRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.client.tasks.start(request).await?.into_inner().pid)
    }

    /// Registers an exec of a line of shell.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn exec(&mut self, id: &str, exec_id: &str, line: &str) -> Result<(), Status> {
        let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", line],
            "env": ["PATH=/bin:/usr/bin"], "cwd": "/" });
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: process.to_string().into_bytes(),
            }),
            ..Default::default()
        };
        self.client.tasks.exec(request).await.map(drop)
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn pause(&mut self, id: &str) -> Result<(), Status> {
        self.client.tasks.pause(PauseTaskRequest { container_id: id.into() }).await.map(drop)
    }

    /// Thaws it.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn resume(&mut self, id: &str) -> Result<(), Status> {
        self.client.tasks.resume(ResumeTaskRequest { container_id: id.into() }).await.map(drop)
    }

    /// Kills the init process, or an exec.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn kill(&mut self, id: &str, exec_id: &str) -> Result<(), Status> {
        let request =
            KillRequest { container_id: id.into(), exec_id: exec_id.into(), signal: 9, ..Default::default() };
        self.client.tasks.kill(request).await.map(drop)
    }

    /// Waits for the end of the init process, or of an exec; gives its status.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn wait(&mut self, id: &str, exec_id: &str) -> Result<u32, Status> {
        let request = WaitRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.client.tasks.wait(request).await?.into_inner().exit_status)
    }

    /// What the init process, or an exec, is doing.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn state(&mut self, id: &str, exec_id: &str) -> Result<Process, Status> {
        let request = GetRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.client.tasks.get(request).await?.into_inner().process.unwrap_or_default())
    }

    /// Deletes the task; gives the exit status.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn delete(&mut self, id: &str) -> Result<u32, Status> {
        let request = DeleteTaskRequest { container_id: id.into() };
        Ok(self.client.tasks.delete(request).await?.into_inner().exit_status)
    }

    /// Deletes an exec.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn delete_exec(&mut self, id: &str, exec_id: &str) -> Result<u32, Status> {
        let request = DeleteProcessRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.client.tasks.delete_process(request).await?.into_inner().exit_status)
    }

    /// Removes the snapshot and the record. What is gone already is right.
    ///
    /// # Errors
    /// The daemon refuses.
    pub async fn forget(&mut self, id: &str) -> Result<(), Status> {
        let remove = RemoveSnapshotRequest { snapshotter: "overlayfs".into(), key: id.into() };
        gone(self.client.snapshots.remove(remove).await)?;
        gone(self.client.containers.delete(DeleteContainerRequest { id: id.into() }).await)
    }

    /// Takes a container away, in whatever state it is, and however often something fails on the way.
    ///
    /// # Errors
    /// It is still there after [`wait::PATIENCE`].
    pub async fn remove(&mut self, id: &str) -> Result<()> {
        let end = Instant::now() + wait::PATIENCE;
        loop {
            // What has ended, or was never started, cannot be killed; what does not answer is asked again.
            let killed = self.kill(id, "").await;
            let failed = match self.delete(id).await {
                Ok(_) => break,
                Err(status) if status.code() == Code::NotFound => break,
                Err(status) => status,
            };
            if Instant::now() > end {
                bail!("{id} cannot be removed: kill: {killed:?}, delete: {failed}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.forget(id).await.with_context(|| format!("forget {id}"))
    }
}

/// The shims that were started for a container: for the first one of a group, that of the whole group.
pub fn shims(namespace: &str, id: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&str> =
            line.split(|byte| *byte == 0).filter_map(|word| std::str::from_utf8(word).ok()).collect();
        let has = |flag: &str, value: &str| words.windows(2).any(|pair| pair == [flag, value]);
        if has("-namespace", namespace) && has("-id", id) && !words.contains(&"delete") {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

/// What was to be made may be there.
fn there<T>(result: Result<T, Status>) -> Result<(), Status> {
    match result {
        Err(status) if status.code() == Code::AlreadyExists => Ok(()),
        other => other.map(drop),
    }
}

/// What was to be removed may be gone.
fn gone<T>(result: Result<T, Status>) -> Result<(), Status> {
    match result {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        other => other.map(drop),
    }
}

/// `google.rpc.ErrorInfo` and the `google.rpc.Status` around it.
#[derive(Clone, PartialEq, Eq, Message)]
struct ErrorInfo {
    #[prost(string, tag = "1")]
    reason: String,
}

#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// The reason in the details of a status, for programs; empty if it has none.
pub fn reason(status: &Status) -> String {
    let details = RpcStatus::decode(status.details()).map(|status| status.details).unwrap_or_default();
    let info = details.iter().find(|detail| detail.type_url.ends_with("/google.rpc.ErrorInfo"));
    let info = info.and_then(|info| ErrorInfo::decode(info.value.as_slice()).ok());
    info.map(|info| info.reason).unwrap_or_default()
}
