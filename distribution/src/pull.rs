//! Pulling an image: its documents, its configuration, and its layers side by side.
//!
//! ```text
//! name ── resolve ──▶ manifest or index ──▶ manifests that are asked for ──▶ configuration ──▶ layers
//!                          (documents are read, checked and stored one after the other)      (side by side)
//! ```
//!
//! What is in the store is not fetched. What another pull of the same store fetches just now is waited for. Unpacking
//! is the caller's: it is told of each image when its documents are there, and then of its layers, lowest first, as
//! soon as each one and those below it are complete.

mod blob;
mod document;

use std::collections::HashMap;
use std::sync::Arc;

use davit_model::{Digest, Labels};
use davit_oci::image::{Descriptor, Manifest};
use davit_oci::platform::{self, Platform};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::error::Error;
use crate::labels;
use crate::progress::{Observer, Progress, State};
use crate::registry::Retry;
use crate::repository::Repository;
use crate::store::Sink;

/// Which manifests of an index are pulled. A manifest that is named directly is always pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Platforms {
    /// All.
    All,
    /// The one that runs best on this platform.
    Best(Platform),
    /// The best one for each of these.
    Each(Vec<Platform>),
}

/// How an image is pulled.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// Which manifests of an index.
    pub platforms: Platforms,
    /// The documents of all manifests of an index are pulled, and only those of `platforms` with their layers
    /// (containerd's `all_metadata`).
    pub all_metadata: bool,
    /// The most manifests of an index that are pulled whole, the first of `platforms` first; 0 for no limit.
    pub manifest_limit: usize,
    /// How many layers are fetched at once.
    pub parallel: usize,
    /// Whether the receiver of what is ready is asked which layers it wants, as long as there is one image: the lowest may be
    /// somewhere already, and need not be fetched.
    pub ask: bool,
    /// How a blob whose connection breaks is tried again. Attempts that bring a megabyte do not count.
    pub retry: Retry,
}

impl Default for PullOptions {
    fn default() -> PullOptions {
        // Three is the number of Docker and of containerd's CRI plugin.
        let platforms = Platforms::Best(Platform::host());
        PullOptions {
            platforms,
            all_metadata: false,
            manifest_limit: 0,
            parallel: 3,
            ask: false,
            retry: Retry::default(),
        }
    }
}

/// Takes the place of the first layer that is wanted.
pub type Wanted = Arc<watch::Sender<Option<usize>>>;

/// What is ready to be unpacked.
#[derive(Debug, Clone)]
pub enum Ready {
    /// The documents of an image; its layers follow.
    Image {
        /// The manifest.
        manifest: Descriptor,
        /// The configuration, which is in the store.
        config: Descriptor,
        /// The layers, lowest first.
        layers: Vec<Descriptor>,
        /// Where the receiver says from which layer on it wants them, if it is [asked](PullOptions::ask). Who drops it wants
        /// all.
        wanted: Option<Wanted>,
    },
    /// A layer is in the store, and so are those below it.
    Layer {
        /// The manifest of its image.
        manifest: Digest,
        /// Its place, from 0.
        index: usize,
        /// The layer.
        layer: Descriptor,
    },
}

/// Pulls `root`, which the repository's reference was [resolved](Repository::resolve) to, into a store. All content is
/// returned with the labels that it should have: what keeps the children of a document from being collected, and where it
/// comes from. What was fetched was committed with them; content that was there already may lack them.
///
/// Dropping the future ends it; what was fetched of a blob
/// stays in the store and is resumed by the next pull, of this process or a later one. What is sent to `ready` must be
/// received while the pull runs; a receiver that is slow delays the news, not the downloads.
///
/// # Errors
/// Those of requests, of the store, and of images that are not what they should be.
pub async fn pull(
    repository: &Repository,
    root: &Descriptor,
    sink: Arc<dyn Sink>,
    options: &PullOptions,
    observer: Arc<dyn Observer>,
    ready: Option<mpsc::Sender<Ready>>,
) -> Result<Vec<(Descriptor, Labels)>, Error> {
    let job = Arc::new(Job {
        repository: repository.clone(),
        sink,
        retry: options.retry,
        observer,
        layers: Semaphore::new(options.parallel.max(1)),
    });
    let mut plan = Plan { contents: HashMap::new(), order: Vec::new(), images: Vec::new(), bytes: 0 };
    document::collect(&job, &mut plan, options, root).await?;
    fetch_all(&job, &plan, options.ask, ready).await?;
    let mut contents = plan.contents;
    Ok(plan.order.iter().filter_map(|digest| contents.remove(digest)).collect())
}

/// What the tasks of a pull share.
struct Job {
    repository: Repository,
    sink: Arc<dyn Sink>,
    retry: Retry,
    observer: Arc<dyn Observer>,
    layers: Semaphore,
}

/// What is known of the image so far.
struct Plan {
    contents: HashMap<Digest, (Descriptor, Labels)>,
    order: Vec<Digest>,
    /// Manifests whose configuration and layers are wanted.
    images: Vec<(Descriptor, Manifest)>,
    /// Bytes of documents.
    bytes: u64,
}

impl Plan {
    fn add(&mut self, descriptor: &Descriptor, labels: Labels) {
        if self.contents.insert(descriptor.digest.clone(), (descriptor.clone(), labels)).is_none() {
            self.order.push(descriptor.digest.clone());
        }
    }
}

impl Job {
    /// The labels of content that comes from here.
    fn source_labels(&self) -> Labels {
        let reference = &self.repository.reference;
        labels::with_source(None, reference)
            .map(|value| Labels::from([(labels::source_key(reference), value)]))
            .unwrap_or_default()
    }

    fn tell(&self, state: State, descriptor: &Descriptor, parent: Option<&str>, offset: u64) {
        self.observer.progress(Progress {
            state,
            reference: labels::ingest_reference(descriptor),
            descriptor: descriptor.clone(),
            parent: parent.map(str::to_owned),
            offset,
            total: descriptor.size,
        });
    }
}

/// The manifests of an index that are wanted whole.
fn wanted<'a>(manifests: &'a [Descriptor], options: &PullOptions) -> Vec<&'a Descriptor> {
    let mut wanted: Vec<&Descriptor> = Vec::new();
    let each = match &options.platforms {
        Platforms::All => {
            wanted.extend(manifests);
            &[]
        }
        Platforms::Best(platform) => std::slice::from_ref(platform),
        Platforms::Each(each) => each,
    };
    for best in each.iter().filter_map(|platform| platform::best(manifests, platform)) {
        if !wanted.iter().any(|one| one.digest == best.digest) {
            wanted.push(best);
        }
    }
    if options.manifest_limit > 0 {
        wanted.truncate(options.manifest_limit);
    }
    wanted
}

/// Fetches the configurations and layers of the plan's images, and tells of what is ready.
async fn fetch_all(
    job: &Arc<Job>,
    plan: &Plan,
    ask: bool,
    ready: Option<mpsc::Sender<Ready>>,
) -> Result<(), Error> {
    let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
    // Images share layers: what one does not want another may.
    let wanted = (ask && ready.is_some() && plan.images.len() == 1).then(|| Arc::new(watch::channel(None).0));
    let mut complete: HashMap<Digest, watch::Receiver<bool>> = HashMap::new();
    for (manifest, parsed) in &plan.images {
        for descriptor in std::iter::once(&parsed.config).chain(&parsed.layers) {
            if complete.contains_key(&descriptor.digest) {
                continue;
            }
            let (done, receiver) = watch::channel(false);
            complete.insert(descriptor.digest.clone(), receiver);
            let (job, descriptor, parent) =
                (job.clone(), descriptor.clone(), labels::ingest_reference(manifest));
            // A configuration is small and what the unpacking begins with: it does not wait for a place.
            let is_layer = descriptor.digest != parsed.config.digest;
            // The last place: a layer may be in an image several times.
            let place = parsed.layers.iter().rposition(|layer| layer.digest == descriptor.digest);
            let wanted = wanted.as_ref().filter(|_| is_layer).map(|wanted| wanted.subscribe());
            tasks.spawn(async move {
                if let (Some(mut wanted), Some(place)) = (wanted, place) {
                    let first = wanted.wait_for(Option::is_some).await.ok().and_then(|first| *first);
                    if place < first.unwrap_or_default() {
                        job.tell(State::Exists, &descriptor, Some(&parent), descriptor.size);
                        done.send_replace(true);
                        return Ok(());
                    }
                }
                blob::fetch(&job, &descriptor, Some(&parent), is_layer).await?;
                done.send_replace(true);
                Ok(())
            });
        }
    }
    if let Some(ready) = ready {
        for (manifest, parsed) in plan.images.clone() {
            tasks.spawn(announce(manifest, parsed, wanted.clone(), complete.clone(), ready.clone()));
        }
    }
    // Who is asked has it now, or nobody.
    drop(wanted);
    while let Some(finished) = tasks.join_next().await {
        // The first error ends the others when the set is dropped.
        finished.map_err(|_| Error::Task { task: "fetching" })??;
    }
    Ok(())
}

/// Tells of one image and its layers, in their order.
async fn announce(
    manifest: Descriptor,
    parsed: Manifest,
    wanted: Option<Wanted>,
    mut complete: HashMap<Digest, watch::Receiver<bool>>,
    ready: mpsc::Sender<Ready>,
) -> Result<(), Error> {
    let digest = manifest.digest.clone();
    let mut news = vec![(
        parsed.config.digest.clone(),
        Ready::Image { manifest, config: parsed.config, layers: parsed.layers.clone(), wanted },
    )];
    for (index, layer) in parsed.layers.into_iter().enumerate() {
        news.push((layer.digest.clone(), Ready::Layer { manifest: digest.clone(), index, layer }));
    }
    for (awaited, news) in news {
        let Some(receiver) = complete.get_mut(&awaited) else { continue };
        // A sender that is gone has failed, and its task tells why; a receiver that is gone wants no news.
        if receiver.wait_for(|done| *done).await.is_err() || ready.send(news).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
