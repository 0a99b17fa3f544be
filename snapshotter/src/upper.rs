//! The writable folders of snapshots that overlayfs stacks: the folder of changes, `fs`, and overlayfs's own, `work`.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use davit_model::Labels;

use crate::{Error, FileError, GID_MAPPING_LABEL, Kind, UID_MAPPING_LABEL};

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
