//! An export: an image as a tar archive in OCI layout, which Docker can read as well.

use std::collections::HashSet;
use std::io::{self, BufWriter, Read, Write};

use davit_distribution::Source;
use davit_model::Digest;
use davit_oci::image::{self, Descriptor, MAX_DOCUMENT_SIZE, Manifest, Target};
use davit_oci::media_type;
use davit_oci::platform::{self, Platform};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::store::NsSource;
use super::{Error, Local, Transfers, target};
use crate::metadata::Scope;

/// The bytes of one message (containerd `core/transfer/streaming`).
const CHUNK: usize = 32 << 10;
/// The most documents of an image.
const MAX_DOCUMENTS: usize = 1024;

/// What is exported of an index.
#[derive(Debug, Clone)]
pub enum Platforms {
    /// All that it names.
    All,
    /// The best manifest for each of these.
    Each(Vec<Platform>),
}

/// Sends the archive to `out`, piece by piece.
pub(super) async fn export(
    transfers: &Transfers,
    scope: &Scope,
    from: &Local,
    platforms: Platforms,
    for_docker: bool,
    out: mpsc::Sender<Vec<u8>>,
) -> Result<(), Error> {
    let extra = from.extra_names.iter().filter(|extra| !extra.is_prefix).map(|extra| extra.name.clone());
    let mut roots = Vec::new();
    for name in std::iter::once(from.name.clone()).filter(|name| !name.is_empty()).chain(extra) {
        let image = transfers.metadata.images(scope).get(&name)?;
        roots.push((target(&image)?, name));
    }
    if roots.is_empty() {
        return Err(Error::NoName);
    }
    let source = NsSource::new(transfers.metadata.content(scope));
    let work = move || write(&source, &roots, &platforms, for_docker, out);
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Interrupted { task: "exporting" })?
}

/// What an archive is to hold.
#[derive(Default)]
struct Plan {
    blobs: Vec<Descriptor>,
    seen: HashSet<Digest>,
    manifests: Vec<Manifest>,
    documents: usize,
}

fn write(
    source: &NsSource,
    roots: &[(Descriptor, String)],
    platforms: &Platforms,
    for_docker: bool,
    out: mpsc::Sender<Vec<u8>>,
) -> Result<(), Error> {
    let (mut plan, mut entries, mut docker) = (Plan::default(), Vec::new(), Vec::new());
    for (root, name) in roots {
        let first = plan.manifests.len();
        collect(source, root, platforms, &mut plan)?;
        entries.push(entry(root, name));
        if let Some(manifest) = plan.manifests.get(first) {
            docker.push(json!({
                "Config": path(&manifest.config.digest),
                "RepoTags": [name],
                "Layers": manifest.layers.iter().map(|layer| path(&layer.digest)).collect::<Vec<_>>(),
            }));
        }
    }
    let failed = |source| Error::Export { source };
    let mut archive = tar::Builder::new(BufWriter::with_capacity(CHUNK, Sending(out)));
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": entries });
    let mut documents = vec![("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })), ("index.json", index)];
    if for_docker && !docker.is_empty() {
        documents.push(("manifest.json", Value::Array(docker)));
    }
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

fn collect(
    source: &NsSource,
    descriptor: &Descriptor,
    platforms: &Platforms,
    plan: &mut Plan,
) -> Result<(), Error> {
    if !plan.seen.insert(descriptor.digest.clone()) {
        return Ok(());
    }
    plan.blobs.push(descriptor.clone());
    let kind = descriptor.media_type.as_str();
    if !media_type::is_index(kind) && !media_type::is_manifest(kind) {
        return Ok(());
    }
    let document = |source| Error::Document { digest: descriptor.digest.clone(), source };
    plan.documents += 1;
    if plan.documents > MAX_DOCUMENTS {
        let reason = "the image has too many documents".to_owned();
        return Err(document(image::DocumentError::Unusable { reason }));
    }
    let mut bytes = Vec::new();
    let read = open(source, &descriptor.digest)?.take(MAX_DOCUMENT_SIZE + 1).read_to_end(&mut bytes);
    read.map_err(|source| Error::Read { digest: descriptor.digest.clone(), source })?;
    let children: Vec<Descriptor> = match image::parse_target(kind, &bytes).map_err(document)? {
        Target::Manifest(manifest) => {
            plan.manifests.push(manifest.clone());
            std::iter::once(manifest.config).chain(manifest.layers).collect()
        }
        Target::Index(index) => match platforms {
            Platforms::All => index.manifests,
            Platforms::Each(each) => {
                let best = |platform| platform::best(&index.manifests, platform).cloned();
                each.iter().filter_map(best).collect()
            }
        },
    };
    children.iter().try_for_each(|child| collect(source, child, platforms, plan))
}

fn open(source: &NsSource, digest: &Digest) -> Result<Box<dyn Read + Send>, Error> {
    source.open(digest).map_err(|source| Error::Content { digest: digest.clone(), source })
}

/// The descriptor of an image with the names by which containerd and others import it.
fn entry(root: &Descriptor, name: &str) -> Value {
    let tag = name.rsplit('/').next().unwrap_or_default().split_once(':').map_or("latest", |(_, tag)| tag);
    json!({
        "mediaType": root.media_type,
        "digest": root.digest.to_string(),
        "size": root.size,
        "annotations": {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": tag,
        },
    })
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
