//! The mounts of root filesystems. They are made and removed by short-lived copies of the shim: a filesystem
//! that does not answer must stop the one container that needs it, not the others that share the shim.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use davit_model::Mount;
use davit_model::error::chain;
use davit_sys::mount;
use davit_sys::process::{DONE, fork_helper};

use crate::error::TaskError;
use crate::reactor::Async;

/// Mounts a container's root filesystem on `target`, which is made if it is missing.
pub(crate) async fn mount(mounts: Vec<Mount>, target: &Path) -> Result<(), TaskError> {
    let made = std::fs::DirBuilder::new().mode(0o711).create(target);
    if let Err(source) = made
        && source.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(TaskError::Io { step: "create", path: target.to_owned(), source });
    }
    let work = || mount::mount_all(&mounts, target).map_err(|error| chain(&error));
    help(work).await.map_err(|reason| TaskError::Mount { reason })
}

/// Removes all that is mounted on `target` and below.
///
/// The mounts are gone when this returns. What the filesystems still have to do at their end, which is a sync of the
/// whole disk for an overlay, is done by the helper on its way out, and nobody waits for that.
pub(crate) async fn unmount(target: &Path) -> Result<(), TaskError> {
    let work = || mount::detach_all(target).map_err(|error| chain(&error));
    help(work).await.map_err(|reason| TaskError::Unmount { reason })
}

/// Waits for the report of a helper. Its end is that of an orphan, which the reaper buries.
async fn help<T>(work: impl FnOnce() -> Result<T, String>) -> Result<(), String> {
    let helper = fork_helper(work).map_err(|error| error.to_string())?;
    let report = Async::new(helper.report).map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    loop {
        let mut part = [0; 4096];
        let read = report.read_with(|report| Ok(nix::unistd::read(report, &mut part)?)).await;
        let count = read.map_err(|error| error.to_string())?;
        answer.extend_from_slice(&part[..count]);
        match answer.first() {
            Some(&DONE) => return Ok(()),
            None if count == 0 => return Err("the helper died".to_owned()),
            Some(_) if count == 0 => return Err(String::from_utf8_lossy(&answer).into_owned()),
            _ => {}
        }
    }
}
