//! Checkpoints as content and as folders, by a runtime that needs no criu: what is written, what is kept, and what is left
//! of it when something fails or dies.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use davit_integration::client::{Conn, InNamespace, connect};
use davit_integration::lifecycle::{Steps, Wish};
use davit_integration::wait;
use davit_proto::any;
use davit_proto::containerd::runc::v1::{CheckpointOptions, Options};
use davit_proto::containerd::services::containers::v1::GetContainerRequest;
use davit_proto::containerd::services::content::v1::ReadContentRequest;
use davit_proto::containerd::services::content::v1::content_client::ContentClient;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use davit_proto::containerd::services::snapshots::v1::MountsRequest;
use davit_proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use davit_proto::containerd::services::tasks::v1::{CheckpointTaskRequest, CreateTaskRequest};
use davit_proto::containerd::types::Descriptor;
use davit_proto::containerd::v1::types::Status as TaskStatus;
use nix::sys::signal::Signal;
use prost::Message;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Status};

use super::{Scene, USUAL, eventually, tokio_runtime, vanished};
use crate::root;

const IMAGES: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
const SPEC: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
const PAGES: &str = "pages-1.img";
const LEASE: &str = "checkpoints";

impl Scene {
    /// A connection whose content is kept.
    async fn leased(&self) -> Result<Conn> {
        let channel = connect(&self.daemon.address()).await?;
        Ok(InterceptedService::new(channel, InNamespace::new(&self.daemon.namespace(), Some(LEASE))?))
    }

    async fn leases(&self) -> Result<LeasesClient<Conn>> {
        let channel = connect(&self.daemon.address()).await?;
        let plain = InNamespace::new(&self.daemon.namespace(), None)?;
        Ok(LeasesClient::new(InterceptedService::new(channel, plain)))
    }

    async fn keep(&self) -> Result<()> {
        let request = CreateRequest { id: LEASE.into(), ..CreateRequest::default() };
        self.leases().await?.create(request).await?;
        Ok(())
    }

    async fn drop_kept(&self) -> Result<()> {
        self.leases().await?.delete(DeleteRequest { id: LEASE.into(), sync: true }).await?;
        Ok(())
    }

    /// The blob of a descriptor.
    async fn read(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let mut content = ContentClient::new(self.leased().await?);
        let request = ReadContentRequest { digest: descriptor.digest.clone(), ..Default::default() };
        let mut stream = content.read(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            bytes.extend(message.data);
        }
        ensure!(bytes.len() as i64 == descriptor.size, "{descriptor:?} has {} bytes", bytes.len());
        Ok(bytes)
    }

    /// What there is in the work folders of the tasks.
    fn work(&self, name: &str) -> PathBuf {
        let folder = self.daemon.path("root/io.containerd.runtime.v2.task").join(self.daemon.namespace());
        folder.join(name)
    }

    /// A folder with a checkpoint of a client's own.
    fn images(&self, name: &str) -> Result<PathBuf> {
        let folder = self.daemon.path(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(PAGES), "pages")?;
        Ok(folder)
    }

    /// Nothing of the content store is half written.
    fn no_ingests(&self) -> Result<()> {
        let active = self.daemon.ctr().run("content active")?;
        ensure!(active.lines().count() == 1, "{active}");
        Ok(())
    }
}

async fn checkpoint(scene: &Scene, id: &str, options: CheckpointOptions) -> Result<Vec<Descriptor>, Status> {
    let conn = scene.leased().await.map_err(|error| Status::internal(error.to_string()))?;
    let request = CheckpointTaskRequest {
        container_id: id.into(),
        options: Some(any::pack(&options)),
        ..CheckpointTaskRequest::default()
    };
    Ok(TasksClient::new(conn).checkpoint(request).await?.into_inner().descriptors)
}

/// Creates a task that is to be restored.
async fn restore(
    steps: &mut Steps,
    id: &str,
    checkpoint: Option<Descriptor>,
    options: Option<&Options>,
) -> Result<u32, Status> {
    let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: id.into() };
    let rootfs = steps.client.snapshots.mounts(mounts).await?.into_inner().mounts;
    let request = CreateTaskRequest {
        container_id: id.into(),
        rootfs,
        checkpoint,
        options: options.map(any::pack),
        ..CreateTaskRequest::default()
    };
    Ok(steps.client.tasks.create(request).await?.into_inner().pid)
}

async fn running(scene: &Scene, steps: &mut Steps, id: &str) -> Result<()> {
    steps.record(id, &scene.wish("sleep 1000")).await?;
    steps.create(id, "", false).await?;
    steps.start(id, "").await?;
    Ok(())
}

/// The options of the wishes of a scene, as a client gives them with a task.
fn options(wish: &Wish, criu_image_path: &str) -> Options {
    Options {
        binary_name: wish.runtime.clone(),
        root: wish.runtime_root.clone(),
        criu_image_path: criu_image_path.to_owned(),
        ..Options::default()
    }
}

#[test]
fn a_checkpoint_becomes_content_and_content_a_task() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    tokio_runtime()?.block_on(async {
        scene.keep().await?;
        let mut steps = scene.steps().await?;
        running(&scene, &mut steps, "one").await?;
        let descriptors = checkpoint(&scene, "one", CheckpointOptions::default()).await?;
        ensure!(steps.state("one", "").await?.status() == TaskStatus::Running, "it goes on");
        let types: Vec<&str> = descriptors.iter().map(|blob| blob.media_type.as_str()).collect();
        ensure!(types == [IMAGES, SPEC], "{descriptors:?}");
        let bytes = scene.read(&descriptors[0]).await?;
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names = archive.entries()?.map(|entry| Ok(entry?.path()?.display().to_string()));
        let names: Vec<String> = names.collect::<Result<_>>()?;
        ensure!(names.iter().any(|name| name.ends_with(PAGES)), "{names:?}");
        let record =
            steps.client.containers.get(GetContainerRequest { id: "one".into() }).await?.into_inner();
        let spec = record.container.and_then(|container| container.spec).context("no spec")?;
        ensure!(scene.read(&descriptors[1]).await? == spec.encode_to_vec(), "the spec is the container's");
        // The same again is the same content.
        let again = checkpoint(&scene, "one", CheckpointOptions::default()).await?;
        ensure!(again[1] == descriptors[1], "{again:?}");
        eventually("the folder is gone", || (fs::read_dir(scene.work("")).ok()?.count() == 1).then_some(()))
            .await?;
        let exit = CheckpointOptions { exit: true, ..CheckpointOptions::default() };
        checkpoint(&scene, "one", exit).await?;
        ensure!(steps.wait("one", "").await? == 137 && steps.delete("one").await? == 137, "it has ended");
        // The container is restored, and so is another one; a third is given up.
        ensure!(restore(&mut steps, "one", Some(descriptors[0].clone()), None).await? == 0, "no process yet");
        ensure!(steps.state("one", "").await?.status() == TaskStatus::Created, "it waits for its start");
        let unpacked = scene.work("one/checkpoint");
        ensure!(fs::read(unpacked.join(PAGES))? == vec![7; 100_000], "the checkpoint is there");
        let pid = steps.start("one", "").await?;
        ensure!(pid != 0 && steps.state("one", "").await?.pid == pid, "it runs");
        eventually("the checkpoint has served", || (!unpacked.exists()).then_some(())).await?;
        for id in ["two", "three"] {
            steps.record(id, &scene.wish("exit 7")).await?;
            restore(&mut steps, id, Some(descriptors[0].clone()), None).await?;
        }
        steps.start("two", "").await?;
        ensure!(steps.wait("two", "").await? == 7, "it has a life of its own");
        ensure!(steps.delete("three").await? == 0, "what never ran has no exit");
        for id in ["one", "two", "three"] {
            steps.remove(id).await?;
        }
        scene.no_ingests()?;
        scene.drop_kept().await
    })?;
    scene.clean()
}

#[test]
fn a_checkpoint_in_a_folder_is_left_to_its_client() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    tokio_runtime()?.block_on(async {
        scene.keep().await?;
        let mut steps = scene.steps().await?;
        running(&scene, &mut steps, "one").await?;
        let folder = scene.daemon.path("mine");
        fs::create_dir(&folder)?;
        let image_path = folder.display().to_string();
        let asked = CheckpointOptions { image_path: image_path.clone(), exit: true, ..Default::default() };
        ensure!(checkpoint(&scene, "one", asked).await?.is_empty(), "there is no content to speak of");
        ensure!(folder.join(PAGES).exists(), "the client has its checkpoint");
        steps.wait("one", "").await?;
        steps.remove("one").await?;
        // The options of a task name a folder.
        let wish = scene.wish("exit 7");
        steps.record("two", &wish).await?;
        ensure!(
            restore(&mut steps, "two", None, Some(&options(&wish, &image_path))).await? == 0,
            "no process"
        );
        steps.start("two", "").await?;
        ensure!(steps.wait("two", "").await? == 7 && folder.join(PAGES).exists(), "it is still the client's");
        // An annotation names one too, with what the container had written beside it, and has the task started.
        let images = scene.images("whole/checkpoint")?;
        let mut archive = tar::Builder::new(fs::File::create(images.with_file_name("rootfs-diff.tar"))?);
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(2);
        archive.append_data(&mut header, "written", &b"hi"[..])?;
        archive.finish()?;
        steps.record("three", &scene.wish("test $(cat /written) = hi && exit 8")).await?;
        let annotations = BTreeMap::from([("RestoreFromPath".to_owned(), images.display().to_string())]);
        let named = Descriptor { annotations, ..Descriptor::default() };
        ensure!(restore(&mut steps, "three", Some(named), None).await? != 0, "it is started");
        ensure!(steps.wait("three", "").await? == 8, "what it had written is there");
        for id in ["two", "three"] {
            steps.remove(id).await?;
        }
        scene.drop_kept().await
    })?;
    scene.clean()
}

#[test]
fn a_checkpoint_that_fails_leaves_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    tokio_runtime()?.block_on(async {
        scene.keep().await?;
        let mut steps = scene.steps().await?;
        let plain = CheckpointOptions::default;
        let refused = |result: Result<Vec<Descriptor>, Status>| result.expect_err("it should be refused");
        ensure!(refused(checkpoint(&scene, "none", plain()).await).code() == Code::NotFound, "no container");
        steps.record("one", &scene.wish("sleep 1000")).await?;
        let status = refused(checkpoint(&scene, "one", plain()).await);
        ensure!(status.code() == Code::NotFound && status.message().contains("task one"), "{status:?}");
        steps.create("one", "", false).await?;
        let status = refused(checkpoint(&scene, "one", plain()).await);
        ensure!(status.code() == Code::FailedPrecondition, "{status:?}");
        steps.start("one", "").await?;
        for fault in ["fail", "mute", "die", "done-fail"] {
            scene.order("checkpoint", "one", fault)?;
            let status = refused(checkpoint(&scene, "one", plain()).await);
            ensure!(status.message().starts_with("checkpoint failed: "), "{fault}: {status:?}");
        }
        ensure!(steps.state("one", "").await?.status() == TaskStatus::Running, "it goes on");
        // What is no checkpoint is refused before anything is made.
        steps.record("two", &scene.wish("true")).await?;
        let blob = |media_type: &str, digest: String| {
            Some(Descriptor { media_type: media_type.into(), digest, ..Descriptor::default() })
        };
        let absent = format!("sha256:{}", "0".repeat(64));
        let spec = checkpoint(&scene, "one", plain()).await?.swap_remove(1);
        let cases = [
            (blob("application/x", absent.clone()), Code::InvalidArgument, "unsupported checkpoint type"),
            (blob(IMAGES, "nonsense".into()), Code::InvalidArgument, "digest of the checkpoint"),
            (blob(IMAGES, absent), Code::NotFound, "content digest sha256:0000"),
            (blob(IMAGES, spec.digest), Code::InvalidArgument, "archive of the checkpoint"),
        ];
        for (wanted, code, text) in cases {
            let status = restore(&mut steps, "two", wanted.clone(), None).await.expect_err("it is refused");
            ensure!(status.code() == code && status.message().contains(text), "{wanted:?}: {status:?}");
        }
        // A restore that fails can be tried again, or given up.
        let images = scene.images("mine")?;
        let path = images.display().to_string();
        fs::remove_file(images.join(PAGES))?;
        restore(&mut steps, "two", None, Some(&options(&scene.wish("true"), &path))).await?;
        let status = steps.start("two", "").await.expect_err("there is no checkpoint");
        ensure!(status.message().starts_with("OCI runtime restore failed: "), "{status:?}");
        scene.images("mine")?;
        steps.start("two", "").await?;
        ensure!(steps.wait("two", "").await? == 0, "it has run");
        for id in ["one", "two"] {
            steps.remove(id).await?;
        }
        scene.no_ingests()?;
        scene.drop_kept().await
    })?;
    scene.clean()
}

#[test]
fn a_daemon_killed_in_a_checkpoint_leaves_nothing() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    let runtime = tokio_runtime()?;
    let all = [("before", "wait"), ("after", "done-wait")];
    runtime.block_on(async {
        scene.keep().await?;
        let mut steps = scene.steps().await?;
        for (id, place) in all {
            running(&scene, &mut steps, id).await?;
            scene.order("checkpoint", id, place)?;
            let conn = scene.leased().await?;
            let request =
                CheckpointTaskRequest { container_id: id.into(), ..CheckpointTaskRequest::default() };
            // The answer is lost with the daemon.
            tokio::spawn(async move { TasksClient::new(conn).checkpoint(request).await });
            scene.taken("checkpoint", id).await?;
        }
        anyhow::Ok(())
    })?;
    scene.daemon.stop(Signal::SIGKILL)?;
    scene.daemon.restart()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        eventually("the folders are gone", || {
            (fs::read_dir(scene.work("")).ok()?.count() == 2).then_some(())
        })
        .await?;
        for (id, _) in all {
            scene.go("checkpoint", id)?;
            // Whatever has become of the checkpoint, the container runs, and the next one is whole.
            let blobs = checkpoint(&scene, id, CheckpointOptions::default()).await?;
            ensure!(blobs.len() == 2, "{blobs:?}");
            ensure!(steps.state(id, "").await?.status() == TaskStatus::Running, "{id} runs");
            steps.remove(id).await?;
        }
        scene.no_ingests()?;
        scene.drop_kept().await
    })?;
    scene.clean()
}

#[test]
fn what_waits_for_its_restore_outlives_the_daemon_and_not_its_shim() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut scene = Scene::new(USUAL)?;
    let runtime = tokio_runtime()?;
    let all = ["waits", "restores", "perishes"];
    runtime.block_on(async {
        scene.keep().await?;
        let mut steps = scene.steps().await?;
        running(&scene, &mut steps, "source").await?;
        let images = checkpoint(&scene, "source", CheckpointOptions::default()).await?.swap_remove(0);
        for id in all {
            steps.record(id, &scene.wish("sleep 1000")).await?;
            restore(&mut steps, id, Some(images.clone()), None).await?;
        }
        scene.order("restore", "restores", "done-wait")?;
        let mut other = steps.clone();
        tokio::spawn(async move { other.start("restores", "").await });
        scene.taken("restore", "restores").await
    })?;
    scene.daemon.stop(Signal::SIGKILL)?;
    scene.go("restore", "restores")?;
    scene.kill_shim("perishes", Signal::SIGKILL)?;
    scene.daemon.restart()?;
    runtime.block_on(async {
        let mut steps = scene.steps().await?;
        vanished(&mut steps, "perishes").await?;
        ensure!(steps.state("waits", "").await?.status() == TaskStatus::Created, "it still waits");
        ensure!(steps.start("waits", "").await? != 0, "it is restored");
        let mut state = steps.state("restores", "").await?;
        let end = Instant::now() + wait::PATIENCE;
        while state.status() == TaskStatus::Created && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
            state = steps.state("restores", "").await?;
        }
        ensure!(state.status() == TaskStatus::Running && state.pid != 0, "{state:?}");
        for id in ["waits", "source", "restores", "perishes"] {
            steps.remove(id).await?;
        }
        scene.drop_kept().await
    })?;
    scene.clean()
}
