//! Proxy plugins: snapshotters, content stores, differs and sandbox controllers that other processes serve on unix sockets,
//! by the same services as this daemon.
//!
//! ```text
//!   Snapshots ─▶ metadata ─▶ dyn Snapshotter ─┬─▶ overlayfs, native, …
//!                                             └─▶ proxy ─▶ unix socket ─▶ containerd.services.snapshots.v1
//! ```
//!
//! A plugin takes the place of what is built in below the metadata: names, labels, leases and collection stay here, and
//! the plugin sees the keys of the metadata, `NAMESPACE/NUMBER/KEY`. One whose name a built-in one has takes its
//! place (containerd does not start then), and a content store takes that of the local store, because there can be one
//! only (containerd wants the built-in one disabled, and loads no metadata otherwise).
//!
//! Nothing is asked of a plugin when the daemon starts: the connection is made by the first call, and made again by
//! the first call after it broke. A plugin that is slow, gone, or says nonsense fails the calls on itself: each has
//! a deadline, an answer has a bounded size, and the error names the plugin and has the plugin's own code.

mod connection;
mod content;
mod diff;
mod sandbox;
mod snapshots;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use davit_snapshotter::Snapshotter;

use crate::config::{ProxyKind, ProxyPlugin};
use crate::events::Hub;
use crate::plugins::Plugin;
use connection::Connection;
pub use connection::Failure;
pub use content::{ProxyReader, ProxyStore, ProxyWriter};
pub use diff::ProxyDiffer;
pub use sandbox::ProxyController;
use snapshots::ProxySnapshotter;

/// The plugins of a configuration.
#[derive(Default)]
pub struct Proxies {
    /// The snapshotters by name.
    pub snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
    /// The content store.
    pub content: Option<ProxyStore>,
    /// The differs by name.
    pub differs: BTreeMap<String, ProxyDiffer>,
    /// The sandbox controllers by name.
    pub controllers: BTreeMap<String, ProxyController>,
    /// What clients are told of all of them.
    pub entries: Vec<Plugin>,
}

impl Proxies {
    /// The plugins of `config`, none of which is asked anything yet; `hub` hears of what sandboxes do. Needs the runtime;
    /// plugins on one socket share a connection.
    pub fn open(config: &BTreeMap<String, ProxyPlugin>, hub: &Hub) -> Proxies {
        let mut channels = BTreeMap::<PathBuf, _>::new();
        let mut proxies = Proxies::default();
        for (name, plugin) in config {
            let channel =
                channels.entry(plugin.socket()).or_insert_with_key(|socket| connection::channel(socket));
            let connection = Connection::new(name, channel.clone());
            match plugin.kind {
                ProxyKind::Snapshot => {
                    let (capabilities, exports) = (plugin.capabilities.clone(), plugin.exports());
                    let snapshotter = ProxySnapshotter::new(connection, capabilities, exports);
                    proxies.snapshotters.insert(name.clone(), Arc::new(snapshotter));
                }
                ProxyKind::Diff => {
                    proxies.differs.insert(name.clone(), ProxyDiffer::new(connection));
                }
                ProxyKind::Content => proxies.content = Some(ProxyStore::new(connection)),
                ProxyKind::Sandbox => {
                    let controller = ProxyController::new(connection, hub.clone());
                    proxies.controllers.insert(name.clone(), controller);
                }
            }
            proxies.entries.push(Plugin::proxy(name, plugin));
        }
        proxies
    }
}

#[cfg(test)]
mod tests;
