//! The standard streams of a process: what a client asks for by addresses, and what the runtime is handed.
//!
//! | address | meaning |
//! |---|---|
//! | empty | `/dev/null` |
//! | a path, `fifo:///path` | a FIFO of the client, or a file |
//! | `file:///path` | a file to append to, made with mode 0644, for stdout and stderr alike |
//! | `binary:///program?key=value` | a logger, see [`crate::logger`] |
//!
//! The shim holds every FIFO open in both directions, so that readers come and go without breaking the
//! container's pipe. A terminal has one stream, which goes to the address of stdout.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2};

use crate::copy::{self, Closing, Sink};
use crate::executor::{Either, race, spawn};
use crate::logger::{self, Logger, LoggerError};
use crate::reactor::{Async, sleep};
use crate::runtime::ChildStdio;
use crate::sync::Condition;

/// The time that output has to arrive after the end of its process (containerd `process.delete`).
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a client asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Request {
    /// The address of standard input.
    pub(crate) stdin: String,
    /// That of standard output.
    pub(crate) stdout: String,
    /// That of standard error.
    pub(crate) stderr: String,
    /// True if the process wants a terminal.
    pub(crate) terminal: bool,
}

/// Why streams cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// An address of no known kind.
    #[error("unknown STDIO scheme {scheme}")]
    Scheme {
        /// The part before `://`.
        scheme: String,
    },
    /// A FIFO or file cannot be opened.
    #[error("open {path}", path = path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// No pipe can be made, or not be watched.
    #[error("{step}")]
    Pipe {
        /// What failed.
        step: &'static str,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// The logger does not work.
    #[error("logging binary")]
    Logger {
        /// Why.
        source: LoggerError,
    },
}

impl Coded for StdioError {
    fn code(&self) -> ErrorCode {
        match self {
            StdioError::Scheme { .. } => ErrorCode::InvalidArgument,
            StdioError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorCode::NotFound
            }
            StdioError::Open { .. } | StdioError::Pipe { .. } => ErrorCode::Internal,
            StdioError::Logger { source } => source.code(),
        }
    }
}

fn pipe_error(step: &'static str) -> impl Fn(io::Error) -> StdioError {
    move |source| StdioError::Pipe { step, source }
}

/// An address taken apart.
#[derive(Debug, PartialEq, Eq)]
enum Address {
    Null,
    Path(PathBuf),
    File(PathBuf),
    Logger(logger::Program),
}

impl Address {
    fn parse(address: &str) -> Result<Address, StdioError> {
        if address.is_empty() {
            return Ok(Address::Null);
        }
        let Some((scheme, rest)) = address.split_once("://") else {
            return Ok(Address::Path(PathBuf::from(address)));
        };
        let path = || PathBuf::from(logger::decode(rest.split(['?', '#']).next().unwrap_or_default()));
        match scheme {
            "fifo" => Ok(Address::Path(path())),
            "file" => Ok(Address::File(path())),
            "binary" | "binary-v2" => {
                Ok(Address::Logger(logger::Program::parse(rest, scheme == "binary-v2")))
            }
            scheme => Err(StdioError::Scheme { scheme: scheme.to_owned() }),
        }
    }
}

/// The copies that bring a process's output to where it belongs.
#[derive(Default)]
struct Copies {
    running: Cell<usize>,
    changed: Condition,
}

/// The streams of a process as long as it is not deleted.
pub(crate) struct Streams {
    copies: Rc<Copies>,
    /// Our own writing end of the stdin FIFO: while it is open, a client that leaves does not end the input.
    stdin_hold: RefCell<Option<OwnedFd>>,
    /// The writing end of the process's standard input, until it is copied to.
    stdin_sink: RefCell<Option<Async<OwnedFd>>>,
    terminal: RefCell<Option<Rc<Async<OwnedFd>>>>,
    /// The process has exited.
    closing: Rc<Closing>,
    /// The process is deleted: what still copies has to stop.
    closed: Rc<Closing>,
    logger: RefCell<Option<Logger>>,
    /// Copies that wait for [`Streams::start`].
    waiting: RefCell<Vec<Pin<Box<dyn Future<Output = ()>>>>>,
}

/// Who the process belongs to, for the logger's environment, and who owns its pipes.
pub(crate) struct Owner<'a> {
    /// The container's or exec's id.
    pub(crate) id: &'a str,
    /// The namespace.
    pub(crate) namespace: &'a str,
    /// The owner of the container's ends.
    pub(crate) uid: u32,
    /// Their group.
    pub(crate) gid: u32,
}

impl Streams {
    fn new() -> Streams {
        Streams {
            copies: Rc::default(),
            stdin_hold: RefCell::default(),
            stdin_sink: RefCell::default(),
            terminal: RefCell::default(),
            closing: Rc::default(),
            closed: Rc::default(),
            logger: RefCell::default(),
            waiting: RefCell::default(),
        }
    }

    /// Opens the streams of a process without a terminal. The other ends are for the runtime. Nothing is
    /// copied before [`Streams::start`]: what a runtime that fails has printed is not the container's output.
    pub(crate) async fn pipes(
        request: &Request,
        owner: &Owner<'_>,
    ) -> Result<(Streams, ChildStdio), StdioError> {
        let streams = Streams::new();
        let mut ends = ChildStdio::default();
        let stdout = Address::parse(&request.stdout)?;
        match stdout {
            Address::Logger(program) => {
                let (logger, out, err) = Logger::start(&program, owner.id, owner.namespace)
                    .await
                    .map_err(|source| StdioError::Logger { source })?;
                *streams.logger.borrow_mut() = Some(logger);
                (ends.stdout, ends.stderr) = (Some(out), Some(err));
            }
            Address::File(path) => {
                let file = Rc::new(open_log(&path)?);
                ends.stdout = Some(streams.copy_pipe(Sink::File(file.clone()), owner)?);
                if !request.stderr.is_empty() {
                    ends.stderr = Some(streams.copy_pipe(Sink::File(file), owner)?);
                }
            }
            Address::Null | Address::Path(_) => {
                if let Some(sink) = open_sink(&stdout)? {
                    ends.stdout = Some(streams.copy_pipe(sink, owner)?);
                }
                if let Some(sink) = open_sink(&Address::parse(&request.stderr)?)? {
                    ends.stderr = Some(streams.copy_pipe(sink, owner)?);
                }
            }
        }
        if !request.stdin.is_empty() {
            let (reader, writer) = pipe(owner)?;
            set_nonblocking(&writer)?;
            let sink = Async::for_writing(writer).map_err(pipe_error("watch input pipe"))?;
            *streams.stdin_sink.borrow_mut() = Some(sink);
            ends.stdin = Some(reader);
        }
        Ok((streams, ends))
    }

    /// Starts to copy between a terminal and its addresses.
    pub(crate) async fn terminal(
        request: &Request,
        owner: &Owner<'_>,
        master: OwnedFd,
    ) -> Result<Streams, StdioError> {
        let streams = Streams::new();
        set_nonblocking(&master)?;
        let master = Rc::new(Async::new(master).map_err(pipe_error("watch terminal"))?);
        let sink = match Address::parse(&request.stdout)? {
            Address::Logger(program) => {
                let (logger, out, _) = Logger::start(&program, owner.id, owner.namespace)
                    .await
                    .map_err(|source| StdioError::Logger { source })?;
                *streams.logger.borrow_mut() = Some(logger);
                set_nonblocking(&out)?;
                Some(Sink::Pipe(Async::for_writing(out).map_err(pipe_error("watch pipe of logger"))?))
            }
            Address::File(path) => Some(Sink::File(Rc::new(open_log(&path)?))),
            address @ (Address::Null | Address::Path(_)) => open_sink(&address)?,
        };
        let sink = match sink {
            Some(sink) => sink,
            // Somebody must read, or the process stops when the terminal's buffer is full.
            None => Sink::File(Rc::new(open_file(Path::new("/dev/null"), false)?)),
        };
        let (source, closing) = (master.clone(), streams.closing.clone());
        streams.track(copy::terminal_output(source, sink, closing));
        if !request.stdin.is_empty() {
            let source = streams.hold_stdin(&request.stdin)?;
            streams.later(copy::terminal_input(source, master.clone()));
        }
        *streams.terminal.borrow_mut() = Some(master);
        streams.start("")?;
        Ok(streams)
    }

    fn copy_pipe(&self, sink: Sink, owner: &Owner<'_>) -> Result<OwnedFd, StdioError> {
        let (reader, writer) = pipe(owner)?;
        set_nonblocking(&reader)?;
        let source = Async::new(reader).map_err(pipe_error("watch output pipe"))?;
        self.track(copy::output(source, sink));
        Ok(writer)
    }

    /// Opens the reading end of the stdin FIFO, and keeps a writing one.
    fn hold_stdin(&self, address: &str) -> Result<Async<OwnedFd>, StdioError> {
        let path = match Address::parse(address)? {
            Address::Path(path) | Address::File(path) => path,
            Address::Null | Address::Logger(_) => {
                return Err(StdioError::Scheme { scheme: "binary".to_owned() });
            }
        };
        let open = |options: &mut std::fs::OpenOptions| {
            options
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(&path)
                .map_err(|source| StdioError::Open { path: path.clone(), source })
        };
        let reader = open(std::fs::File::options().read(true))?;
        if is_fifo(&reader) {
            *self.stdin_hold.borrow_mut() = Some(open(std::fs::File::options().write(true))?.into());
        }
        Async::new(reader.into()).map_err(pipe_error("watch standard input"))
    }

    fn track(&self, copy: impl Future<Output = ()> + 'static) {
        let copies = self.copies.clone();
        copies.running.set(copies.running.get() + 1);
        let tracked = async move {
            copy.await;
            copies.running.set(copies.running.get() - 1);
            copies.changed.changed();
        };
        self.later(tracked);
    }

    fn later(&self, copy: impl Future<Output = ()> + 'static) {
        self.waiting.borrow_mut().push(Box::pin(copy));
    }

    /// Begins to copy. Each copy runs until it ends by itself or its process is deleted.
    ///
    /// The FIFO of standard input is opened only now: a client's own opening of it waits for ours, and with
    /// that its reading of its input, so that it cannot reach its end and close it before the process is
    /// there.
    pub(crate) fn start(&self, stdin: &str) -> Result<(), StdioError> {
        if let Some(sink) = self.stdin_sink.borrow_mut().take() {
            self.later(copy::input(self.hold_stdin(stdin)?, sink));
        }
        for copy in self.waiting.take() {
            let closed = self.closed.clone();
            spawn(async move {
                race(copy, closed.wait()).await;
            });
        }
        Ok(())
    }

    /// Closes the shim's own end of standard input: when the client's is closed too, the process reads the
    /// end.
    pub(crate) fn close_stdin(&self) {
        self.stdin_hold.borrow_mut().take();
    }

    /// Says that the process has exited: its terminal shows nothing more than what it holds.
    pub(crate) fn exited(&self) {
        self.closing.close();
    }

    /// Sets the size of the terminal; without one, nothing happens.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        use std::os::fd::AsFd;
        match self.terminal.borrow().as_ref() {
            Some(terminal) => davit_sys::io::set_window_size(terminal.get().as_fd(), rows, columns),
            None => Ok(()),
        }
    }

    /// Waits until all output has been copied, but no longer than ten seconds: a process that was left behind
    /// may hold the pipe for ever. Returns whether all was copied.
    pub(crate) async fn drained(&self) -> bool {
        let copies = &self.copies;
        let drained = copies.changed.until(|| copies.running.get() == 0);
        matches!(race(drained, sleep(DRAIN_TIMEOUT)).await, Either::First(()))
    }

    /// Lets go of everything, and stops the logger, which has some time for that.
    pub(crate) fn close(&self) {
        self.close_stdin();
        self.closed.close();
        self.waiting.take();
        self.terminal.borrow_mut().take();
        if let Some(logger) = self.logger.borrow_mut().take() {
            spawn(logger.stop());
        }
    }
}

fn pipe(owner: &Owner<'_>) -> Result<(OwnedFd, OwnedFd), StdioError> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(|error| pipe_error("make pipe")(error.into()))?;
    if owner.uid != 0 || owner.gid != 0 {
        for end in [&reader, &writer] {
            fchown(end, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
                .map_err(|error| pipe_error("change owner of pipe")(error.into()))?;
        }
    }
    Ok((reader, writer))
}

fn set_nonblocking(file: &OwnedFd) -> Result<(), StdioError> {
    let set = || {
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
        fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
    };
    set().map(drop).map_err(|error| pipe_error("make pipe non-blocking")(error.into()))
}

fn open_sink(address: &Address) -> Result<Option<Sink>, StdioError> {
    let path = match address {
        Address::Null => return Ok(None),
        Address::Path(path) => path,
        Address::File(path) => return Ok(Some(Sink::File(Rc::new(open_log(path)?)))),
        Address::Logger(_) => return Err(StdioError::Scheme { scheme: "binary".to_owned() }),
    };
    // Opened for both directions, a FIFO opens at once, has a reader always, and never breaks.
    let open = |read| {
        std::fs::File::options()
            .read(read)
            .write(true)
            .append(!read)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .map_err(|source| StdioError::Open { path: path.clone(), source })
    };
    let fifo = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    let file = open(fifo)?;
    if fifo {
        let pipe = Async::for_writing(file.into()).map_err(pipe_error("watch fifo"))?;
        return Ok(Some(Sink::Pipe(pipe)));
    }
    Ok(Some(Sink::File(Rc::new(file.into()))))
}

/// Opens a log to append to; its folder is made if it is missing.
fn open_log(path: &Path) -> Result<OwnedFd, StdioError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|source| StdioError::Open { path: folder.to_owned(), source })?;
    }
    open_file(path, true)
}

fn open_file(path: &Path, create: bool) -> Result<OwnedFd, StdioError> {
    let opened = std::fs::File::options().append(true).create(create).mode(0o644).open(path);
    Ok(opened.map_err(|source| StdioError::Open { path: path.to_owned(), source })?.into())
}

fn is_fifo(file: &std::fs::File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_four_kinds() {
        assert_eq!(Address::parse("").unwrap(), Address::Null);
        assert_eq!(Address::parse("/a b").unwrap(), Address::Path("/a b".into()));
        assert_eq!(Address::parse("fifo:///a").unwrap(), Address::Path("/a".into()));
        assert_eq!(Address::parse("file:///a%20b?x=1").unwrap(), Address::File("/a b".into()));
        assert!(matches!(Address::parse("binary:///bin/log?a=b").unwrap(), Address::Logger(_)));
        assert!(matches!(Address::parse("ftp://x"), Err(StdioError::Scheme { scheme }) if scheme == "ftp"));
    }
}
