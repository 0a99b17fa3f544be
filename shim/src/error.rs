//! What a call of the task service fails with, in the words of containerd's shim: clients look for them.

use std::io;
use std::path::PathBuf;

use davit_model::error::chain;
use davit_model::identifier::IdentifierError;
use davit_model::{Coded, ErrorCode};
use davit_shim_protocol::frame::RpcError;
use davit_shim_protocol::journal::JournalError;

use crate::process::State;
use crate::runtime::RuntimeError;
use crate::stdio::StdioError;
use crate::upgrade::UpgradeError;

/// Why a task call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// No method of this name.
    #[error("{service}/{method}")]
    Unimplemented {
        /// The service.
        service: String,
        /// The method.
        method: String,
    },
    /// A message that is none.
    #[error("unmarshal {what}")]
    Decode {
        /// Which message.
        what: &'static str,
        /// Why.
        source: prost::DecodeError,
    },
    /// A JSON document that is none.
    #[error("unmarshal {what}")]
    Json {
        /// Which document.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// An id that is not safe to use.
    #[error(transparent)]
    Identifier(#[from] IdentifierError),
    /// A bundle that is no absolute path.
    #[error("bundle {path:?} is not absolute")]
    Bundle {
        /// The path.
        path: String,
    },
    /// Options of a type for another runtime.
    #[error("unsupported option type {type_url:?}")]
    OptionsType {
        /// The type.
        type_url: String,
    },
    /// No such container here.
    #[error("container not created")]
    NotCreated,
    /// A container of this id is here already.
    #[error("container {id}")]
    ContainerExists {
        /// The id.
        id: String,
    },
    /// No such exec.
    #[error("process does not exist {id}")]
    NoProcess {
        /// The exec's id.
        id: String,
    },
    /// An exec of this id is there already.
    #[error("id {id}")]
    ExecExists {
        /// The exec's id.
        id: String,
    },
    /// The last container of the shim is gone, and soon it is too.
    #[error("the shim is ending")]
    Ending,
    /// The container is on its way out.
    #[error("container {id} init process is not running")]
    InitNotRunning {
        /// The container's id.
        id: String,
    },
    /// The process is in a state in which this cannot be done.
    #[error("cannot {operation} a {state} {what}", state = state.word())]
    State {
        /// What was asked.
        operation: &'static str,
        /// The state.
        state: State,
        /// `process`, `container` or `task`.
        what: &'static str,
    },
    /// The process to signal has not been started.
    #[error("process not created")]
    ProcessNotStarted,
    /// The process to signal is gone.
    #[error("process already finished")]
    Finished,
    /// The runtime does not know the container any more.
    #[error("no such container")]
    NoContainer,
    /// The kernel refused the signal.
    #[error("exec kill error")]
    Signal {
        /// Its answer.
        source: io::Error,
    },
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The streams cannot be had.
    #[error("failed to create init process I/O")]
    Stdio(#[source] StdioError),
    /// No terminal arrived.
    #[error("failed to retrieve console master")]
    Console {
        /// Why.
        source: io::Error,
    },
    /// The root filesystem cannot be mounted.
    #[error("failed to mount rootfs component: {reason}")]
    Mount {
        /// Why, as the helper process put it.
        reason: String,
    },
    /// The root filesystem cannot be unmounted.
    #[error("failed rootfs umount: {reason}")]
    Unmount {
        /// Why, as the helper process put it.
        reason: String,
    },
    /// What sleeps in the kernel, most likely on a disk or a server that does not answer.
    #[error("{what} did not end in time")]
    TimedOut {
        /// What was done.
        what: &'static str,
    },
    /// The journal cannot be opened.
    #[error("open journal")]
    Journal(#[from] JournalError),
    /// The upgrade did not happen.
    #[error("upgrade")]
    Upgrade(#[from] UpgradeError),
    /// A file of the bundle or of the kernel.
    #[error("{step} {path}", path = path.display())]
    Io {
        /// What was done with it.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// The container has no cgroup to look at.
    #[error("cgroup does not exist")]
    NoCgroup,
}

impl Coded for TaskError {
    fn code(&self) -> ErrorCode {
        match self {
            TaskError::Unimplemented { .. } => ErrorCode::Unimplemented,
            TaskError::Decode { .. }
            | TaskError::Json { .. }
            | TaskError::Identifier(_)
            | TaskError::Bundle { .. }
            | TaskError::OptionsType { .. } => ErrorCode::InvalidArgument,
            TaskError::NotCreated
            | TaskError::NoProcess { .. }
            | TaskError::Finished
            | TaskError::NoContainer
            | TaskError::NoCgroup => ErrorCode::NotFound,
            TaskError::ContainerExists { .. } | TaskError::ExecExists { .. } => ErrorCode::AlreadyExists,
            TaskError::State { state: State::Deleted, .. } => ErrorCode::NotFound,
            TaskError::State { .. } | TaskError::InitNotRunning { .. } | TaskError::ProcessNotStarted => {
                ErrorCode::FailedPrecondition
            }
            TaskError::Ending => ErrorCode::Unavailable,
            TaskError::TimedOut { .. } => ErrorCode::DeadlineExceeded,
            TaskError::Runtime(error) => error.code(),
            TaskError::Stdio(error) => error.code(),
            TaskError::Journal(error) => error.code(),
            TaskError::Upgrade(error) => error.code(),
            TaskError::Signal { .. }
            | TaskError::Console { .. }
            | TaskError::Mount { .. }
            | TaskError::Unmount { .. }
            | TaskError::Io { .. } => ErrorCode::Unknown,
        }
    }
}

impl From<TaskError> for RpcError {
    /// The class goes out as the code, and, as containerd does it, as the end of the text.
    fn from(error: TaskError) -> RpcError {
        let code = error.code();
        let mut message = chain(&error);
        if !matches!(code, ErrorCode::Unknown | ErrorCode::Internal) && !message.ends_with(code.text()) {
            message.push_str(": ");
            message.push_str(code.text());
        }
        RpcError { code, message }
    }
}
