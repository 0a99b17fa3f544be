//! The default seccomp profile, and profiles that users bring.
//!
//! The default allows what ordinary programs use and answers everything else with `EPERM`: the list of Docker and
//! containerd, which programs are tested against. Calls that need a capability come with the capability, so that
//! `--cap-add` alone is enough. A profile of the user's may be the plain form of the runtime spec or Docker's, which
//! has conditions by capability, architecture and kernel; both are resolved to the plain form here.

use serde::{Deserialize, Serialize};

use super::SpecError;

/// `linux.seccomp` of the runtime spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Seccomp {
    default_action: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_errno_ret: Option<u32>,
    architectures: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    flags: Vec<String>,
    syscalls: Vec<Syscall>,
}

/// One rule of the plain form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Syscall {
    names: Vec<String>,
    action: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno_ret: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<Argument>,
}

/// A condition on an argument of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

const ALLOW: &str = "SCMP_ACT_ALLOW";
const ERRNO: &str = "SCMP_ACT_ERRNO";
const ENOSYS: u32 = nix::libc::ENOSYS as u32;
const AF_ALG: u64 = nix::libc::AF_ALG as u64;
const AF_VSOCK: u64 = nix::libc::AF_VSOCK as u64;

/// The flags of clone(2) that make a namespace: mount, cgroup, UTS, IPC, user, PID and network.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// The values of personality(2) that change nothing dangerous: `PER_LINUX`, `PER_LINUX32`, both with `UNAME26`, and
/// the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// What every container may call, on all architectures; names that one of them lacks are ignored by the runtime.
const ALWAYS: &str = "\
    _llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod \
    chown chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
    clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat \
    dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
    epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 \
    fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl \
    fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs \
    fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake \
    futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid \
    geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid \
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname \
    getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init \
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 \
    io_setup io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset \
    landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat \
    llistxattr lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules lsm_set_self_attr lstat \
    lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod \
    mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive \
    mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv \
    msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause \
    pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl \
    pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 \
    read readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages \
    removexattr removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction \
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity \
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 \
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl \
    semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto \
    set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid \
    setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat \
    shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair \
    splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo \
    tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime \
    timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times \
    tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat \
    utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev \
    process_vm_readv process_vm_writev ptrace";

/// What belongs to an architecture (in Rust's words).
const BY_ARCHITECTURE: [(&str, &str); 6] = [
    ("x86_64", "arch_prctl modify_ldt"),
    ("x86", "modify_ldt"),
    ("aarch64", "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls"),
    ("powerpc64", "sync_file_range2 swapcontext"),
    ("s390x", "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
    ("riscv64", "riscv_flush_icache riscv_hwprobe"),
];

/// What comes with a capability.
const BY_CAPABILITY: [(&str, &str); 14] = [
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        SYS_ADMIN,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

const SYS_ADMIN: &str = "CAP_SYS_ADMIN";

/// The default profile for a container with these capabilities on a machine of this architecture (in Rust's words,
/// [`std::env::consts::ARCH`]).
pub fn default_profile(capabilities: &[String], architecture: &str) -> Seccomp {
    let has = |name: &str| capabilities.iter().any(|capability| capability == name);
    let mut syscalls = vec![allow(ALWAYS, Vec::new())];
    // AF_ALG and AF_VSOCK stay out. Three rules of one condition each, because runtimes turn two conditions on one
    // argument into alternatives, and together these leave exactly those two families unmatched.
    for (op, value) in [("LT", AF_ALG), ("EQ", AF_ALG + 1), ("GT", AF_VSOCK)] {
        syscalls.push(allow("socket", vec![compare(0, op, value)]));
    }
    for value in PERSONALITIES {
        syscalls.push(allow("personality", vec![compare(0, "EQ", value)]));
    }
    for (_, names) in BY_ARCHITECTURE.iter().filter(|(name, _)| *name == architecture) {
        syscalls.push(allow(names, Vec::new()));
    }
    for (_, names) in BY_CAPABILITY.iter().filter(|(name, _)| has(name)) {
        syscalls.push(allow(names, Vec::new()));
    }
    if !has(SYS_ADMIN) {
        // s390 has the flags of clone(2) in its second argument.
        let index = u32::from(architecture == "s390x");
        syscalls.push(allow("clone", vec![compare(index, "MASKED_EQ", CLONE_NAMESPACES)]));
        // The flags of clone3(2) lie in memory, where no filter can see them. With ENOSYS the C libraries fall back
        // to clone(2); EPERM would be taken for final.
        let names = vec!["clone3".to_owned()];
        syscalls.push(Syscall { names, action: ERRNO.to_owned(), errno_ret: Some(ENOSYS), args: Vec::new() });
    }
    Seccomp {
        default_action: ERRNO.to_owned(),
        default_errno_ret: None,
        architectures: filter_architectures(architecture),
        flags: Vec::new(),
        syscalls,
    }
}

fn allow(names: &str, args: Vec<Argument>) -> Syscall {
    let names = names.split_ascii_whitespace().map(str::to_owned).collect();
    Syscall { names, action: ALLOW.to_owned(), errno_ret: None, args }
}

fn compare(index: u32, op: &str, value: u64) -> Argument {
    Argument { index, value, value_two: 0, op: format!("SCMP_CMP_{op}") }
}

/// The instruction sets that a machine executes, in libseccomp's words. Without the second ones a process could
/// switch to them and leave the filter.
fn filter_architectures(architecture: &str) -> Vec<String> {
    let names: &[&str] = match architecture {
        "x86_64" => &["X86_64", "X86", "X32"],
        "aarch64" => &["ARM", "AARCH64"],
        "s390x" => &["S390", "S390X"],
        "riscv64" => &["RISCV64"],
        "loongarch64" => &["LOONGARCH64"],
        _ => &[],
    };
    names.iter().map(|name| format!("SCMP_ARCH_{name}")).collect()
}

/// A profile that a user brings, in the runtime spec's form or Docker's.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    arch_map: Vec<ArchitectureGroup>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchitectureGroup {
    architecture: String,
    #[serde(default)]
    sub_architectures: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    name: String,
    #[serde(default)]
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Argument>>,
    #[serde(default)]
    includes: Conditions,
    #[serde(default)]
    excludes: Conditions,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Conditions {
    #[serde(default)]
    caps: Vec<String>,
    #[serde(default)]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

/// What the conditions of a profile are compared with.
#[derive(Debug, Clone)]
pub struct Circumstances<'a> {
    /// The capabilities of the container.
    pub capabilities: &'a [String],
    /// The architecture in Rust's words.
    pub architecture: &'a str,
    /// Major and minor version of the running kernel.
    pub kernel: (u32, u32),
}

impl Profile {
    /// Parses a profile.
    ///
    /// # Errors
    /// [`SpecError::SeccompProfile`] when it is not the JSON that it should be, or names its architectures twice.
    pub fn parse(bytes: &[u8]) -> Result<Profile, SpecError> {
        let profile: Profile = serde_json::from_slice(bytes).map_err(SpecError::SeccompProfile)?;
        let both = !profile.architectures.is_empty() && !profile.arch_map.is_empty();
        let two_names = profile.syscalls.iter().any(|rule| !rule.name.is_empty() && !rule.names.is_empty());
        if both || two_names {
            let text =
                if both { "both architectures and archMap" } else { "a rule with both name and names" };
            return Err(SpecError::SeccompProfile(serde::de::Error::custom(text)));
        }
        Ok(profile)
    }

    /// The plain form, with the rules whose conditions hold.
    pub fn resolve(&self, circumstances: &Circumstances<'_>) -> Seccomp {
        let native = filter_architectures(circumstances.architecture);
        let mut architectures = self.architectures.clone();
        // The group whose leader this machine runs natively; libseccomp's native name is one of ours.
        let leader = match circumstances.architecture {
            "aarch64" => "SCMP_ARCH_AARCH64",
            "s390x" => "SCMP_ARCH_S390X",
            _ => native.first().map_or("", String::as_str),
        };
        if let Some(group) = self.arch_map.iter().find(|group| group.architecture == leader) {
            architectures.push(group.architecture.clone());
            architectures.extend(group.sub_architectures.iter().cloned());
        }
        let applies =
            |rule: &&Rule| rule.includes.all_hold(circumstances) && !rule.excludes.any_holds(circumstances);
        let plain = |rule: &Rule| Syscall {
            names: if rule.name.is_empty() { rule.names.clone() } else { vec![rule.name.clone()] },
            action: rule.action.clone(),
            errno_ret: rule.errno_ret,
            args: rule.args.clone().unwrap_or_default(),
        };
        Seccomp {
            default_action: self.default_action.clone(),
            default_errno_ret: self.default_errno_ret,
            architectures,
            flags: self.flags.clone(),
            syscalls: self.syscalls.iter().filter(applies).map(plain).collect(),
        }
    }
}

impl Conditions {
    /// Each kind that is given holds: all capabilities, one of the architectures, the kernel.
    fn all_hold(&self, circumstances: &Circumstances<'_>) -> bool {
        let capabilities = self.caps.iter().all(|capability| circumstances.capabilities.contains(capability));
        let architecture = self.arches.is_empty() || self.has_architecture(circumstances);
        capabilities
            && architecture
            && self.min_kernel.as_deref().is_none_or(|text| kernel_is(text, circumstances))
    }

    /// Any kind that is given holds.
    fn any_holds(&self, circumstances: &Circumstances<'_>) -> bool {
        self.caps.iter().any(|capability| circumstances.capabilities.contains(capability))
            || self.has_architecture(circumstances)
            || self.min_kernel.as_deref().is_some_and(|text| kernel_is(text, circumstances))
    }

    /// Profiles name architectures in Go's words.
    fn has_architecture(&self, circumstances: &Circumstances<'_>) -> bool {
        let name = match circumstances.architecture {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        self.arches.iter().any(|architecture| architecture == name)
    }
}

fn kernel_is(minimum: &str, circumstances: &Circumstances<'_>) -> bool {
    let mut numbers = minimum.split('.').map(|part| part.parse::<u32>().unwrap_or(u32::MAX));
    let minimum = (numbers.next().unwrap_or(u32::MAX), numbers.next().unwrap_or(0));
    circumstances.kernel >= minimum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn allows(profile: &Seccomp, name: &str) -> bool {
        profile
            .syscalls
            .iter()
            .any(|rule| rule.action == ALLOW && rule.names.iter().any(|known| known == name))
    }

    #[test]
    fn the_default_denies_what_escapes_were_made_of() {
        let profile = default_profile(&[], "x86_64");
        for name in ["read", "execve", "clone", "futex", "openat2", "ptrace", "arch_prctl", "socket"] {
            assert!(allows(&profile, name), "{name}");
        }
        for name in [
            "mount",
            "unshare",
            "setns",
            "bpf",
            "kexec_load",
            "keyctl",
            "add_key",
            "io_uring_setup",
            "userfaultfd",
            "clone3",
            "open_by_handle_at",
            "init_module",
            "reboot",
            "perf_event_open",
            "chroot",
        ] {
            assert!(!allows(&profile, name), "{name}");
        }
        assert_eq!(profile.default_action, ERRNO);
        assert_eq!(profile.architectures, ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    }

    #[test]
    fn capabilities_bring_their_calls() {
        let profile = default_profile(&capabilities(&["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]), "x86_64");
        for name in ["mount", "unshare", "clone3", "chroot"] {
            assert!(allows(&profile, name), "{name}");
        }
        assert!(!allows(&profile, "reboot"));
    }

    #[test]
    fn the_list_has_no_repetition() {
        let names: Vec<&str> = ALWAYS.split_ascii_whitespace().collect();
        let unique: std::collections::BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), unique.len());
        assert!(names.len() > 350);
    }

    #[test]
    fn dockers_conditions() {
        let text = br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,
            "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],
            "syscalls":[
              {"names":["read"],"action":"SCMP_ACT_ALLOW","args":null},
              {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
              {"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]},
               "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
              {"names":["new"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"6.9"}},
              {"names":["arm"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"]}}]}"#;
        let profile = Profile::parse(text).unwrap();
        let circumstances = Circumstances { capabilities: &[], architecture: "x86_64", kernel: (6, 8) };
        let plain = profile.resolve(&circumstances);
        assert_eq!(plain.architectures, ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]);
        assert!(allows(&plain, "read") && allows(&plain, "clone"));
        assert!(!allows(&plain, "mount") && !allows(&plain, "new") && !allows(&plain, "arm"));
        let privileged = capabilities(&["CAP_SYS_ADMIN"]);
        let circumstances = Circumstances { capabilities: &privileged, kernel: (6, 10), ..circumstances };
        let plain = profile.resolve(&circumstances);
        assert!(allows(&plain, "mount") && allows(&plain, "new") && !allows(&plain, "clone"));
        assert!(Profile::parse(b"{}").is_err());
    }
}
