//! Opens the files that streams come from and go to.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use crate::copy::{Pipe, PipeKind, Sink};
use crate::log_file::{Format, LogFile};
use crate::offload;
use crate::reactor::Async;
use crate::spec::Specification;
use crate::stdio::{Owner, Request, StdioError};

/// The annotation that says whether a container waits for those who take its output.
pub(super) const MODE_ANNOTATION: &str = "io.davit.stdio.mode";

/// Whether the container of this bundle waits for whoever takes its output.
///
/// # Errors
/// [`StdioError::Mode`].
pub(super) fn is_blocking(request: &Request, bundle: &Path) -> Result<bool, StdioError> {
    if request.stdout.is_empty() && request.stderr.is_empty() {
        return Ok(false);
    }
    // A document that cannot be read is refused by the runtime, with better words.
    let Ok(specification) = Specification::read(bundle) else { return Ok(false) };
    match specification.annotation(MODE_ANNOTATION) {
        None | Some("non-blocking") => Ok(false),
        Some("blocking") => Ok(true),
        Some(mode) => Err(StdioError::Mode { mode: mode.to_owned() }),
    }
}

/// Says which step failed.
pub(super) fn pipe_error(step: &'static str) -> impl Fn(io::Error) -> StdioError {
    move |source| StdioError::Pipe { step, source }
}

/// Makes a pipe that belongs to the owner.
pub(super) fn pipe(owner: &Owner<'_>) -> Result<(OwnedFd, OwnedFd), StdioError> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(|error| pipe_error("make pipe")(error.into()))?;
    if owner.uid != 0 || owner.gid != 0 {
        for end in [&reader, &writer] {
            fchown(end, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
                .map_err(|error| pipe_error("change owner of pipe")(error.into()))?;
        }
    }
    Ok((reader, writer))
}

/// Has operations on the file fail instead of waiting.
pub(super) fn set_nonblocking(file: &OwnedFd) -> Result<(), StdioError> {
    let set = || {
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
        fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
    };
    set().map(drop).map_err(|error| pipe_error("make pipe non-blocking")(error.into()))
}

/// The writing end of a pipe as a sink.
pub(super) fn pipe_sink(end: OwnedFd, kind: PipeKind) -> Result<Sink, StdioError> {
    set_nonblocking(&end)?;
    let fd = Async::for_writing(end).map_err(pipe_error("watch pipe of logger"))?;
    Ok(Sink::Pipe(Pipe { fd, kind }))
}

/// Opens a FIFO as a sink; `None` if the file is no FIFO.
pub(super) fn fifo_sink(path: &Path, blocking: bool) -> Result<Option<Sink>, StdioError> {
    let failed = |source| StdioError::Open { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(failed)?.file_type().is_fifo() {
        return Ok(None);
    }
    // Opened for both directions it has a reader always, and so never breaks.
    let (file, kind) = match blocking {
        true => (open_both(path).map_err(failed)?, PipeKind::Blocking),
        false => (open_fifo(path).map_err(failed)?, PipeKind::Fifo),
    };
    let fd = Async::for_writing(file).map_err(pipe_error("watch fifo"))?;
    Ok(Some(Sink::Pipe(Pipe { fd, kind })))
}

fn open_both(path: &Path) -> io::Result<OwnedFd> {
    let mut options = File::options();
    Ok(options.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?.into())
}

/// Opens the writing end of a FIFO, whether it has a reader or not (fifo(7) has no direct way to do that). As nothing
/// else of ours reads from it, the kernel says truly whether somebody does, and what is in it stays as long as this
/// end is open.
pub(crate) fn open_fifo(path: &Path) -> io::Result<OwnedFd> {
    let both = open_both(path)?;
    let again = PathBuf::from(format!("/proc/self/fd/{}", both.as_raw_fd()));
    Ok(File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(again)?.into())
}

/// Opens a log, by a helper.
pub(super) async fn log(path: PathBuf, format: Format) -> Result<LogFile, StdioError> {
    offload::wait_for(move || {
        LogFile::open(&path, format).map_err(|source| StdioError::Open { path, source })
    })
    .await
}

/// Opens a file that is there, by a helper.
pub(super) async fn existing_log(path: PathBuf) -> Result<LogFile, StdioError> {
    offload::wait_for(move || {
        LogFile::open_existing(&path).map_err(|source| StdioError::Open { path, source })
    })
    .await
}

/// Opens the source of standard input, and if it is a FIFO, a writing end to hold.
pub(super) fn stdin(path: &Path) -> Result<(OwnedFd, Option<OwnedFd>), StdioError> {
    let open = |options: &mut std::fs::OpenOptions| {
        options
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .map_err(|source| StdioError::Open { path: path.to_owned(), source })
    };
    let reader = open(File::options().read(true))?;
    let is_fifo = reader.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo());
    let hold = if is_fifo { Some(open(File::options().write(true))?.into()) } else { None };
    Ok((reader.into(), hold))
}
