//! Subvolumes of btrfs: trees of their own within one filesystem, which are copied (a *snapshot*) and deleted in constant
//! time (btrfs-subvolume(8), the kernel's `linux/btrfs.h`).

use std::ffi::{CStr, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::fstat;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};

/// `_IOW(0x94, 14, struct btrfs_ioctl_vol_args)` and its kin; both structures have 4096 bytes.
const SUBVOL_CREATE: libc::Ioctl = 0x5000_940e;
const SNAP_DESTROY: libc::Ioctl = 0x5000_940f;
const SNAP_CREATE_V2: libc::Ioctl = 0x5000_9417;
/// `_IOR(0x94, 25, __u64)` and `_IOW(0x94, 26, __u64)`.
const SUBVOL_GETFLAGS: libc::Ioctl = 0x8008_9419_u32 as libc::Ioctl;
const SUBVOL_SETFLAGS: libc::Ioctl = 0x4008_941a;

/// `BTRFS_SUBVOL_RDONLY`.
const READ_ONLY: u64 = 1 << 1;

/// The inode number of the top folder of every subvolume (`BTRFS_FIRST_FREE_OBJECTID`).
const TOP: libc::ino_t = 256;

/// The kernel's `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct Named {
    fd: i64,
    name: [u8; 4088],
}

/// The kernel's `struct btrfs_ioctl_vol_args_v2`, as far as it is used.
#[repr(C)]
struct NamedV2 {
    fd: i64,
    transaction: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

fn copy_name<const N: usize>(name: &CStr) -> Result<[u8; N], Errno> {
    let (bytes, mut field) = (name.to_bytes(), [0; N]);
    // The longest name of a file; the kernel wants a zero behind it.
    if bytes.len() > 255 {
        return Err(Errno::ENAMETOOLONG);
    }
    field[..bytes.len()].copy_from_slice(bytes);
    Ok(field)
}

fn call(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: *mut c_void) -> Result<(), Errno> {
    // SAFETY: each caller passes a structure of the size and layout that the request is for, which lives during the call
    // and is not shared.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }).map(drop)
}

/// True when the filesystem of an open file or folder is btrfs.
///
/// # Errors
/// That of fstatfs(2).
pub fn is_btrfs(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(fstatfs(fd)?.filesystem_type() == BTRFS_SUPER_MAGIC)
}

/// True when an open folder is the top of a subvolume.
///
/// # Errors
/// Those of fstatfs(2) and fstat(2).
pub fn is_subvolume(folder: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(is_btrfs(folder)? && fstat(folder)?.st_ino == TOP)
}

/// Makes the empty subvolume `name` in an open folder, with mode 0755 as the umask leaves it.
///
/// # Errors
/// `EEXIST` and others of mkdir(2); `ENOTTY` where the filesystem is none of btrfs.
pub fn create_subvolume(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let mut arguments = Named { fd: 0, name: copy_name(name)? };
    call(folder, SUBVOL_CREATE, std::ptr::from_mut(&mut arguments).cast())
}

/// Makes the subvolume `name` in an open folder with all that `of`, an open subvolume of the same filesystem, holds now.
/// It can be written to even if `of` cannot.
///
/// # Errors
/// `EEXIST` and others of mkdir(2); `EXDEV` for another filesystem; `EINVAL` when `of` is no subvolume.
pub fn snapshot(of: BorrowedFd<'_>, folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let mut arguments = NamedV2 {
        fd: of.as_raw_fd().into(),
        transaction: 0,
        flags: 0,
        unused: [0; 4],
        name: copy_name(name)?,
    };
    call(folder, SNAP_CREATE_V2, std::ptr::from_mut(&mut arguments).cast())
}

/// Whether an open subvolume is read-only.
///
/// # Errors
/// `EINVAL` for what is no subvolume, `ENOTTY` where the filesystem is none of btrfs.
pub fn is_read_only(subvolume: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut flags = 0_u64;
    call(subvolume, SUBVOL_GETFLAGS, std::ptr::from_mut(&mut flags).cast())?;
    Ok(flags & READ_ONLY != 0)
}

/// Makes an open subvolume read-only, or writable again.
///
/// # Errors
/// Those of [`is_read_only`].
pub fn set_read_only(subvolume: BorrowedFd<'_>, read_only: bool) -> Result<(), Errno> {
    let mut flags = 0_u64;
    call(subvolume, SUBVOL_GETFLAGS, std::ptr::from_mut(&mut flags).cast())?;
    let mut wanted = if read_only { flags | READ_ONLY } else { flags & !READ_ONLY };
    if wanted == flags {
        return Ok(());
    }
    call(subvolume, SUBVOL_SETFLAGS, std::ptr::from_mut(&mut wanted).cast())
}

/// Deletes the subvolume `name` of an open folder, with all that it holds. The space comes back by and by.
///
/// # Errors
/// `ENOENT`; `EINVAL` for what is no subvolume; `ENOTEMPTY` while it holds other subvolumes; `EBUSY` when something is
/// mounted on or in it.
pub fn delete_subvolume(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let mut arguments = Named { fd: 0, name: copy_name(name)? };
    call(folder, SNAP_DESTROY, std::ptr::from_mut(&mut arguments).cast())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;
    use std::process::Command;

    use davit_model::Mount;

    use super::*;
    use crate::mount::{mount_all, unmount_all};

    #[test]
    fn the_layouts_are_the_kernels() {
        assert_eq!((size_of::<Named>(), size_of::<NamedV2>()), (4096, 4096));
    }

    #[test]
    fn other_filesystems_have_no_subvolumes() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let open = File::open(folder.path()).unwrap();
        assert!(!is_subvolume(open.as_fd()).unwrap());
        assert_eq!(create_subvolume(open.as_fd(), c"s").unwrap_err(), Errno::ENOTTY);
        assert_eq!(is_read_only(open.as_fd()).unwrap_err(), Errno::ENOTTY);
    }

    #[test]
    fn subvolumes_are_made_copied_frozen_and_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let (image, point) = (folder.path().join("image"), folder.path().join("point"));
        fs::create_dir(&point).unwrap();
        File::create(&image).unwrap().set_len(128 << 20).unwrap();
        let made = Command::new("mkfs.btrfs").arg("-q").arg(&image).output();
        if !nix::unistd::geteuid().is_root() || !made.is_ok_and(|made| made.status.success()) {
            eprintln!("skipped: needs root and btrfs-progs");
            return;
        }
        let mount = Mount {
            kind: "btrfs".into(),
            source: image.display().to_string(),
            target: String::new(),
            options: vec!["loop".into()],
        };
        if let Err(error) = mount_all(&[mount], &point) {
            eprintln!("skipped: {}", davit_model::error::chain(&error));
            return;
        }
        let result = std::panic::catch_unwind(|| {
            let top = File::open(&point).unwrap();
            create_subvolume(top.as_fd(), c"one").unwrap();
            assert_eq!(create_subvolume(top.as_fd(), c"one").unwrap_err(), Errno::EEXIST);
            fs::write(point.join("one/file"), "x").unwrap();
            let one = File::open(point.join("one")).unwrap();
            assert!(is_subvolume(one.as_fd()).unwrap());
            set_read_only(one.as_fd(), true).unwrap();
            assert!(is_read_only(one.as_fd()).unwrap());
            assert!(fs::write(point.join("one/other"), "x").is_err());
            snapshot(one.as_fd(), top.as_fd(), c"two").unwrap();
            fs::write(point.join("two/file"), "changed").unwrap();
            assert_eq!(fs::read_to_string(point.join("one/file")).unwrap(), "x");
            drop(one);
            delete_subvolume(top.as_fd(), c"one").unwrap();
            assert_eq!(delete_subvolume(top.as_fd(), c"one").unwrap_err(), Errno::ENOENT);
            fs::create_dir(point.join("plain")).unwrap();
            assert_eq!(delete_subvolume(top.as_fd(), c"plain").unwrap_err(), Errno::EINVAL);
        });
        unmount_all(&point).unwrap();
        result.unwrap();
    }
}
