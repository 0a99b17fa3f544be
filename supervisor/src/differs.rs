//! Differs: who unpacks layers into snapshots, and makes layers of the difference of two.
//!
//! ```text
//!   Diff service ─┐                 ┌─▶ walking: stream processors ─▶ unpacked here
//!                 ├─▶ in the order ─┤
//!   transfers ────┘   configured    └─▶ a proxy plugin
//! ```
//!
//! The first that does not answer "not implemented" counts, as in containerd. For what a transfer unpacks into a
//! snapshotter there may be one of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use davit_model::digest::DigestError;
use davit_model::{Coded, Digest, ErrorCode, Labels, Mount};
use davit_snapshotter::layer::{self, ApplyOptions, DiffOptions};
use prost_types::Any;

use crate::config::{self, StreamProcessor};
use crate::lane::Lane;
use crate::metadata::{self, Content, Descriptor, IoWriter, NsWriter};
use crate::processors::{self, Guard, Processors, Running};
use crate::proxy::{Failure, ProxyDiffer};
use crate::unique::unique;

/// The differ of this daemon, which walks through the trees.
pub const WALKING: &str = "walking";

/// The type of a layer once it is unpacked, and of one that is asked for without naming a type.
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The label of a compressed layer that names the digest of its uncompressed form.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Why a layer is neither unpacked nor made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor of the layer is none.
    #[error("layer {digest:?}")]
    Digest {
        /// The digest.
        digest: String,
        /// What is wrong.
        source: DigestError,
    },
    /// The content of the daemon.
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    /// The layer or the snapshot.
    #[error(transparent)]
    Layer(#[from] layer::Error),
    /// A program that the layer goes through.
    #[error(transparent)]
    Processor(#[from] processors::Error),
    /// A proxy plugin.
    #[error(transparent)]
    Proxy(#[from] Failure),
    /// The daemon ends, or the work panicked.
    #[error("the call was interrupted")]
    Interrupted,
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::Digest { .. } => ErrorCode::InvalidArgument,
            Error::Metadata(source) => source.code(),
            Error::Layer(source) => source.code(),
            Error::Processor(source) => source.code(),
            Error::Proxy(source) => source.code(),
            Error::Interrupted => ErrorCode::Internal,
        }
    }
}

/// A layer to be made.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The tree that it begins with; none for an empty one.
    pub left: Vec<Mount>,
    /// The tree that it makes of it.
    pub right: Vec<Mount>,
    /// Its type; empty for a usual one.
    pub media_type: String,
    /// The name of its ingest; empty for any.
    pub reference: String,
    /// Labels for the new content.
    pub labels: Labels,
    /// No time in it is later.
    pub source_date_epoch: Option<SystemTime>,
}

#[derive(Debug, Clone)]
enum Differ {
    Walking,
    Proxy(ProxyDiffer),
}

/// The differs of a daemon. Clones are the same.
#[derive(Debug, Clone)]
pub struct Differs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    order: Vec<Differ>,
    /// Those of snapshotters in particular.
    snapshotters: BTreeMap<String, Differ>,
    processors: Processors,
    lane: Lane,
    /// For what goes through programs: one that stops keeps its place from its like only.
    programs: Lane,
}

impl Differs {
    /// The differs that `config` puts in order; layers are made and applied in `lane`.
    ///
    /// # Errors
    /// The name of one that is not there.
    pub fn new(
        config: &config::Diff,
        proxies: &BTreeMap<String, ProxyDiffer>,
        programs: &BTreeMap<String, StreamProcessor>,
        lane: Lane,
    ) -> Result<Differs, String> {
        let find = |name: &String| match proxies.get(name) {
            Some(proxy) => Ok(Differ::Proxy(proxy.clone())),
            None if name == WALKING => Ok(Differ::Walking),
            None => Err(name.clone()),
        };
        let order = config.default.iter().map(find).collect::<Result<_, _>>()?;
        let mut snapshotters = BTreeMap::new();
        for (snapshotter, name) in &config.snapshotters {
            snapshotters.insert(snapshotter.clone(), find(name)?);
        }
        let (processors, programs) = (Processors::new(programs), Lane::programs());
        Ok(Differs { inner: Arc::new(Inner { order, snapshotters, processors, lane, programs }) })
    }

    /// Unpacks a layer into what the mounts describe, and syncs that. Answers the uncompressed layer.
    ///
    /// # Errors
    /// Those of the differ.
    pub async fn apply(
        &self,
        content: &Content,
        layer: &Descriptor,
        mounts: &[Mount],
        payloads: &BTreeMap<String, Any>,
    ) -> Result<Descriptor, Error> {
        self.apply_in_order(content, layer, mounts, payloads, false).await
    }

    async fn apply_in_order(
        &self,
        content: &Content,
        layer: &Descriptor,
        mounts: &[Mount],
        payloads: &BTreeMap<String, Any>,
        alone: bool,
    ) -> Result<Descriptor, Error> {
        let mut refusal = None;
        for differ in &self.inner.order {
            match self.apply_with(differ, content, layer, mounts, payloads, alone).await {
                Err(error) if error.code() == ErrorCode::Unimplemented => refusal = Some(error),
                answer => return answer,
            }
        }
        Err(refusal.unwrap_or_else(|| unsupported(&layer.media_type)))
    }

    /// As [`apply`](Differs::apply), by the differ of a snapshotter if it has one of its own. Nothing else is written to the
    /// snapshot before it is committed.
    ///
    /// # Errors
    /// Those of the differ.
    pub async fn unpack(
        &self,
        content: &Content,
        layer: &Descriptor,
        snapshotter: &str,
        mounts: &[Mount],
    ) -> Result<Descriptor, Error> {
        let payloads = BTreeMap::new();
        match self.inner.snapshotters.get(snapshotter) {
            Some(differ) => self.apply_with(differ, content, layer, mounts, &payloads, true).await,
            None => self.apply_in_order(content, layer, mounts, &payloads, true).await,
        }
    }

    /// Whether another process may be asked to unpack into a snapshotter.
    pub fn asks_others(&self, snapshotter: &str) -> bool {
        let is_proxy = |differ: &Differ| matches!(differ, Differ::Proxy(_));
        let own = self.inner.snapshotters.get(snapshotter);
        own.map_or_else(|| self.inner.order.iter().any(is_proxy), is_proxy)
    }

    /// Makes a layer.
    ///
    /// # Errors
    /// Those of the differ.
    pub async fn diff(&self, content: &Content, wanted: &Wanted) -> Result<Descriptor, Error> {
        let mut refusal = None;
        for differ in &self.inner.order {
            let made = match differ {
                Differ::Walking => self.walk(content, wanted.clone()).await,
                Differ::Proxy(proxy) => ask(proxy, content, wanted.clone()).await,
            };
            match made {
                Err(error) if error.code() == ErrorCode::Unimplemented => refusal = Some(error),
                answer => return answer,
            }
        }
        Err(refusal.unwrap_or_else(|| unsupported(&wanted.media_type)))
    }

    async fn apply_with(
        &self,
        differ: &Differ,
        content: &Content,
        layer: &Descriptor,
        mounts: &[Mount],
        payloads: &BTreeMap<String, Any>,
        alone: bool,
    ) -> Result<Descriptor, Error> {
        match differ {
            Differ::Walking => {
                self.unpack_here(content, layer, mounts.to_vec(), payloads.clone(), alone).await
            }
            Differ::Proxy(proxy) => {
                let (layer, mounts) = (layer.clone(), mounts.to_vec());
                Ok(proxy.apply(content.namespace(), layer, mounts, payloads.clone()).await?)
            }
        }
    }

    async fn unpack_here(
        &self,
        content: &Content,
        layer: &Descriptor,
        mounts: Vec<Mount>,
        payloads: BTreeMap<String, Any>,
        alone: bool,
    ) -> Result<Descriptor, Error> {
        let digest: Digest =
            layer.digest.parse().map_err(|source| Error::Digest { digest: layer.digest.clone(), source })?;
        let reader = content.reader(&digest).await?;
        let (processors, media_type) = (self.inner.processors.clone(), layer.media_type.clone());
        let lane =
            if processors.chain(&media_type)?.is_empty() { &self.inner.lane } else { &self.inner.programs };
        // A call that is given up takes its programs along.
        let guard = Guard(Arc::new(Running::default()));
        let running = guard.0.clone();
        let work = move || {
            let (reader, media_type) = processors.start(reader, &media_type, &payloads, &running)?;
            // Layers are always synced, whether or not the request asks for it: what is acknowledged survives a power cut.
            let applied = match alone {
                true => layer::apply_alone(reader, &media_type, &mounts),
                false => layer::apply(reader, &media_type, &mounts, &ApplyOptions::default()),
            };
            match running.failure() {
                Some(failure) => Err(Error::Processor(failure)),
                None => Ok(applied?),
            }
        };
        let applied = lane.run(work).await.map_err(|_| Error::Interrupted)??;
        Ok(Descriptor {
            media_type: OCI_LAYER.to_owned(),
            digest: applied.digest.to_string(),
            size: i64::try_from(applied.size).unwrap_or(i64::MAX),
            ..Descriptor::default()
        })
    }

    async fn walk(&self, content: &Content, wanted: Wanted) -> Result<Descriptor, Error> {
        let reference = reference(&wanted);
        let writer = content.writer(&reference, 0, None).await?;
        let made = self.inner.lane.run(move || make(writer, wanted)).await;
        let made = made.map_err(|_| Error::Interrupted).and_then(|made| made);
        match made {
            Ok(Made::New(layer)) => Ok(layer),
            Ok(Made::Again { layer, digest, uncompressed }) => {
                label(content, &digest, uncompressed).await?;
                Ok(layer)
            }
            Err(error) => {
                // What is half made is of no use to a second try.
                let _ = content.abort(&reference).await;
                Err(error)
            }
        }
    }
}

fn unsupported(media_type: &str) -> Error {
    Error::Layer(layer::Error::MediaType { media_type: media_type.to_owned() })
}

/// The name of a layer's ingest.
fn reference(wanted: &Wanted) -> String {
    if wanted.reference.is_empty() {
        return format!("diff-{}", unique());
    }
    wanted.reference.clone()
}

/// Has a plugin make a layer, which must be there then.
async fn ask(proxy: &ProxyDiffer, content: &Content, wanted: Wanted) -> Result<Descriptor, Error> {
    let Wanted { left, right, media_type, reference, labels, source_date_epoch } = wanted;
    let trees = [left, right];
    let made =
        proxy.diff(content.namespace(), trees, media_type, reference, labels, source_date_epoch).await?;
    let is_there = match made.digest.parse() {
        Ok(digest) => content.info(&digest).is_ok_and(|info| i64::try_from(info.size) == Ok(made.size)),
        Err(_) => false,
    };
    if is_there { Ok(made) } else { Err(proxy.lost(&made.digest).into()) }
}

/// A layer that was made.
enum Made {
    New(Descriptor),
    /// Its content was there before.
    Again {
        layer: Descriptor,
        digest: Digest,
        uncompressed: Digest,
    },
}

/// Tells what a layer is uncompressed where nobody has told: it may have come with an archive. Clients make the configuration
/// of an image of that.
async fn label(content: &Content, digest: &Digest, uncompressed: Digest) -> Result<(), Error> {
    if !content.info(digest)?.labels.contains_key(UNCOMPRESSED) {
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), uncompressed.to_string())]);
        content.update(digest, labels, &[format!("labels.{UNCOMPRESSED}")]).await?;
    }
    Ok(())
}

/// Makes a layer in an ingest and commits it. Blocks.
fn make(mut writer: NsWriter, wanted: Wanted) -> Result<Made, Error> {
    let Wanted { left, right, media_type, mut labels, source_date_epoch, .. } = wanted;
    let media_type = if media_type.is_empty() { OCI_LAYER_GZIP.to_owned() } else { media_type };
    writer.truncate(0)?;
    let mut output = IoWriter::new(writer);
    let made = layer::diff(&left, &right, &media_type, &mut output, &DiffOptions { source_date_epoch });
    let mut writer = output.into_writer()?;
    let uncompressed = made?.digest;
    labels.insert(UNCOMPRESSED.to_owned(), uncompressed.to_string());
    let (digest, size) = (writer.digest(), writer.status().offset);
    let layer = Descriptor {
        media_type,
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        ..Descriptor::default()
    };
    match writer.commit(size, None, labels) {
        Ok(()) => Ok(Made::New(layer)),
        Err(metadata::Error::AlreadyExists { .. }) => Ok(Made::Again { layer, digest, uncompressed }),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Scope;
    use crate::metadata::tests::Fixture;

    #[tokio::test]
    async fn a_layer_that_is_there_is_told_uncompressed() {
        let fixture = Fixture::new();
        let content = fixture.metadata.content(&Scope::new("a", None).unwrap());
        let none = BTreeMap::new();
        let differs =
            Differs::new(&config::Diff::default(), &none, &BTreeMap::new(), Lane::layers()).unwrap();
        let tree = tempfile::tempdir().unwrap();
        std::fs::write(tree.path().join("file"), "text").unwrap();
        let bind = Mount {
            kind: "bind".to_owned(),
            source: tree.path().display().to_string(),
            options: vec!["rbind".to_owned(), "ro".to_owned()],
            ..Mount::default()
        };
        let wanted = Wanted {
            left: Vec::new(),
            right: vec![bind],
            media_type: String::new(),
            reference: String::new(),
            labels: Labels::new(),
            source_date_epoch: None,
        };
        let layer = differs.diff(&content, &wanted).await.unwrap();
        let digest: Digest = layer.digest.parse().unwrap();
        let told = || content.info(&digest).unwrap().labels.get(UNCOMPRESSED).cloned();
        let uncompressed = told().unwrap();
        // As after an import, which knows of no trees.
        content.update(&digest, Labels::new(), &[]).await.unwrap();
        assert_eq!(told(), None);
        assert_eq!(differs.diff(&content, &wanted).await.unwrap(), layer);
        assert_eq!(told(), Some(uncompressed));
        // What somebody has told stays.
        let other = Labels::from([(UNCOMPRESSED.to_owned(), "other".to_owned())]);
        content.update(&digest, other, &[]).await.unwrap();
        differs.diff(&content, &wanted).await.unwrap();
        assert_eq!(told().as_deref(), Some("other"));
        assert_eq!(fixture.backends().1, Vec::<String>::new(), "no ingest is left");
    }
}
