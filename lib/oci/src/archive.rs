//! Archives of images: OCI layouts, and what `docker save` has written in all its versions.
//!
//! An archive is read once, front to back, so that it may come from a pipe or a stream. Whoever reads the tar tells
//! [`Contents`] of each member; blobs go on to a sink as they pass, and only names and the small tables are kept.
//!
//! ```text
//!   file, link ──▶ Contents ──▶ sink: the bytes of each blob
//!                     │ at the end
//!                     ├─ layout(): oci-layout and index.json, which is the image's own index
//!                     └─ saved():  manifest.json, from which Docker manifests are made
//! ```
//!
//! Names are keys of a map and never paths: one that no table can mean, because it leaves the archive or is no text, is
//! passed over. Where both tables are there, the layout counts (containerd `core/images/archive`).
//!
//! **Invariant:** an archive costs bounded memory: the tables and all names that are kept have limits.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};

use davit_model::{Coded, Digest, ErrorCode};
use serde::Deserialize;

use crate::chain::sha256;
use crate::image::{Descriptor, DocumentError, Index, MAX_DOCUMENT_SIZE, Manifest, parse_index};
use crate::media_type::{self, Compression};
use crate::reference::{Reference, ReferenceError};

/// The most members of an archive.
const MAX_MEMBERS: usize = 100_000;
/// The most bytes of all names that are kept.
const MAX_NAMES: usize = 16 << 20;
/// The most bytes of a name; no file has a longer one.
const MAX_NAME: usize = 4096;
/// How many links may lead from one to the next.
const MAX_LINKS: usize = 16;
/// The version of layouts, the only one that there is.
const LAYOUT_VERSION: &str = "1.0.0";

/// Why an archive is refused. Where containerd has a text of its own, it is this.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A member cannot be read.
    #[error("cannot read {name:?}")]
    Read {
        /// Its name.
        name: String,
        /// What the reader says.
        source: io::Error,
    },
    /// A table is larger than tables may be.
    #[error("{name:?} has {size} bytes, more than the {MAX_DOCUMENT_SIZE} allowed")]
    TooLarge {
        /// Its name.
        name: String,
        /// Its bytes.
        size: u64,
    },
    /// More members, or longer names, than an archive of images has.
    #[error("the archive has more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: usize,
    },
    /// A table is not the JSON that it should be.
    #[error("invalid {name:?}")]
    Json {
        /// Its name.
        name: String,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// The index of a layout cannot be used.
    #[error("invalid \"index.json\"")]
    Index {
        /// What is wrong.
        source: DocumentError,
    },
    /// The layout is of another version.
    #[error("unsupported OCI version {version}")]
    Version {
        /// Its version.
        version: String,
    },
    /// The layout has no index.
    #[error("missing index.json in OCI layout {LAYOUT_VERSION}")]
    NoIndex,
    /// It has no table at all.
    #[error("unrecognized image format")]
    Unrecognized,
    /// A table names a blob that is not there.
    #[error("{what} {name:?} not found")]
    Missing {
        /// What it should be.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A table names an image in a way that cannot be.
    #[error("normalize image ref {name:?}")]
    Reference {
        /// The name.
        name: String,
        /// What is wrong.
        source: ReferenceError,
    },
}

impl Coded for ArchiveError {
    fn code(&self) -> ErrorCode {
        match self {
            ArchiveError::Read { .. } => ErrorCode::DataLoss,
            ArchiveError::TooLarge { .. }
            | ArchiveError::TooMany { .. }
            | ArchiveError::Json { .. }
            | ArchiveError::Index { .. }
            | ArchiveError::Version { .. }
            | ArchiveError::NoIndex
            | ArchiveError::Unrecognized
            | ArchiveError::Missing { .. }
            | ArchiveError::Reference { .. } => ErrorCode::InvalidArgument,
        }
    }
}

/// A blob as it passes.
#[derive(Debug)]
pub struct Passing<'a> {
    /// Its name in the archive.
    pub name: &'a str,
    /// Its bytes.
    pub size: u64,
    /// The digest that its name promises; the sink compares.
    pub expected: Option<Digest>,
}

/// Takes a blob, as much of it as it needs, and answers its digest.
pub type Sink<'a, E> = dyn FnMut(&Passing<'_>, &mut dyn Read) -> Result<Digest, E> + 'a;

/// What an archive held, apart from the blobs themselves.
#[derive(Debug, Default)]
pub struct Contents {
    /// The version in `oci-layout`.
    version: Option<String>,
    /// `index.json` of a layout.
    index: Option<Vec<u8>>,
    /// `manifest.json` of `docker save`.
    saved: Option<Vec<SavedImage>>,
    /// What went to the sink, by name.
    blobs: BTreeMap<String, Blob>,
    /// Links from one name to another.
    links: BTreeMap<String, String>,
    members: usize,
    names: usize,
}

#[derive(Debug, Clone)]
struct Blob {
    digest: Digest,
    size: u64,
    compression: Compression,
}

/// `oci-layout`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

/// One element of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// An image of `docker save`.
#[derive(Debug, Clone)]
pub struct Saved {
    /// Its names, with tags.
    pub names: Vec<Reference>,
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, lowest first.
    pub layers: Vec<Descriptor>,
}

impl Saved {
    /// Docker's manifest of the image, which such an archive does not have, in the bytes that containerd makes too.
    pub fn manifest(self) -> (Descriptor, Vec<u8>) {
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::DOCKER_MANIFEST.to_owned(),
            config: self.config,
            layers: self.layers,
        };
        let bytes = serde_json::to_vec(&manifest).expect("a manifest has string keys only");
        (Descriptor::new(media_type::DOCKER_MANIFEST, sha256(&bytes), bytes.len() as u64), bytes)
    }
}

impl Contents {
    /// Takes a file: a table, or a blob for `sink`.
    ///
    /// # Errors
    /// Those of the sink; [`ArchiveError`].
    pub fn file<E: From<ArchiveError>>(
        &mut self,
        name: &[u8],
        size: u64,
        data: &mut dyn Read,
        sink: &mut Sink<'_, E>,
    ) -> Result<(), E> {
        self.count(1, 0)?;
        let Some(name) = key("", name) else { return Ok(()) };
        match name.as_str() {
            "oci-layout" => {
                let layout: Layout = parse(&name, &table(&name, size, data)?)?;
                self.version = Some(layout.image_layout_version);
            }
            "index.json" => self.index = Some(table(&name, size, data)?),
            "manifest.json" => self.saved = parse(&name, &table(&name, size, data)?)?,
            // Tables of the first versions of Docker, which its later ones still write and nobody reads.
            "repositories" => {}
            _ if name.ends_with("/VERSION") || name.ends_with("/json") => {}
            _ => {
                self.count(0, name.len())?;
                let blob = pass(&name, size, data, sink)?;
                self.blobs.insert(name, blob);
            }
        }
        Ok(())
    }

    /// Takes a link.
    ///
    /// # Errors
    /// [`ArchiveError::TooMany`].
    pub fn link(&mut self, name: &[u8], target: &[u8], is_symbolic: bool) -> Result<(), ArchiveError> {
        let Some(name) = key("", name) else { return self.count(1, 0) };
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        // The target of a hard link is a name of the archive.
        let Some(target) = key(if is_symbolic { folder } else { "" }, target) else {
            return self.count(1, 0);
        };
        self.count(1, name.len() + target.len())?;
        self.links.insert(name, target);
        Ok(())
    }

    fn count(&mut self, members: usize, names: usize) -> Result<(), ArchiveError> {
        (self.members, self.names) = (self.members + members, self.names + names);
        let too_many = |what, limit| Err(ArchiveError::TooMany { what, limit });
        match (self.members > MAX_MEMBERS, self.names > MAX_NAMES) {
            (true, _) => too_many("members", MAX_MEMBERS),
            (_, true) => too_many("bytes of names", MAX_NAMES),
            (false, false) => Ok(()),
        }
    }

    /// The bytes of a layout's index and what they say; none if the archive is no layout.
    ///
    /// # Errors
    /// [`ArchiveError`]: another version, no index, or one that cannot be used.
    pub fn layout(&self) -> Result<Option<(&[u8], Index)>, ArchiveError> {
        let Some(version) = &self.version else { return Ok(None) };
        if version != LAYOUT_VERSION {
            return Err(ArchiveError::Version { version: version.clone() });
        }
        let bytes = self.index.as_deref().ok_or(ArchiveError::NoIndex)?;
        let index = parse_index(bytes).map_err(|source| ArchiveError::Index { source })?;
        Ok(Some((bytes, index)))
    }

    /// The images of `docker save`; none if the archive has no table of such.
    ///
    /// # Errors
    /// [`ArchiveError`]: a blob that is not there, or a name that cannot be.
    pub fn saved(&self) -> Result<Option<Vec<Saved>>, ArchiveError> {
        let Some(saved) = &self.saved else { return Ok(None) };
        let image = |image: &SavedImage| {
            let config = self.blob("image config", &image.config)?;
            let layer = |name: &String| {
                let blob = self.blob("failed to resolve layers: layer", name)?;
                Ok(Descriptor::new(blob.compression.docker_layer(), blob.digest.clone(), blob.size))
            };
            let reference = |name: &String| {
                let parsed = name.parse::<Reference>().map(Reference::with_default_tag);
                parsed.map_err(|source| ArchiveError::Reference { name: name.clone(), source })
            };
            Ok(Saved {
                names: image.repo_tags.iter().flatten().map(reference).collect::<Result<_, _>>()?,
                config: Descriptor::new(media_type::DOCKER_CONFIG, config.digest.clone(), config.size),
                layers: image.layers.iter().flatten().map(layer).collect::<Result<_, ArchiveError>>()?,
            })
        };
        saved.iter().map(image).collect::<Result<_, _>>().map(Some)
    }

    /// Whether the archive has this blob by its name in a layout.
    pub fn has(&self, digest: &Digest) -> bool {
        self.blobs.contains_key(&format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex()))
    }

    /// The blob of a name, links followed.
    fn blob(&self, what: &'static str, given: &str) -> Result<&Blob, ArchiveError> {
        let missing = || ArchiveError::Missing { what, name: given.to_owned() };
        let first = key("", given.as_bytes()).ok_or_else(missing)?;
        let mut name = &first;
        for _ in 0..MAX_LINKS {
            if let Some(blob) = self.blobs.get(name) {
                return Ok(blob);
            }
            name = self.links.get(name).ok_or_else(missing)?;
        }
        Err(missing())
    }
}

/// Hands a blob to the sink.
fn pass<E: From<ArchiveError>>(
    name: &str,
    size: u64,
    data: &mut dyn Read,
    sink: &mut Sink<'_, E>,
) -> Result<Blob, E> {
    let mut start = Vec::with_capacity(Compression::MAGIC_LENGTH);
    let read = data.take(Compression::MAGIC_LENGTH as u64).read_to_end(&mut start);
    read.map_err(|source| ArchiveError::Read { name: name.to_owned(), source })?;
    let compression = Compression::detect(&start);
    let expected = name
        .strip_prefix("blobs/")
        .and_then(|rest| rest.split_once('/'))
        .and_then(|(algorithm, hex)| format!("{algorithm}:{hex}").parse::<Digest>().ok());
    let passing = Passing { name, size, expected };
    let digest = sink(&passing, &mut Cursor::new(start).chain(data))?;
    Ok(Blob { digest, size, compression })
}

fn table(name: &str, size: u64, data: &mut dyn Read) -> Result<Vec<u8>, ArchiveError> {
    if size > MAX_DOCUMENT_SIZE {
        return Err(ArchiveError::TooLarge { name: name.to_owned(), size });
    }
    let mut bytes = Vec::new();
    let read = data.take(MAX_DOCUMENT_SIZE).read_to_end(&mut bytes);
    read.map_err(|source| ArchiveError::Read { name: name.to_owned(), source })?;
    Ok(bytes)
}

fn parse<'a, T: Deserialize<'a>>(name: &str, bytes: &'a [u8]) -> Result<T, ArchiveError> {
    serde_json::from_slice(bytes).map_err(|source| ArchiveError::Json { name: name.to_owned(), source })
}

/// A name, relative to `folder`, without `.`, `..` and doubled slashes; none if nothing in an archive can be meant.
fn key(folder: &str, name: &[u8]) -> Option<String> {
    let name =
        std::str::from_utf8(name).ok().filter(|name| name.len() <= MAX_NAME && !name.starts_with('/'))?;
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            other => parts.push(other),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contents of an archive with these files, and the names of its blobs as they passed.
    fn read(
        files: &[(&str, &[u8])],
        links: &[(&str, &str)],
    ) -> Result<(Contents, Vec<String>), ArchiveError> {
        let (mut contents, mut passed) = (Contents::default(), Vec::new());
        for (name, target) in links {
            contents.link(name.as_bytes(), target.as_bytes(), true)?;
        }
        for (name, data) in files {
            let mut data = *data;
            let size = data.len() as u64;
            contents.file(name.as_bytes(), size, &mut data, &mut |passing, reader| {
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).unwrap();
                assert_eq!(bytes.len() as u64, passing.size);
                passed.push(passing.name.to_owned());
                let digest = sha256(&bytes);
                assert!(passing.expected.iter().all(|expected| *expected == digest));
                Ok::<_, ArchiveError>(digest)
            })?;
        }
        Ok((contents, passed))
    }

    const LAYOUT: (&str, &[u8]) = ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);

    #[test]
    fn a_layout_is_its_index() {
        let digest = sha256(b"{}");
        let index = format!(r#"{{"manifests":[{{"mediaType":"x","digest":"{digest}","size":2}}]}}"#);
        let blob = format!("./blobs/sha256/{}", digest.hex());
        let files =
            [LAYOUT, ("./index.json", index.as_bytes()), (blob.as_str(), b"{}"), ("manifest.json", b"[]")];
        let (contents, passed) = read(&files, &[]).unwrap();
        assert_eq!(passed, [&blob[2..]]);
        assert!(contents.has(&digest) && !contents.has(&sha256(b"")));
        let (bytes, parsed) = contents.layout().unwrap().unwrap();
        assert_eq!((bytes, &parsed.manifests[0].digest), (index.as_bytes(), &digest));
    }

    #[test]
    fn a_layout_of_another_version_or_without_an_index_is_none() {
        let other: (&str, &[u8]) = ("oci-layout", br#"{"imageLayoutVersion":"2.0.0"}"#);
        let text = |files: &[(&str, &[u8])]| read(files, &[]).unwrap().0.layout().unwrap_err().to_string();
        assert_eq!(text(&[other]), "unsupported OCI version 2.0.0");
        assert_eq!(text(&[LAYOUT]), "missing index.json in OCI layout 1.0.0");
        // Names that leave the archive mean nothing in it.
        assert_eq!(text(&[LAYOUT, ("../index.json", b"{}"), ("/index.json", b"{}")]), text(&[LAYOUT]));
        let (contents, _) = read(&[("index.json", b"{}")], &[]).unwrap();
        assert!(contents.layout().unwrap().is_none() && contents.saved().unwrap().is_none());
    }

    #[test]
    fn what_docker_saves_becomes_the_manifest_that_containerd_makes() {
        let table = br#"[{"Config":"config.json","RepoTags":["busybox:1","x.io/y"],
            "Layers":["abc/layer.tar","def/layer.tar"]},{"Config":"config.json","RepoTags":null,"Layers":null}]"#;
        let files: &[(&str, &[u8])] = &[
            ("abc/layer.tar", &[0x1f, 0x8b, 1]),
            ("abc/VERSION", b"1.0"),
            ("abc/json", b"{}"),
            ("config.json", b"{\"a\":1}"),
            ("manifest.json", table),
        ];
        let (contents, passed) = read(files, &[("def/layer.tar", "../abc/layer.tar")]).unwrap();
        assert_eq!(passed, ["abc/layer.tar", "config.json"]);
        let saved = contents.saved().unwrap().unwrap();
        let names: Vec<String> = saved[0].names.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["docker.io/library/busybox:1", "x.io/y:latest"]);
        assert!(saved[1].names.is_empty() && saved[1].layers.is_empty());
        let (descriptor, bytes) = saved[0].clone().manifest();
        assert_eq!(descriptor.digest, sha256(&bytes));
        let (config, layer) = (sha256(b"{\"a\":1}"), sha256(&[0x1f, 0x8b, 1]));
        let layer =
            format!(r#"{{"mediaType":"{}","digest":"{layer}","size":3}}"#, media_type::DOCKER_LAYER_GZIP);
        let expected = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{config}","size":7}},"layers":[{layer},{layer}]}}"#,
            media_type::DOCKER_MANIFEST,
            media_type::DOCKER_CONFIG,
        );
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }

    #[test]
    fn a_table_that_lies_is_refused() {
        let saved = |table: &str, links| {
            let (contents, _) = read(&[("manifest.json", table.as_bytes()), ("c", b"{}")], links).unwrap();
            contents.saved().unwrap_err().to_string()
        };
        assert_eq!(saved(r#"[{"Config":"x"}]"#, &[]), r#"image config "x" not found"#);
        assert_eq!(saved(r#"[{"Config":"../c"}]"#, &[]), r#"image config "../c" not found"#);
        assert_eq!(
            saved(r#"[{"Config":"c","Layers":["l"]}]"#, &[]),
            r#"failed to resolve layers: layer "l" not found"#
        );
        assert_eq!(saved(r#"[{"Config":"a"}]"#, &[("a", "b"), ("b", "a")]), r#"image config "a" not found"#);
        assert_eq!(saved(r#"[{"Config":"c","RepoTags":["A B"]}]"#, &[]), r#"normalize image ref "A B""#);
        assert!(read(&[("manifest.json", b"[1]")], &[]).is_err());
    }

    #[test]
    fn memory_is_bounded() {
        let mut contents = Contents::default();
        let long = "x".repeat(MAX_NAME);
        let mut add = |number: usize| {
            let mut sink = |_: &Passing<'_>, _: &mut dyn Read| Ok(sha256(b""));
            let name = format!("{number}{}", &long[..MAX_NAME - 8]);
            contents.file::<ArchiveError>(name.as_bytes(), 0, &mut io::empty(), &mut sink)
        };
        let refused = (0..MAX_MEMBERS).map(&mut add).position(|result| result.is_err()).unwrap();
        assert!(refused < MAX_MEMBERS && refused * (MAX_NAME - 8) <= MAX_NAMES, "{refused}");

        let mut contents = Contents::default();
        let refused = (0..=MAX_MEMBERS).position(|_| contents.link(b"/a", b"b", false).is_err());
        assert_eq!(refused, Some(MAX_MEMBERS));

        let mut endless = io::repeat(b' ');
        let mut sink = |_: &Passing<'_>, _: &mut dyn Read| Ok(sha256(b""));
        let size = MAX_DOCUMENT_SIZE + 1;
        let result = Contents::default().file::<ArchiveError>(b"index.json", size, &mut endless, &mut sink);
        assert!(matches!(result, Err(ArchiveError::TooLarge { .. })));
    }

    #[test]
    fn names_become_keys() {
        let key = |folder, name: &str| key(folder, name.as_bytes());
        assert_eq!(key("", "./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(key("a/b", "../c").as_deref(), Some("a/c"));
        assert_eq!(key("a/b", "/c"), None);
        assert_eq!(key("", "../../etc"), None);
        assert_eq!(key("", "a/.."), None);
    }
}
