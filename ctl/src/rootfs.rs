//! The files of a container's root filesystem that are read for it: users and groups.
//!
//! Where folders hold the files nothing has to be mounted. Other filesystems are shown by a mount that nobody else sees, as
//! long as nothing runs on them; and by the container itself, once it runs: some must not be mounted a second time.

use std::path::PathBuf;

use davit_oci::rootfs::{Rootfs, RootfsError};
use davit_proto::containerd::types::Mount;
use davit_sys::mount::mount_privately;

use crate::error::{Error, Result};
use crate::task::plain_mounts;

/// The files of a snapshot that no container uses yet.
///
/// # Errors
/// [`Error::Mount`]; [`Error::Rootfs`].
pub(crate) fn of_snapshot(mounts: &[Mount]) -> Result<Rootfs> {
    let mounts = plain_mounts(mounts);
    match Rootfs::from_mounts(&mounts) {
        Err(RootfsError::Unsupported { .. }) => {
            Ok(Rootfs::from_root(mount_privately(&mounts).map_err(Error::Mount)?))
        }
        other => Ok(other?),
    }
}

/// The files of a container that runs, whose first process has the number `pid`.
///
/// # Errors
/// [`Error::Rootfs`].
pub(crate) fn of_container(mounts: &[Mount], pid: u32) -> Result<Rootfs> {
    match Rootfs::from_mounts(&plain_mounts(mounts)) {
        // The link leads to the root that the container has, whatever is in it.
        Err(RootfsError::Unsupported { .. }) => {
            Ok(Rootfs::from_path(&PathBuf::from(format!("/proc/{pid}/root"))))
        }
        other => Ok(other?),
    }
}
