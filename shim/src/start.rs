//! The `start` action: finds or makes the shim of a container's group, and prints where it listens.
//!
//! It binds the socket, and leaves a copy of itself behind that serves on it: the daemon can connect as soon as it
//! knows the address, and need not wait until the copy is ready. To execute the program a second time would take a
//! third of the time of a start. Nothing else of this process stays, above all no descriptor of its output, whose end
//! the daemon waits for.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_shim_protocol::address::{self, DEFAULT_SOCKET_DIR};
use davit_shim_protocol::bootstrap::{StartEnvironment, StartInput, StartResult};
use davit_sys::detach::{leave_behind, set_command_line};
use davit_sys::fs::write_private;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, listen, socket};

use crate::arguments::Arguments;
use crate::log;
use crate::serve::{self, Given};
use crate::socket::{FolderError, bind_private, check_folder};
use crate::spec::Specification;

/// The file in the bundle that tells containerd 1.6 and 1.7 the address.
const ADDRESS_FILE: &str = "address";
/// The link in the bundle to the folder of the socket, if it is not the default one (containerd 2.3).
const SOCKET_DIR_LINK: &str = "s";
/// The most of standard input that is read, as in containerd.
const MAX_INPUT: u64 = 10 << 20;
/// Connections that can wait while the shim is busy.
const BACKLOG: i32 = 128;

/// Why no shim could be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// A file or socket cannot be used.
    #[error("{step} {path}", path = path.display())]
    Io {
        /// What was done with it.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// The folder of the sockets is not safe.
    #[error("use socket folder {}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why not.
        source: FolderError,
    },
    /// The serving process cannot be forked.
    #[error("start serving process")]
    Fork {
        /// The answer of the kernel.
        source: io::Error,
    },
}

fn io_error(step: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StartError {
    let path = path.into();
    move |source| StartError::Io { step, path, source }
}

/// Carries out `start` in the bundle that is the working directory.
pub(crate) fn run(arguments: &Arguments) -> Result<(), StartError> {
    let mut stdin = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut stdin).map_err(io_error("read", "/dev/stdin"))?;
    let variable = |name: &str| std::env::var(name).ok();
    let environment = StartEnvironment {
        id: arguments.id.clone(),
        grpc_address: arguments.address.clone(),
        debug: arguments.debug,
        ttrpc_address: variable("TTRPC_ADDRESS"),
        knows_json: variable("GRPC_ADDRESS").is_some() || variable("NAMESPACE").is_some(),
    };
    let input = StartInput::parse(&stdin, &environment);
    let specification = Specification::read(Path::new(".")).map_err(io_error("read", "config.json"))?;
    let group = specification.group().unwrap_or(&arguments.id).to_owned();
    // The copy is to serve for long, and starts with the memory of this process.
    drop((stdin, specification));

    let socket_dir = input.socket_dir.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET_DIR));
    if input.socket_dir.is_some() {
        let _ = std::fs::remove_file(SOCKET_DIR_LINK);
        std::os::unix::fs::symlink(&socket_dir, SOCKET_DIR_LINK)
            .map_err(io_error("link", SOCKET_DIR_LINK))?;
    }
    let path = address::socket_path(&socket_dir, &input.grpc_address, &arguments.namespace, &group);
    if let Some(listener) = bind_or_join(&socket_dir, &path)? {
        leave_server(arguments, &input, listener).inspect_err(|_| {
            let _ = std::fs::remove_file(&path);
        })?;
    }
    let address = address::unix_address(&path);
    write_private(Path::new(ADDRESS_FILE), address.as_bytes()).map_err(io_error("write", ADDRESS_FILE))?;
    let result = StartResult::for_generation(input.generation, address);
    io::stdout().write_all(&result.print(input.generation)).map_err(io_error("write", "/dev/stdout"))
}

/// Listens at `path`, or finds out that a shim does that already (`None`). A socket that nobody answers at is
/// replaced.
fn bind_or_join(folder: &Path, path: &Path) -> Result<Option<OwnedFd>, StartError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(io_error("create", folder))?;
    check_folder(folder).map_err(|source| StartError::Folder { folder: folder.to_owned(), source })?;
    // Two starts for one pod must not both find a socket stale and take it from each other.
    let lock = File::open(folder).map_err(io_error("open", folder))?;
    let _alone = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| io_error("lock", folder)(error.into()))?;
    let address = UnixAddr::new(path).map_err(|error| io_error("name socket", path)(error.into()))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let new_socket = || {
        socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(|error| io_error("make socket", path)(error.into()))
    };
    let listener = new_socket()?;
    let mut bound = bind_private(&listener, path);
    if bound == Err(Errno::EADDRINUSE) {
        match connect(new_socket()?.as_raw_fd(), &address) {
            // EAGAIN: it lives, and its queue is full.
            Ok(()) | Err(Errno::EAGAIN | Errno::EINPROGRESS) => return Ok(None),
            Err(_) => {
                let _ = std::fs::remove_file(path);
                bound = bind_private(&listener, path);
            }
        }
    }
    bound
        .and_then(|()| listen(&listener, Backlog::new(BACKLOG)?))
        .map_err(|error| io_error("listen at", path)(error.into()))?;
    Ok(Some(listener))
}

fn leave_server(arguments: &Arguments, input: &StartInput, listener: OwnedFd) -> Result<(), StartError> {
    let log = open_log().map(OwnedFd::from);
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        davit_sys::process::share_core_with_group()
            .map_err(io_error("enable sched core support of", "/proc/self"))?;
    }
    let oom_score_adj = raise_oom_score();
    let serve = |listener| {
        name_server(arguments, input.debug);
        let arguments = Arguments { debug: input.debug, ..arguments.clone() };
        let given = Given { listener, daemon: input.ttrpc_address.clone(), oom_score_adj };
        match serve::serve(arguments, given) {
            Ok(()) => 0,
            Err(error) => {
                log::error(format_args!("cannot serve: {error}"));
                1
            }
        }
    };
    let child = leave_behind(listener, log, serve).map_err(|source| StartError::Fork { source })?;
    let joined = join_cgroup(input, child.pid);
    if joined.is_err() {
        let _ = davit_sys::process::pidfd_send_signal(child.pidfd.as_fd(), nix::libc::SIGKILL);
    }
    joined
}

/// Gives the serving process the command line of one: operators find shims by it, and daemons their own.
pub(crate) fn name_server(arguments: &Arguments, debug: bool) {
    let program = std::env::args_os().next().unwrap_or_default();
    let mut line = vec![program.as_os_str()];
    for (flag, value) in
        [("-namespace", &arguments.namespace), ("-id", &arguments.id), ("-address", &arguments.address)]
    {
        line.extend([OsStr::new(flag), OsStr::new(value)]);
    }
    line.extend(debug.then_some(OsStr::new("-debug")));
    // It serves under any name.
    let _ = set_command_line(line);
}

/// The log FIFO of the bundle. Opened for both directions it opens at once whether the daemon reads or not.
fn open_log() -> Option<File> {
    File::options().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("log").ok()
}

/// Makes this process, and so the serving one, a likelier victim of the kernel than the daemon by one point.
/// Returns the score from before, if it was changed. What is not permitted is left.
fn raise_oom_score() -> Option<i32> {
    let read = |path: String| std::fs::read_to_string(path).ok()?.trim().parse::<i32>().ok();
    let daemon = read(format!("/proc/{}/oom_score_adj", nix::unistd::getppid()))?;
    let own = read("/proc/self/oom_score_adj".to_owned())?;
    let wanted = (daemon + 1).min(1000);
    std::fs::write("/proc/self/oom_score_adj", wanted.to_string()).ok()?;
    Some(own)
}

/// Moves the serving process into the cgroup that the options name.
fn join_cgroup(input: &StartInput, pid: i32) -> Result<(), StartError> {
    let options = input.options.as_ref().and_then(|options| {
        let options = prost_types::Any { type_url: options.type_url.clone(), value: options.value.clone() };
        any::unpack::<Options>(&options).ok().flatten()
    });
    let Some(group) = options.map(|options| options.shim_cgroup).filter(|group| !group.is_empty()) else {
        return Ok(());
    };
    let below = Path::new(group.trim_start_matches('/'));
    if !below.components().all(|part| matches!(part, Component::Normal(_))) {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "want a path below the root of the cgroups");
        return Err(io_error("join cgroup", group)(source));
    }
    for folder in crate::cgroup::folders_of(&group) {
        let file = folder.join("cgroup.procs");
        std::fs::write(&file, pid.to_string()).map_err(io_error("join cgroup", file))?;
    }
    Ok(())
}
