//! Snapshotters other than overlayfs, as operators use them: images are unpacked into them, containers run on them and
//! outlive the daemon, and nothing is left of either, neither mounts nor loop devices.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::image::{self, Entry};
use davit_integration::registry::Registry;
use davit_integration::{Daemon, daemon, wait};
use nix::sys::signal::Signal;
use serde_json::json;
use tar::EntryType;

use crate::root;

/// A folder on a btrfs, and a file with an empty ext4: what the administrator brings.
struct Outside {
    folder: tempfile::TempDir,
    has_btrfs: bool,
}

impl Outside {
    fn new() -> Result<Outside> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        let make = |program: &str, name: &str, size: u64| -> Result<bool> {
            File::create(path(name))?.set_len(size)?;
            let made = Command::new(program).arg("-q").arg(path(name)).output();
            Ok(made.is_ok_and(|made| made.status.success()))
        };
        ensure!(make("mkfs.ext4", "scratch", 32 << 20)?, "mkfs.ext4 is missing: apt-get install e2fsprogs");
        fs::create_dir(path("btrfs"))?;
        let has_btrfs = make("mkfs.btrfs", "image", 256 << 20)? && {
            let mut mount = Command::new("mount");
            mount.args(["-t", "btrfs", "-o", "loop"]).arg(path("image")).arg(path("btrfs"));
            mount.output()?.status.success()
        };
        Ok(Outside { folder, has_btrfs })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> String {
        format!(
            "[snapshotters.blockfile]\nscratch_file = {:?}\n[snapshotters.btrfs]\nroot_path = {:?}\n",
            self.path("scratch"),
            self.path("btrfs/davit")
        )
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if self.has_btrfs {
            // Where it fails something uses it still, and that is told by other means.
            let _ = Command::new("umount").arg("-l").arg(self.path("btrfs")).status();
        }
    }
}

/// Those that can be tried here, with the folders of their snapshots; the others are named.
fn usable(daemon: &Daemon, outside: &Outside) -> Result<Vec<(&'static str, PathBuf)>> {
    let erofs = fs::read_to_string("/proc/filesystems")?.contains("\terofs\n");
    let usual = |name: &str| daemon.path(format!("root/io.containerd.snapshotter.v1.{name}"));
    let all = [
        ("native", usual("native"), None),
        ("blockfile", usual("blockfile"), None),
        (
            "btrfs",
            outside.path("btrfs/davit"),
            (!outside.has_btrfs).then_some("btrfs (apt-get install btrfs-progs)"),
        ),
        ("erofs", usual("erofs"), (!erofs).then_some("a kernel with erofs")),
    ];
    let mut usable = Vec::new();
    for (name, folder, missing) in all {
        match missing {
            Some(missing) => eprintln!("skipped: {name} needs {missing}"),
            None => usable.push((name, folder.join("snapshots"))),
        }
    }
    Ok(usable)
}

/// An image of three layers whose user has a name, which is found in the second, and of which the third takes a part away.
fn write_image(path: &Path) -> Result<()> {
    let entry = |path, data| Entry { path, kind: EntryType::Regular, mode: 0o644, data };
    let users = entry("etc/passwd", &b"root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n"[..]);
    let layers = [
        image::busybox_layer()?,
        image::layer(&[users, entry("below", b"below"), entry("shown", b"below")])?,
        image::layer(&[entry(".wh.below", b""), entry("shown", b"above")])?,
    ];
    let config = json!({ "Env": ["PATH=/bin"], "User": "app", "Cmd": ["id"] });
    image::oci_archive(path, "docker.io/library/layers:latest", &layers, &config)
}

/// Waits until no loop device has a file below a folder.
fn wait_for_devices(folder: &Path) -> Result<()> {
    wait::until("no loop device is left", || {
        let devices = fs::read_dir("/sys/block").ok()?.flatten();
        let mut files =
            devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
        (!files.any(|file| Path::new(file.trim_end()).starts_with(folder))).then_some(())
    })
    .map(drop)
}

#[test]
fn containers_on_every_snapshotter_outlive_the_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let outside = Outside::new()?;
    let mut daemon = Daemon::start_with(&[], &outside.config())?;
    let census = Census::take(&daemon.path(""));
    write_image(&daemon.path("image.tar"))?;
    let usable = usable(&daemon, &outside)?;
    let davit = |daemon: &Daemon, args: &[&str]| daemon::ok(daemon.davit(args)?).context(args.join(" "));
    davit(&daemon, &["load", "-i", &daemon.path("image.tar").display().to_string()])?;
    let script = "id -u; cat shown; ls below; touch /tmp/new && cat /tmp/new";
    for (name, _) in &usable {
        let output = daemon.davit(["run", "--rm", "--snapshotter", name, "layers", "sh", "-c", script])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(said == "1234\nabove", "{name}: {output:?}");
        davit(&daemon, &["run", "-d", "--name", name, "--snapshotter", name, "layers", "sleep", "600"])?;
        davit(&daemon, &["exec", "-u", "root", name, "sh", "-c", "echo kept > /kept"])?;
    }
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    for (name, _) in &usable {
        let said = davit(&daemon, &["exec", "-u", "app", name, "sh", "-c", "id -g; cat /kept shown"])?;
        ensure!(said == "1235\nkept\nabove", "{name}: {said}");
        davit(&daemon, &["stop", "-t", "0", name])?;
        // What was written is there when the container runs again.
        davit(&daemon, &["start", name])?;
        ensure!(davit(&daemon, &["exec", name, "cat", "/kept"])? == "kept\n", "{name}");
        davit(&daemon, &["rm", "-f", name])?;
    }
    davit(&daemon, &["rmi", "layers"])?;
    for (name, folder) in &usable {
        let empty = || (fs::read_dir(folder).ok()?.next().is_none()).then_some(());
        wait::until("the snapshots are deleted", empty).with_context(|| (*name).to_owned())?;
    }
    census.settle(&daemon.path(""))?;
    wait_for_devices(&daemon.path(""))?;
    daemon.stop(Signal::SIGTERM)
}

/// Debian's shim mounts what the daemon gives it; and what it cannot is mounted for it.
#[test]
fn shims_of_others_run_on_every_snapshotter() -> Result<()> {
    let shim = Path::new("/usr/bin/containerd-shim-runc-v2");
    if !root() {
        return Ok(());
    }
    if !shim.exists() {
        eprintln!("skipped: needs {} (apt-get install containerd)", shim.display());
        return Ok(());
    }
    let outside = Outside::new()?;
    let config = format!("{}[runtime]\nshim = {shim:?}\n", outside.config());
    let mut daemon = Daemon::start_with(&[], &config)?;
    let census = Census::take(&daemon.path(""));
    write_image(&daemon.path("image.tar"))?;
    daemon::ok(daemon.davit(["load", "-i", &daemon.path("image.tar").display().to_string()])?)?;
    for (name, _) in usable(&daemon, &outside)? {
        let args = ["run", "--rm", "--snapshotter", name, "layers", "sh", "-c", "cat shown; ls below"];
        let output = daemon.davit(args)?;
        ensure!(output.stdout == b"above" && !output.status.success(), "{name}: {output:?}");
    }
    census.settle(&daemon.path(""))?;
    wait_for_devices(&daemon.path(""))?;
    daemon.stop(Signal::SIGTERM)
}

#[test]
fn a_pull_unpacks_into_the_snapshotter_that_is_asked_for() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let outside = Outside::new()?;
    let mut daemon = Daemon::start_with(&[], &outside.config())?;
    let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(()) };
    write_image(&daemon.path("image.tar"))?;
    let davit = |args: &[&str]| daemon::ok(daemon.davit(args)?).context(args.join(" "));
    davit(&["load", "-i", &daemon.path("image.tar").display().to_string()])?;
    let name = format!("{}/layers", registry.address);
    davit(&["tag", "layers", &name])?;
    davit(&["push", &name])?;
    davit(&["rmi", "layers", &name])?;
    for (snapshotter, folder) in usable(&daemon, &outside)? {
        let said =
            davit(&["run", "--rm", "--pull", "always", "--snapshotter", snapshotter, &name, "cat", "shown"])?;
        ensure!(said == "above", "{snapshotter}: {said}");
        ensure!(fs::read_dir(&folder)?.count() >= 3, "{snapshotter}: no layers in {}", folder.display());
    }
    daemon.stop(Signal::SIGTERM)?;
    wait_for_devices(&daemon.path(""))
}

#[test]
fn what_is_not_there_is_told() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let ctr = daemon.ctr();
    let listed = ctr.run("plugins ls")?;
    let status = |name: &str| {
        let mut lines = listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines
            .find(|words| words.len() > 3 && words[0] == "io.containerd.snapshotter.v1" && words[1] == name)
            .map(|words| words[3].to_owned())
    };
    for name in ["overlayfs", "native"] {
        ensure!(status(name).as_deref() == Some("ok"), "{name}: {listed}");
    }
    // Nobody has said what a file begins as, and the folder is on no btrfs; the others are not built.
    for name in ["blockfile", "devmapper", "zfs"] {
        ensure!(status(name).as_deref() == Some("skip"), "{name}: {listed}");
        let refused = ctr.fails(&format!("snapshots --snapshotter {name} ls"))?;
        ensure!(refused.contains(&format!("snapshotter not loaded: {name}: invalid argument")), "{refused}");
    }
    daemon.import_busybox()?;
    let output = daemon.davit(["run", "--rm", "--snapshotter", "zfs", "busybox", "true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(125) && said.contains("`davit info`"), "{said}");
    daemon.stop(Signal::SIGTERM)
}
