//! The errors of the metadata services, in the words that containerd's clients know.

use davit_content_store as content_store;
use davit_metadata::CommitError;
use davit_model::digest::DigestError;
use davit_model::filter::FilterError;
use davit_model::identifier::IdentifierError;
use davit_model::label::LabelTooLong;
use davit_model::{Coded, ErrorCode};
use davit_snapshotter as snapshotter;

/// What an error is about, as its text names it. (containerd quotes some names and not others.)
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Object {
    /// A namespace.
    #[error("namespace {0:?}")]
    Namespace(String),
    /// A container.
    #[error("container {0:?}")]
    Container(String),
    /// A container that was to be deleted.
    #[error("container {0}")]
    AbsentContainer(String),
    /// A container that was asked for, with the namespace it is not in.
    #[error("container {id:?} in namespace {namespace:?}")]
    ContainerIn {
        /// The container.
        id: String,
        /// The namespace of the call.
        namespace: String,
    },
    /// A sandbox.
    #[error("sandbox {0:?}")]
    Sandbox(String),
    /// An image.
    #[error("image {0:?}")]
    Image(String),
    /// A blob that is not there.
    #[error("content digest {0}")]
    ContentDigest(String),
    /// A blob that is there.
    #[error("content {0}")]
    Content(String),
    /// An ingest.
    #[error("reference {0}")]
    Ingest(String),
    /// A snapshot that is there.
    #[error("snapshot {0:?}")]
    Snapshot(String),
    /// A snapshot that is not there.
    #[error("snapshot {0} does not exist")]
    AbsentSnapshot(String),
    /// A parent that is not there.
    #[error("parent snapshot {0} does not exist")]
    ParentSnapshot(String),
    /// The snapshot that a Prepare announces in its `snapshot.ref` label.
    #[error("target snapshot {0:?}")]
    TargetSnapshot(String),
    /// The same, found by the snapshotter.
    #[error("target snapshot {0:?} from snapshotter")]
    BackendTarget(String),
    /// The same, announced by the snapshotter but not in its list.
    #[error("target snapshot {0:?} in backend")]
    LostTarget(String),
    /// A lease.
    #[error("lease {0:?}")]
    Lease(String),
    /// An activated mount.
    #[error("mount {0:?}")]
    Mount(String),
    /// The lease that a call names in its header.
    #[error("lease does not exist")]
    CallersLease,
}

/// Why a metadata service refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object does not exist.
    #[error("{object}: not found")]
    NotFound {
        /// Which one.
        object: Object,
    },
    /// The object to create exists.
    #[error("{object}: already exists")]
    AlreadyExists {
        /// Which one.
        object: Object,
    },
    /// What was to be stored breaks a rule.
    #[error("{operation} failed validation")]
    Validation {
        /// What was tried.
        operation: &'static str,
        /// The rule.
        source: Box<Error>,
    },
    /// A name breaks the rules of identifiers.
    #[error("{field}")]
    Identifier {
        /// The field that holds it.
        field: &'static str,
        /// The rule.
        source: IdentifierError,
    },
    /// A label is too long.
    #[error("{field}")]
    Label {
        /// The field that holds it.
        field: &'static str,
        /// Which one.
        source: LabelTooLong,
    },
    /// A text is no digest.
    #[error("{field} {digest:?} invalid")]
    Digest {
        /// The field that holds it.
        field: &'static str,
        /// The text.
        digest: String,
        /// What is wrong with it.
        source: DigestError,
    },
    /// A field that must be set is not, or has a value that it cannot have.
    #[error("{rule}: invalid argument")]
    Invalid {
        /// The rule that is broken.
        rule: &'static str,
    },
    /// An update would change what cannot be changed.
    #[error("{field} field is immutable: invalid argument")]
    Immutable {
        /// The field.
        field: &'static str,
    },
    /// A field mask names something that cannot be updated.
    #[error("cannot update {path:?} field on {object}: invalid argument")]
    Field {
        /// The path in the mask.
        path: String,
        /// What was to be updated.
        object: String,
    },
    /// A filter is none.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// Mounts cannot be made, or do not come off.
    #[error(transparent)]
    Mounts(#[from] crate::mounts::MountError),
    /// A namespace that still has objects cannot be deleted.
    #[error("namespace {namespace:?} must be empty, but it still has {left}: failed precondition")]
    NamespaceNotEmpty {
        /// The namespace.
        namespace: String,
        /// The kinds of objects in it.
        left: String,
    },
    /// An image was to be deleted only while it has a certain target, and has another.
    #[error("image {name:?} has target {found}, not {wanted}: not found")]
    ImageTarget {
        /// The image.
        name: String,
        /// Its target.
        found: String,
        /// The target of the request.
        wanted: String,
    },
    /// A lease cannot hold resources of this type.
    #[error("resource type {kind} not supported yet: not implemented")]
    ResourceUnsupported {
        /// The type.
        kind: String,
    },
    /// A resource type has parts that it should not have, or lacks some.
    #[error("invalid resource type {kind}: invalid argument")]
    ResourceType {
        /// The type.
        kind: String,
    },
    /// The type of a snapshot as a resource does not name one snapshotter.
    #[error("invalid snapshot resource type {kind}: invalid argument")]
    SnapshotResourceType {
        /// The type.
        kind: String,
    },
    /// A content resource is named by something that is no digest.
    #[error("invalid content resource id {id}")]
    ResourceId {
        /// The id.
        id: String,
        /// What is wrong with it.
        source: DigestError,
    },
    /// No snapshotter has this name.
    #[error("snapshotter not loaded: {name}: invalid argument")]
    SnapshotterUnknown {
        /// The name of the request.
        name: String,
    },
    /// A snapshot that others are based on cannot be removed.
    #[error("cannot remove snapshot with child: failed precondition")]
    HasChildren {
        /// The snapshot.
        key: String,
    },
    /// A snapshotter answered that a new and unique key exists.
    #[error("unexpected answer of snapshotter {snapshotter}")]
    Unexpected {
        /// The snapshotter.
        snapshotter: String,
        /// Its answer.
        source: snapshotter::Error,
    },
    /// The parent that a snapshotter recorded for a target is not the one asked for.
    #[error("mismatched parent {parent} from target {target}: invalid argument")]
    ParentMismatch {
        /// The parent of the request.
        parent: String,
        /// The target.
        target: String,
    },
    /// An ingest does not have the size that its commit declares.
    #[error("{reference:?} failed size validation: {found} != {wanted}: failed precondition")]
    Size {
        /// The ingest.
        reference: String,
        /// The bytes that are there.
        found: u64,
        /// The bytes that were declared.
        wanted: u64,
    },
    /// An ingest does not have the digest that its commit declares.
    #[error("{reference:?} unexpected digest: failed precondition")]
    CommitDigest {
        /// The ingest.
        reference: String,
    },
    /// The content store refused or failed.
    #[error(transparent)]
    Store(#[from] content_store::Error),
    /// A snapshotter refused or failed.
    #[error(transparent)]
    Snapshotter(#[from] snapshotter::Error),
    /// The database did not take the change.
    #[error("metadata not saved")]
    Commit(#[from] CommitError),
    /// A record cannot be read.
    #[error("metadata record {key:?} is unreadable")]
    Record {
        /// The key.
        key: String,
        /// Why.
        source: prost::DecodeError,
    },
    /// A key is not one of this schema.
    #[error("metadata key {key:?} is malformed")]
    Key {
        /// The key.
        key: String,
    },
    /// The records are of another version.
    #[error("the metadata have schema version {found}, this daemon reads {supported}")]
    Version {
        /// The version that was found.
        found: String,
        /// The version of this daemon.
        supported: u32,
    },
    /// A garbage collection that a call waited for failed; the log says why.
    #[error("garbage collection failed")]
    CollectionFailed,
    /// The work of a call ended in a panic, or the daemon is going down.
    #[error("the call was interrupted")]
    Interrupted {
        /// How the task ended.
        source: tokio::task::JoinError,
    },
}

impl Error {
    pub(crate) fn not_found(object: Object) -> Error {
        Error::NotFound { object }
    }

    pub(crate) fn already_exists(object: Object) -> Error {
        Error::AlreadyExists { object }
    }
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::NotFound { .. } | Error::ImageTarget { .. } => ErrorCode::NotFound,
            Error::AlreadyExists { .. } => ErrorCode::AlreadyExists,
            Error::Identifier { .. }
            | Error::Label { .. }
            | Error::Digest { .. }
            | Error::Invalid { .. }
            | Error::Immutable { .. }
            | Error::Field { .. }
            | Error::ResourceType { .. }
            | Error::SnapshotResourceType { .. }
            | Error::ResourceId { .. }
            | Error::SnapshotterUnknown { .. }
            | Error::ParentMismatch { .. } => ErrorCode::InvalidArgument,
            Error::NamespaceNotEmpty { .. }
            | Error::HasChildren { .. }
            | Error::Size { .. }
            | Error::CommitDigest { .. }
            | Error::Version { .. } => ErrorCode::FailedPrecondition,
            Error::ResourceUnsupported { .. } => ErrorCode::Unimplemented,
            Error::Validation { source, .. } => source.code(),
            Error::Filter(source) => source.code(),
            Error::Mounts(source) => source.code(),
            Error::Store(source) => source.code(),
            Error::Snapshotter(source) => source.code(),
            Error::Commit(source) => source.code(),
            Error::Record { .. } | Error::Key { .. } => ErrorCode::DataLoss,
            Error::Unexpected { .. } | Error::CollectionFailed => ErrorCode::Unknown,
            Error::Interrupted { .. } => ErrorCode::Internal,
        }
    }
}
