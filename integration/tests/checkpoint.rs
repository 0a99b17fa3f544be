//! Checkpoints with criu, where criu works: a process goes on where it was.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use davit_integration::client::{Client, Conn, InNamespace, connect};
use davit_integration::daemon::ok;
use davit_integration::{Daemon, image, wait};
use davit_proto::any;
use davit_proto::containerd::runc::v1::CheckpointOptions;
use davit_proto::containerd::services::leases::v1::CreateRequest;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::snapshots::v1::MountsRequest;
use davit_proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use davit_proto::containerd::services::tasks::v1::{
    CheckpointTaskRequest, CreateTaskRequest, DeleteTaskRequest, KillRequest, StartRequest, WaitRequest,
};
use davit_proto::containerd::types::Descriptor;
use tonic::service::interceptor::InterceptedService;

/// It counts, and has set something that no process has by itself.
const COUNT: &str = "trap 'exit 3' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done";

/// Whether criu can do anything on this kernel; says so if not.
fn criu_works() -> bool {
    match Command::new("criu").arg("check").output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            eprintln!("skipped: criu does not work here ({})", said.lines().next().unwrap_or_default());
            false
        }
        Err(error) => {
            eprintln!("skipped: needs criu (apt-get install criu): {error}");
            false
        }
    }
}

async fn leased(daemon: &Daemon, lease: Option<&str>) -> Result<Conn> {
    let channel = connect(&daemon.address()).await?;
    Ok(InterceptedService::new(channel, InNamespace::new(&daemon.namespace(), lease)?))
}

async fn checkpoint(daemon: &Daemon, exit: bool) -> Result<Descriptor> {
    let options = CheckpointOptions { exit, ..CheckpointOptions::default() };
    let request = CheckpointTaskRequest {
        container_id: "counts".into(),
        options: Some(any::pack(&options)),
        ..CheckpointTaskRequest::default()
    };
    let mut tasks = TasksClient::new(leased(daemon, Some("kept")).await?);
    let descriptors = tasks.checkpoint(request).await?.into_inner().descriptors;
    descriptors.into_iter().next().context("no checkpoint")
}

#[test]
fn a_restored_process_goes_on_where_it_was() -> Result<()> {
    if !crate::root() || !criu_works() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let parent = image::digest(&image::busybox_layer()?);
    let log = daemon.path("out");
    let stdout = format!("file://{}", log.display());
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    let more_than = |before: usize| wait::until("the container goes on", || (lines() > before).then_some(()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mut leases = LeasesClient::new(leased(&daemon, None).await?);
        leases.create(CreateRequest { id: "kept".into(), ..CreateRequest::default() }).await?;
        let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        client.start_writing("counts", &parent, &["sh", "-c", COUNT], &stdout).await?;
        more_than(5)?;
        checkpoint(&daemon, false).await?;
        more_than(lines() + 1)?;
        let images = checkpoint(&daemon, true).await?;
        let wait = WaitRequest { container_id: "counts".into(), ..WaitRequest::default() };
        let ended = client.tasks.wait(wait.clone()).await?.into_inner();
        ensure!(ended.exit_status == 137, "{ended:?}");
        client.tasks.delete(DeleteTaskRequest { container_id: "counts".into() }).await?;
        let before = lines();
        let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: "counts".into() };
        let create = CreateTaskRequest {
            container_id: "counts".into(),
            rootfs: client.snapshots.mounts(mounts).await?.into_inner().mounts,
            stdout: stdout.clone(),
            checkpoint: Some(images),
            ..CreateTaskRequest::default()
        };
        client.tasks.create(create).await?;
        let start = StartRequest { container_id: "counts".into(), ..StartRequest::default() };
        client.tasks.start(start).await?;
        more_than(before + 5)?;
        let kill = KillRequest { container_id: "counts".into(), signal: 15, ..KillRequest::default() };
        client.tasks.kill(kill).await?;
        ensure!(client.finish("counts").await? == 3, "its trap is still set");
        let counted: Vec<String> = fs::read_to_string(&log)?.lines().map(str::to_owned).collect();
        let expected: Vec<String> = (0..counted.len()).map(|number| number.to_string()).collect();
        ensure!(counted == expected, "not a number is missing, and none comes twice: {counted:?}");
        anyhow::Ok(())
    })
}

#[test]
fn checkpoints_belong_to_their_container() -> Result<()> {
    if !crate::root() || !criu_works() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let davit = |words: &[&str]| ok(daemon.davit(words)?);
    let lines = || davit(&["logs", "counts"]).map_or(0, |log| log.lines().count());
    let more_than = |before: usize| wait::until("the container goes on", || (lines() > before).then_some(()));
    davit(&["run", "-d", "--name", "counts", "busybox", "sh", "-c", COUNT])?;
    more_than(3)?;
    davit(&["checkpoint", "create", "--leave-running", "counts", "first"])?;
    davit(&["checkpoint", "create", "counts", "second"])?;
    ensure!(davit(&["wait", "counts"])?.trim() == "137", "it was stopped");
    ensure!(!daemon.davit(["checkpoint", "create", "counts", "third"])?.status.success(), "it does not run");
    davit(&["checkpoint", "rm", "counts", "first"])?;
    ensure!(!daemon.davit(["start", "--checkpoint", "first", "counts"])?.status.success(), "it is gone");
    let listed = davit(&["checkpoint", "ls", "counts"])?;
    ensure!(listed.contains("second") && !listed.contains("first"), "{listed}");
    let before = lines();
    davit(&["start", "--checkpoint", "second", "counts"])?;
    more_than(before + 3)?;
    davit(&["stop", "counts"])?;
    ensure!(davit(&["wait", "counts"])?.trim() == "3", "its trap is still set");
    davit(&["rm", "counts"])?;
    Ok(())
}
