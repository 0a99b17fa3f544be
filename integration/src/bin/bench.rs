//! `cargo xtask bench start`: the life of a container through the API, ours beside Debian's containerd, with the same
//! runc, in turns within one run, so that the noise of the machine is the same for both.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use davit_integration::client::{Client, spec};
use davit_integration::memory::{self, Cost};
use davit_integration::peer::Containerd;
use davit_integration::{Daemon, image};

const HELP: &str = "bench [start] [--runs N] [--containers N]";

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.context("no runtime").and_then(|runtime| runtime.block_on(bench()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench() -> Result<()> {
    let (mut runs, mut containers) = (60, 50);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|text| text.parse().ok()).context(HELP);
        match arg.as_str() {
            "start" => {}
            "--runs" => runs = number()?,
            "--containers" => containers = number()?,
            _ => bail!("unknown argument {arg}\n{HELP}"),
        }
    }

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
    println!("{:<32}{:>12}{:>12}{:>10}", "", "davit", "containerd", "ratio");
    let shims = (sum(&ours_shims)?, sum(&peer_shims)?);
    let daemons = (memory::of(pid(&ours)?)?, memory::of(peer.pid())?);
    let per = |cost: u64, count: usize| cost as f64 / count as f64;
    row("shim PSS, KiB each", per(shims.0.pss, ours_shims.len()), per(shims.1.pss, peer_shims.len()));
    row(
        "shim private, KiB each",
        per(shims.0.private, ours_shims.len()),
        per(shims.1.private, peer_shims.len()),
    );
    row("shim threads each", per(shims.0.threads, ours_shims.len()), per(shims.1.threads, peer_shims.len()));
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

fn sum(pids: &[u32]) -> Result<Cost> {
    pids.iter().try_fold(Cost::default(), |sum, pid| Ok(sum + memory::of(*pid)?))
}

/// The time that the runtime's own three calls take: `runc create`, `start` and `delete`, as a shim makes them.
fn runtime_alone(bundle: &Path, namespace: &str, turn: u32) -> Result<[Duration; 3]> {
    let rootfs = bundle.join("rootfs");
    if !rootfs.exists() {
        std::fs::create_dir_all(&rootfs)?;
        let mut archive = tar::Archive::new(std::io::Cursor::new(image::busybox_layer()?));
        archive.unpack(&rootfs)?;
    }
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
    Ok([create, start, delete])
}

fn row(name: &str, ours: f64, theirs: f64) {
    println!("{name:<32}{ours:>12.1}{theirs:>12.1}{:>10.2}", ours / theirs);
}

/// A quantile of some times, in milliseconds.
fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort();
    let index = ((times.len() - 1) as f64 * part).round() as usize;
    times[index].as_secs_f64() * 1000.0
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
    println!("{:<32}{:>12}{:>12}{:>10}", "", "davit", "containerd", "ratio");
    let median = (quantile(ours, 0.5), quantile(theirs, 0.5));
    row("run to exit, ms, median", median.0, median.1);
    row("run to exit, ms, p99", quantile(ours, 0.99), quantile(theirs, 0.99));
    row("beyond the runtime, ms, median", median.0 - runtime, median.1 - runtime);
}
