//! What thousands of execs leave in a shim: nothing that grows with them.

use anyhow::{Result, ensure};
use davit_integration::bench::execs::Execs;
use davit_integration::bins;

use crate::root;

/// What is lost with each exec shows in every one of three windows of 500 execs: the smallest block that an allocator hands
/// out is 32 bytes with its head, and so four pages in a window. A buffer that has grown once shows in one window alone.
/// (`cargo xtask bench execs --execs 100000` is the long way, by hand.)
#[test]
fn a_shim_does_not_grow_with_its_execs() -> Result<()> {
    /// Pages that are in use at one look and not at the next (KiB).
    const NOISE: i64 = 8;
    /// The journal is written anew when it has this length (bytes); until then it may grow.
    const JOURNAL: u64 = 64 << 10;
    if !root() {
        return Ok(());
    }
    // An exec through runc takes too long for thousands of them.
    if bins::on_path("crun").is_none() {
        eprintln!("skipped: crun is not installed");
        return Ok(());
    }
    let mut work = Execs::start("crun")?;
    let samples =
        [500, 1_000, 1_500, 2_000].map(|execs| work.until(execs)).into_iter().collect::<Result<Vec<_>>>()?;
    samples.iter().for_each(|sample| println!("{sample:?}"));
    let windows = samples.windows(2);
    let growth = windows.map(|pair| pair[1].shim.anonymous as i64 - pair[0].shim.anonymous as i64);
    ensure!(growth.min() <= Some(NOISE), "memory grows all the time: {samples:?}");
    for sample in &samples {
        ensure!(sample.shim.threads == 1, "a thread is left: {sample:?}");
        ensure!(sample.shim.descriptors == samples[0].shim.descriptors, "descriptors are left: {samples:?}");
        ensure!(sample.bundle < JOURNAL * 2, "the bundle has grown: {sample:?}");
    }
    work.end()
}
