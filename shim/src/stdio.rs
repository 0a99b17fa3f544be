//! The standard streams of a process: what a client asks for by addresses, and what the runtime is handed.
//!
//! | address | meaning |
//! |---|---|
//! | empty | `/dev/null` |
//! | a path, `fifo:///path` | a FIFO of the client, or a file |
//! | `file:///path` | a file to append to, made with mode 0644, for stdout and stderr alike |
//! | `json-file:///path?max-size=BYTES&max-file=N` | the same in Docker's format, rotated, mode 0640 |
//! | `binary:///program?key=value` | a logger, see [`crate::logger`] |
//!
//! Readers of a FIFO come and go without breaking the container's pipe. While one is there, the container waits for it;
//! while none is, output is spooled, and the oldest dropped when it is more than 1 MiB. A log or logger that takes
//! nothing, because its disk is full or its program stopped, is treated as a FIFO without a reader. With the annotation
//! `io.davit.stdio.mode` = `blocking` the container waits for all of them instead.
//!
//! A terminal has one stream, which goes to the address of stdout.

mod address;
mod error;
mod open;
pub(crate) mod saved;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use crate::copy::{Closing, Input, InputSink, Output, PipeKind, Sink};
use crate::executor::{Either, race, spawn};
use crate::json_log::Lines;
use crate::log;
use crate::log_file::LogFile;
use crate::log_sink::Log;
use crate::logger::{self, Logger};
use crate::reactor::{Async, sleep};
use crate::runtime::ChildStdio;
use crate::spool::Spool;
use crate::sync::Condition;

pub(crate) use address::Address;
pub(crate) use error::StdioError;
#[cfg(test)]
pub(crate) use open::open_fifo;
pub(crate) use saved::Saved;

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

/// The streams of a process as long as it is not deleted.
pub(crate) struct Streams {
    outputs: RefCell<Vec<Rc<Output>>>,
    /// The logs that outputs go to, which may share one.
    logs: RefCell<Vec<Rc<Log>>>,
    input: RefCell<Option<Rc<Input>>>,
    /// Our own writing end of the stdin FIFO: while it is open, a client that leaves does not end the input.
    stdin_hold: RefCell<Option<OwnedFd>>,
    /// The writing end of the process's standard input, until it is copied to.
    stdin_sink: RefCell<Option<Async<OwnedFd>>>,
    terminal: RefCell<Option<Rc<Async<OwnedFd>>>>,
    logger: RefCell<Option<Logger>>,
    started: Cell<bool>,
    /// The process has exited.
    exited: Rc<Closing>,
    /// The process is deleted: what still copies has to stop.
    closed: Rc<Closing>,
    /// Outputs tell about their ends here.
    changed: Rc<Condition>,
}

/// Who the process belongs to, for the logger's environment, and who owns its pipes.
pub(crate) struct Owner<'a> {
    /// The container's or exec's id.
    pub(crate) id: &'a str,
    /// The namespace.
    pub(crate) namespace: &'a str,
    /// The container's bundle, which has its annotations, and spools its output.
    pub(crate) bundle: &'a Path,
    /// The owner of the container's ends.
    pub(crate) uid: u32,
    /// Their group.
    pub(crate) gid: u32,
}

/// What an output has been through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// The bytes that could not be delivered at once.
    pub(crate) spooled: u64,
    /// The bytes that were never delivered.
    pub(crate) dropped: u64,
    /// The longest time for which the process had written something that was not taken, or a little more.
    pub(crate) stalled: Duration,
}

impl Streams {
    fn new() -> Streams {
        Streams {
            outputs: RefCell::default(),
            logs: RefCell::default(),
            input: RefCell::default(),
            stdin_hold: RefCell::default(),
            stdin_sink: RefCell::default(),
            terminal: RefCell::default(),
            logger: RefCell::default(),
            started: Cell::new(false),
            exited: Rc::default(),
            closed: Rc::default(),
            changed: Rc::default(),
        }
    }

    /// Opens the streams of a process without a terminal. The other ends are for the runtime. Nothing is
    /// copied before [`Streams::start`]: what a runtime that fails has printed is not the container's output.
    pub(crate) async fn pipes(
        request: &Request,
        owner: &Owner<'_>,
    ) -> Result<(Streams, ChildStdio), StdioError> {
        let streams = Streams::new();
        match streams.open_pipes(request, owner).await {
            Ok(ends) => Ok((streams, ends)),
            Err(error) => {
                streams.close();
                Err(error)
            }
        }
    }

    async fn open_pipes(&self, request: &Request, owner: &Owner<'_>) -> Result<ChildStdio, StdioError> {
        let mut ends = ChildStdio::default();
        let blocking = open::is_blocking(request, owner.bundle)?;
        match Address::parse(&request.stdout)? {
            Address::Logger(program) => {
                let (out, err) = self.start_logger(&program, owner).await?;
                if blocking {
                    (ends.stdout, ends.stderr) = (Some(out), Some(err));
                } else {
                    let sink = |end| open::pipe_sink(end, PipeKind::Logger);
                    ends.stdout = Some(self.copy_pipe("stdout", sink(out)?, owner)?);
                    ends.stderr = Some(self.copy_pipe("stderr", sink(err)?, owner)?);
                }
            }
            Address::Log(path, format) => {
                let log = self.add_log(open::log(path, format).await?, owner, blocking);
                ends.stdout = Some(self.copy_pipe("stdout", log_sink(&log, "stdout"), owner)?);
                if !request.stderr.is_empty() {
                    ends.stderr = Some(self.copy_pipe("stderr", log_sink(&log, "stderr"), owner)?);
                }
            }
            stdout @ (Address::Null | Address::Path(_)) => {
                let stderr = Address::parse(&request.stderr)?;
                if let Some(sink) = self.sink("stdout", stdout, owner, blocking).await? {
                    ends.stdout = Some(self.copy_pipe("stdout", sink, owner)?);
                }
                if let Some(sink) = self.sink("stderr", stderr, owner, blocking).await? {
                    ends.stderr = Some(self.copy_pipe("stderr", sink, owner)?);
                }
            }
        }
        if !request.stdin.is_empty() {
            let (reader, writer) = open::pipe(owner)?;
            open::set_nonblocking(&writer)?;
            let sink = Async::for_writing(writer).map_err(open::pipe_error("watch input pipe"))?;
            *self.stdin_sink.borrow_mut() = Some(sink);
            ends.stdin = Some(reader);
        }
        Ok(ends)
    }

    /// Starts to copy between a terminal and its addresses.
    pub(crate) async fn terminal(
        request: &Request,
        owner: &Owner<'_>,
        master: OwnedFd,
    ) -> Result<Streams, StdioError> {
        let streams = Streams::new();
        match streams.open_terminal(request, owner, master).await {
            Ok(()) => Ok(streams),
            Err(error) => {
                streams.close();
                Err(error)
            }
        }
    }

    async fn open_terminal(
        &self,
        request: &Request,
        owner: &Owner<'_>,
        master: OwnedFd,
    ) -> Result<(), StdioError> {
        let blocking = open::is_blocking(request, owner.bundle)?;
        open::set_nonblocking(&master)?;
        let master = Rc::new(Async::new(master).map_err(open::pipe_error("watch terminal"))?);
        let sink = match Address::parse(&request.stdout)? {
            Address::Logger(program) => {
                let (out, _) = self.start_logger(&program, owner).await?;
                let kind = if blocking { PipeKind::Blocking } else { PipeKind::Logger };
                open::pipe_sink(out, kind)?
            }
            Address::Log(path, format) => {
                let log = self.add_log(open::log(path, format).await?, owner, blocking);
                log_sink(&log, "stdout")
            }
            // Somebody must read, or the process stops when the terminal's buffer is full.
            other => self.sink("stdout", other, owner, blocking).await?.unwrap_or(Sink::Null),
        };
        self.add_output("stdout", master.clone(), true, sink, owner);
        if !request.stdin.is_empty() {
            let source = self.hold_stdin(&request.stdin)?;
            let input = Input::new(source, InputSink::Terminal(master.clone()), Vec::new());
            *self.input.borrow_mut() = Some(Rc::new(input));
        }
        *self.terminal.borrow_mut() = Some(master);
        self.start("")
    }

    async fn start_logger(
        &self,
        program: &logger::Program,
        owner: &Owner<'_>,
    ) -> Result<(OwnedFd, OwnedFd), StdioError> {
        let started = Logger::start(program, owner.id, owner.namespace).await;
        let (logger, out, err) = started.map_err(|source| StdioError::Logger { source })?;
        *self.logger.borrow_mut() = Some(logger);
        Ok((out, err))
    }

    fn add_log(&self, file: LogFile, owner: &Owner<'_>, blocking: bool) -> Rc<Log> {
        let log = Rc::new(Log::new(file, Spool::new(owner.bundle), blocking));
        self.logs.borrow_mut().push(log.clone());
        log
    }

    /// What output goes to at an address that is neither a logger nor, for standard output, a log.
    async fn sink(
        &self,
        name: &'static str,
        address: Address,
        owner: &Owner<'_>,
        blocking: bool,
    ) -> Result<Option<Sink>, StdioError> {
        let file = match address {
            Address::Null => return Ok(None),
            Address::Path(path) => match open::fifo_sink(&path, blocking)? {
                Some(sink) => return Ok(Some(sink)),
                None => open::existing_log(path).await?,
            },
            Address::Log(path, format) => open::log(path, format).await?,
            Address::Logger(_) => return Err(StdioError::Scheme { scheme: "binary".to_owned() }),
        };
        Ok(Some(log_sink(&self.add_log(file, owner, blocking), name)))
    }

    /// Makes a pipe to be copied to the sink, and returns the end for the process.
    fn copy_pipe(&self, name: &'static str, sink: Sink, owner: &Owner<'_>) -> Result<OwnedFd, StdioError> {
        let (reader, writer) = open::pipe(owner)?;
        open::set_nonblocking(&reader)?;
        let source = Async::new(reader).map_err(open::pipe_error("watch output pipe"))?;
        self.add_output(name, Rc::new(source), false, sink, owner);
        Ok(writer)
    }

    fn add_output(
        &self,
        name: &'static str,
        source: Rc<Async<OwnedFd>>,
        from_terminal: bool,
        sink: Sink,
        owner: &Owner<'_>,
    ) {
        let spool = Spool::new(owner.bundle);
        let output = Output::new(name, source, from_terminal, sink, spool, self.changed.clone());
        self.outputs.borrow_mut().push(Rc::new(output));
    }

    /// Opens the reading end of the stdin FIFO, and keeps a writing one.
    fn hold_stdin(&self, address: &str) -> Result<Async<OwnedFd>, StdioError> {
        let path = match Address::parse(address)? {
            Address::Path(path) | Address::Log(path, _) => path,
            Address::Null | Address::Logger(_) => {
                return Err(StdioError::Scheme { scheme: "binary".to_owned() });
            }
        };
        let (reader, hold) = open::stdin(&path)?;
        *self.stdin_hold.borrow_mut() = hold;
        Async::new(reader).map_err(open::pipe_error("watch standard input"))
    }

    /// Begins to copy. Each copy runs until it ends by itself or its process is deleted. Closes all if it fails.
    ///
    /// The FIFO of standard input is opened only now: a client's own opening of it waits for ours, and with
    /// that its reading of its input, so that it cannot reach its end and close it before the process is
    /// there.
    pub(crate) fn start(&self, stdin: &str) -> Result<(), StdioError> {
        if let Some(sink) = self.stdin_sink.take() {
            let source = self.hold_stdin(stdin).inspect_err(|_| self.close())?;
            let input = Input::new(source, InputSink::Pipe(sink), Vec::new());
            *self.input.borrow_mut() = Some(Rc::new(input));
        }
        self.started.set(true);
        self.run();
        Ok(())
    }

    fn run(&self) {
        for output in &*self.outputs.borrow() {
            let output = output.clone();
            let exited = self.exited.clone();
            self.until_closed(async move { output.run(&exited).await });
        }
        for log in &*self.logs.borrow() {
            let log = log.clone();
            self.until_closed(async move { log.run().await });
        }
        if let Some(input) = self.input.borrow().clone() {
            self.until_closed(async move { input.run().await });
        }
    }

    fn until_closed(&self, copy: impl Future<Output = ()> + 'static) {
        let closed = self.closed.clone();
        spawn(async move {
            race(copy, closed.wait()).await;
        });
    }

    /// Closes the shim's own end of standard input: when the client's is closed too, the process reads the
    /// end.
    pub(crate) fn close_stdin(&self) {
        self.stdin_hold.borrow_mut().take();
    }

    /// Says that the process has exited: its terminal shows nothing more than what it holds.
    pub(crate) fn exited(&self) {
        self.exited.close();
    }

    /// Sets the size of the terminal; without one, nothing happens.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        match self.terminal.borrow().as_ref() {
            Some(terminal) => davit_sys::io::set_window_size(terminal.get().as_fd(), rows, columns),
            None => Ok(()),
        }
    }

    /// Waits until all output has been copied, but no longer than ten seconds: a process that was left behind
    /// may hold the pipe for ever. Output that nobody is there to take is not waited for: that of a FIFO without a
    /// reader, and of a log that refuses it. Returns whether that was all.
    pub(crate) async fn drained(&self) -> bool {
        let logs = self.logs.borrow().clone();
        let attempts: Vec<u64> = logs.iter().map(|log| log.hurry()).collect();
        let settled = |output: &Rc<Output>| {
            output.is_done()
                || output.has_no_reader()
                || logs
                    .iter()
                    .zip(&attempts)
                    .any(|(log, attempts)| output.goes_to(log) && log.is_hopeless(*attempts))
        };
        let drained = self.changed.until(|| self.outputs.borrow().iter().all(settled));
        // Each attempt to write to a log may settle it.
        let attempted = async {
            loop {
                log_attempt(&logs).await;
                self.changed.changed();
            }
        };
        match race(race(drained, attempted), sleep(DRAIN_TIMEOUT)).await {
            Either::First(_) => true,
            Either::Second(()) => false,
        }
    }

    /// What its outputs have been through, by name: `stdout`, `stderr`. What a shared log has dropped counts for the
    /// first of them.
    pub(crate) fn counters(&self) -> Vec<(&'static str, Counters)> {
        let mut counters: Vec<(&'static str, Counters)> = Vec::new();
        let outputs = self.outputs.borrow();
        for (index, output) in outputs.iter().enumerate() {
            let is_first = |log: &&Rc<Log>| !outputs[..index].iter().any(|other| other.goes_to(log));
            let logs = self.logs.borrow();
            let log = logs.iter().find(|log| output.goes_to(log)).filter(is_first);
            counters.push(output.counters(log.map(Rc::as_ref)));
        }
        counters
    }

    /// Describes the streams for [`Streams::restore`]. To be called under the guard of [`crate::offload::quiesce`], with no
    /// `.await` from then on. `fds` takes note of a descriptor that must stay open and gives it a number, not 0.
    pub(crate) fn save(&self, fds: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> Saved {
        let mut number = |fd: Option<BorrowedFd<'_>>| fd.map_or(0, &mut *fds);
        let stdin_hold = number(self.stdin_hold.borrow().as_ref().map(AsFd::as_fd));
        let stdin_sink = number(self.stdin_sink.borrow().as_ref().map(|sink| sink.get().as_fd()));
        let terminal = number(self.terminal.borrow().as_ref().map(|terminal| terminal.get().as_fd()));
        let logs = self.logs.borrow();
        Saved {
            outputs: self.outputs.borrow().iter().map(|output| output.save(&logs, fds)).collect(),
            logs: logs.iter().map(|log| log.save(fds)).collect(),
            input: self.input.borrow().as_ref().and_then(|input| input.save(fds)),
            stdin_hold,
            stdin_sink,
            terminal,
            logger: self.logger.borrow().as_ref().map_or(0, Logger::pid),
            started: self.started.get(),
            exited: self.exited.is_closed(),
        }
    }

    /// Goes on where [`Streams::save`] was called; `fds` finds the descriptor of a number. To be called on the executor.
    ///
    /// # Errors
    /// A descriptor is missing or cannot be watched.
    pub(crate) fn restore(
        saved: Saved,
        fds: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> Result<Streams, StdioError> {
        Streams::restore_all(saved, fds).map_err(|source| StdioError::Restore { source })
    }

    fn restore_all(saved: Saved, fds: &mut dyn FnMut(u32) -> io::Result<OwnedFd>) -> io::Result<Streams> {
        let streams = Streams::new();
        let mut file = |number: u32| if number == 0 { Ok(None) } else { fds(number).map(Some) };
        *streams.stdin_hold.borrow_mut() = file(saved.stdin_hold)?;
        *streams.stdin_sink.borrow_mut() = file(saved.stdin_sink)?.map(Async::for_writing).transpose()?;
        let terminal = file(saved.terminal)?.map(Async::new).transpose()?.map(Rc::new);
        let mut logs = Vec::new();
        for log in saved.logs {
            logs.push(Rc::new(Log::restore(log, fds)?));
        }
        for output in saved.outputs {
            let output = Output::restore(output, terminal.as_ref(), &logs, streams.changed.clone(), fds)?;
            streams.outputs.borrow_mut().push(Rc::new(output));
        }
        if let Some(input) = saved.input {
            let source = Async::new(fds(input.source)?)?;
            let sink = match (input.sink, &terminal) {
                (0, Some(terminal)) => InputSink::Terminal(terminal.clone()),
                (number, _) => InputSink::Pipe(Async::for_writing(fds(number)?)?),
            };
            *streams.input.borrow_mut() = Some(Rc::new(Input::new(source, sink, input.carry)));
        }
        if saved.logger != 0 {
            *streams.logger.borrow_mut() = Some(Logger::adopted(saved.logger)?);
        }
        *streams.terminal.borrow_mut() = terminal;
        *streams.logs.borrow_mut() = logs;
        streams.started.set(saved.started);
        if saved.exited {
            streams.exited.close();
        }
        if saved.started {
            streams.run();
        }
        Ok(streams)
    }

    /// Lets go of everything, and stops the logger, which has some time for that. What was dropped is said now.
    pub(crate) fn close(&self) {
        self.close_stdin();
        self.closed.close();
        if self.started.get() {
            for output in self.outputs.borrow().iter() {
                output.drop_kept();
            }
            for (name, counters) in self.counters() {
                if counters.dropped > 0 {
                    log::warn(format_args!("{} bytes of {name} were dropped", counters.dropped));
                }
            }
        }
        self.outputs.take();
        self.logs.take();
        self.input.take();
        self.terminal.borrow_mut().take();
        if let Some(logger) = self.logger.borrow_mut().take() {
            spawn(logger.stop());
        }
    }
}

/// Waits for the end of the next attempt to write to one of the logs.
async fn log_attempt(logs: &[Rc<Log>]) {
    match logs {
        [] => std::future::pending().await,
        [log] => log.attempted().await,
        [first, second, ..] => {
            race(first.attempted(), second.attempted()).await;
        }
    }
}

fn log_sink(log: &Rc<Log>, name: &'static str) -> Sink {
    let lines = log.is_json().then(|| Lines::new(name));
    Sink::Log(log.clone(), RefCell::new(lines))
}
