//! The unix sockets of the shim: names that nobody else can take, and peers that are no strangers.
//!
//! Whoever can write to the folder of the sockets can take the name of a shim that is to come and be asked in its place
//! to run containers; whoever can connect to one can have anything executed (CVE-2020-15257). So the folder must be the
//! daemon's user's own all the way up from the root, a socket has its mode from the beginning, and the kernel says who
//! is at the other end (unix(7): `SO_PEERCRED`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::{UnixAddr, bind, getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

/// The user that the ids of others are shown as in a user namespace (user_namespaces(7)).
const OVERFLOW_USER: u32 = 65534;
/// In a folder with this bit only the owner of an entry can rename or remove it (inode(7)).
const STICKY: u32 = 0o1000;
/// The bits of the mode with which others than the owner can write.
const OTHERS_WRITE: u32 = 0o022;

/// Why a folder is no place for a socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// It cannot be looked at.
    #[error("look at {}", part.display())]
    Look {
        /// The folder, or one above it.
        part: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// Somebody else owns it.
    #[error("{} belongs to user {user}", part.display())]
    Owner {
        /// The folder, or one above it.
        part: PathBuf,
        /// Who owns it.
        user: u32,
    },
    /// Others can change what is in it.
    #[error("{} can be written to by others (mode {mode:04o}); take that right away from them", part.display())]
    Writable {
        /// The folder, or one above it.
        part: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// Makes sure that nobody but us and root can put anything into `folder`, nor another folder in its place.
///
/// # Errors
/// [`FolderError`] names the part of the path that somebody else can change.
pub(crate) fn check_folder(folder: &Path) -> Result<(), FolderError> {
    let look = |part: &Path| {
        let part = part.to_owned();
        move |source| FolderError::Look { part, source }
    };
    let real = std::fs::canonicalize(folder).map_err(look(folder))?;
    let mapped = davit_sys::fs::in_user_namespace().unwrap_or(false);
    for part in real.ancestors() {
        let status = std::fs::symlink_metadata(part).map_err(look(part))?;
        let (user, mode) = (status.uid(), status.mode());
        let itself = part == real;
        let trusted = user == geteuid().as_raw() || !itself && (user == 0 || mapped && user == OVERFLOW_USER);
        if !trusted {
            return Err(FolderError::Owner { part: part.to_owned(), user });
        }
        if mode & OTHERS_WRITE != 0 && (itself || mode & STICKY == 0) {
            return Err(FolderError::Writable { part: part.to_owned(), mode: mode & 0o7777 });
        }
    }
    Ok(())
}

/// Gives a socket its name, with a mode that lets in nobody else from the first moment on. For a process of one thread:
/// the mode comes from the umask.
pub(crate) fn bind_private(socket: &OwnedFd, path: &Path) -> nix::Result<()> {
    let address = UnixAddr::new(path)?;
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = bind(socket.as_raw_fd(), &address);
    umask(before);
    bound
}

/// Whether the process at the other end of a connection is of our own user.
pub(crate) fn is_ours(connection: &impl AsFd) -> bool {
    getsockopt(connection, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_folder_that_others_can_change_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("s");
        fs::create_dir(&folder).unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        for (bits, safe) in [(0o700, true), (0o711, true), (0o755, true), (0o770, false), (0o1777, false)] {
            mode(&folder, bits);
            assert_eq!(check_folder(&folder).is_ok(), safe, "{bits:o}");
        }
        mode(&folder, 0o700);
        // Whoever can write to the folder above can put another one in its place, unless the bit is set.
        mode(temp.path(), 0o777);
        assert!(matches!(check_folder(&folder), Err(FolderError::Writable { .. })));
        mode(temp.path(), 0o1777);
        check_folder(&folder).unwrap();
        mode(temp.path(), 0o700);
        // It is the folder that counts, not the link to it.
        let link = temp.path().join("link");
        symlink(&folder, &link).unwrap();
        check_folder(&link).unwrap();
        mode(&folder, 0o722);
        assert!(matches!(check_folder(&link), Err(FolderError::Writable { part, .. }) if part == folder));
        mode(&folder, 0o700);
        if geteuid().is_root() {
            std::os::unix::fs::chown(&folder, Some(4711), None).unwrap();
            assert!(matches!(check_folder(&folder), Err(FolderError::Owner { user: 4711, .. })));
        } else {
            eprintln!("skipped in part: needs root");
        }
    }
}
