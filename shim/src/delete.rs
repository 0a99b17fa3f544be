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
use davit_shim_protocol::journal::{self, ExitRecord, Journal, Record, StartRecord};
use davit_sys::fs::read_regular;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use prost::Message;
use prost_types::Timestamp;

use crate::arguments::Arguments;
use crate::executor;
use crate::leftovers::{self, Leftovers};
use crate::log;
use crate::options::runtime_of_bundle;
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
    let mut recorded = journal::read(&bundle.join(journal::FILE_NAME)).unwrap_or_else(|error| {
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
    executor::run(async move { Leftovers::of(&runtime, &name, left, began).remove().await });
    record_killed(&bundle, running, &mut recorded);
    if let Err(error) = davit_sys::mount::unmount_all(&bundle.join("rootfs")) {
        log::warn(format_args!("failed to cleanup rootfs mount: {}", chain(&error)));
    }
    remove_dead_socket(&bundle);
    let response = response(&bundle, &id, &recorded);
    let mut stdout = io::stdout();
    stdout.write_all(&response.encode_to_vec())?;
    stdout.flush()
}

/// Records the ends of what was killed here, before anybody is told: whoever asks again hears the same.
fn record_killed(bundle: &Path, killed: Vec<StartRecord>, recorded: &mut journal::Contents) {
    let now = Timestamp::from(SystemTime::now());
    let exits: Vec<ExitRecord> = killed
        .into_iter()
        .map(|process| ExitRecord {
            id: process.id,
            pid: process.pid,
            status: KILLED,
            seconds: now.seconds,
            nanos: now.nanos,
            killed: true,
        })
        .collect();
    if exits.is_empty() {
        return;
    }
    let records: Vec<Record> = exits.iter().cloned().map(Record::Exit).collect();
    let appended =
        Journal::open(&bundle.join(journal::FILE_NAME)).and_then(|(mut journal, _)| journal.append(&records));
    if let Err(error) = appended {
        log::warn(chain(&error));
    }
    recorded.exits.extend(exits.into_iter().map(|exit| (exit.id.clone(), exit)));
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
