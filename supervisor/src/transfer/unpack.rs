//! Unpacking while a pull goes on: each layer onto those below it, as soon as it is in the store.
//!
//! ```text
//!   Ready::Image ──▶ configuration read ──▶ for each platform and snapshotter that is asked for, a task:
//!                          one of another process may have layers already: the first that it has not is wanted
//!   Ready::Layer ──▶   prepare on the parent ──▶ apply ──▶ diff id compared ──▶ commit as its chain id ──▶ next
//!   all layers   ──▶   the configuration is labelled, and with it the image keeps the snapshots
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use davit_distribution::{Ready, Wanted, labels};
use davit_model::{Digest, Labels, Mount};
use davit_oci::image::{self, Descriptor, ImageConfig};
use davit_oci::platform::{self, Platform};
use davit_oci::{chain, media_type};
use davit_snapshotter::{GID_MAPPING_LABEL, TARGET_LABEL, UID_MAPPING_LABEL, native, overlayfs};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::{Error, Listener, News, Transfers, Unpack, document, set_labels};
use crate::differs::Differs;
use crate::metadata::{self, Content, Metadata, Scope, Snapshots};
use crate::unique::unique;

/// What labels begin with that are for snapshotters.
const FOR_SNAPSHOTTERS: &str = "containerd.io/snapshot/";
/// The labels of a snapshot that is going to be a layer: what it will unpack to, and the name of what it lies on.
const DIFF_ID: &str = "containerd.io/snapshot/diff-id";
const PARENT_CHAIN: &str = "containerd.io/snapshot/parent-chain-id";
/// What a snapshotter that fetches by itself is told of a layer and its image, if its plugin says with this export that it
/// wants to know (containerd `pkg/snapshotters`).
const WANTS_REMOTE: &str = "enable_remote_snapshot_annotations";
const REMOTE_REFERENCE: &str = "containerd.io/snapshot/cri.image-ref";
const REMOTE_MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
const REMOTE_LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
const REMOTE_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
/// The most bytes of a label, key and value together.
const MAX_LABEL: usize = 4096;
/// The label of a layer that names the digest of its uncompressed form.
pub(super) const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// What the label of a configuration begins with that keeps its snapshots.
const GC_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot.";

/// Where images of a platform go.
#[derive(Clone)]
struct Place {
    platform: Platform,
    snapshotter: String,
    snapshots: Snapshots,
    /// It is in another process, and may have layers that nobody has unpacked.
    is_remote: bool,
    /// It wants to know where layers come from.
    wants_remote: bool,
}

/// The snapshotter that is meant: the usual one if none is named.
pub(super) fn snapshotter<'a>(unpack: &'a Unpack, metadata: &Metadata) -> &'a str {
    if !unpack.snapshotter.is_empty() {
        return &unpack.snapshotter;
    }
    let usual = [overlayfs::NAME, native::NAME];
    usual.into_iter().find(|name| metadata.snapshotters().contains_key(*name)).unwrap_or(overlayfs::NAME)
}

/// Unpacks what a pull brings.
pub(super) struct Unpacker {
    content: Content,
    places: Vec<Place>,
    differs: Differs,
    listener: Listener,
    /// What the image is pulled by.
    reference: Option<String>,
}

impl Unpacker {
    /// Unpacks for those of `unpacks` whose snapshotter is there; others are skipped, as containerd does.
    ///
    /// # Errors
    /// Those of the metadata.
    pub(super) fn new(
        transfers: &Transfers,
        scope: &Scope,
        unpacks: &[Unpack],
        reference: Option<&str>,
        listener: &Listener,
    ) -> Result<Unpacker, Error> {
        let metadata = &transfers.metadata;
        let mut places = Vec::new();
        for unpack in unpacks {
            let (platform, name) = (&unpack.platform, snapshotter(unpack, metadata));
            let Some(backend) = metadata.snapshotters().get(name).filter(|_| platform.os == "linux") else {
                tracing::warn!(%platform, snapshotter = name, "Unpack configuration not supported, skipping");
                continue;
            };
            places.push(Place {
                platform: platform.clone(),
                snapshotter: name.to_owned(),
                snapshots: metadata.snapshots(scope, name)?,
                is_remote: metadata.is_process(name),
                wants_remote: backend.exports().get(WANTS_REMOTE).is_some_and(|value| value == "true"),
            });
        }
        let content = metadata.content(scope);
        Ok(Unpacker {
            content,
            places,
            differs: transfers.differs.clone(),
            listener: listener.clone(),
            reference: reference.map(str::to_owned),
        })
    }

    /// Whether there is nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether it can say of an image which of its layers are there already.
    pub(super) fn knows_layers(&self) -> bool {
        self.places.iter().any(|place| place.is_remote)
    }

    /// Unpacks what is ready until nothing more comes.
    ///
    /// # Errors
    /// The first that a layer has; what is unfinished is given up.
    pub(super) async fn run(self, mut ready: mpsc::Receiver<Ready>) -> Result<(), Error> {
        let unpacker = Arc::new(self);
        let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
        let mut images: HashMap<Digest, Vec<mpsc::UnboundedSender<usize>>> = HashMap::new();
        let mut open = true;
        loop {
            // Neither a receive nor a join that is given up has taken anything.
            tokio::select! {
                news = ready.recv(), if open => match news {
                    Some(Ready::Image { manifest, config, layers, wanted }) => {
                        let started = unpacker.start(&manifest, &config, &layers, wanted, &mut tasks).await?;
                        images.entry(manifest.digest).or_default().extend(started);
                    }
                    Some(Ready::Layer { manifest, index, .. }) => {
                        for image in images.get(&manifest).into_iter().flatten() {
                            // A task that is gone has failed, and tells why.
                            let _ = image.send(index);
                        }
                    }
                    None => {
                        open = false;
                        images.clear();
                    }
                },
                Some(ended) = tasks.join_next() => {
                    ended.map_err(|_| Error::Interrupted { task: "unpacking" })??;
                }
                else => return Ok(()),
            }
        }
    }

    /// Starts a task for each place that the image is for.
    async fn start(
        self: &Arc<Self>,
        manifest: &Descriptor,
        config: &Descriptor,
        layers: &[Descriptor],
        wanted: Option<Wanted>,
        tasks: &mut JoinSet<Result<(), Error>>,
    ) -> Result<Vec<mpsc::UnboundedSender<usize>>, Error> {
        // Other things than images have manifests too.
        if !media_type::is_config(&config.media_type) {
            return Ok(Vec::new());
        }
        let parsed = self.config(config).await?;
        let mut described = manifest.clone();
        described.platform = Some(Platform::of(&parsed));
        let fits =
            |place: &&Place| platform::best(std::slice::from_ref(&described), &place.platform).is_some();
        let places: Vec<&Place> = self.places.iter().filter(fits).collect();
        // What one has another may want.
        let wanted = wanted.filter(|_| matches!(places[..], [place] if place.is_remote));
        let mut started = Vec::new();
        for place in places {
            let diff_ids = parsed.rootfs.diff_ids.clone();
            if diff_ids.len() != layers.len() {
                return Err(Error::Layers { layers: layers.len(), diff_ids: diff_ids.len() });
            }
            let (sender, receiver) = mpsc::unbounded_channel();
            let image = Unpacking {
                unpacker: self.clone(),
                place: place.clone(),
                parent: labels::ingest_reference(manifest),
                manifest: manifest.digest.clone(),
                config: config.digest.clone(),
                layers: layers.to_vec(),
                chain: chain::chain_ids(&diff_ids),
                diff_ids,
            };
            tasks.spawn(image.run(wanted.clone(), receiver).in_current_span());
            started.push(sender);
        }
        Ok(started)
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<ImageConfig, Error> {
        let digest = &descriptor.digest;
        let bytes = document(&self.content, digest).await?;
        image::parse_config(&bytes).map_err(|source| Error::Document { digest: digest.clone(), source })
    }
}

/// One image on its way into one snapshotter.
struct Unpacking {
    unpacker: Arc<Unpacker>,
    place: Place,
    /// The name of the manifest, for the news.
    parent: String,
    manifest: Digest,
    config: Digest,
    layers: Vec<Descriptor>,
    diff_ids: Vec<Digest>,
    chain: Vec<Digest>,
}

impl Unpacking {
    async fn run(
        self,
        wanted: Option<Wanted>,
        mut ready: mpsc::UnboundedReceiver<usize>,
    ) -> Result<(), Error> {
        let mut done = 0;
        if let Some(wanted) = wanted {
            done = self.held().await?;
            wanted.send_replace(Some(done));
        }
        while done < self.layers.len() {
            // A pull that failed says why; what is unpacked so far is of use to the next one, or to nobody.
            let Some(index) = ready.recv().await else { return Ok(()) };
            if index == done {
                self.layer(index).await?;
                done += 1;
            }
        }
        let Some(top) = self.chain.last() else { return Ok(()) };
        let label = format!("{GC_SNAPSHOT}{}", self.place.snapshotter);
        set_labels(&self.unpacker.content, &self.config, Labels::from([(label, top.to_string())])).await
    }

    /// How many of the lowest layers the snapshotter has, be it that it gets them by itself.
    async fn held(&self) -> Result<usize, Error> {
        let snapshots = &self.place.snapshots;
        for (index, name) in self.chain.iter().enumerate() {
            let key = format!("extract-{} {name}", unique());
            match snapshots.prepare(&key, self.below(index).as_deref(), self.labels(index)).await {
                Err(metadata::Error::AlreadyExists { .. }) => match snapshots.stat(name.as_str()).await {
                    Err(metadata::Error::NotFound { .. }) => return Ok(index),
                    found => drop(found?),
                },
                Err(error) => return Err(error.into()),
                // Prepared again when the layer is here.
                Ok(_) => {
                    snapshots.remove(&key).await?;
                    return Ok(index);
                }
            }
        }
        Ok(self.chain.len())
    }

    /// The name of the snapshot that a layer lies on.
    fn below(&self, index: usize) -> Option<String> {
        index.checked_sub(1).map(|below| self.chain[below].to_string())
    }

    /// What a snapshotter is told of a layer.
    fn labels(&self, index: usize) -> Labels {
        let layer = &self.layers[index];
        let mut labels = Labels::from([
            (TARGET_LABEL.to_owned(), self.chain[index].to_string()),
            (DIFF_ID.to_owned(), self.diff_ids[index].to_string()),
        ]);
        labels.extend(self.below(index).map(|below| (PARENT_CHAIN.to_owned(), below)));
        if self.place.is_remote {
            // What the image says itself, such as the table of contents of a layer. Not for those of this process: an image is
            // not to say how its files are owned.
            let said = layer.annotations.iter().filter(|(key, _)| key.starts_with(FOR_SNAPSHOTTERS));
            let said =
                said.filter(|(key, _)| ![UID_MAPPING_LABEL, GID_MAPPING_LABEL].contains(&key.as_str()));
            for (key, value) in said.filter(|(key, value)| key.len() + value.len() <= MAX_LABEL) {
                labels.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        if self.place.wants_remote {
            let mut layers = layer.digest.to_string();
            for above in &self.layers[index + 1..] {
                let longer = format!("{layers},{}", above.digest);
                if REMOTE_LAYERS.len() + longer.len() > MAX_LABEL {
                    break;
                }
                layers = longer;
            }
            let reference = self.unpacker.reference.clone();
            labels.extend(reference.map(|reference| (REMOTE_REFERENCE.to_owned(), reference)));
            labels.extend([
                (REMOTE_MANIFEST.to_owned(), self.manifest.to_string()),
                (REMOTE_LAYER.to_owned(), layer.digest.to_string()),
                (REMOTE_LAYERS.to_owned(), layers),
            ]);
        }
        labels
    }

    #[tracing::instrument(name = "unpack", level = "debug", skip_all, fields(digest = %self.layers[index].digest))]
    async fn layer(&self, index: usize) -> Result<(), Error> {
        let snapshots = &self.place.snapshots;
        let (name, layer) = (self.chain[index].to_string(), &self.layers[index]);
        let (parent, labels) = (self.below(index), self.labels(index));
        let key = format!("extract-{} {name}", unique());
        match snapshots.prepare(&key, parent.as_deref(), labels.clone()).await {
            Ok(mounts) => {
                let extracted = self.extract(index, &key, mounts).await;
                let committed = match extracted {
                    Ok(()) => snapshots.commit(&name, &key, labels, None).await.map_err(Error::from),
                    Err(error) => Err(error),
                };
                if committed.is_err() {
                    // What stays in spite of this belongs to the lease.
                    let _ = snapshots.remove(&key).await;
                }
                match committed {
                    // Somebody else was faster.
                    Ok(()) | Err(Error::Metadata(metadata::Error::AlreadyExists { .. })) => {
                        self.tell("extracted", layer, layer.size);
                    }
                    Err(error) => return Err(error),
                }
            }
            // It was unpacked before, or its snapshotter fetches by itself; the lease has it now.
            Err(metadata::Error::AlreadyExists { .. }) => drop(snapshots.stat(&name).await?),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    async fn extract(&self, index: usize, key: &str, mounts: Vec<Mount>) -> Result<(), Error> {
        let (layer, wanted) = (&self.layers[index], &self.diff_ids[index]);
        self.tell("extracting", layer, 0);
        let described = metadata::Descriptor::from(layer);
        let differs = &self.unpacker.differs;
        let applied =
            differs.unpack(&self.unpacker.content, &described, &self.place.snapshotter, &mounts).await;
        let applied = applied.map_err(|source| Error::Extract {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            snapshotter: self.place.snapshotter.clone(),
            key: key.to_owned(),
            source: Box::new(source),
        })?;
        if applied.digest != wanted.as_str() {
            let (digest, wanted) = (layer.digest.clone(), wanted.clone());
            return Err(Error::DiffId { digest, found: applied.digest, wanted });
        }
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), wanted.to_string())]);
        set_labels(&self.unpacker.content, &layer.digest, labels).await
    }

    fn tell(&self, event: &str, layer: &Descriptor, progress: u64) {
        (self.unpacker.listener)(News {
            event: event.to_owned(),
            name: labels::ingest_reference(layer),
            parents: vec![self.parent.clone()],
            progress,
            total: layer.size,
            descriptor: Some(layer.clone()),
        });
    }
}
