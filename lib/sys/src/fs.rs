//! File calls that work on descriptors and single names instead of paths, so that nobody who can rename a folder
//! in between can redirect them: resolution inside a root (openat2(2)), extended attributes of a name without
//! following it (xattr(7)), the mode of an `O_PATH` descriptor, early writeback. And small files of a folder that
//! somebody else may have written to: what is there instead of the file is not followed, waited for or read for ever.
//!
//! What `nix` wraps safely (`openat`, `mkdirat`, `linkat`, `utimensat`, `syncfs`, …) is called from there.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};

/// How often openat2(2) is tried again after `EAGAIN`: it gives that when some rename or mount in the system raced
/// with a `..` of the path, and the manual page asks callers to retry a bounded number of times.
const OPEN_ATTEMPTS: u32 = 128;

/// Opens `path` as if `root` were the root of the filesystem: an absolute path or link target starts at `root`,
/// `..` stops there, and the magic links of procfs are refused. `path` may have symlinks anywhere, also at its end
/// unless `flags` has `O_NOFOLLOW`. An empty path is the root itself. `O_CLOEXEC` is always set.
///
/// # Errors
/// Those of openat2(2); `ELOOP` for more than 40 links or a magic link, `ENAMETOOLONG` beyond 4095 bytes.
pub fn open_in_root(root: BorrowedFd<'_>, path: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut attempt = 0;
    loop {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN) if attempt < OPEN_ATTEMPTS => attempt += 1,
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Reads a regular file. Where a link, a FIFO or a device has its name the call fails instead of following it or waiting
/// for its other end (open(2): `O_NOFOLLOW`, `O_NONBLOCK`).
///
/// # Errors
/// Those of open(2) and read(2), `ELOOP` for a link among them; `InvalidInput` for what is no regular file, and
/// `FileTooLarge` for one of more than `limit` bytes.
pub fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = fs::File::options().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut content = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")));
    }
    Ok(content)
}

/// Writes a new file that only its owner can read, in place of whatever has its name: a link there is removed, not
/// followed.
///
/// # Errors
/// Those of unlink(2), open(2) and write(2); `EEXIST` when somebody was quicker.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::File::options().write(true).create_new(true).mode(0o600).open(path)?.write_all(content)
}

/// Reads an extended attribute of an open file or folder (not of an `O_PATH` descriptor). `None` when there is no
/// such attribute or the filesystem has none at all.
///
/// # Errors
/// Those of fgetxattr(2), without `ENODATA` and `ENOTSUP`.
pub fn get_xattr(fd: BorrowedFd<'_>, attribute: &CStr) -> Result<Option<Vec<u8>>, Errno> {
    read_attribute(|buffer| {
        // SAFETY: `attribute` is NUL-terminated, and the kernel writes at most `buffer.len()` bytes to `buffer`.
        unsafe {
            libc::fgetxattr(fd.as_raw_fd(), attribute.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
        }
    })
}

/// Reads an extended attribute of the entry `name` of an open folder; a symlink is not followed. `None` as in
/// [`get_xattr`].
///
/// # Errors
/// Those of lgetxattr(2), without `ENODATA` and `ENOTSUP`; `EINVAL` for a name with a NUL.
pub fn get_xattr_at(folder: BorrowedFd<'_>, name: &[u8], attribute: &CStr) -> Result<Option<Vec<u8>>, Errno> {
    let path = entry_path(folder, name)?;
    read_attribute(|buffer| {
        // SAFETY: both strings are NUL-terminated, and the kernel writes at most `buffer.len()` bytes to `buffer`.
        unsafe {
            libc::lgetxattr(path.as_ptr(), attribute.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
        }
    })
}

/// Sets an extended attribute of an open file or folder (not of an `O_PATH` descriptor).
///
/// # Errors
/// Those of fsetxattr(2).
pub fn set_xattr(fd: BorrowedFd<'_>, attribute: &CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: `attribute` is NUL-terminated and `value` is valid for its length; the kernel only reads both.
    let result =
        unsafe { libc::fsetxattr(fd.as_raw_fd(), attribute.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(result).map(drop)
}

/// Sets an extended attribute of the entry `name` of an open folder; a symlink is not followed.
///
/// # Errors
/// Those of lsetxattr(2); `EINVAL` for a name with a NUL.
pub fn set_xattr_at(
    folder: BorrowedFd<'_>,
    name: &[u8],
    attribute: &CStr,
    value: &[u8],
) -> Result<(), Errno> {
    let path = entry_path(folder, name)?;
    // SAFETY: both strings are NUL-terminated and `value` is valid for its length; the kernel only reads them.
    let result =
        unsafe { libc::lsetxattr(path.as_ptr(), attribute.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(result).map(drop)
}

/// The names of all extended attributes of an open file or folder that the caller may see. Empty when the
/// filesystem has none at all.
///
/// # Errors
/// Those of flistxattr(2), without `ENOTSUP`.
pub fn list_xattr(fd: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
    let names = read_attribute(|buffer| {
        // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
        unsafe { libc::flistxattr(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) }
    })?;
    Ok(split_names(&names.unwrap_or_default()))
}

/// The names of all extended attributes of the entry `name` of an open folder; a symlink is not followed. Empty as in
/// [`list_xattr`].
///
/// # Errors
/// Those of llistxattr(2), without `ENOTSUP`; `EINVAL` for a name with a NUL.
pub fn list_xattr_at(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<CString>, Errno> {
    let path = entry_path(folder, name)?;
    let names = read_attribute(|buffer| {
        // SAFETY: `path` is NUL-terminated, and the kernel writes at most `buffer.len()` bytes to `buffer`.
        unsafe { libc::llistxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) }
    })?;
    Ok(split_names(&names.unwrap_or_default()))
}

fn split_names(names: &[u8]) -> Vec<CString> {
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names.filter_map(|name| CString::new(name).ok()).collect()
}

/// Calls `read` with growing buffers until the value fits. A value can grow between two calls, so `ERANGE` asks
/// again; 64 KiB is the kernel's limit for values and lists (xattr(7)).
fn read_attribute(read: impl Fn(&mut [u8]) -> isize) -> Result<Option<Vec<u8>>, Errno> {
    const LIMIT: usize = 64 * 1024;
    let mut buffer = vec![0; 256];
    loop {
        match Errno::result(read(&mut buffer)) {
            Ok(length) => {
                buffer.truncate(usize::try_from(length).unwrap_or(0));
                return Ok(Some(buffer));
            }
            Err(Errno::ERANGE) if buffer.len() < LIMIT => buffer.resize(LIMIT, 0),
            Err(Errno::ENODATA | Errno::ENOTSUP) => return Ok(None),
            Err(errno) => return Err(errno),
        }
    }
}

/// The path of an entry of an open folder by way of procfs: the magic link leads to the very folder that is open,
/// wherever it is now, and the l*xattr(2) calls do not follow the last component.
fn entry_path(folder: BorrowedFd<'_>, name: &[u8]) -> Result<CString, Errno> {
    let mut path = format!("/proc/self/fd/{}/", folder.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    CString::new(path).map_err(|_| Errno::EINVAL)
}

/// Sets the mode of what an `O_PATH` descriptor holds, which fchmod(2) refuses. It must not hold a symlink.
///
/// # Errors
/// Those of chmod(2).
pub fn chmod_path_fd(fd: BorrowedFd<'_>, mode: Mode) -> Result<(), Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    fchmodat(AT_FDCWD, path.as_str(), mode, FchmodatFlags::FollowSymlink)
}

/// Asks the kernel to start writing back a range of an open file, without waiting (sync_file_range(2)). This is
/// no promise of durability: it only spreads the work of a later sync.
pub fn start_writeback(fd: BorrowedFd<'_>, offset: i64, length: i64) {
    // SAFETY: the call takes a descriptor, which the borrow keeps open, and plain numbers.
    let result =
        unsafe { libc::sync_file_range(fd.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    // A filesystem without it writes everything at the later sync, which reports real errors.
    let _ = result;
}

/// Makes an open file immutable, or mutable again (`FS_IMMUTABLE_FL` of ioctl_iflags(2)): while it is, nobody can change,
/// rename or delete it.
///
/// # Errors
/// `EPERM` without the right to it; `ENOTTY` or `EOPNOTSUPP` where the filesystem cannot.
pub fn set_immutable(file: BorrowedFd<'_>, immutable: bool) -> Result<(), Errno> {
    const IMMUTABLE: std::ffi::c_int = 0x10;
    let mut flags: std::ffi::c_int = 0;
    // SAFETY: the request writes one int (the size in its number notwithstanding), which lives during the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) })?;
    let wanted = if immutable { flags | IMMUTABLE } else { flags & !IMMUTABLE };
    if wanted == flags {
        return Ok(());
    }
    // SAFETY: the request reads one int, which lives during the call.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const wanted) })
        .map(drop)
}

/// True when this process is in a user namespace other than the initial one, where device nodes cannot be made:
/// only the initial one maps all ids onto themselves (user_namespaces(7)).
///
/// # Errors
/// When procfs is not there.
pub fn in_user_namespace() -> io::Result<bool> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let fields: Vec<&str> = map.split_whitespace().collect();
    Ok(fields != ["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;

    fn folder(path: &Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    #[test]
    fn nothing_opens_outside_of_the_root() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("outside"), "canary").unwrap();
        let root = temp.path().join("root");
        fs::create_dir_all(root.join("inner")).unwrap();
        symlink("../../outside", root.join("inner/up")).unwrap();
        symlink(temp.path().join("outside"), root.join("absolute")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        let root_fd = folder(&root);
        for path in ["../outside", "inner/up", "absolute", "inner/../../outside", "/../outside"] {
            let result = open_in_root(root_fd.as_fd(), path.as_bytes(), OFlag::O_RDONLY);
            assert_eq!(result.unwrap_err(), Errno::ENOENT, "{path}");
        }
        fs::write(root.join("outside"), "inside").unwrap();
        let file = open_in_root(root_fd.as_fd(), b"inner/up", OFlag::O_RDONLY).unwrap();
        assert_eq!(io::read_to_string(fs::File::from(file)).unwrap(), "inside");
        open_in_root(root_fd.as_fd(), b"", OFlag::O_DIRECTORY).unwrap();
    }

    #[test]
    fn attributes_are_kept_listed_and_absent_ones_are_none() {
        // Under the target folder: /tmp may be a tmpfs without user attributes.
        let temp = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(temp.path().join("file"), "").unwrap();
        let file = folder(&temp.path().join("file"));
        let parent = folder(temp.path());
        let large = vec![7_u8; 2000];
        match set_xattr(file.as_fd(), c"user.large", &large) {
            Err(Errno::ENOTSUP) => {
                eprintln!("skipped: no user attributes here");
                return;
            }
            result => result.unwrap(),
        }
        set_xattr_at(parent.as_fd(), b"file", c"user.small", b"\0\n").unwrap();
        assert_eq!(get_xattr_at(parent.as_fd(), b"file", c"user.large").unwrap(), Some(large));
        assert_eq!(get_xattr(file.as_fd(), c"user.small").unwrap(), Some(b"\0\n".to_vec()));
        assert_eq!(get_xattr(file.as_fd(), c"user.none").unwrap(), None);
        let names = list_xattr(file.as_fd()).unwrap();
        assert_eq!(list_xattr_at(parent.as_fd(), b"file").unwrap(), names);
        assert!(names.contains(&c"user.large".to_owned()) && names.contains(&c"user.small".to_owned()));
    }

    #[test]
    fn an_attribute_of_a_symlink_never_reaches_its_target() {
        let temp = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(temp.path().join("target"), "").unwrap();
        symlink("target", temp.path().join("link")).unwrap();
        let parent = folder(temp.path());
        // A symlink cannot have user attributes: following would succeed.
        assert!(set_xattr_at(parent.as_fd(), b"link", c"user.a", b"b").is_err());
        assert_eq!(get_xattr_at(parent.as_fd(), b"target", c"user.a").unwrap(), None);
    }

    #[test]
    fn only_a_regular_file_of_bounded_size_is_read() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        assert_eq!(read_regular(&path("file"), 5).unwrap(), b"12345");
        assert_eq!(read_regular(&path("file"), 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_regular(&path("none"), 4).unwrap_err().kind(), io::ErrorKind::NotFound);
        symlink("file", path("link")).unwrap();
        let link = read_regular(&path("link"), 5).unwrap_err();
        assert_eq!(link.raw_os_error(), Some(Errno::ELOOP as i32));
        // Without O_NONBLOCK this would wait for a writer, for ever.
        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        assert_eq!(read_regular(&path("fifo"), 5).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read_regular(Path::new("/dev/zero"), 5).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_private_file_replaces_a_link_and_not_its_target() {
        let temp = tempfile::tempdir().unwrap();
        let (canary, path) = (temp.path().join("canary"), temp.path().join("file"));
        fs::write(&canary, "untouched").unwrap();
        symlink(&canary, &path).unwrap();
        write_private(&path, b"ours").unwrap();
        assert_eq!(fs::read(&canary).unwrap(), b"untouched");
        let status = fs::symlink_metadata(&path).unwrap();
        assert!(status.is_file());
        assert_eq!(status.permissions().mode() & 0o777, 0o600);
        write_private(&path, b"again").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"again");
    }

    #[test]
    fn the_mode_of_a_path_descriptor_changes() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        fs::write(&path, "").unwrap();
        let parent = folder(temp.path());
        let fd = open_in_root(parent.as_fd(), b"file", OFlag::O_PATH | OFlag::O_NOFOLLOW).unwrap();
        chmod_path_fd(fd.as_fd(), Mode::from_bits_truncate(0o4711)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o4711);
    }
}
