//! Why streams cannot be had.

use std::io;
use std::path::PathBuf;

use davit_model::{Coded, ErrorCode};

use crate::logger::LoggerError;
use crate::stdio::open::MODE_ANNOTATION;

/// Why streams cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// An address of no known kind.
    #[error("unknown STDIO scheme {scheme}")]
    Scheme {
        /// The part before `://`.
        scheme: String,
    },
    /// An option of a json log that is unknown, or has no such value.
    #[error("invalid option {option:?} of json-file")]
    LogOption {
        /// The option as it was given.
        option: String,
    },
    /// A mode of the streams that does not exist.
    #[error("invalid {name} {mode:?}: must be blocking or non-blocking", name = MODE_ANNOTATION)]
    Mode {
        /// What the annotation says.
        mode: String,
    },
    /// A FIFO or file cannot be opened.
    #[error("open {path}", path = path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// No pipe can be made, or not be watched.
    #[error("{step}")]
    Pipe {
        /// What failed.
        step: &'static str,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// What an earlier shim handed on cannot be taken over.
    #[error("restore streams")]
    Restore {
        /// The answer of the kernel.
        source: io::Error,
    },
    /// The logger does not work.
    #[error("logging binary")]
    Logger {
        /// Why.
        source: LoggerError,
    },
}

impl Coded for StdioError {
    fn code(&self) -> ErrorCode {
        match self {
            StdioError::Scheme { .. } | StdioError::LogOption { .. } | StdioError::Mode { .. } => {
                ErrorCode::InvalidArgument
            }
            StdioError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorCode::NotFound
            }
            StdioError::Open { .. } | StdioError::Pipe { .. } | StdioError::Restore { .. } => {
                ErrorCode::Internal
            }
            StdioError::Logger { source } => source.code(),
        }
    }
}
