//! Moves the bytes of containers: from pipes and terminals to where clients want them, and back.
//!
//! Between pipes the bytes are spliced and never enter this process. Otherwise they go through one small
//! buffer that all copies share. Bytes that were read and not delivered belong to the copy, never to a task that is
//! in the middle of something: at each `.await` a copy can be saved and goes on elsewhere without losing any.
//!
//! An output to a FIFO or to a logger:
//! ```text
//!                     reader gone, logger full                 logger gone
//!   Direct: spliced ──────────────────────────► Kept: spooled ─────────────► Discarding
//!      ▲  │                                       │    │
//!      └──│───────────────────────────────────────┘    │ end of the output, and a FIFO without a reader
//!         │    reader there, and the spool delivered   ▼
//!         └──────────► Done ◄──────────────── Waiting for a reader, until Delete
//!     end of the output
//! ```
//! A full FIFO with a reader makes the process wait, as does a logger that takes something every [`PATIENCE`].

pub(crate) mod presence;

mod input;
mod output;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use crate::json_log::Lines;
use crate::log_sink::Log;
use crate::reactor::Async;
use crate::sync::Condition;

pub(crate) use input::{Input, InputSink};
pub(crate) use output::Output;

/// The bytes of the shared buffer: what a pipe holds and a terminal delivers at once is less.
const BUFFER: usize = 16 * 1024;

/// The most bytes of one splice: a whole pipe.
const SPLICE: usize = 64 * 1024;

thread_local! {
    static SHARED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Where a container's output goes to.
pub(crate) enum Sink {
    /// Nowhere.
    Null,
    /// A pipe.
    Pipe(Pipe),
    /// A log. Of a json log, this has the line whose end has not come.
    Log(Rc<Log>, RefCell<Option<Lines>>),
}

impl Sink {
    fn log(&self) -> Option<&Rc<Log>> {
        match self {
            Sink::Log(log, _) => Some(log),
            Sink::Null | Sink::Pipe(_) => None,
        }
    }
}

/// A pipe that output goes to.
pub(crate) struct Pipe {
    /// Its writing end.
    pub(crate) fd: Async<OwnedFd>,
    /// Who is at the other end.
    pub(crate) kind: PipeKind,
}

/// Who is at the other end of a pipe, which decides about a process that writes faster than it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PipeKind {
    /// Readers of a FIFO. The process waits for the one that is there; while there is none, output is spooled.
    Fifo,
    /// Whoever it is, the process waits.
    Blocking,
    /// A logger. Output that it does not take is spooled.
    Logger,
}

/// Says once that something is the case.
#[derive(Default)]
pub(crate) struct Closing {
    closing: Cell<bool>,
    condition: Condition,
}

impl Closing {
    /// It is.
    pub(crate) fn close(&self) {
        self.closing.set(true);
        self.condition.changed();
    }

    /// Whether it is.
    pub(crate) fn is_closed(&self) -> bool {
        self.closing.get()
    }

    /// Waits until it is.
    pub(crate) async fn wait(&self) {
        self.condition.until(|| self.closing.get()).await;
    }
}

/// What came of an attempt to move bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moved {
    /// So many were moved.
    Some(usize),
    /// There are no more, and never will be.
    End,
    /// The source has none at present.
    Empty,
    /// The sink takes none at present.
    Full,
    /// Nobody reads from the sink.
    Broken,
    /// The two cannot be spliced.
    Unspliceable,
}

/// Splices once.
fn splice_once(source: &Async<OwnedFd>, sink: &Async<OwnedFd>) -> io::Result<Moved> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        return match splice(source.get(), None, sink.get(), None, SPLICE, flags) {
            Ok(0) => Ok(Moved::End),
            Ok(count) => Ok(Moved::Some(count)),
            Err(Errno::EAGAIN) => {
                // Which side it was, it does not say.
                let (can_read, can_write) = poll_both(source, sink)?;
                match (can_read, can_write) {
                    (false, _) => {
                        source.clear_readable();
                        Ok(Moved::Empty)
                    }
                    (true, false) => {
                        sink.clear_writable();
                        Ok(Moved::Full)
                    }
                    (true, true) => Ok(Moved::Some(0)),
                }
            }
            Err(Errno::EPIPE) => Ok(Moved::Broken),
            Err(Errno::EINTR) => continue,
            // The sink is no pipe, or the source of a file system that cannot splice.
            Err(Errno::EINVAL) => Ok(Moved::Unspliceable),
            Err(error) => Err(error.into()),
        };
    }
}

fn poll_both(source: &Async<OwnedFd>, sink: &Async<OwnedFd>) -> io::Result<(bool, bool)> {
    let mut polled = [
        PollFd::new(source.get().as_fd(), PollFlags::POLLIN),
        PollFd::new(sink.get().as_fd(), PollFlags::POLLOUT),
    ];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let any = |index: usize| polled[index].revents().is_some_and(|events| !events.is_empty());
    Ok((any(0), any(1)))
}

/// Reads once and hands over what was read.
fn read_once(source: &Async<OwnedFd>, take: impl FnOnce(&[u8])) -> io::Result<Moved> {
    with_buffer(|buffer| {
        loop {
            return match read(source.get(), buffer) {
                // EIO: the last process with the terminal open has closed it.
                Ok(0) | Err(Errno::EIO) => Ok(Moved::End),
                Ok(count) => {
                    take(&buffer[..count]);
                    Ok(Moved::Some(count))
                }
                Err(Errno::EAGAIN) => {
                    source.clear_readable();
                    Ok(Moved::Empty)
                }
                Err(Errno::EINTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    })
}

/// Writes once.
fn write_once(sink: &Async<OwnedFd>, bytes: &[u8]) -> io::Result<Moved> {
    loop {
        return match write(sink.get(), bytes) {
            Ok(count) => Ok(Moved::Some(count)),
            Err(Errno::EAGAIN) => {
                sink.clear_writable();
                Ok(Moved::Full)
            }
            Err(Errno::EPIPE) => Ok(Moved::Broken),
            Err(Errno::EINTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}

fn with_buffer<R>(operation: impl FnOnce(&mut [u8]) -> R) -> R {
    SHARED.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER, 0);
        operation(buffer)
    })
}

/// How long output has been there without being taken.
#[derive(Default)]
struct Stall {
    since: Cell<Option<Instant>>,
    longest: Cell<Duration>,
}

impl Stall {
    /// Something other than the process is waited for.
    fn begin(&self) {
        self.since.set(self.since.get().or_else(|| Some(Instant::now())));
    }

    /// Output was taken, after it had been there all the while at worst.
    fn end(&self) {
        if let Some(since) = self.since.take() {
            self.longest.set(self.longest.get().max(since.elapsed()));
        }
    }

    /// There was no output.
    fn forget(&self) {
        self.since.set(None);
    }
}
