//! `davit tag`: another name for an image.

use davit_oci::reference::Reference;

use crate::client::Client;
use crate::commands::load;
use crate::error::{Error, Result};
use crate::image;

/// Options of `davit tag`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The image, by name or id
    source: String,
    /// The new name; an image that has it loses it
    target: String,
}

/// `davit tag`.
pub(crate) async fn run(client: &Client, options: Options) -> Result<()> {
    let target = options.target.parse::<Reference>()?.with_default_tag();
    if target.digest().is_some() {
        return Err(Error::usage(
            format!("{target} has a digest"),
            "a new name has a tag only, such as box:1",
        ));
    }
    let image = image::find(client, &options.source).await?;
    load::create_image(client, &target.to_string(), &image::target(&image)?).await
}
