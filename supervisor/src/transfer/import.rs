//! An import: an archive into content, its images unpacked, and their names last.
//!
//! ```text
//!   archive ──▶ blobs and an index ──▶ documents read from the top, labelled ──▶ names from annotations
//!                                               │ manifests of wanted platforms
//!                                               └──▶ layers unpacked
//! ```
//!
//! What the archive's documents name may be missing, as containerd has it, unless it is a document itself or is to be
//! unpacked: archives leave out other platforms, and layers that may not be distributed.

use std::collections::{HashSet, VecDeque};
use std::io::{self, Read};
use std::sync::Arc;

use davit_distribution::{Ready, labels};
use davit_model::Digest;
use davit_oci::image::{self, Descriptor, MAX_DEPTH, MAX_DOCUMENTS, MAX_DOCUMENTS_SIZE, MAX_LAYERS, Target};
use davit_oci::media_type;
use davit_oci::platform::{is_wanted, prefer};
use futures::FutureExt;
use tokio::sync::mpsc;

use super::archive::{Depot, check_size};
use super::store::NsSink;
use super::unpack::Unpacker;
use super::{Error, Known, Listener, Local, News, Place, Transfers, names, set_labels};
use crate::metadata::{Content, Scope};

/// News of layers that wait to be unpacked.
const QUEUE: usize = 64;

/// Imports into a scope that has a lease, and gives what is left to do when all is there.
pub(super) async fn import(
    transfers: &Transfers,
    scope: &Scope,
    place: &Place,
    pieces: mpsc::Receiver<Vec<u8>>,
    compress: bool,
    to: &Local,
    listener: &Listener,
) -> Result<Known, Error> {
    listener(News { event: "Importing".to_owned(), ..News::default() });
    let content = transfers.metadata.content(scope);
    let leases = transfers.metadata.leases(scope);
    let sink = NsSink::new(content.clone(), leases, scope.lease().unwrap_or_default(), place.clone());
    let depot = Depot::new(content.clone(), sink);
    let storing = tokio::task::spawn_blocking(move || depot.store(Incoming::new(pieces), compress));
    let root = storing.await.map_err(|_| Error::Interrupted { task: "reading an archive" })??;

    // containerd tells nothing of the layers of an import.
    let silence: Listener = Arc::new(|_| ());
    let unpacker = Unpacker::new(transfers, scope, &to.unpacks, None, &silence)?;
    let (news, ready) = mpsc::channel(QUEUE);
    let walk = Walk { content, to, news: (!unpacker.is_idle()).then_some(news) };
    // Whichever fails first ends the other; what an unfinished unpacking leaves belongs to the lease.
    let (images, ()) = tokio::try_join!(walk.run(&root), unpacker.run(ready))?;

    let index = (names::asked_for(to, root.digest.as_str()), root);
    let annotated = images.into_iter().map(|image| {
        let names = names::annotated(to, image.digest.as_str(), &image.annotations);
        (names, image)
    });
    let named: Vec<_> = std::iter::once(index).chain(annotated).collect();
    let (transfers, scope, listener) = (transfers.clone(), scope.clone(), listener.clone());
    let known = async move {
        let mut saved = Vec::new();
        for (names, descriptor) in named {
            // What nobody has a name for is left to the collector.
            for name in transfers.save(&scope, names, &descriptor).await? {
                saved.push(News {
                    event: "saved".to_owned(),
                    name,
                    descriptor: Some(descriptor.clone()),
                    ..News::default()
                });
            }
        }
        // As with a pull, the names come last.
        listener(News { event: "Completed import".to_owned(), ..News::default() });
        saved.into_iter().for_each(|news| listener(news));
        Ok(())
    };
    Ok(known.boxed())
}

/// A look at all documents that are wanted, from an index downwards.
struct Walk<'a> {
    content: Content,
    to: &'a Local,
    /// Who is told of what can be unpacked.
    news: Option<mpsc::Sender<Ready>>,
}

impl Walk<'_> {
    /// Labels the documents with what keeps their children, and returns the images of the index, all of them.
    async fn run(self, root: &Descriptor) -> Result<Vec<Descriptor>, Error> {
        let mut images = Vec::new();
        let (mut seen, mut size, mut is_empty) = (HashSet::<Digest>::new(), 0, true);
        let mut queue = VecDeque::from([(root.clone(), 0)]);
        while let Some((descriptor, depth)) = queue.pop_front() {
            let kind = descriptor.media_type.as_str();
            if !media_type::is_index(kind) && !media_type::is_manifest(kind) {
                self.check(&descriptor)?;
                continue;
            }
            if !seen.insert(descriptor.digest.clone()) {
                continue;
            }
            size += descriptor.size;
            if seen.len() > MAX_DOCUMENTS || size > MAX_DOCUMENTS_SIZE || depth > MAX_DEPTH {
                return Err(Error::TooManyParts);
            }
            let children = self.children(&descriptor).await?;
            if descriptor.digest == root.digest {
                images.clone_from(&children);
            }
            set_labels(&self.content, &descriptor.digest, labels::of_children(&children)).await?;
            let wanted = self.wanted(&descriptor, children)?;
            is_empty &= wanted.is_empty();
            queue.extend(wanted.into_iter().map(|child| (child, depth + 1)));
        }
        if is_empty {
            return Err(Error::Empty);
        }
        Ok(images)
    }

    /// What a document names; layers of a wanted manifest are announced on the way.
    async fn children(&self, descriptor: &Descriptor) -> Result<Vec<Descriptor>, Error> {
        let digest = &descriptor.digest;
        check_size(digest, self.content.info(digest)?.size, descriptor.size)?;
        let bytes = super::document(&self.content, digest).await?;
        let parsed = image::parse_target(&descriptor.media_type, &bytes);
        match parsed.map_err(|source| Error::Document { digest: digest.clone(), source })? {
            Target::Index(index) => Ok(index.manifests),
            Target::Manifest(manifest) => {
                let (config, layers) = (manifest.config, manifest.layers);
                if layers.len() > MAX_LAYERS {
                    return Err(Error::TooManyParts);
                }
                if let Some(news) = &self.news
                    && is_wanted(descriptor, &self.to.platforms)
                {
                    announce(news, descriptor, &config, &layers).await;
                }
                Ok(std::iter::once(config).chain(layers).collect())
            }
        }
    }

    /// Which of its children are wanted.
    fn wanted(&self, parent: &Descriptor, mut children: Vec<Descriptor>) -> Result<Vec<Descriptor>, Error> {
        let platforms = &self.to.platforms;
        if !self.to.all_metadata {
            children.retain(|child| is_wanted(child, platforms));
        } else if media_type::is_manifest(&parent.media_type) && !is_wanted(parent, platforms) {
            children.retain(|child| media_type::is_config(&child.media_type));
        }
        if self.to.manifest_limit > 0 && media_type::is_index(&parent.media_type) {
            if children.is_empty() {
                return Err(Error::NoPlatform);
            }
            prefer(&mut children, platforms);
            children.truncate(self.to.manifest_limit);
        }
        Ok(children)
    }

    /// Checks what is there of a part that is no document.
    fn check(&self, part: &Descriptor) -> Result<(), Error> {
        match self.content.info(&part.digest) {
            Ok(info) => check_size(&part.digest, info.size, part.size),
            Err(crate::metadata::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Tells of an image and of its layers, all of which are there as far as they will be.
async fn announce(
    news: &mpsc::Sender<Ready>,
    manifest: &Descriptor,
    config: &Descriptor,
    layers: &[Descriptor],
) {
    let image = Ready::Image {
        manifest: manifest.clone(),
        config: config.clone(),
        layers: layers.to_vec(),
        wanted: None,
    };
    let layer = |(index, layer): (usize, &Descriptor)| Ready::Layer {
        manifest: manifest.digest.clone(),
        index,
        layer: layer.clone(),
    };
    for ready in std::iter::once(image).chain(layers.iter().enumerate().map(layer)) {
        // An unpacker that is gone has failed, and tells why.
        let _ = news.send(ready).await;
    }
}

/// The bytes that come on a channel. That the sender is gone is the end; a transfer that was given up ends so too, and
/// then nobody takes what was made of it.
struct Incoming {
    pieces: mpsc::Receiver<Vec<u8>>,
    current: io::Cursor<Vec<u8>>,
}

impl Incoming {
    fn new(pieces: mpsc::Receiver<Vec<u8>>) -> Incoming {
        Incoming { pieces, current: io::Cursor::default() }
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.current.read(buffer)? {
                0 if !buffer.is_empty() => match self.pieces.blocking_recv() {
                    Some(piece) => self.current = io::Cursor::new(piece),
                    None => return Ok(0),
                },
                length => return Ok(length),
            }
        }
    }
}
