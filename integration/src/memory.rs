//! What processes cost, as the kernel counts it: memory, threads, descriptors, time.

use std::fs;
use std::ops::Add;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// The cost of one process, or the sum of several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Proportional set size: private pages, and shared ones divided by who shares them. In KiB.
    pub pss: u64,
    /// Pages of its own. In KiB.
    pub private: u64,
    /// Memory that is no file's: what it has written itself. In KiB.
    pub anonymous: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost {
            pss: self.pss + other.pss,
            private: self.private + other.private,
            anonymous: self.anonymous + other.anonymous,
            threads: self.threads + other.threads,
            descriptors: self.descriptors + other.descriptors,
        }
    }
}

/// The cost of a process (proc(5), `smaps_rollup` and `status`).
///
/// # Errors
/// The process is gone.
pub fn of(pid: u32) -> Result<Cost> {
    let read = |name: &str| {
        fs::read_to_string(format!("/proc/{pid}/{name}")).with_context(|| format!("no /proc/{pid}/{name}"))
    };
    let field = |text: &str, name: &str| {
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
        lines.sum::<u64>()
    };
    let maps = read("smaps_rollup")?;
    let status = read("status")?;
    Ok(Cost {
        pss: field(&maps, "Pss:"),
        private: field(&maps, "Private_Clean:") + field(&maps, "Private_Dirty:"),
        anonymous: field(&maps, "Anonymous:"),
        threads: field(&status, "Threads:"),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
    })
}

/// The time that all threads of a process have spent on a CPU so far, in steps of 10 ms (proc(5), `stat`).
///
/// # Errors
/// The process is gone.
pub fn cpu(pid: u32) -> Result<Duration> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("no process {pid}"))?;
    // The second field is a name in brackets, which may hold anything; `utime` and `stime` are 14 and 15.
    let fields = stat.rsplit_once(')').context("no name")?.1.split_ascii_whitespace().skip(14 - 3).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}

/// The pids of the processes whose program has this file name and whose command line or environment names `needle`.
pub fn named(program: &str, needle: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).into_owned();
        let first = line.split('\0').next().unwrap_or_default();
        if Path::new(first).file_name().is_some_and(|name| name == program) && line.contains(needle) {
            found.push(pid);
        }
    }
    found
}
