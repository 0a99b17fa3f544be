//! A snapshotter in another process.
//!
//! The plugin is told the namespace of each call that a client makes, as containerd tells it. The collector has none;
//! where the key says one, that is told. A plugin that is a whole daemon (another containerd, or another davitd) answers
//! no call without a namespace: it is asked for its namespaces, and of each what is ours in it, by the form of the
//! keys. So that its own collector leaves our snapshots alone, each is labelled as a root there.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_proto::containerd::services::snapshots::v1 as wire;
use davit_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use davit_proto::containerd::types;
use davit_snapshotter::{Error, Info, Kind, Snapshotter, TARGET_LABEL, Usage};
use prost_types::FieldMask;
use tonic::transport::Channel;

use super::connection::{Connection, Failure, MAX_MESSAGE, ROOT_LABEL, ROOT_VALUE, namespace_of, time};
use crate::grpc::convert::mount_from_wire;

/// A snapshotter behind a socket.
pub(super) struct ProxySnapshotter {
    connection: Connection,
    /// That of the client whose calls these are.
    namespace: Option<Arc<str>>,
    capabilities: Vec<String>,
    exports: BTreeMap<String, String>,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::Remote { code: failure.code(), message: failure.to_string() }
    }
}

/// The labels for the plugin.
fn rooted(labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    labels.insert(ROOT_LABEL.to_owned(), ROOT_VALUE.to_owned());
    labels
}

impl ProxySnapshotter {
    /// The snapshotter of a plugin that can do and tells what its configuration says.
    pub(super) fn new(
        connection: Connection,
        capabilities: Vec<String>,
        exports: BTreeMap<String, String>,
    ) -> ProxySnapshotter {
        ProxySnapshotter { connection, namespace: None, capabilities, exports }
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.connection.channel())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn name(&self) -> String {
        self.connection.plugin().to_string()
    }

    /// A request about a key that looks something up, and how long that may take.
    fn look<T>(&self, key: &str, message: T) -> (Duration, tonic::Request<T>) {
        let limit = self.connection.patience.look;
        (limit, self.connection.request(self.namespace_for(key), limit, message))
    }

    /// The same for one that changes something.
    fn change<T>(&self, key: &str, message: T) -> (Duration, tonic::Request<T>) {
        let limit = self.connection.patience.change;
        (limit, self.connection.request(self.namespace_for(key), limit, message))
    }

    fn namespace_for<'a>(&'a self, key: &'a str) -> Option<&'a str> {
        self.namespace.as_deref().or_else(|| namespace_of(key))
    }

    /// What the plugin says of a snapshot, which must be the one that it was asked for.
    fn info(&self, key: &str, info: Option<wire::Info>) -> Result<Info, Error> {
        let info = self.convert(info.unwrap_or_default())?;
        if info.name != key {
            return Err(self.connection.nonsense(format!("asked for {key:?}, got {:?}", info.name)).into());
        }
        Ok(info)
    }

    fn convert(&self, info: wire::Info) -> Result<Info, Error> {
        let kind = match info.kind() {
            wire::Kind::View => Kind::View,
            wire::Kind::Active => Kind::Active,
            wire::Kind::Committed => Kind::Committed,
            wire::Kind::Unknown => {
                return Err(self
                    .connection
                    .nonsense(format!("snapshot {:?} is of no kind", info.name))
                    .into());
            }
        };
        let mut labels = info.labels;
        labels.remove(ROOT_LABEL);
        Ok(Info {
            kind,
            name: info.name,
            parent: Some(info.parent).filter(|parent| !parent.is_empty()),
            labels,
            created: time(info.created_at),
            updated: time(info.updated_at),
        })
    }

    /// All snapshots that the plugin lists in a namespace, of those that `filters` name; by name, each once.
    fn walk(&self, namespace: Option<&str>, filters: &[String]) -> Result<Vec<Info>, Failure> {
        let connection = &self.connection;
        let message = wire::ListSnapshotsRequest { snapshotter: self.name(), filters: filters.to_vec() };
        let limit = connection.patience.change;
        let request = connection.request(namespace, limit, message);
        let walk = async {
            let pages = self.client().list(request).await?.into_inner();
            Connection::read_pages(pages, "snapshots", |page| page.info).await
        };
        let mut infos = BTreeMap::new();
        for info in connection.wait(limit, walk)? {
            // One that is nonsense must not hide the others from the collector.
            let Ok(info) = self.convert(info) else { continue };
            if let Entry::Vacant(place) = infos.entry(info.name.clone()) {
                place.insert(info);
            }
        }
        Ok(infos.into_values().collect())
    }

    fn mounts_of(mounts: Vec<types::Mount>) -> Vec<Mount> {
        mounts.into_iter().map(mount_from_wire).collect()
    }
}

impl Snapshotter for ProxySnapshotter {
    fn stat(&self, key: &str) -> Result<Info, Error> {
        let message = wire::StatSnapshotRequest { snapshotter: self.name(), key: key.to_owned() };
        let (limit, request) = self.look(key, message);
        let answer = self.connection.wait(limit, self.client().stat(request))?;
        self.info(key, answer.into_inner().info)
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error> {
        let info = wire::Info { name: name.to_owned(), labels: rooted(labels), ..Default::default() };
        let mask = FieldMask { paths: fields.to_vec() };
        let message = wire::UpdateSnapshotRequest {
            snapshotter: self.name(),
            info: Some(info),
            update_mask: (!fields.is_empty()).then_some(mask),
        };
        let (limit, request) = self.change(name, message);
        let answer = self.connection.wait(limit, self.client().update(request))?;
        self.info(name, answer.into_inner().info)
    }

    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let message = wire::UsageRequest { snapshotter: self.name(), key: key.to_owned() };
        let (limit, request) = self.change(key, message);
        let answer = self.connection.wait(limit, self.client().usage(request))?;
        let wire::UsageResponse { size, inodes } = answer.into_inner();
        if size < 0 || inodes < 0 {
            return Err(self.connection.nonsense(format!("a usage of {size} bytes, {inodes} inodes")).into());
        }
        Ok(Usage { size, inodes })
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let message = wire::MountsRequest { snapshotter: self.name(), key: key.to_owned() };
        let (limit, request) = self.change(key, message);
        let answer = self.connection.wait(limit, self.client().mounts(request))?;
        Ok(ProxySnapshotter::mounts_of(answer.into_inner().mounts))
    }

    fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        let message = wire::PrepareSnapshotRequest {
            snapshotter: self.name(),
            key: key.to_owned(),
            parent: parent.unwrap_or_default().to_owned(),
            labels: rooted(labels),
        };
        let (limit, request) = self.change(key, message);
        let answer = self.connection.wait(limit, self.client().prepare(request))?;
        Ok(ProxySnapshotter::mounts_of(answer.into_inner().mounts))
    }

    fn view(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        let message = wire::ViewSnapshotRequest {
            snapshotter: self.name(),
            key: key.to_owned(),
            parent: parent.unwrap_or_default().to_owned(),
            labels: rooted(labels),
        };
        let (limit, request) = self.change(key, message);
        let answer = self.connection.wait(limit, self.client().view(request))?;
        Ok(ProxySnapshotter::mounts_of(answer.into_inner().mounts))
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels, parent: Option<&str>) -> Result<(), Error> {
        let message = wire::CommitSnapshotRequest {
            snapshotter: self.name(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: rooted(labels),
            parent: parent.unwrap_or_default().to_owned(),
        };
        let (limit, request) = self.change(name, message);
        self.connection.wait(limit, self.client().commit(request))?;
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        let message = wire::RemoveSnapshotRequest { snapshotter: self.name(), key: key.to_owned() };
        let (limit, request) = self.change(key, message);
        self.connection.wait(limit, self.client().remove(request))?;
        Ok(())
    }

    fn list(&self) -> Result<Vec<Info>, Error> {
        if let Some(namespace) = &self.namespace {
            return Ok(self.walk(Some(namespace), &[])?);
        }
        let list = |namespace: Option<&str>| self.walk(namespace, &[]);
        // What has other names in the namespace of a daemon belongs to others.
        let ours = |namespace: &str, info: &Info| namespace_of(&info.name) == Some(namespace);
        Ok(self.connection.everywhere(list, ours)?)
    }

    fn find_target(&self, target: &str, parent: Option<&str>) -> Result<Option<Info>, Error> {
        let parent_word = parent.unwrap_or_default();
        let filter = format!("labels.{TARGET_LABEL:?}=={target:?},parent=={parent_word:?}");
        let found = self.walk(self.namespace.as_deref(), &[filter])?;
        // Not every plugin heeds filters.
        Ok(found.into_iter().find(|info| info.is_target(target, parent)))
    }

    fn cleanup(&self) -> Result<(), Error> {
        let message = wire::CleanupRequest { snapshotter: self.name() };
        let limit = self.connection.patience.cleanup;
        let request = self.connection.request(self.namespace.as_deref(), limit, message);
        match self.connection.wait(limit, self.client().cleanup(request)) {
            // Most have nothing to clean up, and a daemon does it by itself.
            Err(failure) if failure.code == ErrorCode::Unimplemented => Ok(()),
            answer => Ok(answer.map(drop)?),
        }
    }

    fn capabilities(&self) -> Vec<String> {
        self.capabilities.clone()
    }

    fn exports(&self) -> BTreeMap<String, String> {
        self.exports.clone()
    }

    fn in_namespace(&self, namespace: &str) -> Option<Arc<dyn Snapshotter>> {
        Some(Arc::new(ProxySnapshotter {
            connection: self.connection.clone(),
            namespace: Some(Arc::from(namespace)),
            capabilities: self.capabilities.clone(),
            exports: self.exports.clone(),
        }))
    }
}
