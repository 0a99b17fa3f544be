//! An OCI runtime that does what `runc` does, but for checkpoints: these it makes and restores without criu.
//!
//! A checkpoint is the file `pages-1.img`, and a restored container is one that begins anew. So what daemon and shim make of
//! checkpoints can be tested on every host; what criu makes of processes cannot.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result};
use davit_integration::bins;

/// Of the many files of criu's, the one that is never missing.
const PAGES: &str = "pages-1.img";

fn main() -> Result<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let after = |flag: &str| {
        let place = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(place + 1).cloned()
    };
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let root = after("--root").context("no root")?;
    let container = arguments.last().cloned().context("no container")?;
    let runc = |words: &[OsString]| -> Result<ExitStatus> {
        Ok(runc()?.arg("--root").arg(&root).args(words).arg(&container).status()?)
    };
    if has("checkpoint") {
        let image = after("--image-path").map(PathBuf::from).context("no image path")?;
        fs::write(image.join(PAGES), vec![7; 100_000])?;
        if has("--leave-running") {
            return Ok(ExitCode::SUCCESS);
        }
        return Ok(code(runc(&["delete".into(), "--force".into()])?));
    }
    if has("restore") {
        let image = after("--image-path").map(PathBuf::from).context("no image path")?;
        fs::read(image.join(PAGES)).context("no checkpoint")?;
        let mut create = vec!["create".into()];
        for flag in ["--bundle", "--pid-file", "--console-socket"] {
            create.extend(after(flag).into_iter().flat_map(|value| [flag.into(), value]));
        }
        let created = runc(&create)?;
        return Ok(code(if created.success() { runc(&["start".into()])? } else { created }));
    }
    Err(self::runc()?.args(&arguments).exec().into())
}

fn runc() -> Result<Command> {
    Ok(Command::new(bins::on_path("runc").context("runc is not installed")?))
}

fn code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
