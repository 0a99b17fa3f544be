//! Finding the shims of an earlier daemon.
//!
//! Every bundle becomes a task at once; then each is looked at beside all others, so that a shim that does
//! not answer delays nobody. What counts as dead is only what the kernel says is: a socket that refuses, or
//! none that listens. All else is doubt, and in doubt a task stays, `Unreachable`, and is tried again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use davit_model::error::chain;
use davit_model::{Coded, ErrorCode, identifier};
use davit_shim_protocol::address::{self, DEFAULT_SOCKET_DIR};
use davit_shim_protocol::bootstrap::{PROTOCOL_TTRPC, StartResult, VERSION_2};
use davit_shim_protocol::bundle::{self, Bundle};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tracing::{Instrument, Span, debug, info, warn};

use super::create::blocking;
use super::log::Log;
use super::owner::{self, Context, Message};
use super::registry::Shared;
use super::shim::Shim;
use super::task::{Process, Status};
use super::{Error, ShimError, teardown};
use crate::lane::Lane;

/// Says whether there is a record of a container, by namespace and id.
pub type Records = Arc<dyn Fn(&str, &str) -> bool + Send + Sync>;

/// The annotations that put containers into one shim, as containerd's shims and ours know them.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// Shims that are looked at at once.
const PARALLEL: usize = 128;

/// The pauses between tries with a shim that does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(15));

/// The search for shims, in the background.
pub struct Loading {
    jobs: JoinSet<()>,
    tasks: usize,
}

impl Loading {
    /// The tasks that are being looked at.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// Returns when of each task it is known what became of it, or that its shim does not answer, and what
    /// else was left is removed.
    pub async fn finished(mut self) {
        while self.jobs.join_next().await.is_some() {}
    }

    /// Lets it go on without anyone waiting.
    pub fn detach(mut self) {
        self.jobs.detach_all();
    }
}

/// Enters every bundle as a task, puts aside what is none, and looks for the shims in the background.
pub(super) fn load(shared: &Arc<Shared>, records: Records) -> Loading {
    let mut jobs = JoinSet::new();
    let mut tasks = 0;
    let places = Arc::new(Semaphore::new(PARALLEL));
    let mut stale = Vec::new();
    for namespace in namespaces(&shared.config.state) {
        let folder = shared.config.state.join(&namespace);
        put_aside(&folder, &mut stale, |id| identifier::validate(id).is_ok());
        for id in names(&folder) {
            if identifier::validate(&id).is_err() {
                continue;
            }
            let bundle = Bundle::new(&shared.config.state, &shared.config.root, &namespace, &id);
            let job = Job { records: records.clone(), places: places.clone() };
            if let Some(looked_at) = owner::load(shared, &bundle, job) {
                tasks += 1;
                jobs.spawn(async move {
                    // A job that panicked has said so itself.
                    let _ = looked_at.await;
                });
            }
        }
    }
    for namespace in namespaces(&shared.config.root) {
        let folder = shared.config.root.join(&namespace);
        put_aside(&folder, &mut stale, |id| shared.get(&namespace, id).is_some());
    }
    jobs.spawn(remove_stale(shared.lane.clone(), stale));
    info!(tasks, "looking for shims");
    Loading { jobs, tasks }
}

/// Removes what was put aside.
pub(super) async fn remove_stale(lane: Lane, stale: Vec<PathBuf>) {
    for path in stale {
        if let Err(error) = blocking(&lane, move || bundle::remove_stale(&path)).await {
            warn!(error = chain(&error), "cannot remove what an earlier daemon left");
        }
    }
}

/// The namespaces that have a folder here.
pub(super) fn namespaces(root: &Path) -> impl Iterator<Item = String> {
    names(root).into_iter().filter(|name| identifier::validate(name).is_ok())
}

pub(super) fn names(folder: &Path) -> Vec<String> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            warn!(folder = %folder.display(), %error, "cannot look for tasks");
            Vec::new()
        }
    }
}

pub(super) fn put_aside(folder: &Path, stale: &mut Vec<PathBuf>, keep: impl Fn(&str) -> bool) {
    match bundle::set_aside(folder, keep) {
        Ok(paths) => stale.extend(paths),
        Err(error) => warn!(error = chain(&error), "cannot put aside what an earlier daemon left"),
    }
}

/// Looking for one shim.
pub(super) struct Job {
    records: Records,
    places: Arc<Semaphore>,
}

/// What there is at the address of a shim.
pub(super) enum Probe {
    /// A shim with the task.
    Task {
        /// The connection.
        shim: Shim,
        /// Its init process.
        init: Process,
    },
    /// A shim without it.
    NoTask(Shim),
    /// No shim.
    Gone,
    /// Something that does not answer, or no way to tell.
    Silent,
}

impl Job {
    /// Looks, and reports what is found. A shim that does not answer is looked at again in the background.
    pub(super) async fn run(self, context: Context) {
        let Ok(place) = self.places.clone().acquire_owned().await else { return };
        // A shim that was just starting when the daemon died waits for a reader of its log before it serves
        // anyone.
        let log = follow_log(&context);
        let mut connection = None;
        let limit = context.shared.config.timeouts.load;
        let probe =
            tokio::time::timeout(limit, look(&context, &mut connection)).await.unwrap_or(Probe::Silent);
        drop(place);
        if matches!(probe, Probe::Silent) {
            let pid = init_pid(&context).await;
            warn!(pid, "the shim does not answer; trying again in the background");
            context.report(Message::Silent { pid }).await;
            tokio::spawn(self.retry(context, connection, log).instrument(Span::current()));
        } else {
            self.report(&context, probe, log).await;
        }
    }

    async fn retry(self, context: Context, mut connection: Option<Shim>, log: Option<Following>) {
        let (mut pause, longest) = RETRY;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
            let probe = look(&context, &mut connection).await;
            if !matches!(probe, Probe::Silent) {
                info!("the shim answers, or is gone");
                return self.report(&context, probe, log).await;
            }
        }
    }

    async fn report(&self, context: &Context, probe: Probe, log: Option<Following>) {
        let recorded = (self.records)(context.namespace(), context.id());
        match probe {
            Probe::Task { shim, init } => {
                let (pid, status) = (init.pid, init.status);
                debug!(pid, ?status, "found");
                if let Some(log) = log {
                    log.until(shim.closed());
                }
                context.report(Message::Found { shim, pid, exit: init.exit() }).await;
                if status != Status::Created {
                    // An earlier daemon may not have come to it.
                    context.shared.remove_folder_later(context.bundle.checkpoint());
                }
                match status {
                    _ if recorded => {}
                    Status::Created | Status::Stopped => {
                        info!("task without a container is deleted");
                        let (reply, _) = oneshot::channel();
                        context.report(Message::Delete { reply }).await;
                    }
                    // It runs: whatever became of the record, this is no leak.
                    Status::Running | Status::Paused | Status::Pausing | Status::Unknown => {
                        warn!(pid, "task runs without a record of its container; it is left alone");
                    }
                }
            }
            // Nobody was told of the exit of a process, for there was none, or it was deleted with all
            // reports made.
            Probe::NoTask(_) => context.report(Message::Dead { pid: 0 }).await,
            Probe::Gone => {
                let pid = init_pid(context).await;
                info!(pid, "no shim");
                context.report(Message::Dead { pid }).await;
            }
            Probe::Silent => {}
        }
    }
}

/// Looks at a shim, and ends one that is there without the task: the daemon that started it died before it
/// had created the container, or after it had deleted it.
async fn look(context: &Context, connection: &mut Option<Shim>) -> Probe {
    let probe = probe(context, connection).await;
    let Probe::NoTask(shim) = probe else { return probe };
    info!("shim without a task");
    if !teardown::end_shim(context, &shim).await {
        return Probe::Silent;
    }
    if context.shared.address_shared(context.namespace(), context.id(), shim.address()) {
        return Probe::NoTask(shim);
    }
    // A shim that does not end has got a container meanwhile, from a create that was still under way.
    let limit = context.shared.config.timeouts.shutdown;
    if tokio::time::timeout(limit, shim.closed()).await.is_ok() {
        *connection = None;
        return Probe::NoTask(shim);
    }
    Probe::Silent
}

/// Asks what is there. `connection` is used if it is open, and set to what is connected.
pub(super) async fn probe(context: &Context, connection: &mut Option<Shim>) -> Probe {
    let limit = context.shared.config.timeouts.load;
    let shim = match connection.take().filter(|shim| !shim.is_closed()) {
        Some(shim) => shim,
        None => match reach(context).await {
            Ok(shim) => shim,
            Err(probe) => return probe,
        },
    };
    *connection = Some(shim.clone());
    match shim.ping(limit).await {
        Ok(_) => {}
        Err(Error::ShimGone { .. }) => return lost(context).await,
        Err(Error::Timeout { .. }) => return Probe::Silent,
        // Even a refusal is a sign of life.
        Err(_) => {}
    }
    match shim.state(limit, "").await {
        Ok(init) => Probe::Task { shim, init },
        Err(Error::ShimGone { .. }) => lost(context).await,
        Err(error) if error.code() == ErrorCode::NotFound => Probe::NoTask(shim),
        Err(error) => {
            warn!(error = chain(&error), "the shim does not say the state of its task");
            Probe::Silent
        }
    }
}

/// The connection ended while the shim was asked: it may have ended itself at that moment, or only the
/// connection.
async fn lost(context: &Context) -> Probe {
    match reach(context).await {
        Ok(_) => Probe::Silent,
        Err(probe) => probe,
    }
}

/// Connects to the shim of a bundle, or says that it is gone or silent.
async fn reach(context: &Context) -> Result<Shim, Probe> {
    let bundle = context.bundle.clone();
    let read = blocking(&context.shared.lane, move || {
        Ok((bundle.read_bootstrap()?, bundle.read_sandbox()?.is_some()))
    });
    let (told, sandbox) = match read.await {
        Ok((Some(told), sandbox)) => (told, sandbox),
        Ok((None, _)) => {
            // A daemon died while it created the task. Its `shim start` may go on: what starts is not gone.
            // It is looked for first, for it may be over, and the shim be there, when it is looked for
            // second.
            let starting = is_starting(context).await;
            return match find_unannounced(context).await {
                Some(shim) => Ok(shim),
                None if starting => Err(Probe::Silent),
                None => Err(Probe::Gone),
            };
        }
        Err(error) => {
            warn!(error = chain(&error), "the bundle does not say where its shim is");
            return find_unannounced(context).await.ok_or(Probe::Silent);
        }
    };
    match Shim::connect(&context.bundle, &told, sandbox, &context.shared.config.timeouts).await {
        Ok(shim) => Ok(shim),
        Err(ShimError::Connect { source, .. }) => Err(match source.kind() {
            std::io::ErrorKind::ConnectionRefused => Probe::Gone,
            // Its file may have been removed under a shim that lives.
            std::io::ErrorKind::NotFound => match address::parse(&told.address) {
                Ok(path) if !listens(&context.shared.lane, &path).await => Probe::Gone,
                Ok(_) | Err(_) => Probe::Silent,
            },
            _ => {
                debug!(error = %source, "cannot connect to the shim");
                Probe::Silent
            }
        }),
        Err(error) => {
            warn!(error = chain(&error), "cannot speak to the shim");
            Err(Probe::Silent)
        }
    }
}

/// A shim that was started, but whose address no daemon has written down: it is where shims are by custom.
pub(super) async fn find_unannounced(context: &Context) -> Option<Shim> {
    for told in customary(context).await {
        if let Ok(shim) = Shim::connect(&context.bundle, &told, false, &context.shared.config.timeouts).await
        {
            debug!(address = told.address, "found a shim that had not been written down");
            return Some(shim);
        }
    }
    None
}

/// The group whose shim the container shares, if it does.
pub(super) async fn group(context: &Context) -> Option<String> {
    let bundle = context.bundle.clone();
    blocking(&context.shared.lane, move || bundle.annotation(&GROUPS)).await.ok().flatten()
}

/// Where a shim for the container listens if nothing else is known.
async fn customary(context: &Context) -> Vec<StartResult> {
    let config = &context.shared.config;
    let group = group(context).await;
    let group = group.as_deref().unwrap_or(context.id());
    let own = config.socket_directory.as_deref().filter(|own| *own != Path::new(DEFAULT_SOCKET_DIR));
    let directories = own.into_iter().chain([Path::new(DEFAULT_SOCKET_DIR)]);
    let told = directories.map(|directory| {
        let path = address::socket_path(directory, &config.grpc_address, context.namespace(), group);
        let address = address::unix_address(&path);
        StartResult { version: VERSION_2, address, protocol: PROTOCOL_TTRPC.to_owned() }
    });
    told.collect()
}

/// The addresses at which the container's shim listens, or would.
pub(super) async fn addresses(context: &Context) -> Vec<String> {
    let bundle = context.bundle.clone();
    match blocking(&context.shared.lane, move || bundle.read_bootstrap()).await {
        Ok(Some(told)) => vec![told.address],
        Ok(None) | Err(_) => customary(context).await.into_iter().map(|told| told.address).collect(),
    }
}

/// Whether a shim for the container is just being started, or runs.
async fn is_starting(context: &Context) -> bool {
    let bundle = context.bundle.clone();
    let looked = context.shared.lane.run(move || {
        let binary = bundle.read_binary().ok().flatten();
        !teardown::shim_processes(bundle.namespace(), bundle.id(), binary.as_deref()).is_empty()
    });
    looked.await.unwrap_or(true)
}

/// Whether any process listens on a socket of this name, its file or no file. True when that cannot be told.
async fn listens(lane: &Lane, path: &Path) -> bool {
    let path = path.to_owned();
    let read = lane.run(move || {
        let table = std::fs::read_to_string("/proc/net/unix").ok()?;
        Some(table.lines().any(|line| is_listener(line, &path)))
    });
    read.await.ok().flatten().unwrap_or(true)
}

/// `Num: RefCount Protocol Flags Type St Inode Path`; bit 16 of the flags is a listening socket (unix(7),
/// `net/unix.h`).
fn is_listener(line: &str, path: &Path) -> bool {
    let mut fields = line.split_ascii_whitespace();
    let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
    let name = fields.nth(3);
    flags.is_some_and(|flags| flags & 0x1_0000 != 0) && name.is_some_and(|name| Path::new(name) == path)
}

async fn init_pid(context: &Context) -> u32 {
    let bundle = context.bundle.clone();
    context.shared.lane.run(move || bundle.init_pid()).await.unwrap_or(0)
}

/// A log that is being read until this is dropped.
pub(super) struct Following {
    _end: oneshot::Sender<()>,
}

impl Following {
    /// Goes on until `end`.
    pub(super) fn until(self, end: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(async move {
            end.await;
            drop(self);
        });
    }
}

/// Reads the shim's log again.
pub(super) fn follow_log(context: &Context) -> Option<Following> {
    match Log::open(&context.bundle) {
        Ok(log) => {
            let (_end, ended) = oneshot::channel();
            let follow = log.follow(async {
                // The sender is dropped, never used.
                let _ = ended.await;
            });
            tokio::spawn(follow.instrument(Span::current()));
            Some(Following { _end })
        }
        Err(error) => {
            debug!(error = chain(&error), "cannot read the shim's log");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_known_by_flag_and_name() {
        let listening = "0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/s/abc";
        let connected = "0000000000000000: 00000003 00000000 00000000 0001 03 12346 /run/s/abc";
        assert!(is_listener(listening, Path::new("/run/s/abc")));
        assert!(!is_listener(connected, Path::new("/run/s/abc")));
        assert!(!is_listener(listening, Path::new("/run/s/ab")));
        assert!(!is_listener("Num       RefCount Protocol Flags    Type St Inode Path", Path::new("Path")));
        assert!(!is_listener("", Path::new("")));
    }

    #[tokio::test]
    async fn a_listener_without_its_file_still_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(listens(&Lane::runtime(), &path).await);
        drop(listener);
        assert!(!listens(&Lane::runtime(), &path).await);
    }
}
