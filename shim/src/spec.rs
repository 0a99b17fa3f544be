//! The little that the shim must know of a container's `config.json`. The rest is between client and runtime.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use davit_sys::fs::read_regular;
use serde::Deserialize;
use serde_json::value::RawValue;

/// The annotations that put containers into one shim, the first that is there counts (containerd
/// `groupLabels`).
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// The most bytes of a `config.json`: it comes in a message of a client, of which daemons take at most 16 MiB.
const MAX_SPECIFICATION: u64 = 32 << 20;

/// The part of an OCI runtime specification that is read.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Specification {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    linux: Option<Linux>,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default, rename = "cgroupsPath")]
    cgroups_path: Option<String>,
    #[serde(default)]
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Specification {
    /// Reads `config.json` of a bundle.
    pub(crate) fn read(bundle: &Path) -> io::Result<Specification> {
        Ok(serde_json::from_slice(&read_regular(&bundle.join("config.json"), MAX_SPECIFICATION)?)?)
    }

    /// The annotation of this name.
    pub(crate) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(name).map(String::as_str)
    }

    /// What the container is grouped by, if by anything but its own id.
    pub(crate) fn group(&self) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        GROUP_ANNOTATIONS.iter().find_map(|name| annotations.get(*name)).map(String::as_str)
    }

    /// The name of the container's cgroup, if it is one below the roots of the hierarchies: not a unit of systemd, which
    /// systemd itself removes, nor one that is relative to a place that only the runtime knows.
    pub(crate) fn cgroup(&self) -> Option<&Path> {
        let path = Path::new(self.linux.as_ref()?.cgroups_path.as_deref()?).strip_prefix("/").ok()?;
        let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        (plain && path.file_name().is_some()).then_some(path)
    }

    /// True unless the container has a pid namespace of its own, whose end kills all of its processes.
    pub(crate) fn shares_pid_namespace(&self) -> bool {
        let namespaces = self.linux.as_ref().and_then(|linux| linux.namespaces.as_ref());
        !namespaces.is_some_and(|all| all.iter().any(|own| own.kind == "pid" && own.path.is_empty()))
    }
}

/// The process document of an exec, with `terminal` set as the request says. All else stays as the client
/// wrote it.
///
/// # Errors
/// The document is no JSON object.
pub(crate) fn process_with_terminal(document: &[u8], terminal: bool) -> Result<Vec<u8>, serde_json::Error> {
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(document)?;
    fields.insert("terminal".to_owned(), RawValue::from_string(terminal.to_string())?);
    serde_json::to_vec(&fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Specification {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_first_group_annotation_counts() {
        assert_eq!(parse("{}").group(), None);
        assert_eq!(parse(r#"{"annotations":null}"#).group(), None);
        let pod =
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","x":"y"},"process":{"args":["a"]}}"#;
        assert_eq!(parse(pod).group(), Some("pod"));
        let both =
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p","io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(parse(both).group(), Some("g"));
    }

    #[test]
    fn only_a_cgroup_below_the_roots_is_named() {
        let of = |path: &str| {
            let text = format!(r#"{{"linux":{{"cgroupsPath":{path}}}}}"#);
            parse(&text).cgroup().map(Path::to_owned)
        };
        assert_eq!(of(r#""/ns/box""#), Some("ns/box".into()));
        for other in
            ["null", r#""""#, r#""/""#, r#""//""#, r#""ns/box""#, r#""slice:cri:box""#, r#""/a/../..""#]
        {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(parse("{}").cgroup(), None);
    }

    #[test]
    fn only_an_own_pid_namespace_ends_all_processes() {
        for (text, shares) in [
            ("{}", true),
            (r#"{"linux":{"namespaces":[{"type":"mount"}]}}"#, true),
            (r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#, true),
            (r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#, false),
        ] {
            assert_eq!(parse(text).shares_pid_namespace(), shares, "{text}");
        }
    }

    #[test]
    fn a_process_keeps_all_but_its_terminal() {
        let set =
            process_with_terminal(br#"{"terminal":true,"args":["a"],"user":{"uid":1e0}}"#, false).unwrap();
        assert_eq!(set, br#"{"args":["a"],"terminal":false,"user":{"uid":1e0}}"#);
        assert!(process_with_terminal(b"[]", true).is_err());
    }
}
