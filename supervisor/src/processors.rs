//! Stream processors: programs that layers of some media types are piped through before they are unpacked, such as a
//! decryption, or a decompression that is not built in.
//!
//! ```text
//!   blob ─▶ feeder thread ─▶ stdin │ program │ stdout ─▶ feeder ─▶ the next program … ─▶ unpacked
//!                                     │ stderr ─▶ its tail, for the error
//! ```
//!
//! The rules are containerd's (`docs/stream_processors.md`): which program reads a type is configured; the last one by id
//! wins; what comes out is of another type, and may want another program, until it is a layer that can be unpacked. The
//! type that goes in is in the variable `STREAM_PROCESSOR_MEDIATYPE`, and what the call says for the program's id, an
//! encoded `Any`, is descriptor 3.
//!
//! A layer counts only when every program has ended with success. One that says nothing for `STALL`, or does not end
//! within `EXIT` of its last byte, is killed, and so are all of a call that is given up; each leads a session and
//! a process group of its own, and what is left in that group goes along. A program that makes other groups, as a shell with
//! job control does, has to end them itself.

mod program;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use davit_sys::process::{Exit, SpawnError};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use prost_types::Any;

use crate::config::StreamProcessor;
use program::Program;

/// The type of a layer that needs nothing more.
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// The most programs in a row.
const LONGEST: usize = 16;

/// How long a program may say nothing. A decryption may have to ask for its key.
const STALL: Duration = Duration::from_secs(300);

/// How long a program may take to end when it has said all.
const EXIT: Duration = Duration::from_secs(10);

/// Why a layer cannot be had of a program.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Programs lead round in a circle, or nearly.
    #[error("more than {LONGEST} stream processors in a row for media type {media_type:?}")]
    TooMany {
        /// The type of the layer.
        media_type: String,
    },
    /// There is no such program.
    #[error("stream processor {id:?}: no program {}", path.display())]
    NotInstalled {
        /// The processor.
        id: String,
        /// As it is configured.
        path: PathBuf,
    },
    /// It cannot be started.
    #[error("stream processor {id:?}")]
    Start {
        /// The processor.
        id: String,
        /// Why not.
        source: Arc<SpawnError>,
    },
    /// It cannot be fed or read.
    #[error("stream processor {id:?}: cannot {operation}")]
    Pipe {
        /// The processor.
        id: String,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: Arc<std::io::Error>,
    },
    /// It says that it failed.
    #[error("stream processor {id:?} ended with {}: {said}", exit.status())]
    Failed {
        /// The processor.
        id: String,
        /// How it ended.
        exit: Exit,
        /// The end of what it wrote to its standard error.
        said: String,
    },
    /// It says nothing, or does not end.
    #[error("stream processor {id:?} {what} within {} seconds: {said}", limit.as_secs())]
    Stuck {
        /// The processor.
        id: String,
        /// What it did not do.
        what: &'static str,
        /// How long it had.
        limit: Duration,
        /// The end of what it wrote to its standard error.
        said: String,
    },
    /// Nobody waits for the layer any more.
    #[error("the call was given up")]
    Canceled,
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::TooMany { .. } => ErrorCode::InvalidArgument,
            Error::NotInstalled { .. } => ErrorCode::FailedPrecondition,
            Error::Start { .. } | Error::Pipe { .. } | Error::Failed { .. } => ErrorCode::Unknown,
            Error::Stuck { .. } => ErrorCode::DeadlineExceeded,
            Error::Canceled => ErrorCode::Canceled,
        }
    }
}

/// The programs of a configuration. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Processors {
    by_id: Arc<BTreeMap<String, StreamProcessor>>,
}

impl Processors {
    /// The programs of `config`.
    pub fn new(config: &BTreeMap<String, StreamProcessor>) -> Processors {
        Processors { by_id: Arc::new(config.clone()) }
    }

    /// The programs that a layer of a type goes through, in order; none for most.
    ///
    /// # Errors
    /// [`Error::TooMany`].
    pub fn chain(&self, media_type: &str) -> Result<Vec<(&String, &StreamProcessor)>, Error> {
        let (mut chain, mut current) = (Vec::new(), media_type);
        let accepts =
            |processor: &StreamProcessor, wanted: &str| processor.accepts.iter().any(|one| one == wanted);
        while let Some((id, processor)) =
            self.by_id.iter().rev().find(|(_, processor)| accepts(processor, current))
        {
            if chain.len() == LONGEST {
                return Err(Error::TooMany { media_type: media_type.to_owned() });
            }
            chain.push((id, processor));
            current = &processor.returns;
            if current == PLAIN {
                break;
            }
        }
        Ok(chain)
    }

    /// Starts the programs for a layer: what the last of them writes, and its type. `payloads` is for the programs by their
    /// ids. Blocks.
    ///
    /// # Errors
    /// A program cannot be started; those before it are killed.
    pub fn start(
        &self,
        input: impl Read + Send + 'static,
        media_type: &str,
        payloads: &BTreeMap<String, Any>,
        running: &Arc<Running>,
    ) -> Result<(Box<dyn Read + Send>, String), Error> {
        let (mut reader, mut current): (Box<dyn Read + Send>, _) = (Box::new(input), media_type.to_owned());
        for (id, processor) in self.chain(media_type)? {
            let program = Program::start(id, processor, &current, payloads.get(id), reader, running)?;
            (reader, current) = (Box::new(program), processor.returns.clone());
        }
        Ok((reader, current))
    }
}

/// The programs that work on one layer.
#[derive(Debug)]
pub struct Running {
    state: Mutex<State>,
    /// [`STALL`].
    stall: Duration,
    /// [`EXIT`].
    exit: Duration,
}

impl Default for Running {
    fn default() -> Self {
        Running { state: Mutex::default(), stall: STALL, exit: EXIT }
    }
}

#[derive(Debug, Default)]
struct State {
    canceled: bool,
    /// The leaders of process groups that are not reaped yet, so that their numbers are theirs.
    leaders: Vec<i32>,
    /// The first that went wrong.
    failure: Option<Error>,
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills all programs, and lets no more be started.
    pub fn cancel(&self) {
        let mut state = self.lock();
        state.canceled = true;
        state.leaders.iter().for_each(|leader| kill(*leader));
    }

    /// What went wrong first, and that a program is not at its end is wrong too.
    pub fn failure(&self) -> Option<Error> {
        let state = self.lock();
        state.failure.clone().or_else(|| (!state.leaders.is_empty()).then_some(Error::Canceled))
    }

    fn failed(&self, error: &Error) {
        self.lock().failure.get_or_insert_with(|| error.clone());
    }

    /// Takes the number of a program out, which is about to be reaped.
    fn ended(&self, leader: i32) {
        let mut state = self.lock();
        // What it has left behind in its process group.
        kill(leader);
        state.leaders.retain(|one| *one != leader);
    }
}

/// Kills a process group. Whoever calls knows that its leader is not reaped.
fn kill(leader: i32) {
    // A group without processes is gone, and that is well.
    let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
}

/// Kills the programs of a layer when it is dropped: a call that is given up leaves none.
#[derive(Debug)]
pub struct Guard(pub Arc<Running>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

#[cfg(test)]
mod tests;
