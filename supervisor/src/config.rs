//! The daemon's configuration: a TOML file, overridden by flags. A file of containerd's is read as well (`containerd.rs`).

mod containerd;
mod proxies;
mod sections;
mod snapshotters;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use proxies::*;
pub use sections::*;
pub use snapshotters::*;

use crate::logs;

/// Where the daemon looks for its configuration when no flag names a file.
pub const DEFAULT_PATH: &str = "/etc/davit/config.toml";

/// The configuration, complete: what a file leaves out has its default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Where the daemon can be looked into.
    pub diagnostics: Diagnostics,
    /// Where spans of calls are sent.
    pub tracing: Tracing,
    /// What of the plugin list must be there, and what must not.
    pub plugin_list: PluginList,
    /// The daemon's own process.
    pub process: Process,
    /// The differs.
    pub diff: Diff,
    /// The snapshotters.
    pub snapshotters: Snapshotters,
    /// Snapshotters and the like in other processes, by name.
    pub proxy_plugins: BTreeMap<String, ProxyPlugin>,
    /// Programs that unpack layers of other types, by id.
    pub stream_processors: BTreeMap<String, StreamProcessor>,
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
            diagnostics: Diagnostics::default(),
            tracing: Tracing::default(),
            plugin_list: PluginList::default(),
            process: Process::default(),
            diff: Diff::default(),
            snapshotters: Snapshotters::default(),
            proxy_plugins: BTreeMap::new(),
            stream_processors: BTreeMap::new(),
        }
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
#[derive(Debug, Clone, PartialEq)]
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
        if logs::filter(&self.log.level).is_err() {
            let (key, value) = ("log.level", self.log.level.clone());
            let reason = "want trace, debug, info, warn, error, or a filter with `=`";
            return Err(ConfigError::Value { key, value, reason });
        }
        let tcp = &self.grpc.tcp;
        for (key, address) in [("metrics.address", &self.metrics.address), ("grpc.tcp.address", &tcp.address)]
        {
            if !address.is_empty() && address.parse::<std::net::SocketAddr>().is_err() {
                let reason = "want an address and a port, such as 127.0.0.1:1338";
                return Err(ConfigError::Value { key, value: address.clone(), reason });
            }
        }
        // Whoever may call is root on this host. On the loopback that would be each of its users, and each container in
        // its network namespace.
        if !tcp.address.is_empty() {
            for (key, path) in
                [("grpc.tcp.cert", &tcp.cert), ("grpc.tcp.key", &tcp.key), ("grpc.tcp.ca", &tcp.ca)]
            {
                if path.as_os_str().is_empty() {
                    let reason = "the API is served over TCP with mutual TLS only: want cert, key and ca";
                    return Err(ConfigError::Value { key, value: String::new(), reason });
                }
            }
        }
        let diagnostics = &self.diagnostics.address;
        if !diagnostics.as_os_str().is_empty() && !diagnostics.is_absolute() {
            let (key, value) = ("diagnostics.address", diagnostics.display().to_string());
            return Err(ConfigError::Value { key, value, reason: "want the absolute path of a unix socket" });
        }
        if *diagnostics == self.grpc.address || *diagnostics == self.ttrpc_address() {
            let (key, value) = ("diagnostics.address", diagnostics.display().to_string());
            let reason = "want another socket than grpc.address and the one beside it that ends in .ttrpc";
            return Err(ConfigError::Value { key, value, reason });
        }
        for name in self.plugin_list.required.iter().chain(&self.plugin_list.disabled) {
            if !name.contains('.') {
                let reason = "want a type and an id, such as io.containerd.snapshotter.v1.native";
                return Err(ConfigError::Value { key: "plugin_list", value: name.clone(), reason });
            }
        }
        if !(-1000..=1000).contains(&self.process.oom_score) {
            let (key, value) = ("process.oom_score", self.process.oom_score.to_string());
            return Err(ConfigError::Value { key, value, reason: "want from -1000 to 1000" });
        }
        for (key, given) in [
            ("grpc.max_recv_message_size", self.grpc.max_recv_message_size),
            ("grpc.max_send_message_size", self.grpc.max_send_message_size),
            ("grpc.max_concurrent_calls", self.grpc.max_concurrent_calls as usize),
        ] {
            if given == 0 {
                return Err(ConfigError::Value { key, value: "0".into(), reason: "want one at least" });
            }
        }
        let temp = &self.process.temp;
        if !temp.as_os_str().is_empty() && !temp.is_absolute() {
            let (key, value) = ("process.temp", temp.display().to_string());
            return Err(ConfigError::Value { key, value, reason: "want an absolute path" });
        }
        if let Some(wrong) = self.runtime.environment.iter().find(|variable| !is_variable(variable)) {
            let (key, value) = ("runtime.environment", wrong.clone());
            return Err(ConfigError::Value { key, value, reason: "want NAME=value" });
        }
        if !(0.0..=1.0).contains(&self.tracing.sampling_ratio) {
            let (key, value) = ("tracing.sampling_ratio", self.tracing.sampling_ratio.to_string());
            return Err(ConfigError::Value { key, value, reason: "want from 0 to 1" });
        }
        let timeouts = &self.runtime.timeouts;
        for (key, seconds) in [
            ("runtime.timeouts.create", timeouts.create),
            ("runtime.timeouts.call", timeouts.call),
            ("runtime.timeouts.load", timeouts.load),
            ("runtime.timeouts.cleanup", timeouts.cleanup),
            ("runtime.timeouts.shutdown", timeouts.shutdown),
            ("runtime.timeouts.state", timeouts.state),
            ("runtime.timeouts.stats", timeouts.stats),
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
        proxies::validate(self)
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

/// Whether a text is `NAME=value`, as environ(7) has it.
fn is_variable(text: &str) -> bool {
    text.split_once('=').is_some_and(|(name, value)| !name.is_empty() && !value.contains('\0'))
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

    #[test]
    fn tcp_without_mutual_tls_is_refused() {
        let tcp = |rest: &str| {
            let text = format!("[grpc.tcp]\naddress = \"127.0.0.1:7777\"\n{rest}");
            toml::from_str::<Config>(&text).unwrap().validate().map_err(|error| error.to_string())
        };
        for (given, missing) in [
            ("", "grpc.tcp.cert"),
            ("cert = \"/c\"\n", "grpc.tcp.key"),
            ("cert = \"/c\"\nkey = \"/k\"\n", "grpc.tcp.ca"),
            ("ca = \"/a\"\n", "grpc.tcp.cert"),
        ] {
            let error = tcp(given).unwrap_err();
            assert!(error.starts_with(missing) && error.contains("mutual TLS only"), "{given}: {error}");
        }
        tcp("cert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\n").unwrap();
    }

    #[test]
    fn values_that_cannot_work_are_refused_and_named() {
        for (text, words) in [
            ("[grpc.tcp]\naddress = \"localhost\"", "grpc.tcp.address = \"localhost\": want an address"),
            ("[diagnostics]\naddress = \"127.0.0.1:6060\"", "diagnostics.address"),
            (
                "[grpc]\naddress = \"/a\"\n[diagnostics]\naddress = \"/a\"",
                "diagnostics.address = \"/a\": want ano",
            ),
            ("[grpc]\naddress = \"/a\"\n[diagnostics]\naddress = \"/a.ttrpc\"", "want another socket"),
            ("[plugin_list]\nrequired = [\"cri\"]", "plugin_list = \"cri\": want a type and an id"),
            ("[process]\noom_score = 1001", "process.oom_score"),
            ("[process]\ntemp = \"tmp\"", "process.temp"),
            ("[runtime]\nenvironment = [\"A\"]", "runtime.environment"),
            ("[tracing]\nsampling_ratio = 1.5", "tracing.sampling_ratio"),
            ("[log]\nlevel = \"loud\"", "log.level = \"loud\": want trace"),
            ("[log]\nlevel = \"davit=loud\"", "log.level"),
            ("[grpc]\nmax_concurrent_calls = 0", "grpc.max_concurrent_calls"),
            ("[grpc]\nmax_send_message_size = 0", "grpc.max_send_message_size"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap().validate().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
