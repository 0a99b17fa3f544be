//! `bench shim`: a shim as its daemon meets it, ours beside Debian's, driven by the same client over the same calls, with
//! the same runc.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{head, quantile, row, shim_rows};
use crate::shim::{Host, Shim};
use crate::{bins, memory};

/// The runtime of both.
const RUNTIME: &str = "runc";

/// One side: its program and where it runs.
struct Side {
    program: PathBuf,
    host: Host,
}

/// Measures starts and execs `runs` times, the memory of `shims` shims with a container each, and the output of one that
/// writes so many megabytes.
///
/// # Errors
/// Debian's shim is not installed, or a step fails.
pub fn run(runs: u32, shims: u32, megabytes: u32) -> Result<()> {
    let theirs = bins::on_path("containerd-shim-runc-v2").context("apt-get install containerd")?;
    let ours = bins::folder()?.join("containerd-shim-davit-v2");
    let sides = [ours, theirs].map(|program| Host::new(RUNTIME).map(|host| Side { program, host }));
    let [ours, theirs] = sides;
    let (ours, theirs) = (ours?, theirs?);

    println!("{runs} shims and execs, in turns");
    head("davit", "containerd");
    starts(&ours, &theirs, runs)?;
    execs(&ours, &theirs, runs)?;
    println!("\n{megabytes} MB from a container through a FIFO to a reader");
    head("davit", "containerd");
    let (a, b) = (stream(&ours, megabytes)?, stream(&theirs, megabytes)?);
    row("MB/s", a.0, b.0);
    row("CPU time of the shim, ms", a.1.as_secs_f64() * 1000.0, b.1.as_secs_f64() * 1000.0);
    println!("\n{shims} shims with a container that sleeps");
    head("davit", "containerd");
    idle(&ours, &theirs, shims)
}

fn starts(ours: &Side, theirs: &Side, runs: u32) -> Result<()> {
    let (mut fast, mut slow) = (Vec::new(), Vec::new());
    // The first turns fill caches; they do not count.
    for turn in 0..runs + 3 {
        for (side, times) in [(ours, &mut fast), (theirs, &mut slow)] {
            let bundle = side.host.bundle(&format!("start-{turn}"), &["true"], |_| {})?;
            let mut shim = side.host.start(&side.program, &bundle)?;
            if turn >= 3 {
                times.push(shim.start);
            }
            shim.shutdown(&bundle.id)?;
        }
    }
    row("start to first answer, ms, median", quantile(&mut fast, 0.5), quantile(&mut slow, 0.5));
    row("start to first answer, ms, p99", quantile(&mut fast, 0.99), quantile(&mut slow, 0.99));
    Ok(())
}

fn sleeping(side: &Side, id: &str) -> Result<Shim> {
    let bundle = side.host.bundle(id, &["sleep", "3600"], |_| {})?;
    let mut shim = side.host.start(&side.program, &bundle)?;
    side.host.run(&mut shim, &bundle, "")?;
    Ok(shim)
}

fn end(mut shim: Shim, id: &str) -> Result<()> {
    shim.kill(id)?;
    shim.shutdown(id)
}

fn execs(ours: &Side, theirs: &Side, runs: u32) -> Result<()> {
    let mut shims = [sleeping(ours, "execs")?, sleeping(theirs, "execs")?];
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..runs + 3 {
        for (shim, times) in shims.iter_mut().zip(&mut times) {
            let mut watcher = shim.again()?;
            let time = shim.exec(&mut watcher, "execs", &format!("e-{turn}"), &["true"])?;
            if turn >= 3 {
                times.push(time);
            }
        }
    }
    let [fast, slow] = &mut times;
    row("start of an exec to its end, ms, median", quantile(fast, 0.5), quantile(slow, 0.5));
    row("start of an exec to its end, ms, p99", quantile(fast, 0.99), quantile(slow, 0.99));
    shims.into_iter().try_for_each(|shim| end(shim, "execs"))
}

/// Gives megabytes per second, and the CPU time of the shim.
fn stream(side: &Side, megabytes: u32) -> Result<(f64, Duration)> {
    let fifo = side.host.fifo("stdout")?;
    // 64 KiB at once, as much as the pipe of a container takes; what dd says of its work is not counted.
    let count = u64::from(megabytes) * 16;
    let script = format!("exec dd if=/dev/zero bs=65536 count={count} 2>/dev/null");
    let bundle = side.host.bundle("stream", &["sh", "-c", &script], |_| {})?;
    let mut shim = side.host.start(&side.program, &bundle)?;
    let reader = thread::spawn(move || drain(Path::new(&fifo)));
    let before = memory::cpu(shim.pid)?;
    side.host.run(&mut shim, &bundle, &side.host.path("stdout").display().to_string())?;
    ensure!(shim.wait(&bundle.id, "")? == 0, "dd failed");
    let after = memory::cpu(shim.pid)?;
    shim.delete(&bundle.id, "")?;
    shim.shutdown(&bundle.id)?;
    let (bytes, time) = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    ensure!(bytes == u64::from(megabytes) << 20, "{bytes} bytes have arrived");
    Ok((bytes as f64 / 1e6 / time.as_secs_f64(), after - before))
}

/// Reads a FIFO to its end. The time counts from the first byte.
fn drain(fifo: &Path) -> io::Result<(u64, Duration)> {
    let mut file = File::open(fifo)?;
    let mut buffer = vec![0; 1 << 18];
    let (mut bytes, mut begun, mut last) = (0, None, Instant::now());
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok((bytes, last - begun.unwrap_or(last)));
        }
        begun.get_or_insert_with(Instant::now);
        last = Instant::now();
        bytes += length as u64;
    }
}

fn idle(ours: &Side, theirs: &Side, count: u32) -> Result<()> {
    let mut shims = [Vec::new(), Vec::new()];
    for n in 0..count {
        for (side, shims) in [ours, theirs].into_iter().zip(&mut shims) {
            shims.push(sleeping(side, &format!("idle-{n}"))?);
        }
    }
    let pids = shims.each_ref().map(|shims| shims.iter().map(|shim| shim.pid).collect::<Vec<_>>());
    shim_rows(&pids[0], &pids[1])?;
    for shims in shims {
        for (n, shim) in shims.into_iter().enumerate() {
            end(shim, &format!("idle-{n}"))?;
        }
    }
    Ok(())
}
