//! The documents of an image: descriptors, indexes, manifests and configurations.
//!
//! Only what is needed is read out of them; a document that is to be stored or hashed again is kept as the bytes
//! that came, since no parser reproduces a digest. Every document is bounded before it is parsed
//! ([`MAX_DOCUMENT_SIZE`]), and one that could be read as both index and manifest is refused (CVE-2021-41190).

use std::collections::BTreeMap;

use davit_model::{Coded, Digest, ErrorCode};
use serde::{Deserialize, Serialize};

use crate::media_type;
use crate::platform::Platform;

/// The most bytes of a manifest, index or configuration. Registries limit manifests to 4 MiB; configurations of
/// images with a long history stay well below that too.
pub const MAX_DOCUMENT_SIZE: u64 = 4 << 20;

/// The most documents of an image or an archive.
pub const MAX_DOCUMENTS: usize = 1024;
/// The most bytes of all documents of an image or an archive.
pub const MAX_DOCUMENTS_SIZE: u64 = 64 << 20;
/// How deep indexes may lie in indexes.
pub const MAX_DEPTH: usize = 4;
/// The most layers of an image. The kernel stacks 500 at most.
pub const MAX_LAYERS: usize = 1024;

/// The annotation by which containerd names an image in an index, with its full name.
pub const ANNOTATION_IMAGE_NAME: &str = "io.containerd.image.name";
/// The annotation by which the image spec names an image in an index, often with its tag alone.
pub const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// More bytes than [`MAX_DOCUMENT_SIZE`].
    #[error("{kind} has {size} bytes, more than the {MAX_DOCUMENT_SIZE} allowed")]
    TooLarge {
        /// What the document was expected to be.
        kind: &'static str,
        /// Its size.
        size: u64,
    },
    /// Not the JSON that it should be.
    #[error("invalid {kind}")]
    Json {
        /// What the document was expected to be.
        kind: &'static str,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// It has the parts of an index and of a manifest, so that two readers may take it for different images.
    #[error("invalid {kind}: it is both an index and a manifest")]
    Ambiguous {
        /// What the document was expected to be.
        kind: &'static str,
    },
    /// It is for an operating system that cannot run here, or its layers do not add up.
    #[error("unusable image configuration: {reason}")]
    Unusable {
        /// What is wrong.
        reason: String,
    },
}

impl Coded for DocumentError {
    fn code(&self) -> ErrorCode {
        match self {
            DocumentError::TooLarge { .. }
            | DocumentError::Json { .. }
            | DocumentError::Ambiguous { .. }
            | DocumentError::Unusable { .. } => ErrorCode::InvalidArgument,
        }
    }
}

/// A pointer to content (image spec, "Descriptor").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The type of the content.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    #[serde(with = "digest_text")]
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// What an index says of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The platform of a manifest in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// A descriptor without annotations or platform.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
            platform: None,
        }
    }
}

/// An image index: one image for several platforms, or the table of contents of a layout.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    #[serde(default = "two")]
    pub schema_version: u32,
    /// The type, which layouts often leave out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The manifests, or further indexes.
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
}

/// An image manifest: a configuration and the layers, lowest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    #[serde(default = "two")]
    pub schema_version: u32,
    /// The type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The image configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default)]
    pub layers: Vec<Descriptor>,
}

/// An image configuration (image spec, "Image Configuration").
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// When the image was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The CPU architecture, in Go's words.
    #[serde(default)]
    pub architecture: String,
    /// The operating system, in Go's words.
    #[serde(default)]
    pub os: String,
    /// The CPU's variant, such as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// What a container of the image runs.
    #[serde(default)]
    pub config: Execution,
    /// The layers.
    #[serde(default)]
    pub rootfs: RootfsLayers,
    /// How the image was made.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<History>,
}

/// The `config` of an image configuration. Producers in Go write `null` for what is empty, so each field takes it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Execution {
    /// `user[:group]`, names or numbers.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// The ports that a container listens on, such as `80/tcp`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// `KEY=value` pairs.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// What every command is put behind.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The default command, or the default arguments of the entrypoint.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Paths that should hold data of their own.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// The folder that processes start in.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Labels.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks a container to stop.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// The layers of an image configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RootfsLayers {
    /// Always `layers`.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The digests of the uncompressed layers, lowest first.
    #[serde(default, with = "digest_texts")]
    pub diff_ids: Vec<Digest>,
}

/// One step of an image's making.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct History {
    /// When, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub created_by: String,
    /// A remark.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// Whether the step made no layer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

/// Either of the documents that an image's target may be.
#[derive(Debug, Clone)]
pub enum Target {
    /// One image.
    Manifest(Manifest),
    /// Several.
    Index(Index),
}

/// Parses the document that a descriptor of type `media_type` points at.
///
/// # Errors
/// [`DocumentError`]: too large, not the JSON it should be, ambiguous, or of a type that is neither.
pub fn parse_target(media_type: &str, bytes: &[u8]) -> Result<Target, DocumentError> {
    if media_type::is_index(media_type) {
        return Ok(Target::Index(parse_index(bytes)?));
    }
    if media_type::is_manifest(media_type) {
        return Ok(Target::Manifest(parse_manifest(bytes)?));
    }
    Err(DocumentError::Unusable {
        reason: format!("media type {media_type:?} is neither a manifest nor an index"),
    })
}

/// Parses an index.
///
/// # Errors
/// As [`parse_target`].
pub fn parse_index(bytes: &[u8]) -> Result<Index, DocumentError> {
    let kind = "image index";
    let index: Index = parse(kind, bytes)?;
    let shape: Shape = parse(kind, bytes)?;
    if shape.has_manifest_parts() || media_type::is_manifest(&index.media_type) {
        return Err(DocumentError::Ambiguous { kind });
    }
    Ok(index)
}

/// Parses a manifest.
///
/// # Errors
/// As [`parse_target`].
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, DocumentError> {
    let kind = "image manifest";
    let manifest: Manifest = parse(kind, bytes)?;
    let shape: Shape = parse(kind, bytes)?;
    if shape.manifests.is_some() || media_type::is_index(&manifest.media_type) {
        return Err(DocumentError::Ambiguous { kind });
    }
    Ok(manifest)
}

/// Parses an image configuration.
///
/// # Errors
/// As [`parse_target`]; also when its root filesystem is not made of layers.
pub fn parse_config(bytes: &[u8]) -> Result<ImageConfig, DocumentError> {
    let config: ImageConfig = parse("image configuration", bytes)?;
    if !config.rootfs.kind.is_empty() && config.rootfs.kind != "layers" {
        return Err(DocumentError::Unusable {
            reason: format!("its root filesystem is of type {:?}, not \"layers\"", config.rootfs.kind),
        });
    }
    Ok(config)
}

fn parse<'a, T: Deserialize<'a>>(kind: &'static str, bytes: &'a [u8]) -> Result<T, DocumentError> {
    let size = bytes.len() as u64;
    if size > MAX_DOCUMENT_SIZE {
        return Err(DocumentError::TooLarge { kind, size });
    }
    serde_json::from_slice(bytes).map_err(|source| DocumentError::Json { kind, source })
}

/// The parts whose presence tells index and manifest apart.
#[derive(Deserialize)]
struct Shape {
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

impl Shape {
    fn has_manifest_parts(&self) -> bool {
        self.config.is_some() || self.layers.is_some()
    }
}

fn two() -> u32 {
    2
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

mod digest_text {
    use davit_model::Digest;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(digest.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

mod digest_texts {
    use davit_model::Digest;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(digests: &[Digest], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(digests.iter().map(Digest::as_str))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Digest>, D::Error> {
        Option::<Vec<String>>::deserialize(deserializer)?
            .unwrap_or_default()
            .into_iter()
            .map(|text| text.parse().map_err(serde::de::Error::custom))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn descriptor() -> String {
        format!(r#"{{"mediaType":"x","digest":"{DIGEST}","size":0}}"#)
    }

    #[test]
    fn a_document_that_is_both_is_refused() {
        let both = format!(r#"{{"config":{0},"layers":[{0}],"manifests":[{0}]}}"#, descriptor());
        assert!(matches!(parse_index(both.as_bytes()), Err(DocumentError::Ambiguous { .. })));
        assert!(matches!(parse_manifest(both.as_bytes()), Err(DocumentError::Ambiguous { .. })));
        let liar = format!(r#"{{"mediaType":"{}","config":{}}}"#, media_type::OCI_INDEX, descriptor());
        assert!(matches!(parse_manifest(liar.as_bytes()), Err(DocumentError::Ambiguous { .. })));
    }

    #[test]
    fn sizes_are_bounded() {
        let large = vec![b' '; MAX_DOCUMENT_SIZE as usize + 1];
        assert!(matches!(parse_config(&large), Err(DocumentError::TooLarge { .. })));
    }

    #[test]
    fn nulls_of_go_are_empty() {
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","history":null,"rootfs":{{"type":"layers","diff_ids":["{DIGEST}"]}},
            "config":{{"Env":null,"Cmd":["sh"],"Entrypoint":null,"Labels":null,"User":"","StopSignal":null}}}}"#
        );
        let config = parse_config(text.as_bytes()).unwrap();
        assert_eq!(config.config.cmd, ["sh"]);
        assert_eq!(config.rootfs.diff_ids.len(), 1);
        assert!(config.config.env.is_empty());
    }

    #[test]
    fn digests_in_documents_are_checked() {
        let text = r#"{"config":{"mediaType":"x","digest":"sha256:../../etc/passwd","size":1}}"#;
        assert!(parse_manifest(text.as_bytes()).is_err());
    }
}
