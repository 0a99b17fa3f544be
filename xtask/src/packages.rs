//! What the quickstart and the tests need from the system, by the names of Debian's packages.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::build::run_with;

/// A package and a file that tells that it is there.
pub(crate) type Package = (&'static str, &'static str);

/// What running a container needs.
pub(crate) const QUICKSTART: &[Package] = &[("runc", "/usr/sbin/runc"), ("busybox-static", "/bin/busybox")];

/// What the tests need besides: another runtime, clients and peers, another implementation of gRPC, a registry,
/// filesystems for the snapshotters, one that a process serves among them, and what checkpoints processes.
pub(crate) const TEST: &[Package] = &[
    ("runc", "/usr/sbin/runc"),
    ("busybox-static", "/bin/busybox"),
    ("crun", "/usr/bin/crun"),
    ("containerd", "/usr/bin/containerd"),
    ("python3-grpcio", "/usr/lib/python3/dist-packages/grpc/__init__.py"),
    ("docker.io", "/usr/sbin/dockerd"),
    ("docker-registry", "/usr/bin/docker-registry"),
    ("btrfs-progs", "/usr/bin/btrfs"),
    ("erofs-utils", "/usr/bin/fsck.erofs"),
    ("criu", "/usr/sbin/criu"),
    ("fuse-overlayfs", "/usr/bin/fuse-overlayfs"),
];

/// Installs the packages that are missing, and says so first.
///
/// # Errors
/// Not root, no `apt-get`, or the installation fails.
pub(crate) fn install(packages: &[Package]) -> Result<()> {
    let missing: Vec<&str> =
        packages.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("Installing from Debian, because they are missing: {}", missing.join(" "));
    if !is_root() {
        bail!(
            "this needs root; run it as root, or install them first: apt-get install {}",
            missing.join(" ")
        );
    }
    let env = [("DEBIAN_FRONTEND", "noninteractive")];
    run_with("apt-get", &["update", "-qq"], &env)?;
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
    args.extend(missing);
    run_with("apt-get", &args, &env)
}

/// True for root, whom mounts and cgroups obey.
pub(crate) fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}
