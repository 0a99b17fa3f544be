//! `cargo xtask soak`: lives of containers while daemons and shims are killed at random, see the library.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use davit_integration::soak::{self, Plan};

const HELP: &str = "\
soak [--lifecycles N] [--seed S] [--concurrency N] [--kill-every MS] [--shim-kills N]

  --lifecycles N    how many containers (200)
  --seed S          what is drawn is drawn from this (the time)
  --concurrency N   lives that go on at once (6)
  --kill-every MS   the mean time between two kills of the daemon (1000)
  --shim-kills N    one of so many lives loses its shim; 0 for none (8)
";

fn main() -> Result<ExitCode> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut plan = Plan::new(200, now.as_secs());
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        if matches!(flag.as_str(), "-h" | "--help") {
            print!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        let value = arguments.next().with_context(|| format!("{flag} wants a number"))?;
        let number: u64 = value.parse().with_context(|| format!("{flag} {value}"))?;
        match flag.as_str() {
            "--lifecycles" => plan.lifecycles = number,
            "--seed" => plan.seed = number,
            "--concurrency" => plan.concurrency = usize::try_from(number)?.clamp(1, 64),
            "--kill-every" => plan.daemon_kills = Duration::from_millis(number.max(1)),
            "--shim-kills" => plan.shim_kills = number,
            _ => bail!("unknown flag {flag}\n\n{HELP}"),
        }
    }
    if !nix::unistd::getuid().is_root() {
        bail!("containers need root: run it as root");
    }
    println!("seed {}", plan.seed);
    let summary = soak::run(&plan)?;
    let list = |sums: &std::collections::BTreeMap<&'static str, u64>| {
        sums.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    };
    println!(
        "lives           {} in {:.1} s: {}",
        plan.lifecycles,
        summary.elapsed.as_secs_f64(),
        list(&summary.kinds)
    );
    println!(
        "daemons killed  {}; the longest start until it served took {} ms",
        summary.daemon_kills,
        summary.longest_start.as_millis()
    );
    println!("shims killed    {}", summary.shim_kills);
    println!("exits           {}: {}", summary.exits.values().sum::<u64>(), list(&summary.exits));
    println!("every exit was told once and rightly, and nothing is left");
    Ok(ExitCode::SUCCESS)
}
