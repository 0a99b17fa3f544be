//! Reading files of a root filesystem without mounting it.
//!
//! To start a container, two small files of its image are read. Mounting the snapshot for that would cost a mount, an
//! unmount and the right to do either; this view walks the folders that the mounts name instead, with overlayfs'
//! rules: upper layers first, a character device 0:0 hides a name, the opaque attribute hides the folders below.
//! Every component is opened without following links, and links are followed by hand below the root, so nothing an
//! image holds can lead outside (hazard classes A and K: symbolic links, `..`, devices and FIFOs in place of files).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use davit_model::{Coded, ErrorCode, Mount};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};

/// The most symbolic links on one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Why a file of a root filesystem could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A kind of mount that has no folders to look into.
    #[error("cannot read a root filesystem of type {kind:?} without mounting it")]
    Unsupported {
        /// The type of the mount.
        kind: String,
    },
    /// A system call failed.
    #[error("{operation} {path:?} of the root filesystem")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what, as seen from inside.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The path goes through more than 40 symbolic links.
    #[error("too many symbolic links on {path:?} of the root filesystem")]
    Links {
        /// The path.
        path: PathBuf,
    },
    /// Not a regular file.
    #[error("{path:?} of the root filesystem is not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file has more bytes than the caller is ready to read.
    #[error("{path:?} of the root filesystem is larger than {limit} bytes")]
    TooLarge {
        /// The path.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
}

impl Coded for RootfsError {
    fn code(&self) -> ErrorCode {
        match self {
            RootfsError::Unsupported { .. } => ErrorCode::Unimplemented,
            RootfsError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                _ => ErrorCode::Unknown,
            },
            RootfsError::Links { .. } | RootfsError::NotAFile { .. } | RootfsError::TooLarge { .. } => {
                ErrorCode::InvalidArgument
            }
        }
    }
}

/// A root filesystem, as the folders that it is made of, the uppermost first.
#[derive(Debug, Clone)]
pub struct Rootfs {
    layers: Vec<PathBuf>,
    /// What the only layer is a path of.
    _root: Option<Arc<OwnedFd>>,
}

/// What one folder holds under a path.
enum Found {
    /// The entry: its parent, its name and its status.
    Entry { parent: OwnedFd, name: PathBuf, status: FileStat },
    /// Nothing, and nothing below either.
    Hidden,
    /// Nothing, but folders below may have it.
    Below,
}

impl Rootfs {
    /// The view of a single folder.
    pub fn from_path(path: &Path) -> Rootfs {
        Rootfs { layers: vec![path.to_owned()], _root: None }
    }

    /// The view of an open folder, such as the root of something that was mounted.
    pub fn from_root(root: OwnedFd) -> Rootfs {
        let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
        Rootfs { layers: vec![path], _root: Some(Arc::new(root)) }
    }

    /// The view of a snapshot's mounts: one bind mount or one overlay, as the snapshotters hand them out.
    ///
    /// # Errors
    /// [`RootfsError::Unsupported`] for anything else.
    pub fn from_mounts(mounts: &[Mount]) -> Result<Rootfs, RootfsError> {
        let [mount] = mounts else {
            let kinds: Vec<&str> = mounts.iter().map(|mount| mount.kind.as_str()).collect();
            return Err(RootfsError::Unsupported { kind: kinds.join("+") });
        };
        let is_bind =
            mount.kind == "bind" || mount.options.iter().any(|o| matches!(o.as_str(), "bind" | "rbind"));
        if is_bind {
            return Ok(Rootfs::from_path(Path::new(&mount.source)));
        }
        if mount.kind != "overlay" {
            return Err(RootfsError::Unsupported { kind: mount.kind.clone() });
        }
        let mut layers = Vec::new();
        for option in &mount.options {
            if let Some(upper) = option.strip_prefix("upperdir=") {
                layers.insert(0, PathBuf::from(unescape(upper)));
            } else if let Some(lower) = option.strip_prefix("lowerdir=") {
                layers.extend(split_lower(lower));
            }
        }
        if layers.is_empty() {
            return Err(RootfsError::Unsupported { kind: "overlay without layers".to_owned() });
        }
        Ok(Rootfs { layers, _root: None })
    }

    /// Reads a regular file, following symbolic links below the root; `None` when there is none.
    ///
    /// # Errors
    /// [`RootfsError`], among others when the file is larger than `limit` bytes.
    pub fn read(&self, path: &Path, limit: u64) -> Result<Option<Vec<u8>>, RootfsError> {
        let io_error = |operation: &'static str| {
            move |errno: Errno| RootfsError::Io { operation, path: path.to_owned(), source: errno.into() }
        };
        let Some((parent, name, status)) = self.locate(path)? else { return Ok(None) };
        if kind_of(&status) != SFlag::S_IFREG {
            return Err(RootfsError::NotAFile { path: path.to_owned() });
        }
        // The file may have been replaced since by a process in a running container: never wait for a FIFO's writer,
        // never take a terminal, and look again at what was opened.
        let flags =
            OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = openat(&parent, &name, flags, Mode::empty()).map_err(io_error("open"))?;
        let status = fstat(&file).map_err(io_error("stat"))?;
        if kind_of(&status) != SFlag::S_IFREG {
            return Err(RootfsError::NotAFile { path: path.to_owned() });
        }
        let mut contents = Vec::new();
        File::from(file).take(limit + 1).read_to_end(&mut contents).map_err(|source| RootfsError::Io {
            operation: "read",
            path: path.to_owned(),
            source,
        })?;
        if contents.len() as u64 > limit {
            return Err(RootfsError::TooLarge { path: path.to_owned(), limit });
        }
        Ok(Some(contents))
    }

    /// Walks to a path through all symbolic links. `None` when it does not exist.
    fn locate(&self, path: &Path) -> Result<Option<(OwnedFd, PathBuf, FileStat)>, RootfsError> {
        let mut pending: VecDeque<PathBuf> = components(path);
        let mut resolved: Vec<PathBuf> = Vec::new();
        let mut links = 0;
        while let Some(component) = pending.pop_front() {
            if component == Path::new("/") {
                resolved.clear();
                continue;
            }
            if component == Path::new("..") {
                resolved.pop();
                continue;
            }
            resolved.push(component);
            let Some((parent, name, status)) = self.look_up(&resolved)? else { return Ok(None) };
            if kind_of(&status) == SFlag::S_IFLNK {
                links += 1;
                if links > MAX_LINKS {
                    return Err(RootfsError::Links { path: path.to_owned() });
                }
                let target = readlinkat(&parent, &name).map_err(|errno| RootfsError::Io {
                    operation: "read the link",
                    path: resolved.iter().collect(),
                    source: errno.into(),
                })?;
                resolved.pop();
                for component in components(Path::new(&target)).into_iter().rev() {
                    pending.push_front(component);
                }
                continue;
            }
            if pending.is_empty() {
                return Ok(Some((parent, name, status)));
            }
            if kind_of(&status) != SFlag::S_IFDIR {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Looks up a path without links in every layer.
    fn look_up(&self, path: &[PathBuf]) -> Result<Option<(OwnedFd, PathBuf, FileStat)>, RootfsError> {
        for layer in &self.layers {
            let found = look_in(layer, path).map_err(|errno| RootfsError::Io {
                operation: "look up",
                path: path.iter().collect(),
                source: errno.into(),
            })?;
            match found {
                Found::Entry { parent, name, status } => return Ok(Some((parent, name, status))),
                Found::Hidden => return Ok(None),
                Found::Below => {}
            }
        }
        Ok(None)
    }
}

fn look_in(layer: &Path, path: &[PathBuf]) -> Result<Found, Errno> {
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut parent = nix::fcntl::open(layer, folder, Mode::empty())?;
    let mut opaque = false;
    for (index, name) in path.iter().enumerate() {
        let status = match fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            Err(Errno::ENOENT) if opaque => return Ok(Found::Hidden),
            Err(Errno::ENOENT) => return Ok(Found::Below),
            Err(errno) => return Err(errno),
        };
        if kind_of(&status) == SFlag::S_IFCHR && status.st_rdev == 0 {
            return Ok(Found::Hidden);
        }
        if index + 1 == path.len() {
            return Ok(Found::Entry { parent, name: name.clone(), status });
        }
        if kind_of(&status) != SFlag::S_IFDIR {
            return Ok(Found::Hidden);
        }
        parent = openat(&parent, name, folder | OFlag::O_NOFOLLOW, Mode::empty())?;
        opaque = opaque || is_opaque(parent.as_fd())?;
    }
    Ok(Found::Below)
}

/// Whether the folder hides what lower layers have in it. The attribute is overlayfs' own, or its form for mounts
/// in user namespaces; one that cannot be read without privilege counts as absent, as it does for the kernel.
fn is_opaque(folder: BorrowedFd<'_>) -> Result<bool, Errno> {
    for attribute in [c"trusted.overlay.opaque", c"user.overlay.opaque"] {
        if davit_sys::fs::get_xattr(folder, attribute)?.is_some_and(|value| value == b"y") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn kind_of(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

fn components(path: &Path) -> VecDeque<PathBuf> {
    let keep = |component: Component<'_>| match component {
        Component::RootDir => Some(PathBuf::from("/")),
        Component::ParentDir => Some(PathBuf::from("..")),
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(keep).collect()
}

/// Splits the value of overlayfs' `lowerdir` at colons that no backslash precedes.
fn split_lower(value: &str) -> Vec<PathBuf> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for character in value.chars() {
        match character {
            _ if escaped => {
                parts.last_mut().expect("there is always one part").push(character);
                escaped = false;
            }
            '\\' => escaped = true,
            ':' => parts.push(String::new()),
            _ => parts.last_mut().expect("there is always one part").push(character),
        }
    }
    parts.into_iter().filter(|part| !part.is_empty()).map(PathBuf::from).collect()
}

fn unescape(value: &str) -> String {
    let mut plain = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        plain.push(if character == '\\' { characters.next().unwrap_or('\\') } else { character });
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn overlay(folder: &Path) -> Rootfs {
        let path = |name: &str| folder.join(name).display().to_string();
        let mount = Mount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                format!("workdir={}", path("work")),
                format!("upperdir={}", path("upper")),
                format!("lowerdir={}:{}", path("middle"), path("base")),
            ],
        };
        Rootfs::from_mounts(&[mount]).unwrap()
    }

    fn read(rootfs: &Rootfs, path: &str) -> Option<String> {
        rootfs.read(Path::new(path), 100).unwrap().map(|bytes| String::from_utf8(bytes).unwrap())
    }

    fn write(folder: &Path, path: &str, text: &str) {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn upper_layers_come_first() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "base/etc/passwd", "base");
        write(folder.path(), "base/etc/group", "base");
        write(folder.path(), "middle/etc/passwd", "middle");
        write(folder.path(), "upper/tmp/x", "upper");
        let rootfs = overlay(folder.path());
        assert_eq!(read(&rootfs, "/etc/passwd").as_deref(), Some("middle"));
        assert_eq!(read(&rootfs, "etc/group").as_deref(), Some("base"));
        assert_eq!(read(&rootfs, "/etc/none"), None);
        assert_eq!(read(&rootfs, "/etc/passwd/x"), None);
    }

    #[test]
    fn links_stay_below_the_root_and_cross_layers() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "base/real/passwd", "in the image");
        fs::create_dir_all(folder.path().join("upper/etc")).unwrap();
        fs::create_dir_all(folder.path().join("middle")).unwrap();
        symlink("../../../../../../real/passwd", folder.path().join("upper/etc/passwd")).unwrap();
        symlink("/real", folder.path().join("middle/way")).unwrap();
        symlink("/way/passwd", folder.path().join("upper/etc/group")).unwrap();
        symlink("loop", folder.path().join("upper/etc/loop")).unwrap();
        let rootfs = overlay(folder.path());
        assert_eq!(read(&rootfs, "/etc/passwd").as_deref(), Some("in the image"));
        assert_eq!(read(&rootfs, "/etc/group").as_deref(), Some("in the image"));
        assert!(matches!(rootfs.read(Path::new("/etc/loop"), 1), Err(RootfsError::Links { .. })));
    }

    #[test]
    fn what_is_no_small_file_is_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "big", &"x".repeat(101));
        fs::create_dir(folder.path().join("folder")).unwrap();
        nix::unistd::mkfifo(&folder.path().join("fifo"), Mode::S_IRUSR).unwrap();
        let rootfs = Rootfs::from_path(folder.path());
        assert!(matches!(rootfs.read(Path::new("/big"), 100), Err(RootfsError::TooLarge { .. })));
        for name in ["folder", "fifo"] {
            assert!(matches!(rootfs.read(Path::new(name), 100), Err(RootfsError::NotAFile { .. })));
        }
    }

    #[test]
    fn whiteouts_hide_what_is_below() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "base/etc/passwd", "base");
        fs::create_dir_all(folder.path().join("middle")).unwrap();
        fs::create_dir_all(folder.path().join("upper/etc")).unwrap();
        let whiteout = folder.path().join("upper/etc/passwd");
        nix::sys::stat::mknod(&whiteout, SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
        assert_eq!(read(&overlay(folder.path()), "/etc/passwd"), None);
    }

    #[test]
    fn other_mounts_are_refused() {
        let mount = Mount { kind: "ext4".to_owned(), ..Mount::default() };
        assert!(matches!(Rootfs::from_mounts(&[mount]), Err(RootfsError::Unsupported { .. })));
        assert!(matches!(Rootfs::from_mounts(&[]), Err(RootfsError::Unsupported { .. })));
        assert_eq!(split_lower(r"/a\:b:/c"), [PathBuf::from("/a:b"), PathBuf::from("/c")]);
    }
}
