//! What runs: shims and the tasks in them.
//!
//! A *task* is the running side of a container: an init process and any number of execs, held by a shim that
//! outlives the daemon. [`Tasks`] is the whole interface; the files below it read in the order of a task's
//! life:
//!
//! * [`transitions`] decides, synchronously and without any I/O, what state a task is in and what follows
//!   from what happens to it. The state diagram is there.
//! * `owner` is the task (of tokio) that owns one container: it feeds the transitions and starts what they
//!   ask for. It never waits for a shim. Calls run beside it and report back; Kill, State and Wait overtake
//!   everything.
//! * `create`, `teardown` and `load` are the three jobs that take longer: to bring a shim up, to take it down
//!   (asked for, or after its death), and to find it again after the daemon's restart.
//! * `binary` runs shim binaries; `shim` speaks to a running one, and `shims` has it upgrade itself; `log` reads its log
//!   pipe.
//! * `checkpoint` has the folders that checkpoints are written to and restored from.
//! * `sandbox` is the controller of sandboxes that a shim runs.
//! * `forward` is the socket on which shims tell what happened.
//!
//! A call that changes something runs in its own task of tokio to its end, whether or not its caller still
//! waits. Stopping the daemon touches no container.

mod binary;
mod checkpoint;
mod create;
mod error;
mod forward;
mod load;
mod log;
mod owner;
mod registry;
mod sandbox;
mod shim;
mod shims;
mod task;
mod teardown;
pub mod transitions;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use davit_model::error::chain;
use davit_model::{Any, Coded, ErrorCode, identifier};
use davit_proto::containerd::types::RuntimeInfo;
use prost::Message as _;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tracing::{Instrument, Span, warn};

use crate::events::Hub;

pub use checkpoint::{Checkpoint, CheckpointFolder};
pub use error::{Error, ShimError};
pub use load::{Loading, Records};
pub use sandbox::{
    SandboxError, SandboxMetric, SandboxOptions, SandboxPlatform, SandboxStatus, Sandboxes, Started,
};
pub use shims::RunningShim;
pub use task::{
    CreateOptions, ExecOptions, Exit, Metric, Process, ProcessInfo, Status, Stdio, UpdateOptions,
};

/// The annotation of a shim's `-info` that lists the types of mounts which it carries out itself, with commas between them
/// (containerd 2.2, `core/runtime/v2`).
const ACCEPTED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Where things are and how long they may take.
#[derive(Debug, Clone)]
pub struct Config {
    /// The folder of work directories, `<root>/io.containerd.runtime.v2.task`. It is made if missing.
    pub root: PathBuf,
    /// The folder of bundles, `<state>/io.containerd.runtime.v2.task`. It is made if missing.
    pub state: PathBuf,
    /// The gRPC socket, as shims are told of it. It is part of the name of a shim's socket.
    pub grpc_address: String,
    /// The socket that shims report events to.
    pub ttrpc_address: String,
    /// The daemon's own binary, which old shims run to publish events.
    pub daemon_binary: PathBuf,
    /// Where our own shim is looked for before `PATH`, and any other after it: the folder of the daemon's
    /// binary.
    pub shim_directory: PathBuf,
    /// The shim that answers to `io.containerd.runc.v2` and `io.containerd.davit.v2`; `None` for our own.
    pub default_shim: Option<PathBuf>,
    /// The OCI runtime for containers whose options name none; `None` leaves the choice to the shim.
    pub default_runtime_binary: Option<String>,
    /// The folder of shim sockets, for shims that can be told (`None`: the shim's default,
    /// `/run/containerd/s`).
    pub socket_directory: Option<PathBuf>,
    /// More variables for shims.
    pub environment: Vec<(String, String)>,
    /// Shims log at debug level.
    pub debug: bool,
    /// The bounds of time.
    pub timeouts: Timeouts,
}

#[cfg(test)]
impl Config {
    /// Of a test that has this folder and starts no shim.
    pub(crate) fn of_test(folder: &std::path::Path) -> Config {
        Config {
            root: folder.join("root"),
            state: folder.join("state"),
            grpc_address: "/nowhere.sock".into(),
            ttrpc_address: "/nowhere.sock.ttrpc".into(),
            daemon_binary: "/nowhere".into(),
            shim_directory: folder.to_owned(),
            default_shim: None,
            default_runtime_binary: None,
            socket_directory: None,
            environment: Vec::new(),
            debug: false,
            timeouts: Timeouts::default(),
        }
    }
}

/// The bounds of time. The defaults are containerd's (`io.containerd.timeout.*`) where it has one.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// `shim start`, until its output ends.
    pub start: Duration,
    /// The shim's Create, which mounts the root filesystem and runs the OCI runtime. containerd has no bound
    /// here, and so keeps the name of a container whose Create hangs for ever.
    pub create: Duration,
    /// For a shim found at start to answer, before it counts as unreachable.
    pub load: Duration,
    /// `shim delete` after a death or a failed create.
    pub cleanup: Duration,
    /// The shim's Shutdown.
    pub shutdown: Duration,
    /// Any other call that changes something or asks for something, but for Wait and Checkpoint. containerd
    /// leaves this to its clients; but the calls of a client that goes away go on here, and must not pile up
    /// on a shim that hangs.
    pub call: Duration,
    /// The shim's State.
    pub state: Duration,
    /// The shim's Stats.
    pub stats: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            start: Duration::from_secs(30),
            create: Duration::from_secs(240),
            load: Duration::from_secs(5),
            cleanup: Duration::from_secs(5),
            shutdown: Duration::from_secs(3),
            call: Duration::from_secs(120),
            state: Duration::from_secs(2),
            stats: Duration::from_secs(2),
        }
    }
}

/// Why the runtime cannot begin.
#[derive(Debug, thiserror::Error)]
#[error("make the folder {}", path.display())]
pub struct OpenError {
    /// The folder.
    pub path: PathBuf,
    /// The system's answer.
    pub source: std::io::Error,
}

/// The tasks of all namespaces. Clones are the same.
#[derive(Clone)]
pub struct Tasks {
    shared: Arc<registry::Shared>,
}

impl Tasks {
    /// A runtime with no tasks yet; [`load`](Tasks::load) finds those that run already.
    ///
    /// # Errors
    /// [`OpenError`] when a folder cannot be made.
    pub fn open(config: Config, hub: Hub) -> Result<Tasks, OpenError> {
        for path in [&config.root, &config.state] {
            davit_shim_protocol::bundle::make_parents(path)
                .map_err(|source| OpenError { path: path.clone(), source })?;
        }
        Ok(Tasks { shared: Arc::new(registry::Shared::new(config, hub)) })
    }

    /// Finds the shims of an earlier daemon by their bundles. Every task is known when this returns, and
    /// calls for it wait (for [`Timeouts::load`] at most) until its shim has answered; nothing else waits.
    /// The rest happens in the background and is over when [`Loading::finished`] returns.
    ///
    /// `records` says of which containers there is a record.
    pub fn load(&self, records: Records) -> Loading {
        load::load(&self.shared, records)
    }

    /// Returns when nothing of the tasks that were deleted is left on disk. To be called at the end of the daemon; the
    /// next one removes what this one does not.
    pub async fn settle(&self) {
        self.shared.removals_over().await;
    }

    /// Serves the socket that shims report to until the future is dropped. Only processes of the daemon's own
    /// user are heard.
    pub async fn serve_events(&self, listener: UnixListener) {
        forward::serve(self.shared.clone(), listener).await;
    }

    /// Makes the bundle, starts the shim and has it create the container. Gives the number of the init
    /// process, which waits for [`start`](Tasks::start).
    ///
    /// # Errors
    /// Any of [`Error`]; nothing is left behind then: no bundle, work folder, shim, pipe or mount.
    pub async fn create(&self, namespace: &str, options: CreateOptions) -> Result<u32, Error> {
        validate_namespace(namespace)?;
        let id = options.container_id.clone();
        identifier::validate(&id).map_err(|source| Error::TaskId { id: id.clone(), source })?;
        let reply = owner::create(&self.shared, namespace, options).await?;
        reply.await.unwrap_or(Err(Error::Stopping))
    }

    /// Starts the init process, or with `exec_id` the exec. Gives its number.
    ///
    /// # Errors
    /// [`Error::Shim`] with FailedPrecondition when it runs already.
    pub async fn start(&self, namespace: &str, id: &str, exec_id: &str) -> Result<u32, Error> {
        let task = self.task(namespace, id)?;
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let (shared, namespace) = (self.shared.clone(), namespace.to_owned());
        detached(async move {
            let shim = task.ready(&id).await?;
            let pid = shim.start(&exec_id).await?;
            if exec_id.is_empty() && task.pid() == 0 {
                // It had no process until now, so it was restored.
                shared.remove_folder_later(shared.bundle(&namespace, &id).checkpoint());
            }
            let process = if exec_id.is_empty() { id } else { exec_id };
            task.tell(owner::Message::Started { process, pid }).await;
            Ok(pid)
        })
        .await
    }

    /// Deletes the task of a container whose init process has ended or never started, and its shim with it.
    ///
    /// # Errors
    /// [`Error::Shim`] with FailedPrecondition while it runs.
    pub async fn delete(&self, namespace: &str, id: &str) -> Result<Exit, Error> {
        let task = self.task(namespace, id)?;
        let (reply, answer) = oneshot::channel();
        if !task.tell(owner::Message::Delete { reply }).await {
            return Err(Error::NotFound { id: id.to_owned() });
        }
        // The shim has its bound, and so has each step after it; what is left over is what a dead shim has left, and that
        // may take for ever.
        let timeouts = &self.shared.config.timeouts;
        match tokio::time::timeout(timeouts.call + task.patience, answer).await {
            Ok(answer) => answer.unwrap_or(Err(Error::Stopping)),
            Err(_) => Err(Error::NotCleanedUp { id: id.to_owned() }),
        }
    }

    /// Deletes an exec that has ended or never started.
    ///
    /// # Errors
    /// [`Error::Shim`] with FailedPrecondition while it runs, with NotFound when there is none of the name.
    pub async fn delete_process(&self, namespace: &str, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let task = self.task(namespace, id)?;
        if exec_id.is_empty() {
            return Err(Error::NoExecId);
        }
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        detached(async move {
            let exit = task.ready(&id).await?.delete(&exec_id).await?;
            task.tell(owner::Message::ExecDeleted { process: exec_id, exit }).await;
            Ok(exit)
        })
        .await
    }

    /// Registers an exec; [`start`](Tasks::start) runs it.
    ///
    /// # Errors
    /// [`Error::Shim`] with AlreadyExists when the name is taken.
    pub async fn exec(&self, namespace: &str, id: &str, options: ExecOptions) -> Result<(), Error> {
        if options.exec_id.is_empty() {
            return Err(Error::NoExecId);
        }
        let task = self.task(namespace, id)?;
        identifier::validate(&options.exec_id)
            .map_err(|source| Error::ExecId { id: options.exec_id.clone(), source })?;
        if options.exec_id == id {
            return Err(Error::ExecExists { id: options.exec_id });
        }
        let id = id.to_owned();
        detached(async move {
            let shim = task.ready(&id).await?;
            let process = options.exec_id.clone();
            shim.exec(options).await?;
            task.tell(owner::Message::ExecAdded { process }).await;
            Ok(())
        })
        .await
    }

    /// The state of the init process, or with `exec_id` of the exec.
    ///
    /// # Errors
    /// [`Error::Timeout`] when the shim does not answer within [`Timeouts::state`].
    pub async fn state(&self, namespace: &str, id: &str, exec_id: &str) -> Result<Process, Error> {
        let task = self.task(namespace, id)?;
        self.state_of(&task, id, exec_id).await
    }

    /// The states of the init processes of a namespace. A task that vanishes meanwhile is left out; one whose
    /// shim does not answer is there with [`Status::Unknown`].
    pub async fn list(&self, namespace: &str) -> Vec<Process> {
        let states = self.shared.in_namespace(namespace).into_iter().map(|(id, task)| async move {
            match self.state_of(&task, &id, "").await {
                Ok(process) => Some(process),
                Err(error) if error.code() == ErrorCode::NotFound => None,
                Err(error) => {
                    warn!(namespace, container.id = id, error = chain(&error), "cannot read task state");
                    let pid = task.pid();
                    let (status, stdio) = (Status::Unknown, Stdio::default());
                    Some(Process { id, pid, status, stdio, exit_status: 0, exited_at: None })
                }
            }
        });
        futures::future::join_all(states).await.into_iter().flatten().collect()
    }

    /// Whether there is a task for the container, in whatever state.
    pub fn exists(&self, namespace: &str, id: &str) -> bool {
        self.shared.get(namespace, id).is_some()
    }

    /// Sends a signal to the init process or to an exec; `all` means every process of the container.
    ///
    /// # Errors
    /// [`Error::Shim`] with NotFound when the process has ended.
    pub async fn kill(
        &self,
        namespace: &str,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let shim = self.task(namespace, id)?.ready(id).await?;
        // An exec's own process is meant, as in containerd: `all` is for the container.
        gone_is_not_found(shim.kill(exec_id, signal, all && exec_id.is_empty()).await)
    }

    /// Freezes every process of the container.
    ///
    /// # Errors
    /// The shim's.
    pub async fn pause(&self, namespace: &str, id: &str) -> Result<(), Error> {
        let (task, id) = (self.task(namespace, id)?, id.to_owned());
        detached(async move { task.ready(&id).await?.pause().await }).await
    }

    /// Thaws it.
    ///
    /// # Errors
    /// The shim's.
    pub async fn resume(&self, namespace: &str, id: &str) -> Result<(), Error> {
        let (task, id) = (self.task(namespace, id)?, id.to_owned());
        detached(async move { task.ready(&id).await?.resume().await }).await
    }

    /// The processes of the container, by their numbers on the host.
    ///
    /// # Errors
    /// The shim's.
    pub async fn pids(&self, namespace: &str, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        self.task(namespace, id)?.ready(id).await?.pids().await
    }

    /// Closes standard input, if `stdin` says so.
    ///
    /// # Errors
    /// The shim's.
    pub async fn close_io(&self, namespace: &str, id: &str, exec_id: &str, stdin: bool) -> Result<(), Error> {
        let shim = self.task(namespace, id)?.ready(id).await?;
        if stdin { shim.close_stdin(exec_id).await } else { Ok(()) }
    }

    /// Tells the terminal its size in characters.
    ///
    /// # Errors
    /// The shim's.
    pub async fn resize_pty(
        &self,
        namespace: &str,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), Error> {
        self.task(namespace, id)?.ready(id).await?.resize_pty(exec_id, width, height).await
    }

    /// Changes the limits of the container.
    ///
    /// # Errors
    /// The shim's.
    pub async fn update(&self, namespace: &str, id: &str, options: UpdateOptions) -> Result<(), Error> {
        let (task, id) = (self.task(namespace, id)?, id.to_owned());
        detached(async move { task.ready(&id).await?.update(options).await }).await
    }

    /// An empty folder for a checkpoint in this namespace.
    ///
    /// # Errors
    /// [`Error::CheckpointFolder`].
    pub async fn checkpoint_folder(&self, namespace: &str) -> Result<CheckpointFolder, Error> {
        validate_namespace(namespace)?;
        let (shared, namespace) = (self.shared.clone(), namespace.to_owned());
        let make = move || CheckpointFolder::make(&shared, &namespace);
        create::blocking(&self.shared.lane, make).await.map_err(|source| Error::CheckpointFolder { source })
    }

    /// Writes a checkpoint of the container into the folder `path`. Turning it into content is the caller's
    /// work ([`Checkpoints`](crate::checkpoint::Checkpoints)). The checkpoint of a large process takes its time: there is
    /// no bound, as in containerd.
    ///
    /// # Errors
    /// The shim's.
    pub async fn checkpoint(
        &self,
        namespace: &str,
        id: &str,
        path: &str,
        options: Option<Any>,
    ) -> Result<(), Error> {
        let (task, id, path) = (self.task(namespace, id)?, id.to_owned(), path.to_owned());
        detached(async move { task.ready(&id).await?.checkpoint(path, options).await }).await
    }

    /// The counters of every task of a namespace that `wanted` (asked with the container's id) chooses. A
    /// task without any, or whose shim does not answer in time, is left out.
    pub async fn metrics(&self, namespace: &str, wanted: impl Fn(&str) -> bool) -> Vec<Metric> {
        let tasks = self.shared.in_namespace(namespace).into_iter().filter(|(id, _)| wanted(id));
        let metrics = tasks.map(|(id, task)| async move {
            let timestamp = SystemTime::now();
            let limit = self.shared.config.timeouts.stats;
            let stats = within(limit, &id, "Stats", async { task.ready(&id).await?.stats().await }).await;
            match stats {
                Ok(data) => Some(Metric { id, timestamp, data }),
                Err(error) if error.code() == ErrorCode::NotFound => None,
                Err(error) => {
                    warn!(namespace, container.id = id, error = chain(&error), "cannot read task metrics");
                    None
                }
            }
        });
        futures::future::join_all(metrics).await.into_iter().flatten().collect()
    }

    /// Waits for the end of the init process, or with `exec_id` of the exec; at once if it has ended and is
    /// not yet deleted. Dropping the future gives the wait up. A shim's death answers too, with the exit of
    /// its process.
    ///
    /// # Errors
    /// [`Error::Shim`] with NotFound for an unknown exec.
    pub async fn wait(&self, namespace: &str, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let task = self.task(namespace, id)?;
        let process = if exec_id.is_empty() { id } else { exec_id }.to_owned();
        let (reply, answer) = oneshot::channel();
        if !task.tell(owner::Message::Wait { process, reply }).await {
            return Err(Error::NotFound { id: id.to_owned() });
        }
        answer.await.unwrap_or(Err(Error::Stopping))
    }

    /// The binary that a runtime's name or path stands for.
    ///
    /// # Errors
    /// [`Error::StartShim`] when there is none.
    pub fn resolve_runtime(&self, runtime: &str) -> Result<PathBuf, Error> {
        binary::resolve(&self.shared.config, runtime).map_err(|source| Error::StartShim { source })
    }

    /// What a runtime can do, as its shim says it: an encoded `containerd.types.RuntimeInfo`. `options` are
    /// those of the runtime, such as the OCI runtime to ask.
    ///
    /// # Errors
    /// [`Error::StartShim`] when there is no such shim or it does not say.
    pub async fn runtime_info(&self, runtime: &str, options: Option<Any>) -> Result<Vec<u8>, Error> {
        let config = &self.shared.config;
        let info = async { binary::info(config, &binary::resolve(config, runtime)?, options).await };
        info.await.map_err(|source| Error::StartShim { source })
    }

    /// The types of mounts that a shim carries out itself although others cannot, as it says; none if it does not say.
    pub async fn accepted_mounts(&self, runtime: &str) -> Vec<String> {
        let info = match self.runtime_info(runtime, None).await {
            Ok(info) => RuntimeInfo::decode(info.as_slice()).unwrap_or_default(),
            Err(error) => {
                warn!(error = chain(&error), runtime, "cannot ask a shim for the mounts that it accepts");
                return Vec::new();
            }
        };
        let kinds = info.annotations.get(ACCEPTED_MOUNTS).map(String::as_str).unwrap_or_default();
        kinds.split(',').filter(|kind| !kind.is_empty()).map(str::to_owned).collect()
    }

    fn task(&self, namespace: &str, id: &str) -> Result<registry::Handle, Error> {
        self.shared.get(namespace, id).ok_or_else(|| Error::NotFound { id: id.to_owned() })
    }

    async fn state_of(&self, task: &registry::Handle, id: &str, exec_id: &str) -> Result<Process, Error> {
        let limit = self.shared.config.timeouts.state;
        let state = async { task.ready(id).await?.state(limit, exec_id).await };
        gone_is_not_found(within(limit, id, "State", state).await)
    }
}

fn validate_namespace(namespace: &str) -> Result<(), Error> {
    identifier::validate(namespace)
        .map_err(|source| Error::Namespace { namespace: namespace.to_owned(), source })
}

/// Runs a change to its end even if the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work.instrument(Span::current())).await.unwrap_or(Err(Error::Stopping))
}

/// Bounds a call, including the time that it is held back.
async fn within<T>(
    limit: Duration,
    id: &str,
    method: &'static str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Timeout { id: id.to_owned(), method }),
    }
}

/// A process whose shim is gone is gone itself: what asks for its state or wants to kill it is told so.
fn gone_is_not_found<T>(result: Result<T, Error>) -> Result<T, Error> {
    result.map_err(|error| match error {
        Error::ShimGone { id } => Error::NotFound { id },
        other => other,
    })
}
