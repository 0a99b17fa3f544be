//! Pushing an image: its blobs side by side, then its manifests, then the indexes, the outermost last and by its tag, so
//! that a name never stands for something incomplete.

use std::sync::Arc;

use bytes::Bytes;
use davit_model::{Coded, Digest, ErrorCode, Labels};
use davit_oci::image::{self, Descriptor, MAX_DOCUMENT_SIZE, MAX_DOCUMENTS, Target};
use davit_oci::media_type;
use davit_oci::platform::{self, Platform};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::error::Error;
use crate::labels;
use crate::progress::{Observer, Pace, Progress, State};
use crate::registry::Retry;
use crate::repository::Repository;
use crate::retry::Backoff;
use crate::store::{Source, read_whole};
use crate::upload::Uploaded;

/// How an image is pushed.
#[derive(Debug, Clone)]
pub struct PushOptions {
    /// The platforms whose manifests are pushed; all if there are none. An index is pushed as it is, and most registries
    /// refuse one whose manifests they lack.
    pub platforms: Vec<Platform>,
    /// How many blobs are sent at once.
    pub parallel: usize,
    /// How a blob whose connection breaks is tried again.
    pub retry: Retry,
}

impl Default for PushOptions {
    fn default() -> PushOptions {
        PushOptions { platforms: Vec::new(), parallel: 3, retry: Retry::default() }
    }
}

/// A document to push, with its bytes and the document that names it.
type Document = (Descriptor, Bytes, Option<String>);

/// Pushes an image to the repository, under the tag of its reference, or by its digest if that has no tag or names
/// another digest.
///
/// # Errors
/// Those of requests and of the store; content that is not in the store.
pub async fn push(
    repository: &Repository,
    source: Arc<dyn Source>,
    root: &Descriptor,
    options: &PushOptions,
    observer: Arc<dyn Observer>,
) -> Result<(), Error> {
    let (documents, blobs) = plan(&source, root, options).await?;
    let job = Arc::new(Job { repository: repository.clone(), source, observer, retry: options.retry });
    for (document, _, parent) in &documents {
        job.tell(State::Waiting, document, parent.as_deref(), 0);
    }
    let places = Arc::new(Semaphore::new(options.parallel.max(1)));
    let mut tasks = JoinSet::new();
    for (blob, parent, labels) in blobs {
        let (job, places) = (job.clone(), places.clone());
        tasks.spawn(async move {
            job.tell(State::Waiting, &blob, Some(&parent), 0);
            let _place = places.acquire().await;
            job.push_blob(&blob, &parent, labels).await
        });
    }
    while let Some(finished) = tasks.join_next().await {
        finished.map_err(|_| Error::Task { task: "pushing" })??;
    }
    // A document comes after those that it names: they were found in the other order.
    for (document, bytes, parent) in documents.into_iter().rev() {
        let reference = &repository.reference;
        let by_tag = parent.is_none() && reference.digest().is_none_or(|digest| *digest == document.digest);
        let tag = if by_tag { reference.tag() } else { None };
        job.tell(State::Uploading, &document, parent.as_deref(), 0);
        let uploaded = repository.put_manifest(&document, bytes, tag).await;
        let uploaded = uploaded.map_err(|error| match &error {
            Error::Status { status, .. }
                if status.as_u16() == 400 && media_type::is_index(&document.media_type) =>
            {
                Error::Incomplete { source: Box::new(error) }
            }
            _ => error,
        })?;
        job.tell_end(&uploaded, &document, parent.as_deref());
    }
    Ok(())
}

struct Job {
    repository: Repository,
    source: Arc<dyn Source>,
    observer: Arc<dyn Observer>,
    retry: Retry,
}

impl Job {
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

    fn tell_end(&self, uploaded: &Uploaded, descriptor: &Descriptor, parent: Option<&str>) {
        let state = match uploaded {
            Uploaded::Sent => State::Done,
            Uploaded::Existed => State::Exists,
            Uploaded::Mounted(_) => State::Mounted,
        };
        self.tell(state, descriptor, parent, descriptor.size);
    }

    async fn push_blob(
        self: &Arc<Self>,
        blob: &Descriptor,
        parent: &str,
        labels: Labels,
    ) -> Result<(), Error> {
        let from = labels::mount_source(&labels, &self.repository.reference);
        let told = {
            let (job, blob, parent) = (self.clone(), blob.clone(), parent.to_owned());
            let pace = Pace::new();
            move |offset| {
                if pace.is_due() {
                    job.tell(State::Uploading, &blob, Some(&parent), offset);
                }
            }
        };
        let backoff = Backoff::new(self.retry);
        let (repository, source) = (&self.repository, self.source.clone());
        let uploaded = repository.put_blob(blob, source, from.as_deref(), backoff, Arc::new(told)).await?;
        self.tell_end(&uploaded, blob, Some(parent));
        Ok(())
    }
}

type Blobs = Vec<(Descriptor, String, Labels)>;

/// Reads the documents, outermost first, and lists the blobs that they name, each once, with the labels of the blob and
/// of the documents around it.
async fn plan(
    source: &Arc<dyn Source>,
    root: &Descriptor,
    options: &PushOptions,
) -> Result<(Vec<Document>, Blobs), Error> {
    let (source, root, platforms) = (source.clone(), root.clone(), options.platforms.clone());
    tokio::task::spawn_blocking(move || {
        let (mut documents, mut blobs): (Vec<Document>, Blobs) = (Vec::new(), Vec::new());
        let mut queue = std::collections::VecDeque::from([(root, None)]);
        while let Some((descriptor, parent)) = queue.pop_front() {
            if documents.iter().any(|(known, _, _)| known.digest == descriptor.digest) {
                continue;
            }
            if documents.len() == MAX_DOCUMENTS {
                return Err(Error::TooMany { parts: "manifests", limit: MAX_DOCUMENTS });
            }
            let bytes = read(&*source, &descriptor)?;
            let digest = descriptor.digest.clone();
            let parsed = image::parse_target(&descriptor.media_type, &bytes)
                .map_err(|source| Error::Document { digest: digest.clone(), source })?;
            let own = labels_of(&*source, &digest)?;
            let children: Vec<Descriptor> = match parsed {
                Target::Index(index) => {
                    index.manifests.into_iter().filter(|one| is_wanted(one, &platforms)).collect()
                }
                Target::Manifest(manifest) => {
                    std::iter::once(manifest.config).chain(manifest.layers).collect()
                }
            };
            let named_by = labels::ingest_reference(&descriptor);
            documents.push((descriptor, bytes, parent));
            for child in children {
                let name = child.media_type.as_str();
                if media_type::is_manifest(name) || media_type::is_index(name) {
                    queue.push_back((child, Some(named_by.clone())));
                } else if !blobs.iter().any(|(known, _, _)| known.digest == child.digest) {
                    // A registry has the parts of what it has.
                    let mut labels = own.clone();
                    labels.extend(labels_of(&*source, &child.digest)?);
                    blobs.push((child, named_by.clone(), labels));
                }
            }
        }
        Ok((documents, blobs))
    })
    .await
    .map_err(|_| Error::Task { task: "reading documents" })?
}

fn is_wanted(descriptor: &Descriptor, platforms: &[Platform]) -> bool {
    platforms.is_empty()
        || platforms
            .iter()
            .any(|platform| platform::best(std::slice::from_ref(descriptor), platform).is_some())
}

fn labels_of(source: &dyn Source, digest: &Digest) -> Result<Labels, Error> {
    match source.labels(digest) {
        Ok(labels) => Ok(labels),
        // Content that is missing fails where it is needed.
        Err(error) if error.code() == ErrorCode::NotFound => Ok(Labels::new()),
        Err(source) => Err(Error::Store { action: "read labels", source }),
    }
}

fn read(source: &dyn Source, descriptor: &Descriptor) -> Result<Bytes, Error> {
    let failed = |source| Error::Store { action: "read", source };
    let reader = source.open(&descriptor.digest).map_err(failed)?;
    Ok(read_whole(reader, &descriptor.digest, MAX_DOCUMENT_SIZE).map_err(failed)?.into())
}
