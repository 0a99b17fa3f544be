//! Checkpoints: what the client asks for, as arguments of the runtime, which leaves the work to criu.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use davit_proto::any;
use davit_proto::containerd::runc::v1::{CheckpointOptions, Options};
use davit_proto::containerd::task::v3::{CheckpointTaskRequest, CreateTaskRequest};
use davit_sys::fs::read_regular;

use crate::error::TaskError;
use crate::runtime::{ChildStdio, Runtime, RuntimeError};
use crate::state::Checkpoint;

/// The most of criu's log that is looked at. It writes some 50 bytes for each object of a process.
const MAX_LOG: u64 = 16 << 20;
/// The errors of that log that become part of ours: its last ones, for criu goes on after some.
const MAX_ERRORS: usize = 3;

/// What the new container is to be restored from; `None` if it is to be started afresh.
pub(crate) fn of_request(request: &CreateTaskRequest, options: &Options) -> Option<Checkpoint> {
    (!request.checkpoint.is_empty()).then(|| Checkpoint {
        image: request.checkpoint.clone(),
        parent: request.parent_checkpoint.clone(),
        work: options.criu_work_path.clone(),
        no_pivot: options.no_pivot_root,
    })
}

/// Restores a container, which runs then.
pub(crate) async fn restore(
    runtime: &Runtime,
    id: &str,
    checkpoint: &Checkpoint,
    pid_file: &Path,
    console_socket: Option<&Path>,
    ends: ChildStdio,
) -> Result<(), TaskError> {
    let work = WorkFolder::new(runtime, &checkpoint.work);
    let mut flags: Vec<OsString> = vec!["--image-path".into(), (&checkpoint.image).into()];
    flags.extend(["--work-path".into(), (&work.path).into()]);
    if !checkpoint.parent.is_empty() {
        flags.extend(["--parent-path".into(), (&checkpoint.parent).into()]);
    }
    if checkpoint.no_pivot {
        flags.push("--no-pivot".into());
    }
    let restored = runtime.restore(id, pid_file, console_socket, &flags, ends).await;
    Ok(restored.map_err(|error| explain(error, &work.keep(runtime, "restore")))?)
}

/// Writes a checkpoint of a container to `request.path`.
pub(crate) async fn run(
    runtime: &Runtime,
    id: &str,
    request: &CheckpointTaskRequest,
) -> Result<(), TaskError> {
    let options = match &request.options {
        Some(options) => any::unpack::<CheckpointOptions>(options)
            .map_err(|source| TaskError::Decode { what: "checkpoint options", source })?
            .ok_or_else(|| TaskError::OptionsType { type_url: options.type_url.clone() })?,
        None => CheckpointOptions::default(),
    };
    let work = WorkFolder::new(runtime, &options.work_path);
    let arguments = arguments(&options, &request.path, &work.path, id);
    let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
    let written = runtime.simple("checkpoint failed", &arguments).await;
    Ok(written.map_err(|error| explain(error, &work.keep(runtime, "dump")))?)
}

fn arguments(options: &CheckpointOptions, path: &str, work: &Path, id: &str) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["checkpoint".into(), "--image-path".into(), path.into()];
    arguments.extend(["--work-path".into(), work.into()]);
    let flags = [
        (!options.exit, "--leave-running"),
        (options.open_tcp, "--tcp-established"),
        (options.external_unix_sockets, "--ext-unix-sk"),
        (options.terminal, "--shell-job"),
        (options.file_locks, "--file-locks"),
    ];
    arguments.extend(flags.into_iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| flag.into()));
    for namespace in &options.empty_namespaces {
        arguments.extend(["--empty-ns".into(), namespace.into()]);
    }
    arguments.push(id.into());
    arguments
}

/// Where criu works and writes its log. One that nobody has asked for is in the bundle, and goes with this.
struct WorkFolder {
    path: PathBuf,
    ours: bool,
}

impl WorkFolder {
    fn new(runtime: &Runtime, given: &str) -> WorkFolder {
        let ours = given.is_empty();
        let path = if ours { runtime.bundle.join("criu-work") } else { PathBuf::from(given) };
        WorkFolder { path, ours }
    }

    /// The log of a failure, which is worth more than the rest of the folder: it stays in the bundle.
    fn keep(&self, runtime: &Runtime, name: &str) -> PathBuf {
        let log = self.path.join(format!("{name}.log"));
        let kept = runtime.bundle.join(format!("criu-{name}.log"));
        match self.ours && std::fs::rename(&log, &kept).is_ok() {
            true => kept,
            false => log,
        }
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if self.ours {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Says what criu has said, to which runtimes only point, and where the rest of it is.
fn explain(error: RuntimeError, log: &Path) -> RuntimeError {
    let RuntimeError::Failed { action, mut message, killed } = error else { return error };
    if message.contains("exec: \"criu\": executable file not found") {
        message.push_str(" (criu is not installed: apt-get install criu)");
    } else if let Ok(bytes) = read_regular(log, MAX_LOG) {
        // The runtime's second line is the place of the log, which may not be there any more.
        message.truncate(message.find('\n').unwrap_or(message.len()));
        for line in errors(&String::from_utf8_lossy(&bytes)) {
            message.push_str("; ");
            message.push_str(line);
        }
        message.push_str(&format!(" path= {}", log.display()));
    }
    RuntimeError::Failed { action, message, killed }
}

/// What criu calls errors, without times and its own file names: `(00.150806) Error (criu/files-reg.c:1790): …`. It
/// goes on after some of them; what ended it comes last.
fn errors(log: &str) -> Vec<&str> {
    let lines = log.lines().filter_map(|line| line.split_once(" Error ")?.1.split_once("): "));
    let lines: Vec<&str> = lines.map(|(_, text)| text.trim()).collect();
    lines[lines.len().saturating_sub(MAX_ERRORS)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_flags() {
        let line = |options: CheckpointOptions, path: &str, work: &str| {
            arguments(&options, path, Path::new(work), "box").join(OsStr::new(" ")).into_string().unwrap()
        };
        let options = CheckpointOptions {
            exit: true,
            open_tcp: true,
            empty_namespaces: vec!["network".into()],
            ..CheckpointOptions::default()
        };
        assert_eq!(
            line(options, "/image", "/work"),
            "checkpoint --image-path /image --work-path /work --tcp-established --empty-ns network box"
        );
        assert_eq!(
            line(CheckpointOptions::default(), "/i", "/w"),
            "checkpoint --image-path /i --work-path /w --leave-running box"
        );
    }

    #[test]
    fn a_failure_says_what_criu_said() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("dump.log");
        let failed = |message: &str| RuntimeError::Failed {
            action: "checkpoint failed",
            message: message.into(),
            killed: false,
        };
        let text = "criu failed: type NOTIFY errno 0\nlog file: /somewhere/dump.log";
        assert_eq!(explain(failed(text), &log).to_string(), format!("checkpoint failed: {text}"));
        let lines = "(00.04) Warn  (criu/x.c:1): hm\n(00.05) Error (criu/util.c:1): one\n\
                     (00.15) Error (criu/files-reg.c:1790): Can't lookup mount=27 for fd=1\n\
                     (00.16) Error (criu/cr-dump.c:1698): three\n(00.2) Error (criu/cr-dump.c:2): Dumping FAILED.\n";
        std::fs::write(&log, lines).unwrap();
        assert_eq!(
            explain(failed(text), &log).to_string(),
            format!(
                "checkpoint failed: criu failed: type NOTIFY errno 0; Can't lookup mount=27 for fd=1; three; \
                 Dumping FAILED. path= {}",
                log.display()
            )
        );
        let absent = "CRIU version check failed: exec: \"criu\": executable file not found in $PATH";
        assert!(
            explain(failed(absent), &log)
                .to_string()
                .ends_with("(criu is not installed: apt-get install criu)")
        );
    }
}
