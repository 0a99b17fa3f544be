//! [`build`]: image configuration, user, options and host, put together.

use std::collections::BTreeSet;

use super::document::{
    Capabilities, ConsoleSize, Cpu, Linux, Memory, Pids, Process, ProcessRlimit, ProcessUser, Resources,
    Root, Spec, SpecMount, VERSION,
};
use super::seccomp::Circumstances;
use super::{
    BindMount, Host, Limits, Network, Options, SeccompChoice, SpecError, capability, defaults, seccomp,
};
use crate::environment;
use crate::image::{Execution, ImageConfig};
use crate::user::User;

/// The period over which a CPU quota is measured, in microseconds.
const CPU_PERIOD: u64 = 100_000;
/// The least memory that a container can be given: with less, none starts (Docker's limit).
const MIN_MEMORY: u64 = 6 << 20;

/// The runtime spec of a container.
///
/// # Errors
/// [`SpecError`], which says what of image or options cannot be carried out.
pub fn build(image: &ImageConfig, user: &User, options: &Options, host: &Host) -> Result<Spec, SpecError> {
    let hostname = if options.hostname.is_empty() {
        options.id.chars().take(12).collect()
    } else {
        options.hostname.clone()
    };
    let mask = capability::tweak(&options.cap_add, &options.cap_drop, options.privileged, host.capabilities)?;
    let bounding = capability::names(mask);
    let seccomp = match &options.seccomp {
        _ if options.privileged => None,
        SeccompChoice::Unconfined => None,
        SeccompChoice::Default => Some(seccomp::default_profile(&bounding, &host.architecture)),
        SeccompChoice::Profile(profile) => Some(profile.resolve(&Circumstances {
            capabilities: &bounding,
            architecture: &host.architecture,
            kernel: host.kernel,
        })),
    };
    let (masked_paths, readonly_paths) = if options.privileged {
        (Vec::new(), Vec::new())
    } else {
        (own(&defaults::MASKED_PATHS), own(&defaults::READONLY_PATHS))
    };
    let devices = if options.privileged { &host.devices } else { &options.devices };
    let mut sysctl = options.sysctls.clone();
    if options.network == Network::None && !options.privileged {
        // Harmless in a network of one's own, and it spares containers the right to do so.
        for (key, value) in
            [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")]
        {
            sysctl.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    Ok(Spec {
        oci_version: VERSION,
        process: process(&image.config, user, options, &hostname, bounding)?,
        root: Root { path: "rootfs", readonly: options.read_only },
        hostname,
        mounts: mounts(options)?,
        annotations: options.annotations.clone(),
        linux: Linux {
            cgroups_path: format!("/{}/{}", options.namespace, options.id),
            namespaces: defaults::namespaces(options.network != Network::Host, host.unified_cgroups),
            resources: resources(options, host)?,
            devices: devices.iter().map(|device| device.to_spec()).collect(),
            sysctl,
            seccomp,
            masked_paths,
            readonly_paths,
        },
    })
}

/// What a container runs, by Docker's rules: the entrypoint, then the caller's arguments or else the image's command.
/// A caller's entrypoint takes the place of both of the image's.
///
/// # Errors
/// [`SpecError::NoCommand`] when nothing is left.
pub fn process_args(
    image: &Execution,
    entrypoint: Option<&[String]>,
    args: &[String],
) -> Result<Vec<String>, SpecError> {
    let (entrypoint, command) = match entrypoint {
        Some(entrypoint) => (entrypoint, &[][..]),
        None => (&image.entrypoint[..], &image.cmd[..]),
    };
    let command = if args.is_empty() { command } else { args };
    let all: Vec<String> = entrypoint
        .iter()
        .filter(|part| !(part.is_empty() && entrypoint.len() == 1))
        .chain(command)
        .cloned()
        .collect();
    if all.is_empty() { Err(SpecError::NoCommand) } else { Ok(all) }
}

fn process(
    image: &Execution,
    user: &User,
    options: &Options,
    hostname: &str,
    bounding: Vec<String>,
) -> Result<Process, SpecError> {
    let mut base = vec![environment::DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if options.terminal {
        base.push("TERM=xterm".to_owned());
    }
    let env = environment::merge(&environment::merge(&base, &image.env), &options.env);
    let cwd = match &options.working_dir {
        Some(folder) => folder.clone(),
        None if image.working_dir.is_empty() => "/".to_owned(),
        None => image.working_dir.clone(),
    };
    absolute("working directory", &cwd)?;
    // What execve(2) leaves to any user but root; the bounding set still limits set-user-id programs.
    let held = if user.uid == 0 { bounding.clone() } else { Vec::new() };
    let rlimits = options.rlimits.iter().map(|limit| ProcessRlimit {
        kind: limit.name.clone(),
        hard: limit.hard,
        soft: limit.soft,
    });
    Ok(Process {
        terminal: options.terminal,
        console_size: options.console_size.map(|(height, width)| ConsoleSize { height, width }),
        user: ProcessUser { uid: user.uid, gid: user.gid, additional_gids: user.groups.clone() },
        args: process_args(image, options.entrypoint.as_deref(), &options.args)?,
        env,
        cwd,
        capabilities: Capabilities { bounding, effective: held.clone(), permitted: held },
        rlimits: rlimits.collect(),
        no_new_privileges: options.no_new_privileges,
    })
}

/// The default mounts, those of the caller in place of a default on the same path, parents before children.
fn mounts(options: &Options) -> Result<Vec<SpecMount>, SpecError> {
    let mut own: Vec<SpecMount> = Vec::new();
    for bind in &options.binds {
        own.push(bind_mount(bind)?);
    }
    for tmpfs in &options.tmpfs {
        absolute("tmpfs", &tmpfs.destination)?;
        let destination = tidy(&tmpfs.destination);
        // It would hide the image and all that is to be mounted in it.
        if destination == "/" {
            return Err(SpecError::RootMount);
        }
        let mut flags = vec!["nosuid".to_owned(), "nodev".to_owned(), "noexec".to_owned()];
        // An option of the caller's, such as `exec`, undoes its opposite.
        flags.retain(|flag| !tmpfs.options.iter().any(|option| *flag == format!("no{option}")));
        flags.extend(
            tmpfs.options.iter().filter(|option| !flags.contains(option)).cloned().collect::<Vec<_>>(),
        );
        own.push(SpecMount {
            destination,
            kind: "tmpfs".to_owned(),
            source: "tmpfs".to_owned(),
            options: flags,
        });
    }
    let mut taken = BTreeSet::new();
    for mount in &own {
        if !taken.insert(mount.destination.clone()) {
            return Err(SpecError::DuplicateMount { path: mount.destination.clone() });
        }
    }
    own.sort_by_key(|mount| mount.destination.matches('/').count());
    let mut all = defaults::mounts(options.shm_size.unwrap_or(defaults::SHM_SIZE), options.privileged);
    all.retain(|mount| !taken.contains(&mount.destination));
    all.extend(own);
    Ok(all)
}

fn bind_mount(bind: &BindMount) -> Result<SpecMount, SpecError> {
    absolute("mount source", &bind.source)?;
    absolute("mount target", &bind.destination)?;
    let destination = tidy(&bind.destination);
    if destination == "/" {
        return Err(SpecError::RootMount);
    }
    let propagation = if bind.propagation.is_empty() { "rprivate" } else { &bind.propagation };
    let access = if bind.read_only { "ro" } else { "rw" };
    Ok(SpecMount {
        destination,
        kind: "bind".to_owned(),
        source: bind.source.clone(),
        options: vec!["rbind".to_owned(), access.to_owned(), propagation.to_owned()],
    })
}

fn resources(options: &Options, host: &Host) -> Result<Resources, SpecError> {
    let limits = &options.limits;
    let mut devices =
        if options.privileged { vec![defaults::all_devices_rule()] } else { defaults::device_rules() };
    if !options.privileged {
        devices.extend(options.devices.iter().map(|device| device.to_rule()));
    }
    Ok(Resources {
        devices,
        memory: memory(limits, host.swap_limit)?,
        cpu: cpu(limits)?,
        pids: limits.pids.filter(|limit| *limit > 0).map(|limit| Pids { limit }),
    })
}

/// With a limit of memory and none of swap, a container gets as much swap as memory (Docker's rule).
fn memory(limits: &Limits, swap_limit: bool) -> Result<Option<Memory>, SpecError> {
    let error = |reason: String| SpecError::Limit { what: "memory", reason };
    if let Some(limit) = limits.memory
        && limit < MIN_MEMORY
    {
        return Err(error(format!("{limit} bytes are less than the minimum of 6 MiB")));
    }
    if let (Some(limit), Some(swap)) = (limits.memory, limits.memory_swap)
        && swap >= 0
        && swap.unsigned_abs() < limit
    {
        return Err(error("memory and swap together must not be less than memory".to_owned()));
    }
    if limits.memory.is_none() && limits.memory_swap.is_some_and(|swap| swap > 0) {
        return Err(error("a limit of memory and swap needs a limit of memory too".to_owned()));
    }
    let double = limits.memory.and_then(|limit| i64::try_from(limit.saturating_mul(2)).ok());
    let swap = limits.memory_swap.or(double.filter(|_| swap_limit));
    let memory = Memory { limit: limits.memory, swap, reservation: limits.memory_reservation };
    Ok((memory != Memory::default()).then_some(memory))
}

fn cpu(limits: &Limits) -> Result<Option<Cpu>, SpecError> {
    let mut cpu = Cpu {
        shares: limits.cpu_shares.filter(|shares| *shares > 0),
        cpus: limits.cpuset_cpus.clone(),
        mems: limits.cpuset_mems.clone(),
        ..Cpu::default()
    };
    if let Some(cpus) = limits.cpus.filter(|cpus| *cpus != 0.0) {
        if !(0.01..=65536.0).contains(&cpus) {
            return Err(SpecError::Limit {
                what: "cpus",
                reason: format!("{cpus} is not between 0.01 and 65536"),
            });
        }
        cpu.quota = Some((cpus * CPU_PERIOD as f64).round() as i64);
        cpu.period = Some(CPU_PERIOD);
    }
    Ok((cpu != Cpu::default()).then_some(cpu))
}

fn absolute(what: &'static str, path: &str) -> Result<(), SpecError> {
    if path.starts_with('/') { Ok(()) } else { Err(SpecError::NotAbsolute { what, path: path.to_owned() }) }
}

/// The path without a slash at its end and without `.`, `..` and empty parts, none of which can lead above the root.
fn tidy(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            other => parts.push(other),
        }
    }
    format!("/{}", parts.join("/"))
}

fn own(paths: &[&str]) -> Vec<String> {
    paths.iter().map(|path| (*path).to_owned()).collect()
}
