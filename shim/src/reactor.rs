//! Descriptors and timers that tasks wait for, in one `epoll`.
//!
//! Edge triggered: a descriptor is registered once, both of its directions are presumed ready, and only an
//! operation that would have blocked takes that back until the kernel reports the next edge.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::sync::Condition;

/// The events that one call of `epoll_wait` can bring.
const EVENTS: usize = 32;

struct Direction {
    ready: Cell<bool>,
    changed: Condition,
}

impl Direction {
    fn new() -> Direction {
        Direction { ready: Cell::new(true), changed: Condition::default() }
    }

    fn set_ready(&self) {
        self.ready.set(true);
        self.changed.changed();
    }

    async fn ready(&self) {
        self.changed.until(|| self.ready.get()).await;
    }
}

struct Source {
    input: Direction,
    output: Direction,
}

struct Reactor {
    epoll: Epoll,
    sources: RefCell<BTreeMap<u64, Rc<Source>>>,
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next: Cell<u64>,
}

thread_local! {
    static REACTOR: Reactor = Reactor {
        // Nothing of this program works without it, and it fails only for want of descriptors or memory.
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("the kernel grants an epoll descriptor"),
        sources: RefCell::default(),
        timers: RefCell::default(),
        next: Cell::new(0),
    };
}

/// Wakes the tasks whose descriptors and timers are due; with `sleep`, waits until there is one.
pub(crate) fn wait(sleep: bool) {
    REACTOR.with(|reactor| {
        let mut events = [EpollEvent::empty(); EVENTS];
        let timeout = if sleep { reactor.next_timeout() } else { EpollTimeout::ZERO };
        let count = match reactor.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            // The descriptor and the buffer are valid, so the kernel has no other reason to refuse.
            Err(error) => unreachable!("epoll_wait: {error}"),
        };
        for event in &events[..count] {
            let source = reactor.sources.borrow().get(&event.data()).cloned();
            let Some(source) = source else { continue };
            let flags = event.events();
            let broken = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
            if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI | broken)
            {
                source.input.set_ready();
            }
            if flags.intersects(EpollFlags::EPOLLOUT | broken) {
                source.output.set_ready();
            }
        }
        reactor.fire_timers();
    });
}

impl Reactor {
    fn next_timeout(&self) -> EpollTimeout {
        let timers = self.timers.borrow();
        let Some(((deadline, _), _)) = timers.first_key_value() else { return EpollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the timer is due when the call returns.
        let millis = left.as_millis() + u128::from(left.subsec_nanos() % 1_000_000 != 0);
        EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
    }

    fn fire_timers(&self) {
        let now = Instant::now();
        loop {
            let mut timers = self.timers.borrow_mut();
            let Some(entry) = timers.first_entry() else { return };
            if entry.key().0 > now {
                return;
            }
            let waker = entry.remove();
            drop(timers);
            waker.wake();
        }
    }

    fn id(&self) -> u64 {
        let id = self.next.get();
        self.next.set(id + 1);
        id
    }
}

/// A descriptor that tasks can wait for. Its file must not block (`O_NONBLOCK`).
pub(crate) struct Async<T: AsFd> {
    io: T,
    /// `None` for what epoll does not take, regular files above all: they are always ready.
    id: Option<u64>,
    source: Rc<Source>,
}

impl<T: AsFd> Async<T> {
    /// Registers a descriptor for both directions.
    pub(crate) fn new(io: T) -> io::Result<Async<T>> {
        Async::with_interest(io, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP)
    }

    /// Registers a descriptor that is only written to. Of a FIFO that we keep open in both directions this
    /// keeps away the events of our own input.
    pub(crate) fn for_writing(io: T) -> io::Result<Async<T>> {
        Async::with_interest(io, EpollFlags::EPOLLOUT)
    }

    fn with_interest(io: T, interest: EpollFlags) -> io::Result<Async<T>> {
        let source = Rc::new(Source { input: Direction::new(), output: Direction::new() });
        let id = REACTOR.with(|reactor| {
            let id = reactor.id();
            match reactor.epoll.add(&io, EpollEvent::new(interest | EpollFlags::EPOLLET, id)) {
                Ok(()) => {
                    reactor.sources.borrow_mut().insert(id, source.clone());
                    Ok(Some(id))
                }
                Err(Errno::EPERM) => Ok(None),
                Err(error) => Err(io::Error::from(error)),
            }
        })?;
        Ok(Async { io, id, source })
    }

    /// The descriptor itself.
    pub(crate) fn get(&self) -> &T {
        &self.io
    }

    /// Runs an operation that reads, as often as it takes for it not to fail with `WouldBlock`.
    pub(crate) async fn read_with<R>(&self, operation: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        self.repeat(&self.source.input, operation).await
    }

    /// Runs an operation that writes, as often as it takes for it not to fail with `WouldBlock`.
    pub(crate) async fn write_with<R>(&self, operation: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        self.repeat(&self.source.output, operation).await
    }

    async fn repeat<R>(
        &self,
        direction: &Direction,
        mut operation: impl FnMut(&T) -> io::Result<R>,
    ) -> io::Result<R> {
        loop {
            direction.ready().await;
            match operation(&self.io) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => direction.ready.set(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Says that the file has no input at present. To be followed by [`Async::readable`].
    pub(crate) fn clear_readable(&self) {
        self.source.input.ready.set(false);
    }

    /// Says that the file takes no output at present. To be followed by [`Async::writable`].
    pub(crate) fn clear_writable(&self) {
        self.source.output.ready.set(false);
    }

    /// Waits until the file may have input, or has ended.
    pub(crate) async fn readable(&self) {
        self.source.input.ready().await;
    }

    /// Waits until the file may take output, or has ended.
    pub(crate) async fn writable(&self) {
        self.source.output.ready().await;
    }
}

impl<T: AsFd> Drop for Async<T> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        // The thread's locals may be gone already when the program ends.
        let _ = REACTOR.try_with(|reactor| {
            reactor.sources.borrow_mut().remove(&id);
            let _ = reactor.epoll.delete(&self.io);
        });
    }
}

/// A point in time to wait for.
pub(crate) struct Sleep {
    key: (Instant, u64),
    registered: bool,
}

/// Waits for a time.
pub(crate) fn sleep(duration: Duration) -> Sleep {
    let id = REACTOR.with(Reactor::id);
    Sleep { key: (Instant::now() + duration, id), registered: false }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // A timer of no length lets other tasks and the reactor run once.
        if self.registered && Instant::now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.registered = true;
        REACTOR.with(|reactor| {
            reactor.timers.borrow_mut().insert(self.key, context.waker().clone());
        });
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.registered {
            let _ = REACTOR.try_with(|reactor| reactor.timers.borrow_mut().remove(&self.key));
        }
    }
}

/// Lets every other task that can go on run first.
pub(crate) async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{run, spawn};
    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, read, write};

    #[test]
    fn a_pipe_wakes_its_reader_and_its_writer() {
        let received = run(async {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
            let reader = Async::new(reader).unwrap();
            let sender = spawn(async move {
                let writer = Async::new(writer).unwrap();
                let mut left = 1 << 20;
                while left > 0 {
                    let chunk = vec![7u8; left.min(50_000)];
                    left -= writer.write_with(|pipe| Ok(write(pipe, &chunk)?)).await.unwrap();
                }
            });
            let mut received = 0;
            let mut buffer = [0u8; 4096];
            loop {
                match reader.read_with(|pipe| Ok(read(pipe, &mut buffer)?)).await.unwrap() {
                    0 => break,
                    count => received += count,
                }
            }
            sender.await;
            received
        });
        assert_eq!(received, 1 << 20);
    }

    #[test]
    fn a_regular_file_is_always_ready() {
        let file = tempfile::tempfile().unwrap();
        let written = run(async move {
            let file = Async::new(file).unwrap();
            file.write_with(|file| Ok(write(file, b"abc")?)).await.unwrap()
        });
        assert_eq!(written, 3);
    }

    #[test]
    fn timers_fire_in_their_order_and_dropped_ones_do_not() {
        run(async {
            let start = Instant::now();
            drop(sleep(Duration::from_secs(1000)));
            sleep(Duration::from_millis(5)).await;
            assert!(start.elapsed() >= Duration::from_millis(5));
        });
        REACTOR.with(|reactor| assert!(reactor.timers.borrow().is_empty()));
    }
}
