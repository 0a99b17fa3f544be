//! The mounts that the daemon holds for its clients: where they are made, and how.
//!
//! A client activates a list of mounts under a name. What cannot be left to the client is carried out here, one mount
//! on a folder of its own below `<state>/io.containerd.mount-manager.v1.bolt/t`; the rest is given back as *system*
//! mounts, for the client or a runtime to carry out. What is carried out:
//!
//! * with `temporary`, everything; the one system mount is then a bind mount of the last;
//! * what stands before a mount whose type begins with a transformation, `format/`, `mkdir/` or `mkfs/`
//!   (`transform`): that one refers to the mounts before it, and is given back transformed.
//!
//! A shim may say that it carries out some types of mounts itself; those are left to it as they are.
//!
//! A list of which nothing is to be done is refused as not implemented: its mounts can be carried out as they are. (The rules
//! are those of containerd 2.3, `core/mount/manager`. Its only other handler is of erofs images: here such a one is mounted as
//! any other where a list is made of it, and by the client where it stands alone.)
//!
//! Names, labels and leases are kept by [`crate::metadata`], which calls this from a thread that may block.

mod transform;

use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use davit_model::{Coded, ErrorCode, Mount};
use davit_sys::mount::{mount_all, mount_points, unmount_all};

pub use transform::TransformError;

/// Why mounts could not be activated or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Nothing in the list is for the daemon to do.
    #[error("not implemented")]
    Nothing,
    /// A mount cannot be transformed.
    #[error(transparent)]
    Transform(#[from] TransformError),
    /// The kernel, or our reading of the options, refused a mount.
    #[error("mount failed {kind} {from}")]
    Mount {
        /// The type of the mount.
        kind: String,
        /// Its source.
        from: String,
        /// Why.
        source: davit_sys::mount::Error,
    },
    /// A mount does not come off.
    #[error("failure unmounting {}", path.display())]
    Unmount {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: davit_sys::mount::Error,
    },
    /// What is mounted is not known.
    #[error("cannot see what is mounted")]
    Table {
        /// Why not.
        source: davit_sys::mount::Error,
    },
    /// A folder cannot be made, read or removed.
    #[error("cannot {action} {}", path.display())]
    Folder {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Coded for MountError {
    fn code(&self) -> ErrorCode {
        match self {
            MountError::Nothing => ErrorCode::Unimplemented,
            MountError::Transform(error) => error.code(),
            MountError::Mount { source, .. }
            | MountError::Unmount { source, .. }
            | MountError::Table { source } => source.code(),
            MountError::Folder { .. } => ErrorCode::Unknown,
        }
    }
}

fn folder_error<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> MountError + 'a {
    move |source| MountError::Folder { action, path: path.to_owned(), source }
}

/// Removes an empty folder, unless somebody else has: whoever deactivates and the collector may do so at once.
fn remove_folder(path: &Path) -> Result<(), MountError> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(folder_error("remove", path)),
    }
}

/// A mount that the daemon has carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveMount {
    /// The mount, transformed.
    pub mount: Mount,
    /// When.
    pub at: SystemTime,
    /// Where.
    pub point: PathBuf,
}

/// What is to be done with a list of mounts.
#[derive(Debug, PartialEq)]
pub struct Plan {
    mounts: Vec<Mount>,
    /// The first mount that is given back. What comes after it is not touched.
    first_system: usize,
    temporary: bool,
}

impl Plan {
    /// Whether anything of `mounts` is to be done for a user that carries out the types in `accepted` itself (`KIND`, or
    /// `TRANSFORMATION/*`).
    pub fn is_needed(mounts: &[Mount], accepted: &[String]) -> bool {
        mounts.iter().any(|mount| transform::is_needed(mount, accepted))
    }

    /// Decides what of `mounts` is to be done; `accepted` as in [`Plan::is_needed`].
    ///
    /// # Errors
    /// [`MountError::Nothing`].
    pub fn new(mounts: Vec<Mount>, temporary: bool, accepted: &[String]) -> Result<Plan, MountError> {
        let first_system = if temporary {
            mounts.len()
        } else {
            let last = mounts.iter().rposition(|mount| transform::is_needed(mount, accepted));
            last.ok_or(MountError::Nothing)?
        };
        if mounts.is_empty() {
            return Err(MountError::Nothing);
        }
        Ok(Plan { mounts, first_system, temporary })
    }
}

/// The folder in which mounts are made, one below it for each activation, by number.
#[derive(Debug, Clone)]
pub struct Targets {
    folder: PathBuf,
    /// The folders in which transformations may make something.
    roots: [PathBuf; 2],
}

impl Targets {
    /// The targets in `folder`, which is made if missing. Transformations may write there and below `root`.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(folder: &Path, root: &Path) -> io::Result<Targets> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        Ok(Targets { folder: folder.to_owned(), roots: [folder.to_owned(), root.to_owned()] })
    }

    fn target(&self, number: u64) -> PathBuf {
        self.folder.join(number.to_string())
    }

    /// Carries out a plan; gives the mounts that are active now, and those that are left to the client. A number is used
    /// once.
    ///
    /// # Errors
    /// Nothing is mounted then.
    pub fn activate(&self, number: u64, plan: Plan) -> Result<(Vec<ActiveMount>, Vec<Mount>), MountError> {
        let target = self.target(number);
        DirBuilder::new().mode(0o700).create(&target).map_err(folder_error("make", &target))?;
        self.carry_out(&target, plan).inspect_err(|_| {
            if let Err(error) = self.remove(number) {
                let error = davit_model::error::chain(&error);
                tracing::warn!(error, "cannot undo mounts that failed");
            }
        })
    }

    fn carry_out(&self, target: &Path, plan: Plan) -> Result<(Vec<ActiveMount>, Vec<Mount>), MountError> {
        let Plan { mounts, first_system, temporary } = plan;
        let (mut active, mut system) = (Vec::new(), Vec::new());
        for (index, mut mount) in mounts.into_iter().enumerate() {
            if index <= first_system {
                let transforms;
                (transforms, mount) = transform::split(mount);
                for transform in transforms {
                    transform.apply(&mut mount, &active, &self.roots)?;
                }
            }
            if index >= first_system {
                system.push(mount);
                continue;
            }
            let point = target.join(index.to_string());
            DirBuilder::new().mode(0o700).create(&point).map_err(folder_error("make", &point))?;
            mount_all(std::slice::from_ref(&mount), &point).map_err(|source| MountError::Mount {
                kind: mount.kind.clone(),
                from: mount.source.clone(),
                source,
            })?;
            active.push(ActiveMount { mount, at: SystemTime::now(), point });
        }
        if temporary && let Some(last) = active.last() {
            system.push(Mount {
                kind: "bind".into(),
                source: last.point.display().to_string(),
                target: String::new(),
                options: vec!["rbind".into()],
            });
        }
        Ok((active, system))
    }

    /// Takes the mounts of an activation away, the last first, and its folder. One that is not there is no error. What is
    /// in a mount is never touched: a folder that does not come free stays.
    ///
    /// # Errors
    /// The first that does not come off; those after it are still tried.
    pub fn remove(&self, number: u64) -> Result<(), MountError> {
        let target = self.target(number);
        let entries = match fs::read_dir(&target) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(folder_error("read", &target)(error)),
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<usize>().ok());
        let mut points: Vec<usize> = names.collect();
        points.sort_unstable();
        let mut outcome = Ok(());
        for index in points.into_iter().rev() {
            let point = target.join(index.to_string());
            let removed = unmount_all(&point)
                .map_err(|source| MountError::Unmount { path: point.clone(), source })
                .and_then(|()| remove_folder(&point));
            outcome = outcome.and(removed);
        }
        outcome?;
        remove_folder(&target)
    }

    /// The numbers of the activations of which something is there.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn numbers(&self) -> Result<Vec<u64>, MountError> {
        let entries = fs::read_dir(&self.folder).map_err(folder_error("read", &self.folder))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    /// Where this process sees anything mounted.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn mount_points() -> Result<HashSet<PathBuf>, MountError> {
        let points = mount_points().map_err(|source| MountError::Table { source })?;
        Ok(points.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str) -> Mount {
        Mount { kind: kind.into(), source: "s".into(), target: String::new(), options: Vec::new() }
    }

    fn plan(kinds: &[&str], temporary: bool) -> Option<usize> {
        let mounts = kinds.iter().map(|kind| mount(kind)).collect();
        Plan::new(mounts, temporary, &[]).ok().map(|plan| plan.first_system)
    }

    #[test]
    fn what_a_shim_accepts_is_left_to_it() {
        let mounts: Vec<_> = ["bind", "format/overlay", "format/mkdir/overlay"].map(mount).to_vec();
        let plan = |accepted: &[&str]| {
            let accepted: Vec<_> = accepted.iter().map(|&kind| kind.to_owned()).collect();
            let plan = Plan::new(mounts.clone(), false, &accepted).ok();
            assert_eq!(plan.is_some(), Plan::is_needed(&mounts, &accepted));
            plan.map(|plan| plan.first_system)
        };
        assert_eq!(plan(&["overlay", "mkfs/*", "form"]), Some(2));
        assert_eq!(plan(&["format/*"]), Some(2), "it has other folders made");
        assert_eq!(plan(&["format/mkdir/overlay"]), Some(1));
        assert_eq!(plan(&["format/*", "mkdir/*"]), None);
        assert_eq!(plan(&["format/mkdir/overlay", "format/overlay"]), None);
    }

    #[test]
    fn only_what_a_client_cannot_do_is_done() {
        assert_eq!(plan(&["bind"], false), None);
        assert_eq!(plan(&["bind", "overlay"], false), None);
        assert_eq!(plan(&[], true), None);
        // An unknown word before a slash is part of the type.
        assert_eq!(plan(&["fancy/overlay"], false), None);
        assert_eq!(plan(&["bind", "format/overlay"], false), Some(1));
        assert_eq!(plan(&["bind", "format/mkdir/overlay", "bind"], false), Some(1));
        assert_eq!(plan(&["format/bind", "format/overlay"], false), Some(1));
        assert_eq!(plan(&["format/overlay"], false), Some(0));
        assert_eq!(plan(&["bind", "overlay"], true), Some(2));
    }
}
