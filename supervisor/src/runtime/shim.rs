//! A running shim, as one container sees it: the Task service over ttrpc. The only file (with `forward`) that
//! knows its messages.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use davit_model::{Any, ErrorCode, Mount};
use davit_proto::containerd::task::v3 as wire;
use davit_proto::containerd::types as wire_types;
use davit_proto::containerd::v1::types as wire_process;
use davit_shim_protocol::address;
use davit_shim_protocol::bootstrap::{PROTOCOL_TTRPC, StartResult, VERSION_3};
use davit_shim_protocol::bundle::Bundle;
use davit_shim_protocol::client::{CallError, Client, Target};
use prost::Message;

use super::task::{ExecOptions, Exit, Process, ProcessInfo, Status, Stdio, UpdateOptions};
use super::{Error, ShimError, Timeouts};

const SERVICE_V3: &str = "containerd.task.v3.Task";
const SERVICE_V2: &str = "containerd.task.v2.Task";

/// The connection of one container to its shim. Clones are the same.
#[derive(Clone)]
pub(super) struct Shim {
    inner: Arc<Inner>,
}

struct Inner {
    namespace: String,
    id: String,
    address: String,
    version: i32,
    /// It is the shim of a sandbox, which ends it: no container does.
    sandbox: bool,
    /// The bound of calls that have none of their own.
    limit: Duration,
    client: Client,
    /// Set when the shim does not know the service of version 3. A binary that was replaced under a running
    /// shim claims for it what only the new one can.
    downgraded: AtomicBool,
}

impl Shim {
    /// Connects the container of a bundle to a shim that said where it is; `sandbox` when it is that of its
    /// sandbox.
    ///
    /// # Errors
    /// [`ShimError::Unsupported`], or [`ShimError::Connect`] when nobody listens or accepts there within
    /// [`Timeouts::load`].
    pub(super) async fn connect(
        bundle: &Bundle,
        told: &StartResult,
        sandbox: bool,
        timeouts: &Timeouts,
    ) -> Result<Shim, ShimError> {
        let unsupported =
            || ShimError::Unsupported { address: told.address.clone(), protocol: told.protocol.clone() };
        if !told.protocol.eq_ignore_ascii_case(PROTOCOL_TTRPC) {
            return Err(unsupported());
        }
        let path = address::parse(&told.address).map_err(|_| unsupported())?;
        let connect = async {
            match tokio::time::timeout(timeouts.load, connect_patiently(&path)).await {
                Ok(result) => result,
                Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
            }
        };
        let client =
            connect.await.map_err(|source| ShimError::Connect { address: told.address.clone(), source })?;
        let inner = Inner {
            namespace: bundle.namespace().to_owned(),
            id: bundle.id().to_owned(),
            address: told.address.clone(),
            version: told.version,
            sandbox,
            limit: timeouts.call,
            client,
            downgraded: AtomicBool::new(false),
        };
        Ok(Shim { inner: Arc::new(inner) })
    }

    /// Where it listens. Containers whose shims have the same address are a group.
    pub(super) fn address(&self) -> &str {
        &self.inner.address
    }

    /// Whether it is the shim of a sandbox, which ends it.
    pub(super) fn is_of_sandbox(&self) -> bool {
        self.inner.sandbox
    }

    /// How another container reaches the same shim.
    pub(super) fn bootstrap(&self) -> StartResult {
        StartResult {
            version: self.inner.version,
            address: self.inner.address.clone(),
            protocol: PROTOCOL_TTRPC.to_owned(),
        }
    }

    /// Resolves when the connection has ended. The future does not keep it open.
    pub(super) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.inner.client.closed()
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        self.inner.client.close();
    }

    /// True once the connection has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.inner.client.is_closed()
    }

    fn id(&self) -> String {
        self.inner.id.clone()
    }

    /// A call with the common bound.
    async fn call<Reply: Message + Default>(
        &self,
        method: &'static str,
        message: &impl Message,
    ) -> Result<Reply, Error> {
        self.call_within(method, Some(self.inner.limit), message).await
    }

    async fn call_within<Reply: Message + Default>(
        &self,
        method: &'static str,
        limit: Option<Duration>,
        message: &impl Message,
    ) -> Result<Reply, Error> {
        let inner = &*self.inner;
        loop {
            let version_3 = inner.version >= VERSION_3 && !inner.downgraded.load(Ordering::Relaxed);
            let service = if version_3 { SERVICE_V3 } else { SERVICE_V2 };
            let target = Target { service, method, namespace: &inner.namespace, limit };
            let begun = Instant::now();
            let result = inner.client.call(target, message).await;
            tracing::trace!(method, micros = begun.elapsed().as_micros() as u64, "shim call");
            match result {
                Err(CallError::Refused { error }) if version_3 && error.code == ErrorCode::Unimplemented => {
                    tracing::debug!(method, "shim does not serve {SERVICE_V3}, trying {SERVICE_V2}");
                    inner.downgraded.store(true, Ordering::Relaxed);
                }
                result => return result.map_err(|error| self.error(method, error)),
            }
        }
    }

    fn error(&self, method: &'static str, error: CallError) -> Error {
        let id = self.id();
        match error {
            CallError::Closed => Error::ShimGone { id },
            CallError::Deadline { .. } => Error::Timeout { id, method },
            CallError::Refused { error } => Error::Shim { code: error.code, message: error.message },
            source @ (CallError::TooLong { .. }
            | CallError::OversizedResponse { .. }
            | CallError::Reply { .. }) => Error::Protocol { id, method, source },
        }
    }

    /// A call of another service than that of tasks.
    pub(super) async fn call_other<Reply: Message + Default>(
        &self,
        service: &'static str,
        method: &'static str,
        limit: Duration,
        message: &impl Message,
    ) -> Result<Reply, Error> {
        let target = Target { service, method, namespace: &self.inner.namespace, limit: Some(limit) };
        self.inner.client.call(target, message).await.map_err(|error| self.error(method, error))
    }

    /// Asks the shim for itself: proof that it is alive. Gives its process.
    pub(super) async fn ping(&self, limit: Duration) -> Result<u32, Error> {
        let request = wire::ConnectRequest { id: self.id() };
        let reply: wire::ConnectResponse = self.call_within("Connect", Some(limit), &request).await?;
        tracing::debug!(shim.pid = reply.shim_pid, version = reply.version, "shim answers");
        Ok(reply.shim_pid)
    }

    /// Has the shim create the container. Gives the init process.
    pub(super) async fn create(
        &self,
        limit: Duration,
        bundle: &Path,
        rootfs: Vec<Mount>,
        stdio: Stdio,
        checkpoint: String,
        options: Option<Any>,
    ) -> Result<u32, Error> {
        let request = wire::CreateTaskRequest {
            id: self.id(),
            bundle: bundle.display().to_string(),
            rootfs: rootfs.into_iter().map(mount_to_wire).collect(),
            terminal: stdio.terminal,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            checkpoint,
            parent_checkpoint: String::new(),
            options: options.map(any_to_wire),
        };
        let reply: wire::CreateTaskResponse = self.call_within("Create", Some(limit), &request).await?;
        Ok(reply.pid)
    }

    /// Starts the init process, or an exec. Gives its number.
    pub(super) async fn start(&self, exec_id: &str) -> Result<u32, Error> {
        let request = wire::StartRequest { id: self.id(), exec_id: exec_id.to_owned() };
        let reply: wire::StartResponse = self.call("Start", &request).await?;
        Ok(reply.pid)
    }

    /// Deletes the container (or an exec) in the shim.
    pub(super) async fn delete(&self, exec_id: &str) -> Result<Exit, Error> {
        self.delete_within(self.inner.limit, exec_id).await
    }

    pub(super) async fn delete_within(&self, limit: Duration, exec_id: &str) -> Result<Exit, Error> {
        let request = wire::DeleteRequest { id: self.id(), exec_id: exec_id.to_owned() };
        let reply: wire::DeleteResponse = self.call_within("Delete", Some(limit), &request).await?;
        Ok(exit_from_wire(&reply))
    }

    /// Asks the shim to end; it does so when it holds no container any more.
    pub(super) async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        let request = wire::ShutdownRequest { id: self.id(), now: false };
        match self.call_within::<()>("Shutdown", Some(limit), &request).await {
            // Some end before they answer.
            Ok(()) | Err(Error::ShimGone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn state(&self, limit: Duration, exec_id: &str) -> Result<Process, Error> {
        let request = wire::StateRequest { id: self.id(), exec_id: exec_id.to_owned() };
        let reply: wire::StateResponse = self.call_within("State", Some(limit), &request).await?;
        Ok(Process {
            id: if exec_id.is_empty() { self.id() } else { exec_id.to_owned() },
            pid: reply.pid,
            status: status_from_wire(reply.status()),
            stdio: Stdio {
                stdin: reply.stdin,
                stdout: reply.stdout,
                stderr: reply.stderr,
                terminal: reply.terminal,
            },
            exit_status: reply.exit_status,
            exited_at: reply.exited_at.as_ref().and_then(time_from_wire),
        })
    }

    /// Waits for the end of the init process, or of an exec.
    pub(super) async fn wait(&self, exec_id: &str) -> Result<Exit, Error> {
        let request = wire::WaitRequest { id: self.id(), exec_id: exec_id.to_owned() };
        let reply: wire::WaitResponse = self.call_within("Wait", None, &request).await?;
        let exited_at = reply.exited_at.as_ref().and_then(time_from_wire);
        Ok(Exit { pid: 0, status: reply.exit_status, exited_at })
    }

    pub(super) async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = wire::KillRequest { id: self.id(), exec_id: exec_id.to_owned(), signal, all };
        self.call("Kill", &request).await
    }

    pub(super) async fn exec(&self, options: ExecOptions) -> Result<(), Error> {
        let request = wire::ExecProcessRequest {
            id: self.id(),
            exec_id: options.exec_id,
            terminal: options.stdio.terminal,
            stdin: options.stdio.stdin,
            stdout: options.stdio.stdout,
            stderr: options.stdio.stderr,
            spec: options.spec.map(any_to_wire),
        };
        self.call("Exec", &request).await
    }

    pub(super) async fn pids(&self) -> Result<Vec<ProcessInfo>, Error> {
        let request = wire::PidsRequest { id: self.id() };
        let reply: wire::PidsResponse = self.call("Pids", &request).await?;
        let info = |process: wire_process::ProcessInfo| ProcessInfo {
            pid: process.pid,
            info: process.info.map(any_from_wire),
        };
        Ok(reply.processes.into_iter().map(info).collect())
    }

    pub(super) async fn pause(&self) -> Result<(), Error> {
        self.call("Pause", &wire::PauseRequest { id: self.id() }).await
    }

    pub(super) async fn resume(&self) -> Result<(), Error> {
        self.call("Resume", &wire::ResumeRequest { id: self.id() }).await
    }

    pub(super) async fn close_stdin(&self, exec_id: &str) -> Result<(), Error> {
        let request = wire::CloseIoRequest { id: self.id(), exec_id: exec_id.to_owned(), stdin: true };
        self.call("CloseIO", &request).await
    }

    pub(super) async fn resize_pty(&self, exec_id: &str, width: u32, height: u32) -> Result<(), Error> {
        let request = wire::ResizePtyRequest { id: self.id(), exec_id: exec_id.to_owned(), width, height };
        self.call("ResizePty", &request).await
    }

    pub(super) async fn update(&self, options: UpdateOptions) -> Result<(), Error> {
        let request = wire::UpdateTaskRequest {
            id: self.id(),
            resources: options.resources.map(any_to_wire),
            annotations: options.annotations,
        };
        self.call("Update", &request).await
    }

    pub(super) async fn checkpoint(&self, path: String, options: Option<Any>) -> Result<(), Error> {
        let request = wire::CheckpointTaskRequest { id: self.id(), path, options: options.map(any_to_wire) };
        self.call_within("Checkpoint", None, &request).await
    }

    pub(super) async fn stats(&self) -> Result<Option<Any>, Error> {
        let reply: wire::StatsResponse = self.call("Stats", &wire::StatsRequest { id: self.id() }).await?;
        Ok(reply.stats.map(any_from_wire))
    }
}

/// A shim that is busy has its queue of connections full for a moment; that says nothing about its life.
async fn connect_patiently(path: &Path) -> std::io::Result<Client> {
    let mut pause = Duration::from_millis(5);
    loop {
        match Client::connect(path).await {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                // The kernel has no event for "there is room now" on a unix socket.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(500));
            }
            result => return result,
        }
    }
}

/// Reads what `shim delete` prints.
pub(super) fn decode_delete(output: &[u8]) -> Result<Exit, prost::DecodeError> {
    wire::DeleteResponse::decode(output).map(|reply| exit_from_wire(&reply))
}

fn exit_from_wire(reply: &wire::DeleteResponse) -> Exit {
    let exited_at = reply.exited_at.as_ref().and_then(time_from_wire);
    Exit { pid: reply.pid, status: reply.exit_status, exited_at }
}

fn status_from_wire(status: wire_process::Status) -> Status {
    match status {
        wire_process::Status::Unknown => Status::Unknown,
        wire_process::Status::Created => Status::Created,
        wire_process::Status::Running => Status::Running,
        wire_process::Status::Stopped => Status::Stopped,
        wire_process::Status::Paused => Status::Paused,
        wire_process::Status::Pausing => Status::Pausing,
    }
}

pub(super) fn mount_to_wire(mount: Mount) -> wire_types::Mount {
    wire_types::Mount {
        r#type: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

pub(super) fn any_to_wire(any: Any) -> prost_types::Any {
    prost_types::Any { type_url: any.type_url, value: any.value }
}

pub(super) fn any_from_wire(any: prost_types::Any) -> Any {
    Any { type_url: any.type_url, value: any.value }
}

/// The time of a wire message; Go programs write "never" as the year 1.
pub(super) fn time_from_wire(time: &prost_types::Timestamp) -> Option<SystemTime> {
    let nanos = u32::try_from(time.nanos).ok()?;
    let since = Duration::new(u64::try_from(time.seconds).ok()?, nanos.min(999_999_999));
    SystemTime::UNIX_EPOCH.checked_add(since).filter(|time| *time != SystemTime::UNIX_EPOCH)
}

/// The other way.
pub(super) fn time_to_wire(time: SystemTime) -> prost_types::Timestamp {
    prost_types::Timestamp::from(time)
}
