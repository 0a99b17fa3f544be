//! What hangs: an OCI runtime (the stand-in for whatever sleeps in the kernel), a stopped shim, a frozen cgroup. It is told
//! in time and with a reason, and it delays nobody else.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use davit_integration::census;
use davit_integration::lifecycle::{Steps, Wish, reason};
use davit_proto::containerd::v1::types::Status as TaskStatus;
use nix::sys::signal::Signal;
use tonic::Code;

use super::{SHORT, Scene, USUAL, bring_to, call, tokio_runtime};
use crate::root;

const STEPS: [&str; 7] = ["create", "start", "exec", "pause", "resume", "kill", "delete"];

/// A whole life of a container that nothing is wrong with.
async fn fine(steps: &mut Steps, id: &str, wish: &Wish) -> Result<()> {
    steps.record(id, wish).await?;
    steps.create(id, "", false).await?;
    steps.start(id, "").await?;
    steps.exec(id, "e", "exit 3").await?;
    steps.start(id, "e").await?;
    ensure!(steps.wait(id, "e").await? == 3);
    steps.kill(id, "").await?;
    ensure!(steps.wait(id, "").await? == 137);
    steps.remove(id).await
}

#[test]
fn a_runtime_that_hangs_is_given_up_with_a_reason() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(SHORT)?;
    tokio_runtime()?.block_on(async {
        let mut steps = scene.steps().await?;
        // A neighbour in the shim of the one whose kill hangs, besides those in shims of their own.
        let pod = Wish { group: "kill".into(), ..scene.wish("sleep 1000") };
        steps.record("kill", &pod).await?;
        steps.create("kill", "", false).await?;
        steps.start("kill", "").await?;
        for step in STEPS.into_iter().filter(|step| *step != "kill") {
            bring_to(&scene, &mut steps, step, step).await?;
        }
        let mut hanging = Vec::new();
        for step in STEPS {
            scene.order(step, step, "wait")?;
            hanging.push((step, call(&steps, step, step)));
        }
        for step in STEPS {
            scene.taken(step, step).await?;
        }
        fine(&mut steps, "neighbour", &pod).await.context("a neighbour is delayed")?;
        fine(&mut steps, "other", &scene.wish("sleep 1000")).await.context("another is delayed")?;
        for (step, call) in hanging {
            let status = call.await?.err().with_context(|| format!("{step} has not hung"))?;
            ensure!(status.code() == Code::DeadlineExceeded, "{step}: {status:?}");
            ensure!(reason(&status) == "RUNTIME_TIMEOUT", "{step}: {status:?}");
            ensure!(status.message().contains("did not end within"), "{step}: {status:?}");
        }
        for step in STEPS {
            steps.remove(step).await?;
        }
        anyhow::Ok(())
    })?;
    scene.clean()
}

/// `runc exec` that hangs must not hold back the news that the container is dead.
#[test]
fn the_exit_of_init_does_not_wait_for_an_exec_that_hangs() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    tokio_runtime()?.block_on(async {
        let mut steps = scene.steps().await?;
        bring_to(&scene, &mut steps, "exec", "box").await?;
        scene.order("exec", "box", "wait")?;
        let exec = call(&steps, "exec", "box");
        scene.taken("exec", "box").await?;
        steps.kill("box", "").await?;
        ensure!(steps.wait("box", "").await? == 137);
        let status = exec.await?.err().context("an exec in a dead container")?;
        ensure!(status.code() == Code::FailedPrecondition, "{status:?}");
        steps.remove("box").await
    })?;
    scene.clean()
}

#[test]
fn a_stopped_shim_is_slow_and_not_dead() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(SHORT)?;
    tokio_runtime()?.block_on(async {
        let mut steps = scene.steps().await?;
        bring_to(&scene, &mut steps, "kill", "box").await?;
        let pid = steps.state("box", "").await?.pid;
        scene.kill_shim("box", Signal::SIGSTOP)?;
        let killing = call(&steps, "kill", "box");
        let state = steps.state("box", "").await.err().context("a stopped shim answers")?;
        ensure!(state.code() == Code::DeadlineExceeded && reason(&state) == "SHIM_TIMEOUT", "{state:?}");
        fine(&mut steps, "other", &scene.wish("sleep 1000")).await.context("another is delayed")?;
        let status = killing.await?.err().context("a stopped shim answers")?;
        ensure!(status.code() == Code::DeadlineExceeded && reason(&status) == "SHIM_TIMEOUT", "{status:?}");
        ensure!(fs::metadata(format!("/proc/{pid}")).is_ok(), "slow is not dead");
        scene.kill_shim("box", Signal::SIGCONT)?;
        // The call goes on where nobody waits any more.
        ensure!(steps.wait("box", "").await? == 137);
        steps.remove("box").await
    })?;
    scene.clean()
}

/// A shim that is stopped when a daemon starts is waited for, and calls for it are told why.
#[test]
fn a_shim_that_is_stopped_at_start_is_unreachable() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(SHORT)?;
    let runtime = tokio_runtime()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        bring_to(&scene, &mut steps, "kill", "box").await
    })?;
    scene.kill_shim("box", Signal::SIGSTOP)?;
    scene.daemon.stop(Signal::SIGKILL)?;
    scene.daemon.restart()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        for step in ["kill", "delete"] {
            let status = call(&steps, step, "box").await?.err().context("a stopped shim answers")?;
            ensure!(status.code() == Code::Unavailable, "{status:?}");
            ensure!(reason(&status) == "SHIM_UNREACHABLE", "{status:?}");
        }
        fine(&mut steps, "other", &scene.wish("sleep 1000")).await.context("another is delayed")?;
        scene.kill_shim("box", Signal::SIGCONT)?;
        steps.remove("box").await
    })?;
    scene.clean()
}

#[test]
fn a_frozen_container_can_be_taken_away() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(SHORT)?;
    tokio_runtime()?.block_on(async {
        let mut steps = scene.steps().await?;
        bring_to(&scene, &mut steps, "exec", "box").await?;
        freeze(&scene, "box")?;
        // What is refused and what hangs is the runtime's choice; that it is told is not.
        let status = call(&steps, "exec", "box").await?.err().context("an exec in a frozen container")?;
        ensure!(!status.message().is_empty(), "{status:?}");
        let state = steps.state("box", "").await?;
        ensure!(state.status() == TaskStatus::Running, "{state:?}");
        fine(&mut steps, "other", &scene.wish("sleep 1000")).await.context("another is delayed")?;
        // And the shim dies on top of it.
        freeze(&scene, "box")?;
        scene.kill_shim("box", Signal::SIGKILL)?;
        super::vanished(&mut steps, "box").await?;
        steps.forget("box").await?;
        anyhow::Ok(())
    })?;
    scene.clean()
}

/// Freezes a container behind everybody's back.
fn freeze(scene: &Scene, id: &str) -> Result<()> {
    let files = census::hierarchies().into_iter().flat_map(|hierarchy| {
        let folder = hierarchy.join(scene.daemon.namespace()).join(id);
        [(folder.join("freezer.state"), "FROZEN"), (folder.join("cgroup.freeze"), "1")]
    });
    let mut files: Vec<(PathBuf, &str)> = files.filter(|(file, _)| file.exists()).collect();
    // With both versions mounted the first has the processes.
    files.sort_by_key(|(file, _)| !file.ends_with("freezer.state"));
    let (file, word) = files.into_iter().next().context("no freezer")?;
    Ok(fs::write(file, word)?)
}
