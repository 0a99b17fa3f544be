//! The shim of one sandbox, from its start to its end.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use davit_model::error::chain;
use davit_model::{Any, Coded, ErrorCode};
use davit_proto::containerd::runtime::sandbox::v1 as wire;
use davit_proto::containerd::task::v3 as task;
use davit_shim_protocol::address;
use davit_shim_protocol::bootstrap::{PROTOCOL_TTRPC, StartResult};
use davit_shim_protocol::bundle::Bundle;
use davit_shim_protocol::client::{CallError, Client, Target};
use prost::Message;
use tokio::sync::{OnceCell, watch};
use tracing::{debug, info, warn};

use super::error::no_shim;
use super::{SandboxError, SandboxOptions};
use crate::runtime::create::blocking;
use crate::runtime::log::Log;
use crate::runtime::registry::Shared;
use crate::runtime::{ShimError, binary, teardown};

const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
const TASK_SERVICE: &str = "containerd.task.v3.Task";

/// How often to ask after a shim that neither answers nor is gone.
const DOUBT: Duration = Duration::from_secs(1);

/// The connection to the shim.
#[derive(Debug, Clone)]
enum State {
    /// The shim is being started, or looked for, or silent.
    Unknown,
    /// It can be called.
    Connected(Client),
    /// It is gone.
    Ended,
}

/// The shim of one sandbox.
#[derive(Debug)]
pub(super) struct Instance {
    bundle: Bundle,
    state: watch::Sender<State>,
    told: Mutex<Option<StartResult>>,
    /// True while the creation is under way, during which nobody may call.
    starting: AtomicBool,
    /// Set when what the shim left has been removed: by whoever comes first, and once.
    cleaned: OnceCell<()>,
}

impl Instance {
    /// One that is to be started.
    pub(super) fn starting(bundle: Bundle) -> Instance {
        let instance = Instance::found(bundle);
        instance.starting.store(true, Ordering::Release);
        instance
    }

    /// One that an earlier daemon has started.
    pub(super) fn found(bundle: Bundle) -> Instance {
        Instance {
            bundle,
            state: watch::Sender::new(State::Unknown),
            told: Mutex::default(),
            starting: AtomicBool::new(false),
            cleaned: OnceCell::new(),
        }
    }

    pub(super) fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Where the shim is, once that is known.
    pub(super) fn bootstrap(&self) -> Option<StartResult> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn tell(&self, told: StartResult) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
    }

    fn id(&self) -> String {
        self.bundle.id().to_owned()
    }

    /// Calls the sandbox service of the shim. The outer error says that there is nobody to call.
    pub(super) async fn call<Reply: Message + Default>(
        &self,
        shared: &Shared,
        method: &'static str,
        limit: Option<Duration>,
        request: &impl Message,
    ) -> Result<Result<Reply, CallError>, SandboxError> {
        if self.starting.load(Ordering::Acquire) {
            return Err(SandboxError::NotFound { id: self.id() });
        }
        let client = self.client(shared.config.timeouts.load).await?;
        let target = Target { service: SERVICE, method, namespace: self.bundle.namespace(), limit };
        Ok(client.call(target, request).await)
    }

    /// The connection; waits while it is not known whether there is one.
    async fn client(&self, patience: Duration) -> Result<Client, SandboxError> {
        let mut state = self.state.subscribe();
        let known = state.wait_for(|state| !matches!(state, State::Unknown));
        let known = match tokio::time::timeout(patience, known).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => State::Ended,
            Err(_) => State::Unknown,
        };
        match known {
            State::Connected(client) => Ok(client),
            State::Unknown => Err(SandboxError::Unreachable { id: self.id() }),
            State::Ended => Err(SandboxError::NotFound { id: self.id() }),
        }
    }
}

/// Makes the bundle, starts the shim and has it create the sandbox. What was made is undone on failure.
pub(super) async fn bring_up(
    shared: &Arc<Shared>,
    instance: &Arc<Instance>,
    options: SandboxOptions,
) -> Result<(), SandboxError> {
    let id = options.id.clone();
    let unregister = |error: SandboxError| {
        instance.state.send_replace(State::Ended);
        shared.sandboxes.remove(&instance.bundle);
        error
    };
    let binary =
        binary::resolve(&shared.config, &options.runtime).map_err(no_shim(&id)).map_err(unregister)?;
    let (bundle, spec, remembered) = (instance.bundle.clone(), options.spec.clone(), binary.clone());
    let made = blocking(&shared.lane, move || {
        bundle.create(spec.as_ref().map(|spec| spec.value.as_slice()))?;
        bundle.write_binary(&remembered).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = bundle.delete();
        })
    });
    made.await.map_err(|source| unregister(SandboxError::Bundle { id: id.clone(), source }))?;
    let created = match start(shared, instance, &binary, options.runtime_options.as_ref()).await {
        Ok(client) => create(shared, instance, &client, options).await,
        Err(source) => Err(no_shim(&id)(source)),
    };
    match created {
        Ok(()) => {
            instance.starting.store(false, Ordering::Release);
            tokio::spawn(follow(shared.clone(), instance.clone()));
            Ok(())
        }
        Err(error) => {
            info!(sandbox = id, error = chain(&error), "sandbox could not be created");
            end(shared, instance).await;
            Err(error)
        }
    }
}

/// Starts the shim and connects to it.
async fn start(
    shared: &Shared,
    instance: &Instance,
    binary: &Path,
    options: Option<&Any>,
) -> Result<Client, ShimError> {
    let log = Log::open(&instance.bundle)?;
    let told = binary::start(&shared.config, &instance.bundle, binary, options).await?;
    instance.tell(told.clone());
    let (bundle, recorded) = (instance.bundle.clone(), told.clone());
    let record = blocking(&shared.lane, move || bundle.write_bootstrap(&recorded));
    record.await.map_err(|source| ShimError::Record { source })?;
    let unsupported =
        || ShimError::Unsupported { address: told.address.clone(), protocol: told.protocol.clone() };
    if !told.protocol.eq_ignore_ascii_case(PROTOCOL_TTRPC) {
        return Err(unsupported());
    }
    let path = address::parse(&told.address).map_err(|_| unsupported())?;
    let connected = tokio::time::timeout(shared.config.timeouts.load, Client::connect(&path)).await;
    let connected = connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
    let client = connected.map_err(|source| ShimError::Connect { address: told.address.clone(), source })?;
    tokio::spawn(log.follow(client.closed()));
    instance.state.send_replace(State::Connected(client.clone()));
    Ok(client)
}

async fn create(
    shared: &Shared,
    instance: &Instance,
    client: &Client,
    options: SandboxOptions,
) -> Result<(), SandboxError> {
    let request = wire::CreateSandboxRequest {
        sandbox_id: options.id.clone(),
        bundle_path: instance.bundle.path().display().to_string(),
        rootfs: options.rootfs.into_iter().map(super::mount_to_wire).collect(),
        options: options.options.map(super::any_to_wire),
        netns_path: options.network_namespace,
        annotations: options.annotations,
    };
    let limit = Some(shared.config.timeouts.create);
    let target =
        Target { service: SERVICE, method: "CreateSandbox", namespace: instance.bundle.namespace(), limit };
    let created: Result<wire::CreateSandboxResponse, CallError> = client.call(target, &request).await;
    created
        .map(drop)
        .map_err(|source| SandboxError::Call { action: format!("create sandbox {}", options.id), source })
}

/// Keeps the connection to the shim of an earlier daemon, or cleans up after it. One whose creation was not finished, or
/// whose record is gone while it holds nothing, is ended (containerd `shouldCleanupShim`).
pub(super) async fn find_again(shared: Arc<Shared>, instance: Arc<Instance>, known: bool) {
    let bundle = instance.bundle.clone();
    match blocking(&shared.lane, move || bundle.read_bootstrap()).await {
        Ok(Some(told)) => {
            instance.tell(told);
            if connect(&instance).await && !known && holds_nothing(&shared, &instance).await {
                info!(sandbox = instance.bundle.id(), "ending a shim without a sandbox");
                return end(&shared, &instance).await;
            }
            follow(shared, instance).await;
        }
        Ok(None) => end(&shared, &instance).await,
        Err(error) => {
            warn!(error = chain(&error), "cannot tell where the shim of a sandbox is");
            end(&shared, &instance).await;
        }
    }
}

async fn holds_nothing(shared: &Shared, instance: &Instance) -> bool {
    let Ok(client) = instance.client(shared.config.timeouts.load).await else { return false };
    let (namespace, limit) = (instance.bundle.namespace(), Some(shared.config.timeouts.load));
    let target = Target { service: TASK_SERVICE, method: "Pids", namespace, limit };
    let answer = client.call::<task::PidsResponse>(target, &task::PidsRequest { id: instance.id() }).await;
    match answer {
        Ok(pids) => pids.processes.is_empty(),
        Err(error) => error.code() == ErrorCode::NotFound,
    }
}

/// Follows the connection until the shim is gone for sure, and cleans up then.
async fn follow(shared: Arc<Shared>, instance: Arc<Instance>) {
    loop {
        let state = instance.state.borrow().clone();
        match state {
            State::Ended => return,
            State::Connected(client) => {
                client.closed().await;
                instance.state.send_if_modified(|state| {
                    let same = matches!(state, State::Connected(_));
                    if same {
                        *state = State::Unknown;
                    }
                    same
                });
            }
            State::Unknown => {
                if !connect(&instance).await {
                    info!(sandbox = instance.bundle.id(), "the shim of a sandbox is gone");
                    return clean_up(&shared, &instance).await;
                }
            }
        }
    }
}

/// Connects to the shim again, however long that takes; false when nobody listens there any more.
async fn connect(instance: &Instance) -> bool {
    let Some(told) = instance.bootstrap() else { return false };
    let Ok(path) = address::parse(&told.address) else { return false };
    loop {
        if matches!(*instance.state.borrow(), State::Ended) {
            return true;
        }
        match Client::connect(&path).await {
            Ok(client) => {
                if let Ok(log) = Log::open(&instance.bundle) {
                    tokio::spawn(log.follow(client.closed()));
                }
                instance.state.send_replace(State::Connected(client));
                return true;
            }
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {
                return false;
            }
            // There is nothing to wait on: the shim is not our child.
            Err(error) => {
                warn!(sandbox = instance.bundle.id(), %error, "the shim of a sandbox does not answer");
                tokio::time::sleep(DOUBT).await;
            }
        }
    }
}

/// Ends a sandbox that failed: the shim is asked to, then made to.
pub(super) async fn end(shared: &Arc<Shared>, instance: &Arc<Instance>) {
    let state = instance.state.borrow().clone();
    if let State::Connected(client) = state {
        let (namespace, limit) = (instance.bundle.namespace(), Some(shared.config.timeouts.shutdown));
        let target = Target { service: SERVICE, method: "ShutdownSandbox", namespace, limit };
        let request = wire::ShutdownSandboxRequest { sandbox_id: instance.id() };
        if let Err(error) = client.call::<wire::ShutdownSandboxResponse>(target, &request).await {
            debug!(sandbox = instance.bundle.id(), %error, "cannot shut down a sandbox that failed");
        }
    }
    take_down(shared, instance).await;
}

/// Takes down a shim that was asked to shut its sandbox down: one that does not end by itself is told to by the Task
/// service, and then killed.
pub(super) async fn take_down(shared: &Arc<Shared>, instance: &Arc<Instance>) {
    let limit = shared.config.timeouts.shutdown;
    let state = instance.state.send_replace(State::Ended);
    if let State::Connected(client) = state
        && tokio::time::timeout(limit / 2, client.closed()).await.is_err()
    {
        let namespace = instance.bundle.namespace();
        let target = Target { service: TASK_SERVICE, method: "Shutdown", namespace, limit: Some(limit / 2) };
        let request = task::ShutdownRequest { id: instance.id(), now: true };
        // Whether it obeyed is seen by its end.
        let _ = client.call::<()>(target, &request).await;
        if tokio::time::timeout(limit / 2, client.closed()).await.is_err() {
            warn!(sandbox = instance.bundle.id(), "the shim of a sandbox does not end");
        }
        client.close();
    }
    clean_up(shared, instance).await;
}

/// Removes what the shim left. It is gone, or is not to live any longer.
async fn clean_up(shared: &Arc<Shared>, instance: &Arc<Instance>) {
    instance.cleaned.get_or_init(|| remove(shared, instance)).await;
}

async fn remove(shared: &Arc<Shared>, instance: &Arc<Instance>) {
    let bundle = instance.bundle.clone();
    let (namespace, id) = (bundle.namespace().to_owned(), bundle.id().to_owned());
    let remembered = bundle.clone();
    let binary = blocking(&shared.lane, move || remembered.read_binary()).await.ok().flatten();
    if let Some(binary) = binary {
        let program = binary.clone();
        let killed = shared.lane.run(move || teardown::kill_shims(&namespace, &id, &program));
        if killed.await.unwrap_or(0) > 0 {
            info!(sandbox = bundle.id(), "killed the shim of a sandbox");
        }
        if let Err(error) = binary::delete(&shared.config, &bundle, &binary).await {
            debug!(error = chain(&error), "shim delete of a sandbox");
        }
    }
    if let Some(told) = instance.bootstrap()
        && let Ok(path) = address::parse(&told.address)
        && let Ok(Err(errno)) = shared.lane.run(move || teardown::remove_dead_socket(&path)).await
    {
        debug!(%errno, "cannot remove the socket of a sandbox's shim");
    }
    let gone = bundle.clone();
    if let Err(error) = blocking(&shared.lane, move || gone.delete()).await {
        warn!(error = chain(&error), "cannot delete the bundle of a sandbox");
    }
    instance.state.send_replace(State::Ended);
    shared.sandboxes.remove(&bundle);
}
