//! What other programs do for the daemon: proxy plugins and stream processors, and which differ makes and applies layers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use davit_oci::platform::Platform;
use serde::{Deserialize, Serialize};

use super::{Config, ConfigError};
use crate::lane;

/// `[proxy_plugins.NAME]`, with containerd's keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyPlugin {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: ProxyKind,
    /// Its unix socket, as a path or as `unix://PATH`.
    pub address: String,
    /// The platform that it is for; that of this machine if it is empty.
    #[serde(default)]
    pub platform: String,
    /// What clients are told of it.
    #[serde(default)]
    pub exports: BTreeMap<String, String>,
    /// What it can do beyond its interface; nobody asks it.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

/// The kinds of proxy plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProxyKind {
    /// A snapshotter.
    #[serde(rename = "snapshot", alias = "io.containerd.snapshotter.v1")]
    Snapshot,
    /// The content store.
    #[serde(rename = "content", alias = "io.containerd.content.v1")]
    Content,
    /// A differ.
    #[serde(rename = "diff", alias = "io.containerd.differ.v1")]
    Diff,
    /// A sandbox controller.
    #[serde(rename = "sandbox", alias = "io.containerd.sandbox.controller.v1")]
    Sandbox,
}

impl ProxyPlugin {
    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(self.address.strip_prefix("unix://").unwrap_or(&self.address))
    }

    /// What clients are told: what is configured, and the address.
    pub fn exports(&self) -> BTreeMap<String, String> {
        let mut exports = self.exports.clone();
        exports.insert("address".to_owned(), self.address.clone());
        exports
    }

    /// The platform that it is for.
    pub fn platform(&self) -> Platform {
        // It was checked when the file was read.
        if self.platform.is_empty() { Platform::host() } else { self.parsed().unwrap_or_else(Platform::host) }
    }

    fn parsed(&self) -> Option<Platform> {
        Platform::parse(&self.platform).ok().map(|platform| platform.normalized())
    }
}

/// `[stream_processors.ID]`: a program that layers of some media types are piped through, with containerd's keys. Of
/// several for one type the last by id is taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamProcessor {
    /// The media types that it reads.
    pub accepts: Vec<String>,
    /// The media type that it writes.
    pub returns: String,
    /// The program, as a path or by its name.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables beside those of the daemon, each `NAME=value`.
    pub env: Vec<String>,
}

/// `[diff]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Diff {
    /// The differs in the order in which they are asked; the first that does not answer "not implemented" counts.
    pub default: Vec<String>,
    /// The differ that unpacks into a snapshotter when an image is pulled, by the snapshotter's name; for others the first of
    /// the list that can.
    pub snapshotters: BTreeMap<String, String>,
}

impl Default for Diff {
    fn default() -> Self {
        Diff { default: vec!["walking".to_owned()], snapshotters: BTreeMap::new() }
    }
}

/// Checks what other programs are to do.
///
/// # Errors
/// [`ConfigError::Value`] names the key.
pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    let wrong = |key: &'static str, value: &str, reason: &'static str| {
        Err(ConfigError::Value { key, value: value.to_owned(), reason })
    };
    for (name, plugin) in &config.proxy_plugins {
        if name.is_empty() || name.contains('/') {
            return wrong("proxy_plugins", name, "want a name without a slash");
        }
        // sockaddr_un holds 108 bytes with the final NUL (unix(7)).
        let socket = plugin.socket();
        if !socket.is_absolute() || socket.as_os_str().len() > 107 {
            return wrong("proxy_plugins.address", &plugin.address, "want the path of a unix socket");
        }
        if !plugin.platform.is_empty() && plugin.parsed().is_none() {
            return wrong("proxy_plugins.platform", &plugin.platform, "want a platform such as linux/arm64");
        }
    }
    let of_kind = |kind| config.proxy_plugins.iter().filter(move |(_, plugin)| plugin.kind == kind);
    if let Some((name, _)) = of_kind(ProxyKind::Content).nth(1) {
        return wrong("proxy_plugins", name, "want one content store");
    }
    if let Some((name, _)) = of_kind(ProxyKind::Snapshot).nth(lane::PROXIES) {
        return wrong("proxy_plugins", name, "want at most 8 snapshotters");
    }
    for (id, processor) in &config.stream_processors {
        if processor.path == Path::new("") || processor.returns.is_empty() || processor.accepts.is_empty() {
            return wrong("stream_processors", id, "want path, accepts and returns");
        }
        if processor.env.iter().any(|variable| !super::is_variable(variable)) {
            return wrong("stream_processors.env", id, "want NAME=value");
        }
    }
    Ok(())
}
