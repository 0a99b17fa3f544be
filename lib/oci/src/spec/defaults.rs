//! What every container gets: mounts, namespaces, device rules, and the parts of `/proc` and `/sys` kept from it.

use super::document::{DeviceRule, SpecMount, SpecNamespace};

/// The bytes of `/dev/shm`.
pub(super) const SHM_SIZE: u64 = 64 << 20;

/// Files of the kernel's that tell about the host or reach into it. `powercap` leaks through power measurement,
/// `interrupts` through the timing of keys.
pub(super) const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Files of the kernel's whose writing changes the host.
pub(super) const READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Character devices that may be opened: null, zero, full, random, urandom, tty, console, ptmx and all of devpts.
const DEVICES: [(u64, Option<u64>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

pub(super) fn mounts(shm_size: u64, privileged: bool) -> Vec<SpecMount> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| SpecMount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    };
    let shm_size = format!("size={shm_size}");
    let access = if privileged { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size]),
    ]
}

/// A cgroup namespace hides the host's paths where the hierarchy is unified; on the older one containers see them, as
/// with Docker.
pub(super) fn namespaces(own_network: bool, unified_cgroups: bool) -> Vec<SpecNamespace> {
    let mut kinds = vec!["pid", "ipc", "uts", "mount"];
    if own_network {
        kinds.push("network");
    }
    if unified_cgroups {
        kinds.push("cgroup");
    }
    kinds.into_iter().map(|kind| SpecNamespace { kind }).collect()
}

/// Everything denied, then the making of any node (which gives no access) and the use of the harmless ones allowed.
pub(super) fn device_rules() -> Vec<DeviceRule> {
    let rule = |allow, kind: Option<&str>, major, minor, access: &str| DeviceRule {
        allow,
        kind: kind.map(str::to_owned),
        major,
        minor,
        access: access.to_owned(),
    };
    let mut rules = vec![
        rule(false, None, None, None, "rwm"),
        rule(true, Some("c"), None, None, "m"),
        rule(true, Some("b"), None, None, "m"),
    ];
    rules.extend(DEVICES.iter().map(|(major, minor)| rule(true, Some("c"), Some(*major), *minor, "rwm")));
    rules
}

/// Every device allowed, for a privileged container.
pub(super) fn all_devices_rule() -> DeviceRule {
    DeviceRule { allow: true, kind: None, major: None, minor: None, access: "rwm".to_owned() }
}
