//! The two jobs that take a task down: the deletion that someone asked for, and the cleaning after the death
//! of a shim.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_model::{Any, Coded, ErrorCode, error::chain};
use davit_shim_protocol::address;
use davit_shim_protocol::journal::{self, Contents, EventRecord, ExitRecord};
use davit_sys::process::{pidfd_open, pidfd_send_signal};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr};
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::create::blocking;
use super::load::{self, Probe};
use super::owner::{Context, Message};
use super::shim::Shim;
use super::task::Exit;
use super::{Error, ShimError, binary, forward};
use crate::events::{Cause, Envelope};

/// How often to ask again after a shim whose connection has ended and that neither answers nor is gone.
const DOUBT: Duration = Duration::from_secs(1);

/// The pauses between tries to remove what does not go away.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(15));

/// How often a binary that fails is run.
const TRIES: usize = 3;

/// Has the shim delete the task, and then takes down the shim and the bundle. The id is free afterwards; the files of
/// the bundle are removed while nobody waits.
pub(super) async fn delete(context: Context, shim: Shim) {
    let exit = match shim.delete("").await {
        Ok(exit) => Some(exit),
        Err(Error::ShimGone { .. }) => return context.report(Message::DeleteLost).await,
        Err(error) if error.code() == ErrorCode::NotFound => {
            debug!(error = chain(&error), "shim knows no such task");
            None
        }
        Err(error) => return context.report(Message::DeleteRefused(error)).await,
    };
    // Before the bundle goes the shim has been told to end, and has told all: a daemon that dies in between finds it
    // again by its bundle, and the events in its journal.
    let ended = end_shim(&context, &shim).await;
    if exit.is_some() {
        hear_all(&context).await;
    }
    if !ended && let Some(binary) = remembered_binary(&context).await {
        kill_shim(&context, &binary, &shim).await;
    }
    // A shim removes its socket before it answers; one that dies before that does not.
    if !ended || shim.is_closed() {
        remove_socket(&context).await;
    }
    shim.close();
    let bundle = context.bundle.clone();
    match blocking(&context.shared.lane, move || bundle.put_away()).await {
        Ok(put_away) => context.shared.remove_later(put_away),
        Err(error) => warn!(error = chain(&error), "cannot delete the bundle"),
    }
    context.report(Message::Deleted(exit)).await;
}

/// Waits until the shim has published the deletion of its task, the last of its events, and publishes from its journal
/// what does not come. A shim of others, which has no journal, may never say it.
async fn hear_all(context: &Context) {
    let Some(task) = context.shared.get(context.namespace(), context.id()) else { return };
    let unsent = |journal: Contents| !journal.unsent.is_empty();
    if task.is_delete_published() || !unsent(read_journal(context).await) {
        return;
    }
    let limit = context.shared.config.timeouts.shutdown;
    if tokio::time::timeout(limit, task.delete_published()).await.is_err() {
        publish_unsent(context, read_journal(context).await.unsent).await;
    }
}

async fn publish_unsent(context: &Context, events: Vec<EventRecord>) {
    for event in events {
        if let Err(error) = forward::accept(&context.shared, envelope(event)).await {
            warn!(error = %error, "the shim's journal holds an event that makes no sense");
        }
    }
}

/// Asks the shim to end. It does so if it holds no other container: that of a group knows that best, for two may be
/// deleted at once. False when it has not answered in time.
pub(super) async fn end_shim(context: &Context, shim: &Shim) -> bool {
    if shim.is_of_sandbox() {
        return true;
    }
    let limit = context.shared.config.timeouts.shutdown;
    if let Err(error) = shim.shutdown(limit).await {
        warn!(error = chain(&error), "cannot shut the shim down");
        return shim.is_closed();
    }
    true
}

fn shared_shim(context: &Context, shim: &Shim) -> bool {
    context.shared.address_shared(context.namespace(), context.id(), shim.address())
}

/// Kills a shim that does not end by itself, after a creation that failed or the deletion of its task. It holds no
/// container that anyone knows of.
pub(super) async fn kill_shim(context: &Context, binary: &Path, shim: &Shim) {
    if shared_shim(context, shim) {
        return;
    }
    kill_lost_shim(context, binary).await;
}

/// Kills what the container's `shim start` has left, and what nobody can connect to.
pub(super) async fn kill_lost_shim(context: &Context, binary: &Path) {
    let (namespace, id) = (context.namespace().to_owned(), context.id().to_owned());
    let binary = binary.to_owned();
    let killed = context.shared.lane.run(move || kill_shims(&namespace, &id, &binary)).await;
    info!(processes = killed.unwrap_or(0), "killed a shim that did not end");
}

/// Kills the processes that run `binary` for the container; gives their number.
pub(super) fn kill_shims(namespace: &str, id: &str, binary: &Path) -> usize {
    let kill = |pidfd: &OwnedFd| pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL as i32).is_ok();
    shim_processes(namespace, id, Some(binary)).iter().filter(|pidfd| kill(pidfd)).count()
}

/// The processes that run a shim's binary (`None`: any program) with the flags of the container: its `start`,
/// or the shim itself. They are opened before they are looked at, so that they stay what was looked at.
pub(super) fn shim_processes(namespace: &str, id: &str, binary: Option<&Path>) -> Vec<OwnedFd> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let shim = |pid: i32| -> Option<OwnedFd> {
        let pidfd = pidfd_open(pid).ok()?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
        let flag = |name: &str, value: &str| {
            arguments.windows(2).any(|pair| pair == [name.as_bytes(), value.as_bytes()])
        };
        if !flag("-namespace", namespace) || !flag("-id", id) || !has_our_root(pid) {
            return None;
        }
        let runs = |binary: &Path| {
            // A binary that is a script is its interpreter's first argument; a new one may have replaced a
            // running one.
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let replaced = format!("{} (deleted)", binary.display());
            exe == binary
                || exe == Path::new(&replaced)
                || arguments.get(1).is_some_and(|script| *script == binary.as_os_str().as_encoded_bytes())
        };
        binary.is_none_or(runs).then_some(pidfd)
    };
    pids.filter_map(shim).collect()
}

/// Whether a process sees the same root as we do. A container's does not, whatever it names itself.
fn has_our_root(pid: i32) -> bool {
    let root =
        |pid: &str| std::fs::metadata(format!("/proc/{pid}/root")).ok().map(|root| (root.dev(), root.ino()));
    root(&pid.to_string()).is_some_and(|theirs| root("self") == Some(theirs))
}

/// Cleans up after a shim whose connection has ended. First it is made sure that it is gone: a live one is
/// gone back to.
pub(super) async fn clean_up(context: Context) {
    // A shim that an earlier daemon has just started waits for a reader of its log before it serves anyone.
    let log = load::follow_log(&context);
    loop {
        let mut connection = None;
        match load::probe(&context, &mut connection).await {
            Probe::Gone => break,
            Probe::Task { shim, init } => {
                info!("the connection to the shim was lost and is there again");
                if let Some(log) = log {
                    log.until(shim.closed());
                }
                let (pid, exit) = (init.pid, init.exit());
                return context.report(Message::Found { shim, pid, exit }).await;
            }
            Probe::NoTask(shim) => {
                // A group's shim that lives without this container, or one that is just ending.
                end_shim(&context, &shim).await;
                shim.close();
                break;
            }
            Probe::Silent => {
                warn!("the connection to the shim was lost, and it does not answer");
                // There is nothing to wait on: the shim's process is not our child.
                tokio::time::sleep(DOUBT).await;
            }
        }
    }
    // What is known is told at once: to end what runs may take long.
    publish_unsent(&context, read_journal(&context).await.unsent).await;
    let killed = kill_container(&context).await;
    // Whoever ended it has recorded that, so that a daemon after this one would tell the same.
    let journal = read_journal(&context).await;
    let running = journal.running.values().map(|process| (process.id.clone(), process.pid)).collect();
    let exits = journal.exits_in_order().into_iter().map(exit).collect();
    let (published, told) = oneshot::channel();
    context.report(Message::Perished { journal: exits, running, killed, published }).await;
    // An error is the answer: nothing is ever sent.
    let _ = told.await;
    // Without the bundle the next daemon would not know that there is something to tell.
    context.shared.hub.recorded().await;
    remove_socket(&context).await;
    let bundle = context.bundle.clone();
    if let Err(error) = blocking(&context.shared.lane, move || bundle.delete()).await {
        warn!(error = chain(&error), "cannot delete the bundle of a dead shim");
    }
    context.report(Message::CleanedUp).await;
}

/// Removes the socket of a shim that was killed, which no one else does, if none of its group lives on.
pub(super) async fn remove_socket(context: &Context) {
    for address in load::addresses(context).await {
        if context.shared.address_shared(context.namespace(), context.id(), &address) {
            continue;
        }
        let Ok(path) = address::parse(&address) else { continue };
        match context.shared.lane.run(move || remove_dead_socket(&path)).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(errno)) => debug!(address, %errno, "cannot remove the socket of a dead shim"),
        }
    }
}

/// Removes the file of a socket that nobody listens on. The kernel refuses a connection to it at once;
/// whatever else happens means that somebody does.
pub(super) fn remove_dead_socket(path: &Path) -> Result<(), Errno> {
    // As `shim start` does it: between our look and the removal another shim may take the name of a dead one.
    let folder = std::fs::File::open(path.parent().unwrap_or(path))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)));
    let _alone = Flock::lock(folder?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => nix::unistd::unlink(path),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Has the shim's binary kill what the shim left. Says how the init process ended.
///
/// One that does not end in time waits for processes that do not die, or for an OCI runtime that hangs. It is run again
/// until it succeeds, for what is not killed here runs on without anyone who knows it. One that fails is no shim of ours,
/// and will not do better later.
async fn kill_container(context: &Context) -> Option<Exit> {
    let mut binary = remembered_binary(context).await?;
    let mut failures = 0;
    let (mut pause, longest) = RETRY;
    loop {
        match binary::delete(&context.shared.config, &context.bundle, &binary).await {
            Ok(exit) => return Some(exit),
            Err(error @ ShimError::Timeout { .. }) => {
                warn!(error = chain(&error), "what the shim left does not go away; trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
            Err(error) => {
                warn!(error = chain(&error), "cannot clean up after the shim");
                failures += 1;
                if failures == TRIES {
                    return None;
                }
                // The binary may have been removed since; ours can clean up after most others.
                if matches!(error, ShimError::Spawn { .. })
                    && let Ok(own) = binary::resolve(&context.shared.config, "io.containerd.runc.v2")
                {
                    binary = own;
                }
            }
        }
    }
}

async fn read_journal(context: &Context) -> Contents {
    let path = context.bundle.journal();
    let read = context.shared.lane.run(move || journal::read(&path)).await;
    match read {
        Ok(Ok(contents)) => contents,
        Ok(Err(error)) => {
            warn!(error = chain(&error), "cannot read the shim's journal");
            Contents::default()
        }
        Err(_) => Contents::default(),
    }
}

/// The binary that the shim was started with, or the one that would be started today.
async fn remembered_binary(context: &Context) -> Option<PathBuf> {
    let bundle = context.bundle.clone();
    match blocking(&context.shared.lane, move || bundle.read_binary()).await {
        Ok(Some(binary)) => Some(binary),
        Ok(None) | Err(_) => binary::resolve(&context.shared.config, "io.containerd.runc.v2").ok(),
    }
}

fn exit(record: &ExitRecord) -> (String, Exit, Cause) {
    let exited_at = time(record.seconds, record.nanos);
    let cause = if record.killed { Cause::ShimKilled } else { Cause::None };
    (record.id.clone(), Exit { pid: record.pid, status: record.status, exited_at }, cause)
}

fn envelope(record: EventRecord) -> Envelope {
    Envelope {
        timestamp: time(record.seconds, record.nanos).unwrap_or_else(std::time::SystemTime::now),
        namespace: record.namespace,
        topic: record.topic,
        event: Any { type_url: record.type_url, value: record.value },
        cause: Cause::None,
    }
}

fn time(seconds: i64, nanos: i32) -> Option<std::time::SystemTime> {
    super::shim::time_from_wire(&prost_types::Timestamp { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_name_that_another_shim_takes_meanwhile_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        // As `shim start` does it.
        let starting =
            Flock::lock(std::fs::File::open(folder.path()).unwrap(), FlockArg::LockExclusive).unwrap();
        let dead = path.clone();
        let removing = std::thread::spawn(move || remove_dead_socket(&dead).unwrap());
        std::fs::remove_file(&path).unwrap();
        let living = UnixListener::bind(&path).unwrap();
        drop(starting);
        removing.join().unwrap();
        assert!(path.exists());
        drop(living);
        remove_dead_socket(&path).unwrap();
        assert!(!path.exists());
    }
}
