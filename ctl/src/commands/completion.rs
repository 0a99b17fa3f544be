//! `davit completion` and the hidden `davit man`: what a package of `davit` ships beside the binary.

use std::io::Write;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// Options of `davit completion`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  source <(davit completion bash)\n  davit completion zsh > ~/.zfunc/_davit"
)]
pub(crate) struct Options {
    /// The shell
    shell: clap_complete::Shell,
}

/// Options of `davit man`.
#[derive(Debug, clap::Args)]
pub(crate) struct ManOptions {
    /// The folder to write into
    folder: PathBuf,
}

/// `davit completion`.
pub(crate) fn completion(mut command: clap::Command, options: &Options, out: &mut dyn Write) -> Result<()> {
    // Written to memory first: the generator does not take an output that fails.
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "davit", &mut script);
    out.write_all(&script).map_err(Error::Output)
}

/// `davit man`.
pub(crate) fn man(command: clap::Command, options: &ManOptions) -> Result<()> {
    let error =
        |source| Error::File { action: "cannot write the pages to", path: options.folder.clone(), source };
    std::fs::create_dir_all(&options.folder).map_err(error)?;
    clap_mangen::generate_to(command, &options.folder).map_err(error)
}
