//! `cargo xtask bench`: see the library's module of the name.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use davit_integration::bench::{execs, shims, start};

const HELP: &str = "\
bench [start] [--runs N] [--containers N]   the life of a container, beside Debian's containerd
bench shim    [--runs N] [--shims N] [--megabytes N]   the shim itself, beside that of containerd
bench execs   [--execs N] [--runtime NAME]  what a shim is grown by after so many execs";

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    let what = args.next_if(|arg| !arg.starts_with('-')).unwrap_or_else(|| "start".into());
    let (mut runs, mut containers, mut shims, mut megabytes) = (None, 50, 50, 512);
    let (mut execs, mut runtime) = (2_000, "crun".to_owned());
    while let Some(arg) = args.next() {
        let value = args.next().context(HELP)?;
        let number = || value.parse::<u32>().context(HELP);
        match arg.as_str() {
            "--runs" => runs = Some(number()?),
            "--containers" => containers = number()?,
            "--shims" => shims = number()?,
            "--megabytes" => megabytes = number()?,
            "--execs" => execs = number()?,
            "--runtime" => runtime = value,
            _ => bail!("unknown argument {arg}\n{HELP}"),
        }
    }
    match what.as_str() {
        "start" => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(start::run(runs.unwrap_or(60), containers))
        }
        "shim" => shims::run(runs.unwrap_or(40), shims, megabytes),
        "execs" => execs::run(execs, &runtime),
        _ => bail!("unknown measurement {what}\n{HELP}"),
    }
}
