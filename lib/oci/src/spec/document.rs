//! The document itself: the parts of the OCI runtime spec that [`super::build`] writes, field by field as in its
//! JSON. It is written, never read: a spec that comes from elsewhere may hold more, and is handled as plain JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::seccomp::Seccomp;

/// The version of the runtime spec that the document follows. The features of 1.1 are used only where both runc 1.1
/// and crun ignore what they do not know, so that the runtimes of long-lived distributions take it too.
pub const VERSION: &str = "1.0.2";

/// `config.json`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Spec {
    pub oci_version: &'static str,
    pub process: Process,
    pub root: Root,
    pub hostname: String,
    pub mounts: Vec<SpecMount>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    pub linux: Linux,
}

impl Spec {
    /// The JSON of the document.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a spec has string keys only, so it has a JSON form")
    }
}

/// `process`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Process {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub terminal: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_size: Option<ConsoleSize>,
    pub user: ProcessUser,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub capabilities: Capabilities,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rlimits: Vec<ProcessRlimit>,
    pub no_new_privileges: bool,
}

/// `process.consoleSize`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct ConsoleSize {
    pub height: u16,
    pub width: u16,
}

/// `process.user`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct ProcessUser {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
}

/// `process.capabilities`. The inheritable and ambient sets stay empty: a program without file capabilities must not
/// gain any (CVE-2022-24769).
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Capabilities {
    pub bounding: Vec<String>,
    pub effective: Vec<String>,
    pub permitted: Vec<String>,
}

/// An entry of `process.rlimits`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct ProcessRlimit {
    #[serde(rename = "type")]
    pub kind: String,
    pub hard: u64,
    pub soft: u64,
}

/// `root`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Root {
    pub path: &'static str,
    pub readonly: bool,
}

/// An entry of `mounts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct SpecMount {
    pub destination: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// `linux`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Linux {
    pub cgroups_path: String,
    pub namespaces: Vec<SpecNamespace>,
    pub resources: Resources,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<SpecDevice>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctl: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seccomp: Option<Seccomp>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
}

/// An entry of `linux.namespaces`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct SpecNamespace {
    #[serde(rename = "type")]
    pub kind: &'static str,
}

/// An entry of `linux.devices`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct SpecDevice {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: String,
    pub major: u64,
    pub minor: u64,
    pub file_mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// `linux.resources`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Resources {
    pub devices: Vec<DeviceRule>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<Pids>,
}

/// An entry of `linux.resources.devices`.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct DeviceRule {
    pub allow: bool,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor: Option<u64>,
    pub access: String,
}

/// `linux.resources.memory`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Memory {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reservation: Option<u64>,
}

/// `linux.resources.cpu`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Cpu {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mems: Option<String>,
}

/// `linux.resources.pids`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the runtime spec documents its fields")]
pub struct Pids {
    pub limit: i64,
}
