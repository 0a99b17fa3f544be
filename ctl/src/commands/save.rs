//! `davit save`: images as an archive.

use std::fs::File;
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;

use davit_oci::platform::Platform;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::{image, transfer};

/// Options of `davit save`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Write to this file, not to standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Platform of the images, such as linux/arm64 (default: this machine's)
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// The images, by name or id
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// `davit save`.
pub(crate) async fn run(client: &Client, options: Options) -> Result<()> {
    let platform =
        options.platform.as_deref().map(Platform::parse).transpose()?.unwrap_or_else(Platform::host);
    let mut names = Vec::new();
    for given in &options.images {
        names.push(image::find(client, given).await?.name);
    }
    let Some(path) = options.output else {
        if stdout().is_terminal() {
            let hint = "name a file with -o FILE, or pipe it on";
            return Err(Error::usage("standard output is a terminal", hint));
        }
        return transfer::export(client, names, &platform, &mut stdout()).await;
    };
    let error = |source| Error::File { action: "cannot write", path: path.clone(), source };
    let mut file = File::create(&path).map_err(error)?;
    let saved = match transfer::export(client, names, &platform, &mut file).await {
        Ok(()) => file.flush().and_then(|()| file.sync_all()).map_err(error),
        Err(error) => Err(error),
    };
    if saved.is_err() {
        // A part of an archive is of no use.
        let _ = std::fs::remove_file(&path);
    }
    saved
}
