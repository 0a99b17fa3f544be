//! From the texts of the command line to the options of a runtime spec.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use davit_oci::environment;
use davit_oci::spec::seccomp::Profile;
use davit_oci::spec::{Device, Limits, Network, Options as SpecOptions, Rlimit, SeccompChoice};

use super::CreateOptions;
use super::mounts::{self, Mount};
use crate::error::{Error, Result};
use crate::{format, terminal};

/// The names of `--ulimit`, and setrlimit(2)'s.
const RLIMITS: [(&str, &str); 15] = [
    ("core", "RLIMIT_CORE"),
    ("cpu", "RLIMIT_CPU"),
    ("data", "RLIMIT_DATA"),
    ("fsize", "RLIMIT_FSIZE"),
    ("locks", "RLIMIT_LOCKS"),
    ("memlock", "RLIMIT_MEMLOCK"),
    ("msgqueue", "RLIMIT_MSGQUEUE"),
    ("nice", "RLIMIT_NICE"),
    ("nofile", "RLIMIT_NOFILE"),
    ("nproc", "RLIMIT_NPROC"),
    ("rss", "RLIMIT_RSS"),
    ("rtprio", "RLIMIT_RTPRIO"),
    ("rttime", "RLIMIT_RTTIME"),
    ("sigpending", "RLIMIT_SIGPENDING"),
    ("stack", "RLIMIT_STACK"),
];

/// Options of Docker's that are often used and not there yet: better a sentence than "unexpected argument".
#[derive(Debug, Clone, clap::Args)]
pub(super) struct NotYet {
    #[arg(short, long, hide = true)]
    publish: Vec<String>,
    #[arg(short = 'P', long, hide = true)]
    publish_all: bool,
    #[arg(long, hide = true)]
    init: bool,
    #[arg(long, hide = true)]
    health_cmd: Option<String>,
}

impl NotYet {
    /// Refuses what was given of them.
    ///
    /// # Errors
    /// [`Error::Usage`], with what to do instead.
    pub(super) fn refuse(&self) -> Result<()> {
        let options = [
            (
                "--publish",
                !self.publish.is_empty() || self.publish_all,
                "use --network=host to be reached from outside",
            ),
            ("--init", self.init, "run an init program of the image's as the command"),
            ("--health-cmd", self.health_cmd.is_some(), "check from outside with `davit exec`"),
        ];
        match options.iter().find(|(_, given, _)| *given) {
            Some((name, _, instead)) => Err(Error::usage(format!("{name} is not supported yet"), *instead)),
            None => Ok(()),
        }
    }
}

/// What the spec is to have, all but the container's id and namespace.
///
/// # Errors
/// [`Error::Usage`] for what is not well formed or not supported, and those of the files that are named.
pub(super) fn resolve(options: &CreateOptions, args: &[String]) -> Result<SpecOptions> {
    let network = network(&options.network)?;
    let mut binds = options.volume.iter().map(|text| mounts::volume(text)).collect::<Result<Vec<_>>>()?;
    let mut tmpfs: Vec<_> = options.tmpfs.iter().map(|text| mounts::tmpfs(text)).collect();
    for text in &options.mount {
        match mounts::mount(text)? {
            Mount::Bind(mount) => binds.push(mount),
            Mount::Tmpfs(mount) => tmpfs.push(mount),
        }
    }
    options.names.check()?;
    let mut hostname = options.hostname.clone().unwrap_or_default();
    if hostname.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
        return Err(Error::usage(format!("invalid host name {hostname:?}"), "want one word"));
    }
    if network == Network::Host && hostname.is_empty() {
        let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        hostname = own.trim().to_owned();
    }
    let mut spec = SpecOptions {
        args: args.to_vec(),
        entrypoint: options.entrypoint.clone().map(|command| vec![command]),
        env: variables(&options.env_file, &options.env)?,
        working_dir: options.workdir.clone(),
        terminal: options.tty,
        console_size: if options.tty { terminal::size() } else { None },
        hostname,
        network,
        binds,
        tmpfs,
        shm_size: options.shm_size,
        read_only: options.read_only,
        privileged: options.privileged,
        cap_add: options.cap_add.clone(),
        cap_drop: options.cap_drop.clone(),
        limits: limits(options)?,
        rlimits: options.ulimit.iter().map(|text| rlimit(text)).collect::<Result<_>>()?,
        devices: options.device.iter().map(|text| device(text)).collect::<Result<_>>()?,
        sysctls: pairs("sysctl", &options.sysctl)?,
        annotations: pairs("annotation", &options.annotation)?,
        ..SpecOptions::default()
    };
    for option in &options.security_opt {
        security_option(&mut spec, option)?;
    }
    Ok(spec)
}

/// The variables of files and of single options, the latter last.
///
/// # Errors
/// When a file cannot be read, or an entry is none.
pub(crate) fn variables(files: &[PathBuf], entries: &[String]) -> Result<Vec<String>> {
    let lookup = |key: &str| std::env::var(key).ok();
    let mut all = Vec::new();
    for path in files {
        let text = fs::read_to_string(path).map_err(|source| Error::File {
            action: "cannot read the environment file",
            path: path.clone(),
            source,
        })?;
        all.extend(environment::parse_file(&text, lookup)?);
    }
    for entry in entries {
        all.push(environment::resolve(entry, lookup)?);
    }
    Ok(all)
}

fn network(mode: &str) -> Result<Network> {
    match mode {
        "none" => Ok(Network::None),
        "host" => Ok(Network::Host),
        other => Err(Error::usage(
            format!("network {other:?} is not supported yet"),
            "use --network=none (a network of its own with nothing but loopback, the default) or --network=host",
        )),
    }
}

fn limits(options: &CreateOptions) -> Result<Limits> {
    let swap = |text: &String| match text.as_str() {
        "-1" => Ok(-1),
        other => format::parse_size(other)
            .map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX))
            .map_err(|message| Error::usage(message, "or -1 for no limit of swap")),
    };
    Ok(Limits {
        memory: options.memory.filter(|bytes| *bytes > 0),
        memory_swap: options.memory_swap.as_ref().map(swap).transpose()?.filter(|swap| *swap != 0),
        memory_reservation: options.memory_reservation.filter(|bytes| *bytes > 0),
        cpus: options.cpus,
        cpu_shares: options.cpu_shares,
        cpuset_cpus: options.cpuset_cpus.clone(),
        cpuset_mems: options.cpuset_mems.clone(),
        pids: options.pids_limit,
    })
}

/// `name=soft[:hard]`, -1 or `unlimited` for no limit.
fn rlimit(text: &str) -> Result<Rlimit> {
    let error = || {
        let names: Vec<&str> = RLIMITS.iter().map(|(name, _)| *name).collect();
        let hint = format!("want NAME=SOFT[:HARD], with one of these names: {}", names.join(", "));
        Error::usage(format!("invalid ulimit {text:?}"), hint)
    };
    let (name, values) = text.split_once('=').ok_or_else(error)?;
    let (_, kind) = RLIMITS.iter().find(|(known, _)| *known == name).ok_or_else(error)?;
    let number = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        other => other.parse::<u64>().map_err(|_| error()),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(Error::usage(
            format!("invalid ulimit {text:?}"),
            "the soft limit must not exceed the hard one",
        ));
    }
    Ok(Rlimit { name: (*kind).to_owned(), soft, hard })
}

/// `/dev/host[:/dev/container][:rwm]`.
fn device(text: &str) -> Result<Device> {
    let parts: Vec<&str> = text.split(':').collect();
    let is_access = |part: &str| {
        !part.is_empty() && part.len() <= 3 && part.chars().all(|letter| matches!(letter, 'r' | 'w' | 'm'))
    };
    let (source, path, access) = match parts[..] {
        [source] => (source, source, "rwm"),
        [source, access] if is_access(access) => (source, source, access),
        [source, path] => (source, path, "rwm"),
        [source, path, access] if is_access(access) => (source, path, access),
        _ => {
            return Err(Error::usage(
                format!("invalid device {text:?}"),
                "want /dev/HOST[:/dev/CONTAINER][:ACCESS], the access being some of r, w and m",
            ));
        }
    };
    if !path.starts_with('/') {
        return Err(Error::usage(
            format!("invalid device {text:?}"),
            "its path in the container must be absolute",
        ));
    }
    Ok(Device::from_host(Path::new(source), path, access)?)
}

fn pairs(what: &str, texts: &[String]) -> Result<BTreeMap<String, String>> {
    let pair = |text: &String| match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Error::usage(format!("invalid {what} {text:?}"), "want KEY=VALUE")),
    };
    texts.iter().map(pair).collect()
}

fn security_option(spec: &mut SpecOptions, text: &str) -> Result<()> {
    // Docker still takes the colon of its first versions.
    let (key, value) = text.split_once(['=', ':']).unwrap_or((text, ""));
    match (key, value) {
        ("seccomp", "unconfined") => spec.seccomp = SeccompChoice::Unconfined,
        ("seccomp", "builtin") => spec.seccomp = SeccompChoice::Default,
        ("seccomp", path) if !path.is_empty() => {
            let bytes = fs::read(path).map_err(|source| Error::File {
                action: "cannot read the seccomp profile",
                path: PathBuf::from(path),
                source,
            })?;
            spec.seccomp = SeccompChoice::Profile(Profile::parse(&bytes)?);
        }
        ("no-new-privileges", "" | "true") => spec.no_new_privileges = true,
        ("no-new-privileges", "false") => spec.no_new_privileges = false,
        // No profile of AppArmor's or label of SELinux's is ever set, so there is nothing to lift.
        ("apparmor", "unconfined") | ("label", "disable") => {}
        _ => {
            return Err(Error::usage(
                format!("security option {text:?} is not supported"),
                "want seccomp=unconfined, seccomp=FILE or no-new-privileges",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulimits_devices_and_networks() {
        let limit = rlimit("nofile=1024:2048").unwrap();
        assert_eq!((limit.name.as_str(), limit.soft, limit.hard), ("RLIMIT_NOFILE", 1024, 2048));
        assert_eq!(rlimit("core=unlimited").unwrap().hard, u64::MAX);
        for bad in ["nofile", "nofile=", "nofile=2:1", "x=1"] {
            assert!(rlimit(bad).is_err(), "{bad}");
        }
        assert_eq!(device("/dev/null:/dev/x:r").unwrap().access, "r");
        assert_eq!(device("/dev/null:rw").unwrap().path, "/dev/null");
        for bad in ["/dev/null:x", "/dev/null:/a:q", "a:b:c:d"] {
            assert!(device(bad).is_err(), "{bad}");
        }
        assert!(matches!(network("bridge"), Err(Error::Usage { .. })));
    }

    #[test]
    fn security_options() {
        let mut spec = SpecOptions::default();
        security_option(&mut spec, "no-new-privileges").unwrap();
        security_option(&mut spec, "seccomp=unconfined").unwrap();
        assert!(spec.no_new_privileges);
        assert!(matches!(spec.seccomp, SeccompChoice::Unconfined));
        for bad in ["seccomp=", "apparmor=mine", "nope"] {
            assert!(security_option(&mut spec, bad).is_err(), "{bad}");
        }
    }
}
