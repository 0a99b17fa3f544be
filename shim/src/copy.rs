//! Moves the bytes of containers: from pipes and terminals to where clients want them, and back.
//!
//! Between pipes the bytes are spliced and never enter this process. Otherwise they go through one small
//! buffer that all copies share; a copy has memory of its own only while its receiver has taken just a part.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use crate::executor::{Either, race};
use crate::log;
use crate::reactor::{Async, yield_now};
use crate::sync::Condition;

/// The bytes of the shared buffer: what a pipe holds and a terminal delivers at once is less.
const BUFFER: usize = 16 * 1024;

/// The most bytes of one splice: a whole pipe.
const SPLICE: usize = 64 * 1024;

thread_local! {
    static SHARED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Where a container's output goes to.
pub(crate) enum Sink {
    /// A FIFO or another pipe. When it is full and its reader slow, the container waits for the reader.
    Pipe(Async<OwnedFd>),
    /// A file. What it does not take, for want of space above all, is dropped: a container must not stop
    /// because of its log.
    File(Rc<OwnedFd>),
}

/// Tells copies that it is time to end: one from a terminal, when the process has exited, since processes
/// that it left behind may keep the terminal open.
#[derive(Default)]
pub(crate) struct Closing {
    closing: Cell<bool>,
    condition: Condition,
}

impl Closing {
    /// It is time.
    pub(crate) fn close(&self) {
        self.closing.set(true);
        self.condition.changed();
    }

    /// Waits until it is time.
    pub(crate) async fn wait(&self) {
        self.condition.until(|| self.closing.get()).await;
    }
}

/// Copies a container's pipe to its sink until the last process that holds the pipe is gone.
pub(crate) async fn output(source: Async<OwnedFd>, sink: Sink) {
    let result = match &sink {
        Sink::Pipe(pipe) => splice_all(&source, pipe).await,
        Sink::File(file) => to_file(&source, file).await,
    };
    if let Err(error) = result {
        log::warn(format_args!("copy of output ended, the rest is dropped: {error}"));
        let _ = drain(&source).await;
    }
}

/// Copies what a terminal shows to the sink, until its other side is closed by everybody, or the process has
/// exited and nothing more is there.
pub(crate) async fn terminal_output(terminal: Rc<Async<OwnedFd>>, sink: Sink, closing: Rc<Closing>) {
    let mut dropping = false;
    loop {
        let chunk = match race(read_chunk(&terminal), closing.wait()).await {
            Either::First(chunk) => chunk,
            Either::Second(()) => read_now(&terminal),
        };
        match chunk {
            Ok(chunk) if !chunk.is_empty() => {
                if !dropping && let Err(error) = deliver(&sink, &chunk).await {
                    log::warn(format_args!("copy of terminal ended, the rest is dropped: {error}"));
                    dropping = true;
                }
            }
            // EIO: the last process with the terminal open has closed it.
            Ok(_) | Err(_) => return,
        }
    }
}

/// Copies a FIFO to a container's standard input until both the client and the shim have closed it, or the
/// container does not read any more.
pub(crate) async fn input(source: Async<OwnedFd>, sink: Async<OwnedFd>) {
    // Broken pipes are the container's way to say that it has read enough.
    let _ = splice_all(&source, &sink).await;
}

/// Copies a FIFO to a terminal.
pub(crate) async fn terminal_input(source: Async<OwnedFd>, terminal: Rc<Async<OwnedFd>>) {
    loop {
        match read_chunk(&source).await {
            Ok(chunk) if !chunk.is_empty() => {
                if write_all(&terminal, &chunk).await.is_err() {
                    return;
                }
            }
            Ok(_) | Err(_) => return,
        }
    }
}

async fn splice_all(source: &Async<OwnedFd>, sink: &Async<OwnedFd>) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        source.readable().await;
        sink.writable().await;
        match splice(source.get(), None, sink.get(), None, SPLICE, flags) {
            Ok(0) => return Ok(()),
            // A container that never stops writing must not keep the others from their turn.
            Ok(_) => yield_now().await,
            Err(Errno::EAGAIN) => {
                let (can_read, can_write) = poll_both(source, sink)?;
                if !can_read {
                    source.clear_readable();
                }
                if !can_write {
                    sink.clear_writable();
                }
                if can_read && can_write {
                    yield_now().await;
                }
            }
            Err(Errno::EINTR) => {}
            // The sink is no pipe after all, or of a file system that cannot splice.
            Err(Errno::EINVAL) => return copy_all(source, sink).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Which side a splice would have blocked on: its `EAGAIN` does not say.
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

async fn copy_all(source: &Async<OwnedFd>, sink: &Async<OwnedFd>) -> io::Result<()> {
    loop {
        let chunk = read_chunk(source).await?;
        if chunk.is_empty() {
            return Ok(());
        }
        write_all(sink, &chunk).await?;
    }
}

async fn to_file(source: &Async<OwnedFd>, file: &OwnedFd) -> io::Result<()> {
    let mut failing = false;
    loop {
        let count = source
            .read_with(|source| {
                with_buffer(|buffer| {
                    let count = read(source, buffer)?;
                    match write_file(file, &buffer[..count]) {
                        Err(error) if !failing => {
                            failing = true;
                            log::error(format_args!(
                                "log does not take output, it is dropped meanwhile: {error}"
                            ));
                        }
                        Ok(()) => failing = false,
                        Err(_) => {}
                    }
                    Ok(count)
                })
            })
            .await?;
        if count == 0 {
            return Ok(());
        }
        yield_now().await;
    }
}

fn write_file(file: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match write(file, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

async fn drain(source: &Async<OwnedFd>) -> io::Result<()> {
    while source.read_with(|source| with_buffer(|buffer| Ok(read(source, buffer)?))).await? > 0 {
        yield_now().await;
    }
    Ok(())
}

async fn deliver(sink: &Sink, bytes: &[u8]) -> io::Result<()> {
    match sink {
        Sink::Pipe(pipe) => write_all(pipe, bytes).await,
        Sink::File(file) => {
            if let Err(error) = write_file(file, bytes) {
                log::error(format_args!("log does not take output, it is dropped: {error}"));
            }
            Ok(())
        }
    }
}

async fn write_all(sink: &Async<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = sink.write_with(|sink| Ok(write(sink, bytes)?)).await?;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// What is there to read, waiting until there is something; empty at the end.
async fn read_chunk(source: &Async<OwnedFd>) -> io::Result<Vec<u8>> {
    source
        .read_with(|source| {
            with_buffer(|buffer| {
                let count = read(source, buffer)?;
                Ok(buffer[..count].to_vec())
            })
        })
        .await
}

/// What is there to read at present.
fn read_now(source: &Async<OwnedFd>) -> io::Result<Vec<u8>> {
    with_buffer(|buffer| {
        let count = read(source.get(), buffer)?;
        Ok(buffer[..count].to_vec())
    })
}

fn with_buffer<R>(operation: impl FnOnce(&mut [u8]) -> R) -> R {
    SHARED.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER, 0);
        operation(buffer)
    })
}
