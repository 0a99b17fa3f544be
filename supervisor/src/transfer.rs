//! Transfers: images between registries, archives and the image store, done by the daemon itself.
//!
//! ```text
//!   pull:  registry ──▶ content ──▶ snapshots (while later layers still come) ──▶ image record
//!   push:  image record ──▶ content ──▶ registry
//!   tag:   image record ──▶ image record
//!   export: image record ──▶ content ──▶ archive
//!   import: archive ──▶ content ──▶ snapshots ──▶ image records
//! ```
//!
//! What a pull or an import makes belongs to a lease until the image record keeps it; unless the call names one, the lease ends with the
//! transfer, also when its client goes away, and expires after a day should the daemon die. What a daemon that died had
//! fetched of a blob is resumed by the next pull within that day.

mod archive;
mod error;
mod export;
mod import;
mod names;
mod pull;
mod store;
mod unpack;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use davit_distribution as distribution;
use davit_distribution::{Observer, Progress, PushOptions, Registry, State};
use davit_model::{Digest, Labels};
use davit_oci::image::{Descriptor, MAX_DOCUMENT_SIZE};
use davit_oci::platform::Platform;
use davit_oci::reference::Reference;
use futures::future::BoxFuture;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::Instrument;

use crate::differs::Differs;
use crate::lane;
use crate::metadata::{self, Content, Image, Leases, Metadata, Scope, gc};
pub use error::Error;
pub use export::ExportOptions;
use names::Named;
use store::NsSource;

/// How long a lease keeps what a daemon that died left behind.
const LEASE_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// An image in a registry, and how that is reached.
#[derive(Debug, Clone)]
pub struct Remote {
    /// The reference as its client wrote it.
    pub text: String,
    /// What it means.
    pub reference: Reference,
    /// Hosts, headers and credentials.
    pub options: distribution::Options,
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OCI Registry ({})", self.text)
    }
}

/// A further name for an image.
#[derive(Debug, Clone, Default)]
pub struct ExtraName {
    /// The name, or what comes before a tag or a digest.
    pub name: String,
    /// Whether it is not a name by itself.
    pub is_prefix: bool,
    /// Whether an image of an archive may have a name with another prefix.
    pub allow_overwrite: bool,
    /// Whether the digest is added.
    pub add_digest: bool,
    /// Whether it is not, if the archive names the image.
    pub skip_named_digest: bool,
}

/// What is to be unpacked and where.
#[derive(Debug, Clone)]
pub struct Unpack {
    /// The platform of the image.
    pub platform: Platform,
    /// The snapshotter; the usual one if it is empty.
    pub snapshotter: String,
}

/// An image in the store, or one that is to be made there.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Its name.
    pub name: String,
    /// The labels of its record.
    pub labels: Labels,
    /// The platforms that are wanted; all if there are none.
    pub platforms: Vec<Platform>,
    /// Whether the documents of all other platforms are wanted too.
    pub all_metadata: bool,
    /// The most manifests of an index that are pulled, or that an import looks into; 0 for no limit.
    pub manifest_limit: usize,
    /// Further names for the same.
    pub extra_names: Vec<ExtraName>,
    /// What is to be unpacked.
    pub unpacks: Vec<Unpack>,
}

/// What is told of a transfer while it runs, in the words that clients of containerd show.
#[derive(Debug, Clone, Default)]
pub struct News {
    /// What has happened.
    pub event: String,
    /// What it has happened to: an image or, by the name of its ingest, content.
    pub name: String,
    /// What names it.
    pub parents: Vec<String>,
    /// Bytes done.
    pub progress: u64,
    /// Bytes to do.
    pub total: u64,
    /// What is moved.
    pub descriptor: Option<Descriptor>,
}

/// Who is told. Must be quick.
pub type Listener = Arc<dyn Fn(News) + Send + Sync>;

/// Does transfers. Clones are the same.
#[derive(Clone)]
pub struct Transfers {
    metadata: Metadata,
    differs: Differs,
    places: Arc<Semaphore>,
    /// Of those that wait for other processes: one that does not answer keeps places from its like only.
    proxy_places: Arc<Semaphore>,
    /// Of those whose bytes come from a client, or go to one: a thread each.
    archive_places: Arc<Semaphore>,
}

impl Transfers {
    /// Transfers into and out of `metadata`, with layers unpacked by `differs`.
    pub fn new(metadata: Metadata, differs: Differs) -> Transfers {
        let places = |count| Arc::new(Semaphore::new(count));
        Transfers {
            metadata,
            differs,
            places: places(lane::TRANSFERS),
            proxy_places: places(lane::PROXY_TRANSFERS),
            archive_places: places(lane::ARCHIVES),
        }
    }

    /// Where an image waits for its turn.
    fn places_for(&self, to: &Local) -> &Arc<Semaphore> {
        let snapshotters = to.unpacks.iter().map(|unpack| unpack::snapshotter(unpack, &self.metadata));
        let mut waits =
            snapshotters.map(|name| self.metadata.is_process(name) || self.differs.asks_others(name));
        if waits.any(|waits| waits) { &self.proxy_places } else { &self.places }
    }

    /// Pulls an image.
    ///
    /// # Errors
    /// [`Error`]; nothing is made known of an image that could not be pulled and unpacked.
    pub async fn pull(
        &self,
        scope: &Scope,
        from: &Remote,
        to: &Local,
        listener: &Listener,
    ) -> Result<(), Error> {
        let place = turn(self.places_for(to)).await;
        let (scope, held) = self.hold(scope).await?;
        held.finish(pull::pull(self, &scope, &place, from, to, listener).await).await
    }

    /// Pushes an image.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn push(
        &self,
        scope: &Scope,
        from: &Local,
        to: &Remote,
        listener: &Listener,
    ) -> Result<(), Error> {
        let place = turn(&self.places).await;
        let image = self.metadata.images(scope).get(&from.name)?;
        let root = target(&image)?;
        let about = |event: &str| News {
            event: event.to_owned(),
            name: image.name.clone(),
            descriptor: Some(root.clone()),
            ..News::default()
        };
        listener(News { event: format!("Pushing to {to}"), ..News::default() });
        listener(about("pushing content"));
        let repository = Registry::new(to.options.clone()).repository(&to.reference).await?;
        let source = Arc::new(NsSource::new(self.metadata.content(scope), place.clone()));
        let options = PushOptions { platforms: from.platforms.clone(), ..PushOptions::default() };
        let observer = Arc::new(Telling { listener: listener.clone(), root: image.name.clone() });
        distribution::push(&repository, source, &root, &options, observer).await?;
        let descriptor = Some(root.clone());
        listener(News { event: format!("Completed push to {to}"), descriptor, ..News::default() });
        listener(about("pushed content"));
        Ok(())
    }

    /// Gives an image further names.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn tag(&self, scope: &Scope, from: &Local, to: &Local) -> Result<(), Error> {
        let image = self.metadata.images(scope).get(&from.name)?;
        let root = target(&image)?;
        let names = names::required(to, root.digest.as_str())?;
        let (transfers, scope) = (self.clone(), scope.clone());
        to_the_end(async move { transfers.save(&scope, names, &root).await.map(drop) }).await
    }

    /// Sends images as an archive to `out`.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn export(
        &self,
        scope: &Scope,
        from: &Local,
        options: ExportOptions,
        out: mpsc::Sender<Vec<u8>>,
        listener: &Listener,
    ) -> Result<(), Error> {
        let place = turn(&self.archive_places).await;
        let (scope, held) = self.hold(scope).await?;
        let exported = export::export(self, &scope, &place, from, options, out, listener).await;
        held.end().await;
        exported
    }

    /// Stores the images of the archive whose bytes come from `pieces`. With `compress`, layers of an archive that has
    /// no manifests are stored compressed.
    ///
    /// # Errors
    /// [`Error`]; no image is made known of an archive that could not be read and unpacked.
    pub async fn import(
        &self,
        scope: &Scope,
        pieces: mpsc::Receiver<Vec<u8>>,
        compress: bool,
        to: &Local,
        listener: &Listener,
    ) -> Result<(), Error> {
        let place = turn(&self.archive_places).await;
        let (scope, held) = self.hold(scope).await?;
        held.finish(import::import(self, &scope, &place, pieces, compress, to, listener).await).await
    }

    /// The scope with a lease: that of the call, or a new one, which ends with what comes out beside it.
    async fn hold(&self, scope: &Scope) -> Result<(Scope, Held), Error> {
        let leases = self.metadata.leases(scope);
        if scope.lease().is_some() {
            return Ok((scope.clone(), Held { leases, id: None }));
        }
        let labels =
            Labels::from([(gc::LABEL_EXPIRE.to_owned(), rfc3339(SystemTime::now() + LEASE_LIFETIME))]);
        // In a task of its own: who gives up while the lease is made still ends it.
        let making = tokio::spawn(async move {
            let lease = leases.create(None, labels).await?;
            Ok::<_, metadata::Error>(Held { leases, id: Some(lease.id) })
        });
        let held = making.await.map_err(|_| Error::Interrupted { task: "making a lease" })??;
        let scope = Scope::new(scope.namespace(), held.id.as_deref())?;
        Ok((scope, held))
    }

    /// Makes records of these names, in place of those that are there, and returns the names.
    async fn save(
        &self,
        scope: &Scope,
        names: Vec<Named>,
        target: &Descriptor,
    ) -> Result<Vec<String>, Error> {
        let target = metadata::Descriptor::from(target);
        let images = self.metadata.images(scope);
        for (name, labels) in &names {
            let target = target.clone();
            let image = Image { name: name.clone(), labels: labels.clone(), target, ..Image::default() };
            loop {
                match images.create(image.clone(), None).await {
                    Err(metadata::Error::AlreadyExists { .. }) => {}
                    made => break made.map(drop)?,
                }
                match images.update(image.clone(), &[], None).await {
                    // Removed in this moment.
                    Err(metadata::Error::NotFound { .. }) => {}
                    made => break made.map(drop)?,
                }
            }
        }
        Ok(names.into_iter().map(|(name, _)| name).collect())
    }
}

/// A turn among the transfers. What blocks has it as well: who gives up does not free the threads of his transfer.
type Place = Arc<OwnedSemaphorePermit>;

/// Waits for a turn.
async fn turn(places: &Arc<Semaphore>) -> Place {
    Arc::new(places.clone().acquire_owned().await.expect("the places are never closed"))
}

/// What makes a transfer known whose content is there.
type Known = BoxFuture<'static, Result<(), Error>>;

/// Runs work to its end even if the caller goes away.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let work = tokio::spawn(work.in_current_span());
    work.await.unwrap_or(Err(Error::Interrupted { task: "making an image known" }))
}

/// A lease that ends with a transfer, however that ends.
struct Held {
    leases: Leases,
    id: Option<String>,
}

impl Held {
    /// Does what makes a transfer known, the records and the labels of what is there, and then ends the lease. Once that
    /// has begun it goes on to its end, whoever waits: who gives up finds all names of an image or none.
    async fn finish(self, made: Result<Known, Error>) -> Result<(), Error> {
        match made {
            Ok(known) => {
                to_the_end(async move {
                    let done = known.await;
                    self.end().await;
                    done
                })
                .await
            }
            Err(error) => {
                self.end().await;
                Err(error)
            }
        }
    }

    async fn end(mut self) {
        if let Some(id) = self.id.take() {
            end(self.leases.clone(), id).await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let (Some(id), Ok(runtime)) = (self.id.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(end(self.leases.clone(), id));
        }
    }
}

async fn end(leases: Leases, id: String) {
    if let Err(error) = leases.delete(&id, false).await {
        tracing::debug!(%error, lease = id, "the lease of a transfer is left to expire");
    }
}

/// Tells a listener of what the registry client does with the parts of an image.
struct Telling {
    listener: Listener,
    /// What the outermost document is told to be a part of.
    root: String,
}

impl Observer for Telling {
    fn progress(&self, progress: Progress) {
        let event = match progress.state {
            State::Waiting => "waiting",
            State::Downloading => "downloading",
            State::Uploading => "uploading",
            State::Exists | State::Mounted => "already exists",
            State::Done => "complete",
        };
        (self.listener)(News {
            event: event.to_owned(),
            name: progress.reference,
            parents: vec![progress.parent.unwrap_or_else(|| self.root.clone())],
            progress: progress.offset,
            total: progress.total,
            descriptor: Some(progress.descriptor),
        });
    }
}

/// The target of an image's record as the descriptor of a document.
fn target(image: &Image) -> Result<Descriptor, Error> {
    let metadata::Descriptor { media_type, digest, size, annotations } = &image.target;
    let digest = digest.parse().map_err(|source| Error::Target { name: image.name.clone(), source })?;
    let mut target = Descriptor::new(media_type, digest, u64::try_from(*size).unwrap_or(0));
    target.annotations.clone_from(annotations);
    Ok(target)
}

/// The bytes of a document that is in the store.
async fn document(content: &Content, digest: &Digest) -> Result<Vec<u8>, Error> {
    let reader = content.reader(digest).await?;
    let wanted = digest.clone();
    let read = content.lane().run(move || distribution::read_whole(reader, &wanted, MAX_DOCUMENT_SIZE)).await;
    read.map_err(|_| Error::Interrupted { task: "reading a document" })?
        .map_err(|source| Error::Content { digest: digest.clone(), source })
}

/// Gives content these labels beside those that it has.
async fn set_labels(content: &Content, digest: &Digest, mut wanted: Labels) -> Result<(), Error> {
    let found = content.info(digest)?.labels;
    wanted.retain(|key, value| found.get(key) != Some(value));
    if wanted.is_empty() {
        return Ok(());
    }
    let paths: Vec<String> = wanted.keys().map(|key| format!("labels.{key}")).collect();
    content.update(digest, wanted, &paths).await?;
    Ok(())
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).expect("a time of this century can be written")
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_begins_to_be_known_is_known_whoever_gives_up() {
        let (begin, begun) = oneshot::channel();
        let (go, gone) = oneshot::channel::<()>();
        let (known, heard) = oneshot::channel();
        let waiting = tokio::spawn(to_the_end(async move {
            let _ = begin.send(());
            let _ = gone.await;
            let _ = known.send(());
            Ok(())
        }));
        begun.await.unwrap();
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        go.send(()).unwrap();
        heard.await.unwrap();
    }

    #[tokio::test]
    async fn a_turn_ends_with_the_last_thread_of_a_transfer() {
        let places = Arc::new(Semaphore::new(1));
        let place = turn(&places).await;
        let held_by_a_thread = place.clone();
        drop(place);
        assert_eq!(places.available_permits(), 0);
        drop(held_by_a_thread);
        assert_eq!(places.available_permits(), 1);
    }
}
