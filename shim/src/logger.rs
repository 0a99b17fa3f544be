//! Logging programs: a client names one as `binary:///program?key=value`, and it gets the container's output.
//!
//! The program finds standard output of the container at descriptor 3, standard error at 4, and at 5 a pipe
//! that it closes when it is ready (`binary`), or writes a byte to (`binary-v2`). Its arguments are the keys
//! and values of the query; `CONTAINER_ID` and `CONTAINER_NAMESPACE` are all of its environment.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use davit_sys::process::{Command, SpawnError};
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};

use crate::executor::{Either, JoinHandle, race, spawn};
use crate::log;
use crate::quiesce::Busy;
use crate::reactor::{Async, sleep};
use crate::reaper::{Awaited, KilledOnDrop};

/// The time to end by itself, once all output has been written and the container is deleted.
const FINISH: Duration = Duration::from_secs(10);
/// The time between `SIGTERM` and `SIGKILL` (containerd `binaryIOProcTermTimeout`).
const TERMINATE: Duration = Duration::from_secs(12);

/// A logging program and its arguments.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program {
    path: PathBuf,
    arguments: Vec<String>,
    /// True if closing the ready pipe does not suffice.
    strict: bool,
}

/// Why a logger cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoggerError {
    /// A pipe could not be made or read.
    #[error("{step}")]
    Pipe {
        /// What failed.
        step: &'static str,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// An argument cannot be passed.
    #[error("invalid argument of logging binary")]
    Argument {
        /// Why.
        source: std::ffi::NulError,
    },
    /// It cannot be executed.
    #[error("failed to start binary process")]
    Spawn {
        /// Why.
        source: SpawnError,
    },
    /// It is gone, or closed the pipe without having said that it is ready.
    #[error("logging binary did not call ready (it may have crashed or exited prematurely)")]
    NotReady,
}

impl Coded for LoggerError {
    fn code(&self) -> ErrorCode {
        match self {
            LoggerError::Pipe { .. } => ErrorCode::Internal,
            LoggerError::Argument { .. } => ErrorCode::InvalidArgument,
            LoggerError::Spawn { .. } | LoggerError::NotReady => ErrorCode::Unknown,
        }
    }
}

impl Program {
    /// Reads what follows `binary://`.
    pub(crate) fn parse(rest: &str, strict: bool) -> Program {
        let rest = rest.split('#').next().unwrap_or_default();
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut seen: Vec<String> = Vec::new();
        let mut arguments = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (key, value) = (decode(&key.replace('+', " ")), decode(&value.replace('+', " ")));
            // Of a key that is given twice the first value counts.
            if !seen.contains(&key) {
                seen.push(key.clone());
                arguments.extend([key, value]);
            }
        }
        Program { path: PathBuf::from(decode(path)), arguments, strict }
    }
}

/// Decodes `%41` and its like. What is no such escape stays as it is.
pub(crate) fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut position = 0;
    while position < bytes.len() {
        let escape = (bytes[position] == b'%')
            .then(|| text.get(position + 1..position + 3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escape {
            Some(byte) => {
                decoded.push(byte);
                position += 3;
            }
            None => {
                decoded.push(bytes[position]);
                position += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// A running logger.
pub(crate) struct Logger {
    process: Rc<Awaited>,
    /// It may end long before the container does.
    end: JoinHandle<()>,
}

impl Logger {
    fn of(process: Awaited) -> Logger {
        let process = Rc::new(process);
        let awaited = process.clone();
        let end = spawn(async move {
            // It has no reason to fail for a child of ours.
            let _ = awaited.exit().await;
        });
        Logger { process, end }
    }

    /// Starts the program and waits until it is ready. Returns the writing ends for standard output and
    /// error.
    pub(crate) async fn start(
        program: &Program,
        id: &str,
        namespace: &str,
    ) -> Result<(Logger, OwnedFd, OwnedFd), LoggerError> {
        let new_pipe =
            |step| pipe2(OFlag::O_CLOEXEC).map_err(|error| LoggerError::Pipe { step, source: error.into() });
        let (out_reader, out) = new_pipe("make pipe for standard output")?;
        let (err_reader, err) = new_pipe("make pipe for standard error")?;
        let (ready_reader, ready) = new_pipe("make ready pipe")?;
        let child = {
            let build = || {
                let mut command = Command::new(&program.path)?;
                for argument in &program.arguments {
                    command.argument(argument)?;
                }
                command.variable("CONTAINER_ID", id)?.variable("CONTAINER_NAMESPACE", namespace)?;
                Ok(command)
            };
            let mut command = build().map_err(|source| LoggerError::Argument { source })?;
            command
                .descriptor(3, out_reader.as_fd())
                .descriptor(4, err_reader.as_fd())
                .descriptor(5, ready.as_fd())
                .restore_huge_pages();
            command.spawn().map_err(|source| LoggerError::Spawn { source })?
        };
        drop((out_reader, err_reader, ready));
        let watch = |step| move |source| LoggerError::Pipe { step, source };
        let process = KilledOnDrop::new(Awaited::child(child).map_err(watch("watch logging binary"))?);
        let ready = wait_ready(ready_reader).await.map_err(watch("read from logging binary"))?;
        if program.strict && !ready {
            return Err(LoggerError::NotReady);
        }
        Ok((Logger::of(process.spare()), out, err))
    }

    /// The logger of this pid, which an earlier shim started.
    ///
    /// # Errors
    /// There is no such process.
    pub(crate) fn adopted(pid: i32) -> io::Result<Logger> {
        Ok(Logger::of(Awaited::adopted(pid)?))
    }

    /// Its pid, 0 when it has ended.
    pub(crate) fn pid(&self) -> i32 {
        if self.process.is_reaped() { 0 } else { self.process.pid }
    }

    /// Waits for the end of the program, which comes by itself when all writers have closed the pipes; asks
    /// for it after some time, and enforces it after some more.
    pub(crate) async fn stop(mut self) {
        // Who ends it must not be lost in an upgrade.
        let _busy = Busy::begin();
        if let Either::First(()) = race(&mut self.end, sleep(FINISH)).await {
            return;
        }
        let _ = self.process.signal(nix::libc::SIGTERM);
        if let Either::First(()) = race(&mut self.end, sleep(TERMINATE)).await {
            return;
        }
        log::warn("failed to wait for the logging binary to exit, killing it");
        let _ = self.process.signal(nix::libc::SIGKILL);
        self.end.await;
    }
}

/// Waits for a byte or the end of the ready pipe; true for a byte.
async fn wait_ready(pipe: OwnedFd) -> io::Result<bool> {
    use nix::fcntl::{FcntlArg, fcntl};
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let pipe = Async::new(pipe)?;
    let mut byte = [0];
    let count = pipe.read_with(|pipe| Ok(read(pipe, &mut byte)?)).await?;
    Ok(count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_becomes_arguments() {
        let program = Program::parse("/usr/bin/log%20it?a=1&b&a=2&c=x%3Dy+z#frag", false);
        assert_eq!(program.path, PathBuf::from("/usr/bin/log it"));
        assert_eq!(program.arguments, ["a", "1", "b", "", "c", "x=y z"]);
        assert_eq!(Program::parse("/log", true).arguments, [""; 0]);
    }

    #[test]
    fn only_whole_escapes_are_decoded() {
        assert_eq!(decode("a%2Fb%zz%4%"), "a/b%zz%4%");
        assert_eq!(decode("%c3%a4ä"), "ää");
    }
}
