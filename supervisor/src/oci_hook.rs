//! `davitd oci-hook`: runs a program as a hook of an OCI runtime, with the container's own values in its arguments and its
//! environment.
//!
//! Runtimes tell a hook of the container on its standard input (OCI runtime spec, "State"); a program that wants it on its
//! command line is run by `containerd oci-hook -- PROGRAM ARGUMENTS`, and clients write that into their specs. `{{ id }}`,
//! `{{ pid }}`, `{{ status }}`, `{{ bundle }}`, `{{ rootfs }}` and `{{ annotation "KEY" }}` are filled in. This much of Go's
//! templates clients use, and no more is understood.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

/// What a runtime says of a container.
#[derive(Debug, Deserialize)]
struct State {
    id: String,
    status: String,
    #[serde(default)]
    pid: i64,
    bundle: PathBuf,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// What is needed of the bundle's `config.json`.
#[derive(Debug, Default, Deserialize)]
struct Spec {
    #[serde(default)]
    root: Root,
}

#[derive(Debug, Default, Deserialize)]
struct Root {
    #[serde(default)]
    path: PathBuf,
}

/// Becomes the program that `arguments` name. Returns only when that fails.
///
/// # Errors
/// Standard input or the bundle cannot be read, a template is not understood, or there is no such program.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let mut state = Vec::new();
    io::stdin().read_to_end(&mut state).context("cannot read the container's state")?;
    let container = Container::read(&state)?;
    let arguments = arguments.iter().map(|text| container.fill_in(text)).collect::<Result<Vec<_>>>()?;
    let (program, rest) = arguments.split_first().context("no program to run")?;
    let mut command = Command::new(program);
    command.args(rest).env_clear();
    for (name, value) in env::vars_os() {
        command.env(&name, container.fill_in(&value)?);
    }
    Err(command.exec()).with_context(|| format!("cannot execute {}", Path::new(program).display()))
}

/// The container that a hook is run for.
#[derive(Debug)]
struct Container {
    state: State,
    rootfs: PathBuf,
}

impl Container {
    fn read(state: &[u8]) -> Result<Container> {
        let state: State = serde_json::from_slice(state).context("the container's state is none")?;
        let path = state.bundle.join("config.json");
        let spec = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let spec: Spec =
            serde_json::from_slice(&spec).with_context(|| format!("{} is no spec", path.display()))?;
        // An absolute path takes the bundle's place.
        let rootfs = state.bundle.join(spec.root.path);
        Ok(Container { state, rootfs })
    }

    /// A text with what stands in double braces filled in.
    fn fill_in(&self, text: &OsString) -> Result<OsString> {
        let (mut rest, mut filled) = (text.as_bytes(), Vec::new());
        while let Some(start) = find(rest, b"{{") {
            let action = &rest[start + 2..];
            let end = find(action, b"}}").with_context(|| format!("{text:?}: unclosed action"))?;
            filled.extend_from_slice(&rest[..start]);
            let value = std::str::from_utf8(&action[..end]).map_err(anyhow::Error::from);
            let value = value.and_then(|action| self.value(action.trim()));
            filled.extend(value.with_context(|| format!("{text:?}"))?.into_vec());
            rest = &action[end + 2..];
        }
        filled.extend_from_slice(rest);
        Ok(OsString::from_vec(filled))
    }

    fn value(&self, action: &str) -> Result<OsString> {
        let State { id, status, pid, bundle, annotations } = &self.state;
        Ok(match action {
            "id" => id.into(),
            "status" => status.into(),
            "pid" => pid.to_string().into(),
            "bundle" => bundle.into(),
            "rootfs" => self.rootfs.clone().into(),
            "" => bail!("missing value for command"),
            _ => {
                let key = action.strip_prefix("annotation").map(str::trim_start);
                let key = key.and_then(quoted).ok_or_else(|| anyhow!("{action:?} is not understood"))?;
                annotations.get(&key).cloned().unwrap_or_default().into()
            }
        })
    }
}

/// A string as Go writes one: in double quotes with escapes, of which those of JSON are understood, or in backticks.
fn quoted(text: &str) -> Option<String> {
    let raw = text.strip_prefix('`').and_then(|text| text.strip_suffix('`'));
    raw.map(str::to_owned).or_else(|| serde_json::from_str(text).ok())
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(root: &str) -> Container {
        let bundle = tempfile::tempdir().unwrap();
        let spec = format!(r#"{{"ociVersion":"1.0.2","root":{{"path":{root:?}}}}}"#);
        std::fs::write(bundle.path().join("config.json"), spec).unwrap();
        let state = format!(
            r#"{{"ociVersion":"1.0.2","id":"c","status":"creating","pid":7,"bundle":{:?},"annotations":{{"a.b/c":"v"}}}}"#,
            bundle.path()
        );
        Container::read(state.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_known_of_the_container_is_filled_in() {
        let container = container("rootfs");
        let fill_in = |text: &str| container.fill_in(&text.into()).unwrap().into_string().unwrap();
        assert_eq!(fill_in("{{id}}:{{ pid }}-{{status}}"), "c:7-creating");
        assert_eq!(fill_in("{{ rootfs }}"), format!("{}/rootfs", fill_in("{{bundle}}")));
        assert_eq!(fill_in(r#"{{annotation "a.b/c"}}{{annotation `a.b/c`}}{{annotation "none"}}"#), "vv");
        assert_eq!(fill_in("}} as it is {"), "}} as it is {");
        // What is no text passes as well.
        let bytes = OsString::from_vec(b"\xff{{pid}}".to_vec());
        assert_eq!(container.fill_in(&bytes).unwrap().as_bytes(), b"\xff7");
    }

    #[test]
    fn a_root_may_lie_anywhere() {
        assert_eq!(container("/elsewhere").rootfs, Path::new("/elsewhere"));
    }

    #[test]
    fn other_templates_are_refused() {
        let container = container("rootfs");
        for text in ["{{", "{{}}", "{{ name }}", "{{annotation}}", "{{ annotation key }}", "{{ pid | html }}"]
        {
            assert!(container.fill_in(&text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_state_that_is_none_is_refused() {
        assert!(Container::read(b"").is_err());
        let error = Container::read(br#"{"id":"c","status":"x","bundle":"/no/such"}"#).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /no/such/config.json");
    }
}
