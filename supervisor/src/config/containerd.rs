//! Configuration files of containerd, of any version from none to 4, so that a daemon in its place starts with the file that is
//! there: Docker Engine writes one for the containerd that it starts, and distributions ship one.
//!
//! What such a file says and this daemon has is honoured; all else is named, once, and has no effect, as containerd does
//! with keys that it does not know. The defaults are then containerd's own, for the places as well.

mod files;
mod proxies;
mod snapshotters;

use std::path::{Path, PathBuf};

use davit_model::duration;
use toml::{Table, Value};

use super::{Config, ConfigError, LogFormat, Sharing, TracingProtocol};

/// Keys that only containerd's files have, at their top.
const MARKS: [&str; 11] = [
    "version",
    "temp",
    "debug",
    "disabled_plugins",
    "required_plugins",
    "plugins",
    "oom_score",
    "cgroup",
    "timeouts",
    "imports",
    "ttrpc",
];

/// Whether a file is one of containerd's. One that could be either is ours.
pub(super) fn is_one(file: &Table) -> bool {
    let tcp = |grpc: &Table| grpc.keys().any(|key| key.starts_with("tcp_"));
    MARKS.iter().any(|key| file.contains_key(*key))
        || file.get("grpc").and_then(Value::as_table).is_some_and(tcp)
}

/// Reads such a file and what it imports. Gives the configuration and the keys without effect.
///
/// # Errors
/// A file that cannot be read, is of a newer version, or has a value that cannot be what its key needs.
pub(super) fn read(path: &Path, file: Table) -> Result<(Config, Vec<String>), ConfigError> {
    let merged = files::merged(path, file)?;
    let mut reader = Reader { path, ignored: Vec::new() };
    let config = reader.config(merged)?;
    Ok((config, reader.ignored))
}

/// Where version 4 has the settings of a server, and where the older ones do.
#[derive(Clone, Copy)]
enum Place {
    /// At the top of the file.
    Top(&'static str),
    /// Below `plugins`.
    Plugin(&'static str),
}

/// A table that is being read: what is taken out of it is honoured, and the rest is named in the end.
struct Section {
    /// What stands before each key when it is named.
    prefix: String,
    table: Table,
}

/// Takes the settings out of a file, and keeps a list of what is left.
struct Reader<'a> {
    path: &'a Path,
    ignored: Vec<String>,
}

impl Reader<'_> {
    fn config(&mut self, file: Table) -> Result<Config, ConfigError> {
        let mut config = Config {
            root: PathBuf::from("/var/lib/containerd"),
            state: PathBuf::from("/run/containerd"),
            ..Config::default()
        };
        config.grpc.address = PathBuf::from("/run/containerd/containerd.sock");

        let mut file = Section { prefix: String::new(), table: file };
        self.path_of(&mut file, "root", &mut config.root)?;
        self.path_of(&mut file, "state", &mut config.state)?;
        self.path_of(&mut file, "temp", &mut config.process.temp)?;
        self.number(&mut file, "oom_score", &mut config.process.oom_score)?;
        let mut cgroup =
            Section { prefix: "cgroup.".to_owned(), table: self.table(&mut file.table, "cgroup", "cgroup")? };
        self.path_of(&mut cgroup, "path", &mut config.process.cgroup)?;
        self.ignore_rest(cgroup);
        let mut plugins = Section {
            prefix: "plugins.".to_owned(),
            table: self.table(&mut file.table, "plugins", "plugins")?,
        };

        config.plugin_list.required = self.list(&mut file, "required_plugins")?;
        config.plugin_list.disabled = self.list(&mut file, "disabled_plugins")?;
        self.grpc(&mut file, &mut plugins, &mut config)?;
        self.ttrpc(&mut file, &mut plugins, &config)?;
        self.tcp(&mut plugins, &mut config)?;
        self.debug(&mut file, &mut plugins, &mut config)?;
        self.metrics(&mut file, &mut plugins, &mut config)?;
        self.tracing(&mut plugins, &mut config)?;
        self.metadata(&mut plugins, &mut config)?;
        self.runtime(&mut file, &mut plugins, &mut config)?;
        self.proxies(&mut file, &mut plugins, &mut config)?;
        self.snapshotters(&mut plugins, &mut config)?;
        self.ignored.extend(plugins.table.into_iter().map(|(name, _)| format!("plugins.{name:?}")));
        self.ignore_rest(file);
        self.ignored.sort();
        Ok(config)
    }

    fn grpc(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        for place in [Place::Top("grpc"), Place::Plugin("io.containerd.server.v1.grpc")] {
            let mut grpc = self.section(file, plugins, place)?;
            self.path_of(&mut grpc, "address", &mut config.grpc.address)?;
            self.number(&mut grpc, "uid", &mut config.grpc.uid)?;
            self.number(&mut grpc, "gid", &mut config.grpc.gid)?;
            self.some_number(&mut grpc, "max_recv_message_size", &mut config.grpc.max_recv_message_size)?;
            self.some_number(&mut grpc, "max_send_message_size", &mut config.grpc.max_send_message_size)?;
            if matches!(place, Place::Top(_)) {
                self.tcp_keys(&mut grpc, "tcp_", config)?;
            }
            self.ignore_rest(grpc);
        }
        Ok(())
    }

    fn tcp(&mut self, plugins: &mut Section, config: &mut Config) -> Result<(), ConfigError> {
        let mut tcp = self.plugin(plugins, "io.containerd.server.v1.grpc-tcp")?;
        self.tcp_keys(&mut tcp, "", config)?;
        // There is one API, and so one size; another one here would have no effect.
        for (key, ours) in [
            ("max_recv_message_size", config.grpc.max_recv_message_size),
            ("max_send_message_size", config.grpc.max_send_message_size),
        ] {
            let mut size = ours;
            self.some_number(&mut tcp, key, &mut size)?;
            if size != ours {
                self.ignored.push(format!("{}{key}", tcp.prefix));
            }
        }
        self.ignore_rest(tcp);
        Ok(())
    }

    /// The settings of the server on TCP. That of its name in the certificate store of Windows (`tls_common_name`) has no
    /// effect in containerd on Linux either; it says nothing of who may call.
    fn tcp_keys(
        &mut self,
        section: &mut Section,
        before: &str,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        let tcp = &mut config.grpc.tcp;
        if let Some(address) = self.text(section, &format!("{before}address"))? {
            // Go listens on all addresses where none stands before the port.
            tcp.address = if address.starts_with(':') { format!("[::]{address}") } else { address };
        }
        self.path_of(section, &format!("{before}tls_ca"), &mut tcp.ca)?;
        self.path_of(section, &format!("{before}tls_cert"), &mut tcp.cert)?;
        self.path_of(section, &format!("{before}tls_key"), &mut tcp.key)
    }

    fn ttrpc(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        config: &Config,
    ) -> Result<(), ConfigError> {
        for place in [Place::Top("ttrpc"), Place::Plugin("io.containerd.server.v1.ttrpc")] {
            let mut ttrpc = self.section(file, plugins, place)?;
            // Shims find it beside the other socket, and there it is.
            let mut address = PathBuf::new();
            self.path_of(&mut ttrpc, "address", &mut address)?;
            if !address.as_os_str().is_empty() && address != config.ttrpc_address() {
                self.ignored.push(format!("{}address", ttrpc.prefix));
            }
            // Only root may report events: the socket is its alone.
            self.ignore_rest(ttrpc);
        }
        Ok(())
    }

    fn debug(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        for place in [Place::Top("debug"), Place::Plugin("io.containerd.server.v1.debug")] {
            let mut debug = self.section(file, plugins, place)?;
            if matches!(place, Place::Top(_)) {
                self.log(&mut debug, config)?;
            }
            if let Some(address) = self.text(&mut debug, "address")? {
                // Go would listen on TCP, where every user of the host may look.
                if address.starts_with('/') {
                    config.diagnostics.address = PathBuf::from(address);
                } else {
                    self.ignored.push(format!("{}address", debug.prefix));
                }
            }
            self.number(&mut debug, "uid", &mut config.diagnostics.uid)?;
            self.number(&mut debug, "gid", &mut config.diagnostics.gid)?;
            self.ignore_rest(debug);
        }
        Ok(())
    }

    fn log(&mut self, debug: &mut Section, config: &mut Config) -> Result<(), ConfigError> {
        if let Some(level) = self.text(debug, "level")? {
            config.log.level = match level.as_str() {
                "fatal" | "panic" => "error".into(),
                "warning" => "warn".into(),
                _ => level,
            };
        }
        match self.text(debug, "format")?.as_deref() {
            Some("json") => config.log.format = LogFormat::Json,
            Some("text") | None => {}
            Some(_) => return Err(self.wrong("debug.format".to_owned(), "text or json")),
        }
        Ok(())
    }

    fn metrics(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        let places = [
            Place::Top("metrics"),
            Place::Plugin("io.containerd.server.v1.metrics"),
            Place::Plugin("io.containerd.metrics.v1.grpc-prometheus"),
        ];
        for place in places {
            let mut metrics = self.section(file, plugins, place)?;
            if let Some(address) = self.text(&mut metrics, "address")? {
                config.metrics.address =
                    if address.starts_with(':') { format!("[::]{address}") } else { address };
            }
            self.truth(&mut metrics, "grpc_histogram", &mut config.metrics.grpc_histogram)?;
            self.ignore_rest(metrics);
        }
        let tasks = "io.containerd.monitor.task.v1.cgroups";
        for name in ["io.containerd.monitor.v1.cgroups", tasks] {
            let mut monitor = self.plugin(plugins, name)?;
            let mut none = false;
            self.truth(&mut monitor, "no_prometheus", &mut none)?;
            if none {
                config.plugin_list.disabled.push(tasks.to_owned());
            }
            self.ignore_rest(monitor);
        }
        Ok(())
    }

    fn tracing(&mut self, plugins: &mut Section, config: &mut Config) -> Result<(), ConfigError> {
        let mut otlp = self.plugin(plugins, "io.containerd.tracing.processor.v1.otlp")?;
        let mut insecure = false;
        self.truth(&mut otlp, "insecure", &mut insecure)?;
        match self.text(&mut otlp, "protocol")?.as_deref() {
            Some("grpc") => config.tracing.protocol = TracingProtocol::Grpc,
            Some("http/protobuf") | None => {}
            Some(_) => return Err(self.wrong(format!("{}protocol", otlp.prefix), "http/protobuf or grpc")),
        }
        if let Some(endpoint) = self.text(&mut otlp, "endpoint")? {
            let scheme = if insecure { "http" } else { "https" };
            config.tracing.endpoint =
                if endpoint.contains("://") { endpoint } else { format!("{scheme}://{endpoint}") };
        }
        self.ignore_rest(otlp);
        let mut tracing = self.plugin(plugins, "io.containerd.internal.v1.tracing")?;
        if let Some(name) = self.text(&mut tracing, "service_name")? {
            config.tracing.service_name = name;
        }
        self.fraction(&mut tracing, "sampling_ratio", &mut config.tracing.sampling_ratio)?;
        self.ignore_rest(tracing);
        Ok(())
    }

    fn metadata(&mut self, plugins: &mut Section, config: &mut Config) -> Result<(), ConfigError> {
        let mut bolt = self.plugin(plugins, "io.containerd.metadata.v1.bolt")?;
        match self.text(&mut bolt, "content_sharing_policy")?.as_deref() {
            Some("isolated") => config.metadata.sharing = Sharing::Isolated,
            Some("shared") | None => {}
            Some(_) => {
                let key = format!("{}content_sharing_policy", bolt.prefix);
                return Err(self.wrong(key, "shared or isolated"));
            }
        }
        self.ignore_rest(bolt);
        let mut scheduler = self.plugin(plugins, "io.containerd.gc.v1.scheduler")?;
        let gc = &mut config.metadata.gc;
        self.fraction(&mut scheduler, "pause_threshold", &mut gc.pause_threshold)?;
        self.number(&mut scheduler, "deletion_threshold", &mut gc.deletion_threshold)?;
        self.number(&mut scheduler, "mutation_threshold", &mut gc.mutation_threshold)?;
        for (key, to) in
            [("schedule_delay", &mut gc.schedule_delay_ms), ("startup_delay", &mut gc.startup_delay_ms)]
        {
            if let Some(seconds) = self.duration(&mut scheduler, key)? {
                *to = (seconds * 1e3) as u64;
            }
        }
        self.ignore_rest(scheduler);
        Ok(())
    }

    fn runtime(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        let mut shims = self.plugin(plugins, "io.containerd.shim.v1.manager")?;
        self.path_of(&mut shims, "socket_dir", &mut config.runtime.socket_dir)?;
        config.runtime.environment = self.list(&mut shims, "env")?;
        self.ignore_rest(shims);
        for name in ["io.containerd.internal.v1.restart", "io.containerd.monitor.container.v1.restart"] {
            let mut restart = self.plugin(plugins, name)?;
            self.seconds(&mut restart, "interval", &mut config.restart.interval)?;
            self.ignore_rest(restart);
        }
        let mut timeouts = self.section(file, plugins, Place::Top("timeouts"))?;
        let ours = &mut config.runtime.timeouts;
        for (key, to) in [
            ("io.containerd.timeout.shim.load", &mut ours.load),
            ("io.containerd.timeout.shim.cleanup", &mut ours.cleanup),
            ("io.containerd.timeout.shim.shutdown", &mut ours.shutdown),
            ("io.containerd.timeout.task.state", &mut ours.state),
            ("io.containerd.timeout.metrics.shimstats", &mut ours.stats),
        ] {
            self.seconds(&mut timeouts, key, to)?;
        }
        // One that is no time is refused as well when nothing is bound by it.
        let names: Vec<String> = timeouts.table.keys().cloned().collect();
        for name in names {
            if self.duration(&mut timeouts, &name)?.is_some_and(|seconds| seconds > 0.0) {
                self.ignored.push(format!("timeouts.{name:?}"));
            }
        }
        Ok(())
    }

    fn wrong(&self, key: String, wanted: &'static str) -> ConfigError {
        ConfigError::Containerd { path: self.path.to_owned(), rule: format!("{key}: want {wanted}") }
    }

    fn section(
        &self,
        file: &mut Section,
        plugins: &mut Section,
        place: Place,
    ) -> Result<Section, ConfigError> {
        match place {
            Place::Plugin(name) => self.plugin(plugins, name),
            Place::Top(name) => {
                let table = self.table(&mut file.table, name, name)?;
                Ok(Section { prefix: format!("{name}."), table })
            }
        }
    }

    fn plugin(&self, plugins: &mut Section, name: &str) -> Result<Section, ConfigError> {
        let shown = format!("plugins.{name:?}");
        let table = self.table(&mut plugins.table, name, &shown)?;
        Ok(Section { prefix: format!("{shown}."), table })
    }

    /// Takes a table out of another; an empty one if it is not there.
    fn table(&self, from: &mut Table, key: &str, shown: &str) -> Result<Table, ConfigError> {
        match from.remove(key) {
            None => Ok(Table::new()),
            Some(Value::Table(table)) => Ok(table),
            Some(_) => Err(self.wrong(shown.to_owned(), "a table")),
        }
    }

    /// Takes a text; none for an empty one, which stands for the default.
    fn text(&self, from: &mut Section, key: &str) -> Result<Option<String>, ConfigError> {
        match from.table.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(_) => Err(self.wrong(format!("{}{key}", from.prefix), "a text")),
        }
    }

    fn path_of(&self, from: &mut Section, key: &str, to: &mut PathBuf) -> Result<(), ConfigError> {
        if let Some(path) = self.text(from, key)? {
            *to = PathBuf::from(path);
        }
        Ok(())
    }

    /// Takes a list of texts; an empty one if it is not there.
    fn list(&self, from: &mut Section, key: &str) -> Result<Vec<String>, ConfigError> {
        let wrong = || self.wrong(format!("{}{key}", from.prefix), "a list of texts");
        match from.table.remove(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                list.into_iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
            }
            Some(_) => Err(wrong()),
        }
    }

    fn truth(&self, from: &mut Section, key: &str, to: &mut bool) -> Result<(), ConfigError> {
        match from.table.remove(key) {
            None => Ok(()),
            Some(Value::Boolean(truth)) => {
                *to = truth;
                Ok(())
            }
            Some(_) => Err(self.wrong(format!("{}{key}", from.prefix), "true or false")),
        }
    }

    fn fraction(&self, from: &mut Section, key: &str, to: &mut f64) -> Result<(), ConfigError> {
        if let Some(value) = from.table.remove(key) {
            let number = value.as_float().or(value.as_integer().map(|number| number as f64));
            *to = number.ok_or_else(|| self.wrong(format!("{}{key}", from.prefix), "a number"))?;
        }
        Ok(())
    }

    fn number<N: TryFrom<i64>>(&self, from: &mut Section, key: &str, to: &mut N) -> Result<(), ConfigError> {
        if let Some(value) = from.table.remove(key) {
            let number = value.as_integer().and_then(|number| N::try_from(number).ok());
            let wrong = || self.wrong(format!("{}{key}", from.prefix), "a number that is not negative");
            *to = number.ok_or_else(wrong)?;
        }
        Ok(())
    }

    /// Takes a number; nothing is what a file says that leaves it to the daemon.
    fn some_number(&self, from: &mut Section, key: &str, to: &mut usize) -> Result<(), ConfigError> {
        let mut number = 0;
        self.number(from, key, &mut number)?;
        if number > 0 {
            *to = number;
        }
        Ok(())
    }

    /// Takes a duration, in seconds.
    fn duration(&self, from: &mut Section, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(text) = self.text(from, key)? else { return Ok(None) };
        let wrong = || self.wrong(format!("{}{key}", from.prefix), "a time such as \"10s\"");
        seconds(&text).map(Some).ok_or_else(wrong)
    }

    /// Takes a duration in whole seconds; what is less than one counts as one, and nothing is the default.
    fn seconds(&self, from: &mut Section, key: &str, to: &mut u64) -> Result<(), ConfigError> {
        if let Some(seconds) = self.duration(from, key)?
            && seconds > 0.0
        {
            *to = seconds.ceil() as u64;
        }
        Ok(())
    }

    fn ignore_rest(&mut self, rest: Section) {
        // What says nothing has no effect in containerd either.
        let said = rest.table.into_iter().filter(|(_, value)| says_something(value));
        self.ignored.extend(said.map(|(key, _)| format!("{}{key}", rest.prefix)));
    }
}

/// Whether a value is another than the zero of its type, which stands for "not given" in Go.
fn says_something(value: &Value) -> bool {
    match value {
        Value::String(text) => !text.is_empty(),
        Value::Table(table) => table.iter().any(|(_, value)| says_something(value)),
        Value::Array(list) => !list.is_empty(),
        Value::Integer(number) => *number != 0,
        Value::Boolean(truth) => *truth,
        Value::Float(_) | Value::Datetime(_) => true,
    }
}

/// A duration as Go writes it, such as `1h30m` or `1.5s`, in seconds; it is of no use here if it is negative.
fn seconds(text: &str) -> Option<f64> {
    duration::nanoseconds(text).filter(|length| *length >= 0.0).map(|length| length / 1e9)
}

#[cfg(test)]
mod tests;
