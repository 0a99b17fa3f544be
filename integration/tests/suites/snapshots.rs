//! A snapshotter of a daemon, through its Snapshots service.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use davit_integration::Daemon;
use davit_integration::client::{Conn, InNamespace, connect};
use davit_model::{ErrorCode, Labels, Mount};
use davit_proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use davit_proto::containerd::services::introspection::v1::{Plugin, PluginsRequest};
use davit_proto::containerd::services::snapshots::v1 as wire;
use davit_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use davit_proto::containerd::types;
use davit_snapshotter::{Error, Info, Kind, Snapshotter, Usage};
use prost_types::FieldMask;
use tokio::runtime::Runtime;
use tonic::service::interceptor::InterceptedService;

/// A client of one snapshotter. It needs no lease: the suite labels all that it makes as a root.
pub(super) struct Remote {
    client: SnapshotsClient<Conn>,
    snapshotter: String,
    plugin: Plugin,
    runtime: Runtime,
}

impl Remote {
    pub(super) fn connect(daemon: &Daemon, snapshotter: &str) -> Result<Arc<Remote>> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (client, plugins) = runtime.block_on(async {
            let channel = connect(&daemon.address()).await?;
            let plugins =
                IntrospectionClient::new(channel.clone()).plugins(PluginsRequest::default()).await?;
            let conn = InterceptedService::new(channel, InNamespace::new(&daemon.namespace(), None)?);
            anyhow::Ok((SnapshotsClient::new(conn), plugins.into_inner().plugins))
        })?;
        let plugin = plugins
            .into_iter()
            .find(|plugin| plugin.r#type == "io.containerd.snapshotter.v1" && plugin.id == snapshotter)
            .with_context(|| format!("the daemon has no snapshotter {snapshotter}"))?;
        Ok(Arc::new(Remote { client, snapshotter: snapshotter.to_owned(), plugin, runtime }))
    }

    /// The name of the snapshotter, which every request holds, and a client of the request's own.
    fn start(&self) -> (String, SnapshotsClient<Conn>) {
        (self.snapshotter.clone(), self.client.clone())
    }

    fn wait<T>(&self, call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Error> {
        self.runtime.block_on(call).map_err(|status| Error::Remote {
            code: ErrorCode::from_number(status.code() as i32),
            message: status.message().to_owned(),
        })
    }
}

fn info(info: wire::Info) -> Info {
    let time = |time: Option<prost_types::Timestamp>| {
        SystemTime::try_from(time.expect("the daemon sends times")).expect("the host can hold the time")
    };
    Info {
        kind: match info.kind() {
            wire::Kind::View => Kind::View,
            wire::Kind::Active => Kind::Active,
            wire::Kind::Committed => Kind::Committed,
            wire::Kind::Unknown => panic!("the daemon does not know what {} is", info.name),
        },
        created: time(info.created_at),
        updated: time(info.updated_at),
        name: info.name,
        parent: (!info.parent.is_empty()).then_some(info.parent),
        labels: info.labels,
    }
}

fn mounts(mounts: Vec<types::Mount>) -> Vec<Mount> {
    mounts
        .into_iter()
        .map(|mount| Mount {
            kind: mount.r#type,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        })
        .collect()
}

impl Snapshotter for Remote {
    fn stat(&self, key: &str) -> Result<Info, Error> {
        let (snapshotter, mut client) = self.start();
        let answer = self.wait(client.stat(wire::StatSnapshotRequest { snapshotter, key: key.into() }))?;
        Ok(info(answer.into_inner().info.expect("an answer has an info")))
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error> {
        let (snapshotter, mut client) = self.start();
        let request = wire::UpdateSnapshotRequest {
            snapshotter,
            info: Some(wire::Info { name: name.into(), labels: labels.clone(), ..Default::default() }),
            update_mask: (!fields.is_empty()).then(|| FieldMask { paths: fields.to_vec() }),
        };
        let answer = self.wait(client.update(request))?;
        Ok(info(answer.into_inner().info.expect("an answer has an info")))
    }

    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let (snapshotter, mut client) = self.start();
        let request = wire::UsageRequest { snapshotter, key: key.into() };
        let answer = self.wait(client.usage(request))?.into_inner();
        Ok(Usage { size: answer.size, inodes: answer.inodes })
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let (snapshotter, mut client) = self.start();
        let request = wire::MountsRequest { snapshotter, key: key.into() };
        Ok(mounts(self.wait(client.mounts(request))?.into_inner().mounts))
    }

    fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        let (snapshotter, mut client) = self.start();
        let request = wire::PrepareSnapshotRequest {
            snapshotter,
            key: key.into(),
            parent: parent.unwrap_or_default().into(),
            labels: labels.clone(),
        };
        Ok(mounts(self.wait(client.prepare(request))?.into_inner().mounts))
    }

    fn view(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        let (snapshotter, mut client) = self.start();
        let request = wire::ViewSnapshotRequest {
            snapshotter,
            key: key.into(),
            parent: parent.unwrap_or_default().into(),
            labels: labels.clone(),
        };
        Ok(mounts(self.wait(client.view(request))?.into_inner().mounts))
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels, parent: Option<&str>) -> Result<(), Error> {
        // containerd's service leaves a snapshot on the parent that it has, whatever parent the commit names, and so
        // does ours. The trait refuses.
        if let Some(parent) = parent
            && let Ok(Some(own)) = self.stat(key).map(|info| info.parent)
            && own != parent
        {
            return Err(Error::ParentChange { key: key.into(), parent: parent.into() });
        }
        let (snapshotter, mut client) = self.start();
        let request = wire::CommitSnapshotRequest {
            snapshotter,
            name: name.into(),
            key: key.into(),
            labels: labels.clone(),
            parent: parent.unwrap_or_default().into(),
        };
        self.wait(client.commit(request))?;
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        let (snapshotter, mut client) = self.start();
        self.wait(client.remove(wire::RemoveSnapshotRequest { snapshotter, key: key.into() }))?;
        Ok(())
    }

    fn list(&self) -> Result<Vec<Info>, Error> {
        let (snapshotter, mut client) = self.start();
        self.wait(async {
            let request = wire::ListSnapshotsRequest { snapshotter, filters: Vec::new() };
            let mut pages = client.list(request).await?.into_inner();
            let mut infos = Vec::new();
            while let Some(page) = pages.message().await? {
                infos.extend(page.info.into_iter().map(info));
            }
            Ok(infos)
        })
    }

    fn cleanup(&self) -> Result<(), Error> {
        // The daemon's collector does it, and no client may.
        Ok(())
    }

    fn capabilities(&self) -> Vec<String> {
        self.plugin.capabilities.clone()
    }

    fn exports(&self) -> BTreeMap<String, String> {
        self.plugin.exports.clone()
    }
}
