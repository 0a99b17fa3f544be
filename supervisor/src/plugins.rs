//! The plugin list. Nothing here is a plugin; but clients choose what they do by this list, so it is an API:
//! nerdctl, BuildKit, Docker Engine and containerd's own client look for types, ids, platforms and capabilities.

use std::borrow::Cow;
use std::collections::BTreeMap;

use davit_model::filter::Adaptor;
use davit_oci::platform::Platform;

use crate::config::{ProxyKind, ProxyPlugin};
use crate::restart;

/// One entry of the list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plugin {
    /// `io.containerd.snapshotter.v1` and the like.
    pub kind: String,
    /// The name within its type.
    pub id: String,
    /// The types that it builds on.
    pub requires: Vec<String>,
    /// The platform that the entry works on in particular: mostly that of this machine.
    pub platform: Option<Platform>,
    /// What it can do beyond its interface.
    pub capabilities: Vec<String>,
    /// What it tells: folders, schemes.
    pub exports: BTreeMap<String, String>,
    /// Why it does not work.
    pub init_error: Option<String>,
}

impl Adaptor for Plugin {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path {
            [name] if name == "type" => Some(Cow::Borrowed(&self.kind)),
            [name] if name == "id" => Some(Cow::Borrowed(&self.id)),
            _ => None,
        }
    }
}

impl Plugin {
    fn new(kind: &str, id: &str, requires: &[&str]) -> Plugin {
        Plugin {
            kind: format!("io.containerd.{kind}"),
            id: id.to_owned(),
            requires: requires.iter().map(|kind| format!("io.containerd.{kind}")).collect(),
            ..Plugin::default()
        }
    }

    /// A service that only davitd has, by the name of its package and itself.
    fn private(service: &str) -> Plugin {
        let id = service.rsplit('.').next().unwrap_or(service).to_lowercase();
        let plugin = Plugin { kind: "io.davit.grpc.v1".to_owned(), id, ..Plugin::default() };
        plugin.export("service", service)
    }

    /// A proxy plugin. What its configuration says is all that is known of it.
    pub fn proxy(name: &str, plugin: &ProxyPlugin) -> Plugin {
        let kind = match plugin.kind {
            ProxyKind::Snapshot => "snapshotter.v1",
            ProxyKind::Content => "content.v1",
            ProxyKind::Diff => "differ.v1",
            ProxyKind::Sandbox => "sandbox.controller.v1",
        };
        Plugin {
            platform: Some(plugin.platform()),
            capabilities: plugin.capabilities.clone(),
            exports: plugin.exports(),
            ..Plugin::new(kind, name, &[])
        }
    }

    fn on_platform(mut self) -> Plugin {
        self.platform = Some(Platform::host());
        self
    }

    fn with_capabilities(mut self, capabilities: &[&str]) -> Plugin {
        self.capabilities = capabilities.iter().map(|&name| name.to_owned()).collect();
        self
    }

    fn export(mut self, key: &str, value: impl Into<String>) -> Plugin {
        self.exports.insert(key.to_owned(), value.into());
        self
    }
}

/// A snapshotter for the list: what it can do, or why it cannot be used here.
#[derive(Debug)]
pub struct SnapshotterEntry {
    /// The snapshotter's name.
    pub name: String,
    /// Its capabilities and exports, or the text of what went wrong when it was opened.
    pub state: Result<(Vec<String>, BTreeMap<String, String>), String>,
}

/// The list of a daemon with these folders and snapshotters. `own_shims` says that it starts the project's own shims,
/// which know more kinds of logs than others.
pub fn list(
    content_root: &str,
    logs: &str,
    own_shims: bool,
    snapshotters: Vec<SnapshotterEntry>,
) -> Vec<Plugin> {
    let schemes =
        if own_shims { "fifo,binary,binary-v2,file,json-file" } else { "fifo,binary,binary-v2,file" };
    let mut plugins = vec![
        Plugin::new("content.v1", "content", &[]).export("root", content_root),
        Plugin::new("event.v1", "exchange", &[]),
        Plugin::new("warning.v1", "deprecations", &[]),
        Plugin::new("internal.v1", "opt", &[]),
        Plugin::new("metadata.v1", "bolt", &["content.v1", "event.v1", "snapshotter.v1"])
            .export("policy", "shared"),
        Plugin::new("gc.v1", "scheduler", &["metadata.v1"]),
        Plugin::new("lease.v1", "manager", &["metadata.v1"]),
        Plugin::new("sandbox.store.v1", "local", &["metadata.v1"]),
        Plugin::new("sandbox.controller.v1", "shim", &["shim.v1", "event.v1"]),
        Plugin::new("monitor.container.v1", "restart", &["event.v1", "service.v1"])
            .with_capabilities(&restart::CAPABILITIES),
        Plugin::new("mount-manager.v1", "bolt", &["metadata.v1", "mount-handler.v1"]),
        Plugin::new("streaming.v1", "manager", &["metadata.v1"]),
        Plugin::new("transfer.v1", "local", &["lease.v1", "metadata.v1", "differ.v1"]),
        Plugin::new("differ.v1", "walking", &["metadata.v1"]).on_platform(),
        Plugin::new("shim.v1", "manager", &["event.v1", "metadata.v1"]).on_platform(),
        Plugin::new("runtime.v2", "task", &["shim.v1"])
            .on_platform()
            .export("log-uri-schemes", schemes)
            .export("logs", logs),
    ];
    for entry in snapshotters {
        let mut plugin = Plugin::new("snapshotter.v1", &entry.name, &[]).on_platform();
        match entry.state {
            Ok((capabilities, exports)) => {
                plugin.capabilities = capabilities;
                plugin.exports = exports;
            }
            Err(text) => plugin.init_error = Some(text),
        }
        plugins.push(plugin);
    }
    let services = [
        "containers",
        "content",
        "diff",
        "images",
        "introspection",
        "leases",
        "namespaces",
        "snapshots",
        "tasks",
    ];
    for name in services {
        plugins.push(Plugin::new("service.v1", &format!("{name}-service"), &["metadata.v1"]));
        plugins.push(Plugin::new("grpc.v1", name, &["service.v1"]));
    }
    plugins.push(Plugin::new("grpc.v1", "sandboxes", &["sandbox.store.v1"]));
    let requires = ["podsandbox.controller.v1", "sandbox.controller.v1", "event.v1"];
    plugins.push(Plugin::new("grpc.v1", "sandbox-controllers", &requires));
    plugins.push(Plugin::new("grpc.v1", "mounts", &["mount-manager.v1"]));
    plugins.push(Plugin::new("grpc.v1", "streaming", &["streaming.v1"]));
    plugins.push(Plugin::new("grpc.v1", "transfer", &["transfer.v1", "streaming.v1"]));
    for name in ["events", "healthcheck", "version"] {
        plugins.push(Plugin::new("grpc.v1", name, &[]));
    }
    plugins.push(Plugin::new("ttrpc.v1", "events", &["event.v1"]));
    for service in ["davit.services.events.v1.Events", "davit.services.shims.v1.Shims"] {
        plugins.push(Plugin::private(service));
    }
    plugins
}

/// Puts proxy plugins into the list, each in place of what it replaces: the content store is one, others have names.
pub fn replace(plugins: &mut Vec<Plugin>, proxies: Vec<Plugin>) {
    for proxy in proxies {
        let is_content = proxy.kind == "io.containerd.content.v1";
        plugins.retain(|plugin| plugin.kind != proxy.kind || (plugin.id != proxy.id && !is_content));
        plugins.push(proxy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use davit_model::Filter;

    #[test]
    fn clients_find_what_they_look_for() {
        let overlay = SnapshotterEntry { name: "overlayfs".into(), state: Ok(Default::default()) };
        let broken = SnapshotterEntry { name: "native".into(), state: Err("no".into()) };
        let plugins = list("/r", "/l", true, vec![overlay, broken]);
        let find = |filter: &str| {
            let filter = Filter::parse(&[filter.to_owned()]).unwrap();
            plugins.iter().filter(|plugin| filter.matches(*plugin)).collect::<Vec<_>>()
        };
        assert!(find("type==io.containerd.runtime.v2").iter().all(|plugin| plugin.platform.is_some()));
        assert_eq!(find("type==io.containerd.snapshotter.v1, id==overlayfs").len(), 1);
        assert_eq!(
            find("type==io.containerd.snapshotter.v1,id==native")[0].init_error.as_deref(),
            Some("no")
        );
        let history = find("type==io.davit.grpc.v1,id==events");
        assert_eq!(history[0].exports["service"], "davit.services.events.v1.Events");
        assert!(find("id==restart")[0].capabilities.contains(&"unless-stopped".to_owned()));
    }
}
