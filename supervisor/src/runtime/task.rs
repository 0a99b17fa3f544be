//! What the callers of [`Tasks`](super::Tasks) give and get: plain data, no wire types.

use std::collections::BTreeMap;
use std::time::SystemTime;

use davit_model::{Any, Mount};

use super::checkpoint::Checkpoint;

/// Where the standard streams of a process go: paths of FIFOs, or URIs (`fifo://`, `file://`, `binary://`).
/// An empty text is `/dev/null`. The shim carries them out; the daemon only passes them on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Standard input.
    pub stdin: String,
    /// Standard output; with a terminal, everything that the process writes.
    pub stdout: String,
    /// Standard error; unused with a terminal.
    pub stderr: String,
    /// The process gets a pseudo-terminal.
    pub terminal: bool,
}

/// What is needed to create a task. The adapter fills it from the request and from the container's record.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// The container; also the id of its task and of its init process.
    pub container_id: String,
    /// The runtime spec of the container's record: its value is JSON and becomes `config.json` byte for byte.
    /// `None` for sandboxes that have none.
    pub spec: Option<Any>,
    /// The mounts of the root filesystem, in order; the shim mounts them on the bundle's `rootfs`.
    pub rootfs: Vec<Mount>,
    /// The standard streams of the init process.
    pub stdio: Stdio,
    /// What it is restored from, if it is not to be started afresh.
    pub checkpoint: Checkpoint,
    /// `io.containerd.runc.v2` and the like, or the absolute path of a shim: the container's runtime, or the
    /// request's `runtime_path` when that is not empty.
    pub runtime: String,
    /// The options of the request. They win over [`runtime_options`](Self::runtime_options) when their value
    /// is not empty.
    pub task_options: Option<Any>,
    /// The options of the container's record.
    pub runtime_options: Option<Any>,
    /// The sandbox that the container belongs to; empty for none.
    pub sandbox_id: String,
    /// `protocol+scheme://…` of a task API that exists, as sandbox controllers hand it out; empty to start a
    /// shim.
    pub task_api_address: String,
    /// The version of the API at [`task_api_address`](Self::task_api_address): 2 or 3.
    pub task_api_version: u32,
}

/// What is needed to register an exec.
#[derive(Debug, Clone, Default)]
pub struct ExecOptions {
    /// The name of the exec within its container.
    pub exec_id: String,
    /// The process as a JSON document, passed on unread.
    pub spec: Option<Any>,
    /// Its standard streams.
    pub stdio: Stdio,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The process; zero when it never ran or its number is not known.
    pub pid: u32,
    /// The exit code; 128 and the signal's number when a signal ended it.
    pub status: u32,
    /// When it ended; `None` when it never ran.
    pub exited_at: Option<SystemTime>,
}

/// The states of a process (`containerd.v1.types.Status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The shim did not say.
    Unknown,
    /// Made, and waiting for its start.
    Created,
    /// Running.
    Running,
    /// Ended; it stays so until it is deleted.
    Stopped,
    /// Frozen.
    Paused,
    /// On the way to being frozen.
    Pausing,
}

/// The state of one process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// The exec's id, or the container's for its init process. Clients expect it in `Process.id`.
    pub id: String,
    /// Its number; zero before the start of an exec.
    pub pid: u32,
    /// What it is doing.
    pub status: Status,
    /// Its standard streams.
    pub stdio: Stdio,
    /// Its exit code once it has stopped.
    pub exit_status: u32,
    /// When it stopped.
    pub exited_at: Option<SystemTime>,
}

impl Process {
    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        let exit = Exit { pid: self.pid, status: self.exit_status, exited_at: self.exited_at };
        (self.status == Status::Stopped).then_some(exit)
    }
}

/// One entry of a container's process list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its number on the host.
    pub pid: u32,
    /// `containerd.runc.v1.ProcessDetails` for the process of an exec.
    pub info: Option<Any>,
}

/// The counters of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metric {
    /// The container.
    pub id: String,
    /// When they were asked for.
    pub timestamp: SystemTime,
    /// `io.containerd.cgroups.v1.Metrics` or `….v2.Metrics`, as the shim gave it.
    pub data: Option<Any>,
}

/// What is to change on a running task.
#[derive(Debug, Clone, Default)]
pub struct UpdateOptions {
    /// The new limits, a JSON document (`LinuxResources`), passed on unread.
    pub resources: Option<Any>,
    /// Annotations for the shim.
    pub annotations: BTreeMap<String, String>,
}
