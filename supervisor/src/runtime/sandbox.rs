//! The sandbox controller `shim`: sandboxes that a shim of their own runs, by containerd's sandbox API.
//!
//! Such a shim serves `containerd.runtime.sandbox.v1.Sandbox` beside the Task service, and containers that name the
//! sandbox join it. Neither containerd's runc shim nor ours is one; those of micro-VMs are. What CRI's default
//! controller `podsandbox` does, a pause container, is no business of this one.
//!
//! ```text
//!   create          shim start, CreateSandbox      StartSandbox     StopSandbox     ShutdownSandbox
//!  ────────► Starting ───────────────────► Connected ──────────────────────────────────────► Ended
//!                │ failed                   │    ▲                                            ▲
//!                └──────────► Ended         ▼    │ answers (again)                            │
//!   load ───────────────────────────────► Silent ── nobody listens: `shim delete` ────────────┘
//! ```
//!
//! The bundle of a sandbox is laid out as a task's (`<state>/io.containerd.sandbox.controller.v1.shim/NS/ID`), so that
//! the daemon after this one finds the shim again.

mod error;
mod instance;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use davit_model::{Any, Coded, ErrorCode, Mount, identifier};
use davit_proto::any;
use davit_proto::containerd::events as messages;
use davit_proto::containerd::runtime::sandbox::v1 as wire;
use davit_proto::containerd::types as wire_types;
use davit_shim_protocol::bootstrap::StartResult;
use davit_shim_protocol::bundle::{self, Bundle};
use davit_shim_protocol::client::CallError;
use prost::Name;
use tracing::{Instrument, Span};

use super::load;
use super::registry::Shared;
use super::shim::{any_from_wire, any_to_wire, mount_to_wire, time_from_wire, time_to_wire};
use super::{Exit, OpenError, Records, Tasks};
use crate::events::{Cause, Envelope};
pub use error::SandboxError;
use instance::Instance;

/// The sandboxes that have a shim, by namespace and id.
#[derive(Default)]
pub(super) struct Registry {
    instances: Mutex<BTreeMap<(String, String), Arc<Instance>>>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, String), Arc<Instance>>> {
        // Whoever panicked with the lock has left a map that is whole.
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, namespace: &str, id: &str) -> Option<Arc<Instance>> {
        self.lock().get(&(namespace.to_owned(), id.to_owned())).cloned()
    }

    /// Where the shim of a sandbox is, for the containers that join it.
    pub(super) fn bootstrap(&self, namespace: &str, id: &str) -> Option<StartResult> {
        self.get(namespace, id)?.bootstrap()
    }

    fn insert(&self, instance: Arc<Instance>) -> bool {
        let key = (instance.bundle().namespace().to_owned(), instance.bundle().id().to_owned());
        match self.lock().entry(key) {
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(instance);
                true
            }
            std::collections::btree_map::Entry::Occupied(_) => false,
        }
    }

    fn remove(&self, bundle: &Bundle) {
        self.lock().remove(&(bundle.namespace().to_owned(), bundle.id().to_owned()));
    }
}

/// What a sandbox is created from.
#[derive(Debug, Clone, Default)]
pub struct SandboxOptions {
    /// Its id, an identifier.
    pub id: String,
    /// The runtime of its shim.
    pub runtime: String,
    /// The options of the runtime, for the start of the shim.
    pub runtime_options: Option<Any>,
    /// The spec, which becomes the bundle's `config.json`.
    pub spec: Option<Any>,
    /// The root filesystem.
    pub rootfs: Vec<Mount>,
    /// What the client has for the shim.
    pub options: Option<Any>,
    /// The network namespace.
    pub network_namespace: String,
    /// More for the shim.
    pub annotations: BTreeMap<String, String>,
}

/// A sandbox that was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The process that stands for it.
    pub pid: u32,
    /// When the shim made it.
    pub created_at: Option<SystemTime>,
}

/// What a shim says of its sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SandboxStatus {
    /// The process that stands for it.
    pub pid: u32,
    /// The shim's word for its state; empty for a sandbox without a shim.
    pub state: String,
    /// More, if it was asked for.
    pub info: BTreeMap<String, String>,
    /// When the shim made it.
    pub created_at: Option<SystemTime>,
    /// When it ended.
    pub exited_at: Option<SystemTime>,
    /// What only the runtime's own clients understand.
    pub extra: Option<Any>,
}

/// The platform that containers of a sandbox run on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SandboxPlatform {
    /// `linux` and the like.
    pub os: String,
    /// `amd64` and the like.
    pub architecture: String,
    /// `v8` and the like.
    pub variant: String,
}

/// A measurement of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxMetric {
    /// When it was taken.
    pub timestamp: Option<SystemTime>,
    /// Of what.
    pub id: String,
    /// In the runtime's own type.
    pub data: Option<Any>,
}

/// The controller. Clones are the same.
#[derive(Clone)]
pub struct Sandboxes {
    shared: Arc<Shared>,
    root: PathBuf,
    state: PathBuf,
}

impl Sandboxes {
    /// The controller beside these tasks, with its folders; they are made if missing. The shims of an earlier daemon are
    /// looked for in the background, and calls for their sandboxes wait for that ([`Timeouts::load`](super::Timeouts)).
    ///
    /// # Errors
    /// A folder cannot be made.
    pub fn open(
        tasks: &Tasks,
        root: PathBuf,
        state: PathBuf,
        records: Records,
    ) -> Result<Sandboxes, OpenError> {
        for path in [&root, &state] {
            bundle::make_parents(path).map_err(|source| OpenError { path: path.clone(), source })?;
        }
        let sandboxes = Sandboxes { shared: tasks.shared.clone(), root, state };
        sandboxes.load(&records);
        Ok(sandboxes)
    }

    fn load(&self, records: &Records) {
        let mut stale = Vec::new();
        for namespace in load::namespaces(&self.state) {
            let folder = self.state.join(&namespace);
            load::put_aside(&folder, &mut stale, |id| identifier::validate(id).is_ok());
            for id in load::names(&folder).into_iter().filter(|id| identifier::validate(id).is_ok()) {
                let bundle = Bundle::new(&self.state, &self.root, &namespace, &id);
                let found = Arc::new(Instance::found(bundle));
                if self.shared.sandboxes.insert(found.clone()) {
                    let known = records(&namespace, &id);
                    tokio::spawn(instance::find_again(self.shared.clone(), found, known));
                }
            }
        }
        for namespace in load::namespaces(&self.root) {
            let known = |id: &str| self.shared.sandboxes.get(&namespace, id).is_some();
            load::put_aside(&self.root.join(&namespace), &mut stale, known);
        }
        tokio::spawn(load::remove_stale(self.shared.lane.clone(), stale));
    }

    /// Makes the bundle, starts the shim and has it create the sandbox.
    ///
    /// # Errors
    /// Nothing is left behind then.
    pub async fn create(&self, namespace: &str, options: SandboxOptions) -> Result<(), SandboxError> {
        let id = options.id.clone();
        if self.shared.get(namespace, &id).is_some() || self.shared.sandboxes.get(namespace, &id).is_some() {
            return Err(SandboxError::AlreadyRunning { id });
        }
        identifier::validate(&id).map_err(|source| SandboxError::Id { id: id.clone(), source })?;
        let bundle = Bundle::new(&self.state, &self.root, namespace, &id);
        let instance = Arc::new(Instance::starting(bundle));
        if !self.shared.sandboxes.insert(instance.clone()) {
            return Err(SandboxError::AlreadyRunning { id });
        }
        let (shared, namespace) = (self.shared.clone(), namespace.to_owned());
        detached(async move {
            instance::bring_up(&shared, &instance, options).await?;
            publish(&shared, &namespace, "/sandboxes/create", &messages::SandboxCreate { sandbox_id: id });
            Ok(())
        })
        .await
    }

    /// Has the shim start the sandbox.
    ///
    /// # Errors
    /// [`SandboxError::NotCreated`]; or the shim's answer, and then the sandbox is gone.
    pub async fn start(&self, namespace: &str, id: &str) -> Result<Started, SandboxError> {
        let instance = self.get(namespace, id).map_err(|_| SandboxError::NotCreated { id: id.to_owned() })?;
        let (shared, namespace, id) = (self.shared.clone(), namespace.to_owned(), id.to_owned());
        detached(async move {
            let request = wire::StartSandboxRequest { sandbox_id: id.clone() };
            let limit = Some(shared.config.timeouts.create);
            let answer =
                instance.call::<wire::StartSandboxResponse>(&shared, "StartSandbox", limit, &request);
            let reply = match answer.await? {
                Ok(reply) => reply,
                Err(source) => {
                    instance::end(&shared, &instance).await;
                    return Err(SandboxError::Call { action: format!("start sandbox {id}"), source });
                }
            };
            publish(&shared, &namespace, "/sandboxes/start", &messages::SandboxStart { sandbox_id: id });
            let created_at = reply.created_at.as_ref().and_then(time_from_wire);
            Ok(Started { pid: reply.pid, created_at })
        })
        .await
    }

    /// The platform of the sandbox.
    ///
    /// # Errors
    /// [`SandboxError::NotFound`], or the shim's answer.
    pub async fn platform(&self, namespace: &str, id: &str) -> Result<SandboxPlatform, SandboxError> {
        let request = wire::PlatformRequest { sandbox_id: id.to_owned() };
        let action = || "get sandbox platform".to_owned();
        let reply: wire::PlatformResponse = self.ask(namespace, id, "Platform", &request, action).await?;
        let platform = reply.platform.unwrap_or_default();
        let wire_types::Platform { os, architecture, variant, .. } = platform;
        Ok(SandboxPlatform { os, architecture, variant })
    }

    /// Has the shim stop the sandbox. One that is gone already is stopped.
    ///
    /// # Errors
    /// The shim's answer.
    pub async fn stop(&self, namespace: &str, id: &str, timeout: Duration) -> Result<(), SandboxError> {
        let Ok(instance) = self.get(namespace, id) else { return Ok(()) };
        let timeout_secs = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        let request = wire::StopSandboxRequest { sandbox_id: id.to_owned(), timeout_secs };
        let limit = Some(self.shared.config.timeouts.call + timeout);
        let shared = self.shared.clone();
        detached(async move {
            let answer = instance.call::<wire::StopSandboxResponse>(&shared, "StopSandbox", limit, &request);
            match answer.await {
                Ok(Ok(_)) | Err(SandboxError::NotFound { .. }) => Ok(()),
                Ok(Err(source)) => match source.code() {
                    ErrorCode::NotFound | ErrorCode::Unavailable => Ok(()),
                    _ => Err(SandboxError::Call { action: "stop sandbox".into(), source }),
                },
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Waits for the end of the sandbox, and tells of it.
    ///
    /// # Errors
    /// [`SandboxError::NotFound`], or the shim's answer.
    pub async fn wait(&self, namespace: &str, id: &str) -> Result<Exit, SandboxError> {
        let instance = self.get(namespace, id)?;
        let request = wire::WaitSandboxRequest { sandbox_id: id.to_owned() };
        let answer = instance.call::<wire::WaitSandboxResponse>(&self.shared, "WaitSandbox", None, &request);
        let reply = answer
            .await?
            .map_err(|source| SandboxError::Call { action: format!("wait sandbox {id}"), source })?;
        let exited_at = reply.exited_at.as_ref().and_then(time_from_wire);
        let event = messages::SandboxExit {
            sandbox_id: id.to_owned(),
            exit_status: reply.exit_status,
            exited_at: exited_at.map(time_to_wire),
        };
        publish(&self.shared, namespace, "/sandboxes/exit", &event);
        Ok(Exit { pid: 0, status: reply.exit_status, exited_at })
    }

    /// What the shim says of the sandbox. One without a shim has ended, now.
    ///
    /// # Errors
    /// The shim's answer.
    pub async fn status(
        &self,
        namespace: &str,
        id: &str,
        verbose: bool,
    ) -> Result<SandboxStatus, SandboxError> {
        let ended = || SandboxStatus { exited_at: Some(SystemTime::now()), ..SandboxStatus::default() };
        let request = wire::SandboxStatusRequest { sandbox_id: id.to_owned(), verbose };
        let action = || format!("query sandbox {id} status");
        let reply: wire::SandboxStatusResponse =
            match self.ask(namespace, id, "SandboxStatus", &request, action).await {
                Err(SandboxError::NotFound { .. }) => return Ok(ended()),
                reply => reply?,
            };
        Ok(SandboxStatus {
            pid: reply.pid,
            state: reply.state,
            info: reply.info,
            created_at: reply.created_at.as_ref().and_then(time_from_wire),
            exited_at: reply.exited_at.as_ref().and_then(time_from_wire),
            extra: reply.extra.map(any_from_wire),
        })
    }

    /// Has the shim end with its sandbox, and removes the bundle.
    ///
    /// # Errors
    /// [`SandboxError::NotFound`]; or the shim's answer, and then all is as before.
    pub async fn shutdown(&self, namespace: &str, id: &str) -> Result<(), SandboxError> {
        let instance = self.get(namespace, id)?;
        let shared = self.shared.clone();
        let request = wire::ShutdownSandboxRequest { sandbox_id: id.to_owned() };
        detached(async move {
            let limit = Some(shared.config.timeouts.call);
            let answer =
                instance.call::<wire::ShutdownSandboxResponse>(&shared, "ShutdownSandbox", limit, &request);
            match answer.await? {
                // Some end before they answer.
                Ok(_) | Err(CallError::Closed) => {}
                Err(source) => return Err(SandboxError::Call { action: "shutdown sandbox".into(), source }),
            }
            instance::take_down(&shared, &instance).await;
            Ok(())
        })
        .await
    }

    /// What the sandbox uses.
    ///
    /// # Errors
    /// [`SandboxError::NotFound`], or the shim's answer.
    pub async fn metrics(&self, namespace: &str, id: &str) -> Result<Option<SandboxMetric>, SandboxError> {
        let request = wire::SandboxMetricsRequest { sandbox_id: id.to_owned() };
        let action = || format!("get metrics of sandbox {id}");
        let reply: wire::SandboxMetricsResponse =
            self.ask(namespace, id, "SandboxMetrics", &request, action).await?;
        Ok(reply.metrics.map(|metric| SandboxMetric {
            timestamp: metric.timestamp.as_ref().and_then(time_from_wire),
            id: metric.id,
            data: metric.data.map(any_from_wire),
        }))
    }

    fn get(&self, namespace: &str, id: &str) -> Result<Arc<Instance>, SandboxError> {
        let found = self.shared.sandboxes.get(namespace, id);
        found.ok_or_else(|| SandboxError::NotFound { id: id.to_owned() })
    }

    /// A call that changes nothing.
    async fn ask<Reply: prost::Message + Default>(
        &self,
        namespace: &str,
        id: &str,
        method: &'static str,
        request: &impl prost::Message,
        action: impl Fn() -> String,
    ) -> Result<Reply, SandboxError> {
        let instance = self.get(namespace, id)?;
        let limit = Some(self.shared.config.timeouts.call);
        let answer = instance.call(&self.shared, method, limit, request).await?;
        answer.map_err(|source| SandboxError::Call { action: action(), source })
    }
}

/// Runs a change to its end even if the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
) -> Result<T, SandboxError> {
    tokio::spawn(work.instrument(Span::current())).await.unwrap_or(Err(SandboxError::Interrupted))
}

fn publish(shared: &Shared, namespace: &str, topic: &str, event: &impl Name) {
    shared.hub.publish(Envelope {
        timestamp: SystemTime::now(),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: any_from_wire(any::pack(event)),
        cause: Cause::None,
    });
}
