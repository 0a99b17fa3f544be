//! Images of the daemon: finding one by what a user typed, and reading its documents.

use davit_oci::image::{self, Descriptor, ImageConfig, Manifest, Target};
use davit_oci::platform::{self, Platform};
use davit_oci::reference::Reference;
use davit_oci::{chain, media_type};
use davit_proto::containerd::services::content::v1::ReadContentRequest;
use davit_proto::containerd::services::images::v1 as api;
use davit_proto::containerd::types;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};

/// How deep indexes may lie in each other.
const MAX_INDEX_DEPTH: usize = 4;
/// The least characters of a digest that stand for an image.
const MIN_DIGEST_PREFIX: usize = 4;

/// The part of an image that is for one platform.
#[derive(Debug, Clone)]
pub(crate) struct PlatformImage {
    /// The manifest.
    pub(crate) manifest: Manifest,
    /// The configuration.
    pub(crate) config: ImageConfig,
}

impl PlatformImage {
    /// The snapshots of the layers, lowest first.
    ///
    /// # Errors
    /// When manifest and configuration do not have the same number of layers.
    pub(crate) fn chain_ids(&self) -> Result<Vec<String>> {
        let diff_ids = &self.config.rootfs.diff_ids;
        if diff_ids.len() != self.manifest.layers.len() {
            let reason = format!(
                "it has {} layers, and its configuration names {}",
                self.manifest.layers.len(),
                diff_ids.len()
            );
            return Err(image::DocumentError::Unusable { reason }.into());
        }
        Ok(chain::chain_ids(diff_ids).iter().map(ToString::to_string).collect())
    }
}

/// Finds an image by name, or by the start of the digest that `davit images` shows as its id.
///
/// # Errors
/// [`Error::NoImage`], [`Error::Ambiguous`], and those of the call.
pub(crate) async fn find(client: &Client, given: &str) -> Result<api::Image> {
    if let Ok(reference) = given.parse::<Reference>() {
        let name = reference.with_default_tag().to_string();
        match get(client, &name).await {
            Ok(image) => return Ok(image),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        // Other clients keep names that are not normalised.
        if name != given
            && let Ok(image) = get(client, given).await
        {
            return Ok(image);
        }
    }
    let hex = given.strip_prefix("sha256:").unwrap_or(given);
    let is_prefix = hex.len() >= MIN_DIGEST_PREFIX && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_prefix {
        return Err(Error::NoImage { given: given.to_owned() });
    }
    let prefix = format!("sha256:{hex}");
    let mut found = list(client).await?;
    found.retain(|image| image.target.as_ref().is_some_and(|target| target.digest.starts_with(&prefix)));
    let Some(first) = found.first().cloned() else { return Err(Error::NoImage { given: given.to_owned() }) };
    if found.iter().any(|image| image.target != first.target) {
        let matches = found.into_iter().map(|image| image.name).collect();
        return Err(Error::Ambiguous { given: given.to_owned(), matches });
    }
    Ok(first)
}

async fn get(client: &Client, name: &str) -> Result<api::Image> {
    let request = api::GetImageRequest { name: name.to_owned() };
    let response = client.images().get(request).await.call(format!("look up image {name}"))?;
    response.image.ok_or_else(|| Error::NoImage { given: name.to_owned() })
}

/// Every image of the namespace.
pub(crate) async fn list(client: &Client) -> Result<Vec<api::Image>> {
    let request = api::ListImagesRequest { filters: Vec::new() };
    Ok(client.images().list(request).await.call("list the images")?.images)
}

/// The target of an image as a descriptor.
///
/// # Errors
/// When the daemon's record is not well formed.
pub(crate) fn target(image: &api::Image) -> Result<Descriptor> {
    let unusable = |reason: String| Error::from(image::DocumentError::Unusable { reason });
    let target = image.target.clone().unwrap_or_default();
    let digest = target.digest.parse().map_err(|error| unusable(format!("its target: {error}")))?;
    let size = u64::try_from(target.size).map_err(|_| unusable("its size is negative".to_owned()))?;
    Ok(Descriptor::new(&target.media_type, digest, size))
}

/// A descriptor for the wire.
pub(crate) fn to_wire(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone(),
    }
}

/// Reads a document of an image, which must not be larger than documents may be.
///
/// # Errors
/// [`image::DocumentError::TooLarge`], and those of the call.
pub(crate) async fn read_document(client: &Client, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let too_large = |size| image::DocumentError::TooLarge { kind: "document", size };
    if descriptor.size > image::MAX_DOCUMENT_SIZE {
        return Err(too_large(descriptor.size).into());
    }
    let digest = descriptor.digest.to_string();
    let action = format!("read {digest}");
    let request = ReadContentRequest { digest, offset: 0, size: 0 };
    let mut stream = client.content().read(request).await.call(action.as_str())?;
    let mut bytes = Vec::with_capacity(usize::try_from(descriptor.size).unwrap_or(0));
    while let Some(part) =
        stream.message().await.map_err(|status| Error::Call { action: action.clone(), status })?
    {
        bytes.extend_from_slice(&part.data);
        if bytes.len() as u64 > image::MAX_DOCUMENT_SIZE {
            return Err(too_large(bytes.len() as u64).into());
        }
    }
    Ok(bytes)
}

/// The part of an image that runs on `platform`, wherever in its indexes it is.
///
/// # Errors
/// When there is none, or a document is missing or not well formed.
pub(crate) async fn for_platform(
    client: &Client,
    target: &Descriptor,
    platform: &Platform,
) -> Result<PlatformImage> {
    let mut descriptor = target.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        let bytes = read_document(client, &descriptor).await?;
        let index = match image::parse_target(&descriptor.media_type, &bytes)? {
            Target::Manifest(manifest) => {
                let bytes = read_document(client, &manifest.config).await?;
                let config = image::parse_config(&bytes)?;
                return Ok(PlatformImage { manifest, config });
            }
            Target::Index(index) => index,
        };
        let best = platform::best(&index.manifests, platform).cloned();
        descriptor = best.ok_or_else(|| {
            let have: Vec<String> =
                index.manifests.iter().filter_map(|m| m.platform.as_ref()).map(ToString::to_string).collect();
            Error::usage(
                format!("the image has nothing for {platform}, only for: {}", have.join(", ")),
                "load an image for this machine",
            )
        })?;
        if !media_type::is_index(&descriptor.media_type) && !media_type::is_manifest(&descriptor.media_type) {
            break;
        }
    }
    let reason = "its indexes lie too deep in each other, or lead to no manifest".to_owned();
    Err(image::DocumentError::Unusable { reason }.into())
}

/// An image's name as people write it; as it is when it is no reference.
pub(crate) fn familiar(name: &str) -> String {
    name.parse::<Reference>().map_or_else(|_| name.to_owned(), |reference| reference.familiar())
}
