//! The task service: decodes requests, calls the container, encodes replies.
//!
//! `containerd.task.v2.Task` and `containerd.task.v3.Task` have the same methods and messages; both are
//! served.

use std::path::Path;
use std::rc::Rc;

use davit_model::identifier;
use davit_proto::any;
use davit_proto::containerd::events;
use davit_proto::containerd::runc::v1::ProcessDetails;
use davit_proto::containerd::task::v3::{
    CheckpointTaskRequest, CloseIoRequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use davit_proto::containerd::ttrpc::Request;
use davit_proto::containerd::v1::types::{ProcessInfo, Status as WireStatus};
use davit_shim_protocol::frame;
use prost::Message;

use crate::container::{Container, Status};
use crate::deadline::Deadline;
use crate::error::TaskError;
use crate::process::{Process, State};
use crate::shim::Shim;
use crate::spec;
use crate::stdio;

const SERVICES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// The exit status that is told of a process that could not be started.
const NEVER_RAN: u32 = 255;

/// Whether a call changes nothing, so that it can be dropped when nobody waits for its reply.
pub(crate) fn only_waits(request: &Request) -> bool {
    request.method == "Wait"
}

/// Carries out a request.
///
/// # Errors
/// As the method says; `Unimplemented` for an unknown one.
pub(crate) async fn call(shim: Rc<Shim>, request: Request) -> Result<Vec<u8>, TaskError> {
    if !SERVICES.contains(&request.service.as_str()) {
        return Err(TaskError::Unimplemented { service: request.service, method: request.method });
    }
    let deadline = Deadline::of_call(frame::timeout(&request));
    let bytes = request.payload.as_slice();
    match request.method.as_str() {
        "Create" => create(&shim, deadline, decode(bytes, "CreateTaskRequest")?).await,
        "Start" => start(&shim, deadline, decode(bytes, "StartRequest")?).await,
        "Delete" => delete(&shim, deadline, decode(bytes, "DeleteRequest")?).await,
        "Exec" => exec(&shim, decode(bytes, "ExecProcessRequest")?),
        "State" => state(&shim, decode(bytes, "StateRequest")?).await,
        "Kill" => kill(&shim, deadline, decode(bytes, "KillRequest")?).await,
        "Wait" => wait(&shim, decode(bytes, "WaitRequest")?).await,
        "Pids" => pids(&shim, decode(bytes, "PidsRequest")?),
        "Stats" => stats(&shim, decode(bytes, "StatsRequest")?),
        "Pause" => {
            let request: PauseRequest = decode(bytes, "PauseRequest")?;
            shim.container(&request.id)?.pause(deadline).await?;
            empty()
        }
        "Resume" => {
            let request: ResumeRequest = decode(bytes, "ResumeRequest")?;
            shim.container(&request.id)?.resume(deadline).await?;
            empty()
        }
        "Update" => {
            let request: UpdateTaskRequest = decode(bytes, "UpdateTaskRequest")?;
            let resources = request.resources.unwrap_or_default().value;
            shim.container(&request.id)?.update(&resources, deadline).await?;
            empty()
        }
        "Checkpoint" => {
            let request: CheckpointTaskRequest = decode(bytes, "CheckpointTaskRequest")?;
            shim.container(&request.id)?.checkpoint(&request, deadline).await?;
            empty()
        }
        "ResizePty" => resize(&shim, decode(bytes, "ResizePtyRequest")?),
        "CloseIO" => close_stdin(&shim, decode(bytes, "CloseIORequest")?),
        "Connect" => connect(&shim, decode(bytes, "ConnectRequest")?),
        "Shutdown" => {
            let _: ShutdownRequest = decode(bytes, "ShutdownRequest")?;
            shim.stop();
            empty()
        }
        _ => Err(TaskError::Unimplemented { service: request.service, method: request.method }),
    }
}

fn decode<M: Message + Default>(bytes: &[u8], what: &'static str) -> Result<M, TaskError> {
    M::decode(bytes).map_err(|source| TaskError::Decode { what, source })
}

fn encode(message: &impl Message) -> Result<Vec<u8>, TaskError> {
    Ok(message.encode_to_vec())
}

/// `google.protobuf.Empty`.
fn empty() -> Result<Vec<u8>, TaskError> {
    Ok(Vec::new())
}

async fn create(
    shim: &Rc<Shim>,
    deadline: Deadline,
    request: CreateTaskRequest,
) -> Result<Vec<u8>, TaskError> {
    identifier::validate(&request.id)?;
    if !Path::new(&request.bundle).is_absolute() {
        return Err(TaskError::Bundle { path: request.bundle });
    }
    let reservation = shim.reserve(&request.id)?;
    let container = Container::create(shim, &request, deadline).await?;
    shim.add(container.clone());
    drop(reservation);
    let pid = container.init.pid().unsigned_abs();
    let created = events::TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: Some(events::TaskIo {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        }),
        checkpoint: request.checkpoint,
        pid,
    };
    container.publish("/tasks/create", &created);
    if let Some(awaited) = container.init.awaited() {
        container.watch_init(awaited);
    }
    encode(&CreateTaskResponse { pid })
}

async fn start(shim: &Shim, deadline: Deadline, request: StartRequest) -> Result<Vec<u8>, TaskError> {
    let container = shim.container(&request.id)?;
    let pid = if request.exec_id.is_empty() {
        container.start(deadline).await?
    } else {
        let exec = container.process(&request.exec_id)?;
        container.start_exec(&exec, deadline).await?
    };
    encode(&StartResponse { pid })
}

async fn delete(shim: &Shim, deadline: Deadline, request: DeleteRequest) -> Result<Vec<u8>, TaskError> {
    // Whoever gave a creation up wants to know that nothing is left of it, and not that nothing is there yet.
    shim.created(&request.id).await;
    let container = shim.container(&request.id)?;
    let process = container.process(&request.exec_id)?;
    let ended = if request.exec_id.is_empty() {
        container.delete(deadline).await?
    } else {
        container.delete_exec(&process).await?;
        process.ended()
    };
    encode(&DeleteResponse {
        pid: process.pid().unsigned_abs(),
        exit_status: ended.map_or(0, |ended| ended.status),
        exited_at: ended.map(|ended| ended.timestamp()),
    })
}

fn exec(shim: &Shim, request: ExecProcessRequest) -> Result<Vec<u8>, TaskError> {
    let container = shim.container(&request.id)?;
    identifier::validate(&request.exec_id)?;
    let document = request.spec.unwrap_or_default().value;
    let document = spec::process_with_terminal(&document, request.terminal)
        .map_err(|source| TaskError::Json { what: "process of exec", source })?;
    let stdio = stdio::Request {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    container.add_exec(Process::new(request.exec_id, stdio, document))?;
    empty()
}

async fn state(shim: &Shim, request: StateRequest) -> Result<Vec<u8>, TaskError> {
    // A daemon that has just started asks this of every container: one that an earlier daemon has begun to create is not
    // none.
    shim.created(&request.id).await;
    let container = shim.container(&request.id)?;
    let process = container.process(&request.exec_id)?;
    let status = match container.status(&process) {
        Status::Pausing => WireStatus::Pausing,
        Status::State(State::Created) => WireStatus::Created,
        Status::State(State::Running) => WireStatus::Running,
        Status::State(State::Paused) => WireStatus::Paused,
        Status::State(State::Stopped | State::Deleted) => WireStatus::Stopped,
    };
    let ended = process.ended();
    let stdio = &process.stdio;
    encode(&StateResponse {
        id: process.id.clone(),
        bundle: container.bundle.display().to_string(),
        pid: process.pid().unsigned_abs(),
        status: status as i32,
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        exit_status: ended.map_or(0, |ended| ended.status),
        exited_at: ended.map(|ended| ended.timestamp()),
        exec_id: request.exec_id,
    })
}

async fn kill(shim: &Shim, deadline: Deadline, request: KillRequest) -> Result<Vec<u8>, TaskError> {
    let container = shim.container(&request.id)?;
    if request.exec_id.is_empty() {
        container.kill(request.signal, request.all, deadline).await?;
    } else {
        let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
        container.process(&request.exec_id)?.signal(signal)?;
    }
    empty()
}

async fn wait(shim: &Shim, request: WaitRequest) -> Result<Vec<u8>, TaskError> {
    let process = shim.container(&request.id)?.process(&request.exec_id)?;
    let ended = process.wait().await;
    encode(&WaitResponse {
        exit_status: ended.map_or(NEVER_RAN, |ended| ended.status),
        exited_at: ended.map(|ended| ended.timestamp()),
    })
}

fn pids(shim: &Shim, request: PidsRequest) -> Result<Vec<u8>, TaskError> {
    let container = shim.container(&request.id)?;
    let info = |pid| ProcessInfo {
        pid,
        info: container.exec_of_pid(pid).map(|exec_id| any::pack(&ProcessDetails { exec_id })),
    };
    encode(&PidsResponse { processes: container.processes().into_iter().map(info).collect() })
}

fn stats(shim: &Shim, request: StatsRequest) -> Result<Vec<u8>, TaskError> {
    let metrics = shim.container(&request.id)?.metrics()?;
    encode(&StatsResponse { stats: Some(metrics) })
}

fn resize(shim: &Shim, request: ResizePtyRequest) -> Result<Vec<u8>, TaskError> {
    let container = shim.container(&request.id)?;
    let process = container.process(&request.exec_id)?;
    if let (false, state @ (State::Stopped | State::Deleted)) = (request.exec_id.is_empty(), process.state())
    {
        return Err(TaskError::State { operation: "resize", state, what: "container" });
    }
    let clamp = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
    if let Some(streams) = process.streams() {
        let resized = streams.resize(clamp(request.height), clamp(request.width));
        resized.map_err(|source| TaskError::Io {
            step: "resize terminal of",
            path: container.bundle.clone(),
            source,
        })?;
    }
    empty()
}

fn close_stdin(shim: &Shim, request: CloseIoRequest) -> Result<Vec<u8>, TaskError> {
    let process = shim.container(&request.id)?.process(&request.exec_id)?;
    if let (true, Some(streams)) = (request.stdin, process.streams()) {
        streams.close_stdin();
    }
    empty()
}

fn connect(shim: &Shim, request: ConnectRequest) -> Result<Vec<u8>, TaskError> {
    let pid = shim.container(&request.id).map_or(0, |container| container.init.pid().unsigned_abs());
    encode(&ConnectResponse {
        shim_pid: std::process::id(),
        task_pid: pid,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}
