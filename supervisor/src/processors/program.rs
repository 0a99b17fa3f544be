//! One running program: its feeder, its output, its last words and its end.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Seek, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use davit_sys::process::{Child, Command, find_program, wait_blocking};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use prost::Message;
use prost_types::Any;

use super::{EXIT, Error, Running};
use crate::config::StreamProcessor;
use crate::environment;

/// The variable with the type of what goes in.
const MEDIA_TYPE: &str = "STREAM_PROCESSOR_MEDIATYPE";

/// The descriptor of the payload.
const PAYLOAD: i32 = 3;

/// How much of what a program says on its standard error is kept: the end.
const TAIL: usize = 2048;

/// How much is handed on at once; as much as a pipe holds.
const BUFFER_SIZE: usize = 64 * 1024;

/// A program at work on a layer; reading it is reading what it writes. At the end of that stands its success, or an error.
pub(super) struct Program {
    id: String,
    output: PipeReader,
    running: Arc<Running>,
    child: Option<Child>,
    /// How the feeder ended.
    fed: Receiver<io::Result<()>>,
    /// Keeps the end of what it says.
    listener: Option<JoinHandle<Vec<u8>>>,
    /// Dropping it ends the listener, should anybody still hold the other end of the pipe.
    listening: Option<PipeWriter>,
}

impl Program {
    /// Starts a program that reads `input`.
    pub(super) fn start(
        id: &str,
        processor: &StreamProcessor,
        media_type: &str,
        payload: Option<&Any>,
        input: Box<dyn Read + Send>,
        running: &Arc<Running>,
    ) -> Result<Program, Error> {
        let failed = |operation| {
            move |source: io::Error| Error::Pipe { id: id.to_owned(), operation, source: Arc::new(source) }
        };
        let path = find(&processor.path)
            .ok_or_else(|| Error::NotInstalled { id: id.to_owned(), path: processor.path.clone() })?;
        let (stdin, to_stdin) = pipe().map_err(failed("make a pipe"))?;
        let (output, stdout) = pipe().map_err(failed("make a pipe"))?;
        let (from_stderr, stderr) = pipe().map_err(failed("make a pipe"))?;
        let (stop, listening) = pipe().map_err(failed("make a pipe"))?;
        let payload = payload.map(payload_file).transpose().map_err(failed("write the payload"))?;

        let listener = thread::Builder::new().name("layer-stderr".to_owned());
        let listener =
            listener.spawn(move || keep_tail(from_stderr, &stop)).map_err(failed("start a thread"))?;
        let child = {
            // Under the lock: whoever cancels kills this one, or it is not started.
            let mut state = running.lock();
            if state.canceled {
                return Err(Error::Canceled);
            }
            let spawn = || {
                let mut command = command(&path, processor, media_type)?;
                command.descriptor(0, stdin.as_fd()).descriptor(1, stdout.as_fd());
                command.descriptor(2, stderr.as_fd());
                if let Some(payload) = &payload {
                    command.descriptor(PAYLOAD, payload.as_fd());
                }
                Ok(command.spawn())
            };
            let child = spawn()
                .map_err(|source: std::ffi::NulError| failed("name it")(source.into()))?
                .map_err(|source| Error::Start { id: id.to_owned(), source: Arc::new(source) })?;
            state.leaders.push(child.pid);
            child
        };
        let (done, fed) = mpsc::sync_channel(1);
        let program = Program {
            id: id.to_owned(),
            output,
            running: running.clone(),
            child: Some(child),
            fed,
            listener: Some(listener),
            listening: Some(listening),
        };
        let feeder = thread::Builder::new().name("layer-feed".to_owned());
        // From here on a failure drops the program, which kills it.
        let work = move || {
            // Nobody asks of a program that was given up.
            let _ = done.send(feed(input, to_stdin));
        };
        feeder.spawn(work).map_err(failed("start a thread"))?;
        Ok(program)
    }

    /// The end of what it has said; nobody listens any more then.
    fn said(&mut self) -> String {
        self.listening = None;
        let tail = self.listener.take().and_then(|listener| listener.join().ok()).unwrap_or_default();
        String::from_utf8_lossy(&tail).trim().to_owned()
    }

    fn stuck(&mut self, what: &'static str, limit: Duration) -> Error {
        Error::Stuck { id: self.id.clone(), what, limit, said: self.said() }
    }

    fn pipe_error(&self, operation: &'static str, source: io::Error) -> Error {
        Error::Pipe { id: self.id.clone(), operation, source: Arc::new(source) }
    }

    fn next(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        if self.child.is_none() {
            return Ok(0);
        }
        let stall = self.running.stall;
        if !readable(self.output.as_fd(), stall).map_err(|source| self.pipe_error("wait for it", source))? {
            return Err(self.stuck("said nothing", stall));
        }
        match self.output.read(buffer) {
            Ok(0) => self.finish().map(|()| 0),
            Ok(length) => Ok(length),
            Err(source) => Err(self.pipe_error("read it", source)),
        }
    }

    /// After its last byte: it must have ended well, and so must what it was fed with.
    fn finish(&mut self) -> Result<(), Error> {
        let Some(child) = &self.child else { return Ok(()) };
        let limit = self.running.exit;
        if !readable(child.pidfd.as_fd(), limit).map_err(|source| self.pipe_error("wait for it", source))? {
            return Err(self.stuck("did not end", limit));
        }
        let exit = self.reap().map_err(|source| self.pipe_error("reap it", source))?;
        if !exit.success() {
            return Err(Error::Failed { id: self.id.clone(), exit, said: self.said() });
        }
        // A program before this one may still have its time.
        let limit = self.running.stall;
        match self.fed.recv_timeout(limit) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(self.pipe_error("feed it", source)),
            // What it has left behind in a group of its own has its input still, and does not read it.
            Err(RecvTimeoutError::Timeout) => Err(self.stuck("did not let go of its input", limit)),
            Err(RecvTimeoutError::Disconnected) => {
                Err(self.pipe_error("feed it", io::ErrorKind::Other.into()))
            }
        }
    }

    fn reap(&mut self) -> io::Result<davit_sys::process::Exit> {
        let child = self.child.take().ok_or(io::ErrorKind::NotFound)?;
        self.running.ended(child.pid);
        wait_blocking(&child)
    }
}

impl Read for Program {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.next(buffer).map_err(|error| {
            self.running.failed(&error);
            io::Error::other(error)
        })
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let Some(child) = self.child.take() else { return };
        self.running.ended(child.pid);
        // It has been killed; one that hangs in the kernel is waited for elsewhere.
        if matches!(readable(child.pidfd.as_fd(), EXIT), Ok(true)) {
            let _ = wait_blocking(&child);
        } else {
            tracing::warn!(id = self.id, "a stream processor does not go away after SIGKILL");
            let _ = thread::Builder::new().spawn(move || wait_blocking(&child));
        }
    }
}

/// Finds a program: by its path if there is a slash in it, or else on `PATH`.
fn find(path: &Path) -> Option<PathBuf> {
    if path.as_os_str().as_encoded_bytes().contains(&b'/') {
        return Some(path.to_owned());
    }
    find_program(path.as_os_str(), &std::env::var_os("PATH").unwrap_or_default())
}

fn command<'fd>(
    path: &Path,
    processor: &StreamProcessor,
    media_type: &str,
) -> Result<Command<'fd>, std::ffi::NulError> {
    let mut command = Command::new(path)?;
    command.name(&processor.path)?.new_session();
    for argument in &processor.args {
        command.argument(argument)?;
    }
    let own: Vec<_> = processor.env.iter().filter_map(|variable| variable.split_once('=')).collect();
    let private = environment::private();
    let mut replaced: Vec<&str> = private.iter().map(String::as_str).collect();
    replaced.push(MEDIA_TYPE);
    replaced.extend(own.iter().map(|(name, _)| *name));
    command.inherit_environment(&replaced);
    for (name, value) in own {
        command.variable(name, value)?;
    }
    command.variable(MEDIA_TYPE, media_type)?;
    Ok(command)
}

/// A file without a name with an encoded payload, at its start: nobody has to write while the program reads, or does not.
fn payload_file(payload: &Any) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"payload", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&payload.encode_to_vec())?;
    file.rewind()?;
    Ok(file)
}

/// Feeds a program until its input ends. That it wants no more is its own matter.
fn feed(mut input: Box<dyn Read + Send>, mut stdin: PipeWriter) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let length = match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        match stdin.write_all(&buffer[..length]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
    }
}

/// Keeps the end of what comes out of a pipe until nobody writes any more, or somebody wants it; then what is in the pipe is
/// read still.
fn keep_tail(mut stderr: PipeReader, stop: &PipeReader) -> Vec<u8> {
    let (mut buffer, mut tail, mut late) = ([0; 4096], Vec::new(), 0);
    while late < BUFFER_SIZE {
        let mut both =
            [PollFd::new(stderr.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut both, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => break,
        }
        let has = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let (speaks, stopped) = (has(&both[0]), has(&both[1]));
        if speaks {
            let Ok(length @ 1..) = stderr.read(&mut buffer) else { break };
            tail.extend_from_slice(&buffer[..length]);
            let surplus = tail.len().saturating_sub(TAIL);
            tail.drain(..surplus);
            late += if stopped { length } else { 0 };
        } else if stopped {
            break;
        }
    }
    tail
}

/// Waits so long for something to be read, or for the end.
fn readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // One poll takes a minute at most; rounded up, so that the last one does not spin.
        let millis = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(millis)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}
