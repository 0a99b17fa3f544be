//! Configuration files of containerd, of any version from none to 4, so that a daemon in its place starts with the file that is
//! there: Docker Engine writes one for the containerd that it starts, and distributions ship one.
//!
//! What such a file says and this daemon has is honoured; all else is named, once, and has no effect, as containerd does
//! with keys that it does not know. Files that it imports are read after it, each over those before: a value replaces a
//! value, lists are united, tables are merged. The defaults are then containerd's own, for the places as well.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Component, Path, PathBuf};

use toml::{Table, Value};

use super::{Config, ConfigError, LogFormat};

/// The newest version of the file that is understood.
const NEWEST: i64 = 4;

/// Keys that only containerd's files have, at their top.
const MARKS: [&str; 13] = [
    "version",
    "temp",
    "debug",
    "disabled_plugins",
    "required_plugins",
    "plugins",
    "oom_score",
    "cgroup",
    "proxy_plugins",
    "timeouts",
    "imports",
    "stream_processors",
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
    let mut merged = Table::new();
    let mut seen = BTreeSet::from([clean(path)]);
    let mut pending = VecDeque::from([(path.to_owned(), file)]);
    let mut root_version = None;
    while let Some((path, mut file)) = pending.pop_front() {
        let version = version(&path, &file)?;
        let root_version = *root_version.get_or_insert(version);
        if version > root_version {
            let rule =
                format!("drop-in config version {version} higher than root config version {root_version}");
            return Err(ConfigError::Containerd { path, rule });
        }
        file.remove("version");
        let imports = file.remove("imports");
        for import in imports.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str) {
            for import in resolve(&path, import)? {
                if seen.insert(import.clone()) {
                    let table = super::parse(&super::read_file(&import)?, &import)?;
                    pending.push_back((import, table));
                }
            }
        }
        if version < 2 {
            rename_plugins(&mut file);
        }
        merge(&mut merged, file);
    }
    let mut reader = Reader { path, ignored: Vec::new() };
    let config = reader.config(merged)?;
    Ok((config, reader.ignored))
}

fn version(path: &Path, file: &Table) -> Result<i64, ConfigError> {
    let version = file.get("version").map_or(Some(0), Value::as_integer);
    match version {
        Some(version @ 0..=NEWEST) => Ok(version),
        Some(version) => {
            let rule = format!(
                "expected containerd config version equal to or less than `{NEWEST}`, got `{version}`"
            );
            Err(ConfigError::Containerd { path: path.to_owned(), rule })
        }
        None => Err(ConfigError::Containerd { path: path.to_owned(), rule: "version is no number".into() }),
    }
}

/// The files that an import names: relative to the folder of the file that imports, with `*` in the last part.
fn resolve(from: &Path, import: &str) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = from.parent().unwrap_or(Path::new("/"));
    let path = clean(&folder.join(import));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !import.contains('*') {
        return Ok(vec![path]);
    }
    let parent = path.parent().unwrap_or(folder);
    if parent.display().to_string().contains('*') {
        let rule = format!("import {import:?} has a `*` in the name of a folder");
        return Err(ConfigError::Containerd { path: from.to_owned(), rule });
    }
    // A folder that is not there holds nothing that matches.
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|found| matches(name, found)).collect();
    names.sort();
    Ok(names.into_iter().map(|name| parent.join(name)).collect())
}

/// Whether a name is of a pattern in which each `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            rest.char_indices().map(|(at, _)| at).chain([rest.len()]).any(|at| matches(after, &rest[at..]))
        }),
    }
}

/// Lays one file over what was read before.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (Some(Value::Array(old)), Value::Array(new)) => {
                for item in new {
                    if !old.contains(&item) {
                        old.push(item);
                    }
                }
            }
            (_, new) => {
                into.insert(key, new);
            }
        }
    }
}

/// Gives the plugins of a file without version their full names. Of those that matter here only these had settings.
fn rename_plugins(file: &mut Table) {
    let full = |name: &str| match name {
        "restart" => "io.containerd.internal.v1.restart".to_owned(),
        "cri" => "io.containerd.grpc.v1.cri".to_owned(),
        "linux" => "io.containerd.runtime.v1.linux".to_owned(),
        "scheduler" => "io.containerd.gc.v1.scheduler".to_owned(),
        other => other.to_owned(),
    };
    if let Some(Value::Table(plugins)) = file.get_mut("plugins") {
        *plugins = std::mem::take(plugins).into_iter().map(|(name, table)| (full(&name), table)).collect();
    }
}

/// Takes the settings out of a file, and keeps a list of what is left.
struct Reader<'a> {
    path: &'a Path,
    ignored: Vec<String>,
}

impl Reader<'_> {
    fn config(&mut self, mut file: Table) -> Result<Config, ConfigError> {
        let mut config = Config {
            root: PathBuf::from("/var/lib/containerd"),
            state: PathBuf::from("/run/containerd"),
            ..Config::default()
        };
        config.grpc.address = PathBuf::from("/run/containerd/containerd.sock");

        self.path_of(&mut file, "", "root", &mut config.root)?;
        self.path_of(&mut file, "", "state", &mut config.state)?;
        let mut plugins = self.table(&mut file, "plugins")?;
        // Where version 4 has the settings of the server, and where the others do.
        for (name, of_plugins) in [("grpc", false), ("io.containerd.server.v1.grpc", true)] {
            let (from, prefix) = match of_plugins {
                true => (&mut plugins, format!("plugins.{name:?}.")),
                false => (&mut file, format!("{name}.")),
            };
            let mut grpc = self.table(from, name)?;
            self.path_of(&mut grpc, &prefix, "address", &mut config.grpc.address)?;
            self.number(&mut grpc, &prefix, "uid", &mut config.grpc.uid)?;
            self.number(&mut grpc, &prefix, "gid", &mut config.grpc.gid)?;
            let mut sizes = [0_usize; 2];
            self.number(&mut grpc, &prefix, "max_recv_message_size", &mut sizes[0])?;
            self.number(&mut grpc, &prefix, "max_send_message_size", &mut sizes[1])?;
            // Nothing is what a file says that leaves it to the daemon.
            for (size, to) in sizes
                .iter()
                .zip([&mut config.grpc.max_recv_message_size, &mut config.grpc.max_send_message_size])
            {
                if *size > 0 {
                    *to = *size;
                }
            }
            self.ignore_rest(&prefix, grpc);
        }
        for (name, of_plugins) in [("ttrpc", false), ("io.containerd.server.v1.ttrpc", true)] {
            let (from, prefix) = match of_plugins {
                true => (&mut plugins, format!("plugins.{name:?}.")),
                false => (&mut file, format!("{name}.")),
            };
            let mut ttrpc = self.table(from, name)?;
            // Shims find it beside the other socket, and there it is.
            let mut address = PathBuf::new();
            self.path_of(&mut ttrpc, &prefix, "address", &mut address)?;
            if !address.as_os_str().is_empty() && address != config.ttrpc_address() {
                self.ignored.push(format!("{prefix}address"));
            }
            // Only root may report events: the socket is its alone.
            self.ignore_rest(&prefix, ttrpc);
        }
        self.log(&mut file, &mut config)?;
        self.restart(&mut plugins, &mut config)?;
        self.timeouts(&mut file, &mut config)?;
        for (name, of_plugins) in [("metrics", false), ("io.containerd.server.v1.metrics", true)] {
            let (from, prefix) = match of_plugins {
                true => (&mut plugins, format!("plugins.{name:?}.")),
                false => (&mut file, format!("{name}.")),
            };
            let mut metrics = self.table(from, name)?;
            if let Some(address) = self.text(&mut metrics, &prefix, "address")? {
                config.metrics.address = address;
            }
            self.ignore_rest(&prefix, metrics);
        }
        let mut shims = self.table(&mut plugins, "io.containerd.shim.v1.manager")?;
        let prefix = "plugins.\"io.containerd.shim.v1.manager\".";
        self.path_of(&mut shims, prefix, "socket_dir", &mut config.runtime.socket_dir)?;
        self.ignore_rest(prefix, shims);

        // What is not there needs not be disabled.
        file.remove("disabled_plugins");
        if file.get("oom_score").is_some_and(|score| score.as_integer() == Some(0)) {
            file.remove("oom_score");
        }
        self.ignored.extend(plugins.into_iter().map(|(name, _)| format!("plugins.{name:?}")));
        self.ignore_rest("", file);
        self.ignored.sort();
        Ok(config)
    }

    fn log(&mut self, file: &mut Table, config: &mut Config) -> Result<(), ConfigError> {
        let mut debug = self.table(file, "debug")?;
        if let Some(level) = self.text(&mut debug, "debug.", "level")? {
            config.log.level = match level.as_str() {
                "fatal" | "panic" => "error".into(),
                "warning" => "warn".into(),
                _ => level,
            };
        }
        match self.text(&mut debug, "debug.", "format")?.as_deref() {
            Some("json") => config.log.format = LogFormat::Json,
            Some("text") | None => {}
            Some(_) => self.ignored.push("debug.format".into()),
        }
        self.ignore_rest("debug.", debug);
        Ok(())
    }

    fn restart(&mut self, plugins: &mut Table, config: &mut Config) -> Result<(), ConfigError> {
        for name in ["io.containerd.internal.v1.restart", "io.containerd.monitor.container.v1.restart"] {
            let mut restart = self.table(plugins, name)?;
            let prefix = format!("plugins.{name:?}.");
            self.seconds(&mut restart, &prefix, "interval", &mut config.restart.interval)?;
            self.ignore_rest(&prefix, restart);
        }
        Ok(())
    }

    fn timeouts(&mut self, file: &mut Table, config: &mut Config) -> Result<(), ConfigError> {
        let mut timeouts = self.table(file, "timeouts")?;
        let ours = &mut config.runtime.timeouts;
        for (key, to) in [
            ("io.containerd.timeout.shim.load", &mut ours.load),
            ("io.containerd.timeout.shim.cleanup", &mut ours.cleanup),
            ("io.containerd.timeout.shim.shutdown", &mut ours.shutdown),
            ("io.containerd.timeout.task.state", &mut ours.state),
        ] {
            self.seconds(&mut timeouts, "timeouts.", key, to)?;
        }
        self.ignored.extend(timeouts.into_iter().map(|(key, _)| format!("timeouts.{key:?}")));
        Ok(())
    }

    fn wrong(&self, key: String, wanted: &'static str) -> ConfigError {
        ConfigError::Containerd { path: self.path.to_owned(), rule: format!("{key}: want {wanted}") }
    }

    /// Takes a table out of another; an empty one if it is not there.
    fn table(&self, from: &mut Table, key: &str) -> Result<Table, ConfigError> {
        match from.remove(key) {
            None => Ok(Table::new()),
            Some(Value::Table(table)) => Ok(table),
            Some(_) => Err(self.wrong(key.to_owned(), "a table")),
        }
    }

    /// Takes a text; none for an empty one, which stands for the default.
    fn text(&self, from: &mut Table, prefix: &str, key: &str) -> Result<Option<String>, ConfigError> {
        match from.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(_) => Err(self.wrong(format!("{prefix}{key}"), "a text")),
        }
    }

    fn path_of(
        &self,
        from: &mut Table,
        prefix: &str,
        key: &str,
        to: &mut PathBuf,
    ) -> Result<(), ConfigError> {
        if let Some(path) = self.text(from, prefix, key)? {
            *to = PathBuf::from(path);
        }
        Ok(())
    }

    fn number<N: TryFrom<i64>>(
        &self,
        from: &mut Table,
        prefix: &str,
        key: &str,
        to: &mut N,
    ) -> Result<(), ConfigError> {
        if let Some(value) = from.remove(key) {
            let number = value.as_integer().and_then(|number| N::try_from(number).ok());
            *to = number
                .ok_or_else(|| self.wrong(format!("{prefix}{key}"), "a number that is not negative"))?;
        }
        Ok(())
    }

    /// Takes a duration; what is less than a second counts as one, and nothing is the default.
    fn seconds(&self, from: &mut Table, prefix: &str, key: &str, to: &mut u64) -> Result<(), ConfigError> {
        if let Some(text) = self.text(from, prefix, key)? {
            let seconds = seconds(&text);
            let seconds =
                seconds.ok_or_else(|| self.wrong(format!("{prefix}{key}"), "a time such as \"10s\""))?;
            if seconds > 0.0 {
                *to = seconds.ceil() as u64;
            }
        }
        Ok(())
    }

    fn ignore_rest(&mut self, prefix: &str, rest: Table) {
        // What says nothing has no effect in containerd either.
        let rest = rest.into_iter().filter(|(_, value)| says_something(value));
        self.ignored.extend(rest.map(|(key, _)| format!("{prefix}{key}")));
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

/// A path without `.` and `..`, by its letters, as Go cleans it: a file is read once by whatever way it is named.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => cleaned.push(component),
        }
    }
    cleaned
}

/// A duration as Go writes it, such as `1h30m` or `1.5s`, in seconds.
fn seconds(text: &str) -> Option<f64> {
    if text == "0" {
        return Some(0.0);
    }
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, after) = rest.split_at(end);
        let end = after.find(|letter: char| letter.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit = match unit {
            "ns" => 1e-9,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * unit;
        rest = after;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<(Config, Vec<String>), ConfigError> {
        let file: Table = toml::from_str(text).unwrap();
        assert!(is_one(&file), "{text}");
        read(Path::new("/etc/containerd/config.toml"), file)
    }

    /// What Docker Engine 20.10 writes for the containerd that it starts.
    #[test]
    fn a_file_without_version_is_understood() {
        let text = r#"
            disabled_plugins = ["cri"]
            oom_score = 0
            root = "/var/lib/docker/containerd/daemon"
            state = "/var/run/docker/containerd/daemon"
            [grpc]
              address = "/var/run/docker/containerd/containerd.sock"
              gid = 5
              max_recv_message_size = 16777216
            [debug]
              address = "/var/run/docker/containerd/containerd-debug.sock"
              level = "warning"
              uid = 0
            [metrics]
              address = ""
              grpc_histogram = false
            [plugins]
              [plugins.linux]
                shim = "containerd-shim"
              [plugins.restart]
                interval = "1m"
        "#;
        let (config, ignored) = load(text).unwrap();
        assert_eq!(config.root, Path::new("/var/lib/docker/containerd/daemon"));
        assert_eq!(config.grpc.address, Path::new("/var/run/docker/containerd/containerd.sock"));
        assert_eq!((config.grpc.uid, config.grpc.gid), (0, 5));
        assert_eq!((config.log.level.as_str(), config.restart.interval), ("warn", 60));
        assert_eq!(ignored, ["debug.address", "plugins.\"io.containerd.runtime.v1.linux\""]);
        config.validate().unwrap();
    }

    #[test]
    fn the_newest_version_has_its_settings_elsewhere() {
        let text = r#"
            version = 4
            [debug]
              format = "json"
            [timeouts]
              "io.containerd.timeout.shim.load" = "1.5s"
              "io.containerd.timeout.bolt.open" = "0s"
            [plugins."io.containerd.server.v1.grpc"]
              address = "/s"
              gid = 7
            [plugins."io.containerd.server.v1.ttrpc"]
              address = "/s.ttrpc"
            [plugins."io.containerd.server.v1.grpc-tcp"]
              address = "0.0.0.0:1"
            [plugins."io.containerd.monitor.container.v1.restart"]
              interval = "2s"
            [plugins."io.containerd.server.v1.metrics"]
              address = "127.0.0.1:1338"
            [plugins."io.containerd.shim.v1.manager"]
              env = ["A=b"]
              socket_dir = "/run/s"
        "#;
        let (config, ignored) = load(text).unwrap();
        assert_eq!((config.grpc.address.as_path(), config.grpc.gid), (Path::new("/s"), 7));
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.metrics.address, "127.0.0.1:1338");
        assert_eq!((config.runtime.timeouts.load, config.restart.interval), (2, 2));
        assert_eq!(config.runtime.socket_dir, Path::new("/run/s"));
        let expected = [
            "plugins.\"io.containerd.server.v1.grpc-tcp\"",
            "plugins.\"io.containerd.shim.v1.manager\".env",
            "timeouts.\"io.containerd.timeout.bolt.open\"",
        ];
        assert_eq!(ignored, expected);
        // The places are containerd's where the file names none.
        assert_eq!(config.root, Path::new("/var/lib/containerd"));
    }

    #[test]
    fn what_cannot_be_is_refused_and_named() {
        for (text, words) in [
            ("version = 5", "expected containerd config version equal to or less than `4`, got `5`"),
            ("version = 2\nroot = 3", "root: want a text"),
            ("version = 2\n[grpc]\nuid = -1", "grpc.uid: want a number that is not negative"),
            (
                "version = 2\n[plugins.\"io.containerd.internal.v1.restart\"]\ninterval = \"soon\"",
                "interval: want a time",
            ),
            ("version = 2\nplugins = 1", "plugins: want a table"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn imports_are_laid_over_what_imports_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        std::fs::create_dir(folder.path().join("conf.d")).unwrap();
        write("conf.d/a.toml", "version = 2\nroot = \"/a\"\nstate = \"/a-state\"\n");
        write("conf.d/b.toml", "version = 2\nroot = \"/b\"\nimports = [\"../main.toml\"]\n[grpc]\ngid = 3\n");
        write("conf.d/c.txt", "this is no TOML");
        let main = folder.path().join("main.toml");
        let read_main = |text: &str| read(&main, toml::from_str(text).unwrap());
        let text = "version = 2\nroot = \"/main\"\nimports = [\"conf.d/*.toml\"]\n[grpc]\naddress = \"/s\"\ngid = 1\n";
        let (config, ignored) = read_main(text).unwrap();
        assert_eq!((config.root.as_path(), config.state.as_path()), (Path::new("/b"), Path::new("/a-state")));
        assert_eq!((config.grpc.address.as_path(), config.grpc.gid), (Path::new("/s"), 3));
        assert_eq!(ignored, [] as [&str; 0]);

        let error = read_main("version = 1\nimports = [\"conf.d/a.toml\"]\n").unwrap_err().to_string();
        assert!(error.contains("drop-in config version 2 higher than root config version 1"), "{error}");
        assert!(read_main("version = 2\nimports = [\"absent.toml\"]\n").is_err());
        assert!(read_main("version = 2\nimports = [\"absent/*.toml\"]\n").is_ok());
    }

    #[test]
    fn durations_are_gos() {
        for (text, expected) in [("10s", 10.0), ("1h30m", 5400.0), ("1.5s", 1.5), ("250ms", 0.25), ("0", 0.0)]
        {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
        for text in ["", "10", "s", "-1s", "1x", "1.1.1s"] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
