//! The socket over which a runtime hands out the terminal that it has made (`--console-socket`).
//!
//! The runtime makes it from `/dev/ptmx` of the container's root filesystem, which may be anything (the class of
//! CVE-2025-52565), and only the runtime may hand it out: what comes from another user, or is no master of a
//! pseudoterminal, is not taken.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, accept4, listen, socket};

use crate::executor::{Either, race};
use crate::log;
use crate::reactor::{Async, sleep};
use crate::socket::{bind_private, is_ours};

/// The time that the terminal has to arrive after the runtime has said that the process is there.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A listening socket with a name, which is removed with it.
pub(crate) struct ConsoleSocket {
    socket: Async<OwnedFd>,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens in `folder`, the one of the shim's own socket: its path is short enough and nobody else's. The name tells
    /// whose bundle it is for, so that whoever cleans up after a shim that was killed finds it.
    pub(crate) fn listen(folder: &Path, bundle: &Path) -> io::Result<ConsoleSocket> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{}{number}", prefix(bundle)));
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // One of a shim of the same bundle that was killed.
        let _ = std::fs::remove_file(&path);
        bind_private(&socket, &path)?;
        let socket = ConsoleSocket { socket: Async::new(socket)?, path };
        listen(socket.socket.get(), Backlog::new(1)?)?;
        Ok(socket)
    }

    /// The path to pass to the runtime.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the master side of the terminal.
    pub(crate) async fn receive(&self) -> io::Result<OwnedFd> {
        let receive = async {
            let connection = Async::new(self.accept().await?)?;
            connection
                .read_with(|connection| davit_sys::io::receive_descriptor(connection.as_fd()))
                .await?
                .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        let received = match race(receive, sleep(TIMEOUT)).await {
            Either::First(received) => received?,
            Either::Second(()) => return Err(io::ErrorKind::TimedOut.into()),
        };
        if !davit_sys::io::is_terminal_master(received.as_fd()) {
            let text = "what the runtime has sent is no master of a pseudoterminal";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(received)
    }

    /// The first connection of our own user.
    async fn accept(&self) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        loop {
            let accepted = self.socket.read_with(|socket| {
                let number = accept4(socket.as_raw_fd(), flags)?;
                davit_sys::io::inherited(number)
            });
            let connection = accepted.await?;
            if is_ours(&connection) {
                return Ok(connection);
            }
            log::warn("refused a terminal of another user");
        }
    }
}

/// How the names of a bundle's console sockets begin.
fn prefix(bundle: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    bundle.hash(&mut hasher);
    format!("pty-{:016x}-", hasher.finish())
}

/// Removes the console sockets that a shim of this bundle has left, which must be dead.
pub(crate) fn remove_left(folder: &Path, bundle: &Path) {
    let prefix = prefix(bundle);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::unix::fs::PermissionsExt;

    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, connect, sendmsg};

    use super::*;
    use crate::executor::run;

    /// Sends a descriptor as a runtime does.
    fn send(path: &Path, file: &impl AsFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        let numbers = [file.as_fd().as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"tty")], &rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn only_a_terminal_is_taken_for_one() {
        run(async {
            let folder = tempfile::tempdir().unwrap();
            let (pipe, _writer) = std::io::pipe().unwrap();
            let open = |path: &str| std::fs::File::options().read(true).write(true).open(path).unwrap();
            for (file, taken) in [
                (OwnedFd::from(pipe), false),
                (open("/dev/null").into(), false),
                (open("/dev/ptmx").into(), true),
            ] {
                let console = ConsoleSocket::listen(folder.path(), folder.path()).unwrap();
                let mode = std::fs::symlink_metadata(console.path()).unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o600);
                send(console.path(), &file);
                let received = console.receive().await;
                assert_eq!(received.is_ok(), taken, "{received:?}");
            }
        });
    }
}
