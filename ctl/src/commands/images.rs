//! `davit images`: what there is to run.

use std::io::Write;
use std::time::SystemTime;

use davit_oci::platform::Platform;
use davit_oci::reference::Reference;
use davit_proto::containerd::services::images::v1::Image;
use davit_proto::containerd::services::snapshots::v1::UsageRequest;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::format;
use crate::image::{self, PlatformImage};
use crate::table::Table;
use crate::unpack::Snapshotter;

/// Options of `davit images`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Accepted for Docker's sake: there are no intermediate images
    #[arg(short, long)]
    all: bool,
    /// Do not shorten ids
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// Only images of this repository, or of this one name
    #[arg(value_name = "REPOSITORY[:TAG]")]
    repository: Option<String>,
}

/// `davit images`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let wanted = options.repository.as_deref().map(str::parse::<Reference>).transpose()?;
    let mut images = image::list(client).await?;
    images.retain(|image| wanted.as_ref().is_none_or(|wanted| matches(image, wanted)));
    images.sort_by_key(|image| std::cmp::Reverse(image.created_at.map(|time| (time.seconds, time.nanos))));
    if options.quiet {
        let mut ids: Vec<String> = Vec::new();
        for image in &images {
            let id = id(image, options.no_trunc);
            if !ids.contains(&id) {
                format::line(out, &id)?;
                ids.push(id);
            }
        }
        return Ok(());
    }
    let now = SystemTime::now();
    let mut table = Table::new(&["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]);
    for image in &images {
        let (repository, tag) = split(&image.name);
        // A damaged image, or one for another machine, is still there to be seen and removed.
        let found = image::for_platform(client, &image::target(image)?, &Platform::host()).await.ok();
        let created =
            found.as_ref().and_then(|found| format::parse_rfc3339(found.config.created.as_deref()?));
        let size = match &found {
            Some(found) => Some(layer_sizes(client, found, &options.snapshotter.name).await.iter().sum()),
            None => None,
        };
        table.row(vec![
            repository,
            tag,
            id(image, options.no_trunc),
            created.map_or_else(|| "N/A".to_owned(), |time| format::ago(time, now)),
            size.map_or_else(|| "N/A".to_owned(), format::decimal_size),
        ]);
    }
    table.write(out).map_err(Error::Output)
}

fn id(image: &Image, whole: bool) -> String {
    let digest = image.target.as_ref().map_or("", |target| &target.digest);
    if whole { digest.to_owned() } else { format::short_id(digest).to_owned() }
}

fn matches(image: &Image, wanted: &Reference) -> bool {
    image.name.parse::<Reference>().is_ok_and(|reference| {
        reference.name() == wanted.name() && (wanted.tag().is_none() || wanted.tag() == reference.tag())
    })
}

/// Repository and tag as Docker shows them.
fn split(name: &str) -> (String, String) {
    match name.parse::<Reference>() {
        Ok(reference) => (reference.familiar_name(), reference.tag().unwrap_or("<none>").to_owned()),
        Err(_) => (name.to_owned(), "<none>".to_owned()),
    }
}

/// The bytes of each layer unpacked; of those that are not unpacked, the bytes of the blobs.
pub(super) async fn layer_sizes(client: &Client, image: &PlatformImage, snapshotter: &str) -> Vec<u64> {
    let chain = image.chain_ids().unwrap_or_default();
    let mut sizes = Vec::new();
    for (index, layer) in image.manifest.layers.iter().enumerate() {
        let key = chain.get(index).cloned().unwrap_or_default();
        let request = UsageRequest { snapshotter: snapshotter.to_owned(), key };
        sizes.push(match client.snapshots().usage(request).await {
            Ok(usage) => u64::try_from(usage.into_inner().size).unwrap_or(0),
            Err(_) => layer.size,
        });
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_as_docker_shows_them() {
        let pair = |one: &str, two: &str| (one.to_owned(), two.to_owned());
        assert_eq!(split("docker.io/library/busybox:latest"), pair("busybox", "latest"));
        assert_eq!(split("localhost:5000/a/b:1"), pair("localhost:5000/a/b", "1"));
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(split(&format!("ghcr.io/a@{digest}")), pair("ghcr.io/a", "<none>"));
        assert_eq!(split("Not A Name"), pair("Not A Name", "<none>"));
        let image = Image { name: "docker.io/library/busybox:1".to_owned(), ..Image::default() };
        assert!(matches(&image, &"busybox".parse().unwrap()));
        assert!(matches(&image, &"busybox:1".parse().unwrap()));
        assert!(!matches(&image, &"busybox:2".parse().unwrap()));
    }
}
