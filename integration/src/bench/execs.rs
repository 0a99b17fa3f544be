//! `bench execs`: what is left in a shim, and in its bundle, of execs that are long over.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::bins;
use crate::memory::{self, Cost};
use crate::shim::Host;

/// A container that sleeps in a shim of ours, to run execs in.
pub struct Execs {
    host: Host,
    shim: crate::shim::Shim,
    watcher: crate::ttrpc::Client,
    bundle: crate::shim::Bundle,
    done: u32,
}

/// What there is after so many execs.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// The execs so far.
    pub execs: u32,
    /// The shim's process.
    pub shim: Cost,
    /// The bytes of all files of the bundle.
    pub bundle: u64,
}

impl Execs {
    /// Starts the container with a runtime, `runc` or `crun`.
    ///
    /// # Errors
    /// A step fails.
    pub fn start(runtime: &str) -> Result<Execs> {
        let host = Host::new(runtime)?;
        let bundle = host.bundle("execs", &["sleep", "86400"], |_| {})?;
        let mut shim = host.start(&bins::folder()?.join("containerd-shim-davit-v2"), &bundle)?;
        host.run(&mut shim, &bundle, "")?;
        let watcher = shim.again()?;
        Ok(Execs { host, shim, watcher, bundle, done: 0 })
    }

    /// Runs execs, each to its end, until there have been so many; then looks.
    ///
    /// # Errors
    /// The shim refuses a step, or is gone.
    pub fn until(&mut self, execs: u32) -> Result<Sample> {
        while self.done < execs {
            let exec_id = format!("exec-{}", self.done);
            self.shim.exec(&mut self.watcher, &self.bundle.id, &exec_id, &["true"])?;
            self.done += 1;
        }
        let bundle = bytes(&self.bundle.path)?;
        Ok(Sample { execs: self.done, shim: memory::of(self.shim.pid)?, bundle })
    }

    /// Ends container and shim.
    ///
    /// # Errors
    /// The shim refuses a step.
    pub fn end(mut self) -> Result<()> {
        self.shim.kill(&self.bundle.id)?;
        self.shim.shutdown(&self.bundle.id)?;
        drop(self.host);
        Ok(())
    }
}

/// Prints samples from the hundredth exec to the last of so many.
///
/// # Errors
/// A step fails.
pub fn run(execs: u32, runtime: &str) -> Result<()> {
    let begun = Instant::now();
    let mut work = Execs::start(runtime)?;
    println!("{execs} execs in one container ({runtime})");
    println!(
        "{:>10}{:>12}{:>14}{:>16}{:>10}{:>14}{:>14}",
        "execs", "PSS, KiB", "private, KiB", "anonymous, KiB", "threads", "descriptors", "bundle, B"
    );
    let mut first = None;
    for at in [100, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000] {
        if at > execs {
            break;
        }
        let sample = work.until(at)?;
        print(&sample);
        if at >= 500 {
            first.get_or_insert(sample);
        }
    }
    let last = work.until(execs)?;
    print(&last);
    if let Some(first) = first {
        let grown = last.shim.anonymous as i64 - first.shim.anonymous as i64;
        println!(
            "anonymous memory has grown by {grown} KiB since exec {}, in {:.0} s",
            first.execs,
            begun.elapsed().as_secs_f64()
        );
    }
    work.end()
}

fn print(sample: &Sample) {
    let Cost { pss, private, anonymous, threads, descriptors } = sample.shim;
    let Sample { execs, bundle, .. } = sample;
    println!("{execs:>10}{pss:>12}{private:>14}{anonymous:>16}{threads:>10}{descriptors:>14}{bundle:>14}");
}

/// The bytes of all regular files in a folder, but for a root filesystem.
fn bytes(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() && entry.file_name() != "rootfs" {
            sum += bytes(&entry.path())?;
        } else if metadata.is_file() {
            sum += metadata.len();
        }
    }
    Ok(sum)
}
