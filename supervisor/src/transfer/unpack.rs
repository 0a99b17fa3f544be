//! Unpacking while a pull goes on: each layer onto those below it, as soon as it is in the store.
//!
//! ```text
//!   Ready::Image ──▶ configuration read ──▶ for each platform and snapshotter that is asked for, a task:
//!   Ready::Layer ──▶   prepare on the parent ──▶ apply ──▶ diff id compared ──▶ commit as its chain id ──▶ next
//!   all layers   ──▶   the configuration is labelled, and with it the image keeps the snapshots
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use davit_distribution::{Ready, labels};
use davit_model::{Digest, Labels, Mount};
use davit_oci::image::{self, Descriptor, ImageConfig};
use davit_oci::platform::{self, Platform};
use davit_oci::{chain, media_type};
use davit_snapshotter::{native, overlayfs};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::{Error, Listener, News, Transfers, Unpack, document, set_labels};
use crate::differs::Differs;
use crate::metadata::{self, Content, Scope, Snapshots};

/// The label by which a snapshotter is told which snapshot a layer becomes.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
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
}

/// Unpacks what a pull brings.
pub(super) struct Unpacker {
    content: Content,
    places: Vec<Place>,
    differs: Differs,
    listener: Listener,
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
        listener: &Listener,
    ) -> Result<Unpacker, Error> {
        let metadata = &transfers.metadata;
        let usual = [overlayfs::NAME, native::NAME];
        let mut places = Vec::new();
        for Unpack { platform, snapshotter } in unpacks {
            let usual = usual.into_iter().find(|name| metadata.snapshotters().contains_key(*name));
            let name =
                if snapshotter.is_empty() { usual.unwrap_or(overlayfs::NAME) } else { snapshotter.as_str() };
            if platform.os != "linux" || !metadata.snapshotters().contains_key(name) {
                tracing::warn!(%platform, snapshotter = name, "Unpack configuration not supported, skipping");
                continue;
            }
            let (platform, snapshotter) = (platform.clone(), name.to_owned());
            places.push(Place { platform, snapshotter, snapshots: metadata.snapshots(scope, name)? });
        }
        let content = metadata.content(scope);
        Ok(Unpacker { content, places, differs: transfers.differs.clone(), listener: listener.clone() })
    }

    /// Whether there is nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.places.is_empty()
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
                    Some(Ready::Image { manifest, config, layers }) => {
                        let started = unpacker.start(&manifest, &config, &layers, &mut tasks).await?;
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
        tasks: &mut JoinSet<Result<(), Error>>,
    ) -> Result<Vec<mpsc::UnboundedSender<usize>>, Error> {
        // Other things than images have manifests too.
        if !media_type::is_config(&config.media_type) {
            return Ok(Vec::new());
        }
        let parsed = self.config(config).await?;
        let mut described = manifest.clone();
        described.platform = Some(Platform::of(&parsed));
        let mut started = Vec::new();
        for place in &self.places {
            if platform::best(std::slice::from_ref(&described), &place.platform).is_none() {
                continue;
            }
            let diff_ids = parsed.rootfs.diff_ids.clone();
            if diff_ids.len() != layers.len() {
                return Err(Error::Layers { layers: layers.len(), diff_ids: diff_ids.len() });
            }
            let (sender, receiver) = mpsc::unbounded_channel();
            let image = Unpacking {
                unpacker: self.clone(),
                place: place.clone(),
                parent: labels::ingest_reference(manifest),
                config: config.digest.clone(),
                layers: layers.to_vec(),
                chain: chain::chain_ids(&diff_ids),
                diff_ids,
            };
            tasks.spawn(image.run(receiver).in_current_span());
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
    config: Digest,
    layers: Vec<Descriptor>,
    diff_ids: Vec<Digest>,
    chain: Vec<Digest>,
}

impl Unpacking {
    async fn run(self, mut ready: mpsc::UnboundedReceiver<usize>) -> Result<(), Error> {
        let mut done = 0;
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

    #[tracing::instrument(name = "unpack", level = "debug", skip_all, fields(digest = %self.layers[index].digest))]
    async fn layer(&self, index: usize) -> Result<(), Error> {
        let snapshots = &self.place.snapshots;
        let (name, layer) = (self.chain[index].to_string(), &self.layers[index]);
        let parent = index.checked_sub(1).map(|below| self.chain[below].to_string());
        let labels = Labels::from([(SNAPSHOT_REF.to_owned(), name.clone())]);
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

/// What nothing else of a transfer has in its name, of this daemon or an earlier one.
pub(super) fn unique() -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{nanos}-{}", NUMBER.fetch_add(1, Ordering::Relaxed))
}
