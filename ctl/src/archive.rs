//! Image archives: OCI layouts and what `docker save` writes, as tars, plain or compressed with gzip.
//!
//! An archive is read once, front to back, so that it may come from a pipe; blobs go to a sink as they pass, and only
//! the small tables of contents are kept. Nothing is ever written to a path: names in the archive are keys of a map.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Cursor, Read};

use davit_model::{Algorithm, Digest};
use davit_oci::image::{
    ANNOTATION_IMAGE_NAME, ANNOTATION_REF_NAME, Descriptor, Index, MAX_DOCUMENT_SIZE, Manifest,
};
use davit_oci::media_type::{self, Compression};
use davit_oci::reference::Reference;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// The most entries of an archive, which bounds the memory for their names.
const MAX_ENTRIES: usize = 100_000;
/// The most bytes of a name in an archive.
const MAX_NAME: usize = 4096;
/// The most characters of a reason that may quote the archive.
const MAX_REASON: usize = 200;
/// How many links may lead from one to the next.
const MAX_LINKS: usize = 16;

/// What an archive held, apart from the blobs themselves.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// `index.json` of an OCI layout.
    index: Option<Vec<u8>>,
    /// `manifest.json` of `docker save`.
    manifests: Option<Vec<u8>>,
    /// The blobs, by their names in the archive.
    blobs: BTreeMap<String, Blob>,
    /// Links from one name to another.
    links: BTreeMap<String, String>,
}

/// A blob that went to the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    digest: Digest,
    size: u64,
    compression: Compression,
}

/// An image of the archive that is to be made known to the daemon.
#[derive(Debug)]
pub(crate) struct Named {
    /// The full name, `None` when the archive has none.
    pub(crate) name: Option<Reference>,
    /// A tag without a name, as the image spec allows.
    pub(crate) tag: Option<String>,
    /// The manifest or index.
    pub(crate) target: Descriptor,
    /// The manifest, when it was made here and must be uploaded too.
    pub(crate) manifest: Option<Vec<u8>>,
}

/// What becomes of the blobs: it gets the digest that the name promises, if there is one, the size and the bytes.
pub(crate) type Sink<'a> = dyn FnMut(Option<&Digest>, u64, &mut dyn Read) -> Result<()> + 'a;

/// One element of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// The reader of an archive's tar, inflated if it is compressed.
///
/// # Errors
/// When the first bytes cannot be read, or the compression is not supported.
pub(crate) fn inflate(reader: Box<dyn Read + Send>) -> Result<Box<dyn Read + Send>> {
    let mut reader = BufReader::with_capacity(256 << 10, reader);
    let start = reader.fill_buf().map_err(read_error)?;
    match Compression::detect(start) {
        Compression::None => Ok(Box::new(reader)),
        Compression::Gzip => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader))),
        Compression::Zstd => {
            Err(Error::Archive { reason: "archives compressed with zstd are not supported".to_owned() })
        }
    }
}

/// Reads a whole archive and hands its blobs to `sink`.
///
/// # Errors
/// [`Error::Archive`] when it is not well formed, and those of the sink.
pub(crate) fn read(reader: impl Read, sink: &mut Sink<'_>) -> Result<Contents> {
    let mut archive = tar::Archive::new(reader);
    let mut contents = Contents::default();
    for (count, entry) in archive.entries().map_err(read_error)?.enumerate() {
        let mut entry = match entry {
            Ok(entry) => entry,
            // What the parser says of a file that is something else altogether helps nobody.
            Err(_) if count == 0 => return Err(Error::Archive { reason: "it is not a tar".to_owned() }),
            Err(error) => return Err(read_error(error)),
        };
        if count >= MAX_ENTRIES {
            return Err(Error::Archive { reason: format!("it has more than {MAX_ENTRIES} entries") });
        }
        let bytes = entry.path_bytes();
        let name = match std::str::from_utf8(&bytes) {
            Ok(name) if name.len() <= MAX_NAME => normalize("", name),
            _ => {
                return Err(Error::Archive {
                    reason: "it has a name that is too long or no text".to_owned(),
                });
            }
        };
        let kind = entry.header().entry_type();
        if kind.is_symlink() || kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default();
            let target = String::from_utf8_lossy(&target).into_owned();
            let folder =
                if kind.is_symlink() { name.rsplit_once('/').map_or("", |(folder, _)| folder) } else { "" };
            let target = normalize(folder, &target);
            contents.links.insert(name, target);
        } else if kind.is_file() {
            contents.read_file(name, entry.size(), &mut entry, sink)?;
        }
    }
    if contents.index.is_none() && contents.manifests.is_none() {
        return Err(Error::Archive { reason: "it has neither an index.json nor a manifest.json".to_owned() });
    }
    Ok(contents)
}

impl Contents {
    fn read_file(
        &mut self,
        name: String,
        size: u64,
        reader: &mut dyn Read,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        match name.as_str() {
            "index.json" => self.index = Some(read_document(&name, size, reader)?),
            "manifest.json" => self.manifests = Some(read_document(&name, size, reader)?),
            // The marker of a layout, and what the first versions of `docker save` wrote for even older ones.
            "oci-layout" | "repositories" => {}
            _ if name.ends_with("/VERSION") || name.ends_with("/json") => {}
            _ => {
                let blob = pass_on(&name, size, reader, sink)?;
                self.blobs.insert(name, blob);
            }
        }
        Ok(())
    }

    /// The images of the archive. An OCI layout comes before `docker save`'s table, since newer versions of that write
    /// both.
    ///
    /// # Errors
    /// [`Error::Archive`] when a table is not well formed, or names a blob that is not there.
    pub(crate) fn images(&self) -> Result<Vec<Named>> {
        let from_layout = self.index.as_deref().map(|bytes| self.layout_images(bytes)).transpose()?;
        let saved = || self.manifests.as_deref().map(|bytes| self.saved_images(bytes)).transpose();
        match from_layout {
            Some(images) if images.iter().any(|image| image.name.is_some() || image.tag.is_some()) => {
                Ok(images)
            }
            // A layout without names: perhaps the other table has them.
            Some(images) => {
                Ok(saved()?.filter(|saved| saved.iter().any(|i| i.name.is_some())).unwrap_or(images))
            }
            None => Ok(saved()?.unwrap_or_default()),
        }
    }

    fn layout_images(&self, bytes: &[u8]) -> Result<Vec<Named>> {
        let index: Index = davit_oci::image::parse_index(bytes)?;
        let mut images = Vec::new();
        for target in index.manifests {
            if !media_type::is_index(&target.media_type) && !media_type::is_manifest(&target.media_type) {
                continue;
            }
            let key = format!("blobs/{}/{}", target.digest.algorithm().as_str(), target.digest.hex());
            self.blob(&key)?;
            let annotation = |key: &str| target.annotations.get(key).filter(|value| !value.is_empty());
            let ref_name = annotation(ANNOTATION_REF_NAME);
            let looks_full = |name: &&String| name.contains([':', '/']);
            let full = annotation(ANNOTATION_IMAGE_NAME).or(ref_name.filter(looks_full));
            let name =
                full.map(|name| name.parse::<Reference>()).transpose()?.map(Reference::with_default_tag);
            let tag = if name.is_none() { ref_name.cloned() } else { None };
            images.push(Named { name, tag, target, manifest: None });
        }
        Ok(images)
    }

    fn saved_images(&self, bytes: &[u8]) -> Result<Vec<Named>> {
        let saved: Vec<SavedImage> = serde_json::from_slice(bytes)
            .map_err(|error| Error::Archive { reason: format!("manifest.json: {error}") })?;
        let mut images = Vec::new();
        for image in saved {
            let config = self.blob(&normalize("", &image.config))?;
            let mut layers = Vec::new();
            for layer in &image.layers {
                let blob = self.blob(&normalize("", layer))?;
                layers.push(Descriptor::new(blob.compression.docker_layer(), blob.digest, blob.size));
            }
            let manifest = Manifest {
                schema_version: 2,
                media_type: media_type::DOCKER_MANIFEST.to_owned(),
                config: Descriptor::new(media_type::DOCKER_CONFIG, config.digest, config.size),
                layers,
            };
            let bytes = serde_json::to_vec(&manifest).expect("a manifest has string keys only");
            let digest = davit_oci::chain::sha256(&bytes);
            let target = Descriptor::new(media_type::DOCKER_MANIFEST, digest, bytes.len() as u64);
            let tags = image.repo_tags.unwrap_or_default();
            let named =
                |name| Named { name, tag: None, target: target.clone(), manifest: Some(bytes.clone()) };
            if tags.is_empty() {
                images.push(named(None));
            }
            for tag in tags {
                images.push(named(Some(tag.parse::<Reference>()?.with_default_tag())));
            }
        }
        Ok(images)
    }

    /// The blob of a name, links followed.
    fn blob(&self, name: &str) -> Result<Blob> {
        let mut name = name;
        for _ in 0..MAX_LINKS {
            if let Some(blob) = self.blobs.get(name) {
                return Ok(blob.clone());
            }
            let Some(target) = self.links.get(name) else { break };
            name = target;
        }
        Err(Error::Archive { reason: format!("{name:?} is missing") })
    }
}

/// Hands one file to the sink, hashing what has no digest in its name.
fn pass_on(name: &str, size: u64, reader: &mut dyn Read, sink: &mut Sink<'_>) -> Result<Blob> {
    let mut start = Vec::with_capacity(Compression::MAGIC_LENGTH);
    reader.take(Compression::MAGIC_LENGTH as u64).read_to_end(&mut start).map_err(read_error)?;
    let compression = Compression::detect(&start);
    let expected =
        name.strip_prefix("blobs/").and_then(|rest| rest.replacen('/', ":", 1).parse::<Digest>().ok());
    let mut whole = Cursor::new(start).chain(reader);
    let digest = match expected {
        // Whoever stores the blob compares.
        Some(digest) => {
            sink(Some(&digest), size, &mut whole)?;
            digest
        }
        None => {
            let mut hashing = Hashing::new(whole);
            sink(None, size, &mut hashing)?;
            hashing.finish()?.0
        }
    };
    Ok(Blob { digest, size, compression })
}

/// A reader that knows the digest and the number of what went through it.
pub(crate) struct Hashing<R> {
    inner: R,
    hash: Sha256,
    count: u64,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(inner: R) -> Hashing<R> {
        Hashing { inner, hash: Sha256::new(), count: 0 }
    }

    /// Reads what is left, which a sink that had no use for it did not, and returns digest and size of it all.
    pub(crate) fn finish(mut self) -> Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink()).map_err(read_error)?;
        let digest = Digest::from_bytes(Algorithm::Sha256, &self.hash.finalize());
        Ok((digest.expect("SHA-256 has its own length"), self.count))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}

fn read_document(name: &str, size: u64, reader: &mut dyn Read) -> Result<Vec<u8>> {
    if size > MAX_DOCUMENT_SIZE {
        return Err(Error::Archive {
            reason: format!("its {name} has {size} bytes, more than {MAX_DOCUMENT_SIZE}"),
        });
    }
    let mut bytes = Vec::new();
    reader.take(MAX_DOCUMENT_SIZE).read_to_end(&mut bytes).map_err(read_error)?;
    Ok(bytes)
}

/// Reading the archive failed: its own bytes are wrong, or the file or pipe cannot be read.
pub(crate) fn read_error(source: io::Error) -> Error {
    let text = source.to_string();
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON).collect();
    Error::Archive { reason: clean }
}

/// A name without `.`, `..`, doubled and leading slashes, relative to `folder`: a key, never a path.
fn normalize(folder: &str, name: &str) -> String {
    let mut parts: Vec<&str> = if name.starts_with('/') { Vec::new() } else { folder.split('/').collect() };
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            other => parts.push(other),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use davit_oci::chain::sha256;

    use super::*;

    enum File<'a> {
        Data(&'a str, Vec<u8>),
        Link(&'a str, &'a str),
    }

    fn tar(files: Vec<File<'_>>) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for file in files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            match file {
                File::Data(name, data) => {
                    header.set_size(data.len() as u64);
                    builder.append_data(&mut header, name, data.as_slice()).unwrap();
                }
                File::Link(name, target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_size(0);
                    builder.append_link(&mut header, name, target).unwrap();
                }
            }
        }
        builder.into_inner().unwrap()
    }

    fn read_all(bytes: &[u8]) -> Result<(Contents, Vec<Vec<u8>>)> {
        let mut blobs = Vec::new();
        let contents = read(bytes, &mut |_, _, reader| {
            let mut blob = Vec::new();
            reader.read_to_end(&mut blob).map_err(read_error)?;
            blobs.push(blob);
            Ok(())
        })?;
        Ok((contents, blobs))
    }

    fn index(annotations: &str, digest: &Digest) -> Vec<u8> {
        format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{digest}","size":2,
            "annotations":{{{annotations}}}}}]}}"#,
            media_type::OCI_MANIFEST
        )
        .into_bytes()
    }

    #[test]
    fn a_layout_with_each_kind_of_name() {
        let digest = sha256(b"{}");
        let blob = format!("blobs/sha256/{}", digest.hex());
        let name = |annotations: &str| {
            let files = vec![
                File::Data("index.json", index(annotations, &digest)),
                File::Data(&blob, b"{}".to_vec()),
                File::Data("oci-layout", b"{}".to_vec()),
            ];
            let (contents, blobs) = read_all(&tar(files)).unwrap();
            assert_eq!(blobs, [b"{}"]);
            let image = contents.images().unwrap().remove(0);
            (image.name.map(|name| name.to_string()), image.tag)
        };
        let full = || Some("docker.io/library/busybox:latest".to_owned());
        assert_eq!(name(r#""io.containerd.image.name":"docker.io/library/busybox:latest""#), (full(), None));
        assert_eq!(name(r#""org.opencontainers.image.ref.name":"busybox:latest""#), (full(), None));
        assert_eq!(
            name(r#""org.opencontainers.image.ref.name":"latest""#),
            (None, Some("latest".to_owned()))
        );
        assert_eq!(name(""), (None, None));
    }

    #[test]
    fn what_docker_saves_links_included() {
        let files = vec![
            File::Data("abc/layer.tar", vec![0x1f, 0x8b, 1]),
            File::Data("abc/VERSION", b"1.0".to_vec()),
            File::Data("abc/json", b"{}".to_vec()),
            File::Link("def/layer.tar", "../abc/layer.tar"),
            File::Data("config.json", b"{\"a\":1}".to_vec()),
            File::Data(
                "manifest.json",
                br#"[{"Config":"config.json","RepoTags":["busybox:1","x.io/y"],"Layers":["abc/layer.tar","def/layer.tar"]}]"#
                    .to_vec(),
            ),
        ];
        let (contents, blobs) = read_all(&tar(files)).unwrap();
        assert_eq!(blobs.len(), 2);
        let images = contents.images().unwrap();
        let names: Vec<String> =
            images.iter().map(|image| image.name.as_ref().unwrap().to_string()).collect();
        assert_eq!(names, ["docker.io/library/busybox:1", "x.io/y:latest"]);
        let bytes = images[0].manifest.as_ref().unwrap();
        let manifest = davit_oci::image::parse_manifest(bytes).unwrap();
        assert_eq!(images[0].target.digest, sha256(bytes));
        assert_eq!(manifest.layers[0].digest, sha256(&[0x1f, 0x8b, 1]));
        assert_eq!(manifest.layers[0], manifest.layers[1]);
        assert_eq!(manifest.layers[0].media_type, media_type::DOCKER_LAYER_GZIP);
        assert_eq!(manifest.config.size, 7);
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        assert!(read_all(&tar(vec![File::Data("etc/passwd", b"x".to_vec())])).is_err());
        assert!(read_all(b"no tar at all, but long enough to look at").is_err());
        let loop_of_links = tar(vec![
            File::Link("a", "b"),
            File::Link("b", "a"),
            File::Data("manifest.json", br#"[{"Config":"a","Layers":[]}]"#.to_vec()),
        ]);
        assert!(read_all(&loop_of_links).unwrap().0.images().is_err());
        let missing = tar(vec![File::Data("index.json", index("", &sha256(b"gone")))]);
        assert!(read_all(&missing).unwrap().0.images().is_err());
    }

    #[test]
    fn compressed_archives_are_inflated() {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"hello").unwrap();
        let mut text = String::new();
        let bytes = encoder.finish().unwrap();
        inflate(Box::new(Cursor::new(bytes))).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(inflate(Box::new(Cursor::new(vec![0x28, 0xb5, 0x2f, 0xfd]))).is_err());
    }

    #[test]
    fn names_become_keys() {
        assert_eq!(normalize("", "./a//b/../c"), "a/c");
        assert_eq!(normalize("a/b", "../c"), "a/c");
        assert_eq!(normalize("a/b", "/c"), "c");
        assert_eq!(normalize("", "../../etc"), "etc");
    }
}
