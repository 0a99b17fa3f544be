//! The two jobs that take a task down: the deletion that someone asked for, and the cleaning after the death
//! of a shim.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use davit_model::{Any, Coded, ErrorCode, error::chain};
use davit_shim_protocol::address;
use davit_shim_protocol::journal::{self, Contents, EventRecord, ExitRecord};
use davit_sys::process::{pidfd_open, pidfd_send_signal};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr};
use tracing::{debug, info, warn};

use super::create::blocking;
use super::load::{self, Probe};
use super::owner::{Context, Message};
use super::shim::Shim;
use super::task::Exit;
use super::{Error, binary, forward};
use crate::events::{Cause, Envelope};

/// How often to ask again after a shim whose connection has ended and that neither answers nor is gone.
const DOUBT: Duration = Duration::from_secs(1);

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
    let bundle = context.bundle.clone();
    let put_away = blocking(&context.shared.lane, move || bundle.put_away());
    let (ended, put_away) = tokio::join!(end_shim(&context, &shim), put_away);
    if !ended {
        warn!("the shim has not ended after the deletion of its task");
    }
    shim.close();
    match put_away {
        Ok(put_away) => context.shared.remove_later(put_away),
        Err(error) => warn!(error = chain(&error), "cannot delete the bundle"),
    }
    context.report(Message::Deleted(exit)).await;
}

/// Asks the shim to end, if no other container needs it. False when it has not ended in time.
pub(super) async fn end_shim(context: &Context, shim: &Shim) -> bool {
    if shim.is_of_sandbox() || shared_shim(context, shim) {
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

/// Kills a shim that does not end by itself, after a creation that failed. It holds no container that anyone
/// knows of.
pub(super) async fn kill_shim(context: &Context, binary: &Path, shim: &Shim) {
    if shared_shim(context, shim) {
        return;
    }
    let (namespace, id) = (context.namespace().to_owned(), context.id().to_owned());
    let binary = binary.to_owned();
    let killed = context.shared.lane.run(move || kill_shims(&namespace, &id, &binary)).await;
    info!(processes = killed.unwrap_or(0), "killed a shim that did not end");
}

/// Kills the processes that run `binary` for the container; gives their number.
fn kill_shims(namespace: &str, id: &str, binary: &Path) -> usize {
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
        if !flag("-namespace", namespace) || !flag("-id", id) {
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

/// Cleans up after a shim whose connection has ended. First it is made sure that it is gone: a live one is
/// gone back to.
pub(super) async fn clean_up(context: Context) {
    loop {
        let mut connection = None;
        match load::probe(&context, &mut connection).await {
            Probe::Gone => break,
            Probe::Task { shim, init } => {
                info!("the connection to the shim was lost and is there again");
                if let Some(log) = load::follow_log(&context) {
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
    let journal = read_journal(&context).await;
    for event in journal.unsent {
        if let Err(error) = forward::accept(&context.shared, envelope(event)).await {
            warn!(error = %error, "the shim's journal holds an event that makes no sense");
        }
    }
    let killed = kill_container(&context).await;
    remove_socket(&context).await;
    let bundle = context.bundle.clone();
    if let Err(error) = blocking(&context.shared.lane, move || bundle.delete()).await {
        warn!(error = chain(&error), "cannot delete the bundle of a dead shim");
    }
    let journal = journal.exits.into_values().map(exit).collect();
    context.report(Message::CleanedUp { journal, killed }).await;
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
fn remove_dead_socket(path: &Path) -> Result<(), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => nix::unistd::unlink(path),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Has the shim's binary kill what the shim left. Says how the init process ended.
async fn kill_container(context: &Context) -> Option<Exit> {
    let binary = remembered_binary(context).await?;
    // A second try, for a machine that is so busy that the first ran out of time: what is not killed here
    // runs on without anyone who knows it.
    for _ in 0..2 {
        match binary::delete(&context.shared.config, &context.bundle, &binary).await {
            Ok(exit) => return Some(exit),
            Err(error) => warn!(error = chain(&error), "cannot clean up after the shim"),
        }
    }
    None
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

fn exit(record: ExitRecord) -> (String, Exit) {
    let exited_at = time(record.seconds, record.nanos);
    (record.id, Exit { pid: record.pid, status: record.status, exited_at })
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
