//! The runtime's options, as a client gives them with `Create`, and as they are kept in the bundle for
//! `delete`.

use std::io;
use std::path::Path;

use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_sys::fs::{read_regular, write_private};
use prost_types::Any;
use serde::{Deserialize, Serialize};

use crate::deadline::Deadline;
use crate::error::TaskError;
use crate::runtime::{DEFAULT_BINARY, DEFAULT_ROOT, Runtime};

/// The file in the bundle (containerd `runc.WriteOptions`).
const OPTIONS_FILE: &str = "options.json";
/// The file with the runtime's name, from before there were options.
const RUNTIME_FILE: &str = "runtime";
/// The most bytes of either: all of it comes in one message.
const MAX_FILE: u64 = 4 << 20;

/// The options in the JSON form that Go gives them, so that either shim can clean up after the other.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Stored {
    #[serde(skip_serializing_if = "is_default")]
    no_pivot_root: bool,
    #[serde(skip_serializing_if = "is_default")]
    no_new_keyring: bool,
    #[serde(skip_serializing_if = "is_default")]
    shim_cgroup: String,
    #[serde(skip_serializing_if = "is_default")]
    io_uid: u32,
    #[serde(skip_serializing_if = "is_default")]
    io_gid: u32,
    #[serde(skip_serializing_if = "is_default")]
    binary_name: String,
    #[serde(skip_serializing_if = "is_default")]
    root: String,
    #[serde(skip_serializing_if = "is_default")]
    systemd_cgroup: bool,
    #[serde(skip_serializing_if = "is_default")]
    criu_image_path: String,
    #[serde(skip_serializing_if = "is_default")]
    criu_work_path: String,
    #[serde(skip_serializing_if = "is_default")]
    task_api_address: String,
    #[serde(skip_serializing_if = "is_default")]
    task_api_version: u32,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Reads the options of a request; none, or of no content, are the default ones.
pub(crate) fn from_request(options: Option<&Any>) -> Result<Options, TaskError> {
    let Some(options) = options.filter(|options| !options.value.is_empty()) else {
        return Ok(Options::default());
    };
    match any::unpack::<Options>(options) {
        Ok(Some(options)) => Ok(options),
        Ok(None) => Err(TaskError::OptionsType { type_url: options.type_url.clone() }),
        Err(source) => Err(TaskError::Decode { what: "options", source }),
    }
}

/// The options as they are kept in a bundle.
pub(crate) fn to_stored(options: &Options) -> io::Result<Vec<u8>> {
    let stored = Stored {
        no_pivot_root: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        shim_cgroup: options.shim_cgroup.clone(),
        io_uid: options.io_uid,
        io_gid: options.io_gid,
        binary_name: options.binary_name.clone(),
        root: options.root.clone(),
        systemd_cgroup: options.systemd_cgroup,
        criu_image_path: options.criu_image_path.clone(),
        criu_work_path: options.criu_work_path.clone(),
        task_api_address: options.task_api_address.clone(),
        task_api_version: options.task_api_version,
    };
    Ok(serde_json::to_vec(&stored)?)
}

/// What has to be known of options that were kept; the default ones for what is no such document.
pub(crate) fn from_stored(bytes: &[u8]) -> Options {
    let stored: Stored = serde_json::from_slice(bytes).unwrap_or_default();
    Options {
        binary_name: stored.binary_name,
        root: stored.root,
        systemd_cgroup: stored.systemd_cgroup,
        ..Options::default()
    }
}

/// Keeps the options in the bundle.
pub(crate) fn write(bundle: &Path, options: &Options) -> io::Result<()> {
    write_private(&bundle.join(OPTIONS_FILE), &to_stored(options)?)?;
    write_private(&bundle.join(RUNTIME_FILE), options.binary_name.as_bytes())
}

/// The runtime that these options ask for.
pub(crate) fn runtime(
    options: &Options,
    bundle: &Path,
    namespace: &str,
    oom_score_adj: Option<i32>,
) -> Runtime {
    let root = if options.root.is_empty() { DEFAULT_ROOT } else { &options.root };
    let binary = if options.binary_name.is_empty() { DEFAULT_BINARY } else { &options.binary_name };
    Runtime {
        binary: binary.to_owned(),
        root: Path::new(root).join(namespace),
        bundle: bundle.to_owned(),
        systemd_cgroup: options.systemd_cgroup,
        oom_score_adj,
        deadline: Deadline::default(),
    }
}

/// The runtime that a bundle was made with, as far as its files tell.
pub(crate) fn runtime_of_bundle(bundle: &Path, namespace: &str) -> Runtime {
    let mut options = from_stored(&read_regular(&bundle.join(OPTIONS_FILE), MAX_FILE).unwrap_or_default());
    if options.binary_name.is_empty() {
        let named = read_regular(&bundle.join(RUNTIME_FILE), MAX_FILE).unwrap_or_default();
        options.binary_name = String::from_utf8(named).unwrap_or_default();
    }
    runtime(&options, bundle, namespace, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_remembers_its_runtime() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = folder.path();
        assert_eq!(runtime_of_bundle(bundle, "ns").binary, "runc");
        let options = Options { binary_name: "crun".into(), root: "/r".into(), ..Options::default() };
        write(bundle, &options).unwrap();
        let runtime = runtime_of_bundle(bundle, "ns");
        assert_eq!((runtime.binary.as_str(), runtime.root.as_path()), ("crun", Path::new("/r/ns")));
        let text = std::fs::read_to_string(bundle.join(OPTIONS_FILE)).unwrap();
        assert_eq!(text, r#"{"binary_name":"crun","root":"/r"}"#);
    }

    #[test]
    fn options_of_another_type_are_refused() {
        assert_eq!(from_request(None).unwrap(), Options::default());
        let other = Any { type_url: "x.Other".into(), value: vec![1] };
        assert!(matches!(from_request(Some(&other)), Err(TaskError::OptionsType { .. })));
        let broken = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![0xff] };
        assert!(matches!(from_request(Some(&broken)), Err(TaskError::Decode { .. })));
    }
}
