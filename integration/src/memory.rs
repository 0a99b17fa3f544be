//! What processes cost: memory and threads, as the kernel counts them.

use std::fs;
use std::ops::Add;
use std::path::Path;

use anyhow::{Context, Result};

/// The cost of one process, or the sum of several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Proportional set size: private pages, and shared ones divided by who shares them. In KiB.
    pub pss: u64,
    /// Pages of its own. In KiB.
    pub private: u64,
    /// Threads.
    pub threads: u64,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost {
            pss: self.pss + other.pss,
            private: self.private + other.private,
            threads: self.threads + other.threads,
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
        threads: field(&status, "Threads:"),
    })
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
