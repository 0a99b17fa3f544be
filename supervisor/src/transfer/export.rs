//! An export: images as a tar archive in OCI layout, which Docker can read as well.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, BufWriter, Read, Write};

use davit_distribution::{Source, labels, read_whole};
use davit_model::Digest;
use davit_oci::image::{
    self, ANNOTATION_IMAGE_NAME, ANNOTATION_REF_NAME, Descriptor, Index, MAX_DOCUMENT_SIZE, MAX_DOCUMENTS,
    Manifest, Target,
};
use davit_oci::media_type;
use davit_oci::platform::{self, Platform};
use davit_oci::reference::Reference;
use serde_json::json;
use tokio::sync::mpsc;

use super::store::NsSource;
use super::{Error, Listener, Local, News, Place, Transfers, target};
use crate::metadata::Scope;

/// The bytes of one message (containerd `core/transfer/streaming`).
const CHUNK: usize = 32 << 10;

/// What is exported, and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The platforms whose manifests an index is exported with; those of the first that it has are what Docker reads.
    pub platforms: Vec<Platform>,
    /// Whether an index is exported with all others, too.
    pub all_platforms: bool,
    /// Whether the archive has the table that Docker reads.
    pub for_docker: bool,
    /// Whether layers are left out that may not be distributed.
    pub skip_non_distributable: bool,
}

/// Sends the archive to `out`, piece by piece.
pub(super) async fn export(
    transfers: &Transfers,
    scope: &Scope,
    place: &Place,
    from: &Local,
    options: ExportOptions,
    out: mpsc::Sender<Vec<u8>>,
    listener: &Listener,
) -> Result<(), Error> {
    listener(News { event: "Exporting".to_owned(), ..News::default() });
    let own = Some(&from.name).filter(|name| !name.is_empty());
    let mut roots = Vec::new();
    for name in own.into_iter().chain(from.extra_names.iter().map(|extra| &extra.name)) {
        let image = transfers.metadata.images(scope).get(name)?;
        roots.push((target(&image)?, name.clone()));
    }
    let source = NsSource::new(transfers.metadata.content(scope), place.clone());
    let work = move || write(&source, &roots, &options, out);
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Interrupted { task: "exporting" })??;
    listener(News { event: "Completed export".to_owned(), ..News::default() });
    Ok(())
}

/// Names an image in an index, as containerd and others import it: by its full name, and by its tag.
pub(super) fn annotate(annotations: &mut BTreeMap<String, String>, name: &str) {
    let tag = name.split_once('/').and_then(|(_, path)| path.split_once([':', '@']));
    let tag = tag.map(|(_, tag)| tag).filter(|tag| !name.ends_with(&format!("@{tag}")));
    annotations.insert(ANNOTATION_IMAGE_NAME.to_owned(), name.to_owned());
    annotations.insert(ANNOTATION_REF_NAME.to_owned(), tag.unwrap_or(name).to_owned());
}

/// What an archive is to hold.
struct Plan<'a> {
    source: &'a NsSource,
    options: &'a ExportOptions,
    blobs: Vec<Descriptor>,
    seen: HashSet<Digest>,
    documents: usize,
}

/// An image as Docker reads it: one manifest, and all its names.
struct ForDocker {
    digest: Digest,
    manifest: Manifest,
    names: Vec<String>,
}

fn write(
    source: &NsSource,
    roots: &[(Descriptor, String)],
    options: &ExportOptions,
    out: mpsc::Sender<Vec<u8>>,
) -> Result<(), Error> {
    let mut plan = Plan { source, options, blobs: Vec::new(), seen: HashSet::new(), documents: 0 };
    let (mut manifests, mut docker) = (Vec::new(), Vec::<ForDocker>::new());
    for (root, name) in roots {
        let mut entry = root.clone();
        let found = source.labels(&root.digest).map_err(|source| content(&root.digest, source))?;
        entry.annotations.extend(found.into_iter().filter(|(key, _)| labels::is_source(key)));
        annotate(&mut entry.annotations, name);
        manifests.push(entry);
        let Some((digest, manifest)) = plan.root(root)? else { continue };
        // What Docker would not understand is no tag.
        let tag = name.parse::<Reference>().ok().map(|name| name.with_default_tag().familiar());
        match docker.iter_mut().find(|known| known.digest == digest) {
            Some(known) => known.names.extend(tag),
            None => docker.push(ForDocker { digest, manifest, names: tag.into_iter().collect() }),
        }
    }
    let index = Index { schema_version: 2, media_type: media_type::OCI_INDEX.to_owned(), manifests };
    let mut documents = vec![
        ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })),
        ("index.json", serde_json::to_value(&index).expect("an index has string keys only")),
    ];
    if options.for_docker && !docker.is_empty() {
        documents.push(("manifest.json", docker.iter().map(ForDocker::entry).collect()));
    }
    let failed = |source| Error::Export { source };
    let mut archive = tar::Builder::new(BufWriter::with_capacity(CHUNK, Sending(out)));
    for (name, document) in documents {
        let text = document.to_string();
        let mut header = header(text.len() as u64);
        archive.append_data(&mut header, name, text.as_bytes()).map_err(failed)?;
    }
    for blob in &plan.blobs {
        let reader = open(source, &blob.digest)?;
        let mut header = header(blob.size);
        // Of content that is shorter the archive would be broken; content has the size that its digest says.
        archive.append_data(&mut header, path(&blob.digest), reader.take(blob.size)).map_err(failed)?;
    }
    archive.into_inner().and_then(|mut writer| writer.flush()).map_err(failed)
}

impl ForDocker {
    fn entry(&self) -> serde_json::Value {
        let layers: Vec<String> = self.manifest.layers.iter().map(|layer| path(&layer.digest)).collect();
        json!({ "Config": path(&self.manifest.config.digest), "RepoTags": self.names, "Layers": layers })
    }
}

impl Plan<'_> {
    /// Notes what belongs to an image, and returns the manifest that Docker is to read.
    fn root(&mut self, root: &Descriptor) -> Result<Option<(Digest, Manifest)>, Error> {
        let best = match self.document(root)? {
            None => return Err(Error::NoManifest),
            Some(Target::Manifest(manifest)) => {
                self.collect(root)?;
                return Ok(Some((root.digest.clone(), manifest)));
            }
            Some(Target::Index(index)) => self.index(root, index)?,
        };
        Ok(match self.document(&best)? {
            Some(Target::Manifest(manifest)) => Some((best.digest, manifest)),
            Some(Target::Index(_)) | None => None,
        })
    }

    /// Notes an index with what is wanted of it, the best of which is returned.
    fn index(&mut self, root: &Descriptor, index: Index) -> Result<Descriptor, Error> {
        let Plan { options, .. } = *self;
        self.note(root);
        let is_wanted = |manifest: &&Descriptor| platform::is_wanted(manifest, &options.platforms);
        for manifest in index.manifests.iter().filter(|one| options.all_platforms || is_wanted(one)) {
            self.collect(manifest)?;
        }
        let mut wanted: Vec<Descriptor> = index.manifests.iter().filter(is_wanted).cloned().collect();
        platform::prefer(&mut wanted, &options.platforms);
        wanted.into_iter().next().ok_or(Error::NoPlatform)
    }

    /// Notes a blob and all that it names.
    fn collect(&mut self, descriptor: &Descriptor) -> Result<(), Error> {
        if !self.note(descriptor) {
            return Ok(());
        }
        let children = match self.document(descriptor)? {
            None => return Ok(()),
            Some(Target::Manifest(manifest)) => {
                std::iter::once(manifest.config).chain(manifest.layers).collect()
            }
            Some(Target::Index(index)) => index.manifests,
        };
        children.iter().try_for_each(|child| self.collect(child))
    }

    /// Notes a blob; false if that is known, or left out.
    fn note(&mut self, descriptor: &Descriptor) -> bool {
        let left_out =
            self.options.skip_non_distributable && media_type::is_non_distributable(&descriptor.media_type);
        let is_new = !left_out && self.seen.insert(descriptor.digest.clone());
        if is_new {
            self.blobs.push(descriptor.clone());
        }
        is_new
    }

    /// What a document says; none for what is no document.
    fn document(&mut self, descriptor: &Descriptor) -> Result<Option<Target>, Error> {
        let (kind, digest) = (descriptor.media_type.as_str(), &descriptor.digest);
        if !media_type::is_index(kind) && !media_type::is_manifest(kind) {
            return Ok(None);
        }
        self.documents += 1;
        if self.documents > MAX_DOCUMENTS {
            return Err(Error::TooManyParts);
        }
        let bytes = read_whole(open(self.source, digest)?, digest, MAX_DOCUMENT_SIZE);
        let bytes = bytes.map_err(|source| content(digest, source))?;
        let parsed = image::parse_target(kind, &bytes);
        parsed.map(Some).map_err(|source| Error::Document { digest: digest.clone(), source })
    }
}

fn content(digest: &Digest, source: davit_distribution::SinkError) -> Error {
    Error::Content { digest: digest.clone(), source }
}

fn open(source: &NsSource, digest: &Digest) -> Result<Box<dyn Read + Send>, Error> {
    source.open(digest).map_err(|source| content(digest, source))
}

fn path(digest: &Digest) -> String {
    format!("blobs/{}", digest.as_str().replacen(':', "/", 1))
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o444);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// A writer into a channel.
struct Sending(mpsc::Sender<Vec<u8>>);

impl Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(CHUNK)];
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone");
        self.0.blocking_send(piece.to_vec()).map_err(gone)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_as_containerd_names_them() {
        let tag = |name: &str| {
            let mut annotations = BTreeMap::new();
            annotate(&mut annotations, name);
            assert_eq!(annotations[ANNOTATION_IMAGE_NAME], name);
            annotations[ANNOTATION_REF_NAME].clone()
        };
        assert_eq!(tag("docker.io/library/busybox:1.36"), "1.36");
        assert_eq!(tag("localhost:5000/a/b:c"), "c");
        assert_eq!(tag("localhost:5000/a/b"), "localhost:5000/a/b");
        assert_eq!(tag("x.io/a:b@sha256:1"), "b@sha256:1");
        assert_eq!(tag("x.io/a@sha256:1"), "x.io/a@sha256:1");
        assert_eq!(tag("busybox:1"), "busybox:1");
    }
}
