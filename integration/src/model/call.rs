//! The calls that are drawn, as plain data: what a step prints, replays and is shrunk by.

use std::collections::BTreeMap;

use serde_json::Value;

use super::filter::Filters;

/// Labels of any object.
pub type Labels = BTreeMap<String, String>;

/// One call, with the headers that come with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The header `containerd-namespace`.
    pub namespace: Option<String>,
    /// The header `containerd-lease`.
    pub lease: Option<String>,
    /// The call.
    pub call: Call,
}

/// One message of a write session.
#[derive(Clone, PartialEq, Default)]
pub struct Message {
    /// What to do.
    pub action: Action,
    /// The size of the whole, 0 if it is not told.
    pub total: i64,
    /// The digest of the whole, empty if it is not told.
    pub expected: String,
    /// Where the data belongs.
    pub offset: i64,
    /// The data.
    pub data: Vec<u8>,
    /// The labels of the blob that a commit makes.
    pub labels: Labels,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Message { action, total, expected, offset, data, labels } = self;
        let of = data.first().map(|byte| format!(" of {byte}")).unwrap_or_default();
        write!(
            f,
            "{action:?} total {total} expected {expected:?} offset {offset} {} bytes{of} {labels:?}",
            data.len()
        )
    }
}

/// The actions of a write session, by their numbers on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Action {
    /// Asks how far the ingest is.
    #[default]
    Stat,
    /// Appends.
    Write,
    /// Appends, and makes a blob of it.
    Commit,
}

/// What a snapshot call is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotKey {
    /// The snapshotter.
    pub snapshotter: String,
    /// Key or name.
    pub key: String,
}

/// What a call that makes a snapshot wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Which one.
    pub at: SnapshotKey,
    /// Its parent, or empty.
    pub parent: String,
    /// Its labels.
    pub labels: Labels,
}

/// What a lease is asked to hold or to let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// The lease.
    pub lease: String,
    /// The type.
    pub kind: String,
    /// The id.
    pub id: String,
}

/// New values for the fields that a mask names.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The object as the client sends it.
    pub record: Value,
    /// The paths of the mask.
    pub mask: Vec<String>,
}

/// A call of the API. Objects are documents in the form of `wire.rs`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Call {
    GetNamespace { name: String },
    ListNamespaces,
    CreateNamespace { name: String, labels: Labels },
    UpdateNamespace { name: String, labels: Labels, mask: Vec<String> },
    DeleteNamespace { name: String },

    GetContainer { id: String },
    ListContainers { filters: Filters },
    StreamContainers { filters: Filters },
    CreateContainer { record: Value },
    UpdateContainer(Change),
    DeleteContainer { id: String },

    GetImage { name: String },
    ListImages { filters: Filters },
    CreateImage { record: Value },
    UpdateImage(Change),
    DeleteImage { name: String, target: Option<String>, sync: bool },

    Info { digest: String },
    UpdateInfo(Change),
    ListContent { filters: Filters },
    DeleteContent { digest: String },
    Read { digest: String, offset: i64, size: i64 },
    Status { reference: String },
    ListStatuses { filters: Filters },
    Write { reference: String, messages: Vec<Message>, second: bool },
    Abort { reference: String },

    CreateLease { id: String, labels: Labels },
    DeleteLease { id: String, sync: bool },
    ListLeases { filters: Filters },
    AddResource(Resource),
    DeleteResource(Resource),
    ListResources { lease: String },

    Prepare(NewSnapshot),
    View(NewSnapshot),
    Mounts(SnapshotKey),
    Commit { new: NewSnapshot, from: String },
    Remove(SnapshotKey),
    Stat(SnapshotKey),
    UpdateSnapshot { snapshotter: String, change: Change },
    ListSnapshots { snapshotter: String, filters: Filters },
    Usage(SnapshotKey),
    Cleanup { snapshotter: String },

    GetSandbox { id: String },
    ListSandboxes { filters: Filters },
    CreateSandbox { record: Value },
    UpdateSandbox(Change),
    DeleteSandbox { id: String },
}

/// The methods that steps are drawn from, each as often as it stands here. Every one is there, so that in a deal of all
/// of these each has at least its fiftieth.
pub const DEAL: [&str; 50] = [
    "Namespaces.Get",
    "Namespaces.List",
    "Namespaces.Create",
    "Namespaces.Update",
    "Namespaces.Delete",
    "Containers.Get",
    "Containers.List",
    "Containers.ListStream",
    "Containers.Create",
    "Containers.Update",
    "Containers.Delete",
    "Images.Get",
    "Images.List",
    "Images.Create",
    "Images.Update",
    "Images.Delete",
    "Content.Info",
    "Content.Update",
    "Content.List",
    "Content.Delete",
    "Content.Read",
    "Content.Status",
    "Content.ListStatuses",
    "Content.Write",
    "Content.Write",
    "Content.Write",
    "Content.Abort",
    "Leases.Create",
    "Leases.Delete",
    "Leases.List",
    "Leases.AddResource",
    "Leases.DeleteResource",
    "Leases.ListResources",
    "Snapshots.Prepare",
    "Snapshots.Prepare",
    "Snapshots.View",
    "Snapshots.Mounts",
    "Snapshots.Commit",
    "Snapshots.Commit",
    "Snapshots.Remove",
    "Snapshots.Stat",
    "Snapshots.Update",
    "Snapshots.List",
    "Snapshots.Usage",
    "Snapshots.Cleanup",
    "Store.Get",
    "Store.List",
    "Store.Create",
    "Store.Update",
    "Store.Delete",
];

impl Call {
    /// The method, as `DEAL` names it.
    pub fn method(&self) -> &'static str {
        match self {
            Call::GetNamespace { .. } => "Namespaces.Get",
            Call::ListNamespaces => "Namespaces.List",
            Call::CreateNamespace { .. } => "Namespaces.Create",
            Call::UpdateNamespace { .. } => "Namespaces.Update",
            Call::DeleteNamespace { .. } => "Namespaces.Delete",
            Call::GetContainer { .. } => "Containers.Get",
            Call::ListContainers { .. } => "Containers.List",
            Call::StreamContainers { .. } => "Containers.ListStream",
            Call::CreateContainer { .. } => "Containers.Create",
            Call::UpdateContainer(_) => "Containers.Update",
            Call::DeleteContainer { .. } => "Containers.Delete",
            Call::GetImage { .. } => "Images.Get",
            Call::ListImages { .. } => "Images.List",
            Call::CreateImage { .. } => "Images.Create",
            Call::UpdateImage(_) => "Images.Update",
            Call::DeleteImage { .. } => "Images.Delete",
            Call::Info { .. } => "Content.Info",
            Call::UpdateInfo(_) => "Content.Update",
            Call::ListContent { .. } => "Content.List",
            Call::DeleteContent { .. } => "Content.Delete",
            Call::Read { .. } => "Content.Read",
            Call::Status { .. } => "Content.Status",
            Call::ListStatuses { .. } => "Content.ListStatuses",
            Call::Write { .. } => "Content.Write",
            Call::Abort { .. } => "Content.Abort",
            Call::CreateLease { .. } => "Leases.Create",
            Call::DeleteLease { .. } => "Leases.Delete",
            Call::ListLeases { .. } => "Leases.List",
            Call::AddResource(_) => "Leases.AddResource",
            Call::DeleteResource(_) => "Leases.DeleteResource",
            Call::ListResources { .. } => "Leases.ListResources",
            Call::Prepare(_) => "Snapshots.Prepare",
            Call::View(_) => "Snapshots.View",
            Call::Mounts(_) => "Snapshots.Mounts",
            Call::Commit { .. } => "Snapshots.Commit",
            Call::Remove(_) => "Snapshots.Remove",
            Call::Stat(_) => "Snapshots.Stat",
            Call::UpdateSnapshot { .. } => "Snapshots.Update",
            Call::ListSnapshots { .. } => "Snapshots.List",
            Call::Usage(_) => "Snapshots.Usage",
            Call::Cleanup { .. } => "Snapshots.Cleanup",
            Call::GetSandbox { .. } => "Store.Get",
            Call::ListSandboxes { .. } => "Store.List",
            Call::CreateSandbox { .. } => "Store.Create",
            Call::UpdateSandbox(_) => "Store.Update",
            Call::DeleteSandbox { .. } => "Store.Delete",
        }
    }

    /// Whether an answer without an error waits for a whole collection.
    pub fn collects(&self) -> bool {
        matches!(self, Call::DeleteLease { sync: true, .. } | Call::DeleteImage { sync: true, .. })
    }

    /// Whether it changes something that is on disk by the time of an answer without an error. (What a write session leaves
    /// behind without a commit may be younger than the disk.)
    pub fn settles(&self) -> bool {
        let method = self.method();
        ["Create", "Update", "Delete", "Commit", "Remove"].iter().any(|word| method.ends_with(word))
    }
}
