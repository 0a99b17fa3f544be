//! A process of a container: its init, or an exec.
//!
//! ```text
//!            start             exit is published         delete
//! Created ──────────► Running ───────────────────► Stopped ─────► Deleted
//!    │                 ▲   │ pause                    ▲
//!    │          resume │   ▼                          │
//!    │                 Paused ────────────────────────┤   (init only)
//!    └────────────────────────────────────────────────┘   (init killed before its start)
//! ```
//! A process may be dead for a while before it is `Stopped`: its exit is published only after its start, and
//! that of an init after those of all execs.

mod saved;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::SystemTime;

use prost_types::Timestamp;

use crate::error::TaskError;
use crate::reaper::Awaited;
use crate::stdio::{Request, Streams};
use crate::sync::{Condition, Lock};

/// What a process is at, as clients see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It waits for `Start`.
    Created,
    /// It runs.
    Running,
    /// It is frozen.
    Paused,
    /// It has ended, and everybody may know.
    Stopped,
    /// It is gone.
    Deleted,
}

impl State {
    /// The word in error texts.
    pub(crate) fn word(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Deleted => "deleted",
        }
    }
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    /// The code, or 128 plus the signal.
    pub(crate) status: u32,
    /// When the shim saw it.
    pub(crate) at: SystemTime,
}

impl Ended {
    /// The time as protobuf has it.
    pub(crate) fn timestamp(&self) -> Timestamp {
        Timestamp::from(self.at)
    }
}

/// A process of a container.
pub(crate) struct Process {
    /// The exec's id, or the container's.
    pub(crate) id: String,
    /// The streams that the client asked for.
    pub(crate) stdio: Request,
    /// The process document of an exec; empty for init.
    pub(crate) document: Vec<u8>,
    /// Held while the process is being started, until its start has been published: the exit waits for it.
    pub(crate) announcing: Lock,
    state: Cell<State>,
    pid: Cell<i32>,
    /// How it ended, once that is in the journal.
    recorded: Cell<Option<Ended>>,
    ended: Cell<Option<Ended>>,
    /// True if starting failed: nobody must wait for it.
    failed: Cell<bool>,
    changed: Condition,
    awaited: RefCell<Option<Rc<Awaited>>>,
    streams: RefCell<Option<Rc<Streams>>>,
}

impl Process {
    /// A process that is to be started.
    pub(crate) fn new(id: String, stdio: Request, document: Vec<u8>) -> Process {
        Process {
            id,
            stdio,
            document,
            announcing: Lock::default(),
            state: Cell::new(State::Created),
            pid: Cell::new(0),
            recorded: Cell::new(None),
            ended: Cell::new(None),
            failed: Cell::new(false),
            changed: Condition::default(),
            awaited: RefCell::default(),
            streams: RefCell::default(),
        }
    }

    /// Its state.
    pub(crate) fn state(&self) -> State {
        self.state.get()
    }

    /// Moves it to another state.
    pub(crate) fn set_state(&self, state: State) {
        self.state.set(state);
        self.changed.changed();
    }

    /// Its pid, 0 before it exists.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.get()
    }

    /// How it ended, once that has been published.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.get()
    }

    /// Says that its end is in the journal.
    pub(crate) fn set_recorded(&self, ended: Ended) {
        self.recorded.set(Some(ended));
    }

    /// How it ended, once that is in the journal; perhaps it has not been published yet.
    pub(crate) fn recorded(&self) -> Option<Ended> {
        self.recorded.get()
    }

    /// Takes note of the process that the runtime has left behind.
    pub(crate) fn adopt(&self, awaited: Rc<Awaited>) {
        self.pid.set(awaited.pid);
        *self.awaited.borrow_mut() = Some(awaited);
    }

    /// Forgets a process that was killed before anybody was told of it.
    pub(crate) fn disown(&self) {
        self.pid.set(0);
        self.awaited.borrow_mut().take();
        self.streams.borrow_mut().take();
    }

    /// The process in the kernel, while it is waited for.
    pub(crate) fn awaited(&self) -> Option<Rc<Awaited>> {
        self.awaited.borrow().clone()
    }

    /// Takes over its streams.
    pub(crate) fn set_streams(&self, streams: Streams) {
        *self.streams.borrow_mut() = Some(Rc::new(streams));
    }

    /// Its streams, once they are open.
    pub(crate) fn streams(&self) -> Option<Rc<Streams>> {
        self.streams.borrow().clone()
    }

    /// Says that it has ended, and wakes all who wait for that.
    pub(crate) fn set_ended(&self, ended: Ended) {
        self.ended.set(Some(ended));
        self.awaited.borrow_mut().take();
        if let Some(streams) = self.streams() {
            streams.exited();
        }
        self.set_state(State::Stopped);
    }

    /// Says whether starting it has failed, so that nobody must wait for it.
    pub(crate) fn set_failed(&self, failed: bool) {
        self.failed.set(failed);
        self.changed.changed();
    }

    /// Whether it exists, or has ended without that being published.
    pub(crate) fn is_under_way(&self) -> bool {
        self.ended.get().is_none() && (self.recorded.get().is_some() || self.awaited.borrow().is_some())
    }

    /// Waits until it has ended. `None` if it could not be started.
    pub(crate) async fn wait(&self) -> Option<Ended> {
        self.changed.until(|| self.ended.get().is_some() || self.failed.get()).await;
        self.ended.get()
    }

    /// Signals an exec.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), TaskError> {
        if self.ended.get().is_some() {
            return Err(TaskError::Finished);
        }
        let awaited = self.awaited.borrow();
        let Some(awaited) = awaited.as_ref() else { return Err(TaskError::ProcessNotStarted) };
        awaited.signal(signal).map_err(|source| {
            if source.raw_os_error() == Some(nix::libc::ESRCH) {
                TaskError::Finished
            } else {
                TaskError::Signal { source }
            }
        })
    }

    /// Waits for its output to arrive, and closes its streams.
    pub(crate) async fn close_streams(&self) {
        let Some(streams) = self.streams() else { return };
        if !streams.drained().await {
            crate::log::warn(format_args!("output of process {} did not end in time", self.id));
        }
        streams.close();
        self.streams.borrow_mut().take();
    }
}
