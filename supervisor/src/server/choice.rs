//! What of the plugin list the configuration wants, and what it does not.
//!
//! containerd does not load a plugin that is disabled, and does not start without one that is required. Here nothing is a
//! plugin; but what an operator names by the list can be left out where that makes sense, and is missed where it is not there.

use anyhow::{Result, bail};
use davit_oci::platform::Platform;

use crate::config::{Config, PluginList, ProxyKind, Sharing};
use crate::plugins::Plugin;

/// Keeps containers in the state that their labels ask for.
const RESTART: [&str; 2] =
    ["io.containerd.monitor.container.v1.restart", "io.containerd.internal.v1.restart"];
/// Tells what containers use.
const MONITOR: [&str; 2] = ["io.containerd.monitor.task.v1.cgroups", "io.containerd.monitor.v1.cgroups"];
/// Sends spans.
const TRACING: [&str; 2] = ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"];
const TCP: [&str; 1] = ["io.containerd.server.v1.grpc-tcp"];
const METRICS: [&str; 1] = ["io.containerd.server.v1.metrics"];
const DEBUG: [&str; 1] = ["io.containerd.server.v1.debug"];

/// Tells clients who may have whose content, by its export `policy`.
const METADATA: &str = "io.containerd.metadata.v1.bolt";

/// The type of snapshotters, before their names.
const SNAPSHOTTER: &str = "io.containerd.snapshotter.v1.";

impl PluginList {
    fn disables(&self, names: &[&str]) -> bool {
        self.disabled.iter().any(|disabled| names.contains(&disabled.as_str()))
    }

    /// Whether a snapshotter is not to be used.
    pub(super) fn disables_snapshotter(&self, name: &str) -> bool {
        self.disabled.iter().any(|disabled| disabled.strip_prefix(SNAPSHOTTER) == Some(name))
    }

    /// Whether containers are not to be restarted.
    pub(super) fn disables_restart(&self) -> bool {
        self.disables(&RESTART)
    }

    /// Whether no spans are to be sent, whatever the environment says.
    pub(crate) fn disables_tracing(&self) -> bool {
        self.disables(&TRACING)
    }

    /// Whether metrics are not to tell of containers.
    pub(super) fn disables_monitor(&self) -> bool {
        self.disables(&MONITOR)
    }
}

/// Takes out of a configuration the servers and the snapshotters of other processes that are disabled.
pub fn without_disabled(config: &mut Config) {
    let list = config.plugin_list.clone();
    if list.disables(&TCP) {
        config.grpc.tcp = Default::default();
    }
    if list.disables(&METRICS) {
        config.metrics.address.clear();
    }
    if list.disables(&DEBUG) {
        config.diagnostics = Default::default();
    }
    let is_disabled = |name: &str| list.disables_snapshotter(name);
    config.proxy_plugins.retain(|name, proxy| proxy.kind != ProxyKind::Snapshot || !is_disabled(name));
}

/// Adds to the list what servers there are and what is configured, takes from it what is disabled, and checks that what is
/// required is there.
///
/// # Errors
/// In containerd's words, for a required entry that is missing or does not work.
pub(super) fn apply(config: &Config, plugins: &mut Vec<Plugin>) -> Result<()> {
    let entry = |kind: &str, id: &str| Plugin {
        kind: format!("io.containerd.{kind}"),
        id: id.to_owned(),
        ..Plugin::default()
    };
    plugins.push(entry("server.v1", "grpc"));
    plugins.push(entry("server.v1", "ttrpc"));
    plugins.push(entry("metrics.v1", "grpc-prometheus"));
    plugins.push(Plugin { platform: Some(Platform::host()), ..entry("monitor.task.v1", "cgroups") });
    for (id, there) in [
        ("grpc-tcp", !config.grpc.tcp.address.is_empty()),
        ("metrics", !config.metrics.address.is_empty()),
        ("debug", !config.diagnostics.address.as_os_str().is_empty()),
    ] {
        if there {
            plugins.push(entry("server.v1", id));
        }
    }
    let policy = match config.metadata.sharing {
        Sharing::Shared => "shared",
        Sharing::Isolated => "isolated",
    };
    for plugin in plugins.iter_mut().filter(|plugin| uri(plugin) == METADATA) {
        plugin.exports.insert("policy".to_owned(), policy.to_owned());
    }
    let PluginList { required, disabled } = &config.plugin_list;
    let names = |list: &[&str], name: &str| list.contains(&name);
    let left_out = |name: &str| names(&RESTART, name) || names(&MONITOR, name);
    plugins.retain(|plugin| {
        let name = uri(plugin);
        let disabled = disabled.contains(&name)
            || config.plugin_list.disables_restart() && names(&RESTART, &name)
            || config.plugin_list.disables_monitor() && names(&MONITOR, &name);
        if disabled && !left_out(&name) {
            tracing::warn!(plugin = name, "this cannot be disabled here");
        }
        !(disabled && left_out(&name))
    });

    let mut missing: Vec<&str> = Vec::new();
    for name in required {
        let found = plugins.iter().find(|plugin| uri(plugin) == *name);
        match found.map(|plugin| &plugin.init_error) {
            None => missing.push(name),
            Some(Some(error)) => bail!("load required plugin {name}: {error}"),
            Some(None) => {}
        }
    }
    if !missing.is_empty() {
        bail!("required plugin [{}] not included", missing.join(" "));
    }
    Ok(())
}

fn uri(plugin: &Plugin) -> String {
    format!("{}.{}", plugin.kind, plugin.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(required: &[&str], disabled: &[&str]) -> Result<Vec<String>> {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut config = Config::default();
        config.metrics.address = "127.0.0.1:1".into();
        config.plugin_list = PluginList { required: list(required), disabled: list(disabled) };
        without_disabled(&mut config);
        let entry = |kind: &str, id: &str, error: Option<&str>| Plugin {
            kind: format!("io.containerd.{kind}"),
            id: id.into(),
            init_error: error.map(str::to_owned),
            ..Plugin::default()
        };
        let mut plugins = vec![
            entry("monitor.container.v1", "restart", None),
            entry("snapshotter.v1", "btrfs", Some("not a btrfs filesystem")),
            entry("grpc.v1", "tasks", None),
        ];
        apply(&config, &mut plugins)?;
        Ok(plugins.iter().map(uri).collect())
    }

    #[test]
    fn what_is_required_must_be_there_and_work() {
        applied(&["io.containerd.grpc.v1.tasks", "io.containerd.server.v1.metrics"], &[]).unwrap();
        let refused =
            |required: &[&str], disabled: &[&str]| applied(required, disabled).unwrap_err().to_string();
        assert_eq!(
            refused(&["io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.tasks", "a.b"], &[]),
            "required plugin [io.containerd.grpc.v1.cri a.b] not included"
        );
        assert_eq!(
            refused(&["io.containerd.snapshotter.v1.btrfs"], &[]),
            "load required plugin io.containerd.snapshotter.v1.btrfs: not a btrfs filesystem"
        );
        let restart = "io.containerd.monitor.container.v1.restart";
        let error = refused(&[restart], &["io.containerd.internal.v1.restart"]);
        assert_eq!(error, format!("required plugin [{restart}] not included"));
        let tcp = "io.containerd.server.v1.grpc-tcp";
        assert!(refused(&[tcp], &[]).contains("not included"), "it is not configured");
    }

    #[test]
    fn a_snapshotter_of_another_process_is_left_out() {
        let text = "[plugin_list]\ndisabled = [\"io.containerd.snapshotter.v1.far\"]\n\
                    [proxy_plugins.far]\ntype = \"snapshot\"\naddress = \"/far\"\n\
                    [proxy_plugins.near]\ntype = \"snapshot\"\naddress = \"/near\"\n";
        let mut config: Config = toml::from_str(text).unwrap();
        without_disabled(&mut config);
        assert_eq!(config.proxy_plugins.keys().collect::<Vec<_>>(), ["near"]);
    }

    #[test]
    fn what_is_disabled_is_not_there() {
        let there =
            applied(&[], &["io.containerd.monitor.v1.cgroups", "io.containerd.server.v1.metrics"]).unwrap();
        for gone in ["io.containerd.monitor.task.v1.cgroups", "io.containerd.server.v1.metrics"] {
            assert!(!there.iter().any(|name| name == gone), "{there:?}");
        }
        let there = applied(&[], &["io.containerd.grpc.v1.tasks"]).unwrap();
        assert!(there.iter().any(|name| name == "io.containerd.grpc.v1.tasks"), "this one cannot be");
    }
}
