//! The daemon's configuration: a TOML file, overridden by flags. A file of containerd's is read as well (`containerd.rs`).

mod containerd;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::LevelFilter;

/// Where the daemon looks for its configuration when no flag names a file.
pub const DEFAULT_PATH: &str = "/etc/davit/config.toml";

/// The configuration, complete: what a file leaves out has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of what must survive a reboot: blobs, snapshots, metadata.
    pub root: PathBuf,
    /// The folder of what a reboot may clear: bundles, sockets.
    pub state: PathBuf,
    /// Where the gRPC API listens.
    pub grpc: Grpc,
    /// What the daemon logs.
    pub log: Log,
    /// The database of names, labels and references.
    pub metadata: Metadata,
    /// How containers are run.
    pub runtime: Runtime,
    /// Where metrics can be read.
    pub metrics: Metrics,
    /// How containers with a restart policy are kept running.
    pub restart: Restart,
}

/// `[grpc]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grpc {
    /// The unix socket; shims report to the same path with `.ttrpc` behind it.
    pub address: PathBuf,
    /// The owner of the socket.
    pub uid: u32,
    /// The group of the socket, whose members may use it.
    pub gid: u32,
    /// The most bytes of a message that is received; containerd's default.
    pub max_recv_message_size: usize,
    /// The most bytes of a message that is sent.
    pub max_send_message_size: usize,
    /// Calls that one connection may have under way; streams count until they end.
    pub max_concurrent_calls: u32,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `trace`, `debug`, `info`, `warn` or `error`, or a filter such as `info,davit_supervisor::runtime=debug`.
    pub level: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[metadata]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metadata {
    /// The storage engine. It is chosen when a root is new; an existing root opens with the engine it was made with only.
    pub engine: Engine,
}

/// The storage engines of the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// sled 0.34.
    Sled,
    /// redb, the default: `ARCHITECTURE.md` has the figures that decided.
    Redb,
}

/// `[runtime]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// The shim that answers to `io.containerd.runc.v2` and `io.containerd.davit.v2`; empty for our own.
    pub shim: PathBuf,
    /// The folder of the shims' sockets; containerd's own tools look in the default.
    pub socket_dir: PathBuf,
    /// How long shims and OCI runtimes may take.
    pub timeouts: Timeouts,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// The TCP address of `/v1/metrics`, such as `127.0.0.1:1338`; empty for none. Who can connect can read.
    pub address: String,
}

/// `[restart]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restart {
    /// How often the daemon looks for containers to restart, in seconds; containerd's default.
    pub interval: u64,
}

/// `[runtime.timeouts]`, in seconds. The defaults are containerd's where it has a bound at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// To create a task: mounts and the OCI runtime's work.
    pub create: u64,
    /// Any other call that changes something. A client may of course give up earlier.
    pub call: u64,
    /// To answer a daemon that has just started, before a shim counts as unreachable.
    pub load: u64,
    /// To remove what a dead shim left, before that is tried again.
    pub cleanup: u64,
    /// For a shim to take note that it is not needed any more.
    pub shutdown: u64,
    /// To say the state of a task.
    pub state: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root: PathBuf::from("/var/lib/davit"),
            state: PathBuf::from("/run/davit"),
            grpc: Grpc::default(),
            log: Log::default(),
            metadata: Metadata::default(),
            runtime: Runtime::default(),
            metrics: Metrics::default(),
            restart: Restart::default(),
        }
    }
}

impl Default for Grpc {
    fn default() -> Self {
        Grpc {
            address: PathBuf::from("/run/davit/davit.sock"),
            uid: 0,
            gid: 0,
            max_recv_message_size: 16 << 20,
            max_send_message_size: 16 << 20,
            max_concurrent_calls: 4096,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Log { level: "info".into(), format: LogFormat::Text }
    }
}

impl Default for Metadata {
    fn default() -> Self {
        Metadata { engine: Engine::Redb }
    }
}

impl Default for Restart {
    fn default() -> Self {
        Restart { interval: 10 }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        let socket_dir = PathBuf::from("/run/containerd/s");
        Runtime { shim: PathBuf::new(), socket_dir, timeouts: Timeouts::default() }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { create: 240, call: 120, load: 5, cleanup: 5, shutdown: 3, state: 2 }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML, or has a key that we do not know.
    #[error("the configuration {} is not valid", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A file of containerd's that cannot be understood.
    #[error("the containerd configuration {}: {rule}", path.display())]
    Containerd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        rule: String,
    },
    /// A value that cannot work.
    #[error("{key} = {value:?}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wanted.
        reason: &'static str,
    },
}

/// A configuration that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// What it says.
    pub config: Config,
    /// The keys of containerd's file that have no effect.
    pub ignored: Vec<String>,
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn parse<T: serde::de::DeserializeOwned>(text: &str, path: &Path) -> Result<T, ConfigError> {
    toml::from_str(text)
        .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

impl Config {
    /// Reads `path`, or the default file if it exists, or takes the defaults. A file of containerd's is understood as far as
    /// it can be.
    ///
    /// # Errors
    /// A file that was named but cannot be read, and any file that is not valid: a typo must not become a default.
    pub fn load(path: Option<&Path>) -> Result<Loaded, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let ours = |config| Loaded { config, ignored: Vec::new() };
        let text = match read_file(file) {
            Err(ConfigError::Read { source, .. })
                if path.is_none() && source.kind() == std::io::ErrorKind::NotFound =>
            {
                return Ok(ours(Config::default()));
            }
            text => text?,
        };
        let table = parse(&text, file)?;
        if containerd::is_one(&table) {
            let (config, ignored) = containerd::read(file, table)?;
            return Ok(Loaded { config, ignored });
        }
        parse(&text, file).map(ours)
    }

    /// Checks what only the whole can tell.
    ///
    /// # Errors
    /// [`ConfigError::Value`] names the key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let paths = [("root", &self.root), ("state", &self.state), ("grpc.address", &self.grpc.address)];
        for (key, path) in paths {
            if !path.is_absolute() {
                let value = path.display().to_string();
                return Err(ConfigError::Value { key, value, reason: "want an absolute path" });
            }
        }
        if self.root == self.state {
            let value = self.state.display().to_string();
            return Err(ConfigError::Value { key: "state", value, reason: "want another folder than root" });
        }
        // A bare word that is no level would be a filter for a module of that name, and silence all others.
        if !self.log.level.contains('=') && self.log.level.parse::<LevelFilter>().is_err() {
            let (key, value) = ("log.level", self.log.level.clone());
            let reason = "want trace, debug, info, warn, error, or a filter with `=`";
            return Err(ConfigError::Value { key, value, reason });
        }
        let metrics = &self.metrics.address;
        if !metrics.is_empty() && metrics.parse::<std::net::SocketAddr>().is_err() {
            let reason = "want an address and a port, such as 127.0.0.1:1338";
            return Err(ConfigError::Value { key: "metrics.address", value: metrics.clone(), reason });
        }
        let timeouts = &self.runtime.timeouts;
        for (key, seconds) in [
            ("runtime.timeouts.create", timeouts.create),
            ("runtime.timeouts.call", timeouts.call),
            ("runtime.timeouts.load", timeouts.load),
            ("runtime.timeouts.cleanup", timeouts.cleanup),
            ("runtime.timeouts.shutdown", timeouts.shutdown),
            ("runtime.timeouts.state", timeouts.state),
            ("restart.interval", self.restart.interval),
        ] {
            if !(1..=86400).contains(&seconds) {
                let reason = "want from 1 second to a day";
                return Err(ConfigError::Value { key, value: seconds.to_string(), reason });
            }
        }
        // sockaddr_un holds 108 bytes with the final NUL (unix(7)), and `.ttrpc` goes behind the path.
        if self.grpc.address.as_os_str().len() + ".ttrpc".len() > 104 {
            let value = self.grpc.address.display().to_string();
            return Err(ConfigError::Value { key: "grpc.address", value, reason: "want at most 98 bytes" });
        }
        Ok(())
    }

    /// The socket that shims report to.
    pub fn ttrpc_address(&self) -> PathBuf {
        let mut path = self.grpc.address.clone().into_os_string();
        path.push(".ttrpc");
        PathBuf::from(path)
    }

    /// The configuration as a file.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("the configuration holds nothing that TOML cannot say")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_reads_back() {
        let config = Config::default();
        assert_eq!(toml::from_str::<Config>(&config.to_toml()).unwrap(), config);
        config.validate().unwrap();
    }

    #[test]
    fn a_typo_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "[grpc]\nadress = \"/x\"\n").unwrap();
        let error = Config::load(Some(&path)).unwrap_err();
        assert!(davit_model::error::chain(&error).contains("adress"), "{error}");
    }

    #[test]
    fn a_missing_file_counts_only_when_it_was_named() {
        assert!(Config::load(Some(Path::new("/nonexistent/davit.toml"))).is_err());
    }

    #[test]
    fn a_socket_path_that_cannot_be_bound_is_refused() {
        let mut config = Config::default();
        config.grpc.address = PathBuf::from(format!("/{}", "x".repeat(100)));
        assert!(config.validate().is_err());
    }

    #[test]
    fn a_timeout_of_nothing_is_refused() {
        let mut config = Config::default();
        config.runtime.timeouts.call = 0;
        assert!(config.validate().unwrap_err().to_string().contains("runtime.timeouts.call"));
    }
}
