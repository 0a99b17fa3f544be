//! What can go wrong with the database, by operation.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use davit_model::{Coded, ErrorCode};

use crate::engine::{EngineError, EngineKind};

/// Why a database did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process, most likely a second daemon, has the folder open.
    #[error("metadata folder {} is in use by another process", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// A system call on the folder or one of its files failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The format file is not one that this version knows: it was written by a newer one, or by none.
    #[error("metadata folder {} has an unknown format: {found:?}", path.display())]
    UnknownFormat {
        /// The folder.
        path: PathBuf,
        /// What the format file says.
        found: String,
    },
    /// The folder was created with the other engine.
    #[error("metadata folder {} holds a {found} database, but {wanted} is configured", path.display())]
    OtherEngine {
        /// The folder.
        path: PathBuf,
        /// The engine that wrote it.
        found: EngineKind,
        /// The engine asked for.
        wanted: EngineKind,
    },
    /// The folder says that it was complete once, but the engine's file is gone. An empty database in its
    /// place would make every container and image look like garbage, so it is refused.
    #[error("metadata folder {} is damaged: {} is missing", path.display(), missing.display())]
    Missing {
        /// The folder.
        path: PathBuf,
        /// The engine's file.
        missing: PathBuf,
    },
    /// The engine's file is there, but the format file is gone.
    #[error("metadata folder {} is damaged: its format file is missing", path.display())]
    MissingFormat {
        /// The folder.
        path: PathBuf,
    },
    /// The engine could not open or read its files.
    #[error("open the {engine} database in {}", path.display())]
    Engine {
        /// The engine.
        engine: EngineKind,
        /// The folder.
        path: PathBuf,
        /// What the engine said.
        source: EngineError,
    },
}

impl OpenError {
    /// For `map_err` on a system call.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
        let path = path.to_owned();
        move |source| OpenError::Io { operation, path, source }
    }
}

impl Coded for OpenError {
    fn code(&self) -> ErrorCode {
        match self {
            OpenError::Locked { .. } | OpenError::UnknownFormat { .. } | OpenError::OtherEngine { .. } => {
                ErrorCode::FailedPrecondition
            }
            OpenError::Io { .. } => ErrorCode::Internal,
            OpenError::Missing { .. } | OpenError::MissingFormat { .. } | OpenError::Engine { .. } => {
                ErrorCode::DataLoss
            }
        }
    }
}

/// Why a change was not made durable.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    /// The engine failed, for this change or an earlier one. Nothing can be changed until the database is
    /// opened again.
    #[error("metadata database {} no longer accepts changes", path.display())]
    Failed {
        /// The folder.
        path: PathBuf,
        /// The first failure.
        source: Arc<EngineError>,
    },
    /// The database is closed, or being closed.
    #[error("metadata database {} is closed", path.display())]
    Closed {
        /// The folder.
        path: PathBuf,
    },
    /// A key or a value is larger than [`MAX_KEY_SIZE`](crate::MAX_KEY_SIZE) or
    /// [`MAX_VALUE_SIZE`](crate::MAX_VALUE_SIZE). The change had no effect.
    #[error("metadata record is too large: key of {key_size} bytes, value of {value_size} bytes")]
    TooLarge {
        /// Bytes of the key.
        key_size: usize,
        /// Bytes of the value.
        value_size: usize,
    },
}

impl Coded for CommitError {
    fn code(&self) -> ErrorCode {
        match self {
            CommitError::Failed { source, .. } => source.code(),
            CommitError::Closed { .. } => ErrorCode::Unavailable,
            CommitError::TooLarge { .. } => ErrorCode::InvalidArgument,
        }
    }
}

/// What a verification found.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The database has failed or is closed.
    #[error("verify the metadata database")]
    Unusable(#[source] CommitError),
    /// The engine's own check failed.
    #[error("the engine's check of metadata database {}", path.display())]
    Engine {
        /// The folder.
        path: PathBuf,
        /// What the engine said.
        source: EngineError,
    },
    /// What is on disk is not what is in memory.
    #[error("metadata database {} differs from memory in {different} of {records} records", path.display())]
    Different {
        /// The folder.
        path: PathBuf,
        /// Records that differ, or are on one side only.
        different: usize,
        /// Records in memory.
        records: usize,
    },
}

impl Coded for VerifyError {
    fn code(&self) -> ErrorCode {
        match self {
            VerifyError::Unusable(source) => source.code(),
            VerifyError::Engine { .. } | VerifyError::Different { .. } => ErrorCode::DataLoss,
        }
    }
}
