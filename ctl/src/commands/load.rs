//! `davit load` and `davit import`: images from archives.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use davit_oci::archive::Contents;
use davit_oci::image::{Descriptor, Execution, ImageConfig, Manifest, RootfsLayers, Target, parse_target};
use davit_oci::platform::Platform;
use davit_oci::reference::Reference;
use davit_oci::{chain, media_type};
use davit_proto::containerd::services::images::v1 as api;
use tokio::runtime::Handle;

use crate::archive::{self, Named};
use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::progress::Progress;
use crate::unpack::{Snapshotter, set_content_labels, unpack};
use crate::upload::upload;
use crate::{container, format, image, lease};

/// Options of `davit load`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit load -i busybox.tar.gz\n  skopeo copy docker://busybox oci-archive:/dev/stdout:busybox | davit load"
)]
pub(crate) struct Options {
    /// The archive (default: standard input)
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Name for an image that the archive gives none
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// The archive, if it is not given with --input
    #[arg(value_name = "FILE", conflicts_with = "input")]
    file: Option<PathBuf>,
}

/// Options of `davit import`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit import rootfs.tar box:1     a filesystem becomes an image of one layer\n  davit import image.tar            the same as `davit load -i image.tar`"
)]
pub(crate) struct ImportOptions {
    /// The tar, "-" for standard input
    file: PathBuf,
    /// Name of the image to make of a filesystem; without it, the tar is an image archive
    #[arg(value_name = "NAME")]
    reference: Option<String>,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
}

/// `davit load`.
pub(crate) async fn load(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let input = options.input.or(options.file).filter(|path| path != Path::new("-"));
    let fallback = Fallback::new(options.name.as_deref(), input.as_deref())?;
    let progress = Progress::new(options.quiet);
    let reader = open(input.as_deref())?;
    let snapshotter = &options.snapshotter.name;
    let loaded = lease::with_lease(client, |client| async move {
        load_archive(&client, reader, &fallback, snapshotter, progress).await
    });
    for name in loaded.await? {
        format::line(out, format!("Loaded image: {name}"))?;
    }
    Ok(())
}

/// `davit import`.
pub(crate) async fn import(client: &Client, options: ImportOptions, out: &mut dyn Write) -> Result<()> {
    let Some(reference) = &options.reference else {
        let options = Options {
            input: Some(options.file),
            name: None,
            quiet: options.quiet,
            snapshotter: options.snapshotter,
            file: None,
        };
        return load(client, options, out).await;
    };
    let reference = reference.parse::<Reference>()?.with_default_tag();
    let reader = open(Some(options.file.as_path()).filter(|path| *path != Path::new("-")))?;
    let progress = Progress::new(options.quiet);
    let snapshotter = &options.snapshotter.name;
    let digest = lease::with_lease(client, |client| async move {
        import_filesystem(&client, reader, &reference, snapshotter, progress).await
    });
    let digest = digest.await?;
    format::line(out, digest)
}

/// Names for images that the archive names by a tag alone, or not at all.
struct Fallback {
    /// The name that the user gave.
    name: Option<Reference>,
    /// The archive's own name without what says that it is one: `busybox` of `/tmp/busybox.tar.gz`.
    stem: Option<String>,
}

impl Fallback {
    fn new(name: Option<&str>, path: Option<&Path>) -> Result<Fallback> {
        let name = name.map(str::parse::<Reference>).transpose()?;
        let stem = path.and_then(Path::file_name).map(|file| {
            let file = file.to_string_lossy().to_lowercase();
            let stem = [".gz", ".tgz", ".tar", ".oci"]
                .iter()
                .fold(file.as_str(), |name, ending| name.strip_suffix(ending).unwrap_or(name));
            stem.to_owned()
        });
        Ok(Fallback { name, stem })
    }

    fn resolve(&self, image: &Named) -> Result<Reference> {
        if let Some(name) = &image.name {
            return Ok(name.clone());
        }
        let base = match (&self.name, &self.stem) {
            (Some(name), _) if name.tag().is_some() => return Ok(name.clone()),
            (Some(name), _) => name.familiar_name(),
            (None, Some(stem)) => stem.clone(),
            (None, None) => String::new(),
        };
        let full = match &image.tag {
            Some(tag) => format!("{base}:{tag}"),
            None => base,
        };
        full.parse::<Reference>().map(Reference::with_default_tag).map_err(|_| {
            Error::usage(
                "the archive does not say how its image is called",
                "give it a name with --name NAME[:TAG]",
            )
        })
    }
}

fn open(path: Option<&Path>) -> Result<Box<dyn Read + Send>> {
    match path {
        Some(path) => {
            let error = |source| Error::File { action: "cannot open", path: path.to_owned(), source };
            Ok(Box::new(File::open(path).map_err(error)?))
        }
        None if std::io::stdin().is_terminal() => Err(Error::usage(
            "standard input is a terminal, not an archive",
            "name one with -i FILE, or pipe it in",
        )),
        None => Ok(Box::new(std::io::stdin())),
    }
}

async fn load_archive(
    client: &Client,
    reader: Box<dyn Read + Send>,
    fallback: &Fallback,
    snapshotter: &str,
    progress: Progress,
) -> Result<Vec<String>> {
    let contents = upload_archive(client, reader, progress).await?;
    let images = archive::images(&contents)?;
    if images.is_empty() {
        return Err(Error::Archive { reason: "it holds no image".to_owned() });
    }
    let mut names = Vec::new();
    for image in &images {
        // Nothing is made known before every name is: a bad one late in the archive changes nothing.
        names.push(fallback.resolve(image)?);
    }
    let mut loaded = Vec::new();
    for (image, name) in images.into_iter().zip(names) {
        if let Some(manifest) = &image.manifest {
            upload_bytes(client, &image.target, manifest).await?;
        }
        label_tree(client, &image.target).await?;
        let host = Platform::host();
        match image::for_platform(client, &image.target, &host).await {
            Ok(found) => drop(unpack(client, &found, snapshotter, progress).await?),
            // An image for another machine can be kept, tagged and passed on all the same.
            Err(Error::Usage { message, .. }) => {
                progress.report(&name.familiar(), &format!("not unpacked: {message}"))
            }
            Err(error) => return Err(error),
        }
        create_image(client, &name.to_string(), &image.target).await?;
        loaded.push(name.familiar());
    }
    Ok(loaded)
}

/// Reads the archive on a thread that may wait, and sends its blobs as they pass.
async fn upload_archive(
    client: &Client,
    reader: Box<dyn Read + Send>,
    progress: Progress,
) -> Result<Contents> {
    let client = client.clone();
    let session = container::new_id()?;
    let runtime = Handle::current();
    let work = tokio::task::spawn_blocking(move || {
        let mut count = 0;
        archive::read(archive::inflate(reader)?, &mut |blob, data| {
            count += 1;
            let (reference, size) = (format!("davit-load-{}-{count}", &session[..16]), blob.size);
            if let Some(digest) = &blob.expected {
                progress.report(
                    format::short_id(digest.as_str()),
                    &format!("loading {}", format::decimal_size(size)),
                );
                let sent = upload(&client, &reference, size, Some(digest), data, archive::read_error);
                // The daemon has compared, or has had it.
                return runtime.block_on(sent).map(|_| digest.clone());
            }
            let mut hashing = archive::Hashing::new(data);
            let sent = upload(&client, &reference, size, None, &mut hashing, archive::read_error);
            runtime.block_on(sent)?;
            Ok(hashing.finish()?.0)
        })
    });
    work.await.unwrap_or_else(|error| {
        Err(Error::System { action: "read the archive", source: std::io::Error::other(error) })
    })
}

async fn upload_bytes(client: &Client, descriptor: &Descriptor, bytes: &[u8]) -> Result<()> {
    let reference = format!("davit-{}", descriptor.digest);
    let mut reader = bytes;
    upload(client, &reference, descriptor.size, Some(&descriptor.digest), &mut reader, archive::read_error)
        .await
        .map(drop)
}

/// Sets the labels by which an image keeps what belongs to it: index to manifests, manifest to configuration and
/// layers. Parts for other platforms may be missing from an archive.
async fn label_tree(client: &Client, root: &Descriptor) -> Result<()> {
    let mut pending = vec![root.clone()];
    while let Some(descriptor) = pending.pop() {
        let is_document =
            media_type::is_index(&descriptor.media_type) || media_type::is_manifest(&descriptor.media_type);
        if !is_document {
            continue;
        }
        let bytes = match image::read_document(client, &descriptor).await {
            Err(error) if error.is_not_found() && descriptor.digest != root.digest => continue,
            other => other?,
        };
        let mut children: Vec<(String, Descriptor)> = Vec::new();
        match parse_target(&descriptor.media_type, &bytes)? {
            Target::Manifest(manifest) => {
                children.push(("containerd.io/gc.ref.content.config".to_owned(), manifest.config));
                for (index, layer) in manifest.layers.into_iter().enumerate() {
                    children.push((format!("containerd.io/gc.ref.content.l.{index}"), layer));
                }
            }
            Target::Index(index) => {
                for (index, manifest) in index.manifests.into_iter().enumerate() {
                    children.push((format!("containerd.io/gc.ref.content.m.{index}"), manifest));
                }
            }
        }
        let labels = children.iter().map(|(key, child)| (key.clone(), child.digest.to_string())).collect();
        set_content_labels(client, descriptor.digest.as_str(), labels).await?;
        pending.extend(children.into_iter().map(|(_, child)| child));
    }
    Ok(())
}

/// Makes an image known, in place of one of that name.
///
/// # Errors
/// Those of the calls.
pub(crate) async fn create_image(client: &Client, name: &str, target: &Descriptor) -> Result<()> {
    // The annotations are of the index that the archive had, and say nothing of the image itself.
    let target = Descriptor::new(&target.media_type, target.digest.clone(), target.size);
    let image =
        api::Image { name: name.to_owned(), target: Some(image::to_wire(&target)), ..Default::default() };
    let request = api::CreateImageRequest { image: Some(image.clone()), source_date_epoch: None };
    match client.images().create(request).await.call(format!("create image {name}")) {
        Err(error) if error.is_already_exists() => {
            let mask = prost_types::FieldMask { paths: vec!["target".to_owned()] };
            let request = api::UpdateImageRequest {
                image: Some(image),
                update_mask: Some(mask),
                source_date_epoch: None,
            };
            client.images().update(request).await.call(format!("update image {name}"))?;
            Ok(())
        }
        other => other.map(drop),
    }
}

/// A filesystem's tar becomes the only layer of a new image.
async fn import_filesystem(
    client: &Client,
    reader: Box<dyn Read + Send>,
    name: &Reference,
    snapshotter: &str,
    progress: Progress,
) -> Result<String> {
    let sender = client.clone();
    let session = format!("davit-import-{}", &container::new_id()?[..16]);
    let runtime = Handle::current();
    let work = tokio::task::spawn_blocking(move || {
        let mut layer = archive::Hashing::new(archive::inflate(reader)?);
        // A layer that is there already is not sent twice; its digest is known all the same.
        runtime.block_on(upload(&sender, &session, 0, None, &mut layer, archive::read_error))?;
        layer.finish()
    });
    let (digest, size) = work.await.unwrap_or_else(|error| {
        Err(Error::System { action: "read the archive", source: std::io::Error::other(error) })
    })?;
    let now = Some(format::rfc3339(SystemTime::now()));
    let host = Platform::host();
    let config = ImageConfig {
        created: now,
        architecture: host.architecture,
        os: host.os,
        variant: Some(host.variant).filter(|variant| !variant.is_empty()),
        config: Execution::default(),
        rootfs: RootfsLayers { kind: "layers".to_owned(), diff_ids: vec![digest.clone()] },
        history: Vec::new(),
    };
    let config = serde_json::to_vec(&config).expect("a configuration has string keys only");
    let config_descriptor = describe(media_type::OCI_CONFIG, &config);
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: config_descriptor.clone(),
        layers: vec![Descriptor::new(media_type::OCI_LAYER, digest, size)],
    };
    let manifest = serde_json::to_vec(&manifest).expect("a manifest has string keys only");
    let target = describe(media_type::OCI_MANIFEST, &manifest);
    upload_bytes(client, &config_descriptor, &config).await?;
    upload_bytes(client, &target, &manifest).await?;
    label_tree(client, &target).await?;
    let found = image::for_platform(client, &target, &Platform::host()).await?;
    unpack(client, &found, snapshotter, progress).await?;
    create_image(client, &name.to_string(), &target).await?;
    Ok(target.digest.to_string())
}

fn describe(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor::new(media_type, chain::sha256(bytes), bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(given: Option<&str>, path: Option<&str>, tag: Option<&str>) -> Result<String> {
        let image = Named {
            name: None,
            tag: tag.map(str::to_owned),
            target: describe(media_type::OCI_MANIFEST, b"{}"),
            manifest: None,
        };
        Ok(Fallback::new(given, path.map(Path::new))?.resolve(&image)?.familiar())
    }

    #[test]
    fn images_without_a_name_get_one() {
        assert_eq!(resolve(None, Some("/tmp/BusyBox.tar.gz"), None).unwrap(), "busybox:latest");
        assert_eq!(resolve(None, Some("busybox.oci.tar"), Some("1.36")).unwrap(), "busybox:1.36");
        assert_eq!(resolve(Some("mine"), Some("x.tar"), Some("1")).unwrap(), "mine:1");
        assert_eq!(resolve(Some("mine:2"), None, Some("1")).unwrap(), "mine:2");
        assert_eq!(resolve(Some("ghcr.io/a/b"), None, None).unwrap(), "ghcr.io/a/b:latest");
        assert!(matches!(resolve(None, None, Some("1")), Err(Error::Usage { .. })));
        assert!(matches!(resolve(None, None, None), Err(Error::Usage { .. })));
    }
}
