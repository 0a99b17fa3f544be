//! The mounts of root filesystems. They are made and removed by short-lived copies of the shim: a filesystem
//! that does not answer must stop the one container that needs it, not the others that share the shim.

use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use davit_model::Mount;
use davit_model::error::chain;
use davit_sys::mount;
use davit_sys::process::fork_helper;

use crate::error::TaskError;
use crate::reaper::Awaited;

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
pub(crate) async fn unmount(target: &Path) -> Result<(), TaskError> {
    let work = || mount::unmount_all(target).map_err(|error| chain(&error));
    help(work).await.map_err(|reason| TaskError::Unmount { reason })
}

async fn help(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let helper = fork_helper(work).map_err(|error| error.to_string())?;
    let child = Awaited::child(helper.child).map_err(|error| error.to_string())?;
    let (exit, _) = child.exit().await.map_err(|error| error.to_string())?;
    if exit.success() {
        return Ok(());
    }
    let mut reason = String::new();
    let _ = std::fs::File::from(helper.report).read_to_string(&mut reason);
    if reason.is_empty() { Err(format!("helper ended with status {}", exit.status())) } else { Err(reason) }
}
