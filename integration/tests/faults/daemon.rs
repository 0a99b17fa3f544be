//! The daemon is killed, at each step of what it does for a container, and started again.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use davit_integration::lifecycle::Wish;
use davit_integration::wait;
use davit_proto::containerd::v1::types::Status as TaskStatus;
use nix::sys::signal::Signal;

use super::{Scene, USUAL, bring_to, call, tokio_runtime, vanished};
use crate::root;

const STEPS: [&str; 4] = ["create", "start", "exec", "delete"];

/// What becomes of the step at which the daemon was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It is done while no daemon is there.
    DoneWithout,
    /// It is done when the next daemon is there.
    DoneLater,
    /// The shims are killed as well, before the next daemon comes.
    ShimsKilled,
}

#[test]
fn a_daemon_killed_at_any_step_finds_what_was_done_without_it() -> Result<()> {
    killed(Then::DoneWithout)
}

#[test]
fn a_daemon_killed_at_any_step_finds_what_is_still_being_done() -> Result<()> {
    killed(Then::DoneLater)
}

#[test]
fn a_daemon_killed_at_any_step_with_its_shims_cleans_up() -> Result<()> {
    killed(Then::ShimsKilled)
}

/// One container stands at each step, before it and behind it, when the daemon is killed.
fn killed(then: Then) -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    let runtime = tokio_runtime()?;
    let places = STEPS.into_iter().flat_map(|step| [(step, "wait"), (step, "done-wait")]);
    let all: Vec<(&str, String)> = places.map(|(step, place)| (step, format!("{step}-{place}"))).collect();
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        for (step, id) in &all {
            bring_to(&scene, &mut steps, step, id).await?;
        }
        for (step, id) in &all {
            let place = id.strip_prefix(&format!("{step}-")).context("a name of another form")?;
            scene.order(step, id, place)?;
            // The answer is lost with the daemon.
            drop(call(&steps, step, id));
        }
        for (step, id) in &all {
            scene.taken(step, id).await?;
        }
        anyhow::Ok(())
    })?;
    scene.daemon.stop(Signal::SIGKILL)?;
    let go = |scene: &Scene| all.iter().try_for_each(|(step, id)| scene.go(step, id));
    match then {
        Then::DoneWithout => go(&scene)?,
        Then::DoneLater => {}
        Then::ShimsKilled => all.iter().try_for_each(|(_, id)| scene.kill_shim(id, Signal::SIGKILL))?,
    }
    scene.daemon.restart()?;
    if then == Then::DoneLater {
        go(&scene)?;
    }
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        for (step, id) in &all {
            match then {
                Then::ShimsKilled => vanished(&mut steps, id).await?,
                Then::DoneWithout | Then::DoneLater => {
                    // Whatever became of the step, what was there before it is there, or was deleted.
                    let state = steps.state(id, "").await;
                    if let (Ok(state), "exec") = (&state, *step) {
                        ensure!(state.status() == TaskStatus::Running, "{id}: {state:?}");
                    }
                    if let (Ok(state), "delete") = (&state, *step) {
                        ensure!(state.exit_status == 7, "{id}: {state:?}");
                    }
                }
            }
            steps.remove(id).await?;
        }
        anyhow::Ok(())
    })?;
    scene.clean()
}

/// A shim that holds another container of its group does not end when a daemon finds that it has not got this one yet.
#[test]
fn a_creation_in_a_shared_shim_outlives_its_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    let runtime = tokio_runtime()?;
    let wish = Wish { group: "one".into(), ..scene.wish("sleep 1000") };
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        steps.record("one", &wish).await?;
        steps.create("one", "", false).await?;
        steps.start("one", "").await?;
        steps.record("two", &wish).await?;
        scene.order("create", "two", "done-wait")?;
        drop(call(&steps, "create", "two"));
        scene.taken("create", "two").await
    })?;
    let pid = fs::read_to_string(scene.bundle("two").join("init.pid"))?;
    scene.daemon.stop(Signal::SIGKILL)?;
    scene.daemon.restart()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        // The daemon has looked at both when it answers for the first.
        steps.state("one", "").await?;
        scene.go("create", "two")?;
        let end = Instant::now() + wait::PATIENCE;
        let found = loop {
            match steps.state("two", "").await {
                Ok(found) => break found,
                Err(status) => ensure!(Instant::now() < end, "{status:?}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        ensure!(found.pid.to_string() == pid && found.status() == TaskStatus::Created, "{found:?}");
        for id in ["two", "one"] {
            steps.remove(id).await?;
        }
        anyhow::Ok(())
    })?;
    scene.clean()
}
