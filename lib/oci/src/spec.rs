//! The runtime spec of a container, made from an image's configuration and the caller's options.
//!
//! [`build`] is one pure function: what the host is like comes in as a [`Host`], the user as resolved numbers. The
//! defaults (mounts, masked paths, capabilities, seccomp, device rules) are what Docker gives a container, because
//! images are written for that.

pub mod capability;
pub mod device;
pub mod document;
pub mod seccomp;

mod build;
mod defaults;

use std::collections::BTreeMap;

use davit_model::{Coded, ErrorCode};

pub use build::{build, process_args};
pub use device::Device;
pub use document::Spec;

/// The type of the `Any` in which containerd's API carries a runtime spec (as JSON).
pub const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// The same for the process of an exec.
pub const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The same for resources in an update.
pub const RESOURCES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Why no spec can be made.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Neither image nor caller names a command.
    #[error("no command specified, and the image has none")]
    NoCommand,
    /// A working folder or the target of a mount that is not absolute.
    #[error("invalid {what} {path:?}: it must be an absolute path")]
    NotAbsolute {
        /// Which path.
        what: &'static str,
        /// What was given.
        path: String,
    },
    /// A mount over the root filesystem itself.
    #[error("invalid mount target \"/\": the root filesystem cannot be mounted over")]
    RootMount,
    /// Two mounts on one path.
    #[error("duplicate mount point {path:?}")]
    DuplicateMount {
        /// The path.
        path: String,
    },
    /// A capability that does not exist.
    #[error("unknown capability {name:?}")]
    Capability {
        /// What was given.
        name: String,
    },
    /// A limit out of its range.
    #[error("invalid {what} limit: {reason}")]
    Limit {
        /// Which limit.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A seccomp profile that is none.
    #[error("invalid seccomp profile")]
    SeccompProfile(#[source] serde_json::Error),
    /// A device that cannot be described.
    #[error("cannot use device {path:?}")]
    Device {
        /// Its path on the host.
        path: String,
        /// What is wrong.
        #[source]
        source: std::io::Error,
    },
}

impl Coded for SpecError {
    fn code(&self) -> ErrorCode {
        match self {
            SpecError::NoCommand
            | SpecError::NotAbsolute { .. }
            | SpecError::RootMount
            | SpecError::DuplicateMount { .. }
            | SpecError::Capability { .. }
            | SpecError::Limit { .. }
            | SpecError::SeccompProfile(_)
            | SpecError::Device { .. } => ErrorCode::InvalidArgument,
        }
    }
}

/// What a container shares with the host's network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Network {
    /// A network namespace of its own with nothing but loopback.
    #[default]
    None,
    /// The host's.
    Host,
}

/// Which system calls are filtered.
#[derive(Debug, Clone, Default)]
pub enum SeccompChoice {
    /// By the default profile.
    #[default]
    Default,
    /// Not at all.
    Unconfined,
    /// By the caller's profile.
    Profile(seccomp::Profile),
}

/// A folder or file of the host in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// On the host.
    pub source: String,
    /// In the container, absolute.
    pub destination: String,
    /// Whether the container may not write to it, the mounts below it included where the runtime can.
    pub read_only: bool,
    /// `private`, `shared`, `slave` or their recursive forms; `rprivate` when empty.
    pub propagation: String,
}

/// A filesystem in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TmpfsMount {
    /// In the container, absolute.
    pub destination: String,
    /// Options of tmpfs(5) on top of `nosuid,nodev,noexec`.
    pub options: Vec<String>,
}

/// A limit of setrlimit(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rlimit {
    /// The name, such as `RLIMIT_NOFILE`.
    pub name: String,
    /// The soft limit.
    pub soft: u64,
    /// The hard limit.
    pub hard: u64,
}

/// Limits of a container's cgroup. `None` is no limit.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of memory and swap together; -1 for no limit.
    pub memory_swap: Option<i64>,
    /// Bytes of memory that are protected from reclaim when the host is short of it.
    pub memory_reservation: Option<u64>,
    /// CPUs, as a number with a fraction.
    pub cpus: Option<f64>,
    /// Relative weight (cgroup v1 shares, 1024 is the usual one).
    pub cpu_shares: Option<u64>,
    /// The CPUs to run on, such as `0-2,7`.
    pub cpuset_cpus: Option<String>,
    /// The memory nodes to use.
    pub cpuset_mems: Option<String>,
    /// Processes and threads; 0 and -1 for no limit.
    pub pids: Option<i64>,
}

/// What a caller asks for, beside what the image says.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The container's id.
    pub id: String,
    /// The API namespace; together with the id it names the cgroup.
    pub namespace: String,
    /// The command, in place of the image's.
    pub args: Vec<String>,
    /// The entrypoint in place of the image's, whose command is then not used either; an empty one removes it.
    pub entrypoint: Option<Vec<String>>,
    /// Variables on top of the image's; an entry without `=` removes one.
    pub env: Vec<String>,
    /// The working folder in place of the image's.
    pub working_dir: Option<String>,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// Rows and columns of the terminal.
    pub console_size: Option<(u16, u16)>,
    /// The host name; the first twelve characters of the id when empty.
    pub hostname: String,
    /// The network.
    pub network: Network,
    /// Bind mounts.
    pub binds: Vec<BindMount>,
    /// Filesystems in memory.
    pub tmpfs: Vec<TmpfsMount>,
    /// Bytes of `/dev/shm`, 64 MiB by default.
    pub shm_size: Option<u64>,
    /// Whether the root filesystem is read-only.
    pub read_only: bool,
    /// All capabilities, all devices, no filter, nothing masked.
    pub privileged: bool,
    /// Capabilities on top of the default.
    pub cap_add: Vec<String>,
    /// Capabilities out of the default.
    pub cap_drop: Vec<String>,
    /// The filter of system calls.
    pub seccomp: SeccompChoice,
    /// Whether set-user-id programs and file capabilities give nothing.
    pub no_new_privileges: bool,
    /// Limits of the cgroup.
    pub limits: Limits,
    /// Limits of the process.
    pub rlimits: Vec<Rlimit>,
    /// Devices of the host.
    pub devices: Vec<Device>,
    /// Kernel parameters of the container's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Annotations of the spec, which runtimes and hooks read.
    pub annotations: BTreeMap<String, String>,
}

/// What the host is like, as far as a spec depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The architecture in Rust's words.
    pub architecture: String,
    /// Major and minor version of the kernel.
    pub kernel: (u32, u32),
    /// The capabilities that can be given, as a mask.
    pub capabilities: u64,
    /// Whether cgroups are the unified hierarchy alone.
    pub unified_cgroups: bool,
    /// Whether swap can be limited.
    pub swap_limit: bool,
    /// The devices that a privileged container gets.
    pub devices: Vec<Device>,
}

impl Host {
    /// This machine. What cannot be found out counts as absent; the devices of `/dev` are not listed, because only
    /// privileged containers need them ([`device::host_devices`]).
    pub fn detect() -> Host {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
        let kernel = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let capabilities = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .unwrap_or(0);
        let exists = |path: &str| std::fs::metadata(path).is_ok();
        let unified_cgroups = exists("/sys/fs/cgroup/cgroup.controllers");
        let swap_limit = exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
            || exists("/sys/fs/cgroup/init.scope/memory.swap.max")
            || exists("/sys/fs/cgroup/system.slice/memory.swap.max");
        Host {
            architecture: std::env::consts::ARCH.to_owned(),
            kernel,
            capabilities,
            unified_cgroups,
            swap_limit,
            devices: Vec::new(),
        }
    }
}
