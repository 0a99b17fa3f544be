//! `davit push`: an image to a registry.

use std::io::Write;

use davit_oci::platform::Platform;
use davit_oci::reference::Reference;

use crate::client::Client;
use crate::display::Display;
use crate::error::Result;
use crate::transfer::{self, Reach};
use crate::{format, image};

/// Options of `davit push`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Say nothing but the name of the image
    #[arg(short, long)]
    quiet: bool,
    /// Push the part for one platform of an image that is for several
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    #[command(flatten)]
    reach: Reach,
    /// The image; its name says which registry it goes to
    #[arg(value_name = "NAME[:TAG]")]
    name: String,
}

/// `davit push`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let reference = options.name.parse::<Reference>()?.with_default_tag();
    let platform = options.platform.as_deref().map(Platform::parse).transpose()?;
    let image = image::find(client, &reference.to_string()).await?;
    let mut display = Display::new(options.quiet);
    let reach = &options.reach;
    transfer::push(client, &image.name, &reference, platform.as_ref(), reach, &mut display).await?;
    format::line(out, reference)
}
