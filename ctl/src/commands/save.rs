//! `davit save`: images as an archive.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};

use davit_oci::platform::Platform;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::{container, image, transfer};

/// Options of `davit save`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit save -o both.tar busybox web:2\n  davit save busybox | gzip > busybox.tar.gz"
)]
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
    let mut output = Output::open(&path, &container::new_id()?).map_err(error)?;
    transfer::export(client, names, &platform, &mut output.file).await?;
    output.finish().map_err(error)
}

/// Where an archive is written to.
struct Output {
    file: File,
    /// What it is called until it is whole, and then. What is no regular file, such as a device, has its name already.
    names: Option<(PathBuf, PathBuf)>,
}

impl Output {
    /// Begins a new file, which takes the place of one that is there only when it is whole.
    fn open(path: &Path, id: &str) -> io::Result<Output> {
        let path = match fs::metadata(path) {
            Ok(status) if status.is_file() => fs::canonicalize(path)?,
            Ok(_) => return Ok(Output { file: File::options().write(true).open(path)?, names: None }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(error),
        };
        let mut name = OsString::from(".");
        name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
        name.push(format!(".{}", &id[..16]));
        let new = path.with_file_name(name);
        let file = File::options().write(true).create_new(true).open(&new)?;
        Ok(Output { file, names: Some((new, path)) })
    }

    fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        if let Some((new, path)) = &self.names {
            self.file.sync_all()?;
            fs::rename(new, path)?;
            self.names = None;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some((new, _)) = &self.names {
            // A part of an archive is of no use.
            let _ = fs::remove_file(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;

    use super::*;

    fn names(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn what_is_there_stays_until_all_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("a.tar"), folder.path().join("link"));
        let save = |path: &Path, text: &str, whole: bool| {
            let mut output = Output::open(path, "0123456789abcdef").unwrap();
            output.file.write_all(text.as_bytes()).unwrap();
            if whole {
                output.finish().unwrap();
            }
        };
        save(&path, "part", false);
        assert_eq!(names(folder.path()), 0);
        save(&path, "one", true);
        save(&path, "part", false);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        symlink(&path, &link).unwrap();
        save(&link, "two", true);
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert!(link.is_symlink());
        assert_eq!(names(folder.path()), 2);
        assert!(Output::open(folder.path(), "0123456789abcdef").is_err());
        assert!(Output::open(&folder.path().join("none/a.tar"), "0123456789abcdef").is_err());
    }

    #[test]
    fn a_device_or_a_pipe_is_written_to_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        // A writer waits for a reader.
        let _reader = File::options().read(true).write(true).open(&pipe).unwrap();
        for whole in [false, true] {
            let mut output = Output::open(&pipe, "0123456789abcdef").unwrap();
            output.file.write_all(b"x").unwrap();
            if whole {
                output.finish().unwrap();
            }
            assert_eq!(names(folder.path()), 1);
        }
    }
}
