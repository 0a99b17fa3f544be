//! Nothing is left and no exit is lost, whatever fails, hangs, lies or is killed at whatever step.
//!
//! The steps are those of an OCI runtime, for at each of them a shim and a daemon wait for one: `faulty-runc` stands at the
//! step, before it or behind it, until the test has done its harm.

mod checkpoint;
mod daemon;
mod hangs;
mod runtime;
mod shim;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use davit_integration::census::Census;
use davit_integration::client::Client;
use davit_integration::lifecycle::{Steps, Wish, shims};
use davit_integration::{Daemon, image, wait};
use nix::sys::signal::{Signal, kill};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::Status;

/// Lives that go on at once.
const PARALLEL: usize = 6;

/// The usual bounds of time.
const USUAL: &str = "";
/// Bounds that a test can wait for.
const SHORT: &str =
    "[runtime.timeouts]\ncreate = 5\ncall = 5\ncleanup = 5\nload = 2\nshutdown = 2\nstate = 1\n";

/// A daemon with an image, a faulty runtime, and what there was before the first container.
struct Scene {
    daemon: Daemon,
    parent: String,
    census: Census,
    rows: String,
    /// A process that no container has.
    canary: Child,
}

impl Scene {
    fn new(timeouts: &str) -> Result<Scene> {
        let config = format!("[runtime]\nsocket_dir = \"{{folder}}/s\"\n{timeouts}");
        let daemon = Daemon::start_with(&[], &config)?;
        daemon.import_busybox()?;
        fs::create_dir_all(daemon.path("oci/faults"))?;
        symlink(env!("CARGO_BIN_EXE_faulty-runc"), daemon.path("oci/runc"))?;
        symlink(env!("CARGO_BIN_EXE_criuless-runc"), daemon.path("oci/next"))?;
        let canary = Command::new("/bin/sleep").arg("1000").spawn()?;
        fs::write(daemon.path("oci/faults/canary"), canary.id().to_string())?;
        let (census, rows) = (Census::take(&daemon.path("")), daemon.rows()?);
        let parent = image::digest(&image::busybox_layer()?);
        Ok(Scene { daemon, parent, census, rows, canary })
    }

    /// A container whose runtime is the faulty one.
    fn wish(&self, line: &str) -> Wish {
        Wish {
            runtime: self.daemon.path("oci/runc").display().to_string(),
            runtime_root: self.daemon.path("runc").display().to_string(),
            ..Wish::shell(line)
        }
    }

    async fn steps(&self) -> Result<Steps> {
        let client = Client::new(&self.daemon.address(), &self.daemon.namespace()).await?;
        Ok(Steps::new(client, &self.daemon.namespace(), &self.parent))
    }

    fn fault(&self, name: &str) -> PathBuf {
        self.daemon.path("oci/faults").join(name)
    }

    /// Orders a fault for the next call of `action` for the container.
    fn order(&self, action: &str, id: &str, fault: &str) -> Result<()> {
        // Whole at once: the runtime may look at any moment.
        let (new, order) = (self.fault(&format!("{action}@{id}.new")), self.fault(&format!("{action}@{id}")));
        fs::write(&new, fault)?;
        Ok(fs::rename(new, order)?)
    }

    fn is_taken(&self, action: &str, id: &str) -> bool {
        self.fault(&format!("{action}@{id}.taken")).exists()
    }

    /// Waits until the runtime is at the step.
    async fn taken(&self, action: &str, id: &str) -> Result<()> {
        eventually(&format!("the runtime is at {action} of {id}"), || self.is_taken(action, id).then_some(()))
            .await
    }

    /// Lets it go on.
    fn go(&self, action: &str, id: &str) -> Result<()> {
        Ok(fs::write(self.fault(&format!("{action}@{id}.go")), "")?)
    }

    fn bundle(&self, id: &str) -> PathBuf {
        let namespace = self.daemon.namespace();
        self.daemon.path("state/io.containerd.runtime.v2.task").join(namespace).join(id)
    }

    fn kill_shim(&self, id: &str, signal: Signal) -> Result<()> {
        let shims = shims(&self.daemon.namespace(), id);
        ensure!(!shims.is_empty(), "{id} has no shim");
        for shim in shims {
            kill(shim, signal)?;
        }
        Ok(())
    }

    /// Everything is as it was before the first container.
    fn clean(&mut self) -> Result<()> {
        ensure!(self.canary.try_wait()?.is_none(), "a process of nobody's container was killed");
        self.census.settle(&self.daemon.path(""))?;
        wait::until("no record is left", || (self.daemon.rows().ok()? == self.rows).then_some(()))
            .with_context(|| format!("{:?}", self.daemon.rows()))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.canary.kill();
        let _ = self.canary.wait();
    }
}

fn tokio_runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + wait::PATIENCE;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() > end {
            bail!("waited {} s in vain: {what}", wait::PATIENCE.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Does the same for each case, several at once; says which of them failed.
async fn for_each<C, F>(cases: Vec<C>, work: impl Fn(C) -> F) -> Result<()>
where
    C: std::fmt::Debug,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(PARALLEL));
    let mut running = JoinSet::new();
    for case in cases {
        let (name, places) = (format!("{case:?}"), places.clone());
        let life = work(case);
        running.spawn(async move {
            let _place = places.acquire_owned().await?;
            life.await.with_context(|| name)
        });
    }
    let mut failed = Vec::new();
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended? {
            failed.push(format!("{error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// Waits until the daemon knows no such task.
async fn vanished(steps: &mut Steps, id: &str) -> Result<()> {
    let end = Instant::now() + wait::PATIENCE;
    loop {
        match steps.state(id, "").await {
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(()),
            answer => ensure!(Instant::now() < end, "{id} is still there: {answer:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A call that goes on by itself, to be looked at later.
type Call = tokio::task::JoinHandle<Result<u32, Status>>;

/// Makes the call of a step; all before it has been done ([`bring_to`]).
fn call(steps: &Steps, step: &str, id: &str) -> Call {
    let (mut steps, step, id) = (steps.clone(), step.to_owned(), id.to_owned());
    tokio::spawn(async move {
        match step.as_str() {
            "create" => steps.create(&id, "", false).await,
            "start" => steps.start(&id, "").await,
            "exec" => steps.start(&id, "e").await,
            "pause" => steps.pause(&id).await.map(|()| 0),
            "resume" => steps.resume(&id).await.map(|()| 0),
            "kill" => steps.kill(&id, "").await.map(|()| 0),
            "delete" => steps.delete(&id).await,
            _ => Err(Status::unimplemented(step)),
        }
    })
}

/// Brings a container to where the step can be done. Before `delete` it has ended with 7.
async fn bring_to(scene: &Scene, steps: &mut Steps, step: &str, id: &str) -> Result<()> {
    let line = if step == "delete" { "exit 7" } else { "sleep 1000" };
    steps.record(id, &scene.wish(line)).await?;
    if step == "create" {
        return Ok(());
    }
    steps.create(id, "", false).await?;
    if step == "start" {
        return Ok(());
    }
    steps.start(id, "").await?;
    match step {
        "exec" => steps.exec(id, "e", "sleep 1000").await?,
        "resume" => steps.pause(id).await?,
        "delete" => ensure!(steps.wait(id, "").await? == 7),
        _ => {}
    }
    Ok(())
}
