//! The restart monitor: keeps the tasks of containers in the state that their labels ask for.
//!
//! Clients such as nerdctl put `containerd.io/restart.*` on a container, and the daemon does the rest: it looks at all
//! such containers at its start and then every ten seconds, as containerd's monitor does (`plugins/restart`). It does
//! not act on an exit at once: a client that kills a container to remove it would find a new task in its place. So a
//! container that ends at once for ever costs a start and a line of the log in each interval, and no back-off is needed.
//!
//! Where containerd's monitor does harm, this one does not: a task that somebody has created and not yet started is
//! theirs; a container younger than one look is about to get its task from its client; a shim that does not answer
//! says nothing about its container; and a container whose end hangs delays no other.

mod policy;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use davit_model::error::chain;
use davit_model::{Coded, ErrorCode, Labels};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};

use crate::metadata::{Container, Error as MetadataError, Metadata, Scope};
use crate::rooted::{Error as TaskError, RootedTasks};
use crate::runtime::{CreateOptions, Stdio, Tasks};
pub use policy::CAPABILITIES;
use policy::{Change, Task};

/// The most tasks that are started at once. After a reboot all containers want to be, and the more of them share the
/// processors, the more fail for want of time.
const STARTS: usize = 32;

/// Why a container could not be brought into the wanted state. It is tried again at the next look.
#[derive(Debug, thiserror::Error)]
enum RestartError {
    /// Its record or its root filesystem.
    #[error("cannot read or change the container's record")]
    Record {
        /// Why.
        source: MetadataError,
    },
    /// Its task.
    #[error("cannot {action} the task")]
    Task {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: TaskError,
    },
}

/// The monitor. Clones are the same.
#[derive(Clone)]
pub struct Monitor {
    metadata: Metadata,
    tasks: Tasks,
    rooted: RootedTasks,
    interval: Duration,
    /// The turns of tasks that are started.
    turns: Arc<Semaphore>,
    /// The containers that are being changed, by namespace and id.
    busy: Arc<Mutex<HashSet<(String, String)>>>,
}

impl Monitor {
    /// A monitor that looks in this interval.
    pub fn new(metadata: Metadata, tasks: Tasks, interval: Duration) -> Monitor {
        let rooted = RootedTasks::new(metadata.clone(), tasks.clone());
        let turns = Arc::new(Semaphore::new(STARTS));
        Monitor { metadata, tasks, rooted, interval, turns, busy: Arc::default() }
    }

    /// Looks again and again until `stop`. What has begun is finished beyond that.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            if let Err(error) = self.look().await {
                warn!(error = chain(&error), "cannot look for containers to restart");
            }
            // Neither loses anything when it is dropped.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.interval) => {}
            }
        }
    }

    /// Looks once, and begins what has to be changed.
    async fn look(&self) -> Result<(), MetadataError> {
        let filter = [format!("labels.{:?}", policy::STATUS)];
        for namespace in self.metadata.namespaces().list()? {
            let scope = Scope::new(&namespace.name, None)?;
            for container in self.metadata.containers(&scope).list(&filter)? {
                self.consider(&scope, container);
            }
        }
        Ok(())
    }

    /// Compares and changes one container, while others are looked at.
    fn consider(&self, scope: &Scope, container: Container) {
        let key = (scope.namespace().to_owned(), container.id.clone());
        if !self.busy().insert(key.clone()) {
            return;
        }
        let (monitor, scope) = (self.clone(), scope.clone());
        let span = info_span!("restart", namespace = key.0, container.id = key.1);
        let work = async move {
            if let Err(error) = monitor.keep(&scope, container).await {
                warn!(error = chain(&error), "container is not in the wanted state");
            }
            monitor.busy().remove(&key);
        };
        tokio::spawn(work.instrument(span));
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, HashSet<(String, String)>> {
        // Whoever panicked with the lock has left a set that is whole.
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn keep(&self, scope: &Scope, container: Container) -> Result<(), RestartError> {
        let task = match self.tasks.state(scope.namespace(), &container.id, "").await {
            Ok(process) => Task::Is(process.status, process.exit_status),
            Err(error) if error.code() == ErrorCode::NotFound => Task::None,
            Err(source) => return Err(RestartError::Task { action: "see", source: source.into() }),
        };
        let age = SystemTime::now().duration_since(container.created_at).unwrap_or_default();
        if task == Task::None && age < self.interval {
            return Ok(());
        }
        match policy::reconcile(&container.labels, task) {
            Ok(Change::None) => Ok(()),
            Ok(Change::Start { count }) => {
                info!(count, "restarting");
                self.start(scope, container, task, count).await
            }
            Ok(Change::Stop) => {
                info!("stopping");
                self.remove(scope, &container.id).await
            }
            Err(error) => {
                warn!(%error, "container is let alone");
                Ok(())
            }
        }
    }

    /// Counts the start, deletes what is left of the task, and starts a new one.
    async fn start(
        &self,
        scope: &Scope,
        container: Container,
        task: Task,
        count: i64,
    ) -> Result<(), RestartError> {
        let record = |source| RestartError::Record { source };
        let labels = Labels::from([(policy::COUNT.to_owned(), count.to_string())]);
        let counted = Container { id: container.id.clone(), labels, ..Container::default() };
        let path = format!("labels.{}", policy::COUNT);
        self.metadata.containers(scope).update(counted, &[path]).await.map_err(record)?;
        if task != Task::None {
            self.remove(scope, &container.id).await?;
        }
        let rootfs = if container.snapshot_key.is_empty() {
            Vec::new()
        } else {
            let snapshots = self.metadata.snapshots(scope, &container.snapshotter).map_err(record)?;
            snapshots.mounts(&container.snapshot_key).await.map_err(record)?
        };
        let log = policy::log(&container.labels);
        let terminal = container.spec.as_ref().is_some_and(|spec| wants_terminal(&spec.value));
        let options = CreateOptions {
            container_id: container.id.clone(),
            spec: container.spec,
            rootfs,
            stdio: Stdio { stdin: String::new(), stdout: log.clone(), stderr: log, terminal },
            runtime: container.runtime.name,
            runtime_options: container.runtime.options,
            sandbox_id: container.sandbox,
            ..CreateOptions::default()
        };
        let (namespace, id) = (scope.namespace(), container.id.as_str());
        let _turn = self.turns.acquire().await;
        let failed = |action| move |source| RestartError::Task { action, source };
        self.rooted.create(scope, options).await.map_err(failed("create"))?;
        if let Err(error) = self.tasks.start(namespace, id, "").await {
            // One that is left created would pass for somebody else's.
            if let Err(error) = self.remove(scope, id).await {
                warn!(error = chain(&error), "cannot remove the task that did not start");
            }
            return Err(failed("start")(error.into()));
        }
        Ok(())
    }

    /// Kills every process of a task, waits for its end, and deletes it.
    async fn remove(&self, scope: &Scope, id: &str) -> Result<(), RestartError> {
        const SIGKILL: u32 = 9;
        let namespace = scope.namespace();
        if self.tasks.kill(namespace, id, "", SIGKILL, true).await.is_ok() {
            let ended = self.tasks.wait(namespace, id, "").await;
            ended.map_err(|source| RestartError::Task {
                action: "wait for the end of",
                source: source.into(),
            })?;
        }
        match self.rooted.delete(scope, id).await {
            Ok(_) => Ok(()),
            // Its client was faster.
            Err(error) if error.code() == ErrorCode::NotFound => Ok(()),
            Err(source) => Err(RestartError::Task { action: "delete", source }),
        }
    }
}

/// Whether a runtime spec asks for a terminal. What cannot be read asks for nothing: the shim says what is wrong with it.
fn wants_terminal(spec: &[u8]) -> bool {
    #[derive(Default, Deserialize)]
    struct Spec {
        #[serde(default)]
        process: Process,
    }
    #[derive(Default, Deserialize)]
    struct Process {
        #[serde(default)]
        terminal: bool,
    }
    serde_json::from_slice::<Spec>(spec).is_ok_and(|spec| spec.process.terminal)
}

#[cfg(test)]
mod tests {
    use super::wants_terminal;

    #[test]
    fn a_terminal_is_what_the_spec_says() {
        assert!(wants_terminal(br#"{"process":{"terminal":true,"args":["x"]}}"#));
        for spec in [&b"{}"[..], b"", br#"{"process":{"terminal":false}}"#, br#"{"process":{"terminal":1}}"#]
        {
            assert!(!wants_terminal(spec));
        }
    }
}
