//! The bare system calls of the new mount API (Linux 5.2; `mount_setattr` 5.12), as safe functions.

use std::ffi::{CStr, c_int, c_long, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// The attributes of `mount_setattr(2)`, in the layout of the kernel's `struct mount_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub(super) set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub(super) clear: u64,
    /// One of `MS_SHARED`, `MS_PRIVATE`, `MS_SLAVE`, `MS_UNBINDABLE`, or 0.
    pub(super) propagation: u64,
    /// A user namespace, read only with `MOUNT_ATTR_IDMAP`.
    pub(super) user_namespace: u64,
}

/// The first published layout of the kernel's `struct clone_args` (64 bytes).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

fn owned(result: c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(result)?;
    // SAFETY: each caller passes the result of a system call that returns a new file descriptor, which nobody
    // else knows yet; a descriptor fits an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Opens a configuration of the filesystem `kind`.
pub(super) fn fsopen(kind: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: `kind` is a terminated string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC as c_uint) })
}

/// Sets a parameter: a flag without `value`, a string (of at most 255 bytes) with one.
pub(super) fn fsconfig_set(fs: BorrowedFd<'_>, key: &CStr, value: Option<&CStr>) -> Result<(), Errno> {
    let (command, value) = match value {
        Some(value) => (libc::FSCONFIG_SET_STRING, value.as_ptr()),
        None => (libc::FSCONFIG_SET_FLAG, std::ptr::null()),
    };
    // SAFETY: both strings are terminated and outlive the call; a flag takes a null value.
    let result = unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), command as c_uint, key.as_ptr(), value, 0 as c_int)
    };
    Errno::result(result).map(drop)
}

/// Makes the superblock from the parameters.
pub(super) fn fsconfig_create(fs: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: this command takes neither key nor value.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            fs.as_raw_fd(),
            libc::FSCONFIG_CMD_CREATE as c_uint,
            std::ptr::null::<u8>(),
            std::ptr::null::<u8>(),
            0 as c_int,
        )
    };
    Errno::result(result).map(drop)
}

/// Makes a detached mount of the superblock, with `MOUNT_ATTR_*` attributes.
pub(super) fn fsmount(fs: BorrowedFd<'_>, attributes: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: no memory is passed.
    owned(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            fs.as_raw_fd(),
            libc::FSMOUNT_CLOEXEC as c_uint,
            attributes as c_uint,
        )
    })
}

/// Makes a detached copy of the mount at `path`, which may be relative to `directory` or empty.
pub(super) fn clone_tree(
    directory: Option<BorrowedFd<'_>>,
    path: &CStr,
    recursive: bool,
) -> Result<OwnedFd, Errno> {
    let mut flags = libc::OPEN_TREE_CLONE as c_uint | libc::OPEN_TREE_CLOEXEC as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH as c_uint;
    }
    let directory = directory.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: `path` is a terminated string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, directory, path.as_ptr(), flags) })
}

/// Changes the attributes of the mount whose root is open as `tree`.
pub(super) fn mount_setattr(
    tree: BorrowedFd<'_>,
    attributes: &Attributes,
    recursive: bool,
) -> Result<(), Errno> {
    let mut flags = libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as c_uint;
    }
    // SAFETY: the path is an empty terminated string; `attributes` has the kernel's layout, is valid for reads
    // during the call, and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Attaches the detached mount `tree` on the place that is open as `point`.
pub(super) fn move_mount(tree: BorrowedFd<'_>, point: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH as c_uint | libc::MOVE_MOUNT_T_EMPTY_PATH as c_uint;
    // SAFETY: both paths are empty terminated strings.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            point.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// Starts a child in a new user namespace that does nothing until it is killed, and answers its process id.
///
/// It dies with the calling thread at the latest. It shares the table of open files, so that it keeps no pipe or
/// socket of this process open. It has no exit signal, so that a handler of `SIGCHLD` never sees it; whoever
/// starts it kills it and waits for it with `__WALL`. Needs Linux 5.3 (`clone3`).
pub(super) fn start_namespace_holder() -> Result<c_int, Errno> {
    let flags = libc::CLONE_NEWUSER | libc::CLONE_FILES;
    let arguments = CloneArguments { flags: flags as u64, ..CloneArguments::default() };
    // SAFETY: this call has no conditions.
    let parent = unsafe { libc::getpid() };
    // SAFETY: the arguments have the kernel's layout and their size is given. Without CLONE_VM and without a
    // stack the child runs on a copy of this one, as after fork(2). Other threads do not exist in it and may have
    // held any lock, so it makes system calls only, and never returns from here.
    let result = unsafe {
        let result =
            libc::syscall(libc::SYS_clone3, std::ptr::from_ref(&arguments), size_of::<CloneArguments>());
        if result == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // A parent that died before this took effect is none any more.
            while libc::getppid() == parent {
                libc::pause();
            }
            libc::_exit(0);
        }
        result
    };
    Ok(Errno::result(result)? as c_int)
}
