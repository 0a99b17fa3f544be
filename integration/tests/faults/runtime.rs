//! The OCI runtime fails, lies or is killed.

use std::sync::Arc;

use anyhow::{Result, ensure};
use davit_integration::lifecycle::Steps;
use davit_proto::containerd::services::tasks::v1::ListPidsRequest;
use tonic::Status;

use super::{Scene, USUAL, for_each, tokio_runtime};
use crate::root;

/// The faults of every step, and those of the two that leave a process.
const ANY: [&str; 6] = ["fail", "garbage", "lie", "die", "done-die", "done-fail"];
const WITH_PID: [&str; 3] = ["no-pid", "bad-pid", "other-pid"];

#[test]
fn a_runtime_that_fails_lies_or_dies_leaves_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut cases = vec![("create", "half"), ("create", "mute")];
    for step in ["create", "start", "exec", "pause", "resume", "kill", "delete"] {
        cases.extend(ANY.map(|fault| (step, fault)));
        if matches!(step, "create" | "exec") {
            cases.extend(WITH_PID.map(|fault| (step, fault)));
        }
    }
    let scene = Arc::new(Scene::new(USUAL)?);
    tokio_runtime()?.block_on(async {
        let steps = scene.steps().await?;
        for_each(cases, |(step, fault)| life(scene.clone(), steps.clone(), step, fault)).await
    })?;
    Arc::into_inner(scene).expect("all lives are over").clean()
}

/// A whole life in which one step goes wrong. What fails before that step is a failure of the test; what fails from there
/// on may, as long as the container can be taken away.
async fn life(scene: Arc<Scene>, mut steps: Steps, step: &str, fault: &str) -> Result<()> {
    let id = format!("{step}-{fault}");
    scene.order(step, &id, fault)?;
    steps.record(&id, &scene.wish("sleep 1000")).await?;
    let went_wrong = go_through(&scene, &mut steps, &id).await;
    let told = match &went_wrong {
        Ok(()) => String::new(),
        Err(status) => status.message().to_owned(),
    };
    ensure!(scene.is_taken(step, &id) || step == "delete", "{told:?} came before the fault");
    if went_wrong.is_err() && fault == "fail" {
        // The runtime's own words reach the client.
        ensure!(told.contains("a fault was ordered"), "{told}");
    }
    if step == "exec" && went_wrong.is_err() {
        // Nobody will ever know of a process that was started all the same.
        alone(&mut steps, &id).await?;
    }
    steps.remove(&id).await?;
    ensure!(scene.is_taken(step, &id), "the fault never happened");
    Ok(())
}

async fn go_through(scene: &Scene, steps: &mut Steps, id: &str) -> Result<(), Status> {
    steps.create(id, "", false).await?;
    steps.start(id, "").await?;
    steps.exec(id, "e", "sleep 1000").await?;
    steps.start(id, "e").await?;
    steps.pause(id).await?;
    steps.resume(id).await?;
    if scene.is_taken("resume", id) {
        // A runtime that lies says that it has thawed what stays frozen, and whoever waits for that waits for ever.
        return Ok(());
    }
    steps.kill(id, "e").await?;
    let status = steps.wait(id, "e").await?;
    if status != 137 {
        return Err(Status::internal(format!("the exec ended with {status}")));
    }
    steps.delete_exec(id, "e").await?;
    steps.kill(id, "").await?;
    if scene.is_taken("kill", id) {
        // A runtime that lies says that it has killed what goes on.
        return Ok(());
    }
    steps.wait(id, "").await.map(drop)
}

/// Waits until init is the only process of the container.
async fn alone(steps: &mut Steps, id: &str) -> Result<()> {
    let end = std::time::Instant::now() + davit_integration::wait::PATIENCE;
    loop {
        let pids = ListPidsRequest { container_id: id.to_owned() };
        let processes = steps.client.tasks.list_pids(pids).await?.into_inner().processes;
        // The shell of init has forked its `sleep`, or has not.
        if !processes.is_empty() && processes.len() <= 2 {
            return Ok(());
        }
        ensure!(std::time::Instant::now() < end, "{processes:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
