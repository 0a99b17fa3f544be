//! The measurements of `cargo xtask bench`: ours beside a peer, in turns within one run, so that the noise of the machine is
//! the same for both, and what counts is the ratio.

pub mod execs;
pub mod shims;
pub mod start;

use std::time::Duration;

use anyhow::Result;

use crate::memory::{self, Cost};

/// Prints the names of the columns of the [rows](row) to come.
pub fn head(ours: &str, theirs: &str) {
    println!("{:<40}{ours:>12}{theirs:>12}{:>10}", "", "ratio");
}

/// Prints a figure of ours, that of the peer, and their ratio.
pub fn row(name: &str, ours: f64, theirs: f64) {
    println!("{name:<40}{ours:>12.1}{theirs:>12.1}{:>10.2}", ours / theirs);
}

/// A quantile of some times, in milliseconds.
pub fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort();
    let index = ((times.len() - 1) as f64 * part).round() as usize;
    times[index].as_secs_f64() * 1000.0
}

/// What several processes cost together.
///
/// # Errors
/// One of them is gone.
pub fn sum(pids: &[u32]) -> Result<Cost> {
    pids.iter().try_fold(Cost::default(), |sum, pid| Ok(sum + memory::of(*pid)?))
}

/// Prints what several shims of ours and of the peer cost, each.
///
/// # Errors
/// One of them is gone.
pub fn shim_rows(ours: &[u32], theirs: &[u32]) -> Result<()> {
    let (a, b) = (sum(ours)?, sum(theirs)?);
    let per = |cost: u64, pids: &[u32]| cost as f64 / pids.len() as f64;
    row("shim PSS, KiB each", per(a.pss, ours), per(b.pss, theirs));
    row("shim private, KiB each", per(a.private, ours), per(b.private, theirs));
    row("shim threads each", per(a.threads, ours), per(b.threads, theirs));
    Ok(())
}
