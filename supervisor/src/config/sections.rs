//! The sections of the configuration and their defaults.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// The same API over TCP.
    pub tcp: Tcp,
}

/// `[grpc.tcp]`: there is no such socket without mutual TLS. Who holds a certificate of the authority is root on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tcp {
    /// The address and port, such as `192.0.2.1:7777`; empty for none.
    pub address: String,
    /// The daemon's certificate and those between it and its authority, in PEM.
    pub cert: PathBuf,
    /// Its key, in PEM.
    pub key: PathBuf,
    /// The authorities of the clients' certificates, in PEM.
    pub ca: PathBuf,
    /// The common names that a client may have; none for every one that the authorities have signed.
    pub client_common_names: Vec<String>,
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metadata {
    /// The storage engine. It is chosen when a root is new; an existing root opens with the engine it was made with only.
    pub engine: Engine,
    /// Whether a namespace may have the blobs of another by naming them.
    pub sharing: Sharing,
    /// When garbage is collected.
    pub gc: Gc,
}

/// Who may have a blob without sending it (`content_sharing_policy` of containerd).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Whoever names its digest.
    #[default]
    Shared,
    /// The namespace that has sent it.
    Isolated,
}

/// `[metadata.gc]`: the meaning and the defaults are those of containerd's scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gc {
    /// The share of time that collecting may take, from 0 (no limit) to 0.5.
    pub pause_threshold: f64,
    /// Collect as soon as so much was removed; 0 for never by number.
    pub deletion_threshold: u64,
    /// Collect at the next occasion after so many changes; 0 for never by number.
    pub mutation_threshold: u64,
    /// How long a collection is put off, in milliseconds.
    pub schedule_delay_ms: u64,
    /// When the first collection is, in milliseconds after the start.
    pub startup_delay_ms: u64,
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
    /// More variables for shims, each `NAME=value`.
    pub environment: Vec<String>,
    /// How long shims and OCI runtimes may take.
    pub timeouts: Timeouts,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// The TCP address of `/v1/metrics`, such as `127.0.0.1:1338`; empty for none. Who can connect can read.
    pub address: String,
    /// Tell as well how long calls took, as a histogram for each method.
    pub grpc_histogram: bool,
}

/// `[diagnostics]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Diagnostics {
    /// The unix socket that answers `GET /debug/vars` and the like; empty for none. It is its owner's alone, unless a group is
    /// named.
    pub address: PathBuf,
    /// The owner of the socket.
    pub uid: u32,
    /// The group of the socket, whose members may use it; 0 for none.
    pub gid: u32,
}

/// `[tracing]`: takes a daemon that was built with the feature `otel`. The environment's `OTEL_*` go before what is here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tracing {
    /// Where the collector listens, such as `http://127.0.0.1:4318`; empty for no spans.
    pub endpoint: String,
    /// How spans are sent.
    pub protocol: TracingProtocol,
    /// The name that the daemon has in traces.
    pub service_name: String,
    /// The share of traces that are sent of those that begin here.
    pub sampling_ratio: f64,
}

/// The forms of OTLP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TracingProtocol {
    /// Protobuf in an HTTP request.
    #[default]
    #[serde(rename = "http/protobuf")]
    Http,
    /// gRPC.
    #[serde(rename = "grpc")]
    Grpc,
}

/// `[plugin_list]`: entries of the plugin list by type and id, such as `io.containerd.snapshotter.v1.native`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginList {
    /// The daemon does not start without these.
    pub required: Vec<String>,
    /// These are not used: snapshotters, the restart monitor, metrics of tasks, and servers beside that of the API.
    pub disabled: Vec<String>,
}

/// `[process]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Process {
    /// What the kernel adds when it looks for a victim for want of memory, from -1000 to 1000 (proc_pid_oom_score_adj(5)); 0 to
    /// leave it as it is.
    pub oom_score: i32,
    /// The control group that the daemon moves into, made if it is missing; empty to stay where it is.
    pub cgroup: PathBuf,
    /// The folder of temporary files (`TMPDIR`), of the daemon and of what it starts; empty to leave it as it is.
    pub temp: PathBuf,
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
    /// To say what a task uses.
    pub stats: u64,
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
            tcp: Tcp::default(),
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
        Metadata { engine: Engine::Redb, sharing: Sharing::default(), gc: Gc::default() }
    }
}

impl Default for Gc {
    fn default() -> Self {
        Gc {
            pause_threshold: 0.02,
            deletion_threshold: 0,
            mutation_threshold: 100,
            schedule_delay_ms: 0,
            startup_delay_ms: 100,
        }
    }
}

impl Default for Tracing {
    fn default() -> Self {
        Tracing {
            endpoint: String::new(),
            protocol: TracingProtocol::default(),
            service_name: "davitd".into(),
            sampling_ratio: 1.0,
        }
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
        Runtime { shim: PathBuf::new(), socket_dir, environment: Vec::new(), timeouts: Timeouts::default() }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { create: 240, call: 120, load: 5, cleanup: 5, shutdown: 3, state: 2, stats: 2 }
    }
}
