//! The default spec in the hands of a real runc: that it runs, and that what it is to keep from a container is kept.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use davit_oci::image::ImageConfig;
use davit_oci::rootfs::Rootfs;
use davit_oci::spec::{Host, Options, build};
use davit_oci::user;

/// A bundle, and the cgroups that runc makes for it, both gone at the end.
struct Bundle {
    folder: tempfile::TempDir,
    /// The first component of the cgroup's path.
    cgroup: String,
    id: String,
}

impl Bundle {
    /// A root filesystem with nothing but busybox and a user; `None` where that cannot be run.
    fn new(name: &str) -> Option<Bundle> {
        let has = |program: &str| Command::new(program).arg("--help").output().is_ok();
        if !nix::unistd::geteuid().is_root() || !has("runc") || fs::metadata("/bin/busybox").is_err() {
            println!("skipped: needs root, runc and a static /bin/busybox");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let rootfs = folder.path().join("rootfs");
        for path in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(rootfs.join(path)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        symlink("busybox", rootfs.join("bin/sh")).unwrap();
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n").unwrap();
        fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\naudio:x:63:user\n").unwrap();
        let cgroup = format!("davit-oci-{}-{name}", std::process::id());
        Some(Bundle { folder, id: format!("{cgroup}-box"), cgroup })
    }

    /// Runs a script as the image's command and returns what it printed.
    fn run(&self, user: &str, script: &str, change: impl FnOnce(&mut Options)) -> Output {
        let mut options = Options {
            id: self.id.clone(),
            namespace: self.cgroup.clone(),
            args: ["/bin/busybox", "sh", "-c", script].map(str::to_owned).to_vec(),
            ..Options::default()
        };
        change(&mut options);
        let rootfs = Rootfs::from_path(&self.folder.path().join("rootfs"));
        let user = user::resolve(&rootfs, user, &[]).unwrap();
        let spec = build(&ImageConfig::default(), &user, &options, &Host::detect()).unwrap();
        fs::write(self.folder.path().join("config.json"), spec.to_json()).unwrap();
        let state = self.folder.path().join("state");
        let mut command = Command::new("runc");
        command.arg("--root").arg(state).args(["run", "--bundle"]).arg(self.folder.path()).arg(&self.id);
        command.output().unwrap()
    }

    fn text(&self, user: &str, script: &str) -> String {
        let output = self.run(user, script, |_| {});
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let hierarchies =
            fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([Path::new("/sys/fs/cgroup").to_owned()]) {
            let _ = fs::remove_dir(hierarchy.join(&self.cgroup));
        }
    }
}

#[test]
fn root_has_dockers_capabilities_and_a_filter() {
    let Some(bundle) = Bundle::new("root") else { return };
    let text =
        bundle.text("", "busybox id; busybox grep -E '^(CapEff|CapInh|CapAmb|Seccomp):' /proc/self/status");
    assert!(text.starts_with("uid=0(root) gid=0(root) groups=0(root)\n"), "{text}");
    let line = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key));
        found.map(|value| value.trim().to_owned()).unwrap_or_default()
    };
    assert_eq!(u64::from_str_radix(&line("CapEff:"), 16).unwrap(), 0xa804_25fb);
    assert_eq!(u64::from_str_radix(&line("CapInh:"), 16).unwrap(), 0);
    assert_eq!(u64::from_str_radix(&line("CapAmb:"), 16).unwrap(), 0);
    assert_eq!(line("Seccomp:"), "2");
}

#[test]
fn a_user_has_its_groups_and_no_capabilities() {
    let Some(bundle) = Bundle::new("user") else { return };
    let text = bundle.text("user", "busybox id; busybox grep -E '^CapEff' /proc/self/status");
    assert!(text.starts_with("uid=1000(user) gid=1000(user) groups=63(audio),1000(user)\n"), "{text}");
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
}

/// Tries in each hierarchy. On cgroup v1, the folder that holds them is a filesystem of the container's own.
const NEW_CGROUP: &str = "for folder in /sys/fs/cgroup /sys/fs/cgroup/*; do \
     busybox test -e $folder/cgroup.procs && busybox mkdir $folder/x && exit 0; done; false";

#[test]
fn the_host_is_out_of_reach() {
    let Some(bundle) = Bundle::new("reach") else { return };
    // Each would change nothing even if it succeeded.
    let attempts = [
        ("a user namespace", "busybox unshare -U true"),
        ("a mount", "busybox mount -t tmpfs none /tmp"),
        (
            "a kernel parameter",
            "value=$(busybox cat /proc/sys/kernel/panic); echo $value > /proc/sys/kernel/panic",
        ),
        ("the magic key", "echo h > /proc/sysrq-trigger"),
        ("a cgroup", NEW_CGROUP),
        ("the kernel's memory", "busybox test -s /proc/kcore"),
        ("the clock", "! busybox date -s @$(busybox date +%s) 2>&1 | busybox grep -q \"can't set\""),
        ("another root", "busybox pivot_root /tmp /tmp"),
        ("a disk", "busybox mknod /tmp/d b 7 0 && busybox dd if=/tmp/d of=/dev/null count=1"),
        ("the network", "busybox ip link add d type dummy"),
    ];
    for (what, script) in attempts {
        let output = bundle.run("", &format!("({script}) && exit 77; exit 78"), |_| {});
        assert_eq!(output.status.code(), Some(78), "{what}: {output:?}");
    }
}

#[test]
fn a_read_only_root_and_its_own_memory_filesystems() {
    let Some(bundle) = Bundle::new("ro") else { return };
    let script = "(echo x > /x) 2>/dev/null && exit 1; echo x > /dev/shm/x && echo x > /dev/null && exit 0";
    let output = bundle.run("", script, |options| options.read_only = true);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
