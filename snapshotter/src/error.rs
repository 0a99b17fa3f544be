//! The errors of snapshotters and the classes they have on the wire.

use std::path::PathBuf;

use davit_metadata::CommitError;
use davit_model::{Coded, ErrorCode};

/// Why a snapshotter refused or failed. The classes are those that containerd's bolt-backed snapshotters answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No snapshot has this key or name.
    #[error("snapshot {key} not found")]
    NotFound {
        /// The key that was asked for.
        key: String,
    },
    /// A snapshot of any kind has this key or name.
    #[error("snapshot {key} already exists")]
    AlreadyExists {
        /// The key that was to be made.
        key: String,
    },
    /// The key or name is empty.
    #[error("a snapshot needs a key that is not empty")]
    EmptyKey,
    /// The parent of a new or rebased snapshot does not exist.
    #[error("parent {parent} of snapshot {key} not found")]
    ParentNotFound {
        /// The snapshot that was to be made.
        key: String,
        /// The parent that is not there.
        parent: String,
    },
    /// The parent of a new snapshot is itself active or a view.
    #[error("parent {parent} of snapshot {key} is not a committed snapshot")]
    ParentNotCommitted {
        /// The snapshot that was to be made.
        key: String,
        /// The parent of another kind.
        parent: String,
    },
    /// The parent to rebase onto is active or a view. containerd classes this differently from a parent that is
    /// given to `prepare`.
    #[error("cannot rebase snapshot {key}: parent {parent} is not committed")]
    RebaseParentNotCommitted {
        /// The snapshot that was to be committed.
        key: String,
        /// The parent of another kind.
        parent: String,
    },
    /// A commit names another parent than the snapshot has.
    #[error("cannot change the parent of active snapshot {key} to {parent} on commit")]
    ParentChange {
        /// The snapshot that was to be committed.
        key: String,
        /// The parent that the commit named.
        parent: String,
    },
    /// This implementation cannot rebase at all.
    #[error("snapshotter {snapshotter} cannot rebase snapshot {key}")]
    RebaseUnsupported {
        /// The name of the snapshotter.
        snapshotter: &'static str,
        /// The snapshot that was to be committed.
        key: String,
    },
    /// Only an active snapshot can be committed.
    #[error("snapshot {key} is not active")]
    NotActive {
        /// The snapshot of another kind.
        key: String,
    },
    /// Only an active snapshot or a view can be mounted.
    #[error("snapshot {key} is neither active nor a view")]
    NotMountable {
        /// The committed snapshot.
        key: String,
    },
    /// The snapshot is the parent of another.
    #[error("cannot remove snapshot {key} with child {child}")]
    HasChildren {
        /// The snapshot that was to be removed.
        key: String,
        /// One of its children.
        child: String,
    },
    /// An update names something other than labels.
    #[error("cannot update {field:?} field on snapshot {key}")]
    ImmutableField {
        /// The snapshot.
        key: String,
        /// The field that was named.
        field: String,
    },
    /// A mapping label that is none.
    #[error("snapshot {key} has an invalid id mapping {mapping:?}")]
    Mapping {
        /// The snapshot.
        key: String,
        /// The text of the label.
        mapping: String,
    },
    /// A record cannot be read: the database is damaged, or written by a newer version.
    #[error("record {record:?} of snapshotter {snapshotter} is unreadable: {reason}")]
    Corrupt {
        /// The name of the snapshotter.
        snapshotter: &'static str,
        /// The key of the record below the snapshotter's prefix.
        record: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A newer version wrote these records.
    #[error(
        "records of snapshotter {snapshotter} have version {found}, this program reads up to {supported}"
    )]
    Version {
        /// The name of the snapshotter.
        snapshotter: &'static str,
        /// The version that was found.
        found: String,
        /// The newest version that is known here.
        supported: u32,
    },
    /// The folder of a recorded snapshot is gone.
    #[error("the files of snapshot {key} are missing: {} does not exist", path.display())]
    FilesMissing {
        /// The snapshot.
        key: String,
        /// The folder that its record promises.
        path: PathBuf,
    },
    /// The root folder of the snapshotter cannot serve.
    #[error("{} cannot hold snapshots: {reason}", root.display())]
    Root {
        /// The root folder.
        root: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// The trial mount at open failed: this kernel or filesystem has no overlayfs for us.
    #[error("overlayfs does not work on {}", root.display())]
    Overlay {
        /// The root folder.
        root: PathBuf,
        /// What the kernel said.
        source: davit_sys::mount::Error,
    },
    /// The root folder is on another filesystem than btrfs.
    #[error("{} must be on a btrfs filesystem to be used with the btrfs snapshotter: skip plugin", root.display())]
    NotBtrfs {
        /// The root folder.
        root: PathBuf,
    },
    /// The kernel has no erofs.
    #[error("EROFS unsupported, please `modprobe erofs`: skip plugin")]
    NoErofs,
    /// The trial mount at open failed: erofs or overlayfs does not work here.
    #[error("erofs does not work on {}", root.display())]
    Erofs {
        /// The root folder.
        root: PathBuf,
        /// What the kernel said.
        source: davit_sys::mount::Error,
    },
    /// Something was written to a snapshot after a layer was applied to it as an image.
    #[error("snapshot {key} has changes over a layer that was applied to it alone")]
    ChangesOverLayer {
        /// The snapshot.
        key: String,
    },
    /// Nobody has said what an empty snapshot of files begins as.
    #[error("no scratch file: set scratch_file, or put one in the snapshotter's folder: skip plugin")]
    NoScratch,
    /// A snapshotter in another process answered with an error.
    #[error("{message}")]
    Remote {
        /// Its class.
        code: ErrorCode,
        /// Its text.
        message: String,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The database did not take the change.
    #[error("snapshot record not saved")]
    Record {
        /// The database's error.
        source: CommitError,
    },
}

/// A failed file operation.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}", path.display())]
pub struct FileError {
    /// The system call or the step.
    pub operation: &'static str,
    /// The file.
    pub path: PathBuf,
    /// The system's answer.
    pub source: std::io::Error,
}

impl FileError {
    /// Names the operation and the file of a failure; made for `map_err`.
    pub fn at<E: Into<std::io::Error>>(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> FileError {
        let path = path.into();
        move |source| FileError { operation, path, source: source.into() }
    }
}

impl From<CommitError> for Error {
    fn from(source: CommitError) -> Error {
        Error::Record { source }
    }
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::NotFound { .. } | Error::ParentNotFound { .. } => ErrorCode::NotFound,
            Error::AlreadyExists { .. } => ErrorCode::AlreadyExists,
            Error::EmptyKey
            | Error::ParentNotCommitted { .. }
            | Error::ParentChange { .. }
            | Error::ImmutableField { .. }
            | Error::Mapping { .. } => ErrorCode::InvalidArgument,
            Error::NotActive { .. }
            | Error::NotMountable { .. }
            | Error::HasChildren { .. }
            | Error::RebaseParentNotCommitted { .. }
            | Error::Version { .. }
            | Error::Root { .. }
            | Error::NotBtrfs { .. }
            | Error::NoScratch
            | Error::NoErofs
            | Error::ChangesOverLayer { .. }
            | Error::Erofs { .. }
            | Error::Overlay { .. } => ErrorCode::FailedPrecondition,
            Error::RebaseUnsupported { .. } => ErrorCode::Unimplemented,
            Error::Corrupt { .. } | Error::FilesMissing { .. } => ErrorCode::DataLoss,
            Error::Remote { code, .. } => *code,
            Error::File(error) => error.code(),
            Error::Record { source } => source.code(),
        }
    }
}

impl Coded for FileError {
    fn code(&self) -> ErrorCode {
        match self.source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorCode::ResourceExhausted
            }
            std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
            _ => ErrorCode::Unknown,
        }
    }
}
