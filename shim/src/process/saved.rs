//! A process on its way through an upgrade.

use std::cell::Cell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use super::{Ended, Process, State};
use crate::log;
use crate::reaper::Awaited;
use crate::state::{self, ProcessState};
use crate::stdio::{Request, Streams};

impl Process {
    /// Describes the process for [`Process::restore`].
    pub(crate) fn save(&self, lend: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> state::Process {
        let state = match self.state.get() {
            State::Created => ProcessState::Created,
            State::Running => ProcessState::Running,
            State::Paused => ProcessState::Paused,
            State::Stopped => ProcessState::Stopped,
            State::Deleted => ProcessState::Deleted,
        };
        // What has been reaped needs no descriptor any more.
        let awaited = self.awaited().filter(|_| self.recorded.get().is_none());
        state::Process {
            id: self.id.clone(),
            stdin: self.stdio.stdin.clone(),
            stdout: self.stdio.stdout.clone(),
            stderr: self.stdio.stderr.clone(),
            terminal: self.stdio.terminal,
            document: if state == ProcessState::Created { self.document.clone() } else { Vec::new() },
            state: state.into(),
            pid: self.pid.get(),
            pidfd: awaited.map_or(0, |awaited| lend(awaited.descriptor())),
            recorded: self.recorded.get().or(self.ended.get()).map(Ended::save),
            published: self.ended.get().is_some(),
            failed: self.failed.get(),
            streams: self.streams().map(|streams| streams.save(lend)),
        }
    }

    /// The process that was saved. Nobody waits for it yet.
    ///
    /// # Errors
    /// Its descriptor is missing or cannot be watched.
    pub(crate) fn restore(
        saved: state::Process,
        take: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Process> {
        let state = match saved.state() {
            ProcessState::Unset | ProcessState::Created => State::Created,
            ProcessState::Running => State::Running,
            ProcessState::Paused => State::Paused,
            ProcessState::Stopped => State::Stopped,
            ProcessState::Deleted => State::Deleted,
        };
        let stdio = Request {
            stdin: saved.stdin,
            stdout: saved.stdout,
            stderr: saved.stderr,
            terminal: saved.terminal,
        };
        let mut process = Process::new(saved.id, stdio, saved.document);
        let recorded = saved.recorded.map(Ended::restore);
        process.state = Cell::new(state);
        process.pid = Cell::new(saved.pid);
        process.recorded = Cell::new(recorded);
        process.ended = Cell::new(recorded.filter(|_| saved.published));
        process.failed = Cell::new(saved.failed);
        if saved.pidfd != 0 {
            process.adopt(Rc::new(Awaited::handed_on(saved.pid, take(saved.pidfd)?)?));
        }
        if let Some(streams) = saved.streams {
            match Streams::restore(streams, take) {
                Ok(streams) => process.set_streams(streams),
                // The process itself goes on, and so does all that is known of it.
                Err(error) => log::error(format_args!("streams of {} are lost: {error}", process.id)),
            }
        }
        Ok(process)
    }
}

impl Ended {
    fn save(self) -> state::Ended {
        let at = self.timestamp();
        state::Ended { status: self.status, seconds: at.seconds, nanos: at.nanos }
    }

    fn restore(saved: state::Ended) -> Ended {
        let since = Duration::new(
            u64::try_from(saved.seconds).unwrap_or(0),
            u32::try_from(saved.nanos).unwrap_or(0).min(999_999_999),
        );
        Ended { status: saved.status, at: SystemTime::UNIX_EPOCH + since }
    }
}
