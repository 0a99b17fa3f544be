//! The main job in one minute: a container that does not notice the death of its supervisor.
//!
//! `cargo xtask quickstart` installs what is needed, builds, and runs this.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use davit_integration::daemon::ok;
use davit_integration::{Daemon, census, image};
use nix::sys::signal::Signal;

/// What the container does: it counts, and ends with 7 when it is told to.
const COUNT: &str =
    "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); echo \"tick $n\"; usleep 100000; done; exit 7";

fn main() -> ExitCode {
    match tour() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nquickstart: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tour() -> Result<()> {
    let start = Instant::now();
    step("Start davitd on a private root");
    let mut daemon = Daemon::start()?;
    say(&format!("davitd runs, pid {}, socket {}", pid(&daemon)?, daemon.address().display()));
    let before = census::Census::take(&daemon.path(""));

    step("Make an image from this machine's busybox and load it");
    let archive = daemon.path("busybox.tar");
    image::busybox(&archive)?;
    davit(&daemon, &["load", "-i", &archive.display().to_string()])?;
    davit(&daemon, &["images"])?;

    step("Run a container");
    davit(&daemon, &["run", "--rm", "busybox", "echo", "hello from a container"])?;
    davit(&daemon, &["run", "-d", "--name", "demo", "busybox", "sh", "-c", COUNT])?;
    let first = container_pid(&daemon)?;
    davit(&daemon, &["ps"])?;

    step("Kill the daemon with SIGKILL");
    say(&format!("$ kill -9 {}", pid(&daemon)?));
    daemon.stop(Signal::SIGKILL)?;
    // For the eye: the container ticks on while nobody supervises it.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    ensure!(std::path::Path::new(&format!("/proc/{first}")).exists(), "the container died with the daemon");
    say(&format!("davitd is dead; the container's process {first} is alive"));

    step("Start it again: the same container, the same process");
    daemon.restart()?;
    say(&format!("davitd runs, pid {}", pid(&daemon)?));
    davit(&daemon, &["ps"])?;
    let second = container_pid(&daemon)?;
    ensure!(first == second, "the container had pid {first} and now has {second}");
    davit(&daemon, &["logs", "--tail", "3", "demo"])?;

    step("Tell the container to end, and read its exit code");
    davit(&daemon, &["exec", "demo", "touch", "/tmp/stop"])?;
    let code = davit(&daemon, &["wait", "demo"])?;
    ensure!(code.trim() == "7", "the exit code is {code:?} and should be 7");

    step("Clean up");
    davit(&daemon, &["rm", "demo"])?;
    davit(&daemon, &["rmi", "busybox"])?;
    let left = census::Census::take(&daemon.path("")).since(&before);
    ensure!(left.is_empty(), "something is left behind: {left:#?}");
    daemon.stop(Signal::SIGTERM)?;
    say("no process, mount, cgroup or file is left");
    println!("\nDone in {:.1} s.", start.elapsed().as_secs_f32());
    Ok(())
}

fn step(text: &str) {
    println!("\n\x1b[1m==> {text}\x1b[0m");
}

fn say(text: &str) {
    println!("    {text}");
}

/// Shows a command and what it prints.
fn davit(daemon: &Daemon, args: &[&str]) -> Result<String> {
    let line: Vec<String> = args
        .iter()
        .map(|arg| if arg.contains([' ', ';', '"']) { format!("'{arg}'") } else { (*arg).to_owned() })
        .collect();
    say(&format!("\x1b[36m$ davit {}\x1b[0m", line.join(" ")));
    let output = ok(daemon.davit(args)?).with_context(|| format!("davit {}", args[0]))?;
    for line in output.lines() {
        say(line);
    }
    Ok(output)
}

fn pid(daemon: &Daemon) -> Result<u32> {
    daemon.pid().context("davitd does not run")
}

/// The process id of the demo container, as the daemon sees it.
fn container_pid(daemon: &Daemon) -> Result<i64> {
    let text = ok(daemon.davit(["inspect", "demo"])?)?;
    let value: serde_json::Value = serde_json::from_str(&text)?;
    value[0]["State"]["Pid"].as_i64().filter(|pid| *pid > 0).context("the container has no process")
}
