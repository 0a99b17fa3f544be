//! Image archives on their way to the daemon: the tar that holds them, plain or compressed with gzip, and what their
//! images are called.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use davit_model::Digest;
use davit_model::digest::Algorithm;
use davit_oci::archive::{ArchiveError, Contents, Saved, Sink};
use davit_oci::image::{ANNOTATION_IMAGE_NAME, ANNOTATION_REF_NAME, Descriptor, Index};
use davit_oci::media_type::{self, Compression};
use davit_oci::reference::Reference;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// The most characters of a reason that may quote the archive.
const MAX_REASON: usize = 200;

/// The most bytes between the data of one member and that of the next. The parser keeps in memory what they say, such as a long name.
const MAX_HEADERS: u64 = 1 << 20;

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

impl From<ArchiveError> for Error {
    fn from(error: ArchiveError) -> Error {
        Error::Archive { reason: clean(&davit_model::error::chain(&error)) }
    }
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
pub(crate) fn read(reader: impl Read, sink: &mut Sink<'_, Error>) -> Result<Contents> {
    let left = Rc::new(Cell::new(u64::MAX));
    let mut archive = tar::Archive::new(Metered { inner: reader, left: left.clone() });
    let mut contents = Contents::default();
    let mut entries = archive.entries().map_err(read_error)?;
    let mut is_first = true;
    loop {
        left.set(MAX_HEADERS);
        let mut entry = match entries.next() {
            None => return Ok(contents),
            Some(Ok(entry)) => entry,
            Some(Err(_)) if left.get() == 0 => {
                return Err(Error::Archive { reason: "a member's headers are too large".to_owned() });
            }
            // What the parser says of a file that is something else altogether helps nobody.
            Some(Err(_)) if is_first => return Err(Error::Archive { reason: "it is not a tar".to_owned() }),
            Some(Err(error)) => return Err(read_error(error)),
        };
        is_first = false;
        left.set(u64::MAX);
        let name = entry.path_bytes().into_owned();
        let kind = entry.header().entry_type();
        if kind.is_symlink() || kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default();
            contents.link(&name, &target, kind.is_symlink())?;
        } else if kind.is_file() {
            contents.file(&name, entry.size(), &mut entry, sink)?;
        }
        // What nobody had a use for is no part of the next one's headers.
        io::copy(&mut entry, &mut io::sink()).map_err(read_error)?;
    }
}

/// A reader of which only so much is read.
struct Metered<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let limit = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.inner.read(&mut buffer[..limit])?;
        self.left.set(left - count as u64);
        Ok(count)
    }
}

/// The images of an archive. A layout comes before `docker save`'s table, since newer versions of that write both; but
/// not one without names, if the table has them.
///
/// # Errors
/// [`Error::Archive`] when a table is not well formed, or names a blob that is not there.
pub(crate) fn images(contents: &Contents) -> Result<Vec<Named>> {
    let layout = contents.layout()?.map(|(_, index)| layout_images(contents, index)).transpose()?;
    let saved = || contents.saved().map(|saved| saved.map(saved_images));
    match layout {
        Some(images) if images.iter().any(|image| image.name.is_some() || image.tag.is_some()) => Ok(images),
        Some(images) => Ok(saved()?.filter(|saved| saved.iter().any(|i| i.name.is_some())).unwrap_or(images)),
        None => Ok(saved()?.ok_or(ArchiveError::Unrecognized)?),
    }
}

fn layout_images(contents: &Contents, index: Index) -> Result<Vec<Named>> {
    let mut images = Vec::new();
    for target in index.manifests {
        if !media_type::is_index(&target.media_type) && !media_type::is_manifest(&target.media_type) {
            continue;
        }
        if !contents.has(&target.digest) {
            return Err(ArchiveError::Missing { what: "image", name: target.digest.to_string() }.into());
        }
        let annotation = |key: &str| target.annotations.get(key).filter(|value| !value.is_empty());
        let ref_name = annotation(ANNOTATION_REF_NAME);
        let looks_full = |name: &&String| name.contains([':', '/']);
        let full = annotation(ANNOTATION_IMAGE_NAME).or(ref_name.filter(looks_full));
        let name = full.map(|name| name.parse::<Reference>()).transpose()?.map(Reference::with_default_tag);
        let tag = if name.is_none() { ref_name.cloned() } else { None };
        images.push(Named { name, tag, target, manifest: None });
    }
    Ok(images)
}

fn saved_images(saved: Vec<Saved>) -> Vec<Named> {
    let mut images = Vec::new();
    for mut image in saved {
        let names = std::mem::take(&mut image.names);
        let (target, manifest) = image.manifest();
        let named =
            |name| Named { name, tag: None, target: target.clone(), manifest: Some(manifest.clone()) };
        if names.is_empty() {
            images.push(named(None));
        }
        images.extend(names.into_iter().map(|name| named(Some(name))));
    }
    images
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

/// Reading the archive failed: its own bytes are wrong, or the file or pipe cannot be read.
pub(crate) fn read_error(source: io::Error) -> Error {
    Error::Archive { reason: clean(&source.to_string()) }
}

fn clean(reason: &str) -> String {
    reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON).collect()
}

#[cfg(test)]
mod tests {
    use davit_oci::chain::sha256;

    use super::*;

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            builder.append_data(&mut header, name, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn read_all(bytes: &[u8]) -> Result<Contents> {
        read(bytes, &mut |_, reader| {
            let mut hashing = Hashing::new(reader);
            hashing.read_exact(&mut [0]).map_err(read_error)?;
            Ok(hashing.finish()?.0)
        })
    }

    #[test]
    fn headers_of_any_size_take_bounded_memory() {
        for kind in [tar::EntryType::GNULongName, tar::EntryType::GNULongLink, tar::EntryType::XHeader] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(1 << 32);
            header.set_cksum();
            let endless = header.as_bytes().chain(io::repeat(b'x'));
            let error = read(endless, &mut |_, _| panic!("there is no blob")).unwrap_err();
            assert!(error.to_string().contains("headers are too large"), "{kind:?}: {error}");
        }
        // Blobs may be larger, whether anybody reads them or not.
        let large = vec![7; 3 << 20];
        let bytes = tar(&[("a", &large), ("b", &large)]);
        let mut passed = 0;
        read(bytes.as_slice(), &mut |_, _| {
            passed += 1;
            Ok(sha256(b""))
        })
        .unwrap();
        assert_eq!(passed, 2);
    }

    const LAYOUT: (&str, &[u8]) = ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);

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
            let index = index(annotations, &digest);
            let contents = read_all(&tar(&[("index.json", &index), (&blob, b"{}"), LAYOUT])).unwrap();
            let image = images(&contents).unwrap().remove(0);
            (image.name.map(|name| name.to_string()), image.tag)
        };
        let full = || Some("docker.io/library/busybox:latest".to_owned());
        assert_eq!(name(r#""io.containerd.image.name":"docker.io/library/busybox:latest""#), (full(), None));
        assert_eq!(name(r#""org.opencontainers.image.ref.name":"busybox:latest""#), (full(), None));
        let tag = (None, Some("latest".to_owned()));
        assert_eq!(name(r#""org.opencontainers.image.ref.name":"latest""#), tag);
        assert_eq!(name(""), (None, None));
    }

    #[test]
    fn names_of_docker_are_taken_if_the_layout_has_none() {
        let digest = sha256(b"{}");
        let (blob, index) = (format!("blobs/sha256/{}", digest.hex()), index("", &digest));
        let saved = format!(r#"[{{"Config":"{blob}","RepoTags":["busybox:1","x.io/y"],"Layers":[]}}]"#);
        let files = [LAYOUT, ("index.json", &index), (&blob, b"{}"), ("manifest.json", saved.as_bytes())];
        let images = images(&read_all(&tar(&files)).unwrap()).unwrap();
        let names: Vec<String> =
            images.iter().filter_map(|image| Some(image.name.as_ref()?.to_string())).collect();
        assert_eq!(names, ["docker.io/library/busybox:1", "x.io/y:latest"]);
        assert_eq!(images[0].target.digest, sha256(images[0].manifest.as_ref().unwrap()));
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        assert!(images(&read_all(&tar(&[("etc/passwd", b"x")])).unwrap()).is_err());
        assert!(read_all(b"no tar at all, but long enough to look at").is_err());
        let missing = tar(&[LAYOUT, ("index.json", &index("", &sha256(b"gone")))]);
        assert!(images(&read_all(&missing).unwrap()).is_err());
    }

    #[test]
    fn compressed_archives_are_inflated() {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"hello").unwrap();
        let mut text = String::new();
        let bytes = encoder.finish().unwrap();
        inflate(Box::new(io::Cursor::new(bytes))).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(inflate(Box::new(io::Cursor::new(vec![0x28, 0xb5, 0x2f, 0xfd]))).is_err());
    }
}
