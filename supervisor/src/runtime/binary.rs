//! Shim binaries: finding the one of a runtime, and running it to start a shim or to clean up after one.
//!
//! # What a shim is told on stdin
//! There are three generations of shims, and none says beforehand which it is. containerd up to 2.2 writes
//! the runtime's options as an `Any`, or nothing; 2.3 writes `BootstrapParams`, which shims of 1.6 refuse. A
//! shim of 2.3 that gets an `Any` reads it as `BootstrapParams`, with the type for its id, and joins all
//! containers in one shim. So:
//!
//! * our own shim gets `BootstrapParams`;
//! * any other gets nothing when there are no options, which all of them take for "see the flags and the
//!   environment";
//! * any other gets options as an `Any` with one more field, number 5, which is no text. Who reads an `Any`
//!   skips the unknown field; to who reads `BootstrapParams` it is a string that is not UTF-8, so the message
//!   is refused and read again as an `Any`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use davit_model::Any;
use davit_proto::containerd::types::RuntimeInfo;
use davit_shim_protocol::bootstrap::{Generation, StartInput, StartResult};
use davit_shim_protocol::bundle::Bundle;
use davit_sys::process::find_program;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use prost::Message;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::shim::{any_to_wire, decode_delete};
use super::task::Exit;
use super::{Config, ShimError};
use crate::environment;

/// Our own shim.
pub(super) const OWN_BINARY: &str = "containerd-shim-davit-v2";

/// The runtimes that our own shim answers to.
const OWN_RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.davit.v2"];

/// The most that a shim may say.
const MAX_OUTPUT: usize = 64 * 1024;

/// The time for a process that was killed to be gone.
const REAP: Duration = Duration::from_secs(1);

/// Finds the shim of a runtime: an absolute path as it is; our own for the runtimes it answers to; otherwise
/// `io.containerd.NAME.VERSION` is `containerd-shim-NAME-VERSION` on `PATH` or beside the daemon.
pub(super) fn resolve(config: &Config, runtime: &str) -> Result<PathBuf, ShimError> {
    if runtime.is_empty() {
        return Err(ShimError::NoRuntimeName);
    }
    if runtime.starts_with('/') {
        let path = PathBuf::from(runtime);
        return match std::fs::metadata(&path) {
            Ok(_) => Ok(path),
            Err(source) => Err(ShimError::RuntimePath { path, source }),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = config.shim_directory.as_os_str().to_owned();
    if OWN_RUNTIMES.contains(&runtime) {
        if let Some(shim) = &config.default_shim {
            return Ok(shim.clone());
        }
        return find(OWN_BINARY, [beside, path], runtime);
    }
    let binary =
        binary_name(runtime).ok_or_else(|| ShimError::RuntimeName { runtime: runtime.to_owned() })?;
    find(&binary, [path, beside], runtime)
}

fn find(binary: &str, places: [OsString; 2], runtime: &str) -> Result<PathBuf, ShimError> {
    places
        .iter()
        .find_map(|place| find_program(binary.as_ref(), place))
        .ok_or_else(|| ShimError::NotInstalled { runtime: runtime.to_owned(), binary: binary.to_owned() })
}

/// The last two parts of the name; `None` for what is no name of a runtime.
fn binary_name(runtime: &str) -> Option<String> {
    if runtime.contains('/') || runtime.starts_with('.') {
        return None;
    }
    let (rest, version) = runtime.rsplit_once('.')?;
    let name = rest.rsplit_once('.').map_or(rest, |(_, name)| name);
    Some(format!("containerd-shim-{name}-{version}"))
}

/// What is written to the stdin of `start`. See the head of this file.
fn start_input(config: &Config, bundle: &Bundle, binary: &Path, options: Option<&Any>) -> Vec<u8> {
    if binary.file_name().is_some_and(|name| name == OWN_BINARY) {
        let input = StartInput {
            generation: Generation::Bootstrap,
            options: options.cloned(),
            debug: config.debug,
            ttrpc_address: config.ttrpc_address.clone(),
            grpc_address: config.grpc_address.clone(),
            socket_dir: config.socket_directory.clone(),
        };
        let daemon = config.daemon_binary.display().to_string();
        return input.encode(bundle.id(), bundle.namespace(), env!("CARGO_PKG_VERSION"), &daemon);
    }
    let Some(options) = options else { return Vec::new() };
    let mut input = any_to_wire(options.clone()).encode_to_vec();
    // Field 5, length-delimited, one byte that no UTF-8 text has.
    input.extend_from_slice(&[5 << 3 | 2, 1, 0xff]);
    input
}

/// A shim's program, with nothing of the daemon's environment that is not for others.
fn program(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    // A process group of its own: a signal to the daemon's does not reach it, and it can be killed as one.
    command.process_group(0);
    for name in environment::private() {
        command.env_remove(name);
    }
    command
}

fn command(config: &Config, bundle: &Bundle, binary: &Path) -> Command {
    let mut command = program(binary);
    command
        .args(["-namespace", bundle.namespace(), "-address", &config.grpc_address, "-publish-binary"])
        .arg(&config.daemon_binary)
        .args(["-id", bundle.id()])
        .current_dir(bundle.path())
        .env("GOMAXPROCS", "2")
        .env("MAX_SHIM_VERSION", "2")
        .env("TTRPC_ADDRESS", &config.ttrpc_address)
        .env("GRPC_ADDRESS", &config.grpc_address)
        .env("NAMESPACE", bundle.namespace())
        .envs(config.environment.iter().map(|(name, value)| (name, value)));
    command
}

/// Runs `start` and reads where the shim is. Everything that it prints counts, on stdout and stderr, until
/// both are closed: that is how shims are written.
pub(super) async fn start(
    config: &Config,
    bundle: &Bundle,
    binary: &Path,
    options: Option<&Any>,
) -> Result<StartResult, ShimError> {
    const ACTION: &str = "start";
    let spawn = |source| ShimError::Spawn { binary: binary.to_owned(), action: ACTION, source };
    let (reader, writer) = std::io::pipe().map_err(spawn)?;
    let mut command = command(config, bundle, binary);
    if config.debug {
        command.arg("-debug");
    }
    let input = start_input(config, bundle, binary, options);
    command.arg(ACTION).stdin(stdin(&input).map_err(spawn)?);
    command.stdout(writer.try_clone().map_err(spawn)?).stderr(writer);
    let mut child = command.spawn().map_err(spawn)?;
    // The command holds our ends of the pipe for writing.
    drop(command);
    let mut reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader)).map_err(spawn)?;
    let mut output = Vec::new();
    let limit = config.timeouts.start;
    let talk = async {
        read_bounded(&mut reader, &mut output).await?;
        child.wait().await
    };
    let begun = Instant::now();
    let ended = tokio::time::timeout(limit, talk).await;
    tracing::trace!(micros = begun.elapsed().as_micros() as u64, "shim start");
    let said = || String::from_utf8_lossy(&output).trim().to_owned();
    match ended {
        Ok(Ok(status)) if status.success() => StartResult::parse(&output)
            .map_err(|source| ShimError::Nonsense { output: shortened(&said()), source }),
        Ok(Ok(status)) => Err(ShimError::Failed { action: ACTION, output: shortened(&said()), status }),
        Ok(Err(source)) => {
            kill(&mut child).await;
            let binary = binary.to_owned();
            if source.kind() == io::ErrorKind::FileTooLarge {
                let output = shortened(&said());
                return Err(ShimError::TooMuchOutput { binary, action: ACTION, limit: MAX_OUTPUT, output });
            }
            Err(ShimError::Read { binary, action: ACTION, source })
        }
        Err(_) => {
            kill(&mut child).await;
            let output = shortened(&said());
            Err(ShimError::Timeout { binary: binary.to_owned(), action: ACTION, limit, output })
        }
    }
}

/// Runs `delete`, which kills what is left of the container and says how its init process ended.
pub(super) async fn delete(config: &Config, bundle: &Bundle, binary: &Path) -> Result<Exit, ShimError> {
    let mut command = command(config, bundle, binary);
    command.arg("-bundle").arg(bundle.path());
    if config.debug {
        command.arg("-debug");
    }
    command.arg("delete");
    let output = capture(command, binary, "delete", &[], config.timeouts.cleanup).await?;
    decode_delete(&output).map_err(|source| ShimError::Answer { action: "delete", source })
}

/// Runs `-info`: what the shim and its OCI runtime can do, as an encoded `containerd.types.RuntimeInfo`.
pub(super) async fn info(config: &Config, binary: &Path, options: Option<Any>) -> Result<Vec<u8>, ShimError> {
    let mut command = program(binary);
    command.arg("-info");
    let input = options.map(|options| any_to_wire(options).encode_to_vec()).unwrap_or_default();
    let output = capture(command, binary, "-info", &input, config.timeouts.start).await?;
    match RuntimeInfo::decode(output.as_slice()) {
        Ok(_) => Ok(output),
        Err(source) => Err(ShimError::Answer { action: "-info", source }),
    }
}

/// Runs the binary for what it prints on stdout; what it prints on stderr is for the log, or for the error.
async fn capture(
    mut command: Command,
    binary: &Path,
    action: &'static str,
    input: &[u8],
    limit: Duration,
) -> Result<Vec<u8>, ShimError> {
    let spawn = |source| ShimError::Spawn { binary: binary.to_owned(), action, source };
    command.stdin(stdin(input).map_err(spawn)?).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(spawn)?;
    let (mut output, mut log) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let talk = async {
        let (output, log) = tokio::join!(read_optional(stdout, &mut output), read_optional(stderr, &mut log));
        output?;
        log?;
        child.wait().await
    };
    let ended = tokio::time::timeout(limit, talk).await;
    let said = shortened(String::from_utf8_lossy(&log).trim());
    match ended {
        Ok(Ok(status)) if status.success() => {
            if !said.is_empty() {
                tracing::debug!(action, output = said, "shim");
            }
            Ok(output)
        }
        Ok(Ok(status)) => Err(ShimError::Failed { action, output: said, status }),
        Ok(Err(source)) => {
            kill(&mut child).await;
            Err(ShimError::Read { binary: binary.to_owned(), action, source })
        }
        Err(_) => {
            kill(&mut child).await;
            Err(ShimError::Timeout { binary: binary.to_owned(), action, limit, output: said })
        }
    }
}

/// Standard input that holds all of `input`: a file without a name, so that nobody has to write while the binary runs,
/// which may not read it at all.
fn stdin(input: &[u8]) -> io::Result<Stdio> {
    if input.is_empty() {
        return Ok(Stdio::null());
    }
    let mut file = File::from(memfd_create(c"shim-input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(input)?;
    file.rewind()?;
    Ok(file.into())
}

async fn read_optional(stream: Option<impl AsyncReadExt + Unpin>, output: &mut Vec<u8>) -> io::Result<()> {
    match stream {
        Some(mut stream) => read_bounded(&mut stream, output).await,
        None => Ok(()),
    }
}

/// Reads to the end, or fails with `FileTooLarge`.
async fn read_bounded(stream: &mut (impl AsyncReadExt + Unpin), output: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let room = MAX_OUTPUT - output.len();
        output.extend_from_slice(&buffer[..length.min(room)]);
        if length > room {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// Kills the child and what it has started in its group. A shim that is up has left the group.
async fn kill(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // The child is not reaped yet, so the number is still its own.
        if let Err(errno) = killpg(Pid::from_raw(pid), Signal::SIGKILL) {
            tracing::debug!(pid, %errno, "cannot kill the process group of a shim binary");
        }
    }
    if tokio::time::timeout(REAP, child.wait()).await.is_err() {
        // In the kernel, most likely; the runtime reaps it when it comes out.
        tracing::warn!("a shim binary does not go away after SIGKILL");
    }
}

/// The beginning of what a shim said: it becomes part of an error.
fn shortened(text: &str) -> String {
    const LIMIT: usize = 4096;
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
