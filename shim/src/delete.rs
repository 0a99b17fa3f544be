//! The `delete` action: a daemon calls it when a shim is dead, or when a bundle was never started. It removes
//! what is left of the container and tells how it ended. It does not end before the container's processes have: the
//! caller says how long that may take, and comes back.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use davit_model::error::chain;
use davit_proto::containerd::task::v3::DeleteResponse;
use davit_shim_protocol::address;
use davit_shim_protocol::journal::{self, ExitRecord, Journal, JournalError, Record, StartRecord};
use davit_sys::fs::read_regular;
use davit_sys::process::pidfd_open;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::getppid;
use prost::Message;
use prost_types::Timestamp;

use crate::arguments::Arguments;
use crate::console;
use crate::executor::{self, Either, race};
use crate::leftovers::{self, Leftovers, end_runtimes};
use crate::log;
use crate::options::runtime_of_bundle;
use crate::reactor::Async;
use crate::runtime::read_pid_file;

/// More than any address has bytes.
const MAX_ADDRESS: u64 = 4096;
/// The status if nobody saw the end: that of a process that was killed, for that is what happens to it here.
const KILLED: u32 = 137;

/// Carries out `delete`, and prints a `DeleteResponse`. Whatever is missing from the bundle is skipped.
pub(crate) fn run(arguments: Arguments) -> io::Result<()> {
    let bundle = match arguments.bundle {
        Some(bundle) => bundle,
        None => std::env::current_dir()?,
    };
    let id = arguments.id;
    let recorded = journal::read(&bundle.join(journal::FILE_NAME)).unwrap_or_else(|error| {
        log::warn(chain(&error));
        journal::Contents::default()
    });
    let runtime = runtime_of_bundle(&bundle, &arguments.namespace);
    let mut running: Vec<StartRecord> = recorded.running.values().cloned().collect();
    let mut began = !running.is_empty() || !recorded.exits.is_empty();
    if !began {
        running.extend(leftovers::init_of_bundle(&bundle, &id));
        began = !running.is_empty();
    }
    let (name, left) = (id.clone(), running.clone());
    let removed = executor::run(async move {
        end_runtimes(&runtime.bundle).await;
        let left = Leftovers::of(&runtime, &name, left, began);
        let parent = getppid();
        let Ok(pidfd) = pidfd_open(parent.as_raw()).and_then(Async::new) else {
            left.remove().await;
            return Either::First(());
        };
        // A pidfd becomes readable at the end of its process, and then we have another parent.
        let parent_ended = pidfd
            .read_with(|_| if getppid() == parent { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) });
        race(left.remove(), parent_ended).await
    });
    if let Either::Second(_) = removed {
        // The next daemon does all of it again, and may then make a container of the same name: it must not meet us.
        return Err(io::Error::other("the daemon is gone"));
    }
    let recorded = if running.is_empty() { recorded } else { record_killed(&bundle, running) };
    if let Err(error) = davit_sys::mount::unmount_all(&bundle.join("rootfs")) {
        log::warn(format_args!("failed to cleanup rootfs mount: {}", chain(&error)));
    }
    if let Some(folder) = socket_of(&bundle).as_deref().and_then(Path::parent) {
        console::remove_left(folder, &bundle);
    }
    remove_dead_socket(&bundle);
    let response = response(&bundle, &id, &recorded);
    let mut stdout = io::stdout();
    stdout.write_all(&response.encode_to_vec())?;
    stdout.flush()
}

/// Records the ends of what was killed here, before anybody is told: whoever asks again hears the same. Gives all that is
/// recorded.
fn record_killed(bundle: &Path, killed: Vec<StartRecord>) -> journal::Contents {
    let now = Timestamp::from(SystemTime::now());
    let record = || -> Result<journal::Contents, JournalError> {
        let path = bundle.join(journal::FILE_NAME);
        // Another one may be at it, on behalf of a daemon that has died since: the first one's word stands.
        let lock = std::fs::File::open(bundle).and_then(|folder| {
            Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
        });
        let _alone =
            lock.map_err(|source| JournalError::Io { operation: "lock", path: path.clone(), source })?;
        let (mut journal, mut recorded) = Journal::open(&path)?;
        let mut exits = Vec::new();
        for process in killed.iter().filter(|process| !recorded.exits.contains_key(&process.id)) {
            exits.push(ExitRecord {
                id: process.id.clone(),
                pid: process.pid,
                status: KILLED,
                seconds: now.seconds,
                nanos: now.nanos,
                killed: true,
            });
        }
        let records: Vec<Record> = exits.iter().cloned().map(Record::Exit).collect();
        journal.append(&records)?;
        recorded.exits.extend(exits.into_iter().map(|exit| (exit.id.clone(), exit)));
        Ok(recorded)
    };
    record().unwrap_or_else(|error| {
        log::warn(chain(&error));
        journal::Contents::default()
    })
}

/// How init ended: as the journal says, if the shim lived to see it.
fn response(bundle: &Path, id: &str, recorded: &journal::Contents) -> DeleteResponse {
    if let Some(exit) = recorded.exits.get(id) {
        return DeleteResponse {
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: Some(Timestamp { seconds: exit.seconds, nanos: exit.nanos }),
        };
    }
    let pid = read_pid_file(&bundle.join("init.pid")).unwrap_or(0);
    DeleteResponse {
        pid: u32::try_from(pid).unwrap_or(0),
        exit_status: KILLED,
        exited_at: Some(Timestamp::from(SystemTime::now())),
    }
}

/// Removes the name of the shim's socket if nobody listens there any more.
fn remove_dead_socket(bundle: &Path) {
    let Some(path) = socket_of(bundle) else { return };
    // As `start` does it: between our look and the removal another shim may take the name of a dead one.
    let folder = std::fs::File::open(path.parent().unwrap_or(&path));
    let Ok(Ok(_alone)) = folder.map(|folder| Flock::lock(folder, FlockArg::LockExclusive)) else { return };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let Ok(socket) = socket(AddressFamily::Unix, SockType::Stream, flags, None) else { return };
    let Ok(address) = UnixAddr::new(&path) else { return };
    // A connection to anything but a socket is refused as well.
    let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|status| status.file_type().is_socket());
    if is_socket && connect(socket.as_raw_fd(), &address) == Err(Errno::ECONNREFUSED) {
        let _ = std::fs::remove_file(&path);
    }
}

fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = read_regular(&bundle.join("address"), MAX_ADDRESS).ok()?;
    address::parse(std::str::from_utf8(&address).ok()?.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_recorded_once_however_often_it_is_cleaned_up() {
        let bundle = tempfile::tempdir().unwrap();
        let process = |id: &str, pid| StartRecord { id: id.to_owned(), pid, start_time: 1 };
        let (mut journal, _) = Journal::open(&bundle.path().join(journal::FILE_NAME)).unwrap();
        let ended = ExitRecord { id: "over".to_owned(), pid: 3, status: 4, ..ExitRecord::default() };
        journal.append(&[Record::Start(process("box", 1)), Record::Exit(ended.clone())]).unwrap();
        let running = vec![process("box", 1), process("over", 3)];
        let first = record_killed(bundle.path(), running.clone());
        assert_eq!((first.exits["box"].status, first.exits["box"].killed), (KILLED, true));
        assert_eq!(first.exits["over"], ended, "what the shim has seen stands");
        let second = record_killed(bundle.path(), running);
        assert_eq!(first.exits, second.exits);
        assert_eq!(journal::read(&bundle.path().join(journal::FILE_NAME)).unwrap().exits, first.exits);
        // Where there is no bundle any more, nothing is made.
        std::fs::remove_dir_all(bundle.path()).unwrap();
        assert!(record_killed(bundle.path(), vec![process("box", 1)]).exits.is_empty());
        assert!(!bundle.path().exists());
    }
}
