//! The bundle: the folder in which a daemon and a shim keep what they need of one container.
//!
//! ```text
//! <state>/<namespace>/            0711
//!   .<id>/                        a bundle that is being made; no daemon looks into it
//!   .stale--…/                    what is out of use and waits to be removed
//!   <id>/                         0700; 0710 and the mapped group when the container has a user namespace
//!     config.json                 the runtime spec, byte for byte as the client gave it
//!     rootfs/                     0711, where the shim mounts the root filesystem
//!     work -> <root>/<namespace>/<id>    what must outlive a reboot, or be on a disk; 0711
//!       checkpoint/                 what the container is to be restored from; 0700
//!     log                         a FIFO: the shim's own log, to the daemon
//!     bootstrap.json              how to reach the shim (written by the daemon)
//!     address                     the same, by shims of containerd 1.6 and 1.7
//!     shim-binary-path            the shim's binary, to run its `delete`
//!     sandbox                     the sandbox whose shim it joined
//!     init.pid, journal, …        the shim's own
//! ```
//!
//! The names are containerd's, so that its daemon and its shims find what they know.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use davit_model::{Coded, ErrorCode};
use davit_sys::fs::read_regular;
use nix::mount::MntFlags;
use nix::unistd::Gid;
use serde::Deserialize;

use crate::bootstrap::{StartResult, StartResultError};
use crate::journal;

/// Everything about the shim itself is small; what is larger is no file of ours.
const MAX_SMALL_FILE: u64 = 64 * 1024;
/// The most bytes of a `config.json`: it comes in a message of a client, of which daemons take at most 16 MiB.
const MAX_SPEC: u64 = 32 << 20;

/// How often to begin to remove a folder that others put files into meanwhile.
const REMOVALS: usize = 100;

/// The names of what is out of use and waits to be removed. No bundle and no half of one is named so: an
/// identifier has no two separators in a row.
const STALE: &str = ".stale--";

/// Why a bundle cannot be made, read or deleted.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// An operation on one of its files failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// `make`, `write`, `rename`, …
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// There is one.
    #[error("bundle {} exists", path.display())]
    Exists {
        /// The bundle.
        path: PathBuf,
    },
    /// The runtime spec is no JSON document.
    #[error("the runtime spec cannot be read")]
    Spec {
        /// Why not.
        source: serde_json::Error,
    },
    /// Something is mounted in it that does not come off.
    #[error("unmount {}", path.display())]
    Unmount {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: davit_sys::mount::Error,
    },
    /// What it says about its shim makes no sense.
    #[error("{} names no shim", path.display())]
    Address {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: StartResultError,
    },
}

impl Coded for BundleError {
    fn code(&self) -> ErrorCode {
        match self {
            BundleError::Exists { .. } => ErrorCode::AlreadyExists,
            BundleError::Spec { .. } => ErrorCode::InvalidArgument,
            BundleError::Io { .. } | BundleError::Unmount { .. } | BundleError::Address { .. } => {
                ErrorCode::Unknown
            }
        }
    }
}

/// One bundle, whether or not it exists. The id and the namespace must be identifiers; so no path of it can
/// leave the two roots. All calls block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    namespace: String,
    id: String,
    path: PathBuf,
    work: PathBuf,
}

impl Bundle {
    /// The bundle of a container below the two roots (`…/io.containerd.runtime.v2.task`).
    pub fn new(state: &Path, root: &Path, namespace: &str, id: &str) -> Bundle {
        Bundle {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            path: state.join(namespace).join(id),
            work: root.join(namespace).join(id),
        }
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its container.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The FIFO of the shim's log.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// The journal of exits that our own shim keeps.
    pub fn journal(&self) -> PathBuf {
        self.path.join(journal::FILE_NAME)
    }

    /// The checkpoint that the container is to be restored from, if it was unpacked for it.
    pub fn checkpoint(&self) -> PathBuf {
        self.work.join("checkpoint")
    }

    /// Moves a checkpoint in, which lies among the work folders of the same namespace.
    ///
    /// # Errors
    /// It is not there, or not on the same filesystem.
    pub fn take_checkpoint(&self, folder: &Path) -> Result<(), BundleError> {
        fs::rename(folder, self.checkpoint()).map_err(|source| io_error("rename", folder, source))
    }

    fn hidden(path: &Path) -> PathBuf {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        path.with_file_name(name)
    }

    /// Makes the bundle. It is built under a hidden name, so that it is there whole or not at all.
    ///
    /// # Errors
    /// [`BundleError::Exists`], or why it could not be made; then nothing of it is there.
    pub fn create(&self, spec: Option<&[u8]>) -> Result<(), BundleError> {
        let group = spec.map(mapped_group).transpose()?.flatten();
        for path in [&self.path, &self.work] {
            let parent = path.parent().unwrap_or(path);
            make_parents(parent).map_err(|source| io_error("make", parent, source))?;
        }
        if fs::symlink_metadata(&self.path).is_ok() {
            return Err(BundleError::Exists { path: self.path.clone() });
        }
        let building = Bundle::hidden(&self.path);
        // What a daemon left that died here is of no use to anyone.
        remove_tree(&building)?;
        remove_tree(&self.work)?;
        let result = self.build(&building, spec, group);
        if result.is_err() {
            // The first error is the one to tell.
            let _ = remove_tree(&building);
            let _ = remove_tree(&self.work);
        }
        result
    }

    fn build(&self, building: &Path, spec: Option<&[u8]>, group: Option<Gid>) -> Result<(), BundleError> {
        make_folder(building, 0o700)?;
        if let Some(group) = group {
            // The mapped root must be able to pass through.
            nix::unistd::chown(building, None, Some(group))
                .map_err(|errno| io_error("change the group of", building, errno.into()))?;
            fs::set_permissions(building, Permissions::from_mode(0o710))
                .map_err(|source| io_error("change the mode of", building, source))?;
        }
        make_folder(&building.join("rootfs"), 0o711)?;
        make_folder(&self.work, 0o711)?;
        let link = building.join("work");
        std::os::unix::fs::symlink(&self.work, &link).map_err(|source| io_error("make", &link, source))?;
        if let Some(spec) = spec {
            write_new(&building.join("config.json"), spec)?;
        }
        let log = building.join("log");
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::from_bits_truncate(0o600))
            .map_err(|errno| io_error("make", &log, errno.into()))?;
        // A folder that is not empty cannot be replaced: no other bundle is harmed.
        fs::rename(building, &self.path).map_err(|source| match source.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                BundleError::Exists { path: self.path.clone() }
            }
            _ => io_error("make", &self.path, source),
        })
    }

    /// Unmounts what is mounted in it, and puts it and its work folder out of use by a rename each: from then on another
    /// bundle of the same id can be made. What is put away waits to be removed; a daemon that dies before that leaves it
    /// to the next one ([`set_aside`]). Idempotent.
    ///
    /// # Errors
    /// It is still there, or its work folder is.
    pub fn put_away(&self) -> Result<PutAway, BundleError> {
        let rootfs = self.path.join("rootfs");
        // Mostly the shim has unmounted it, and this finds nothing. (To remove the folder would tell as well, but may wait
        // for the journal of a disk.) What is mounted below comes off when what is put away is removed.
        davit_sys::mount::unmount(&rootfs, MntFlags::MNT_DETACH)
            .map_err(|source| BundleError::Unmount { path: rootfs.clone(), source })?;
        let mut away = PutAway { paths: Vec::new() };
        for path in [&self.path, &self.work] {
            away.paths.extend(out_of_use(path)?);
        }
        Ok(away)
    }

    /// Puts it away and removes that.
    ///
    /// # Errors
    /// It is still there, whole or under a name out of use, which the next daemon clears.
    pub fn delete(&self) -> Result<(), BundleError> {
        self.put_away()?.remove()
    }

    /// Remembers how to reach the shim, for the next daemon.
    ///
    /// # Errors
    /// The old file, if any, is still there then.
    pub fn write_bootstrap(&self, shim: &StartResult) -> Result<(), BundleError> {
        self.write_file("bootstrap.json", &shim.to_json())
    }

    /// How to reach the shim: `bootstrap.json`, else `address`. `None` when there is neither: no shim has
    /// said yet where it listens.
    ///
    /// # Errors
    /// The file cannot be read or understood.
    pub fn read_bootstrap(&self) -> Result<Option<StartResult>, BundleError> {
        for name in ["bootstrap.json", "address"] {
            let path = self.path.join(name);
            match self.read_file(name)? {
                // A shim of 1.6 that dies while it writes leaves an empty file.
                Some(text) if !text.is_empty() => {
                    return StartResult::parse(&text)
                        .map(Some)
                        .map_err(|source| BundleError::Address { path, source });
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Remembers the shim's binary.
    ///
    /// # Errors
    /// The old file, if any, is still there then.
    pub fn write_binary(&self, binary: &Path) -> Result<(), BundleError> {
        self.write_file("shim-binary-path", binary.as_os_str().as_encoded_bytes())
    }

    /// The shim's binary, if it was remembered.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_binary(&self) -> Result<Option<PathBuf>, BundleError> {
        Ok(self.read_file("shim-binary-path")?.and_then(|name| {
            let name = String::from_utf8(name).ok()?;
            Some(PathBuf::from(name.trim_end())).filter(|path| path.is_absolute())
        }))
    }

    /// Remembers the sandbox whose shim the container joined.
    ///
    /// # Errors
    /// The old file, if any, is still there then.
    pub fn write_sandbox(&self, sandbox: &str) -> Result<(), BundleError> {
        self.write_file("sandbox", sandbox.as_bytes())
    }

    /// The sandbox whose shim the container joined.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_sandbox(&self) -> Result<Option<String>, BundleError> {
        Ok(self.read_file("sandbox")?.map(|name| String::from_utf8_lossy(&name).trim_end().to_owned()))
    }

    /// The init process as the OCI runtime noted it; zero when there never was one.
    pub fn init_pid(&self) -> u32 {
        let text = self.read_file("init.pid").ok().flatten().unwrap_or_default();
        String::from_utf8_lossy(&text).trim().parse().unwrap_or(0)
    }

    /// The annotations of the runtime spec that say which group the container belongs to.
    ///
    /// # Errors
    /// There is a `config.json` that cannot be read.
    pub fn annotation(&self, names: &[&str]) -> Result<Option<String>, BundleError> {
        let path = self.path.join("config.json");
        let spec = match read_regular(&path, MAX_SPEC) {
            Ok(spec) => spec,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io_error("read", &path, source)),
        };
        let spec: SpecPart = serde_json::from_slice(&spec).map_err(|source| BundleError::Spec { source })?;
        let annotations = spec.annotations.unwrap_or_default();
        Ok(names.iter().find_map(|name| annotations.get(*name).cloned()))
    }

    fn write_file(&self, name: &str, content: &[u8]) -> Result<(), BundleError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!(".{name}"));
        let _ = fs::remove_file(&temporary);
        write_new(&temporary, content)?;
        fs::rename(&temporary, &path).map_err(|source| io_error("write", &path, source))
    }

    fn read_file(&self, name: &str) -> Result<Option<Vec<u8>>, BundleError> {
        let path = self.path.join(name);
        match read_regular(&path, MAX_SMALL_FILE) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(io_error("read", &path, source)),
        }
    }
}

/// Makes a folder and those above it, 0711 where they are missing: a container's mapped root passes through
/// them.
///
/// # Errors
/// The system's answer.
pub fn make_parents(path: &Path) -> io::Result<()> {
    // The mode goes through the umask; what is missing from it keeps out more, never lets in more.
    DirBuilder::new().recursive(true).mode(0o711).create(path)
}

/// Puts what an earlier daemon left in the folder of a namespace out of the way of everything that is made
/// from now on, by renaming it, and gives the new names for [`remove_stale`]: what has a hidden name (it was
/// just being made or removed), and what `keep` does not know.
///
/// # Errors
/// The folder cannot be read, or an entry not be renamed; entries before it are renamed then.
pub fn set_aside(namespace_folder: &Path, keep: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, BundleError> {
    let entries = match fs::read_dir(namespace_folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io_error("read", namespace_folder, source)),
    };
    let mut stale = Vec::new();
    let mut number = 0u64;
    for entry in entries {
        let entry = entry.map_err(|source| io_error("read", namespace_folder, source))?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| !name.starts_with('.') && keep(name)) {
            continue;
        }
        let path = entry.path();
        if name.as_encoded_bytes().starts_with(STALE.as_bytes()) {
            stale.push(path);
            continue;
        }
        let free = loop {
            let candidate = namespace_folder.join(format!("{STALE}{number}"));
            number += 1;
            if fs::symlink_metadata(&candidate).is_err() {
                break candidate;
            }
        };
        fs::rename(&path, &free).map_err(|source| io_error("rename", &path, source))?;
        stale.push(free);
    }
    Ok(stale)
}

/// A bundle that is out of use.
#[derive(Debug)]
#[must_use = "it is to be removed"]
pub struct PutAway {
    paths: Vec<PathBuf>,
}

impl PutAway {
    /// Removes it.
    ///
    /// # Errors
    /// Some of it is still there; the next daemon tries again.
    pub fn remove(self) -> Result<(), BundleError> {
        self.paths.iter().try_for_each(|path| remove_tree(path))
    }
}

/// Renames a folder to a name out of use; `None` if there is none.
fn out_of_use(path: &Path) -> Result<Option<PathBuf>, BundleError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let id = path.file_name().unwrap_or_default().to_string_lossy();
    loop {
        // Unique in this process; what an earlier one left under the same name is not replaced, for it is not empty,
        // or else nothing is lost.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let stale = path.with_file_name(format!("{STALE}{id}--{number}"));
        match fs::rename(path, &stale) {
            Ok(()) => return Ok(Some(stale)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(source) => return Err(io_error("rename", path, source)),
        }
    }
}

/// Removes what [`set_aside`] gave; unmounts what is mounted in it.
///
/// # Errors
/// It is still there; the next daemon tries again.
pub fn remove_stale(path: &Path) -> Result<(), BundleError> {
    remove_tree(path)
}

/// Removes a folder with all that is in it, but never what is mounted there.
fn remove_tree(path: &Path) -> Result<(), BundleError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io_error("remove", path, source)),
        Ok(_) => {}
    }
    let rootfs = path.join("rootfs");
    match fs::remove_dir(&rootfs) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Taken off before anything is removed; were it still mounted, its content would go with the folder.
        Err(_) => davit_sys::mount::unmount_all(&rootfs)
            .map_err(|source| BundleError::Unmount { path: rootfs.clone(), source })?,
    }
    let mut tries = REMOVALS;
    loop {
        tries -= 1;
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Somebody who has it open still puts files into it, such as criu for a daemon that has died. Once it is
            // removed he cannot any more.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries > 0 => {}
            other => return other.map_err(|source| io_error("remove", path, source)),
        }
    }
}

fn make_folder(path: &Path, mode: u32) -> Result<(), BundleError> {
    DirBuilder::new().mode(mode).create(path).map_err(|source| io_error("make", path, source))
}

fn write_new(path: &Path, content: &[u8]) -> Result<(), BundleError> {
    fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content))
        .map_err(|source| io_error("write", path, source))
}

fn io_error(operation: &'static str, path: &Path, source: io::Error) -> BundleError {
    BundleError::Io { operation, path: path.to_owned(), source }
}

/// The few fields of a runtime spec that matter here.
#[derive(Deserialize)]
struct SpecPart {
    /// Null in documents of some Go programs.
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    linux: Option<LinuxPart>,
}

#[derive(Deserialize)]
struct LinuxPart {
    #[serde(default, rename = "gidMappings")]
    gid_mappings: Option<Vec<Mapping>>,
}

#[derive(Deserialize)]
struct Mapping {
    #[serde(default, rename = "containerID")]
    container_id: u32,
    #[serde(default, rename = "hostID")]
    host_id: u32,
}

/// The group that the container's group 0 is on the host, if that is another one.
fn mapped_group(spec: &[u8]) -> Result<Option<Gid>, BundleError> {
    let spec: SpecPart = serde_json::from_slice(spec).map_err(|source| BundleError::Spec { source })?;
    let mappings = spec.linux.and_then(|linux| linux.gid_mappings).unwrap_or_default();
    let root = mappings.into_iter().find(|mapping| mapping.container_id == 0);
    Ok(root.filter(|mapping| mapping.host_id != 0).map(|mapping| Gid::from_raw(mapping.host_id)))
}
