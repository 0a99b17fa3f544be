//! The OCI runtime (`runc`, `crun`, or another with the same command line), called as a child for each
//! operation.
//!
//! The texts of its errors go to clients unmodified: Docker Engine reads exit codes out of them.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use davit_model::{Coded, ErrorCode};
use davit_sys::fs::{read_regular, write_private};
use davit_sys::process::{Command, Exit, SpawnError, find_program};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;

use crate::deadline::Deadline;
use crate::quiesce::Busy;
use crate::reaper::{Awaited, KilledOnDrop};

/// Where runtimes keep their state unless the options name another folder (containerd `process.RuncRoot`).
pub(crate) const DEFAULT_ROOT: &str = "/run/containerd/runc";
/// The runtime unless the options name one.
pub(crate) const DEFAULT_BINARY: &str = "runc";

/// The most of a runtime's output and log that is read.
const MAX_TEXT: u64 = 256 * 1024;
/// More than the digits of any pid.
const MAX_PID_FILE: u64 = 64;

/// What a runtime does not inherit: variables by which systemd speaks to the daemon, since `runc` hands their sockets and
/// descriptors on to the container (sd_listen_fds(3), sd_notify(3)).
const NOT_FOR_RUNTIMES: [&str; 7] = [
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// The time for a process that was killed to be gone.
const DEATH: Duration = Duration::from_millis(200);

/// Why a call of the runtime failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    /// There is no such program.
    #[error("{action}: exec: {binary:?}: executable file not found in $PATH")]
    Missing {
        /// What was to be done, in containerd's words.
        action: &'static str,
        /// The name or path.
        binary: String,
    },
    /// It could not be executed.
    #[error("{action}")]
    Spawn {
        /// What was to be done.
        action: &'static str,
        /// The step that failed.
        source: SpawnError,
    },
    /// What it needs could not be set up, or its end not be seen.
    #[error("{action}: {step}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// What failed.
        step: &'static str,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// It said no.
    #[error("{action}: {message}")]
    Failed {
        /// What was to be done.
        action: &'static str,
        /// The last error of its log, or else its exit and output.
        message: String,
        /// A signal ended it, so it may have left things half done.
        killed: bool,
    },
    /// It did not end in time, and was killed. A runtime hangs when what it works on does: a process or a filesystem that
    /// sleeps in the kernel, a cgroup that somebody has frozen.
    #[error("{action}: {binary} did not end within {} ms and was killed (its state was {state})", limit.as_millis())]
    TimedOut {
        /// What was to be done.
        action: &'static str,
        /// The name or path.
        binary: String,
        /// The time that it had.
        limit: Duration,
        /// What it was doing when its time was over, as the kernel names it (proc_pid_stat(5)): `D` for sleeping in the
        /// kernel.
        state: char,
    },
}

impl RuntimeError {
    /// Whether the runtime came to no end of its own, so that nobody knows what it has done.
    pub(crate) fn cut_short(&self) -> bool {
        match self {
            RuntimeError::Failed { killed, .. } => *killed,
            RuntimeError::TimedOut { .. } | RuntimeError::Io { .. } => true,
            RuntimeError::Missing { .. } | RuntimeError::Spawn { .. } => false,
        }
    }
}

impl Coded for RuntimeError {
    fn code(&self) -> ErrorCode {
        match self {
            // containerd gives these no class, and clients know them as Unknown.
            RuntimeError::Missing { .. } | RuntimeError::Failed { .. } => ErrorCode::Unknown,
            RuntimeError::Spawn { .. } | RuntimeError::Io { .. } => ErrorCode::Internal,
            RuntimeError::TimedOut { .. } => ErrorCode::DeadlineExceeded,
        }
    }
}

/// How runtimes of one container are called.
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    /// The name or path of the program.
    pub(crate) binary: String,
    /// `--root`: its state of this namespace.
    pub(crate) root: PathBuf,
    /// The bundle, where its log goes.
    pub(crate) bundle: PathBuf,
    /// `--systemd-cgroup`.
    pub(crate) systemd_cgroup: bool,
    /// The `oom_score_adj` that the shim had before it changed its own.
    pub(crate) oom_score_adj: Option<i32>,
    /// When a call is given up.
    pub(crate) deadline: Deadline,
}

/// The descriptors that the runtime hands on to the container's process; `None` is `/dev/null`.
#[derive(Debug, Default)]
pub(crate) struct ChildStdio {
    /// Standard input.
    pub(crate) stdin: Option<OwnedFd>,
    /// Standard output.
    pub(crate) stdout: Option<OwnedFd>,
    /// Standard error.
    pub(crate) stderr: Option<OwnedFd>,
}

/// What standard input and output of the runtime itself are.
enum Io {
    /// Those of the container's process, which inherits them. They are closed on our side by the call.
    Container(ChildStdio),
    /// Its output is ours to read.
    Captured {
        /// What it reads.
        input: Option<File>,
    },
}

impl Runtime {
    /// The same runtime, whose calls are given up at `deadline`.
    pub(crate) fn until(&self, deadline: Deadline) -> Runtime {
        Runtime { deadline, ..self.clone() }
    }

    /// The folder in which it keeps what it knows of a container: runc and crun have one for each, by its id.
    pub(crate) fn state_of(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// `create`: leaves the init process behind, waiting for `start`; its pid is in the pid file.
    pub(crate) async fn create(
        &self,
        id: &str,
        pid_file: &Path,
        console_socket: Option<&Path>,
        flags: &[&str],
        stdio: ChildStdio,
    ) -> Result<(), RuntimeError> {
        let mut arguments: Vec<OsString> = vec!["create".into()];
        arguments.extend(flags.iter().map(OsString::from));
        self.make("OCI runtime create failed", arguments, id, pid_file, console_socket, stdio).await
    }

    /// `restore`: leaves the init process behind, running; its pid is in the pid file.
    pub(crate) async fn restore(
        &self,
        id: &str,
        pid_file: &Path,
        console_socket: Option<&Path>,
        flags: &[OsString],
        stdio: ChildStdio,
    ) -> Result<(), RuntimeError> {
        // Its own process is to be nobody's subreaper: what it leaves is ours.
        let mut arguments: Vec<OsString> = ["restore", "--detach", "--no-subreaper"].map(Into::into).into();
        arguments.extend_from_slice(flags);
        self.make("OCI runtime restore failed", arguments, id, pid_file, console_socket, stdio).await
    }

    /// A call that makes a container and leaves its init process behind.
    async fn make(
        &self,
        action: &'static str,
        mut arguments: Vec<OsString>,
        id: &str,
        pid_file: &Path,
        console_socket: Option<&Path>,
        stdio: ChildStdio,
    ) -> Result<(), RuntimeError> {
        arguments.extend(["--bundle".into(), (&self.bundle).into(), "--pid-file".into(), pid_file.into()]);
        // Whatever it holds is the pid of another process.
        let _ = std::fs::remove_file(pid_file);
        if let Some(socket) = console_socket {
            arguments.extend(["--console-socket".into(), socket.into()]);
        }
        arguments.push(id.into());
        let io = if console_socket.is_some() { Io::Captured { input: None } } else { Io::Container(stdio) };
        self.call(action, &self.bundle.join("log.json"), &arguments, io).await
    }

    /// `exec --detach`: leaves a further process behind; its pid is in the pid file.
    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &[u8],
        pid_file: &Path,
        console_socket: Option<&Path>,
        stdio: ChildStdio,
    ) -> Result<(), RuntimeError> {
        const ACTION: &str = "OCI runtime exec failed";
        let specification = self.bundle.join(format!("exec-{exec_id}.process.json"));
        let io = |step| move |source| RuntimeError::Io { action: ACTION, step, source };
        write_private(&specification, process).map_err(io("write process specification"))?;
        let mut arguments: Vec<OsString> = vec!["exec".into(), "--process".into(), (&specification).into()];
        if let Some(socket) = console_socket {
            arguments.extend(["--console-socket".into(), socket.into()]);
        }
        arguments.extend(["--detach".into(), "--pid-file".into(), pid_file.into(), id.into()]);
        let _ = std::fs::remove_file(pid_file);
        let io = if console_socket.is_some() { Io::Captured { input: None } } else { Io::Container(stdio) };
        // Execs run in parallel, so each has a log of its own: in a shared one the last error may be
        // another's.
        let log = self.bundle.join(format!("exec-{exec_id}.log.json"));
        let result = self.call(ACTION, &log, &arguments, io).await;
        let _ = std::fs::remove_file(&specification);
        let _ = std::fs::remove_file(&log);
        result.map(drop)
    }

    /// `start`, `pause`, `resume`, `kill`, `delete`, … : an operation of which only success matters.
    pub(crate) async fn simple(
        &self,
        action: &'static str,
        arguments: &[&OsStr],
    ) -> Result<(), RuntimeError> {
        self.with_input(action, arguments, None).await
    }

    /// `update`: new limits, as a JSON document of `LinuxResources`.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), RuntimeError> {
        const ACTION: &str = "OCI runtime update failed";
        let input = memory_file()
            .and_then(|mut file| {
                file.write_all(resources)?;
                file.rewind()?;
                Ok(file)
            })
            .map_err(|source| RuntimeError::Io { action: ACTION, step: "prepare resources", source })?;
        let arguments = ["update", "--resources=-", id].map(OsStr::new);
        self.with_input(ACTION, &arguments, Some(input)).await
    }

    async fn with_input(
        &self,
        action: &'static str,
        arguments: &[&OsStr],
        input: Option<File>,
    ) -> Result<(), RuntimeError> {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let log = self.bundle.join(format!("call-{}.log.json", CALLS.fetch_add(1, Ordering::Relaxed)));
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let result = self.call(action, &log, &arguments, Io::Captured { input }).await;
        let _ = std::fs::remove_file(&log);
        result.map(drop)
    }

    /// Runs the runtime to its end.
    async fn call(
        &self,
        action: &'static str,
        log: &Path,
        arguments: &[OsString],
        io: Io,
    ) -> Result<(), RuntimeError> {
        let failed = |step| move |source| RuntimeError::Io { action, step, source };
        let _busy = Busy::begin();
        // One of an earlier call would explain this one, and a link there would be followed by the runtime.
        let _ = std::fs::remove_file(log);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = find_program(OsStr::new(&self.binary), &path)
            .ok_or_else(|| RuntimeError::Missing { action, binary: self.binary.clone() })?;
        let output = memory_file().map_err(failed("prepare output"))?;
        let child =
            {
                let mut command = self.command(&program, log, arguments).map_err(|nul| {
                    RuntimeError::Failed { action, message: nul.to_string(), killed: false }
                })?;
                match &io {
                    Io::Container(stdio) => {
                        let streams = [&stdio.stdin, &stdio.stdout, &stdio.stderr];
                        for (number, stream) in (0..).zip(streams) {
                            if let Some(stream) = stream {
                                command.descriptor(number, stream.as_fd());
                            }
                        }
                    }
                    Io::Captured { input } => {
                        if let Some(input) = input {
                            command.descriptor(0, input.as_fd());
                        }
                        command.descriptor(1, output.as_fd()).descriptor(2, output.as_fd());
                    }
                }
                command.spawn().map_err(|source| RuntimeError::Spawn { action, source })?
            };
        // The ends of the container must not stay open here, or nobody ever sees them closed.
        drop(io);
        // Whoever gives this call up wants it to have no effect any more.
        let child = KilledOnDrop::new(Awaited::child(child).map_err(failed("watch the runtime"))?);
        let begun = Instant::now();
        let Some(ended) = self.deadline.bound(child.exit()).await else {
            let (binary, limit, state) = (self.binary.clone(), begun.elapsed(), state_of(child.pid));
            let _ = child.signal(nix::libc::SIGKILL);
            // Gone before anybody looks at what it has left, unless it sleeps in the kernel.
            let _ = Deadline::within(DEATH).bound(child.exit()).await;
            return Err(RuntimeError::TimedOut { action, binary, limit, state });
        };
        let (exit, _) = ended.map_err(failed("wait for the runtime"))?;
        if exit.success() {
            return Ok(());
        }
        let killed = matches!(exit, Exit::Signal(_));
        Err(RuntimeError::Failed { action, message: self.explain(exit, log, output.as_fd()), killed })
    }

    fn command(
        &self,
        program: &Path,
        log: &Path,
        arguments: &[OsString],
    ) -> Result<Command<'_>, std::ffi::NulError> {
        let mut command = Command::new(program)?;
        command.inherit_environment(&NOT_FOR_RUNTIMES);
        command.argument("--root")?.argument(&self.root)?;
        command.argument("--log")?.argument(log)?.argument("--log-format")?.argument("json")?;
        if self.systemd_cgroup {
            command.argument("--systemd-cgroup")?;
        }
        for argument in arguments {
            command.argument(argument)?;
        }
        // The runtime must not outlive a shim that would have to learn its result.
        command.death_signal(nix::libc::SIGKILL).restore_huge_pages();
        if let Some(score) = self.oom_score_adj {
            command.oom_score_adj(score);
        }
        Ok(command)
    }

    /// The text of a failure as containerd words it: the last error in the log, or if there is none, how the
    /// program ended and what it printed.
    fn explain(&self, exit: Exit, log: &Path, output: BorrowedFd<'_>) -> String {
        let how = match exit {
            Exit::Code(code) => format!("exit status {code}"),
            Exit::Signal(signal) => format!("signal: {signal}"),
        };
        let mut ended = format!("{} did not terminate successfully: {how}", self.binary);
        let printed = read_output(output);
        if !printed.trim().is_empty() {
            ended = format!("{ended}: {}", printed.trim_end());
        }
        match last_error(log) {
            Ok(Some(message)) => message,
            Ok(None) => ended,
            Err(error) => format!("unable to retrieve OCI runtime error ({error}): {ended}"),
        }
    }
}

/// The state of a process, as one letter; `?` when there is no such process.
fn state_of(pid: i32) -> char {
    let line = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    line.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?')
}

/// The pid in a pid file.
pub(crate) fn read_pid_file(path: &Path) -> io::Result<i32> {
    let text = String::from_utf8(read_regular(path, MAX_PID_FILE)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let pid: i32 = text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if pid > 0 { Ok(pid) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// A file without a name: what a runtime prints into it never blocks it.
fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create(c"runtime", MFdFlags::MFD_CLOEXEC)?))
}

fn read_output(output: BorrowedFd<'_>) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::from(output.try_clone_to_owned()?);
        file.rewind()?;
        let mut bytes = Vec::new();
        file.take(MAX_TEXT).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// A line of a runtime's JSON log.
#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The last error of a runtime's log.
fn last_error(log: &Path) -> Result<Option<String>, String> {
    let open = |error: io::Error| format!("open {}: {}", log.display(), go_words(&error));
    let bytes = match read_regular(log, MAX_TEXT) {
        // Only a runtime that has gone mad writes so much.
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => return Ok(None),
        result => result.map_err(open)?,
    };
    let mut last = None;
    for line in serde_json::Deserializer::from_slice(&bytes).into_iter::<LogLine>() {
        let line = line.map_err(|error| error.to_string())?;
        if line.level == "error" {
            last = Some(line.msg.trim().to_owned()).filter(|message| !message.is_empty());
        }
    }
    Ok(last)
}

/// The text that Go has for an error of the kernel: clients look for some of them.
fn go_words(error: &io::Error) -> String {
    let number = error.raw_os_error().map(nix::errno::Errno::from_raw);
    number.map_or_else(|| error.to_string(), |number| number.desc().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_counts() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log.json");
        assert!(last_error(&log).unwrap_err().ends_with("log.json: no such file or directory"));
        std::fs::write(&log, "").unwrap();
        assert_eq!(last_error(&log), Ok(None));
        std::fs::write(
            &log,
            "{\"level\":\"error\",\"msg\":\"first\",\"time\":\"x\"}\n{\"msg\": \" the second one\\n\", \"level\": \"error\"}\n{\"level\":\"warning\",\"msg\":\"w\"}\n",
        )
        .unwrap();
        assert_eq!(last_error(&log), Ok(Some("the second one".to_owned())));
        std::fs::write(&log, "no json").unwrap();
        assert!(last_error(&log).is_err());
    }

    #[test]
    fn only_a_positive_number_is_a_pid() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        std::fs::write(&file, "17\n").unwrap();
        assert_eq!(read_pid_file(&file).unwrap(), 17);
        for nonsense in ["", "0", "-1", "99999999999", "x", "1 2"] {
            std::fs::write(&file, nonsense).unwrap();
            assert!(read_pid_file(&file).is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn a_runtime_that_hangs_is_killed_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("hangs");
        std::fs::write(&script, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = Runtime {
            binary: script.display().to_string(),
            root: folder.path().join("root"),
            bundle: folder.path().to_owned(),
            systemd_cgroup: false,
            oom_score_adj: None,
            deadline: Deadline::default(),
        };
        let error = crate::executor::run(async move {
            let runtime = runtime.until(Deadline::within(Duration::from_millis(100)));
            runtime.simple("it failed", &[OsStr::new("kill")]).await.unwrap_err()
        });
        assert_eq!(error.code(), ErrorCode::DeadlineExceeded);
        assert!(error.cut_short());
        let text = error.to_string();
        assert!(text.starts_with("it failed: ") && text.contains("did not end within"), "{text}");
        assert!(text.ends_with("(its state was S)"), "{text}");
    }
}
