//! What the calls of [`Tasks`](super::Tasks) fail with.
//!
//! The answer of a shim reaches the client with its code and its text untouched: clients read exit codes 126
//! and 127 out of runc's words.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use davit_model::identifier::IdentifierError;
use davit_model::{Coded, ErrorCode};
use davit_shim_protocol::bootstrap::StartResultError;
use davit_shim_protocol::bundle::BundleError;
use davit_shim_protocol::client::CallError;

/// Why a call on a task failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such task.
    #[error("task {id} not found")]
    NotFound {
        /// The container.
        id: String,
    },
    /// The container has a task, or is just getting one.
    #[error("task {id}")]
    AlreadyExists {
        /// The container.
        id: String,
    },
    /// The container's id is no identifier.
    #[error("invalid task id {id}")]
    TaskId {
        /// What was given.
        id: String,
        /// The rule that it breaks.
        source: IdentifierError,
    },
    /// The namespace is no identifier.
    #[error("invalid namespace {namespace}")]
    Namespace {
        /// What was given.
        namespace: String,
        /// The rule that it breaks.
        source: IdentifierError,
    },
    /// A call that needs an exec's id has none.
    #[error("exec id cannot be empty")]
    NoExecId,
    /// The exec's id is no identifier.
    #[error("invalid exec id {id}")]
    ExecId {
        /// What was given.
        id: String,
        /// The rule that it breaks.
        source: IdentifierError,
    },
    /// The container's own id is that of its init process.
    #[error("exec {id}")]
    ExecExists {
        /// What was given.
        id: String,
    },
    /// The shim of a container that was found at start does not answer; it is tried again and again.
    #[error("the shim of task {id} does not answer")]
    Unreachable {
        /// The container.
        id: String,
    },
    /// The connection to the shim ended during the call.
    #[error("the shim of task {id} is gone")]
    ShimGone {
        /// The container.
        id: String,
    },
    /// The shim is gone, and what it left of the container does not go away: a process that sleeps in the kernel, an OCI
    /// runtime that hangs. It is tried again and again.
    #[error("the shim of task {id} is gone, and what it left cannot be removed yet")]
    NotCleanedUp {
        /// The container.
        id: String,
    },
    /// No answer within the bound of the call.
    #[error("the shim of task {id} did not answer {method} in time")]
    Timeout {
        /// The container.
        id: String,
        /// The method.
        method: &'static str,
    },
    /// The shim refused. Its text stands alone, unchanged.
    #[error("{message}")]
    Shim {
        /// The class that the shim gave.
        code: ErrorCode,
        /// The shim's words.
        message: String,
    },
    /// The call could not be made, or its answer not be read.
    #[error("call {method} of task {id}")]
    Protocol {
        /// The container.
        id: String,
        /// The method.
        method: &'static str,
        /// What is wrong.
        source: CallError,
    },
    /// The shim refused to create the task. containerd's words before the shim's.
    #[error("failed to create shim task: {message}")]
    Create {
        /// The class that the shim gave.
        code: ErrorCode,
        /// The shim's words.
        message: String,
    },
    /// There is no shim for the task.
    #[error("failed to start shim")]
    StartShim {
        /// Why.
        source: ShimError,
    },
    /// The bundle cannot be made.
    #[error("bundle of task {id}")]
    Bundle {
        /// The container.
        id: String,
        /// Why.
        source: BundleError,
    },
    /// There is no place for a checkpoint.
    #[error("folder for a checkpoint")]
    CheckpointFolder {
        /// Why.
        source: BundleError,
    },
    /// What a restored container had written cannot be put into its root filesystem.
    #[error("unpacking of rootfs-diff archive {} failed", path.display())]
    RootfsDiff {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: davit_snapshotter::layer::Error,
    },
    /// The task of a container in a sandbox was to join a shim that cannot be reached this way.
    #[error("task API address {address:?} is not of the form ttrpc+unix://PATH")]
    TaskApiAddress {
        /// What was given.
        address: String,
    },
    /// The answer of one call that served several callers.
    #[error(transparent)]
    Shared {
        /// The answer.
        source: std::sync::Arc<Error>,
    },
    /// The shim of the container is another project's, or from before there were upgrades.
    #[error("the shim of task {id} knows no upgrade: it is another project's, or too old")]
    NotUpgradable {
        /// The container.
        id: String,
    },
    /// The owner of the container ended without an answer: the daemon is stopping.
    #[error("the daemon is shutting down")]
    Stopping,
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::NotFound { .. } => ErrorCode::NotFound,
            Error::AlreadyExists { .. } | Error::ExecExists { .. } => ErrorCode::AlreadyExists,
            Error::TaskId { .. }
            | Error::Namespace { .. }
            | Error::NoExecId
            | Error::ExecId { .. }
            | Error::TaskApiAddress { .. } => ErrorCode::InvalidArgument,
            Error::Unreachable { .. }
            | Error::ShimGone { .. }
            | Error::NotCleanedUp { .. }
            | Error::Stopping => ErrorCode::Unavailable,
            Error::Timeout { .. } => ErrorCode::DeadlineExceeded,
            Error::NotUpgradable { .. } => ErrorCode::Unimplemented,
            Error::Shim { code, .. } | Error::Create { code, .. } => *code,
            Error::Protocol { source, .. } => source.code(),
            Error::Shared { source } => source.code(),
            Error::StartShim { source } => source.code(),
            Error::Bundle { source, .. } | Error::CheckpointFolder { source } => source.code(),
            Error::RootfsDiff { source, .. } => source.code(),
        }
    }

    fn reason(&self) -> Option<&'static str> {
        match self {
            Error::Unreachable { .. } => Some("SHIM_UNREACHABLE"),
            Error::ShimGone { .. } => Some("SHIM_GONE"),
            Error::NotCleanedUp { .. } => Some("NOT_CLEANED_UP"),
            Error::Timeout { .. } => Some("SHIM_TIMEOUT"),
            // The shim answers, so what it called has not.
            Error::Shim { code: ErrorCode::DeadlineExceeded, .. }
            | Error::Create { code: ErrorCode::DeadlineExceeded, .. } => Some("RUNTIME_TIMEOUT"),
            Error::StartShim { source: ShimError::Timeout { .. } } => Some("SHIM_START_TIMEOUT"),
            Error::Shared { source } => source.reason(),
            Error::NotFound { .. }
            | Error::AlreadyExists { .. }
            | Error::TaskId { .. }
            | Error::Namespace { .. }
            | Error::NoExecId
            | Error::ExecId { .. }
            | Error::ExecExists { .. }
            | Error::Shim { .. }
            | Error::Protocol { .. }
            | Error::Create { .. }
            | Error::StartShim { .. }
            | Error::Bundle { .. }
            | Error::CheckpointFolder { .. }
            | Error::RootfsDiff { .. }
            | Error::TaskApiAddress { .. }
            | Error::NotUpgradable { .. }
            | Error::Stopping => None,
        }
    }
}

/// Why a shim binary could not be found, run or understood.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// A runtime's name with a slash that is no absolute path, or with fewer than two parts.
    #[error(
        "failed to resolve runtime path: invalid runtime name {runtime}, correct runtime name should be either format like `io.containerd.runc.v2` or a full path to the binary"
    )]
    RuntimeName {
        /// What was given.
        runtime: String,
    },
    /// No name at all.
    #[error("failed to resolve runtime path: no runtime name")]
    NoRuntimeName,
    /// The path that was given as runtime is not there.
    #[error("failed to resolve runtime path: invalid custom binary path {}", path.display())]
    RuntimePath {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No such binary beside the daemon nor on `PATH`. containerd's words.
    #[error(
        "failed to resolve runtime path: runtime {runtime:?} binary not installed {binary:?}: file does not exist"
    )]
    NotInstalled {
        /// The runtime's name.
        runtime: String,
        /// The binary that was looked for.
        binary: String,
    },
    /// The pipe for the shim's log cannot be made.
    #[error("open shim log pipe {}", path.display())]
    Log {
        /// The pipe.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The binary cannot be run.
    #[error("run {} {action}", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// `start`, `delete` or `-info`.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// Its pipes broke.
    #[error("read the output of {} {action}", binary.display())]
    Read {
        /// The binary.
        binary: PathBuf,
        /// `start`, `delete` or `-info`.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// It did not end in time and was killed. A background process that holds its output also counts.
    #[error("{} {action} did not end within {} s: {output}", binary.display(), limit.as_secs())]
    Timeout {
        /// The binary.
        binary: PathBuf,
        /// `start`, `delete` or `-info`.
        action: &'static str,
        /// The time it had.
        limit: std::time::Duration,
        /// What it had said until then.
        output: String,
    },
    /// It said more than a shim may.
    #[error("{} {action} wrote more than {limit} bytes: {output}", binary.display())]
    TooMuchOutput {
        /// The binary.
        binary: PathBuf,
        /// `start`, `delete` or `-info`.
        action: &'static str,
        /// The bound.
        limit: usize,
        /// The beginning of what it said.
        output: String,
    },
    /// It failed; what it said comes first, as in containerd.
    #[error("{action} failed: {output}: {status}")]
    Failed {
        /// `start`, `delete` or `-info`.
        action: &'static str,
        /// What it said.
        output: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// What it said is no address of a shim.
    #[error("start failed: output {output:?}")]
    Nonsense {
        /// What it said.
        output: String,
        /// Why it is none.
        source: StartResultError,
    },
    /// What it printed is not the message that it should be.
    #[error("output of shim {action}")]
    Answer {
        /// `delete` or `-info`.
        action: &'static str,
        /// Why not.
        source: prost::DecodeError,
    },
    /// The address is of a kind that is not spoken here (gRPC, vsock).
    #[error("shim address {address:?} with protocol {protocol:?} is not supported")]
    Unsupported {
        /// The address.
        address: String,
        /// The protocol.
        protocol: String,
    },
    /// Nobody listens at the address that the shim named.
    #[error("connect to shim at {address}")]
    Connect {
        /// The address.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The bundle cannot hold what a restart needs.
    #[error("record the shim in its bundle")]
    Record {
        /// Why.
        source: BundleError,
    },
}

impl Coded for ShimError {
    fn code(&self) -> ErrorCode {
        match self {
            ShimError::RuntimeName { .. }
            | ShimError::NoRuntimeName
            | ShimError::RuntimePath { .. }
            | ShimError::NotInstalled { .. } => ErrorCode::InvalidArgument,
            ShimError::Timeout { .. } => ErrorCode::DeadlineExceeded,
            ShimError::Unsupported { .. } => ErrorCode::Unimplemented,
            ShimError::Connect { .. } => ErrorCode::Unavailable,
            ShimError::Record { source } => source.code(),
            ShimError::Log { .. }
            | ShimError::Spawn { .. }
            | ShimError::Read { .. }
            | ShimError::TooMuchOutput { .. }
            | ShimError::Failed { .. }
            | ShimError::Nonsense { .. }
            | ShimError::Answer { .. } => ErrorCode::Unknown,
        }
    }
}
