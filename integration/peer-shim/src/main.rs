//! A shim that is not ours: the crate `containerd-shim`, as makers of other runtimes use it, around one plain process
//! without namespaces. It serves version 3 of the task API and nothing that the tests do not call.
//!
//! ```text
//! Create: sh waits for a line ── Start: the line ──> exec of the bundle's args ── exit ──> Wait, State, Delete
//! ```

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::SystemTime;

use containerd_shim::protos::protobuf::EnumOrUnknown;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::{
    Config, DeleteResponse, Error, ExitSignal, Flags, Shim, StartOpts, Task, TtrpcContext, TtrpcResult, api,
};

/// The process of the container.
#[derive(Default)]
struct Process {
    pid: u32,
    bundle: String,
    /// What it waits for before it becomes the container's program.
    gate: Option<ChildStdin>,
    started: bool,
    exit: Option<(u32, Timestamp)>,
}

#[derive(Clone)]
struct Service {
    shutdown: Arc<ExitSignal>,
    process: Arc<(Mutex<Process>, Condvar)>,
}

impl Service {
    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.0.lock().expect("no thread panics with the lock")
    }
}

impl Shim for Service {
    type T = Service;

    fn new(_: &str, _: &Flags, _: &mut Config) -> Service {
        Service { shutdown: Arc::default(), process: Arc::default() }
    }

    fn start_shim(&mut self, options: StartOpts) -> Result<String, Error> {
        let group = options.id.clone();
        Ok(containerd_shim::spawn(options, &group, Vec::new())?.1)
    }

    fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        Ok(DeleteResponse { exit_status: 137, ..Default::default() })
    }

    fn wait(&mut self) {
        self.shutdown.wait();
    }

    fn create_task_service(&self, _: RemotePublisher) -> Service {
        self.clone()
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

fn failed(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Other(format!("{what}: {error}"))
}

/// Runs the arguments of a bundle behind a gate.
fn spawn(bundle: &Path) -> Result<std::process::Child, Error> {
    let text =
        std::fs::read_to_string(bundle.join("config.json")).map_err(|error| failed("config", error))?;
    let spec: serde_json::Value = serde_json::from_str(&text).map_err(|error| failed("config", error))?;
    let args = spec["process"]["args"].as_array().into_iter().flatten().filter_map(|arg| arg.as_str());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "read gate && exec \"$@\" </dev/null", "sh"]).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map_err(|error| failed("sh", error))
}

impl Task for Service {
    fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> TtrpcResult<api::CreateTaskResponse> {
        let mut child = spawn(Path::new(&request.bundle))?;
        let pid = child.id();
        *self.process() =
            Process { pid, bundle: request.bundle, gate: child.stdin.take(), ..Default::default() };
        let service = self.clone();
        std::thread::spawn(move || {
            let status = match child.wait() {
                Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
                Err(_) => 255,
            };
            service.process().exit = Some((status as u32, now()));
            service.process.1.notify_all();
        });
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    fn start(&self, _: &TtrpcContext, _: api::StartRequest) -> TtrpcResult<api::StartResponse> {
        let mut process = self.process();
        if let Some(mut gate) = process.gate.take() {
            gate.write_all(b"\n").map_err(|error| failed("gate", error))?;
        }
        process.started = true;
        Ok(api::StartResponse { pid: process.pid, ..Default::default() })
    }

    fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> TtrpcResult<api::StateResponse> {
        let process = self.process();
        let mut answer = api::StateResponse {
            id: request.id,
            bundle: process.bundle.clone(),
            pid: process.pid,
            ..Default::default()
        };
        let status = match &process.exit {
            Some((status, at)) => {
                answer.exit_status = *status;
                answer.exited_at = Some(at.clone()).into();
                api::Status::STOPPED
            }
            None if process.started => api::Status::RUNNING,
            None => api::Status::CREATED,
        };
        answer.status = EnumOrUnknown::new(status);
        Ok(answer)
    }

    fn wait(&self, _: &TtrpcContext, _: api::WaitRequest) -> TtrpcResult<api::WaitResponse> {
        let mut process = self.process();
        loop {
            if let Some((exit_status, at)) = process.exit.clone() {
                return Ok(api::WaitResponse {
                    exit_status,
                    exited_at: Some(at).into(),
                    ..Default::default()
                });
            }
            process = self.process.1.wait(process).expect("no thread panics with the lock");
        }
    }

    fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> TtrpcResult<api::Empty> {
        let (signal, pid) = (request.signal.to_string(), self.process().pid.to_string());
        let status = Command::new("/bin/kill").args(["-s", &signal, &pid]).status();
        if !status.map_err(|error| failed("kill", error))?.success() {
            return Err(Error::NotFoundError(format!("process {pid}")).into());
        }
        Ok(api::Empty::default())
    }

    fn delete(&self, _: &TtrpcContext, _: api::DeleteRequest) -> TtrpcResult<api::DeleteResponse> {
        let process = self.process();
        let Some((exit_status, at)) = process.exit.clone() else {
            return Err(Error::FailedPreconditionError("the process runs".into()).into());
        };
        Ok(api::DeleteResponse {
            pid: process.pid,
            exit_status,
            exited_at: Some(at).into(),
            ..Default::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, _: api::PidsRequest) -> TtrpcResult<api::PidsResponse> {
        Ok(api::PidsResponse::default())
    }

    fn connect(&self, _: &TtrpcContext, _: api::ConnectRequest) -> TtrpcResult<api::ConnectResponse> {
        let (shim_pid, task_pid) = (std::process::id(), self.process().pid);
        Ok(api::ConnectResponse { shim_pid, task_pid, ..Default::default() })
    }

    fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> TtrpcResult<api::Empty> {
        self.shutdown.signal();
        Ok(api::Empty::default())
    }
}

fn main() {
    // The thread that waits for the process reaps it. The crate reads this before it calls `Shim::new`.
    let config = Config { no_reaper: true, ..Default::default() };
    containerd_shim::run::<Service>("io.containerd.peer.v1", Some(config));
}
