//! What a process writes.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::copy::{
    BUFFER, Closing, Moved, Pipe, PipeKind, Sink, Stall, presence, read_once, splice_once, with_buffer,
    write_once,
};
use crate::executor::{Either, race};
use crate::json_log::Lines;
use crate::log;
use crate::log_sink::{Log, PATIENCE};
use crate::reactor::{Async, sleep, yield_now};
use crate::spool::{LIMIT, Spool};
use crate::stdio::{Counters, saved};
use crate::sync::Condition;

/// How long altogether a terminal may show nothing, once its process has exited while others still have it open. What
/// is written to a terminal comes through a queue of the kernel, so that nothing there is not yet the end.
const LINGER: Duration = Duration::from_millis(200);
/// The most bytes that can have been in a terminal when its process exited, and some more: the rest is from processes
/// that were left behind.
const LEFT_IN_TERMINAL: usize = 256 * 1024;

/// The bytes that become objects of JSON in one step.
const PIECE: usize = 1024;
/// The bytes of objects that no further step follows. With those of the last step, and the longest line that it may have
/// ended, they are fewer than what a log promises to have room for.
const MOST_AT_ONCE: usize = 64 * 1024;

/// A copy of one stream of a process.
pub(crate) struct Output {
    name: &'static str,
    /// `None` at its end.
    source: RefCell<Option<Rc<Async<OwnedFd>>>>,
    from_terminal: bool,
    /// `None` when everything is done: then the reader has its end, too.
    sink: RefCell<Option<Rc<Sink>>>,
    /// What was read and not delivered, if it is not in the spool.
    carry: RefCell<Vec<u8>>,
    spool: RefCell<Spool>,
    log: Option<Rc<Log>>,
    stall: Stall,
    /// Beside those of the spool.
    dropped: Cell<u64>,
    linger: Cell<Duration>,
    after_exit: Cell<usize>,
    /// Tells about the end, and that a reader is gone.
    changed: Rc<Condition>,
}

impl Output {
    /// From here to there.
    pub(crate) fn new(
        name: &'static str,
        source: Rc<Async<OwnedFd>>,
        from_terminal: bool,
        sink: Sink,
        spool: Spool,
        changed: Rc<Condition>,
    ) -> Output {
        Output {
            name,
            source: RefCell::new(Some(source)),
            from_terminal,
            log: sink.log().cloned(),
            sink: RefCell::new(Some(Rc::new(sink))),
            carry: RefCell::default(),
            spool: RefCell::new(spool),
            stall: Stall::default(),
            dropped: Cell::new(0),
            linger: Cell::new(LINGER),
            after_exit: Cell::new(0),
            changed,
        }
    }

    /// Copies until the last process that holds the source is gone, or `exited` says that the process of a terminal
    /// is, and all is delivered.
    pub(crate) async fn run(&self, exited: &Closing) {
        let Some(sink) = self.sink.borrow().clone() else { return };
        let result = match &*sink {
            Sink::Null => self.discard(exited).await,
            Sink::Pipe(pipe) => self.to_pipe(pipe, exited).await,
            Sink::Log(log, lines) => self.to_log(log, lines, exited).await,
        };
        if let Err(error) = result {
            log::warn(format_args!("copy of {} ended, the rest is dropped: {error}", self.name));
            self.drop_kept();
            let _ = self.discard(exited).await;
        }
        self.end();
        self.sink.take();
        drop(sink);
        self.changed.changed();
    }

    fn end(&self) {
        self.source.take();
    }

    /// True when everything is delivered, and nothing more will come.
    pub(crate) fn is_done(&self) -> bool {
        self.sink.borrow().is_none()
    }

    /// True if it goes to a FIFO and nobody is there to read it.
    pub(crate) fn has_no_reader(&self) -> bool {
        match self.sink.borrow().as_deref() {
            Some(Sink::Pipe(Pipe { fd, kind: PipeKind::Fifo })) => !presence::has_reader(fd.get()),
            _ => false,
        }
    }

    /// True if it goes to this log.
    pub(crate) fn goes_to(&self, log: &Rc<Log>) -> bool {
        self.log.as_ref().is_some_and(|own| Rc::ptr_eq(own, log))
    }

    /// Its name, and what it has been through. `log` is said to be this output's alone.
    pub(crate) fn counters(&self, log: Option<&Log>) -> (&'static str, Counters) {
        let spool = self.spool.borrow();
        let (delayed, dropped) = log.map(Log::counts).unwrap_or_default();
        let counters = Counters {
            spooled: spool.spooled() + delayed,
            dropped: spool.dropped() + self.dropped.get() + dropped,
            stalled: self.stall.longest.get(),
        };
        (self.name, counters)
    }

    /// Drops what was not delivered.
    pub(crate) fn drop_kept(&self) {
        self.dropped.set(self.dropped.get() + self.carry.take().len() as u64);
        self.spool.borrow_mut().clear();
    }

    fn has_kept(&self) -> bool {
        !self.carry.borrow().is_empty() || !self.spool.borrow().is_empty()
    }

    /// Waits until there may be something to read. `None` at the end.
    async fn input(&self, exited: &Closing) -> Option<Rc<Async<OwnedFd>>> {
        let source = self.source.borrow().clone()?;
        if self.stall.since.get().is_some() && !has_input(&source) {
            self.stall.forget();
        }
        if !self.from_terminal {
            source.readable().await;
            return Some(source);
        }
        if !exited.is_closed()
            && let Either::First(()) = race(source.readable(), exited.wait()).await
        {
            return Some(source);
        }
        if self.after_exit.get() > LEFT_IN_TERMINAL {
            return None;
        }
        let begin = Instant::now();
        let input = race(source.readable(), sleep(self.linger.get())).await;
        self.linger.set(self.linger.get().saturating_sub(begin.elapsed()));
        matches!(input, Either::First(())).then_some(source)
    }

    /// Reads once what [`Output::input`] has promised.
    fn read(&self, source: &Async<OwnedFd>, exited: &Closing, take: impl FnOnce(&[u8])) -> io::Result<Moved> {
        let moved = read_once(source, take)?;
        match moved {
            Moved::Some(count) => {
                self.stall.end();
                if exited.is_closed() {
                    self.after_exit.set(self.after_exit.get() + count);
                }
            }
            Moved::End => self.end(),
            _ => self.stall.forget(),
        }
        Ok(moved)
    }

    async fn discard(&self, exited: &Closing) -> io::Result<()> {
        while let Some(source) = self.input(exited).await {
            self.read(&source, exited, |_| ())?;
            yield_now().await;
        }
        Ok(())
    }

    async fn to_log(&self, log: &Log, lines: &RefCell<Option<Lines>>, exited: &Closing) -> io::Result<()> {
        loop {
            while !self.carry.borrow().is_empty() {
                self.stall.begin();
                log.room().await;
                self.hand_over(log, lines);
                yield_now().await;
            }
            let Some(source) = self.input(exited).await else { break };
            self.read(&source, exited, |bytes| self.carry.borrow_mut().extend_from_slice(bytes))?;
        }
        self.end();
        if let Some(lines) = &mut *lines.borrow_mut() {
            let mut objects = Vec::new();
            lines.finish(SystemTime::now(), &mut objects);
            log.push(&objects);
        }
        log.flushed().await;
        Ok(())
    }

    /// Hands over as much of what was read as a log has room for: a line of one byte is an object of seventy.
    fn hand_over(&self, log: &Log, lines: &RefCell<Option<Lines>>) {
        let mut carry = self.carry.borrow_mut();
        let mut lines = lines.borrow_mut();
        let Some(lines) = &mut *lines else {
            log.push(&carry);
            *carry = Vec::new();
            return;
        };
        let mut objects = Vec::with_capacity(carry.len() + 256);
        let mut fed = 0;
        for piece in carry.chunks(PIECE) {
            if objects.len() >= MOST_AT_ONCE {
                break;
            }
            lines.feed(piece, SystemTime::now(), &mut objects);
            fed += piece.len();
        }
        if fed == carry.len() {
            *carry = Vec::new();
        } else {
            carry.drain(..fed);
        }
        log.push(&objects);
    }

    async fn to_pipe(&self, pipe: &Pipe, exited: &Closing) -> io::Result<()> {
        let mut spliced = !self.from_terminal;
        let mut taken = Instant::now();
        loop {
            let moved = if self.has_kept() {
                self.offer(pipe)?
            } else if let Some(source) = self.input(exited).await {
                match spliced {
                    true => self.splice(&source, pipe)?,
                    false => self.read(&source, exited, |bytes| self.carry.borrow_mut().extend(bytes))?,
                }
            } else {
                self.end();
                if pipe.kind == PipeKind::Fifo {
                    // Whoever opens it late finds an end and not a FIFO that nobody writes to.
                    presence::reader(pipe.fd.get()).await;
                }
                return Ok(());
            };
            match moved {
                Moved::Some(_) => {
                    taken = Instant::now();
                    yield_now().await;
                }
                Moved::Empty | Moved::End => {}
                Moved::Unspliceable => spliced = false,
                Moved::Full => self.wait_for_room(pipe, taken, exited).await?,
                Moved::Broken => {
                    self.changed.changed();
                    match pipe.kind {
                        PipeKind::Fifo => self.wait_for_reader(pipe, exited).await?,
                        PipeKind::Blocking | PipeKind::Logger => return self.abandon(exited).await,
                    }
                }
            }
        }
    }

    fn splice(&self, source: &Async<OwnedFd>, pipe: &Pipe) -> io::Result<Moved> {
        let moved = splice_once(source, &pipe.fd)?;
        match moved {
            Moved::Some(_) => {
                self.stall.end();
                self.spool.borrow_mut().bypassed();
            }
            Moved::End => self.end(),
            Moved::Empty => self.stall.forget(),
            Moved::Full | Moved::Broken | Moved::Unspliceable => {}
        }
        Ok(moved)
    }

    /// Writes some of what is kept.
    fn offer(&self, pipe: &Pipe) -> io::Result<Moved> {
        let mut carry = self.carry.borrow_mut();
        if !carry.is_empty() {
            let moved = write_once(&pipe.fd, &carry)?;
            if let Moved::Some(count) = moved {
                carry.drain(..count);
                self.spool.borrow_mut().bypassed();
            }
            if carry.is_empty() {
                *carry = Vec::new();
            }
            return Ok(moved);
        }
        let mut spool = self.spool.borrow_mut();
        with_buffer(|buffer| {
            let count = spool.front(buffer)?;
            let moved = write_once(&pipe.fd, &buffer[..count])?;
            if let Moved::Some(count) = moved {
                spool.consume(count as u64);
            }
            Ok(moved)
        })
    }

    /// Moves output to the spool, behind what was carried.
    fn keep(&self, source: &Async<OwnedFd>, exited: &Closing) -> io::Result<()> {
        let mut spool = self.spool.borrow_mut();
        let carried = self.carry.take();
        if !carried.is_empty() {
            spool.append(&carried);
        }
        self.read(source, exited, |bytes| spool.append(bytes)).map(drop)
    }

    /// What to do while the other end takes nothing. `taken` is when it last did.
    async fn wait_for_room(&self, pipe: &Pipe, taken: Instant, exited: &Closing) -> io::Result<()> {
        let spools = pipe.kind == PipeKind::Logger && self.source.borrow().is_some();
        if !spools {
            self.stall.begin();
            pipe.fd.writable().await;
            return Ok(());
        }
        let has_room = self.spool.borrow().len() + 2 * BUFFER as u64 <= LIMIT;
        let patience = PATIENCE.saturating_sub(taken.elapsed());
        if !has_room && !patience.is_zero() {
            self.stall.begin();
            race(pipe.fd.writable(), sleep(patience)).await;
            return Ok(());
        }
        match race(pipe.fd.writable(), self.input(exited)).await {
            Either::First(()) => {}
            Either::Second(Some(source)) => {
                self.keep(&source, exited)?;
                yield_now().await;
            }
            Either::Second(None) => self.end(),
        }
        Ok(())
    }

    /// Keeps output until the FIFO has a reader.
    async fn wait_for_reader(&self, pipe: &Pipe, exited: &Closing) -> io::Result<()> {
        let mut reader = pin!(presence::reader(pipe.fd.get()));
        loop {
            match race(reader.as_mut(), self.input(exited)).await {
                Either::First(()) => return Ok(()),
                Either::Second(Some(source)) => {
                    self.keep(&source, exited)?;
                    yield_now().await;
                }
                Either::Second(None) => {
                    self.end();
                    self.changed.changed();
                    reader.await;
                    return Ok(());
                }
            }
        }
    }

    /// Drops everything that is left and that comes: the logger is gone.
    async fn abandon(&self, exited: &Closing) -> io::Result<()> {
        log::error(format_args!("the logger has closed its {}, which is dropped from now on", self.name));
        self.drop_kept();
        while let Some(source) = self.input(exited).await {
            if let Moved::Some(count) = self.read(&source, exited, |_| ())? {
                self.dropped.set(self.dropped.get() + count as u64);
            }
            yield_now().await;
        }
        Ok(())
    }

    /// Describes it; `fds` takes note of the descriptors.
    pub(crate) fn save(&self, logs: &[Rc<Log>], fds: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> saved::Output {
        let source = self.source.borrow();
        let sink = self.sink.borrow();
        let (kind, number) = match sink.as_deref() {
            None | Some(Sink::Null) => (saved::SinkKind::Null, 0),
            Some(Sink::Log(..)) => (saved::SinkKind::Log, 0),
            Some(Sink::Pipe(pipe)) => {
                let kind = match pipe.kind {
                    PipeKind::Fifo => saved::SinkKind::Fifo,
                    PipeKind::Blocking => saved::SinkKind::Blocking,
                    PipeKind::Logger => saved::SinkKind::Logger,
                };
                (kind, fds(pipe.fd.get().as_fd()))
            }
        };
        // The line whose end has not come is read again as what was read and not delivered.
        let mut carry = match sink.as_deref() {
            Some(Sink::Log(_, lines)) => {
                lines.borrow().as_ref().map(|lines| lines.partial().to_vec()).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        carry.extend_from_slice(&self.carry.borrow());
        saved::Output {
            name: self.name.to_owned(),
            source: source
                .as_ref()
                .filter(|_| !self.from_terminal)
                .map_or(0, |source| fds(source.get().as_fd())),
            from_terminal: self.from_terminal,
            ended: source.is_none(),
            done: sink.is_none(),
            kind: kind.into(),
            sink: number,
            carry,
            spool: Some(self.spool.borrow().save(fds)),
            stalled_micros: self.stall.longest.get().as_micros().try_into().unwrap_or(u64::MAX),
            dropped: self.dropped.get(),
            log: logs.iter().position(|log| self.goes_to(log)).map_or(0, |index| index as u32),
        }
    }

    /// What [`Output::save`] described. `terminal` and `logs` are those of the process.
    ///
    /// # Errors
    /// A descriptor is missing or cannot be watched.
    pub(crate) fn restore(
        saved: saved::Output,
        terminal: Option<&Rc<Async<OwnedFd>>>,
        logs: &[Rc<Log>],
        changed: Rc<Condition>,
        fds: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Output> {
        let name = if saved.name == "stderr" { "stderr" } else { "stdout" };
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let source = match (saved.ended, saved.from_terminal) {
            (true, _) => None,
            (false, true) => Some(terminal.ok_or_else(missing)?.clone()),
            (false, false) => Some(Rc::new(Async::new(fds(saved.source)?)?)),
        };
        let kind = saved::SinkKind::try_from(saved.kind).map_err(io::Error::other)?;
        let mut pipe =
            |kind| Ok::<_, io::Error>(Sink::Pipe(Pipe { fd: Async::for_writing(fds(saved.sink)?)?, kind }));
        let sink = match kind {
            saved::SinkKind::Null => Sink::Null,
            saved::SinkKind::Fifo => pipe(PipeKind::Fifo)?,
            saved::SinkKind::Blocking => pipe(PipeKind::Blocking)?,
            saved::SinkKind::Logger => pipe(PipeKind::Logger)?,
            saved::SinkKind::Log => {
                let log = logs.get(saved.log as usize).ok_or_else(missing)?.clone();
                let lines = log.is_json().then(|| Lines::new(name));
                Sink::Log(log, RefCell::new(lines))
            }
        };
        Ok(Output {
            name,
            source: RefCell::new(source),
            from_terminal: saved.from_terminal,
            log: sink.log().cloned(),
            sink: RefCell::new((!saved.done).then(|| Rc::new(sink))),
            carry: RefCell::new(saved.carry),
            spool: RefCell::new(Spool::restore(saved.spool.unwrap_or_default(), fds)?),
            stall: Stall {
                longest: Cell::new(Duration::from_micros(saved.stalled_micros)),
                ..Stall::default()
            },
            dropped: Cell::new(saved.dropped),
            linger: Cell::new(LINGER),
            after_exit: Cell::new(0),
            changed,
        })
    }
}

fn has_input(source: &Async<OwnedFd>) -> bool {
    let mut polled = [PollFd::new(source.get().as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
