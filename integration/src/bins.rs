//! Where the binaries under test are.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The folder of `davitd`, `davit` and the shim: `DAVIT_BIN_DIR`, or the folder that cargo built this program into.
///
/// # Errors
/// The binaries are not there; the text says how to make them.
pub fn folder() -> Result<PathBuf> {
    let folder = match env::var_os("DAVIT_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let exe = env::current_exe().context("no path of this program")?;
            let own = exe.parent().context("this program has no folder")?;
            // Test binaries lie in `deps`, one below the folder of the programs.
            if own.ends_with("deps") { own.parent().unwrap_or(own).to_owned() } else { own.to_owned() }
        }
    };
    for name in ["davitd", "davit", "containerd-shim-davit-v2"] {
        if !folder.join(name).exists() {
            bail!(
                "{} is not built; `cargo xtask test` builds what the tests need",
                folder.join(name).display()
            );
        }
    }
    Ok(folder)
}

/// The first file named so on `PATH` or in the folders of system programs.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    folders.map(|folder| Path::new(folder).join(name)).find(|file| file.is_file())
}
