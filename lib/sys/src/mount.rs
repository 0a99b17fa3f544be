//! Carrying out mounts: from the fstab-like form that snapshotters hand out to the kernel's mount calls.
//!
//! A mount is first made detached (`fsopen`, or `open_tree` for a bind mount), gets all its attributes, and is
//! then attached by one `move_mount`: nobody ever sees it half made, a read-only bind mount is never writable,
//! and what the filesystem has to say about a bad option comes back in its own words. What a kernel lacks of
//! this falls back to mount(2).
//!
//! The shim and the daemon both mount through this module.

mod calls;
mod classic;
mod compose;
mod helper;
mod idmap;
mod options;
mod private;
pub mod template;

use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use davit_model::{Coded, ErrorCode, Mount};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
pub use nix::mount::MntFlags;
use nix::mount::{MsFlags, umount2};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::fs::open_in_root;
use crate::loop_device::{self, LoopDevice};
use calls::Attributes;
pub use helper::is_by_helper;
use options::Options;
pub use private::mount_privately;

/// The most bytes of a value that `fsconfig(2)` takes.
const LONGEST_VALUE: usize = 255;

/// Why a mount or unmount failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option that cannot be carried out.
    #[error("mount option {option:?} of {mount}: {reason}")]
    Option {
        /// The mount, `kind source`.
        mount: String,
        /// The option.
        option: String,
        /// Why not.
        reason: &'static str,
    },
    /// A kind of mount that is not done here, or not on this kernel.
    #[error("cannot mount {mount}: {reason}")]
    Unsupported {
        /// The mount, `kind source`.
        mount: String,
        /// Why not.
        reason: &'static str,
    },
    /// A text in double braces is none of those that are known, or refers to a mount that is not there.
    #[error("template {text:?} of {mount}: {reason}")]
    Template {
        /// The mount, `kind source`.
        mount: String,
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The program that mounts filesystems of this type is not there, or did not do it.
    #[error("mount helper {program} for {mount}: {reason}")]
    Helper {
        /// The mount, `kind source on target`.
        mount: String,
        /// The program.
        program: &'static str,
        /// What went wrong, with what it said.
        reason: String,
    },
    /// The kernel refused.
    #[error("{syscall}{} for {mount}{}", in_parentheses(.option), in_parentheses(.log))]
    Syscall {
        /// The mount, `kind source on target`, or only the target.
        mount: String,
        /// The system call.
        syscall: &'static str,
        /// The option that was being set.
        option: Option<String>,
        /// What the filesystem wrote into its log about it.
        log: Option<String>,
        /// The system's answer.
        source: Errno,
    },
}

fn in_parentheses(text: &Option<String>) -> String {
    text.as_ref().map(|text| format!(" ({text})")).unwrap_or_default()
}

impl Error {
    /// The system's answer, if it was the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Syscall { source, .. } => Some(*source),
            Error::Option { .. }
            | Error::Unsupported { .. }
            | Error::Template { .. }
            | Error::Helper { .. } => None,
        }
    }
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::Option { .. } | Error::Template { .. } => ErrorCode::InvalidArgument,
            Error::Unsupported { .. } => ErrorCode::Unimplemented,
            Error::Syscall { source: Errno::EPERM | Errno::EACCES, .. } => ErrorCode::PermissionDenied,
            Error::Syscall {
                source: Errno::ENOSPC | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE, ..
            } => ErrorCode::ResourceExhausted,
            Error::Syscall { .. } | Error::Helper { .. } => ErrorCode::Unknown,
        }
    }
}

/// Carries out `mounts` in order, each on `target` or, where it names one, on a path below it. That path is
/// resolved as if `target` were the root of the filesystem, so that no link in it leads elsewhere; `target`
/// itself must exist and not be a symbolic link.
///
/// The options are those of fstab(5): flags, propagation, and the rest for the filesystem. `uidmap` and `gidmap`
/// make an idmapped mount, or for an overlay idmapped lower folders, as containerd does. `loop` mounts a file by way of a
/// loop device that ends with the mount, with `direct-io` past the page cache; erofs needs none since Linux 6.12.
///
/// Types that begin with `fuse.` or `fuse3.` are mounted by the programs `mount.fuse` and `mount.fuse3` of the system's own folders, which
/// get the options as they are and a minute's time.
///
/// Where the last mount refers to those before it (its type begins with `format/`), that one alone is on `target` in the
/// end.
///
/// # Errors
/// See [`Error`]. All that was mounted before is unmounted again, except for a `remount`.
pub fn mount_all(mounts: &[Mount], target: &Path) -> Result<(), Error> {
    if compose::is_composed(mounts) {
        return compose::mount_composed(mounts, target);
    }
    let mut done: Vec<OwnedFd> = Vec::new();
    for mount in mounts {
        match mount_one(mount, target, Interface::Newest) {
            Ok(point) => done.extend(point),
            Err(error) => {
                done.iter().rev().for_each(detach);
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Takes the topmost mount off `target`. A target that is no mount point, or not there, is no error; a symbolic
/// link is not followed.
///
/// # Errors
/// [`Error::Syscall`], with `EBUSY` while it is in use and `flags` lacks `MNT_DETACH`.
pub fn unmount(target: &Path, flags: MntFlags) -> Result<(), Error> {
    take_off(target, flags).map(drop)
}

/// Takes every mount off `target` at once, with all that is mounted below it, and gives descriptors that keep their
/// filesystems. Closing the last descriptor is what unmounting costs: overlayfs, for one, syncs the whole filesystem
/// that its upper folder is on (`sync_filesystem` in the kernel's `ovl_sync_fs`), which may take long.
///
/// # Errors
/// [`Error::Syscall`].
pub fn detach_all(target: &Path) -> Result<Vec<OwnedFd>, Error> {
    let mut kept = Vec::new();
    detach_stack(target, &mut kept)?;
    if kept.is_empty() {
        for point in mount_points_below(target)? {
            detach_stack(&point, &mut kept)?;
        }
    }
    Ok(kept)
}

fn detach_stack(point: &Path, kept: &mut Vec<OwnedFd>) -> Result<(), Error> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    while let Ok(held) = open(point, flags, Mode::empty()) {
        if !take_off(point, MntFlags::MNT_DETACH)? {
            break;
        }
        kept.push(held);
    }
    Ok(())
}

/// Takes every mount off `target`, and all that is mounted below it; what is in use is detached and ends with its
/// last user. A target with no mounts, or not there, is no error.
///
/// # Errors
/// [`Error::Syscall`].
pub fn unmount_all(target: &Path) -> Result<(), Error> {
    let mut found = false;
    while take_off_even_busy(target)? {
        found = true;
    }
    // With a mount gone from here, all that was mounted in it is gone. Only without one there can be more.
    if !found {
        for point in mount_points_below(target)? {
            while take_off_even_busy(&point)? {}
        }
    }
    Ok(())
}

/// True when there was one to take off.
fn take_off(target: &Path, flags: MntFlags) -> Result<bool, Error> {
    match umount2(target, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(true),
        // EINVAL is also what a symbolic link and a mount that is locked in a user namespace get.
        Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
        Err(source) => Err(Error::Syscall {
            mount: target.display().to_string(),
            syscall: "umount2",
            option: None,
            log: None,
            source,
        }),
    }
}

fn take_off_even_busy(target: &Path) -> Result<bool, Error> {
    match take_off(target, MntFlags::empty()) {
        Err(Error::Syscall { source: Errno::EBUSY, .. }) => take_off(target, MntFlags::MNT_DETACH),
        result => result,
    }
}

/// True when the running kernel has this version or a later one.
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let Ok(uname) = nix::sys::utsname::uname() else { return false };
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

/// Every mount point strictly below `target`, the last mounted first.
fn mount_points_below(target: &Path) -> Result<Vec<PathBuf>, Error> {
    // What a link leads to is not below it: in place of a folder of ours it may lead to the root of the host.
    if fs::symlink_metadata(target).is_ok_and(|status| status.is_symlink()) {
        return Ok(Vec::new());
    }
    let Ok(target) = fs::canonicalize(target) else { return Ok(Vec::new()) };
    let mut points = mount_points()?;
    points.retain(|point| *point != target && point.starts_with(&target));
    points.reverse();
    Ok(points)
}

/// Every place where the calling thread sees something mounted, in the order of proc_pid_mountinfo(5).
///
/// # Errors
/// The kernel's table cannot be read.
pub fn mount_points() -> Result<Vec<PathBuf>, Error> {
    // A thread can have a mount namespace of its own.
    let table = fs::read("/proc/thread-self/mountinfo").map_err(|error| Error::Syscall {
        mount: "the mount points".to_owned(),
        syscall: "read mountinfo",
        option: None,
        log: None,
        source: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
    })?;
    let fields =
        table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    Ok(fields.map(|field| PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(field)))).collect())
}

/// Undoes the `\ooo` that mountinfo has for blanks, newlines and backslashes (proc_pid_mountinfo(5)).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] = rest {
            text.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
            rest = tail;
        } else {
            text.push(*first);
            rest = tail;
        }
    }
    text
}

/// Which calls to mount with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interface {
    /// The new mount API, and mount(2) where that falls short.
    Newest,
    /// Only mount(2).
    #[cfg(test)]
    Classic,
}

/// Answers the mount point for undoing, unless there is nothing to undo.
fn mount_one(mount: &Mount, target: &Path, interface: Interface) -> Result<Option<OwnedFd>, Error> {
    let options = Options::parse(mount)?;
    if mount.kind.contains('/') {
        let reason = "its kind is for a mount manager";
        return Err(Error::Unsupported { mount: describe(mount), reason });
    }
    if let Some(helper) = helper::of(&mount.kind) {
        let job = Job { mount, target, options, source: &mount.source };
        return helper::mount(&job, helper, &helper::Terms::default()).map(Some);
    }
    let Some(direct_io) = options.loop_device else {
        return mount_job(Job { mount, target, options, source: &mount.source }, interface);
    };
    if mount.kind == "erofs" {
        let job = Job { mount, target, options: options.clone(), source: &mount.source };
        match mount_job(job, interface) {
            // What a kernel says that wants a block device.
            Err(error) if error.errno() == Some(Errno::ENOTBLK) => {}
            result => return result,
        }
    }
    let read_only = options.flags.contains(MsFlags::MS_RDONLY);
    let device = LoopDevice::attach(Path::new(&mount.source), loop_device::Options { read_only, direct_io });
    let device = device.map_err(|(syscall, source)| Error::Syscall {
        mount: format!("{} on {}", describe(mount), target.display()),
        syscall,
        option: Some("loop".to_owned()),
        log: None,
        source,
    })?;
    // The device lives until here, and from then on with the mount.
    mount_job(Job { mount, target, options, source: &device.path().to_string_lossy() }, interface)
}

fn mount_job(job: Job<'_>, interface: Interface) -> Result<Option<OwnedFd>, Error> {
    let point = job.open_point()?;
    if job.options.flags.contains(MsFlags::MS_REMOUNT) {
        return classic::remount(&job, &point).map(|()| None);
    }
    let result = if interface == Interface::Newest { job.attach(&point) } else { Err(Failure::Missing) };
    match result {
        Ok(()) => {}
        Err(Failure::Missing) => classic::attach(&job, &point)?,
        Err(Failure::Refused(error)) => return Err(error),
    }
    Ok(Some(point))
}

/// Takes the topmost mount off the place that is open as `point`, in cleaning up after another error.
fn detach(point: &OwnedFd) {
    // The link of the descriptor leads to the place itself; umount2 then steps onto what is mounted there.
    let _ = umount2(&classic::fd_path(point), MntFlags::MNT_DETACH);
}

fn describe(mount: &Mount) -> String {
    format!("{} {}", mount.kind, mount.source)
}

/// Why the new mount API did not do it.
enum Failure {
    /// This kernel has not got it, or it cannot take these options.
    Missing,
    /// It would be no different the old way.
    Refused(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Refused(error)
    }
}

/// One mount on its way.
struct Job<'a> {
    mount: &'a Mount,
    target: &'a Path,
    options: Options,
    /// What is mounted: the source of the mount, or the loop device that it is on.
    source: &'a str,
}

/// Lower folders mounted where the overlay is going to be; gone with this value.
struct IdmappedLowers<'a> {
    point: &'a OwnedFd,
    /// Keeps the path alive through which the overlay finds them.
    _tree: OwnedFd,
}

impl Drop for IdmappedLowers<'_> {
    fn drop(&mut self) {
        detach(self.point);
    }
}

impl Job<'_> {
    fn describe(&self) -> String {
        let Mount { kind, source, target, .. } = self.mount;
        let separator = if target.is_empty() || target.starts_with('/') { "" } else { "/" };
        format!("{kind} {source} on {}{separator}{target}", self.target.display())
    }

    fn error(&self, syscall: &'static str, source: Errno) -> Error {
        Error::Syscall { mount: self.describe(), syscall, option: None, log: None, source }
    }

    fn unsupported(&self, reason: &'static str) -> Error {
        Error::Unsupported { mount: describe(self.mount), reason }
    }

    /// For a call that a kernel may lack.
    fn failure(&self, syscall: &'static str) -> impl Fn(Errno) -> Failure {
        move |errno| match errno {
            Errno::ENOSYS => Failure::Missing,
            errno => Failure::Refused(self.error(syscall, errno)),
        }
    }

    fn text(&self, text: &str) -> Result<CString, Error> {
        CString::new(text).map_err(|_| Error::Option {
            mount: describe(self.mount),
            option: text.replace('\0', "\\0"),
            reason: "contains a NUL byte",
        })
    }

    /// Opens the place to mount on: the root of what is mounted there last, if anything is.
    fn open_point(&self) -> Result<OwnedFd, Error> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let root = open(self.target, flags | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(|errno| self.error("open target", errno))?;
        let kind = fstat(&root).map_err(|errno| self.error("fstat target", errno))?.st_mode;
        if SFlag::from_bits_truncate(kind) & SFlag::S_IFMT == SFlag::S_IFLNK {
            return Err(self.error("open target", Errno::ELOOP));
        }
        if self.mount.target.is_empty() {
            return Ok(root);
        }
        open_in_root(root.as_fd(), self.mount.target.as_bytes(), flags)
            .map_err(|errno| self.error("openat2 target", errno))
    }

    /// Mounts on `point` by the new API; nothing is mounted after an error.
    fn attach(&self, point: &OwnedFd) -> Result<(), Failure> {
        let tree = if self.options.bind() { self.bind_tree()? } else { self.filesystem_tree(point)? };
        calls::move_mount(tree.as_fd(), point.as_fd()).map_err(self.failure("move_mount"))?;
        // A mount that is attached to a shared one becomes shared, so the propagation comes last.
        let propagation = self.options.propagation;
        if !propagation.is_empty() {
            let recursive = propagation.contains(MsFlags::MS_REC);
            let attributes =
                Attributes { propagation: (propagation & !MsFlags::MS_REC).bits(), ..Attributes::default() };
            calls::mount_setattr(tree.as_fd(), &attributes, recursive).map_err(|errno| {
                detach(point);
                self.failure("mount_setattr (propagation)")(errno)
            })?;
        }
        Ok(())
    }

    fn bind_tree(&self) -> Result<OwnedFd, Failure> {
        let source = self.text(self.source)?;
        let tree = calls::clone_tree(None, &source, self.options.recursive())
            .map_err(self.failure("open_tree source"))?;
        let (set, clear) = (self.options.attributes(), self.options.cleared_attributes());
        if set != 0 || clear != 0 {
            // As with mount(2), the attributes are for the source itself, not for mounts below it.
            let attributes = Attributes { set, clear, ..Attributes::default() };
            calls::mount_setattr(tree.as_fd(), &attributes, false).map_err(self.failure("mount_setattr"))?;
        }
        if let Some((users, groups)) = &self.options.mapping {
            self.idmap(tree.as_fd(), users, groups, 0)?;
        }
        Ok(tree)
    }

    fn filesystem_tree(&self, point: &OwnedFd) -> Result<OwnedFd, Failure> {
        // Before its own port to this API overlayfs would not take its lower folders one by one, and complain
        // about each try in the kernel's log.
        if self.mount.kind == "overlay" && !kernel_at_least(6, 5) {
            return Err(Failure::Missing);
        }
        let kind = self.text(&self.mount.kind)?;
        let fs = calls::fsopen(&kind).map_err(self.failure("fsopen"))?;
        match &self.options.mapping {
            Some((users, groups)) if self.mount.kind == "overlay" => {
                // The overlay keeps private copies of the lower mounts, so they can go once it is made.
                let (data, _lowers) = self.idmap_lowers(point, users, groups)?;
                self.configure(fs.as_fd(), &data)
            }
            Some((users, groups)) => {
                let tree = self.configure(fs.as_fd(), &self.options.data)?;
                self.idmap(tree.as_fd(), users, groups, 0)?;
                Ok(tree)
            }
            None => self.configure(fs.as_fd(), &self.options.data),
        }
    }

    /// Tells the filesystem its options and makes a detached mount of it.
    fn configure(&self, fs: BorrowedFd<'_>, data: &[String]) -> Result<OwnedFd, Failure> {
        if !self.source.is_empty() {
            self.set(fs, "source", Some(self.source))?;
        }
        for flag in self.options.superblock() {
            self.set(fs, flag, None)?;
        }
        let overlay = self.mount.kind == "overlay";
        for option in data {
            if overlay && option.contains('\\') {
                // Escapes belong to the one string of mount(2).
                return Err(Failure::Missing);
            }
            match option.split_once('=') {
                Some(("lowerdir", list)) if overlay => {
                    for directory in list.split(':') {
                        // One by one there is no limit of a page, since Linux 6.8. An empty name makes the next
                        // a data-only layer, which has a parameter of its own.
                        if directory.is_empty() {
                            return Err(Failure::Missing);
                        }
                        self.set(fs, "lowerdir+", Some(directory))?;
                    }
                }
                Some((key, value)) => self.set(fs, key, Some(value))?,
                None => self.set(fs, option, None)?,
            }
        }
        calls::fsconfig_create(fs).map_err(|errno| {
            match self.refused(fs, "fsconfig (create)", None, errno) {
                // A filesystem without its own port to this API reads its options only now, and has no words for
                // what it does not like.
                Failure::Refused(Error::Syscall { log: None, source: Errno::EINVAL, .. }) => Failure::Missing,
                failure => failure,
            }
        })?;
        calls::fsmount(fs, self.options.attributes()).map_err(self.failure("fsmount"))
    }

    fn set(&self, fs: BorrowedFd<'_>, key: &str, value: Option<&str>) -> Result<(), Failure> {
        if value.is_some_and(|value| value.len() > LONGEST_VALUE) {
            return Err(Failure::Missing);
        }
        let value_text = value.map(|value| self.text(unquoted(key, value))).transpose()?;
        calls::fsconfig_set(fs, &self.text(key)?, value_text.as_deref()).map_err(|errno| {
            let option = value.map_or_else(|| key.to_owned(), |value| format!("{key}={value}"));
            match self.refused(fs, "fsconfig", Some(option), errno) {
                // The second is what a filesystem without its own port to this API gets for what it could take in
                // the one string of mount(2).
                Failure::Refused(Error::Syscall { log: Some(log), .. })
                    if key == "lowerdir+" && log.contains("Unknown parameter")
                        || log.contains("VFS: Legacy:") =>
                {
                    Failure::Missing
                }
                failure => failure,
            }
        })
    }

    /// An error with all that the filesystem logged about it.
    fn refused(
        &self,
        fs: BorrowedFd<'_>,
        syscall: &'static str,
        option: Option<String>,
        source: Errno,
    ) -> Failure {
        Failure::Refused(Error::Syscall { mount: self.describe(), syscall, option, log: log(fs), source })
    }

    fn idmap(&self, tree: BorrowedFd<'_>, users: &str, groups: &str, set: u64) -> Result<(), Failure> {
        let namespace = idmap::user_namespace(users, groups).map_err(|failure| match failure {
            idmap::Failure::Syntax => Error::Option {
                mount: describe(self.mount),
                option: format!("uidmap={users},gidmap={groups}"),
                reason: "want container-id:host-id:length[,…]",
            },
            idmap::Failure::Kernel(step, errno) => self.error(step, errno),
        })?;
        let attributes = Attributes {
            set: set | libc::MOUNT_ATTR_IDMAP,
            propagation: libc::MS_PRIVATE,
            user_namespace: std::os::fd::AsRawFd::as_raw_fd(&namespace) as u64,
            ..Attributes::default()
        };
        calls::mount_setattr(tree, &attributes, true).map_err(self.failure("mount_setattr (idmap)"))
    }

    /// Mounts the folder that holds all lower folders, idmapped and read-only, on `point`, and answers the
    /// options of an overlay that finds them there.
    fn idmap_lowers<'p>(
        &self,
        point: &'p OwnedFd,
        users: &str,
        groups: &str,
    ) -> Result<(Vec<String>, IdmappedLowers<'p>), Error> {
        let lower = options::lower_directories(&self.options.data).unwrap_or_default();
        let Some(common) = options::common_directory(&lower) else {
            return Err(Error::Option {
                mount: describe(self.mount),
                option: format!("uidmap={users}"),
                reason: "needs lower folders with a folder in common",
            });
        };
        let tree = calls::clone_tree(None, &self.text(common)?, true)
            .map_err(|errno| self.error("open_tree lowerdir", errno))?;
        self.idmap(tree.as_fd(), users, groups, libc::MOUNT_ATTR_RDONLY).map_err(
            |failure| match failure {
                Failure::Missing => self.unsupported("id mappings need mount_setattr(2) of Linux 5.12"),
                Failure::Refused(error) => error,
            },
        )?;
        calls::move_mount(tree.as_fd(), point.as_fd())
            .map_err(|errno| self.error("move_mount lowerdir", errno))?;
        let prefix = classic::fd_path(&tree);
        let mapped: Vec<String> =
            lower.iter().map(|path| format!("{}{}", prefix.display(), &path[common.len()..])).collect();
        let data = options::replace_lower_directories(&self.options.data, &mapped);
        Ok((data, IdmappedLowers { point, _tree: tree }))
    }
}

/// The value without the quotes that only the one string of mount(2) needs around a security context.
fn unquoted<'a>(key: &str, value: &'a str) -> &'a str {
    if matches!(key, "context" | "fscontext" | "defcontext" | "rootcontext") {
        value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
    } else {
        value
    }
}

/// The messages of a filesystem configuration, each `e text`, `w text` or `i text`.
fn log(fs: BorrowedFd<'_>) -> Option<String> {
    let mut file = fs::File::from(fs.try_clone_to_owned().ok()?);
    let mut messages = Vec::new();
    let mut buffer = [0u8; 1024];
    // The kernel keeps the last eight.
    while messages.len() < 8 {
        match file.read(&mut buffer) {
            Ok(length) if length > 0 => {
                let message = String::from_utf8_lossy(&buffer[..length]);
                messages.push(message.trim_end().chars().skip(2).collect::<String>());
            }
            _ => break,
        }
    }
    (!messages.is_empty()).then(|| messages.join("; "))
}

#[cfg(test)]
mod tests;
