//! The `delete` action: a daemon calls it when a shim is dead, or when a bundle was never started. It removes
//! what is left of the container and tells how it ended.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use davit_model::error::chain;
use davit_proto::containerd::task::v3::DeleteResponse;
use davit_shim_protocol::{address, journal};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use prost::Message;
use prost_types::Timestamp;

use crate::arguments::Arguments;
use crate::executor;
use crate::log;
use crate::options::runtime_of_bundle;
use crate::runtime::read_pid_file;

/// The status if nobody saw the end: that of a process that was killed, for that is what happens to it here.
const KILLED: u32 = 137;

/// Carries out `delete`, and prints a `DeleteResponse`. Whatever is missing from the bundle is skipped.
pub(crate) fn run(arguments: Arguments) -> io::Result<()> {
    let bundle = match arguments.bundle {
        Some(bundle) => bundle,
        None => std::env::current_dir()?,
    };
    let id = arguments.id;
    let runtime = runtime_of_bundle(&bundle, &arguments.namespace);
    let deleted = {
        let id = id.clone();
        executor::run(async move {
            let arguments = ["delete", "--force", &id].map(OsStr::new);
            runtime.simple("failed to remove runtime container", &arguments).await
        })
    };
    if let Err(error) = deleted {
        log::warn(chain(&error));
    }
    if let Err(error) = davit_sys::mount::unmount_all(&bundle.join("rootfs")) {
        log::warn(format_args!("failed to cleanup rootfs mount: {}", chain(&error)));
    }
    remove_dead_socket(&bundle);
    let response = response(&bundle, &id);
    let mut stdout = io::stdout();
    stdout.write_all(&response.encode_to_vec())?;
    stdout.flush()
}

/// How init ended: as the journal says, if the shim lived to see it.
fn response(bundle: &Path, id: &str) -> DeleteResponse {
    let recorded = journal::read(&bundle.join(journal::FILE_NAME)).unwrap_or_else(|error| {
        log::warn(chain(&error));
        journal::Contents::default()
    });
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
    if connect(socket.as_raw_fd(), &address) == Err(Errno::ECONNREFUSED) {
        let _ = std::fs::remove_file(&path);
    }
}

fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = std::fs::read_to_string(bundle.join("address")).ok()?;
    address::parse(address.trim()).ok()
}
