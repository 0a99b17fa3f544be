//! The restart monitor: what labels ask for comes true, and nothing else does.

use anyhow::{Context, Result, ensure};
use davit_integration::ctr::Ctr;
use davit_integration::{Daemon, image, wait};
use nix::sys::signal::Signal;

use super::{plugins, runtime};
use crate::root;

const IMAGE: &str = image::BUSYBOX;
const LABEL: &str = "containerd.io/restart.";

/// Runs a container, detached, and gives it these labels of the monitor. Not before it has a task: between the two steps of
/// `ctr run` a busy machine may well let the monitor look twice.
fn run(ctr: &Ctr, id: &str, labels: &[&str], script: &str) -> Result<()> {
    ctr.run_args(&["run", "-d", IMAGE, id, "sh", "-c", script])?;
    let labels: Vec<String> = labels.iter().map(|label| format!("{LABEL}{label}")).collect();
    ctr.run(&format!("containers label {id} {}", labels.join(" "))).map(drop)
}

/// The state of a container's task, and the process; none without a task.
fn task(ctr: &Ctr, id: &str) -> Option<(String, String)> {
    let list = ctr.run("tasks ls").ok()?;
    let words = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = words.into_iter().find(|words| words.first() == Some(&id))?;
    Some((found.get(2)?.to_string(), found.get(1)?.to_string()))
}

fn count(ctr: &Ctr, id: &str) -> u32 {
    let info = ctr.run(&format!("containers info {id}")).unwrap_or_default();
    let at = format!("\"{LABEL}count\": \"");
    let number = info.split_once(&at).map_or("", |(_, rest)| rest);
    number.split('"').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[test]
fn labels_keep_a_task_in_the_state_that_they_name() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start_with(&[], "[restart]\ninterval = 1\n")?;
    let found = runtime()?.block_on(plugins(&daemon, &[("monitor.container.v1", "restart")]))?;
    ensure!(found[0].capabilities == ["no", "always", "on-failure", "unless-stopped"], "{found:?}");
    daemon.import_busybox()?;
    let ctr = daemon.ctr();
    let log = daemon.path("output");
    let uri = format!("loguri=file://{}", log.display());
    let running = "status=running";
    let forever = "exec sleep 3600";

    run(&ctr, "always", &[running, &uri], "echo once; exec sleep 3600")?;
    run(&ctr, "clock", &[running, "policy=always"], "exit 0")?;
    run(&ctr, "failing", &[running, "policy=on-failure:1"], "exit 3")?;
    run(&ctr, "content", &[running, "policy=on-failure"], "exit 0")?;
    run(&ctr, "stopped", &[running, "policy=unless-stopped", "explicitly-stopped=true"], "exit 1")?;
    run(&ctr, "odd", &[running, "policy=perhaps"], "exit 1")?;
    run(&ctr, "never", &[running, "policy=no"], "exit 1")?;
    run(&ctr, "plain", &["policy=always"], "exit 1")?;

    let (_, first) = task(&ctr, "always").context("no task")?;
    ctr.run("tasks kill -s SIGKILL always")?;
    wait::until("the killed one runs again", || {
        let (state, pid) = task(&ctr, "always")?;
        (state == "RUNNING" && pid != first).then_some(())
    })?;
    ensure!(count(&ctr, "always") == 1);
    wait::until("the output of the second goes where its label says", || {
        (std::fs::read_to_string(&log).ok()? == "once\n").then_some(())
    })?;

    wait::until("the failing one was started again", || (count(&ctr, "failing") == 1).then_some(()))?;
    // Time enough for the monitor to do what it must not: it has looked at least twice since.
    let looks = count(&ctr, "clock");
    wait::until("the monitor looks on", || (count(&ctr, "clock") > looks + 2).then_some(()))?;
    let expected = [("always", 1), ("failing", 1), ("content", 0), ("stopped", 0), ("odd", 0), ("never", 0)];
    for (id, times) in expected.into_iter().chain([("plain", 0)]) {
        ensure!(count(&ctr, id) == times, "{id}: {}", count(&ctr, id));
    }

    run(&ctr, "down", &[running], forever)?;
    ctr.run(&format!("containers label down {LABEL}status=stopped"))?;
    wait::until("the task is killed and deleted", || task(&ctr, "down").is_none().then_some(()))?;

    // What ends while no daemon runs is started by the next one.
    let (_, pid) = task(&ctr, "always").context("no task")?;
    daemon.stop(Signal::SIGKILL)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.parse()?), Signal::SIGKILL)?;
    daemon.restart()?;
    wait::until("the next daemon starts it", || {
        let (state, now) = task(&ctr, "always")?;
        (state == "RUNNING" && now != pid).then_some(())
    })?;
    ensure!(count(&ctr, "always") == 2);
    Ok(())
}
