//! Snapshots: the filesystems of images and containers, as chains of changesets.
//!
//! This crate owns the [`Snapshotter`] trait, its implementations for local disks ([`overlayfs`], [`native`],
//! [`erofs`], [`btrfs`], [`blockfile`]),
//! the suite that every implementation must pass ([`testsuite`]), and layers: unpacking tar archives into
//! snapshots and making archives of the difference between two ([`layer`]).
//!
//! Everything here blocks (it mounts, copies and syncs); asynchronous callers use a blocking thread.

pub mod blockfile;
pub mod btrfs;
pub mod erofs;
mod error;
mod folders;
pub mod layer;
pub mod native;
pub mod overlayfs;
mod records;
pub mod testsuite;
mod tree;
mod upper;
mod whole;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use davit_model::{Labels, Mount};

pub use error::{Error, FileError};

/// The label with the user id mapping of a snapshot, `container:host:length[,…]`.
pub const UID_MAPPING_LABEL: &str = "containerd.io/snapshot/uidmapping";

/// The label with the group id mapping of a snapshot, `container:host:length[,…]`.
pub const GID_MAPPING_LABEL: &str = "containerd.io/snapshot/gidmapping";

/// The label with the name that a snapshot is going to be committed under. A snapshotter that can get what belongs there
/// by itself answers [`Snapshotter::prepare`] with "already exists", and has the committed snapshot, so labelled.
pub const TARGET_LABEL: &str = "containerd.io/snapshot.ref";

/// What can be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, made by [`Snapshotter::view`]; can never be committed.
    View,
    /// Writable, made by [`Snapshotter::prepare`].
    Active,
    /// Finished and immutable, made by [`Snapshotter::commit`]; the only kind that can be a parent.
    Committed,
}

impl Kind {
    /// The word that filters compare with (`kind==active`).
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// What is recorded of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// What can be done with it.
    pub kind: Kind,
    /// Its key (active, view) or name (committed); both live in one space of names.
    pub name: String,
    /// The name of the committed snapshot below it; `None` when it starts empty.
    pub parent: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// When it was made; a commit counts as making the committed snapshot.
    pub created: SystemTime,
    /// When its labels were last changed; equal to `created` before the first change.
    pub updated: SystemTime,
}

impl Info {
    /// Whether this is the committed snapshot that was announced as `target`, on this parent.
    pub fn is_target(&self, target: &str, parent: Option<&str>) -> bool {
        self.kind == Kind::Committed
            && self.labels.get(TARGET_LABEL).is_some_and(|name| name == target)
            && self.parent.as_deref() == parent
    }
}

/// What one snapshot takes on disk, without its parents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of allocated blocks, so a sparse file counts what it holds.
    pub size: i64,
    /// Inodes; a file with several hard links counts once.
    pub inodes: i64,
}

/// A store of filesystem snapshots.
///
/// # The life of a snapshot
///
/// ```text
///             prepare(key, parent)                   commit(name, key)
///   parent ─────────────────────────► active key ─────────────────────► committed name ──► parent of others
///      │                                  │                                   │
///      │      view(key, parent)           │ remove(key)                       │ remove(name), once childless
///      └─────────────────────────► view key ──── remove(key) ──► gone ◄───────┘
/// ```
///
/// A snapshot is the state of a filesystem. [`prepare`](Snapshotter::prepare) makes an *active* one that begins
/// with the contents of its parent (or empty, without one) and hands out the mounts through which it is read and
/// changed; the changes are kept apart from the parent, which never changes. [`view`](Snapshotter::view) makes
/// the same read-only. [`commit`](Snapshotter::commit) turns an active snapshot into a *committed* one under a new
/// name: the key is gone, the contents are frozen, the usage is counted once and for all. Only committed
/// snapshots can be parents. [`remove`](Snapshotter::remove) takes any snapshot that has no children.
///
/// Unpacking an image makes a chain: for each layer `prepare` on the chain so far, apply the layer into the
/// mounts, `commit` under the chain's id. Where the capability `rebase` is given, all layers can be prepared
/// without a parent and applied at the same time, and each `commit` names the parent; whiteouts in such a layer
/// must then be left in the form that the implementation's parents understand. Running a container is `prepare`
/// on the last committed snapshot; when it is done with, `remove`.
///
/// # Names
///
/// Keys and names are any non-empty text and share one space: an active snapshot cannot have the key of a
/// committed one. Namespaces are not known here; whoever keeps them puts them into the names.
///
/// # Mounts
///
/// The mounts handed out are instructions: an implementation mounts nothing itself. They stay valid until the
/// snapshot is committed or removed, across restarts, and [`mounts`](Snapshotter::mounts) gives them again. The
/// caller unmounts before it commits.
///
/// # What survives a crash
///
/// A call that returned is visible to all later calls at once. It survives a crash of the machine as soon as any
/// later synced update of the same database returned, in order: of two calls, the second never survives without
/// the first. Whatever a crash interrupts leaves at most a folder that no record knows, which `cleanup` deletes.
/// The folder of a committed snapshot is on disk before its record; the *contents* are synced by whoever wrote
/// them, before `commit`.
///
/// # Removal
///
/// `remove` only forgets the snapshot, in constant time; its name can be used again at once, and the space comes
/// back at the next [`cleanup`](Snapshotter::cleanup), which runs beside all other calls.
///
/// # Errors
///
/// Every method answers [`Error::NotFound`] for an unknown key. Nothing has changed after an error.
pub trait Snapshotter: Send + Sync {
    /// What is recorded of a snapshot of any kind.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    fn stat(&self, key: &str) -> Result<Info, Error>;

    /// Changes labels; nothing else of a snapshot can be changed. `fields` names what is taken from `labels`:
    /// `labels.KEY` one label (absent or empty in `labels`: deleted), `labels` or no field at all the whole set.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::ImmutableField`] for another field.
    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error>;

    /// What a snapshot takes on disk: counted now when it is active, recorded when committed, nothing for a view.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::File`] when the count fails.
    fn usage(&self, key: &str) -> Result<Usage, Error>;

    /// The mounts of an active snapshot or a view.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::NotMountable`] for a committed one.
    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error>;

    /// Makes the active snapshot `key` with the contents of `parent` and answers its mounts.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::ParentNotFound`]; [`Error::ParentNotCommitted`].
    fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error>;

    /// Makes the read-only snapshot `key` with the contents of `parent` and answers its mounts.
    ///
    /// # Errors
    /// As [`prepare`](Snapshotter::prepare).
    fn view(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error>;

    /// Turns the active snapshot `key` into the committed snapshot `name`, with exactly these labels: none are
    /// inherited. A `parent` rebases an active snapshot that has none onto that committed one.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] for the name; [`Error::NotActive`]; [`Error::ParentChange`] when the snapshot has
    /// another parent already; [`Error::ParentNotFound`]; [`Error::RebaseParentNotCommitted`];
    /// [`Error::RebaseUnsupported`].
    fn commit(&self, name: &str, key: &str, labels: &Labels, parent: Option<&str>) -> Result<(), Error>;

    /// Forgets a snapshot of any kind.
    ///
    /// # Errors
    /// [`Error::HasChildren`].
    fn remove(&self, key: &str) -> Result<(), Error>;

    /// What is recorded of all snapshots, in the order of their names, from one consistent state.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    fn list(&self) -> Result<Vec<Info>, Error>;

    /// The committed snapshot that was announced as `target` ([`TARGET_LABEL`]), on this parent.
    ///
    /// # Errors
    /// As [`list`](Snapshotter::list).
    fn find_target(&self, target: &str, parent: Option<&str>) -> Result<Option<Info>, Error> {
        Ok(self.list()?.into_iter().find(|info| info.is_target(target, parent)))
    }

    /// Deletes the files of removed snapshots and of those that a crash kept from being made. May take long, and
    /// runs beside every other call. What cannot be deleted now is left for the next time.
    ///
    /// # Errors
    /// [`Error::File`] for the first that could not be deleted; all others are deleted nonetheless.
    fn cleanup(&self) -> Result<(), Error>;

    /// What this implementation can do beyond the above, in containerd's words (`rebase`, `remap-ids`,
    /// `only-remap-ids`).
    fn capabilities(&self) -> Vec<String>;

    /// Facts for the introspection service, by containerd's names (`root`).
    fn exports(&self) -> BTreeMap<String, String>;

    /// For a snapshotter in another process, the same one for the calls of a client in `namespace`, which that process is
    /// told. One of this process needs to know no namespaces and answers `None`.
    fn in_namespace(&self, _namespace: &str) -> Option<Arc<dyn Snapshotter>> {
        None
    }
}
