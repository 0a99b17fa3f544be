//! Capabilities (capabilities(7)): the names, Docker's default set, and `--cap-add` and `--cap-drop`.

use super::SpecError;

/// Every capability, by its bit. A newer kernel's are not given out before they are known here.
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The fourteen capabilities that Docker and containerd give a container (`CapEff: 00000000a80425fb`).
const DEFAULT_MASK: u64 = 0xa804_25fb;

/// The names of the capabilities whose bits are set, in the order of the bits.
pub fn names(mask: u64) -> Vec<String> {
    let set = NAMES.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1);
    set.map(|(_, name)| (*name).to_owned()).collect()
}

/// The set that a container gets. `all` is what `ALL` and `--privileged` stand for: the capabilities that the host
/// has to give. Names are taken with or without `CAP_`, in any case.
///
/// # Errors
/// [`SpecError::Capability`] for a name that is none.
pub fn tweak(add: &[String], drop: &[String], privileged: bool, all: u64) -> Result<u64, SpecError> {
    let (add_all, add) = parse(add, all)?;
    let (drop_all, drop) = parse(drop, all)?;
    if privileged {
        return Ok(all);
    }
    Ok(match (add_all, drop_all) {
        (true, _) => all & !drop,
        (false, true) => add,
        (false, false) => DEFAULT_MASK & !drop | add,
    })
}

/// Whether `ALL` is among the names, and the bits of the others.
fn parse(names: &[String], all: u64) -> Result<(bool, u64), SpecError> {
    let mut has_all = false;
    let mut mask = 0;
    for given in names {
        let upper = given.to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if name == "ALL" {
            has_all = true;
            continue;
        }
        let bit = NAMES.iter().position(|known| known.strip_prefix("CAP_") == Some(name));
        let bit = bit.ok_or_else(|| SpecError::Capability { name: given.clone() })?;
        mask |= 1 << bit;
    }
    // Dropping ALL and naming others drops all; adding ALL and others adds the others to what ALL stands for.
    Ok((has_all, if has_all { mask & all } else { mask }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = (1 << 41) - 1;

    fn set(add: &[&str], drop: &[&str]) -> u64 {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        tweak(&own(add), &own(drop), false, HOST).unwrap()
    }

    #[test]
    fn the_default_set_is_dockers() {
        let names = names(set(&[], &[]));
        let mut want = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "MKNOD",
            "NET_RAW",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ]
        .map(|name| format!("CAP_{name}"));
        let mut have = names.clone();
        have.sort();
        want.sort();
        assert_eq!(have, want);
    }

    #[test]
    fn adding_and_dropping() {
        assert_eq!(set(&["sys_admin"], &[]), DEFAULT_MASK | 1 << 21);
        assert_eq!(set(&[], &["CAP_CHOWN"]), DEFAULT_MASK & !1);
        assert_eq!(set(&["ALL"], &["CHOWN"]), HOST & !1);
        assert_eq!(set(&["CHOWN"], &["all"]), 1);
        assert_eq!(set(&["ALL"], &["ALL"]), HOST);
        assert_eq!(tweak(&[], &[], true, HOST).unwrap(), HOST);
        assert!(tweak(&["CAP_NONE".to_owned()], &[], false, HOST).is_err());
    }
}
