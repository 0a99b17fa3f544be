//! What the calls of [`Sandboxes`](super::Sandboxes) fail with. The words are containerd's (`plugins/sandbox`).

use davit_model::identifier::IdentifierError;
use davit_model::{Coded, ErrorCode};
use davit_shim_protocol::bundle::BundleError;
use davit_shim_protocol::client::CallError;

use crate::runtime::ShimError;

/// Why a call on a sandbox failed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The sandbox has a shim, or is just getting one; or a task has its id.
    #[error("sandbox {id} already running")]
    AlreadyRunning {
        /// The sandbox.
        id: String,
    },
    /// No shim runs the sandbox.
    #[error("sandbox {id:?}")]
    NotFound {
        /// The sandbox.
        id: String,
    },
    /// No shim runs the sandbox that is to be started.
    #[error("unable to find sandbox {id:?}")]
    NotCreated {
        /// The sandbox.
        id: String,
    },
    /// The id is no identifier.
    #[error("invalid task id {id}")]
    Id {
        /// What was given.
        id: String,
        /// The rule that it breaks.
        source: IdentifierError,
    },
    /// The bundle cannot be made.
    #[error("bundle of sandbox {id}")]
    Bundle {
        /// The sandbox.
        id: String,
        /// Why.
        source: BundleError,
    },
    /// There is no shim for the sandbox.
    #[error("failed to start new shim for sandbox {id}")]
    Shim {
        /// The sandbox.
        id: String,
        /// Why.
        source: ShimError,
    },
    /// The shim did not do as it was told.
    #[error("failed to {action}")]
    Call {
        /// What was to be done, with the sandbox.
        action: String,
        /// The shim's answer, or why there is none.
        source: CallError,
    },
    /// The shim was found at start but does not answer; it is tried again and again.
    #[error("the shim of sandbox {id} does not answer")]
    Unreachable {
        /// The sandbox.
        id: String,
    },
    /// The daemon is stopping.
    #[error("the call was interrupted")]
    Interrupted,
}

impl Coded for SandboxError {
    fn code(&self) -> ErrorCode {
        match self {
            SandboxError::AlreadyRunning { .. } => ErrorCode::AlreadyExists,
            SandboxError::NotFound { .. } | SandboxError::NotCreated { .. } => ErrorCode::NotFound,
            SandboxError::Id { .. } => ErrorCode::InvalidArgument,
            SandboxError::Bundle { source, .. } => source.code(),
            SandboxError::Shim { source, .. } => source.code(),
            SandboxError::Call { source, .. } => source.code(),
            SandboxError::Unreachable { .. } | SandboxError::Interrupted => ErrorCode::Unavailable,
        }
    }
}

/// Runtimes of sandboxes are found as those of tasks are.
pub(super) fn no_shim(id: &str) -> impl Fn(ShimError) -> SandboxError + '_ {
    move |source| SandboxError::Shim { id: id.to_owned(), source }
}
