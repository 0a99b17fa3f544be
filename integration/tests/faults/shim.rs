//! The shim is killed, at each step and in each state.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use davit_integration::lifecycle::{Steps, Wish, shims};
use davit_proto::containerd::events::TaskExit;
use davit_proto::containerd::services::events::v1::SubscribeRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient;
use nix::sys::signal::Signal;
use prost::Message;
use tonic::Code;

use super::{Scene, USUAL, bring_to, call, eventually, for_each, tokio_runtime, vanished};
use crate::root;

/// Where the runtime stands when the shim is killed.
const STEPS: [&str; 7] = ["create", "start", "exec", "pause", "resume", "kill", "delete"];

#[test]
fn a_shim_killed_at_any_step_leaves_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let cases: Vec<(&str, &str)> =
        STEPS.into_iter().flat_map(|step| [(step, "wait"), (step, "done-wait")]).collect();
    let scene = Arc::new(Scene::new(USUAL)?);
    tokio_runtime()?.block_on(async {
        let steps = scene.steps().await?;
        for_each(cases, |(step, place)| killed_at(scene.clone(), steps.clone(), step, place)).await
    })?;
    Arc::into_inner(scene).expect("all lives are over").clean()
}

async fn killed_at(scene: Arc<Scene>, mut steps: Steps, step: &str, place: &str) -> Result<()> {
    let id = format!("{step}-{place}");
    bring_to(&scene, &mut steps, step, &id).await?;
    scene.order(step, &id, place)?;
    let waiting = (step != "create").then(|| {
        let (mut steps, id) = (steps.clone(), id.clone());
        tokio::spawn(async move { steps.wait(&id, "").await })
    });
    let call = call(&steps, step, &id);
    scene.taken(step, &id).await?;
    scene.kill_shim(&id, Signal::SIGKILL)?;
    let answer = call.await?;
    if step == "delete" {
        // What the journal holds is no worse for the death of who wrote it.
        ensure!(answer.as_ref().is_ok_and(|status| *status == 7), "{answer:?}");
    } else {
        let status = answer.err().context("a call of a shim that was killed succeeds")?;
        // What has no shim cannot be killed any more.
        let expected = if step == "kill" { Code::NotFound } else { Code::Unavailable };
        ensure!(status.code() == expected, "{status:?}");
    }
    if let Some(waiting) = waiting {
        let status = waiting.await??;
        ensure!(status == if step == "delete" { 7 } else { 137 }, "it has ended with {status}");
    }
    vanished(&mut steps, &id).await?;
    steps.forget(&id).await?;
    Ok(())
}

#[test]
fn a_shim_killed_in_any_state_leaves_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let cases = vec!["created", "running", "paused", "stopped", "exec", "host-pids", "terminal"];
    let scene = Arc::new(Scene::new(USUAL)?);
    tokio_runtime()?.block_on(async {
        let steps = scene.steps().await?;
        for_each(cases, |state| killed_in(scene.clone(), steps.clone(), state)).await
    })?;
    Arc::into_inner(scene).expect("all lives are over").clean()
}

async fn killed_in(scene: Arc<Scene>, mut steps: Steps, state: &'static str) -> Result<()> {
    let line = match state {
        "stopped" => "exit 7",
        // Its children have no pid namespace that dies with init.
        "host-pids" => "sleep 1000 & sleep 1000 & wait",
        _ => "sleep 1000",
    };
    let terminal = state == "terminal";
    let wish = Wish { host_pids: state == "host-pids", terminal, ..scene.wish(line) };
    steps.record(state, &wish).await?;
    if terminal {
        // At the step where the socket for the terminal is there.
        scene.order("create", state, "wait")?;
        let mut creating = steps.clone();
        let create = tokio::spawn(async move { creating.create(state, "", true).await });
        scene.taken("create", state).await?;
        scene.kill_shim(state, Signal::SIGKILL)?;
        ensure!(create.await?.is_err());
        return Ok(steps.forget(state).await?);
    }
    steps.create(state, "", false).await?;
    if state != "created" {
        steps.start(state, "").await?;
    }
    match state {
        "paused" => steps.pause(state).await?,
        "stopped" => ensure!(steps.wait(state, "").await? == 7),
        "exec" => {
            steps.exec(state, "e", "sleep 1000").await?;
            steps.start(state, "e").await?;
        }
        _ => {}
    }
    let waits = ["", "e"].map(|exec| {
        let mut steps = steps.clone();
        tokio::spawn(async move { steps.wait(state, exec).await })
    });
    scene.kill_shim(state, Signal::SIGKILL)?;
    let [init, exec] = waits;
    let status = init.await?;
    // Of a task that is gone when it is asked for, nobody is told.
    let expected = if state == "stopped" { 7 } else { 137 };
    ensure!(
        status.as_ref().is_ok_and(|status| *status == expected)
            || status.as_ref().is_err_and(|status| status.code() == Code::NotFound),
        "{status:?}"
    );
    let _ = exec.await?;
    vanished(&mut steps, state).await?;
    steps.forget(state).await?;
    Ok(())
}

/// An exec that an earlier daemon has started is not known to this one, but to the journal.
#[test]
fn every_process_of_a_killed_shim_is_reported() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    let runtime = tokio_runtime()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        bring_to(&scene, &mut steps, "exec", "box").await?;
        steps.start("box", "e").await?;
        steps.exec("box", "over", "exit 5").await?;
        steps.start("box", "over").await?;
        ensure!(steps.wait("box", "over").await? == 5);
        anyhow::Ok(())
    })?;
    scene.daemon.stop(Signal::SIGKILL)?;
    scene.daemon.restart()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        // The shim is known again when it answers.
        steps.state("box", "").await?;
        let channel = davit_integration::client::connect(&scene.daemon.address()).await?;
        let filters = vec!["topic==\"/tasks/exit\"".to_owned()];
        let mut events =
            EventsClient::new(channel).subscribe(SubscribeRequest { filters }).await?.into_inner();
        scene.kill_shim("box", Signal::SIGKILL)?;
        let mut told = BTreeSet::new();
        while told.len() < 2 {
            let event = tokio::time::timeout(davit_integration::wait::PATIENCE, events.message()).await??;
            let event = event.context("the subscription ended")?.event.unwrap_or_default();
            let exit = TaskExit::decode(event.value.as_slice())?;
            // The exit of the other exec may be told again, but not otherwise.
            ensure!(exit.exit_status == if exit.id == "over" { 5 } else { 137 }, "{exit:?}");
            if exit.id != "over" {
                told.insert(exit.id);
            }
        }
        ensure!(told == BTreeSet::from(["box".to_owned(), "e".to_owned()]), "{told:?}");
        vanished(&mut steps, "box").await?;
        steps.forget("box").await?;
        anyhow::Ok(())
    })?;
    scene.clean()
}

/// Each of two that are deleted at once sees the other, and neither must leave the shim to it.
#[test]
fn a_group_that_is_deleted_at_once_leaves_no_shim() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    tokio_runtime()?.block_on(async {
        let mut steps = scene.steps().await?;
        for round in 0..5 {
            let ids = ["one", "two"].map(|name| format!("{name}-{round}"));
            for id in &ids {
                let wish = Wish { group: ids[0].clone(), ..scene.wish("exit 7") };
                steps.record(id, &wish).await?;
                steps.create(id, "", false).await?;
                steps.start(id, "").await?;
                ensure!(steps.wait(id, "").await? == 7);
            }
            // Both stand behind the same step.
            for id in &ids {
                scene.order("delete", id, "done-wait")?;
            }
            let calls = [call(&steps, "delete", &ids[0]), call(&steps, "delete", &ids[1])];
            for id in &ids {
                scene.taken("delete", id).await?;
            }
            for id in &ids {
                scene.go("delete", id)?;
            }
            for call in calls {
                ensure!(call.await?? == 7);
            }
            let namespace = scene.daemon.namespace();
            eventually("the shim is gone", || shims(&namespace, &ids[0]).is_empty().then_some(())).await?;
            for id in &ids {
                steps.forget(id).await?;
            }
        }
        anyhow::Ok(())
    })?;
    scene.clean()
}
