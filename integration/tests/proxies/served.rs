//! A snapshotter whose mounts a process serves, as that of fuse-overlayfs: layers are applied and containers run through the program
//! `mount.fuse3`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Result, ensure};
use davit_integration::census::Census;
use davit_integration::image::{self, Entry};
use davit_integration::{daemon, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tar::EntryType;

use super::front;
use super::lazy::{Lazy, Place, serve};
use crate::root;

/// The layer over busybox's: a file and a user more, a program less.
fn second_layer() -> Result<Vec<u8>> {
    let file = |path, data| Entry { path, kind: EntryType::Regular, mode: 0o644, data };
    image::layer(&[
        file("etc/second", b"second\n"),
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nsomebody:x:1234:1234::/:/bin/sh\n"),
        file("bin/.wh.yes", b""),
    ])
}

/// The processes that serve filesystems of this folder.
fn servers(folder: &Path) -> Vec<Pid> {
    let folder = folder.display().to_string();
    let serves = |line: Vec<u8>| {
        let line = String::from_utf8_lossy(&line).into_owned();
        line.starts_with("fuse-overlayfs") && line.contains(&folder)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = processes.filter(|process| fs::read(process.path().join("cmdline")).is_ok_and(serves));
    found.filter_map(|process| process.file_name().to_str()?.parse().ok()).map(Pid::from_raw).collect()
}

#[test]
fn containers_run_on_filesystems_that_processes_serve() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !Path::new("/dev/fuse").exists() || !there("fuse-overlayfs") || !there("mount.fuse3") {
        eprintln!("skipped: needs /dev/fuse and fuse-overlayfs (apt-get install fuse-overlayfs)");
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("davit-served-").tempdir_in("/tmp")?;
    let (place, socket) = (Place::Served(folder.path().join("snapshots")), folder.path().join("s.sock"));
    let _server = serve(Lazy { place, has: false, snapshots: Arc::default() }, &socket)?;
    let mut daemon = front("served", "snapshot", &socket, "")?;
    let archive = daemon.path("two.tar");
    let config = json!({ "Env": ["PATH=/bin"], "Cmd": ["sh"] });
    image::oci_archive(&archive, image::BUSYBOX, &[image::busybox_layer()?, second_layer()?], &config)?;
    daemon.ctr().run(&format!("images import --no-unpack {}", archive.display()))?;
    let census = Census::take(&daemon.path(""));
    let settled =
        || wait::until("no process serves any more", || servers(folder.path()).is_empty().then_some(()));

    // The layers are applied by the daemon; who is in the image's passwd the client looks up.
    let run = |args: &[&str]| daemon::ok(daemon.davit(args)?);
    let on = ["run", "--snapshotter", "served"];
    let said =
        run(&[&on[..], &["--rm", "--user", "somebody", "busybox", "sh", "-c", "id -u; cat /etc/second"]]
            .concat())?;
    ensure!(said == "1234\nsecond\n", "{said}");
    settled()?;
    let ctr = daemon.ctr();
    let line = format!("run --rm --snapshotter served {} one sh -c", image::BUSYBOX);
    let words: Vec<&str> =
        line.split(' ').chain(["ls /bin/yes; grep -c fuse-overlayfs /proc/mounts"]).collect();
    let refused = ctr.command(&words).output()?;
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    ensure!(said == "1\n", "{said}{}", String::from_utf8_lossy(&refused.stderr));
    settled()?;

    // A container outlives its daemon here, too, and what it has written is what is read of it.
    let script = "echo written > /file; sleep 1000";
    run(&[&on[..], &["-d", "--name", "long", "busybox", "sh", "-c", script]].concat())?;
    let exec = |words: &[&str]| daemon::ok(daemon.davit([&["exec", "long"], words].concat())?);
    wait::until("it has written", || exec(&["cat", "/file"]).ok().filter(|said| said == "written\n"))?;
    wait::until("one process serves it", || (servers(folder.path()).len() == 1).then_some(()))?;
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    let run = |args: &[&str]| daemon::ok(daemon.davit(args)?);
    ensure!(run(&["exec", "long", "cat", "/file"])? == "written\n");
    run(&["stop", "-t", "0", "long"])?;
    run(&["start", "long"])?;
    ensure!(run(&["exec", "long", "cat", "/etc/second"])? == "second\n");
    run(&["rm", "-f", "long"])?;
    settled()?;
    census.settle(&daemon.path(""))?;

    // A process that has died takes the files of its container along, and nothing else.
    run(&[&on[..], &["-d", "--name", "orphan", "busybox", "sleep", "1000"]].concat())?;
    for server in servers(folder.path()) {
        kill(server, Signal::SIGKILL)?;
    }
    settled()?;
    ensure!(!daemon.davit(["exec", "orphan", "cat", "/etc/second"])?.status.success());
    run(&[&on[..], &["--rm", "busybox", "true"]].concat())?;
    run(&["rm", "-f", "orphan"])?;
    census.settle(&daemon.path(""))?;

    // What the helper says about a mount that it cannot do is told.
    fs::remove_dir_all(folder.path().join("snapshots"))?;
    let refused = daemon.davit([&on[..], &["--rm", "busybox", "true"]].concat())?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && text.contains("mount helper mount.fuse3"), "{text}");
    census.settle(&daemon.path(""))
}
