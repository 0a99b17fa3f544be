//! The serving process: sets itself up while nothing else runs, then serves until it is told to end.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockname, listen, socket};

use crate::arguments::Arguments;
use crate::executor::{race, run as run_tasks, spawn};
use crate::log;
use crate::publisher::Publisher;
use crate::reactor::sleep;
use crate::rpc::Server;
use crate::shim::Shim;
use crate::socket::bind_private;
use crate::upgrade::Handed;
use crate::{reaper, start, state};

/// The time that clients have to take their last replies.
const LAST_REPLIES: Duration = Duration::from_millis(100);
/// The time that the daemon has to take the last events after it has asked the shim to end. What it does not
/// take stays in the journal.
const LAST_EVENTS: Duration = Duration::from_secs(30);

/// What the serving process is given by the `start` that left it behind.
pub(crate) struct Given {
    /// The socket that clients connect to.
    pub(crate) listener: OwnedFd,
    /// The address of the daemon's socket for events.
    pub(crate) daemon: String,
    /// The `oom_score_adj` from before it was changed.
    pub(crate) oom_score_adj: Option<i32>,
}

/// Serves on the socket that `-socket` names, as somebody does who starts the shim by hand.
pub(crate) fn run(arguments: Arguments) -> io::Result<()> {
    let path = arguments.socket.as_deref().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "one of start, delete and -socket is needed")
    })?;
    let listener = listen_at(path)?;
    let daemon = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    serve(arguments, Given { listener, daemon, oom_score_adj: None })
}

/// Serves until a client asks for the end and no container is left.
pub(crate) fn serve(arguments: Arguments, given: Given) -> io::Result<()> {
    let socket = SocketFile::of(&given.listener);
    go_on(arguments, given, socket, None)
}

/// Serves on where an earlier program of this process has left off, whose state is at this descriptor.
pub(crate) fn resume(arguments: Arguments, number: RawFd) -> io::Result<()> {
    let mut handed = Handed::receive(number)?;
    let given = handed.given()?;
    // The kernel has named the process by the number of a descriptor, and its command line tells of one.
    let _ = prctl::set_name(c"containerd-shim");
    start::name_server(&arguments, arguments.debug);
    let socket = handed.socket_file();
    go_on(arguments, given, socket, Some(handed))
}

fn go_on(
    arguments: Arguments,
    given: Given,
    socket: Option<SocketFile>,
    handed: Option<Handed>,
) -> io::Result<()> {
    log::set_debug(arguments.debug);
    prepare_process()?;
    let folder = socket.as_ref().and_then(|socket| socket.path.parent()).map(Path::to_owned);
    let folder = folder.unwrap_or_else(std::env::temp_dir);
    run_tasks(async move {
        let shim = Rc::new(Shim::new(arguments.namespace.clone(), folder, given.oom_score_adj));
        let publisher = Publisher::new(&given.daemon, arguments.namespace.clone());
        let server = Server::new(shim.clone(), arguments, given, socket)?;
        // Before orphans are buried: the processes of its containers are claimed again.
        if let Some(handed) = handed {
            handed.restore(&server);
        }
        spawn(async {
            if let Err(error) = reaper::bury_orphans().await {
                log::error(format_args!("orphans are not reaped any more: {error}"));
            }
        });
        spawn(shim.outbox.clone().run(publisher));
        spawn(server.clone().serve());
        shim.stopped().await;
        // A name that leads nowhere would only keep the next shim of the group waiting.
        if let Some(socket) = &server.socket {
            socket.remove();
        }
        race(shim.without_clients(), sleep(LAST_REPLIES)).await;
        race(shim.outbox.empty(), sleep(LAST_EVENTS)).await;
        Ok(())
    })
}

/// Makes the process what it has to be as long as it serves. What it changes here is undone for each program
/// that it executes, see [`davit_sys::process::Command`].
fn prepare_process() -> io::Result<()> {
    prctl::set_child_subreaper(true)?;
    // Some of the smallest processes grow by half where huge pages are given out always.
    let _ = prctl::set_thp_disable(true);
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    // Only a client that has no containers left ends the shim, no signal that a terminal or an init system
    // sends, or an operator who knows containerd's shim (it prints its stacks at SIGUSR1).
    let signals =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE, Signal::SIGUSR1, Signal::SIGUSR2];
    for ignored in signals {
        davit_sys::process::ignore(ignored as i32)?;
    }
    Ok(())
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    bind_private(&listener, path)?;
    listen(&listener, Backlog::new(128)?)?;
    Ok(listener)
}

/// The name of our socket, and which file it was when we began to listen.
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    fn of(listener: &OwnedFd) -> Option<SocketFile> {
        let address: UnixAddr = getsockname(listener.as_raw_fd()).ok()?;
        let path = address.path()?.to_owned();
        let inode = inode(&path)?;
        Some(SocketFile { path, inode })
    }

    /// Describes it for [`SocketFile::restore`].
    pub(crate) fn save(&self) -> state::SocketFile {
        let (device, inode) = self.inode;
        state::SocketFile { path: self.path.as_os_str().as_bytes().to_vec(), device, inode }
    }

    /// The name that was saved; another shim may have it by now.
    pub(crate) fn restore(saved: &state::SocketFile) -> SocketFile {
        let path = PathBuf::from(OsStr::from_bytes(&saved.path));
        SocketFile { path, inode: (saved.device, saved.inode) }
    }

    /// Removes the name, unless another shim has it by now.
    fn remove(&self) {
        if inode(&self.path) == Some(self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
