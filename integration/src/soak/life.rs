//! One life after the other, each step until it is done or can no longer be, whatever becomes of the daemon meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use tonic::{Code, Status};

use super::Run;
use super::random::Random;
use crate::client::Client;
use crate::lifecycle::{Steps, Wish, shims};

/// How long a step may take with all its daemons.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a life is like.
const KINDS: [&str; 6] = ["run to exit", "killed", "execs", "paused", "shared shim", "terminal"];

/// Goes through lives until there are none left to begin.
pub(super) fn work(run: &Arc<Run>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return run.fail(error.to_string()),
    };
    loop {
        let number = run.next.fetch_add(1, Ordering::Relaxed);
        if number >= run.plan.lifecycles || run.has_failed() {
            return;
        }
        if let Err(error) = runtime.block_on(live(run, number)) {
            run.fail(format!("life {number}: {error:#}"));
        }
        run.done.fetch_add(1, Ordering::Relaxed);
    }
}

async fn live(run: &Arc<Run>, number: u64) -> Result<()> {
    // Neighbours in number must not be neighbours in what is drawn.
    let mut random = Random::new(run.plan.seed.wrapping_add(number.wrapping_mul(0x2545_f491_4f6c_dd1d)));
    let kind = KINDS[random.below(KINDS.len() as u64) as usize];
    let id = format!("life-{number}");
    let code = 1 + random.below(99) as u32;
    let ids: Vec<String> = match kind {
        "shared shim" => vec![format!("{id}-a"), format!("{id}-b")],
        _ => vec![id],
    };
    let doomed = run.plan.shim_kills > 0 && random.below(run.plan.shim_kills) == 0;
    let delay = Duration::from_millis(random.below(400));
    let over = Arc::new(AtomicBool::new(false));
    let killer = doomed.then(|| {
        let (run, ids, over) = (run.clone(), ids.clone(), over.clone());
        thread::spawn(move || kill_shim(&run, &ids, delay, &over))
    });
    let mut life = Life { run: run.clone(), steps: None, doomed };
    let result = life.go_through(kind, &ids, code, &mut random).await;
    let removed = async {
        for id in &ids {
            life.remove(id).await?;
        }
        anyhow::Ok(())
    };
    let removed = removed.await;
    over.store(true, Ordering::Relaxed);
    if let Some(killer) = killer {
        killer.join().map_err(|_| anyhow::anyhow!("a killer of shims panicked"))?;
    }
    run.ledger().lived(kind);
    result.with_context(|| kind.to_owned())?;
    removed.with_context(|| kind.to_owned())
}

/// Kills the shim of a life some time after its beginning, as soon as there is one.
fn kill_shim(run: &Run, ids: &[String], delay: Duration, over: &AtomicBool) {
    thread::sleep(delay);
    while !over.load(Ordering::Relaxed) {
        let found = shims(&run.namespace, &ids[0]);
        if !found.is_empty() {
            // Before the deed: what follows from it may be told at once.
            ids.iter().for_each(|id| run.ledger().doomed(id));
            for shim in found {
                let _ = kill(shim, Signal::SIGKILL);
            }
            run.shim_kills.fetch_add(1, Ordering::Relaxed);
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// How a step ended.
enum Step<T> {
    /// It is done; with its answer, unless that was lost with a daemon and what is there shows that it was done.
    Done(Option<T>),
    /// The container is gone, or going, for its shim was killed.
    Perished,
}

struct Life {
    run: Arc<Run>,
    steps: Option<Steps>,
    /// Its shim may be killed at any moment.
    doomed: bool,
}

impl Life {
    async fn steps(&mut self) -> Result<&mut Steps> {
        if self.steps.is_none() {
            let end = Instant::now() + PATIENCE;
            loop {
                match Client::new(&self.run.address, &self.run.namespace).await {
                    Ok(client) => {
                        self.steps = Some(Steps::new(client, &self.run.namespace, &self.run.parent));
                        break;
                    }
                    Err(error) if Instant::now() > end => return Err(error),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        }
        self.steps.as_mut().context("a connection was just made")
    }

    /// Makes a call until a daemon answers it. `done` are the codes which mean, after an answer was lost, that the call
    /// whose answer that was has been carried out.
    async fn step<T>(
        &mut self,
        what: &str,
        done: &[Code],
        mut call: impl AsyncFnMut(&mut Steps) -> Result<T, Status>,
    ) -> Result<Step<T>> {
        let end = Instant::now() + PATIENCE;
        let mut lost = false;
        loop {
            let answer = call(self.steps().await?).await;
            let status = match answer {
                Ok(answer) => return Ok(Step::Done(Some(answer))),
                Err(status) => status,
            };
            if Instant::now() > end {
                bail!("{what}: {status}");
            }
            if is_lost(&status) {
                lost = true;
                self.steps = None;
                continue;
            }
            if lost && done.contains(&status.code()) {
                return Ok(Step::Done(None));
            }
            // The daemon has just started, and does not know yet what became of the shim; or the name is that of a creation
            // that was broken off and is being cleaned up.
            let undecided = matches!(status.code(), Code::Unavailable | Code::AlreadyExists);
            if self.doomed && !matches!(status.code(), Code::AlreadyExists) {
                return Ok(Step::Perished);
            }
            if !(lost && undecided) {
                bail!("{what}: {status:?}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn go_through(
        &mut self,
        kind: &'static str,
        ids: &[String],
        code: u32,
        random: &mut Random,
    ) -> Result<()> {
        for (place, id) in ids.iter().enumerate() {
            // Of two in one shim the first ends by itself.
            let ends = kind == "run to exit" || kind == "shared shim" && place == 0;
            let line = if ends { format!("exit {code}") } else { "sleep 1000".to_owned() };
            let group = if ids.len() > 1 { ids[0].clone() } else { String::new() };
            let terminal = kind == "terminal";
            let wish = Wish { terminal, group, ..Wish::shell(&line) };
            self.step("record", &[], async |steps| steps.record(id, &wish).await).await?;
            if !self.create(id, terminal).await? {
                return Ok(());
            }
            self.run.ledger().began(id, id, if ends { code } else { 137 });
            let start =
                self.step("start", &[Code::FailedPrecondition], async |steps| steps.start(id, "").await);
            if matches!(start.await?, Step::Perished) {
                return Ok(());
            }
        }
        let last = ids.last().context("a life has a container")?;
        match kind {
            "execs" => {
                for number in 0..1 + random.below(4) {
                    if !self.exec(last, &format!("e{number}"), 1 + random.below(99) as u32).await? {
                        return Ok(());
                    }
                }
            }
            "paused" => {
                let done = [Code::FailedPrecondition];
                let pause = self.step("pause", &done, async |steps| steps.pause(last).await).await?;
                if matches!(pause, Step::Perished) {
                    return Ok(());
                }
                let resume = self.step("resume", &done, async |steps| steps.resume(last).await).await?;
                if matches!(resume, Step::Perished) {
                    return Ok(());
                }
            }
            _ => {}
        }
        if kind != "run to exit" {
            self.step("kill", &[Code::NotFound], async |steps| steps.kill(last, "").await).await?;
        }
        for id in ids {
            self.wait(id, "").await?;
        }
        Ok(())
    }

    /// False when it perished.
    async fn create(&mut self, id: &str, terminal: bool) -> Result<bool> {
        let end = Instant::now() + PATIENCE;
        loop {
            let create = self
                .step("create", &[Code::AlreadyExists], async |steps| steps.create(id, "", terminal).await);
            match create.await? {
                Step::Perished => return Ok(false),
                Step::Done(Some(_)) => return Ok(true),
                // It is there, or what was broken off is still there.
                Step::Done(None) => {}
            }
            match self.step("state", &[], async |steps| steps.state(id, "").await).await {
                Ok(Step::Done(Some(process))) if process.pid != 0 => return Ok(true),
                Ok(Step::Perished) => return Ok(false),
                outcome if Instant::now() > end => {
                    outcome?;
                    bail!("{id} is neither there nor not");
                }
                Ok(Step::Done(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// False when it perished.
    async fn exec(&mut self, id: &str, exec_id: &str, code: u32) -> Result<bool> {
        let line = format!("exit {code}");
        let added =
            self.step("exec", &[Code::AlreadyExists], async |steps| steps.exec(id, exec_id, &line).await);
        if matches!(added.await?, Step::Perished) {
            return Ok(false);
        }
        let started = self
            .step("start exec", &[Code::FailedPrecondition], async |steps| steps.start(id, exec_id).await);
        if matches!(started.await?, Step::Perished) {
            return Ok(false);
        }
        self.run.ledger().began(id, exec_id, code);
        if !self.wait(id, exec_id).await? {
            return Ok(false);
        }
        let deleted =
            self.step("delete exec", &[Code::NotFound], async |steps| steps.delete_exec(id, exec_id).await);
        match deleted.await? {
            Step::Done(Some(status)) => self.run.ledger().answered(id, exec_id, status),
            Step::Done(None) => {}
            Step::Perished => return Ok(false),
        }
        Ok(true)
    }

    /// False when it perished.
    async fn wait(&mut self, id: &str, exec_id: &str) -> Result<bool> {
        let process = if exec_id.is_empty() { id } else { exec_id };
        match self.step("wait", &[], async |steps| steps.wait(id, exec_id).await).await? {
            Step::Done(Some(status)) => self.run.ledger().answered(id, process, status),
            Step::Done(None) => {}
            Step::Perished => return Ok(false),
        }
        Ok(true)
    }

    /// Takes it away, in whatever state it is.
    async fn remove(&mut self, id: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let _ = self.steps().await?.kill(id, "").await;
            match self.steps().await?.delete(id).await {
                Ok(status) => {
                    self.run.ledger().answered(id, id, status);
                    break;
                }
                Err(status) if status.code() == Code::NotFound => break,
                Err(status) if is_lost(&status) => self.steps = None,
                Err(status) if Instant::now() > end => bail!("delete {id}: {status:?}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        let forget = self.step("forget", &[], async |steps| steps.forget(id).await);
        forget.await.map(drop)
    }
}

/// Whether a call has no answer because its daemon is gone, or going.
fn is_lost(status: &Status) -> bool {
    std::error::Error::source(status).is_some() || status.message().contains("the daemon is shutting down")
}
