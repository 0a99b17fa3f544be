//! Logs of containers in the background: rotated, followed, and written while no daemon runs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use davit_integration::daemon::ok;
use davit_integration::{Daemon, image, wait};
use nix::sys::signal::Signal;

use crate::root;

/// The log's files, which are named by the container's id.
fn files(daemon: &Daemon) -> Vec<PathBuf> {
    let folder = daemon.path("root/logs").join(daemon.namespace());
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

#[test]
fn a_log_is_rotated_and_read_as_one() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    // Two streams have no order between them: the second begins when the first is in the log.
    let script = "seq 1 3000; until [ -e /go ]; do usleep 10000; done; echo oops >&2";
    let options = ["--log-opt", "max-size=50k", "--log-opt", "max-file=3"];
    let id = ok(daemon.davit(["run", "-d"].iter().chain(&options).chain(&[
        image::BUSYBOX,
        "sh",
        "-c",
        script,
    ]))?)?;
    let id = id.trim();
    wait::until("all numbers are in the log", || {
        let text = ok(daemon.davit(["logs", id]).ok()?).ok()?;
        text.ends_with("\n3000\n").then_some(())
    })?;
    // The container may end, and this process with it, before it says that all is well.
    daemon.davit(["exec", id, "touch", "/go"])?;
    ok(daemon.davit(["wait", id])?)?;
    let read = |args: &[&str]| daemon.davit(["logs"].iter().chain(args).chain(&[id]));
    let output = read(&[])?;
    ensure!(String::from_utf8_lossy(&output.stderr) == "oops\n");
    let text = ok(output)?;
    let numbers: Vec<u32> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(numbers.last() == Some(&3000) && numbers.len() < 3000, "{} lines", numbers.len());
    ensure!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "a line is missing");
    let parts = files(&daemon);
    ensure!(parts.len() == 3, "{parts:?}");
    for part in parts {
        ensure!(part.metadata()?.len() <= 50 << 10, "{part:?} is too large");
    }
    // The last of three lines went to standard error.
    ensure!(ok(read(&["--tail", "3"])?)? == "2999\n3000\n");
    let stamped = ok(read(&["--timestamps", "--since", "1h", "-n", "2"])?)?;
    ensure!(stamped.len() == "2026-01-01T00:00:00.000000000Z 3000\n".len() && stamped.ends_with("Z 3000\n"));
    ensure!(ok(read(&["--since", "2100-01-01"])?)?.is_empty());
    ok(daemon.davit(["rm", id])?)?;
    ensure!(files(&daemon).is_empty(), "{:?}", files(&daemon));
    Ok(())
}

#[test]
fn a_log_goes_on_without_the_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let script = "i=0; while :; do echo $i; i=$((i + 1)); usleep 20000; done";
    let id = ok(daemon.davit(["run", "-d", image::BUSYBOX, "sh", "-c", script])?)?;
    let id = id.trim();
    let lines = || {
        let path = files(&daemon).pop()?;
        Some(fs::read_to_string(path).ok()?.lines().count())
    };
    wait::until("the log has lines", || lines().filter(|lines| *lines > 5))?;
    daemon.stop(Signal::SIGKILL)?;
    let lines = || Some(fs::read_to_string(files(&daemon).pop()?).ok()?.lines().count());
    let before = lines().context("no log")?;
    wait::until("the log goes on", || lines().filter(|lines| *lines > before + 10))?;
    daemon.restart()?;
    ok(daemon.davit(["stop", "-t", "0", id])?)?;
    let text = ok(daemon.davit(["logs", id])?)?;
    ensure!(text.lines().enumerate().all(|(number, line)| line == number.to_string()), "a line is missing");
    ok(daemon.davit(["rm", id])?)?;
    Ok(())
}

/// A command that ends before anybody has looked at its terminal.
#[test]
fn what_a_short_command_shows_on_its_terminal_is_seen() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    for number in 0..5 {
        let line = format!("run --rm -t {} short{number} echo seen", image::BUSYBOX);
        let shown = daemon.ctr().on_terminal(&line)?;
        ensure!(shown.contains("seen"), "the {number}th showed {shown:?}");
    }
    Ok(())
}
