//! Snapshots as layers of overlayfs: each has a folder of its own changes, and a mount stacks them.
//!
//! ```text
//! <root>/snapshots/<id>/fs     the changes; with a parent, deletions are overlayfs whiteouts
//! <root>/snapshots/<id>/work   overlayfs's own, of an active snapshot
//! ```
//!
//! A view of a parent has no folder at all. Preparing takes the same time whatever the parents hold.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use davit_metadata::Db;
use davit_model::{Labels, Mount};
use davit_sys::fs::in_user_namespace;
use davit_sys::mount::{kernel_at_least, mount_all};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::folders::{self, Folders};
use crate::records::{Record, Records};
use crate::upper::{self, Top, has_option};
use crate::{Error, FileError, Info, Kind, Snapshotter, Usage, tree};

/// The name of this snapshotter.
pub const NAME: &str = "overlayfs";

/// The label under which [`Config::upperdir_label`] shows where the changes of a snapshot are.
const UPPERDIR_LABEL: &str = "containerd.io/snapshot/overlay.upperdir";

/// What can be set about this snapshotter, by the names of containerd's plugin.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// More options for every overlay mount (not for bind mounts).
    pub mount_options: Vec<String>,
    /// Answer the folder of its changes as a label of each snapshot.
    pub upperdir_label: bool,
}

/// The overlayfs snapshotter.
pub struct Overlayfs {
    root: PathBuf,
    folders: Folders,
    records: Records,
    options: Vec<String>,
    upperdir_label: bool,
    /// Overlayfs takes idmapped lower layers here.
    remaps_ids: bool,
    /// Whiteouts can be made without a parent to hide something of.
    rebases: bool,
}

impl Overlayfs {
    /// Opens the snapshotter that keeps its folders in `root` and its records in `db`. A trial mount shows whether
    /// overlayfs works here, with the configured options.
    ///
    /// What a crash of the machine has kept from the disk is made again where it was empty anyway; what cannot be
    /// made again is logged, and shows up as [`Error::FilesMissing`] where it is needed.
    ///
    /// # Errors
    /// [`Error::Root`] and [`Error::Overlay`] when this cannot work; [`Error::Version`], [`Error::Corrupt`].
    pub fn open(root: &Path, db: Db, config: Config) -> Result<Overlayfs, Error> {
        let folders = Folders::open(root, tree::remove)?;
        let options = try_overlay(root, &config)?;
        let ids = folders.ids()?;
        let records = Records::open(db, NAME, ids.last().copied().unwrap_or(0))?;
        let nested = in_user_namespace().map_err(FileError::at("read", "/proc/self/uid_map"))?;
        let overlayfs = Overlayfs {
            root: root.to_owned(),
            folders,
            records,
            options,
            upperdir_label: config.upperdir_label,
            remaps_ids: kernel_at_least(5, 19),
            // A whiteout is a device node, which a user namespace must not make.
            rebases: !nested,
        };
        for (key, record) in overlayfs.records.all()? {
            overlayfs.restore(&key, &record, ids.contains(&record.id));
        }
        Ok(overlayfs)
    }

    /// Makes the folders of an active snapshot again if they are missing: its record can be on disk before them,
    /// and nothing was written to it that anybody was promised.
    fn restore(&self, key: &str, record: &Record, present: bool) {
        let complete = match record.kind {
            Kind::Committed => {
                if !present {
                    tracing::error!(snapshot.key = key, "files of a committed snapshot are missing");
                }
                return;
            }
            Kind::View => !record.parents.is_empty() || self.upper(record.id).is_dir(),
            Kind::Active => self.upper(record.id).is_dir() && self.work(record.id).is_dir(),
        };
        if complete {
            return;
        }
        tracing::warn!(snapshot.key = key, "folders of a snapshot are missing after a crash, made again");
        let made = || -> Result<(), Error> {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(self.folders.of(record.id))
                .map_err(FileError::at("create folder", self.folders.of(record.id)))?;
            self.fill(key, record.id, record.kind, &record.parents, &record.labels)
        };
        if let Err(error) = made() {
            tracing::error!(
                snapshot.key = key,
                error = davit_model::error::chain(&error),
                "snapshot is lost"
            );
        }
    }

    fn upper(&self, id: u64) -> PathBuf {
        self.folders.of(id).join("fs")
    }

    fn work(&self, id: u64) -> PathBuf {
        self.folders.of(id).join("work")
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
        let parent =
            parents.first().map(|parent| folders::metadata(key, &self.upper(*parent))).transpose()?;
        upper::fill(key, &self.folders.of(id), kind, parent.map(|parent| Top::of(&parent)), labels)
    }

    fn mounts_of(&self, record: &Record) -> Vec<Mount> {
        let mapping = if self.remaps_ids { upper::mapping_options(&record.labels) } else { Vec::new() };
        let upper = |id: u64| self.upper(id).display().to_string();
        let bind = |id: u64, mode: &str, mut options: Vec<String>| {
            options.extend([mode.to_owned(), "rbind".to_owned()]);
            vec![Mount { kind: "bind".to_owned(), source: upper(id), target: String::new(), options }]
        };
        match (record.kind, record.parents.as_slice()) {
            // The folder belongs to the mapped root already; a mapping would shift it twice.
            (Kind::View, []) => bind(record.id, "ro", Vec::new()),
            (_, []) => bind(record.id, "rw", Vec::new()),
            (Kind::View, [parent]) => bind(*parent, "ro", mapping),
            (kind, parents) => {
                let mut options = mapping;
                if kind == Kind::Active {
                    options.push(format!("workdir={}", self.work(record.id).display()));
                    options.push(format!("upperdir={}", upper(record.id)));
                }
                let lower: Vec<String> = parents.iter().map(|id| upper(*id)).collect();
                options.push(format!("lowerdir={}", lower.join(":")));
                options.extend(self.options.iter().cloned());
                vec![Mount {
                    kind: "overlay".to_owned(),
                    source: "overlay".to_owned(),
                    target: String::new(),
                    options,
                }]
            }
        }
    }

    fn info(&self, key: &str, mut record: Record) -> Info {
        if self.upperdir_label {
            let upper = self.upper(record.id).display().to_string();
            record.labels.insert(UPPERDIR_LABEL.to_owned(), upper);
        }
        record.into_info(key)
    }

    /// Gives the top folder of a layer that was made without a parent the looks that it would have got from it.
    fn adopt_top(&self, key: &str, id: u64, parent: &str) -> Result<(), Error> {
        let upper = self.upper(id);
        let parent = self.records.get(parent)?;
        if Top::of(&folders::metadata(key, &upper)?) == Top::NEW {
            Top::of(&folders::metadata(key, &self.upper(parent.id))?).set(&upper)?;
        }
        Ok(())
    }
}

impl Snapshotter for Overlayfs {
    fn stat(&self, key: &str) -> Result<Info, Error> {
        Ok(self.info(key, self.records.get(key)?))
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error> {
        Ok(self.info(name, self.records.update(name, labels, fields)?))
    }

    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active => Ok(tree::usage(&self.upper(record.id))?),
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
        let record = self.records.check_commit(name, key, parent)?;
        if let (None, Some(parent)) = (&record.parent, parent) {
            if !self.rebases {
                return Err(Error::RebaseUnsupported { snapshotter: NAME, key: key.to_owned() });
            }
            self.adopt_top(key, record.id, parent)?;
        }
        let usage = tree::usage(&self.upper(record.id))?;
        self.folders.sync()?;
        self.records.commit(record.id, name, key, labels, parent, usage)
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        self.records.remove(key)
    }

    fn list(&self) -> Result<Vec<Info>, Error> {
        Ok(self.records.all()?.into_iter().map(|(key, record)| self.info(&key, record)).collect())
    }

    fn cleanup(&self) -> Result<(), Error> {
        self.folders.clean(&self.records)
    }

    fn capabilities(&self) -> Vec<String> {
        let mut capabilities = Vec::new();
        if self.remaps_ids {
            capabilities.push("remap-ids".to_owned());
        }
        // Owners are never changed file by file.
        capabilities.push("only-remap-ids".to_owned());
        if self.rebases {
            capabilities.push("rebase".to_owned());
        }
        capabilities
    }

    fn exports(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("root".to_owned(), self.root.display().to_string())])
    }
}

/// Mounts and unmounts a small overlay in `root`; answers the options that every overlay there is to have.
fn try_overlay(root: &Path, config: &Config) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Overlay { root: root.to_owned(), source };
    upper::try_mounts(root, &["1", "2", "upper", "work"], failed, |trial| try_overlay_in(root, trial, config))
}

fn try_overlay_in(root: &Path, trial: &Path, config: &Config) -> Result<Vec<String>, Error> {
    let mut options = config.mount_options.clone();
    let nested = in_user_namespace().map_err(FileError::at("read", "/proc/self/uid_map"))?;
    let on_tmpfs = statfs(root).map_err(FileError::at("statfs", root))?.filesystem_type() == TMPFS_MAGIC;
    // A user namespace cannot set the attributes of the trusted class. tmpfs has no others.
    if nested && !on_tmpfs && !has_option(&options, "userxattr") {
        options.push("userxattr".to_owned());
    }
    let path = |name: &str| trial.join(name).display().to_string();
    let mut trial_options = vec![
        format!("workdir={}", path("work")),
        format!("upperdir={}", path("upper")),
        format!("lowerdir={}:{}", path("1"), path("2")),
    ];
    trial_options.extend(options.iter().cloned());
    let overlay = |options: Vec<String>| Mount {
        kind: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options,
    };
    // Unmounting an overlay syncs the whole filesystem below it, unless it is volatile (Linux 5.10).
    let volatile = [trial_options.as_slice(), &["volatile".to_owned()]].concat();
    let merged = trial.join("merged");
    mount_all(&[overlay(volatile)], &merged)
        .or_else(|_| mount_all(&[overlay(trial_options)], &merged))
        .map_err(|source| Error::Overlay { root: root.to_owned(), source })?;
    Ok(upper::without_index(options))
}
