//! `bench start`: the life of a container through the API, ours beside Debian's containerd, with the same runc.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{head, quantile, row, shim_rows};
use crate::client::{Client, spec};
use crate::peer::Containerd;
use crate::{Daemon, image, memory};

/// Runs `runs` containers that end at once, and then `containers` that stay.
///
/// # Errors
/// A daemon does not start, or refuses a step.
pub async fn run(runs: u32, containers: u32) -> Result<()> {
    let ours = Daemon::start_with(&[], "[log]\nlevel = \"warn\"\n")?;
    ours.import_busybox()?;
    let peer = Containerd::start()?;
    peer.import_busybox()?;
    let parent = image::digest(&image::busybox_layer()?);
    let mut davit = Client::new(&ours.address(), &ours.namespace()).await?;
    let mut containerd = Client::new(&peer.address(), &peer.namespace()).await?;

    println!("{runs} containers that end at once, in turns");
    let (mut bare, mut fast, mut slow) = (Vec::new(), Vec::new(), Vec::new());
    let mut parts = [const { Vec::new() }; 3];
    for turn in 0..runs + 3 {
        let runtime = runtime_alone(&ours.path("bare"), &ours.namespace(), turn)?;
        let a = davit.run(&format!("run-{turn}"), &parent).await?;
        let b = containerd.run(&format!("run-{turn}"), &parent).await?;
        // The first turns fill caches; they do not count.
        if turn >= 3 {
            bare.push(runtime.iter().sum());
            for (times, time) in parts.iter_mut().zip(runtime) {
                times.push(time);
            }
            fast.push(a);
            slow.push(b);
        }
    }
    latency(&mut bare, &mut parts, &mut fast, &mut slow);
    for (call, times) in &mut davit.laps {
        let theirs = containerd.laps.get_mut(call).context("the same calls are made of both")?;
        row(&format!("  {call}, ms, median"), quantile(times, 0.5), quantile(theirs, 0.5));
    }

    println!("\n{containers} containers that sleep");
    let before = (memory::of(pid(&ours)?)?, memory::of(peer.pid())?);
    let mut pids = Vec::new();
    for n in 0..containers {
        let id = format!("idle-{n}");
        pids.push(davit.start(&id, &parent, &["/bin/sleep", "3600"]).await?);
        containerd.start(&id, &parent, &["/bin/sleep", "3600"]).await?;
    }
    let ours_shims = memory::named("containerd-shim-davit-v2", &ours.path("").display().to_string());
    let peer_shims = memory::named("containerd-shim-runc-v2", &peer.folder().display().to_string());
    ensure!(!ours_shims.is_empty() && !peer_shims.is_empty(), "no shim is found");
    head("davit", "containerd");
    shim_rows(&ours_shims, &peer_shims)?;
    let daemons = (memory::of(pid(&ours)?)?, memory::of(peer.pid())?);
    row("daemon PSS idle before, KiB", before.0.pss as f64, before.1.pss as f64);
    row("daemon PSS, KiB", daemons.0.pss as f64, daemons.1.pss as f64);
    row("daemon private, KiB", daemons.0.private as f64, daemons.1.private as f64);
    row("daemon threads", daemons.0.threads as f64, daemons.1.threads as f64);
    for n in 0..containers {
        davit.kill(&format!("idle-{n}")).await?;
        containerd.kill(&format!("idle-{n}")).await?;
    }
    Ok(())
}

fn pid(daemon: &Daemon) -> Result<u32> {
    daemon.pid().context("davitd does not run")
}

/// The time that the runtime's own three calls take, as a shim makes them: `runc create`, `start` and `delete`, of a
/// container whose root is an overlay, as every other here.
fn runtime_alone(bundle: &Path, namespace: &str, turn: u32) -> Result<[Duration; 3]> {
    let (lower, rootfs) = (bundle.join("lower"), bundle.join("rootfs"));
    if !lower.exists() {
        std::fs::create_dir_all(&lower)?;
        std::fs::create_dir_all(&rootfs)?;
        let mut archive = tar::Archive::new(std::io::Cursor::new(image::busybox_layer()?));
        archive.unpack(&lower)?;
    }
    let own = bundle.join(turn.to_string());
    for name in ["upper", "work"] {
        std::fs::create_dir_all(own.join(name))?;
    }
    let options = format!("lowerdir={},upperdir={1}/upper,workdir={1}/work", lower.display(), own.display());
    mount(Some("overlay"), &rootfs, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    let id = format!("bare-{turn}");
    std::fs::write(
        bundle.join("config.json"),
        serde_json::to_vec(&spec(&format!("/{namespace}/{id}"), &["/bin/true"]))?,
    )?;
    let root = bundle.join("runc");
    let runc = |args: &[&str]| -> Result<Duration> {
        let start = Instant::now();
        let mut command = Command::new("runc");
        command.arg("--root").arg(&root).args(args).arg(&id).current_dir(bundle);
        // The container keeps what it is given, so there must be no pipe of ours to wait on.
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        ensure!(status.success(), "runc {}: {status}", args[0]);
        Ok(start.elapsed())
    };
    let create = runc(&["create", "--bundle", ".", "--pid-file", "pid"])?;
    let process: i32 = std::fs::read_to_string(bundle.join("pid"))?.trim().parse()?;
    let start = runc(&["start"])?;
    while std::fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let delete = runc(&["delete", "--force"])?;
    umount2(&rootfs, MntFlags::MNT_DETACH)?;
    Ok([create, start, delete])
}

fn latency(
    bare: &mut [Duration],
    parts: &mut [Vec<Duration>; 3],
    ours: &mut [Duration],
    theirs: &mut [Duration],
) {
    let runtime = quantile(bare, 0.5);
    let [create, start, delete] = parts.each_mut().map(|times| quantile(times, 0.5));
    println!(
        "runc alone, ms, median: {runtime:.1} (create {create:.1}, start {start:.1}, delete {delete:.1})"
    );
    head("davit", "containerd");
    let median = (quantile(ours, 0.5), quantile(theirs, 0.5));
    row("run to exit, ms, median", median.0, median.1);
    row("run to exit, ms, p99", quantile(ours, 0.99), quantile(theirs, 0.99));
    row("beyond the runtime, ms, median", median.0 - runtime, median.1 - runtime);
}
