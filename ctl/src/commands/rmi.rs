//! `davit rmi`: take an image's name away, and with its last name the image.

use std::io::Write;

use davit_proto::containerd::services::images::v1::DeleteImageRequest;

use crate::client::Client;
use crate::commands::for_each;
use crate::error::{CallContext, Error, Result};
use crate::{container, image};

/// Options of `davit rmi`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Remove it even if containers were made from it; they go on working
    #[arg(short, long)]
    force: bool,
    /// Images, by name or id
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// `davit rmi`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let remove_one = async |given: &str| remove(client, given, options.force).await.map(Some);
    for_each(&options.images, out, remove_one).await
}

async fn remove(client: &Client, given: &str, force: bool) -> Result<String> {
    let image = match image::find(client, given).await {
        Err(Error::NoImage { .. }) if force => return Ok(format!("Untagged: {given}")),
        other => other?,
    };
    let digest = image.target.as_ref().map(|target| target.digest.clone()).unwrap_or_default();
    let names = image::list(client).await?.into_iter().filter(|other| other.target == image.target).count();
    if !force {
        let containers = container::list(client, Vec::new()).await?;
        if let Some(user) = containers.iter().find(|container| container.image == image.name) {
            return Err(Error::usage(
                format!("image {given} is used by container {}", container::name(user)),
                format!("remove that first with `davit rm {}`, or force this with -f", container::name(user)),
            ));
        }
    }
    // The last name waits for the disk to be free.
    let request = DeleteImageRequest { name: image.name.clone(), sync: names == 1, target: None };
    client.images().delete(request).await.call(format!("remove image {given}"))?;
    let mut text = format!("Untagged: {}", image::familiar(&image.name));
    if names == 1 {
        text.push_str(&format!("\nDeleted: {digest}"));
    }
    Ok(text)
}
