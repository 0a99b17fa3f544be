//! Snapshots as erofs images: a committed one is a file that holds its changes as a read-only filesystem, and a mount stacks
//! those files by overlayfs. An image is one file to sync, to delete and to protect, where overlayfs has thousands.
//!
//! ```text
//! <root>/snapshots/<id>/fs            the changes of an active snapshot
//! <root>/snapshots/<id>/work          overlayfs's own, of an active snapshot
//! <root>/snapshots/<id>/.erofslayer   says that `fs` becomes an image, as containerd's snapshotter says it
//! <root>/snapshots/<id>/layer.applied a layer that was applied to an active snapshot as an image (`layer::apply_alone`);
//!                                     it lies below the changes, of which there are none when it is committed
//! <root>/snapshots/<id>/layer.erofs   the image of a committed snapshot
//! ```
//!
//! ```text
//!             commit: image written to layer.new ──► synced ──► renamed ──► record ──► fs and work deleted
//!   active ──────────────────────────────────────────────────────────────────────────────────────────────► committed
//! ```
//!
//! A crash before the record leaves an active snapshot with all that it had, and the image is made anew; a crash behind it
//! leaves folders that the next start deletes.
//!
//! The mounts handed out are those of containerd 2.3: one of the type `erofs` for each layer with the option `loop`, which
//! Linux 6.12 and later do without, and an overlay of the type `format/mkdir/overlay` that refers to them. The images are
//! written here (`image`): the `mkfs.erofs` of a stable distribution may be too old for what containerd has it do, and
//! no program has to be there that another release changes.

mod collect;
pub(crate) mod image;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use davit_metadata::Db;
use davit_model::{Labels, Mount};
use davit_sys::fs::set_immutable;
use davit_sys::mount::{kernel_at_least, mount_all};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;

use crate::folders::{self, Folders};
use crate::native::bind;
use crate::records::{Record, Records};
use crate::upper::{self, Top};
use crate::{Error, FileError, Info, Kind, Snapshotter, Usage, tree};

/// The name of this snapshotter.
pub const NAME: &str = "erofs";

/// The file that marks the folder of an active snapshot.
pub(crate) const MARK: &str = ".erofslayer";

const IMAGE: &str = "layer.erofs";
const APPLIED: &str = "layer.applied";

/// True when a layer was applied to the snapshot in `folder` as an image.
pub(crate) fn has_applied(folder: &Path) -> bool {
    folder.join(APPLIED).exists()
}

/// A layer being applied as an image. Unless it is finished there is none.
pub(crate) struct Applied<'a> {
    folder: &'a Path,
    new: PathBuf,
    file: File,
}

impl Applied<'_> {
    /// Begins one for the snapshot in `folder`.
    pub(crate) fn begin(folder: &Path) -> io::Result<Applied<'_>> {
        let new = folder.join("layer.applying");
        // A daemon that was killed may have left one; whoever is at it now loses it, and fails at the end: his file has no name
        // by which it could be linked to.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
        Ok(Applied { folder, new, file })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Has the image on disk under its name.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        // This very file, and not what another one who is at it has there by now.
        let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let applied = self.folder.join(APPLIED);
        linkat(AT_FDCWD, file.as_str(), AT_FDCWD, &applied, AtFlags::AT_SYMLINK_FOLLOW)?;
        File::open(self.folder)?.sync_all()
    }
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        // Finished, it has another name as well.
        let _ = fs::remove_file(&self.new);
    }
}

/// What can be set about this snapshotter, by the names of containerd's plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// More options for every overlay mount.
    pub ovl_mount_options: Vec<String>,
    /// Make images immutable (`FS_IMMUTABLE_FL`, ioctl_iflags(2)), so that not even root changes or deletes one by mistake.
    pub set_immutable: bool,
}

/// The erofs snapshotter.
pub struct Erofs {
    root: PathBuf,
    folders: Folders,
    records: Records,
    options: Vec<String>,
    set_immutable: bool,
    remaps_ids: bool,
    /// Held while a snapshot is committed, by its id: of two commits of one snapshot the second must not make an image of
    /// what the first has already deleted.
    committing: [Mutex<()>; 16],
}

impl Erofs {
    /// Opens the snapshotter that keeps its images in `root` and its records in `db`. A trial mount shows whether erofs and
    /// overlayfs work here, with the configured options.
    ///
    /// # Errors
    /// [`Error::NoErofs`] where the kernel has none; [`Error::Root`] and [`Error::Erofs`] when this cannot work;
    /// [`Error::Version`], [`Error::Corrupt`].
    pub fn open(root: &Path, db: Db, config: Config) -> Result<Erofs, Error> {
        let folders = Folders::open(root, delete)?;
        let options = try_mounts(root, &config)?;
        let ids = folders.ids()?;
        let records = Records::open(db, NAME, ids.last().copied().unwrap_or(0))?;
        let erofs = Erofs {
            root: root.to_owned(),
            folders,
            records,
            options,
            set_immutable: config.set_immutable,
            remaps_ids: kernel_at_least(5, 19),
            committing: Default::default(),
        };
        for (key, record) in erofs.records.all()? {
            if let Err(error) = erofs.restore(&key, &record) {
                let error = davit_model::error::chain(&error);
                tracing::error!(snapshot.key = key, error, "snapshot is lost");
            }
        }
        Ok(erofs)
    }

    /// Makes the folders of an active snapshot again if they are missing: its record can be on disk before them, and nothing
    /// was written to it that anybody was promised. Deletes what a commit had no time to.
    fn restore(&self, key: &str, record: &Record) -> Result<(), Error> {
        let folder = self.folders.of(record.id);
        match record.kind {
            Kind::Committed => {
                folders::metadata(key, &self.image(record.id))?;
                self.delete_changes(record.id)?;
                Ok(())
            }
            Kind::View if !record.parents.is_empty() => Ok(()),
            Kind::View | Kind::Active => {
                match fs::DirBuilder::new().mode(0o700).create(&folder) {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                    result => {
                        result.map_err(FileError::at("create folder", &folder))?;
                        tracing::warn!(
                            snapshot.key = key,
                            "folders of a snapshot are missing after a crash, made again"
                        );
                    }
                }
                if !self.upper(record.id).is_dir()
                    || (record.kind == Kind::Active && !folder.join("work").is_dir())
                {
                    self.fill(key, record.id, record.kind, &record.parents, &record.labels)?;
                }
                Ok(())
            }
        }
    }

    fn upper(&self, id: u64) -> PathBuf {
        self.folders.of(id).join("fs")
    }

    fn image(&self, id: u64) -> PathBuf {
        self.folders.of(id).join(IMAGE)
    }

    fn delete_changes(&self, id: u64) -> Result<(), FileError> {
        remove_file(&self.folders.of(id).join(APPLIED))?;
        tree::remove(&self.upper(id))?;
        tree::remove(&self.folders.of(id).join("work"))
    }

    fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<Vec<Mount>, Error> {
        let draft = self.records.draft(kind, key, parent)?;
        // Checked even where no folder needs it, so that a bad label is refused at once.
        upper::mapped_root(key, labels)?;
        let record = self.folders.create(&self.records, draft, key, parent, labels, |making, draft| {
            making.make_folder()?;
            self.fill(key, draft.id, kind, &draft.parents, labels)
        })?;
        Ok(self.mounts_of(&record))
    }

    /// Makes what belongs into the folder of a snapshot and is not there.
    fn fill(&self, key: &str, id: u64, kind: Kind, parents: &[u64], labels: &Labels) -> Result<(), Error> {
        let below = parents.first().map(|parent| self.top_of(key, *parent)).transpose()?;
        let folder = self.folders.of(id);
        upper::fill(key, &folder, kind, below, labels)?;
        if kind == Kind::Active {
            let mark = folder.join(MARK);
            File::create(&mark).map_err(FileError::at("create", &mark))?;
        }
        Ok(())
    }

    /// What the top folder of a committed snapshot looks like.
    fn top_of(&self, key: &str, id: u64) -> Result<Top, Error> {
        let path = self.image(id);
        folders::metadata(key, &path)?;
        let top = File::open(&path).and_then(|file| image::top_of(&file));
        let (mode, user, group) = top.map_err(FileError::at("read", &path))?;
        Ok(Top { user, group, mode })
    }

    fn mounts_of(&self, record: &Record) -> Vec<Mount> {
        let layer = |image: &PathBuf| Mount {
            kind: "erofs".to_owned(),
            source: image.display().to_string(),
            target: String::new(),
            options: vec!["ro".to_owned(), "loop".to_owned()],
        };
        let active = record.kind == Kind::Active;
        let folder = self.folders.of(record.id);
        let applied = (active && has_applied(&folder)).then(|| folder.join(APPLIED));
        let parents = record.parents.iter().map(|parent| self.image(*parent));
        let images: Vec<PathBuf> = applied.into_iter().chain(parents).collect();
        match images.as_slice() {
            // The folder belongs to the mapped root already; a mapping would shift it twice.
            [] => vec![bind(&self.upper(record.id), !active)],
            [image] if !active => vec![layer(image)],
            images => {
                let mut options = Vec::new();
                if active {
                    options.push(format!("workdir={}", folder.join("work").display()));
                    options.push(format!("upperdir={}", folder.join("fs").display()));
                }
                if self.remaps_ids {
                    options.extend(upper::mapping_options(&record.labels));
                }
                options.push(match images.len() {
                    1 => "lowerdir={{ mount 0 }}".to_owned(),
                    count => format!("lowerdir={{{{ overlay 0 {} }}}}", count - 1),
                });
                options.extend(self.options.iter().cloned());
                let mut mounts: Vec<Mount> = images.iter().map(layer).collect();
                mounts.push(Mount {
                    kind: "format/mkdir/overlay".to_owned(),
                    source: "overlay".to_owned(),
                    target: String::new(),
                    options,
                });
                mounts
            }
        }
    }

    /// Gives the top folder of a layer that was made without a parent the looks that it would have got from it.
    fn adopt_top(&self, key: &str, id: u64, parent: &str) -> Result<(), Error> {
        let upper = self.upper(id);
        let parent = self.records.get(parent)?;
        if Top::of(&folders::metadata(key, &upper)?) == Top::NEW {
            self.top_of(key, parent.id)?.set(&upper)?;
        }
        Ok(())
    }

    /// Makes the image of what a snapshot has changed, on disk under its name when this returns.
    fn write_image(&self, key: &str, id: u64) -> Result<Usage, Error> {
        let (upper, path, folder) = (self.upper(id), self.image(id), self.folders.of(id));
        folders::metadata(key, &upper)?;
        let new = folder.join("layer.new");
        // Of a commit that failed or that a crash has cut off.
        remove_file(&new)?;
        remove_file(&path)?;
        let file = if has_applied(&folder) {
            if fs::read_dir(&upper).map_err(FileError::at("read folder", &upper))?.next().is_some() {
                return Err(Error::ChangesOverLayer { key: key.to_owned() });
            }
            // Under both names, so that it is there for a second try.
            let applied = folder.join(APPLIED);
            fs::hard_link(&applied, &path).map_err(FileError::at("link", &applied))?;
            File::open(&path).map_err(FileError::at("open", &path))?
        } else {
            let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&new);
            let file = file.map_err(FileError::at("create", &new))?;
            let written = collect::write_image(&upper, &file)
                .and_then(|()| file.sync_all().map_err(FileError::at("fsync", &new)))
                .and_then(|()| fs::rename(&new, &path).map_err(FileError::at("rename", &new)));
            if let Err(error) = written {
                // The disk may be full, and the first error is the one to tell.
                let _ = remove_file(&new);
                return Err(error.into());
            }
            file
        };
        // The image, and the folder that it is in.
        folders::sync(&folder)?;
        folders::sync(&self.root.join("snapshots"))?;
        Ok(usage_of(&file.metadata().map_err(FileError::at("fstat", &path))?))
    }

    fn make_immutable(&self, id: u64) {
        let path = self.image(id);
        let made = File::open(&path).and_then(|file| Ok(set_immutable(file.as_fd(), true)?));
        if let Err(error) = made {
            tracing::warn!(path = %path.display(), %error, "image cannot be made immutable");
        }
    }

    fn committing(&self, id: u64) -> MutexGuard<'_, ()> {
        let lock = &self.committing[(id % self.committing.len() as u64) as usize];
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an image takes.
fn usage_of(image: &fs::Metadata) -> Usage {
    Usage { size: i64::try_from(image.blocks() * 512).unwrap_or(i64::MAX), inodes: 1 }
}

/// Deletes a file that may be immutable; none is no error.
fn remove_file(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let file = File::open(path).map_err(FileError::at("open", path))?;
            set_immutable(file.as_fd(), false).map_err(FileError::at("make mutable", path))?;
            fs::remove_file(path).map_err(FileError::at("delete", path))
        }
        result => result.map_err(FileError::at("delete", path)),
    }
}

/// Deletes the folder of a snapshot.
fn delete(folder: &Path) -> Result<(), FileError> {
    match remove_file(&folder.join(IMAGE)) {
        Err(error) if error.source.kind() != ErrorKind::IsADirectory => Err(error),
        _ => tree::remove(folder),
    }
}

impl Snapshotter for Erofs {
    fn stat(&self, key: &str) -> Result<Info, Error> {
        Ok(self.records.get(key)?.into_info(key))
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error> {
        Ok(self.records.update(name, labels, fields)?.into_info(name))
    }

    /// As with containerd, a committed snapshot takes one inode: its image.
    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active => {
                let mut usage = tree::usage(&self.upper(record.id))?;
                if let Ok(applied) = fs::metadata(self.folders.of(record.id).join(APPLIED)) {
                    let image = usage_of(&applied);
                    usage.size += image.size;
                    usage.inodes += image.inodes;
                }
                Ok(usage)
            }
            Kind::View | Kind::Committed => Ok(record.usage()),
        }
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active | Kind::View => Ok(self.mounts_of(&record)),
            Kind::Committed => Err(Error::NotMountable { key: key.to_owned() }),
        }
    }

    fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        self.create(Kind::Active, key, parent, labels)
    }

    fn view(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        self.create(Kind::View, key, parent, labels)
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels, parent: Option<&str>) -> Result<(), Error> {
        let id = self.records.check_commit(name, key, parent)?.id;
        let _one_at_a_time = self.committing(id);
        let record = self.records.check_commit(name, key, parent)?;
        if record.id != id {
            return Err(Error::NotFound { key: key.to_owned() });
        }
        if let (None, Some(parent)) = (&record.parent, parent) {
            if has_applied(&self.folders.of(id)) {
                // Its top folder is in the image already.
                return Err(Error::RebaseUnsupported { snapshotter: NAME, key: key.to_owned() });
            }
            self.adopt_top(key, id, parent)?;
        }
        let usage = self.write_image(key, id)?;
        self.records.commit(id, name, key, labels, parent, usage)?;
        if let Err(error) = self.delete_changes(id) {
            let error = davit_model::error::chain(&error);
            tracing::warn!(snapshot.name = name, error, "what an image was made of is not deleted");
        }
        if self.set_immutable {
            self.make_immutable(id);
        }
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        self.records.remove(key)
    }

    fn list(&self) -> Result<Vec<Info>, Error> {
        Ok(self.records.all()?.into_iter().map(|(key, record)| record.into_info(&key)).collect())
    }

    fn cleanup(&self) -> Result<(), Error> {
        self.folders.clean(&self.records)
    }

    fn capabilities(&self) -> Vec<String> {
        // Owners are never changed file by file.
        let mut capabilities = vec!["only-remap-ids".to_owned()];
        if self.remaps_ids {
            capabilities.push("remap-ids".to_owned());
        }
        capabilities.push("rebase".to_owned());
        capabilities
    }

    fn exports(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("root".to_owned(), self.root.display().to_string())])
    }
}

/// Mounts and unmounts an image and an overlay over it in `root`; answers the options that every overlay there is to have.
fn try_mounts(root: &Path, config: &Config) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Erofs { root: root.to_owned(), source };
    upper::try_mounts(root, &["lower", "upper", "work"], failed, |trial| try_mounts_in(root, trial, config))
}

fn try_mounts_in(root: &Path, trial: &Path, config: &Config) -> Result<Vec<String>, Error> {
    let path = trial.join(IMAGE);
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
    collect::write_image(&trial.join("lower"), &file.map_err(FileError::at("create", &path))?)?;
    let text = |name: &str| trial.join(name).display().to_string();
    let mount = |kind: &str, source: String, options: Vec<String>| Mount {
        kind: kind.to_owned(),
        source,
        target: String::new(),
        options,
    };
    let mut overlay = vec![
        format!("workdir={}", text("work")),
        format!("upperdir={}", text("upper")),
        "lowerdir={{ mount 0 }}".to_owned(),
        // Unmounting an overlay syncs the whole filesystem below it, unless it is volatile.
        "volatile".to_owned(),
    ];
    overlay.extend(config.ovl_mount_options.iter().cloned());
    let lower = mount("erofs", text(IMAGE), vec!["ro".to_owned(), "loop".to_owned()]);
    let overlay = mount("format/mkdir/overlay", "overlay".to_owned(), overlay);
    mount_all(&[lower, overlay], &trial.join("merged")).map_err(|source| match source.errno() {
        Some(Errno::ENODEV) => Error::NoErofs,
        _ => Error::Erofs { root: root.to_owned(), source },
    })?;
    Ok(upper::without_index(config.ovl_mount_options.clone()))
}

#[cfg(test)]
mod tests;
