//! Mounts that only one descriptor leads to.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use davit_model::Mount;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use super::{Error, mount_all, take_off};

/// Mounts where nobody sees it, read-only, and gives the root of what is mounted. It is unmounted when the descriptor is
/// closed, and with this process at the latest.
///
/// # Errors
/// Those of [`mount_all`]; [`Error::Syscall`] without the right to have mounts of one's own.
pub fn mount_privately(mounts: &[Mount]) -> Result<OwnedFd, Error> {
    let mut mounts = mounts.to_vec();
    for mount in &mut mounts {
        mount.options.retain(|option| option != "rw" && option != "ro");
        mount.options.push("ro".to_owned());
    }
    let place = Place::new()?;
    // The namespace is that of the thread, and ends with it.
    std::thread::scope(|scope| {
        let work = || mount_at(&mounts, &place.0);
        match std::thread::Builder::new().spawn_scoped(scope, work) {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err(failed("start a thread", Errno::EIO))),
            Err(_) => Err(failed("start a thread", Errno::EAGAIN)),
        }
    })
}

fn mount_at(mounts: &[Mount], place: &Path) -> Result<OwnedFd, Error> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| failed("unshare mount namespace", errno))?;
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|errno| failed("mount (propagation)", errno))?;
    mount_all(mounts, place)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(place, flags, Mode::empty()).map_err(|errno| failed("open mounted root", errno));
    // From here on the descriptor alone keeps it.
    while take_off(place, MntFlags::MNT_DETACH)? {}
    root
}

fn failed(syscall: &'static str, source: Errno) -> Error {
    Error::Syscall { mount: "a private mount".to_owned(), syscall, option: None, log: None, source }
}

/// An empty folder to mount on.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Place, Error> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("davit-mount-{}-{number}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            // Of a process of this number that was killed. Nothing was ever in it.
            Err(error)
                if error.kind() == std::io::ErrorKind::AlreadyExists && fs::remove_dir(&path).is_ok() =>
            {
                Place::new()
            }
            Err(error) => Err(failed("mkdir", error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))),
            Ok(()) => Ok(Place(path)),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It is empty, and in nobody's way.
        let _ = fs::remove_dir(&self.0);
    }
}
