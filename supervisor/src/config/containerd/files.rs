//! The files themselves: their versions, what they import, and how one is laid over another.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use toml::{Table, Value};

use crate::config::{ConfigError, parse, read_file};

/// The newest version of the file that is understood.
const NEWEST: i64 = 4;

/// The first version with the full names of plugins.
const FULL_NAMES: i64 = 2;

/// The lists of plugins by name.
const LISTS: [&str; 2] = ["disabled_plugins", "required_plugins"];

/// A file with all that it imports laid over it, each over those before, with the full names of plugins.
///
/// # Errors
/// A file that cannot be read, is of a newer version than we know or than the first, or names what is no plugin.
pub(super) fn merged(path: &Path, file: Table) -> Result<Table, ConfigError> {
    let mut merged = Table::new();
    let mut seen = BTreeSet::from([clean(path)]);
    let mut pending = VecDeque::from([(path.to_owned(), file)]);
    let mut first_version = 0;
    while let Some((path, mut file)) = pending.pop_front() {
        let version = version(&path, &file)?;
        // Files without one are of no version, and bound none.
        if first_version == 0 {
            first_version = version;
        }
        if version > first_version {
            let rule =
                format!("drop-in config version {version} higher than root config version {first_version}");
            return Err(ConfigError::Containerd { path, rule });
        }
        file.remove("version");
        let imports = file.remove("imports");
        for import in imports.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str) {
            for import in resolve(&path, import) {
                if seen.insert(import.clone()) {
                    let table = parse(&read_file(&import)?, &import)?;
                    pending.push_back((import, table));
                }
            }
        }
        if version < FULL_NAMES {
            rename_plugins(&mut file);
        }
        for list in LISTS {
            let names = file.get(list).and_then(Value::as_array).into_iter().flatten();
            if let Some(name) = names.filter_map(Value::as_str).find(|name| !name.contains('.')) {
                let kind = list.trim_end_matches("_plugins");
                let rule = format!("invalid {kind} plugin URI {name:?} expect io.containerd.x.vx");
                return Err(ConfigError::Containerd { path, rule });
            }
        }
        merge(&mut merged, file, Level::Top);
    }
    Ok(merged)
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

/// The files that an import names: relative to the folder of the file that imports, in the order of their names where
/// `*` and `?` stand for more than one.
fn resolve(from: &Path, import: &str) -> Vec<PathBuf> {
    let folder = from.parent().unwrap_or(Path::new("/"));
    let path = clean(&folder.join(import));
    if !import.contains('*') {
        return vec![path];
    }
    let mut found = vec![PathBuf::new()];
    for component in path.components() {
        let pattern = component.as_os_str().to_str().filter(|name| name.contains(['*', '?']));
        let Some(pattern) = pattern else {
            found.iter_mut().for_each(|path| path.push(component));
            continue;
        };
        found = found.iter().flat_map(|folder| matching(folder, pattern)).collect();
    }
    // What is not there matches nothing.
    found.retain(|path| std::fs::symlink_metadata(path).is_ok());
    found
}

/// What in a folder is of a pattern, in order. A folder that cannot be read holds nothing, as with Go's `filepath.Glob`.
fn matching(folder: &Path, pattern: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<OsString> = entries
        .map(|entry| entry.file_name())
        .filter(|name| name.to_str().is_some_and(|name| matches(pattern, name)))
        .collect();
    names.sort();
    names.into_iter().map(|name| folder.join(name)).collect()
}

/// Whether a name is of a pattern in which each `*` stands for any text and each `?` for one letter.
fn matches(pattern: &str, name: &str) -> bool {
    let (mut letters, mut rest) = (pattern.chars(), name.chars());
    match letters.next() {
        None => name.is_empty(),
        Some('*') => {
            let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
            ends.into_iter().any(|at| matches(letters.as_str(), &name[at..]))
        }
        Some('?') => rest.next().is_some() && matches(letters.as_str(), rest.as_str()),
        Some(letter) => rest.next() == Some(letter) && matches(letters.as_str(), rest.as_str()),
    }
}

/// Where in a file a table stands: what counts as said depends on it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    /// The file itself.
    Top,
    /// A section, whose keys containerd knows: the zero of a type says nothing.
    Section,
    /// Below `plugins`, where each value says something.
    Plugins,
    /// A table of entries, each of which is replaced as a whole.
    Entries,
}

/// Lays one file over what was read before: a value replaces a value, lists are united, tables are merged.
fn merge(into: &mut Table, from: Table, level: Level) {
    for (key, value) in from {
        let below = match (level, key.as_str()) {
            (Level::Top, "plugins") => Level::Plugins,
            (Level::Top, "proxy_plugins" | "timeouts" | "stream_processors") => Level::Entries,
            (Level::Top, _) => Level::Section,
            (level, _) => level,
        };
        let replaced = level == Level::Entries;
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) if !replaced => merge(old, new, below),
            (Some(Value::Array(old)), Value::Array(new)) if !replaced => {
                for item in new {
                    if !old.contains(&item) {
                        old.push(item);
                    }
                }
            }
            (Some(_), new)
                if matches!(level, Level::Top | Level::Section) && !super::says_something(&new) => {}
            (_, new) => {
                into.insert(key, new);
            }
        }
    }
}

/// Gives the plugins of a file of the first version their full names, as containerd does.
fn rename_plugins(file: &mut Table) {
    if let Some(Value::Table(plugins)) = file.get_mut("plugins") {
        *plugins =
            std::mem::take(plugins).into_iter().map(|(name, table)| (full_name(&name), table)).collect();
    }
    for list in LISTS {
        for name in file.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Value::String(name) = name {
                *name = full_name(name);
            }
        }
    }
}

fn full_name(name: &str) -> String {
    let kind = match name {
        name if name.contains('.') => return name.to_owned(),
        "linux" => "runtime.v1",
        "task" => "runtime.v2",
        "cgroups" => "monitor.v1",
        "scheduler" => "gc.v1",
        "bolt" => "metadata.v1",
        "opt" | "restart" | "tracing" => "internal.v1",
        "otlp" => "tracing.processor.v1",
        "aufs" | "btrfs" | "devmapper" | "native" | "overlayfs" | "zfs" => "snapshotter.v1",
        name if name.ends_with("-service") => "service.v1",
        _ => "grpc.v1",
    };
    format!("io.containerd.{kind}.{name}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_gos() {
        for (pattern, name, expected) in [
            ("*.toml", "a.toml", true),
            ("*.toml", ".toml", true),
            ("*.toml", "a.tom", false),
            ("?-*.toml", "1-a.toml", true),
            ("?-*.toml", "-a.toml", false),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxbyy", false),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn folders_of_imports_may_be_patterns() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b/x.toml", "a/x.toml", "a/y.toml", "c/z.toml"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let found = resolve(&folder.path().join("main.toml"), "*/x.toml");
        assert_eq!(found, [folder.path().join("a/x.toml"), folder.path().join("b/x.toml")]);
        assert!(resolve(&folder.path().join("main.toml"), "none/*/x.toml").is_empty());
    }

    #[test]
    fn a_zero_of_a_section_says_nothing_and_one_of_a_plugin_does() {
        let mut into: Table = toml::from_str(
            "root = '/a'\n[grpc]\ngid = 5\n[plugins.x]\nn = 5\n[timeouts]\nt = '1s'\n[proxy_plugins.p]\na = 1\nb = 2\n",
        )
        .unwrap();
        let from = toml::from_str(
            "root = ''\n[grpc]\ngid = 0\n[plugins.x]\nn = 0\n[timeouts]\nt = '2s'\n[proxy_plugins.p]\na = 3\n",
        )
        .unwrap();
        merge(&mut into, from, Level::Top);
        let expected: Table = toml::from_str(
            "root = '/a'\n[grpc]\ngid = 5\n[plugins.x]\nn = 0\n[timeouts]\nt = '2s'\n[proxy_plugins.p]\na = 3\n",
        )
        .unwrap();
        assert_eq!(into, expected);
    }
}
