//! `davit pull`: an image from a registry.

use std::io::Write;

use davit_oci::platform::Platform;
use davit_oci::reference::Reference;

use crate::client::Client;
use crate::display::Display;
use crate::error::Result;
use crate::format;
use crate::transfer::{self, Reach};
use crate::unpack::Snapshotter;

/// Options of `davit pull`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Say nothing but the name of the image
    #[arg(short, long)]
    quiet: bool,
    /// Platform of the image, such as linux/arm64 (default: this machine's)
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    #[command(flatten)]
    snapshotter: Snapshotter,
    #[command(flatten)]
    reach: Reach,
    /// The image, such as busybox, ghcr.io/owner/name:tag or name@sha256:…
    #[arg(value_name = "NAME[:TAG|@DIGEST]")]
    name: String,
}

/// `davit pull`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let reference = options.name.parse::<Reference>()?.with_default_tag();
    let platform =
        options.platform.as_deref().map(Platform::parse).transpose()?.unwrap_or_else(Platform::host);
    let mut display = Display::new(options.quiet);
    transfer::pull(client, &reference, &platform, &options.snapshotter.name, &options.reach, &mut display)
        .await?;
    format::line(out, reference)
}
