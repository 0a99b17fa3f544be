//! Manifests and indexes: fetched whole, checked, read, and stored with the labels of their children.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use davit_content_store::Hasher;
use davit_model::{Digest, Labels};
use davit_oci::image::{
    self, Descriptor, MAX_DEPTH, MAX_DOCUMENT_SIZE, MAX_DOCUMENTS, MAX_DOCUMENTS_SIZE, MAX_LAYERS, Target,
};
use davit_oci::media_type;

use super::{Job, Plan, PullOptions, blob, wanted};
use crate::error::Error;
use crate::labels;
use crate::progress::State;
use crate::retry::Backoff;
use crate::store::{SinkError, SinkWriter};

/// A document that is to be fetched.
struct Next {
    descriptor: Descriptor,
    parent: Option<String>,
    depth: usize,
    /// Whether the configuration and the layers are wanted, too.
    whole: bool,
}

/// Fetches the documents of an image and notes what is to be fetched beyond them.
pub(super) async fn collect(
    job: &Arc<Job>,
    plan: &mut Plan,
    options: &PullOptions,
    root: &Descriptor,
) -> Result<(), Error> {
    let mut queue = VecDeque::new();
    queue.push_back(Next { descriptor: root.clone(), parent: None, depth: 0, whole: true });
    let mut documents = 0;
    while let Some(next) = queue.pop_front() {
        let Next { descriptor, parent, depth, whole } = next;
        documents += 1;
        if documents > MAX_DOCUMENTS {
            return Err(Error::TooMany { parts: "manifests", limit: MAX_DOCUMENTS });
        }
        let name = descriptor.media_type.as_str();
        if !media_type::is_manifest(name) && !media_type::is_index(name) {
            // Something that is no image: an index may list such, and a name may stand for it.
            if whole {
                blob::fetch(job, &descriptor, parent.as_deref(), true).await?;
                plan.add(&descriptor, job.source_labels());
            }
            continue;
        }
        match document(job, plan, &descriptor, parent.as_deref()).await? {
            Target::Index(index) => {
                if depth == MAX_DEPTH {
                    return Err(Error::TooMany { parts: "indexes within indexes", limit: MAX_DEPTH });
                }
                let chosen = wanted(&index.manifests, options);
                if chosen.is_empty() && whole {
                    return Err(Error::NoPlatform { digest: descriptor.digest.clone() });
                }
                for child in &index.manifests {
                    let whole = whole && chosen.iter().any(|one| one.digest == child.digest);
                    if whole || options.all_metadata {
                        let parent = Some(labels::ingest_reference(&descriptor));
                        queue.push_back(Next { descriptor: child.clone(), parent, depth: depth + 1, whole });
                    }
                }
            }
            Target::Manifest(manifest) => {
                if manifest.layers.len() > MAX_LAYERS {
                    return Err(Error::TooMany { parts: "layers", limit: MAX_LAYERS });
                }
                let config = &manifest.config;
                if media_type::is_config(&config.media_type) && config.size > MAX_DOCUMENT_SIZE {
                    return Err(too_large(config));
                }
                if whole {
                    for part in std::iter::once(config).chain(&manifest.layers) {
                        plan.add(part, job.source_labels());
                    }
                    plan.images.push((descriptor, manifest));
                } else {
                    blob::fetch(job, config, Some(&labels::ingest_reference(&descriptor)), false).await?;
                    plan.add(config, job.source_labels());
                }
            }
        }
    }
    Ok(())
}

/// What a document says, from the store or the registry; afterwards it is in the store.
async fn document(
    job: &Arc<Job>,
    plan: &mut Plan,
    descriptor: &Descriptor,
    parent: Option<&str>,
) -> Result<Target, Error> {
    let parse = |bytes: &[u8]| {
        image::parse_target(&descriptor.media_type, bytes)
            .map_err(|source| Error::Document { digest: descriptor.digest.clone(), source })
    };
    if descriptor.size > MAX_DOCUMENT_SIZE {
        return Err(too_large(descriptor));
    }
    plan.bytes += descriptor.size;
    if plan.bytes > MAX_DOCUMENTS_SIZE {
        let what = format!("the documents of {}", job.repository.reference);
        return Err(Error::TooLarge { what, limit: MAX_DOCUMENTS_SIZE });
    }
    job.tell(State::Waiting, descriptor, parent, 0);
    let Some(writer) = blob::open(job, descriptor).await? else {
        let (sink, digest) = (job.sink.clone(), descriptor.digest.clone());
        let read = blob::blocking("reading", "read", move || sink.read(&digest, MAX_DOCUMENT_SIZE)).await?;
        let target = parse(&read)?;
        plan.add(descriptor, labels_of(job, &target));
        job.tell(State::Exists, descriptor, parent, descriptor.size);
        return Ok(target);
    };
    job.tell(State::Downloading, descriptor, parent, 0);
    // Into memory first: it is committed with labels that are read out of it.
    let memory = Memory::new(&descriptor.digest);
    let mut backoff = Backoff::new(job.retry);
    job.repository.fetch(descriptor, Box::new(memory.clone()), &mut backoff, &|_| {}).await?;
    let bytes = memory.into_bytes();
    let target = parse(&bytes)?;
    let labels = labels_of(job, &target);
    plan.add(descriptor, labels.clone());
    let (size, digest) = (descriptor.size, descriptor.digest.clone());
    blob::blocking("storing a document", "write", move || {
        let mut writer = writer;
        // A blob that another namespace has is had whole, and by everybody at once: to write it anew is for one at a time.
        let is_whole = writer.offset() == bytes.len() as u64 && writer.digest() == digest;
        if !is_whole {
            if writer.offset() > 0 {
                writer.truncate()?;
            }
            writer.write(&bytes)?;
        }
        writer.commit(size, &digest, &labels)
    })
    .await?;
    job.tell(State::Done, descriptor, parent, descriptor.size);
    Ok(target)
}

/// The labels of a document.
fn labels_of(job: &Job, document: &Target) -> Labels {
    let mut labels = match document {
        Target::Index(index) => labels::of_children(&index.manifests),
        Target::Manifest(manifest) => {
            labels::of_children(std::iter::once(&manifest.config).chain(&manifest.layers))
        }
    };
    labels.extend(job.source_labels());
    labels
}

fn too_large(descriptor: &Descriptor) -> Error {
    let what = format!("{} byte document {}", descriptor.size, descriptor.digest);
    Error::TooLarge { what, limit: MAX_DOCUMENT_SIZE }
}

/// A writer into memory.
#[derive(Clone)]
struct Memory(Arc<Mutex<Written>>);

struct Written {
    bytes: Vec<u8>,
    hasher: Hasher,
}

impl Memory {
    fn new(digest: &Digest) -> Memory {
        Memory(Arc::new(Mutex::new(Written { bytes: Vec::new(), hasher: Hasher::new(digest.algorithm()) })))
    }

    fn with<T>(&self, call: impl FnOnce(&mut Written) -> T) -> T {
        call(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn into_bytes(self) -> Bytes {
        self.with(|written| std::mem::take(&mut written.bytes)).into()
    }
}

impl SinkWriter for Memory {
    fn offset(&self) -> u64 {
        self.with(|written| written.bytes.len() as u64)
    }

    fn digest(&self) -> Digest {
        self.with(|written| written.hasher.digest())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.with(|written| {
            written.bytes.extend_from_slice(bytes);
            written.hasher.update(bytes);
        });
        Ok(())
    }

    fn truncate(&mut self) -> Result<(), SinkError> {
        self.with(|written| {
            written.bytes.clear();
            written.hasher = Hasher::new(written.hasher.algorithm());
        });
        Ok(())
    }

    /// Its bytes are taken out instead.
    fn commit(self: Box<Self>, _: u64, _: &Digest, _: &Labels) -> Result<(), SinkError> {
        Ok(())
    }
}
