//! Transformations of mounts: words before the type, each ended by a slash, from the left to the right.
//!
//! * `format/`: source, target and options may hold `{{ source N }}`, `{{ target N }}` and `{{ mount N }}`, the source, the
//!   target and the mount point of the active mount N, and `{{ overlay A B }}`, the mount points from A to B (or down to
//!   B) with colons between them. This much of Go's templates clients use, and no more is understood.
//! * `mkdir/`: each option `X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]` is carried out and taken away.
//! * `mkfs/`: the source is a file, which is made with a filesystem in it if it is not there. The options say of what size and
//!   kind: `X-containerd.mkfs.{size,fs,uuid}=VALUE`.
//!
//! What is made lies below the daemon's own folders, and no link leads out of them.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use davit_model::{Coded, ErrorCode, Mount};
use davit_sys::fs::open_in_root;
use davit_sys::mount::template::{Earlier, fill_in};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fchmod, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};
use std::os::unix::ffi::OsStrExt;

use super::ActiveMount;

const MKDIR: &str = "X-containerd.mkdir.";
const MKFS: &str = "X-containerd.mkfs.";

/// The largest image that is made: what is too large for a disk is sparse, but its tables are not.
const LARGEST_IMAGE: u64 = 64 << 40;

/// Why a mount cannot be transformed.
#[derive(Debug, thiserror::Error)]
pub enum TransformError {
    /// A text in double braces is none of those that are known.
    #[error("template {template:?}: {reason}")]
    Template {
        /// The text.
        template: String,
        /// What is wrong.
        reason: String,
    },
    /// An option is not of the form that it must have.
    #[error("invalid {what} option {option:?}")]
    Option {
        /// The transformation.
        what: &'static str,
        /// The option.
        option: String,
    },
    /// The path lies in none of the daemon's folders.
    #[error("no root {path:?} configured for {what}")]
    Root {
        /// The transformation.
        what: &'static str,
        /// The path.
        path: String,
    },
    /// There is a folder of another mode.
    #[error("chmod not supported yet for mkdir handler")]
    Mode,
    /// The size of a filesystem is not given.
    #[error("mkfs requires mkfs.size option")]
    Size,
    /// A filesystem that is not made here.
    #[error("unsupported filesystem {kind:?}")]
    Filesystem {
        /// Its kind.
        kind: String,
    },
    /// The program that makes a filesystem failed.
    #[error("failed format {path:?}: {program} failed: {output}")]
    Program {
        /// The file.
        path: String,
        /// The program.
        program: String,
        /// What it said.
        output: String,
    },
    /// A call of the kernel failed.
    #[error("failed to {action} {path:?}")]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: String,
        /// Why not.
        source: Errno,
    },
}

impl Coded for TransformError {
    fn code(&self) -> ErrorCode {
        match self {
            TransformError::Template { .. }
            | TransformError::Option { .. }
            | TransformError::Size
            | TransformError::Filesystem { .. } => ErrorCode::InvalidArgument,
            TransformError::Root { .. } | TransformError::Mode => ErrorCode::Unimplemented,
            TransformError::Program { .. } | TransformError::System { .. } => ErrorCode::Unknown,
        }
    }
}

/// One transformation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transform {
    Format,
    Mkdir,
    Mkfs,
}

/// Takes the transformations off the type of a mount.
pub(super) fn split(mut mount: Mount) -> (Vec<Transform>, Mount) {
    let mut transforms = Vec::new();
    while let Some((word, rest)) = mount.kind.split_once('/') {
        transforms.push(match word {
            "format" => Transform::Format,
            "mkdir" => Transform::Mkdir,
            "mkfs" => Transform::Mkfs,
            _ => break,
        });
        mount.kind = rest.to_owned();
    }
    (transforms, mount)
}

/// Whether a mount has to be transformed by the daemon, when its user carries out the types in `accepted` itself: whole ones,
/// or with `WORD/*` all that begin with that word.
pub(super) fn is_needed(mount: &Mount, accepted: &[String]) -> bool {
    if !mount.kind.contains('/') || accepted.contains(&mount.kind) {
        return false;
    }
    let (transforms, _) = split(mount.clone());
    let is_accepted = |word: &str| accepted.iter().any(|kind| kind.strip_suffix("/*") == Some(word));
    transforms.iter().any(|transform| !is_accepted(transform.word()))
}

impl Transform {
    fn word(self) -> &'static str {
        match self {
            Transform::Format => "format",
            Transform::Mkdir => "mkdir",
            Transform::Mkfs => "mkfs",
        }
    }

    pub(super) fn apply(
        self,
        mount: &mut Mount,
        active: &[ActiveMount],
        roots: &[PathBuf],
    ) -> Result<(), TransformError> {
        match self {
            Transform::Format => {
                let texts = [&mut mount.source, &mut mount.target].into_iter().chain(&mut mount.options);
                for text in texts {
                    *text = format(text, active)?;
                }
                Ok(())
            }
            Transform::Mkdir => {
                for option in take_options(mount, MKDIR) {
                    make_folder(&option, roots)?;
                }
                Ok(())
            }
            Transform::Mkfs => {
                let options = take_options(mount, MKFS);
                make_filesystem(&mount.source, &options, roots)
            }
        }
    }
}

/// Takes the options with a prefix from a mount; gives them without it.
fn take_options(mount: &mut Mount, prefix: &str) -> Vec<String> {
    let taken = mount.options.iter().filter_map(|option| option.strip_prefix(prefix));
    let taken = taken.map(str::to_owned).collect();
    mount.options.retain(|option| !option.starts_with(prefix));
    taken
}

/// Fills in what stands in double braces.
fn format(text: &str, active: &[ActiveMount]) -> Result<String, TransformError> {
    let earlier = |active: &ActiveMount| Earlier {
        source: active.mount.source.clone(),
        target: active.mount.target.clone(),
        point: active.point.display().to_string(),
    };
    let earlier: Vec<_> = active.iter().map(earlier).collect();
    fill_in(text, &earlier).map_err(|reason| TransformError::Template { template: text.to_owned(), reason })
}

/// A path below one of the daemon's folders: its parent, open, and its name.
fn locate(
    what: &'static str,
    path: &str,
    roots: &[PathBuf],
) -> Result<(std::os::fd::OwnedFd, PathBuf), TransformError> {
    let outside = || TransformError::Root { what, path: path.to_owned() };
    let below = roots.iter().find_map(|root| Some((root, Path::new(path).strip_prefix(root).ok()?)));
    let (root, below) = below.ok_or_else(outside)?;
    let name = below.file_name().ok_or_else(outside)?;
    let failed =
        |source| TransformError::System { action: "open the folder of", path: path.to_owned(), source };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(root, flags, Mode::empty()).map_err(failed)?;
    let parent = below.parent().unwrap_or(Path::new(""));
    let parent = open_in_root(root.as_fd(), parent.as_os_str().as_bytes(), flags).map_err(failed)?;
    Ok((parent, PathBuf::from(name)))
}

/// Carries out `path=PATH[:MODE[:UID:GID]]`.
fn make_folder(option: &str, roots: &[PathBuf]) -> Result<(), TransformError> {
    const WHAT: &str = "mkdir";
    let invalid = || TransformError::Option { what: WHAT, option: format!("{MKDIR}{option}") };
    let value = option.strip_prefix("path=").ok_or_else(invalid)?;
    let parts: Vec<&str> = value.splitn(4, ':').collect();
    let (path, mode, owner) = match parts.as_slice() {
        [path] => (path, "0700", None),
        [path, mode] => (path, *mode, None),
        [path, mode, uid, gid] => {
            let owner = uid.parse().ok().zip(gid.parse().ok()).ok_or_else(invalid)?;
            (path, *mode, Some((Uid::from_raw(owner.0), Gid::from_raw(owner.1))))
        }
        _ => return Err(invalid()),
    };
    let bits = u32::from_str_radix(mode, 8).ok().filter(|bits| *bits <= 0o777).ok_or_else(invalid)?;
    let mode = Mode::from_bits_truncate(bits);
    let failed =
        |source| TransformError::System { action: "create directory", path: (*path).to_owned(), source };
    let (parent, name) = locate(WHAT, path, roots)?;
    match mkdirat(&parent, &name, Mode::S_IRWXU) {
        Ok(()) => {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let folder = nix::fcntl::openat(&parent, &name, flags, Mode::empty()).map_err(failed)?;
            if let Some((uid, gid)) = owner {
                fchown(&folder, Some(uid), Some(gid)).map_err(failed)?;
            }
            // After the owner, and whatever the umask is.
            fchmod(&folder, mode).map_err(failed)
        }
        Err(Errno::EEXIST) => {
            let found = fstatat(&parent, &name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
            if found.st_mode & 0o777 == bits { Ok(()) } else { Err(TransformError::Mode) }
        }
        Err(errno) => Err(failed(errno)),
    }
}

/// Makes a file with a filesystem in it, unless it is there.
fn make_filesystem(path: &str, options: &[String], roots: &[PathBuf]) -> Result<(), TransformError> {
    const WHAT: &str = "mkfs";
    let (parent, name) = locate(WHAT, path, roots)?;
    let (mut size, mut kind, mut uuid) = (None, "ext4", None);
    for option in options {
        let invalid = || TransformError::Option { what: WHAT, option: format!("{MKFS}{option}") };
        match option.split_once('=').ok_or_else(invalid)? {
            ("size", value) => size = Some(bytes(value).ok_or_else(invalid)?),
            ("fs", value) => kind = value,
            // It becomes an argument of a program.
            ("uuid", value) if value.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') => {
                uuid = Some(value);
            }
            _ => return Err(invalid()),
        }
    }
    let size = size.filter(|size| *size > 0).ok_or(TransformError::Size)?;
    let mut arguments = vec!["-q".to_owned()];
    match (kind, uuid) {
        ("ext2" | "ext3" | "ext4", Some(uuid)) => arguments.extend(["-U".into(), uuid.to_owned()]),
        ("xfs", Some(uuid)) => arguments.extend(["-m".into(), format!("uuid={uuid}")]),
        ("ext2" | "ext3" | "ext4" | "xfs", None) => {}
        _ => return Err(TransformError::Filesystem { kind: kind.to_owned() }),
    }
    let failed = |source| TransformError::System { action: "create file", path: path.to_owned(), source };
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = match nix::fcntl::openat(&parent, &name, flags, Mode::from_bits_truncate(0o640)) {
        Ok(file) => File::from(file),
        Err(Errno::EEXIST) => return Ok(()),
        Err(errno) => return Err(failed(errno)),
    };
    let made = file
        .set_len(size)
        .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(0))))
        .and_then(|()| run(path, &format!("mkfs.{kind}"), &arguments, &file));
    if made.is_err() {
        // Half a filesystem must not pass for a whole one the next time.
        let _ = nix::unistd::unlinkat(&parent, &name, nix::unistd::UnlinkatFlags::NoRemoveDir);
    }
    made
}

/// Runs the program on the very file that was made, which is its standard input.
fn run(path: &str, program: &str, arguments: &[String], file: &File) -> Result<(), TransformError> {
    let failed = |output: String| TransformError::Program {
        path: path.to_owned(),
        program: program.to_owned(),
        output,
    };
    let stdin = file.try_clone().map_err(|error| failed(error.to_string()))?;
    let output = Command::new(program)
        .args(arguments)
        .arg("/proc/self/fd/0")
        .stdin(Stdio::from(stdin))
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(failed(String::from_utf8_lossy(&said).trim().to_owned()))
}

/// A size as Docker's units have it: a number and `b`, `k`, `m`, `g`, `t` or `p`, in steps of 1024, perhaps with `b` or
/// `ib` behind it.
fn bytes(text: &str) -> Option<u64> {
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|size| *size <= LARGEST_IMAGE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::time::SystemTime;

    use davit_model::error::chain;

    use super::*;

    #[test]
    fn texts_in_braces_are_filled_in() {
        let active = ActiveMount {
            mount: Mount {
                kind: "bind".into(),
                source: "/s".into(),
                target: "/t".into(),
                options: Vec::new(),
            },
            at: SystemTime::UNIX_EPOCH,
            point: PathBuf::from("/m"),
        };
        let filled = format("{{ source 0 }},{{ target 0 }},{{ mount 0 }}", std::slice::from_ref(&active));
        assert_eq!(filled.unwrap(), "/s,/t,/m");
        let error = format("{{ mount 1 }}", &[active]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "template \"{{ mount 1 }}\": index out of bounds: 1, has 1 active mounts"
        );
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
    }

    #[test]
    fn folders_are_made_where_they_may_be_and_nowhere_else() {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let roots = [root.clone()];
        let path = |name: &str| root.join(name).display().to_string();
        let make = |option: String| make_folder(&option, &roots);
        make(format!("path={}", path("a"))).unwrap();
        make(format!("path={}", path("a"))).unwrap();
        make(format!("path={}:0751", path("a/b"))).unwrap();
        assert_eq!(std::fs::metadata(path("a/b")).unwrap().mode() & 0o7777, 0o751);
        if nix::unistd::getuid().is_root() {
            make(format!("path={}:0700:1:2", path("owned"))).unwrap();
            let owned = std::fs::metadata(path("owned")).unwrap();
            assert_eq!((owned.uid(), owned.gid()), (1, 2));
        }
        symlink(outside.path(), path("link")).unwrap();
        let refused = [
            (format!("path={}:0755", path("a")), ErrorCode::Unimplemented),
            (format!("path={}", outside.path().join("x").display()), ErrorCode::Unimplemented),
            (format!("path={}", path("no/such")), ErrorCode::Unknown),
            (format!("path={}", path("link/x")), ErrorCode::Unknown),
            (format!("path={}:0700:1", path("x")), ErrorCode::InvalidArgument),
            (format!("path={}:9", path("x")), ErrorCode::InvalidArgument),
            (format!("path={}:4755", path("x")), ErrorCode::InvalidArgument),
            ("paths=/x".to_owned(), ErrorCode::InvalidArgument),
            (format!("path={}", path("../x")), ErrorCode::Unknown),
        ];
        for (option, code) in refused {
            let outcome = make(option.clone());
            // `..` stops at the root, where the folder may then be made.
            if option.ends_with("/../x") {
                outcome.unwrap();
                assert!(!folder.path().join("x").exists());
                continue;
            }
            let error = outcome.unwrap_err();
            assert_eq!(error.code(), code, "{option}: {}", chain(&error));
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn sizes_are_dockers() {
        for (text, size) in
            [("1", 1), ("64m", 64 << 20), ("2GB", 2 << 30), ("3KiB", 3 << 10), ("1 k", 1 << 10)]
        {
            assert_eq!(bytes(text), Some(size), "{text}");
        }
        for text in ["", "m", "-1", "1x", "99999p", "18446744073709551615k"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn a_filesystem_is_made_once() {
        if Command::new("mkfs.ext4").arg("-V").output().is_err() {
            eprintln!("skipped: needs mkfs.ext4");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("image").display().to_string();
        let roots = [root.path().to_owned()];
        let make = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
            make_filesystem(&path, &options, &roots)
        };
        assert!(matches!(make(&[]), Err(TransformError::Size)));
        assert!(matches!(make(&["size=1m", "fs=ntfs"]), Err(TransformError::Filesystem { .. })));
        let _ = std::fs::remove_file(&path);
        // Too small for a filesystem: nothing stays.
        assert!(matches!(make(&["size=1k"]), Err(TransformError::Program { .. })));
        assert!(!Path::new(&path).exists());
        make(&["size=4m"]).unwrap();
        let made = std::fs::read(&path).unwrap();
        // The magic number of ext2 and its successors, at 1080.
        assert_eq!(made[1080..1082], [0x53, 0xef]);
        make(&["size=8m"]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), made);
    }
}
