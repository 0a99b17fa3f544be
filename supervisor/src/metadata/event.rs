//! What the metadata services tell of their changes, after the transaction.

use std::sync::Arc;

use davit_model::{Any, Labels};

/// A change that happened. The names of the topics and of the messages on the wire are the subscriber's business:
/// note that containerd has the image messages in another package than all others.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are those of the objects.
pub enum Event {
    /// `/namespaces/create`
    NamespaceCreate { name: String, labels: Labels },
    /// `/namespaces/update`
    NamespaceUpdate { name: String, labels: Labels },
    /// `/namespaces/delete`
    NamespaceDelete { name: String },
    /// `/containers/create`
    ContainerCreate { id: String, image: String, runtime: String, runtime_options: Option<Any> },
    /// `/containers/update`
    ContainerUpdate { id: String, image: String, labels: Labels, snapshot_key: String },
    /// `/containers/delete`
    ContainerDelete { id: String },
    /// `/images/create`
    ImageCreate { name: String, labels: Labels },
    /// `/images/update`
    ImageUpdate { name: String, labels: Labels },
    /// `/images/delete`; the garbage collector sends it as well.
    ImageDelete { name: String },
    /// `/content/create`
    ContentCreate { digest: String, size: u64 },
    /// `/content/delete`
    ContentDelete { digest: String },
    /// `/snapshot/prepare`
    SnapshotPrepare { snapshotter: String, key: String, parent: String },
    /// `/snapshot/commit`
    SnapshotCommit { snapshotter: String, key: String, name: String },
    /// `/snapshot/remove`; the garbage collector sends it as well.
    SnapshotRemove { snapshotter: String, key: String },
}

/// Takes the events of a namespace, in order of their transactions' ends. It is called from asynchronous tasks and
/// from blocking threads, and must not block.
pub type EventSink = Arc<dyn Fn(&str, Event) + Send + Sync>;
