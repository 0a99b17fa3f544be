//! Checkpoints of tasks as content, and content as what tasks are restored from.
//!
//! ```text
//! take:     folder ◀── shim, OCI runtime, criu      folder ──tar──▶ blob     spec of the container ──▶ blob
//! restore:  blob ──untar──▶ folder ──create──▶ the bundle's ──start: shim, OCI runtime, criu──▶ removed
//! ```
//! The blobs are the caller's: its lease keeps them, or the labels of what it writes about them; without either they are
//! garbage like any other. The folders are removed when they have served, and by the next daemon if this one dies.

use std::sync::Arc;

use davit_model::digest::DigestError;
use davit_model::{Any, Coded, Digest, ErrorCode, Labels, Mount};
use davit_proto::any;
use davit_proto::containerd::runc::v1::CheckpointOptions;
use davit_snapshotter::layer::{self, DiffOptions};
use prost::Message;
use tokio::task::JoinError;
use tracing::Instrument;

use crate::lane::Lane;
use crate::metadata::{self, Content, IoWriter, Metadata, NsWriter, Scope};
use crate::runtime::{self, CheckpointFolder, Tasks};

/// The images of criu in a tar archive (containerd `core/images/mediatypes.go`).
pub const IMAGES: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
/// The spec of the container, an encoded `google.protobuf.Any`.
pub const SPEC: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";

/// A plain archive, as the maker of layers calls it.
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options are those of another runtime.
    #[error("invalid task checkpoint option {type_url:?} for {runtime}")]
    OptionsType {
        /// The type of the options.
        type_url: String,
        /// The runtime of the container.
        runtime: String,
    },
    /// The options are no such message.
    #[error("checkpoint options")]
    Options {
        /// Why not.
        source: prost::DecodeError,
    },
    /// The content to restore from is no checkpoint.
    #[error("unsupported checkpoint type {media_type:?}")]
    MediaType {
        /// What it is.
        media_type: String,
    },
    /// The content to restore from has no name.
    #[error("digest of the checkpoint")]
    Digest {
        /// Why not.
        source: DigestError,
    },
    /// The container's record, or the content.
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    /// The task, or the folder.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The archive cannot be made, or is none.
    #[error("archive of the checkpoint")]
    Archive {
        /// Why.
        source: layer::Error,
    },
    /// The daemon ends.
    #[error("the call was interrupted")]
    Interrupted {
        /// By what.
        source: JoinError,
    },
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::OptionsType { .. }
            | Error::Options { .. }
            | Error::MediaType { .. }
            | Error::Digest { .. } => ErrorCode::InvalidArgument,
            Error::Metadata(error) => error.code(),
            Error::Runtime(error) => error.code(),
            Error::Archive { source } => source.code(),
            Error::Interrupted { .. } => ErrorCode::Internal,
        }
    }

    fn reason(&self) -> Option<&'static str> {
        match self {
            Error::Runtime(error) => error.reason(),
            Error::OptionsType { .. }
            | Error::Options { .. }
            | Error::MediaType { .. }
            | Error::Digest { .. }
            | Error::Metadata(_)
            | Error::Archive { .. }
            | Error::Interrupted { .. } => None,
        }
    }
}

/// A part of a checkpoint in the content store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// [`IMAGES`] or [`SPEC`].
    pub media_type: &'static str,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Writes and reads checkpoints. Clones are the same.
#[derive(Clone)]
pub struct Checkpoints {
    metadata: Metadata,
    tasks: Tasks,
    lane: Lane,
}

impl Checkpoints {
    /// Of these tasks, into the content of `metadata`; archives are made and unpacked in `lane`.
    pub fn new(metadata: Metadata, tasks: Tasks, lane: Lane) -> Checkpoints {
        Checkpoints { metadata, tasks, lane }
    }

    /// Writes a checkpoint of a task into the content store, images first; or into the folder that `options` (a
    /// `CheckpointOptions`) name, and then there is nothing to give back. It runs to its end whoever waits for it.
    ///
    /// # Errors
    /// Any of [`Error`]; of a checkpoint that failed nothing is left.
    pub async fn take(&self, scope: &Scope, id: &str, options: Option<Any>) -> Result<Vec<Blob>, Error> {
        let (checkpoints, scope, id) = (self.clone(), scope.clone(), id.to_owned());
        let work = async move { checkpoints.take_all(&scope, &id, options).await };
        tokio::spawn(work.in_current_span()).await.map_err(|source| Error::Interrupted { source })?
    }

    async fn take_all(&self, scope: &Scope, id: &str, options: Option<Any>) -> Result<Vec<Blob>, Error> {
        let container = self.metadata.containers(scope).get(id)?;
        let path = image_path(options.as_ref(), &container.runtime.name)?;
        let namespace = scope.namespace();
        if !path.is_empty() {
            self.tasks.checkpoint(namespace, id, &path, options).await?;
            return Ok(Vec::new());
        }
        let folder = self.tasks.checkpoint_folder(namespace).await?;
        let path = folder.path().display().to_string();
        self.tasks.checkpoint(namespace, id, &path, options).await?;
        let content = self.metadata.content(scope);
        let images = self.store(&content, &path, IMAGES, move |writer| archive(&folder, writer)).await?;
        let spec = container.spec.unwrap_or_default();
        let spec = prost_types::Any { type_url: spec.type_url, value: spec.value }.encode_to_vec();
        let write = move |mut writer: NsWriter| {
            writer.write(&spec)?;
            Ok(writer)
        };
        let spec = self.store(&content, &format!("{path}/spec"), SPEC, write).await?;
        Ok(vec![images, spec])
    }

    /// Makes a blob of what `write` writes. The same that is there already is as good.
    async fn store(
        &self,
        content: &Content,
        reference: &str,
        media_type: &'static str,
        write: impl FnOnce(NsWriter) -> Result<NsWriter, Error> + Send + 'static,
    ) -> Result<Blob, Error> {
        let writer = content.writer(reference, 0, None).await?;
        let make = move || {
            let mut writer = write(writer)?;
            let size = writer.status().offset;
            match writer.commit(size, None, Labels::new()) {
                Ok(()) | Err(metadata::Error::AlreadyExists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(Blob { media_type, digest: writer.digest(), size })
        };
        let made = self.lane.run(make).await.unwrap_or_else(|source| Err(Error::Interrupted { source }));
        if made.is_err() {
            // What is half made is of no use to anyone; the first error is the one to tell.
            let _ = content.abort(reference).await;
        }
        made
    }

    /// Unpacks the checkpoint `digest` into a folder of its own, which is removed when the last of its users is done.
    ///
    /// # Errors
    /// [`Error::MediaType`], [`Error::Digest`], [`Error::Archive`]; [`metadata::Error::NotFound`].
    pub async fn unpack(
        &self,
        scope: &Scope,
        media_type: &str,
        digest: &str,
    ) -> Result<Arc<CheckpointFolder>, Error> {
        if media_type != IMAGES {
            return Err(Error::MediaType { media_type: media_type.to_owned() });
        }
        let digest = digest.parse().map_err(|source| Error::Digest { source })?;
        let reader = self.metadata.content(scope).reader(&digest).await?;
        let folder = Arc::new(self.tasks.checkpoint_folder(scope.namespace()).await?);
        let unpacked = folder.clone();
        let unpack = move || layer::apply_to_folder(reader, unpacked.path());
        match self.lane.run(unpack).await {
            Ok(Ok(_)) => Ok(folder),
            Ok(Err(source)) => Err(Error::Archive { source }),
            Err(source) => Err(Error::Interrupted { source }),
        }
    }
}

/// The folder that a client wants its checkpoint in, if it does.
fn image_path(options: Option<&Any>, runtime: &str) -> Result<String, Error> {
    let Some(options) = options else { return Ok(String::new()) };
    let wire = prost_types::Any { type_url: options.type_url.clone(), value: options.value.clone() };
    match any::unpack::<CheckpointOptions>(&wire) {
        Ok(Some(options)) => Ok(options.image_path),
        Ok(None) => {
            Err(Error::OptionsType { type_url: options.type_url.clone(), runtime: runtime.to_owned() })
        }
        Err(source) => Err(Error::Options { source }),
    }
}

/// Writes the archive of a folder. Blocks.
fn archive(folder: &CheckpointFolder, writer: NsWriter) -> Result<NsWriter, Error> {
    let mount = Mount {
        kind: "bind".to_owned(),
        source: folder.path().display().to_string(),
        options: vec!["rbind".to_owned(), "ro".to_owned()],
        ..Mount::default()
    };
    let mut output = IoWriter::new(writer);
    let made = layer::diff(&[], &[mount], TAR, &mut output, &DiffOptions::default());
    let writer = output.into_writer()?;
    made.map_err(|source| Error::Archive { source })?;
    Ok(writer)
}
