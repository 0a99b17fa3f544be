//! What the snapshotters share that stack by overlayfs: the writable folders of a snapshot, which are its changes, `fs`, and
//! overlayfs's own, `work`; and the trial of whether overlayfs works.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use davit_model::Labels;
use davit_sys::mount::{Error as MountError, unmount_all};

use crate::{Error, FileError, GID_MAPPING_LABEL, Kind, UID_MAPPING_LABEL, tree};

/// The mode of the top folder of a snapshot without parent, and of the changes of a rebased one until then.
const TOP_MODE: u32 = 0o755;

/// What a snapshot's top folder looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Top {
    pub(crate) user: u32,
    pub(crate) group: u32,
    pub(crate) mode: u32,
}

impl Top {
    pub(crate) const NEW: Top = Top { user: 0, group: 0, mode: TOP_MODE };

    pub(crate) fn of(metadata: &fs::Metadata) -> Top {
        Top { user: metadata.uid(), group: metadata.gid(), mode: metadata.mode() & 0o7777 }
    }

    pub(crate) fn set(self, path: &Path) -> Result<(), FileError> {
        chown(path, Some(self.user), Some(self.group)).map_err(FileError::at("chown", path))?;
        // The umask has its part in making a folder, and a change of owner can clear bits.
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode)).map_err(FileError::at("chmod", path))
    }
}

/// Makes what belongs into the folder of a snapshot and is not there. `below` is what the parent's top looks like.
pub(crate) fn fill(
    key: &str,
    folder: &Path,
    kind: Kind,
    below: Option<Top>,
    labels: &Labels,
) -> Result<(), Error> {
    let mut top = below.unwrap_or(Top::NEW);
    if let Some((user, group)) = mapped_root(key, labels)? {
        (top.user, top.group) = (user, group);
    }
    let upper = folder.join("fs");
    make_folder(&upper)?;
    top.set(&upper)?;
    if kind == Kind::Active {
        make_folder(&folder.join("work"))?;
    }
    Ok(())
}

/// Has `body` mount something on `merged` in a folder `trial` of `root`, which holds empty folders of these names as well, and
/// leaves nothing of it. Overlays have to work there.
///
/// # Errors
/// [`Error::Root`] where they cannot; those of `body`; `failed` of what cannot be unmounted.
pub(crate) fn try_mounts<T>(
    root: &Path,
    names: &[&str],
    failed: impl Fn(MountError) -> Error,
    body: impl FnOnce(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let trial = root.join("trial");
    let merged = trial.join("merged");
    // Left by a daemon that died right here.
    unmount_all(&merged).map_err(&failed)?;
    tree::remove(&trial)?;
    for name in names.iter().chain(&["merged"]) {
        let path = trial.join(name);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(FileError::at("create folder", &path))?;
    }
    let result = check_types(root, &trial).and_then(|()| body(&trial));
    let unmounted = unmount_all(&merged);
    let removed = tree::remove(&trial);
    let result = result?;
    unmounted.map_err(failed)?;
    removed?;
    Ok(result)
}

fn check_types(root: &Path, trial: &Path) -> Result<(), Error> {
    if tree::tells_types(trial)? {
        return Ok(());
    }
    let reason = "its filesystem does not tell file types (d_type), which overlayfs needs; xfs has to be made \
                  with ftype=1";
    Err(Error::Root { root: root.to_owned(), reason })
}

/// Whether options of a mount have one of this name.
pub(crate) fn has_option(options: &[String], name: &str) -> bool {
    options.iter().any(|option| option.split('=').next() == Some(name))
}

/// Turns the index of overlays off, unless the options say something about it. It would refuse an upper folder that another
/// overlay has used, such as a restored one. The module has to be loaded.
pub(crate) fn without_index(mut options: Vec<String>) -> Vec<String> {
    if !has_option(&options, "index") && Path::new("/sys/module/overlay/parameters/index").exists() {
        options.push("index=off".to_owned());
    }
    options
}

/// The options by which an overlay maps ids, if the labels map them.
pub(crate) fn mapping_options(labels: &Labels) -> Vec<String> {
    match (labels.get(UID_MAPPING_LABEL), labels.get(GID_MAPPING_LABEL)) {
        (Some(users), Some(groups)) => vec![format!("uidmap={users}"), format!("gidmap={groups}")],
        _ => Vec::new(),
    }
}

/// Makes a folder for root only, unless it is there.
fn make_folder(path: &Path) -> Result<(), FileError> {
    match fs::DirBuilder::new().mode(0o711).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(FileError::at("create folder", path)(error))
        }
        _ => Ok(()),
    }
}

/// The host's ids of root, when the labels map ids; both kinds have to be mapped.
pub(crate) fn mapped_root(key: &str, labels: &Labels) -> Result<Option<(u32, u32)>, Error> {
    let text = |label: &str| labels.get(label).filter(|text| !text.is_empty());
    let (users, groups) = match (text(UID_MAPPING_LABEL), text(GID_MAPPING_LABEL)) {
        (None, None) => return Ok(None),
        (users, groups) => (users.map_or("", String::as_str), groups.map_or("", String::as_str)),
    };
    let root = |mapping: &str| {
        mapping_of_zero(mapping)
            .ok_or_else(|| Error::Mapping { key: key.to_owned(), mapping: mapping.to_owned() })
    };
    Ok(Some((root(users)?, root(groups)?)))
}

/// What a mapping `container:host:length[,…]` has for 0; `None` if it has nothing or is none.
fn mapping_of_zero(mapping: &str) -> Option<u32> {
    let mut zero = None;
    for range in mapping.split(',') {
        let numbers: Option<Vec<u32>> = range.split(':').map(|number| number.parse().ok()).collect();
        let [container, host, length] = numbers?[..] else { return None };
        host.checked_add(length)?;
        if container == 0 && length > 0 {
            zero = Some(host);
        }
    }
    zero
}
