//! The daemon's sockets and folders, with their owners and modes.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Why a socket or folder is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListenError {
    /// Another daemon answers on the socket.
    #[error("another daemon answers on {}; stop it, or choose another socket with --address", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket is in the way; it is not ours to delete.
    #[error("{} is in the way and is no socket", path.display())]
    NoSocket {
        /// What is there.
        path: PathBuf,
    },
    /// Another daemon has locked the folder.
    #[error("{} is in use by another daemon; stop it, or choose another folder with --state", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The folder is containerd's; what its database names would be garbage to us, and be collected.
    #[error(
        "{} holds the metadata of containerd, which cannot be taken over; choose another folder with --root",
        path.display()
    )]
    Containerds {
        /// The folder.
        path: PathBuf,
    },
    /// A call of the kernel failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> ListenError + 'a {
    move |source| ListenError::Io { action, path: path.to_owned(), source }
}

/// Refuses a root that containerd has worked in: names of folders there are ours as well, and what is in them would be
/// collected because no record of ours names it.
///
/// # Errors
/// [`ListenError::Containerds`].
pub(super) fn check_owner(root: &Path) -> Result<(), ListenError> {
    let database = root.join("io.containerd.metadata.v1.bolt").join("meta.db");
    match fs::symlink_metadata(&database) {
        Ok(_) => Err(ListenError::Containerds { path: root.to_owned() }),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(())
        }
        Err(error) => Err(failed("look at", &database)(error)),
    }
}

/// Makes a folder of the daemon with exactly this mode, and its missing parents with 0711.
///
/// # Errors
/// [`ListenError::Io`].
pub(super) fn folder(path: &Path, mode: u32) -> Result<(), ListenError> {
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed("create", parent))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(failed("create", path)(error)),
    }
    // The umask may have taken bits away, and a folder of an older daemon may have more.
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of", path))
}

/// Locks a folder for as long as the file lives (flock(2)), so until this process ends in whatever way.
///
/// # Errors
/// [`ListenError::InUse`] when another process holds the lock.
pub(super) fn lock(path: &Path) -> Result<File, ListenError> {
    let folder = File::open(path).map_err(failed("open", path))?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(failed("lock", path)(error)),
    }
}

/// Listens on a unix socket that only `uid` and the members of `gid` can open.
///
/// A socket that nobody answers on is what a killed daemon left: it is replaced.
///
/// # Errors
/// [`ListenError::Taken`] when a daemon answers there.
pub(super) fn socket(path: &Path, mode: u32, uid: u32, gid: u32) -> Result<UnixListener, ListenError> {
    if let Some(parent) = path.parent()
        && !parent.exists()
    {
        folder(parent, 0o711)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NoSocket { path: path.to_owned() });
        }
        Ok(_) if BlockingStream::connect(path).is_ok() => {
            return Err(ListenError::Taken { path: path.to_owned() });
        }
        Ok(_) => fs::remove_file(path).map_err(failed("remove the stale socket", path))?,
        Err(_) => {}
    }
    // bind(2) makes the file with a mode of its own, and connect(2) asks nothing but that mode. So the socket begins in a folder
    // that only we can enter, and comes out with its owner and mode. The folder lies beside it because a rename stays on one
    // filesystem; the names are short because a socket's path has 107 bytes at most.
    let hidden = Hidden::make(path)?;
    let inside = hidden.folder.join("s");
    let listener = UnixListener::bind(&inside).map_err(failed("listen on", path))?;
    std::os::unix::fs::chown(&inside, Some(uid), Some(gid)).map_err(failed("set the owner of", path))?;
    fs::set_permissions(&inside, Permissions::from_mode(mode)).map_err(failed("set the mode of", path))?;
    fs::rename(&inside, path).map_err(failed("put in place", path))?;
    Ok(listener)
}

/// A folder beside a socket that nobody else can enter; dropping it removes it.
struct Hidden {
    folder: PathBuf,
}

impl Hidden {
    fn make(socket: &Path) -> Result<Hidden, ListenError> {
        let mut name = OsString::from(".");
        name.push(socket.file_name().unwrap_or_default());
        let folder = socket.with_file_name(name);
        let hidden = Hidden { folder };
        // Left by a daemon that was killed right here.
        hidden.remove();
        let make = DirBuilder::new().mode(0o700).create(&hidden.folder);
        match make {
            Ok(()) => Ok(hidden),
            Err(error) => Err(failed("create", &hidden.folder)(error)),
        }
    }

    fn remove(&self) {
        let _ = fs::remove_file(self.folder.join("s"));
        let _ = fs::remove_dir(&self.folder);
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn me() -> (u32, u32) {
        (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw())
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (uid, gid) = me();
        let first = socket(&path, 0o660, uid, gid).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(socket(&path, 0o660, uid, gid), Err(ListenError::Taken { .. })));
        drop(first);
        socket(&path, 0o600, uid, gid).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn nobody_ever_sees_a_socket_with_another_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (uid, gid) = me();
        let done = AtomicBool::new(false);
        let looks = std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut looks = 0;
                while !done.load(Ordering::Relaxed) {
                    for entry in fs::read_dir(dir.path()).unwrap().flatten() {
                        // What is gone by now could not be opened either.
                        let Ok(found) = fs::symlink_metadata(entry.path()) else { continue };
                        let mode = if found.is_dir() { 0o700 } else { 0o600 };
                        assert_eq!(found.permissions().mode() & 0o777, mode, "{entry:?}");
                        looks += 1;
                    }
                }
                looks
            });
            for _ in 0..200 {
                drop(socket(&path, 0o600, uid, gid).unwrap());
            }
            done.store(true, Ordering::Relaxed);
            watcher.join().unwrap()
        });
        assert!(looks > 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the socket is left");
    }

    #[tokio::test]
    async fn what_a_killed_daemon_left_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let left = Hidden::make(&path).unwrap();
        let _bound = std::os::unix::net::UnixListener::bind(left.folder.join("s")).unwrap();
        std::mem::forget(left);
        let (uid, gid) = me();
        socket(&path, 0o660, uid, gid).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_is_no_socket_is_never_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "x").unwrap();
        let (uid, gid) = me();
        assert!(matches!(socket(&path, 0o660, uid, gid), Err(ListenError::NoSocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn a_root_of_containerd_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        check_owner(dir.path()).unwrap();
        check_owner(&dir.path().join("absent")).unwrap();
        let folder = dir.path().join("io.containerd.metadata.v1.bolt");
        fs::create_dir(&folder).unwrap();
        check_owner(dir.path()).unwrap();
        fs::write(folder.join("meta.db"), "x").unwrap();
        assert!(matches!(check_owner(dir.path()), Err(ListenError::Containerds { .. })));
    }

    #[test]
    fn folders_have_their_mode_whatever_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        folder(&path, 0o700).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
