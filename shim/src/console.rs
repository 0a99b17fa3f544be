//! The socket over which a runtime hands out the terminal that it has made (`--console-socket`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket};

use crate::executor::{Either, race};
use crate::reactor::{Async, sleep};

/// The time that the terminal has to arrive after the runtime has said that the process is there.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A listening socket with a name, which is removed with it.
pub(crate) struct ConsoleSocket {
    socket: Async<OwnedFd>,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens in `folder`, the one of the shim's own socket: its path is short enough and nobody else's.
    pub(crate) fn listen(folder: &Path) -> io::Result<ConsoleSocket> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("pty-{}-{number}", std::process::id()));
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // One of a shim with our pid that was killed.
        let _ = std::fs::remove_file(&path);
        bind(socket.as_raw_fd(), &UnixAddr::new(&path)?)?;
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
            let connection = self
                .socket
                .read_with(|socket| {
                    Ok(accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?)
                })
                .await?;
            let connection = Async::new(davit_sys::io::inherited(connection)?)?;
            connection
                .read_with(|connection| davit_sys::io::receive_descriptor(connection.as_fd()))
                .await?
                .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        match race(receive, sleep(TIMEOUT)).await {
            Either::First(received) => received,
            Either::Second(()) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
