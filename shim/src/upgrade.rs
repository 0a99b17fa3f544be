//! Live upgrade: this process executes another build of the shim, and its containers do not notice.
//!
//! ```text
//!  client           this program                                      another process of the new program
//!    │ Upgrade          │
//!    ├─────────────────►│ open it: root's, and nobody else can change it
//!    │                  ├─ -upgrade-check, an empty state ──────────────►│
//!    │                  │◄───────────────────────── understood ──────────┤   a wrong or a hanging program ends here,
//!    │                  │                                                    and nothing has been touched
//!    │                  │ close the gate: requests stay in their sockets
//!    │                  │ calls, runtimes and helpers at work come to their ends (10 s at most)
//!    │                  │ stand still: no other task goes on
//!    │                  │ write the state into a file in memory
//!    │                  ├─ -upgrade-check, that very file ──────────────►│
//!    │                  │◄───────────────────────── understood ──────────┤
//!    │                  │ have the listed descriptors inherited
//!    │                  ▼ execveat
//!    │              the new program: same process, same children, same descriptors
//!    │                  │ read the state, claim processes, go on with streams
//!    │◄─────────────────┤ answer
//! ```
//! Until `execveat` every failure, its own included, leads back: the gate opens, and everything goes on where it stood
//! still. There is no way back from the new program, so what could fail in it is tried before in a process of its own:
//! that the file is a program which can be executed here, that it knows the version of the state, that nothing in the state
//! is missing.
//!
//! The state holds no more than what neither a file nor a descriptor knows: see [`crate::state`]. Waiting calls are in it
//! as their requests, and are made again. Processes that end meanwhile stay zombies until they are looked at.

mod handed;
mod program;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use nix::fcntl::{AtFlags, FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::execveat;

use crate::arguments::Arguments;
use crate::executor::{Either, alone, race};
use crate::offload::Quiet;
use crate::outbox::Journals;
use crate::quiesce::{self, Closed};
use crate::reactor::sleep;
use crate::rpc::{Connection, Server};
use crate::state::{self, State};
use crate::{identity, log, offload};

pub(crate) use handed::Handed;
use program::Program;
pub(crate) use program::answer_check;

/// The time for what is under way to come to its end.
const QUIET_LIMIT: Duration = Duration::from_secs(10);

/// Why an upgrade did not happen. The shim goes on as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpgradeError {
    /// The program is no absolute path.
    #[error("program {path} is not absolute", path = path.display())]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// The program cannot be opened.
    #[error("open program {path}", path = path.display())]
    Open {
        /// The path up to where it cannot be followed.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// Somebody else than root could have changed what is to be executed with all of root's rights.
    #[error("program refused: {path} {why}", path = path.display())]
    Unsafe {
        /// The program, or a folder above it.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The program was executed for a check, and did not say that it understands the state.
    #[error("program {path} refused: {why}", path = path.display())]
    Check {
        /// The program.
        path: PathBuf,
        /// What it did instead.
        why: String,
    },
    /// Another upgrade is on its way.
    #[error("another upgrade is under way")]
    UnderWay,
    /// The shim is about to end.
    #[error("the shim is ending")]
    Ending,
    /// Something did not come to its end.
    #[error("calls under way did not end within {} s", limit.as_secs())]
    Busy {
        /// The time that they had.
        limit: Duration,
    },
    /// A step failed.
    #[error("{step}")]
    Io {
        /// Which.
        step: &'static str,
        /// The answer of the kernel.
        source: io::Error,
    },
}

impl Coded for UpgradeError {
    fn code(&self) -> ErrorCode {
        match self {
            UpgradeError::Relative { .. } => ErrorCode::InvalidArgument,
            UpgradeError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorCode::NotFound
            }
            UpgradeError::Open { .. } | UpgradeError::Io { .. } => ErrorCode::Internal,
            UpgradeError::Unsafe { .. } => ErrorCode::PermissionDenied,
            UpgradeError::Check { .. } => ErrorCode::FailedPrecondition,
            UpgradeError::UnderWay | UpgradeError::Ending | UpgradeError::Busy { .. } => {
                ErrorCode::Unavailable
            }
        }
    }
}

/// The right to upgrade, which one caller has at a time.
pub(crate) struct Turn {
    server: Rc<Server>,
}

impl Turn {
    /// Takes it, unless somebody has it.
    pub(crate) fn take(server: &Rc<Server>) -> Option<Turn> {
        if server.upgrading.replace(true) { None } else { Some(Turn { server: server.clone() }) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.server.upgrading.set(false);
    }
}

/// Executes another program. Returns only if that did not happen; else the program answers `stream` of the caller.
///
/// # Errors
/// [`UpgradeError`].
pub(crate) async fn run(
    turn: &Turn,
    caller: &Rc<Connection>,
    stream: u32,
    path: &Path,
) -> Result<Infallible, UpgradeError> {
    let server = &turn.server;
    let program = Program::open(path)?;
    let empty = State::default().seal();
    program.check(&sealed_file(&empty)?, &empty).await?;

    let closed = quiesce::close();
    let _quiet = match race(settle(&closed), sleep(QUIET_LIMIT)).await {
        Either::First(quiet) => quiet,
        Either::Second(()) => return Err(UpgradeError::Busy { limit: QUIET_LIMIT }),
    };
    let _alone = alone();
    if server.shim.is_stopping() {
        return Err(UpgradeError::Ending);
    }
    let mut lent = BTreeSet::new();
    let state = save(server, caller, stream, &mut lent).seal();
    let file = sealed_file(&state)?;
    program.check(&file, &state).await?;
    log::debug(format_args!("executing {} with a state of {} bytes", path.display(), state.len()));
    Err(execute(&program, &server.arguments, &file, &lent))
}

/// Waits until nothing is under way and no helper at work. None begins as long as the guard lives.
async fn settle(closed: &Closed) -> Quiet {
    loop {
        closed.quiet().await;
        let quiet = offload::quiesce().await;
        // An exit that was seen meanwhile may have called a runtime.
        if closed.is_quiet() {
            return quiet;
        }
    }
}

/// Describes everything, and takes note of the descriptors that must stay open.
fn save(server: &Server, caller: &Rc<Connection>, stream: u32, lent: &mut BTreeSet<RawFd>) -> State {
    let mut lend = |descriptor: BorrowedFd<'_>| {
        let number = descriptor.as_raw_fd();
        lent.insert(number);
        number.unsigned_abs()
    };
    let shim = &server.shim;
    let mut journals = Journals::default();
    let containers = shim.containers();
    let containers: Vec<_> = containers
        .iter()
        .map(|container| container.save(journals.index(&container.journal), &mut lend))
        .collect();
    let (sequence, queue) = shim.outbox.save(&mut journals);
    let connections: Vec<_> =
        server.connections().into_iter().filter(|connection| !connection.is_closed()).collect();
    let asking = connections.iter().position(|connection| Rc::ptr_eq(connection, caller));
    let caller =
        asking.and_then(|index| Some(state::Caller { connection: u32::try_from(index).ok()?, stream }));
    let mut state = State {
        descriptors: Vec::new(),
        listener: lend(server.listener.get().as_fd()),
        socket: server.socket.as_ref().map(|socket| socket.save()),
        upgrades: shim.upgrades.get(),
        caller,
        before: Some(identity::program()),
        journals: journals.save(&mut lend),
        sequence,
        queue,
        containers,
        connections: connections.iter().map(|connection| connection.save(&mut lend)).collect(),
        daemon: server.daemon.clone(),
        oom_score_adj: shim.oom_score_adj,
    };
    state.descriptors = lent.iter().map(|number| number.unsigned_abs()).collect();
    state
}

/// A file without a name that nobody can change any more, at its beginning.
fn sealed_file(bytes: &[u8]) -> Result<OwnedFd, UpgradeError> {
    let make = || -> io::Result<OwnedFd> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = std::fs::File::from(memfd_create(c"state", flags)?);
        file.write_all(bytes)?;
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals | SealFlag::F_SEAL_SEAL))?;
        io::Seek::rewind(&mut file)?;
        Ok(file.into())
    };
    make().map_err(|source| UpgradeError::Io { step: "write the state", source })
}

/// The point of no return, which this function does not return from.
fn execute(
    program: &Program,
    arguments: &Arguments,
    state: &OwnedFd,
    lent: &BTreeSet<RawFd>,
) -> UpgradeError {
    let failed = |step| move |source| UpgradeError::Io { step, source };
    let inherit = |inherited: bool| {
        let mut numbers = lent.iter().copied().chain([state.as_raw_fd()]);
        numbers.try_for_each(|number| davit_sys::io::set_inherited(number, inherited))
    };
    let execute = || -> Result<Infallible, UpgradeError> {
        let mut line: Vec<Vec<u8>> = vec![program.path().as_os_str().as_bytes().to_vec()];
        for (flag, value) in
            [("-namespace", &arguments.namespace), ("-id", &arguments.id), ("-address", &arguments.address)]
        {
            line.extend([flag.into(), value.as_bytes().to_vec()]);
        }
        line.extend(arguments.debug.then(|| b"-debug".to_vec()));
        line.extend([b"-upgrade-state".to_vec(), state.as_raw_fd().to_string().into_bytes()]);
        let variable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            [name.into_vec(), vec![b'='], value.into_vec()].concat()
        };
        let environment = std::env::vars_os().map(variable);
        let strings = |all: Vec<Vec<u8>>| all.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
        let invalid = |error: std::ffi::NulError| UpgradeError::Io {
            step: "prepare the command line",
            source: error.into(),
        };
        let line = strings(line).map_err(invalid)?;
        let environment = strings(environment.collect()).map_err(invalid)?;
        inherit(true).map_err(failed("hand on descriptors"))?;
        execveat(program.file(), c"", &line, &environment, AtFlags::AT_EMPTY_PATH)
            .map_err(|errno| failed("execute the program")(errno.into()))
    };
    match execute() {
        Ok(never) => match never {},
        Err(error) => {
            if let Err(error) = inherit(false) {
                log::error(format_args!("descriptors stay inheritable: {error}"));
            }
            error
        }
    }
}
