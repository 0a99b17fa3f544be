//! Why a transfer failed, and the classes that these errors have on the wire.

use davit_distribution as distribution;
use davit_model::digest::DigestError;
use davit_model::{Coded, Digest, ErrorCode};
use davit_oci::archive::ArchiveError;
use davit_oci::image::DocumentError;
use davit_snapshotter::layer;

use crate::{differs, metadata};

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry, or the way to it.
    #[error(transparent)]
    Registry(#[from] distribution::Error),
    /// The registry does not say what a name stands for.
    #[error("failed to resolve image")]
    Resolve {
        /// Why not.
        source: distribution::Error,
    },
    /// The metadata of the daemon.
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    /// A layer cannot be unpacked.
    #[error("failed to extract layer ({media_type} {digest}) to {snapshotter} as {key:?}")]
    Extract {
        /// The type of the layer.
        media_type: String,
        /// Its digest.
        digest: Digest,
        /// Where it was to be unpacked.
        snapshotter: String,
        /// The snapshot.
        key: String,
        /// What went wrong.
        source: Box<differs::Error>,
    },
    /// A layer is not what the configuration of its image says.
    #[error("wrong diff id {found} calculated on extraction of {digest}, expected {wanted}")]
    DiffId {
        /// The layer.
        digest: Digest,
        /// What came out.
        found: String,
        /// What should have.
        wanted: Digest,
    },
    /// Manifest and configuration do not fit each other.
    #[error("number of layers and diffIDs don't match: {layers} != {diff_ids}")]
    Layers {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A document of the image cannot be read.
    #[error("document {digest}")]
    Document {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        source: DocumentError,
    },
    /// A blob cannot be read from the store.
    #[error("read content {digest}")]
    Read {
        /// Its digest.
        digest: Digest,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A blob cannot be had from the store.
    #[error("content {digest}")]
    Content {
        /// Its digest.
        digest: Digest,
        /// What the store says.
        source: distribution::SinkError,
    },
    /// What an archive holds is no image.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// An archive cannot be read.
    #[error("cannot read the archive")]
    Unreadable {
        /// Why not.
        #[from]
        source: layer::Error,
    },
    /// Content has another size than what stands for it says.
    #[error("content {digest} has {found} bytes, not {wanted}")]
    Size {
        /// The content.
        digest: Digest,
        /// Its bytes.
        found: u64,
        /// Those that it should have.
        wanted: u64,
    },
    /// A layer cannot be compressed.
    #[error("cannot compress layer {digest}")]
    Compress {
        /// The layer.
        digest: Digest,
        /// What the store said.
        source: std::io::Error,
    },
    /// More or larger documents, more layers, or deeper indexes than images have.
    #[error("the image has too many parts")]
    TooManyParts,
    /// No document has anything that is wanted.
    #[error("image might be filtered out")]
    Empty,
    /// An index has nothing for a platform that is wanted.
    #[error("no manifest found for platform")]
    NoPlatform,
    /// The target of an image is no manifest.
    #[error("only manifests may be exported")]
    NoManifest,
    /// The archive cannot be sent.
    #[error("cannot send the archive")]
    Export {
        /// Why not.
        source: std::io::Error,
    },
    /// The target of an image is no digest.
    #[error("image {name:?}")]
    Target {
        /// The image.
        name: String,
        /// What is wrong.
        source: DigestError,
    },
    /// Nothing says how the image is to be called.
    #[error("no image name found")]
    NoName,
    /// The work was interrupted.
    #[error("the transfer was interrupted while {task}")]
    Interrupted {
        /// What was done.
        task: &'static str,
    },
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::Registry(source) | Error::Resolve { source } => source.code(),
            Error::Metadata(source) => source.code(),
            Error::Extract { source, .. } => source.code(),
            Error::Archive(source) => source.code(),
            Error::Unreadable { source } => source.code(),
            Error::Size { .. } | Error::TooManyParts | Error::NoManifest => ErrorCode::InvalidArgument,
            Error::DiffId { .. } | Error::Layers { .. } => ErrorCode::FailedPrecondition,
            Error::Document { source, .. } => source.code(),
            Error::Read { .. } | Error::Compress { .. } | Error::Interrupted { .. } => ErrorCode::Internal,
            Error::Content { source, .. } => source.code(),
            Error::Export { .. } => ErrorCode::Unavailable,
            Error::Target { .. } => ErrorCode::InvalidArgument,
            Error::NoName | Error::Empty | Error::NoPlatform => ErrorCode::NotFound,
        }
    }
}
