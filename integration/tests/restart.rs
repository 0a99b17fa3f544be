//! The daemon dies and comes back; the containers do not notice, and nothing that happened meanwhile is lost.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use davit_integration::client::{Client, connect};
use davit_integration::{Daemon, image, wait};
use davit_proto::containerd::events::TaskExit;
use davit_proto::containerd::services::events::v1::SubscribeRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient;
use davit_proto::containerd::services::tasks::v1::{GetRequest, ListTasksRequest};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use prost::Message;
use tokio::sync::mpsc;

use crate::root;

/// The containers of one run.
const CONTAINERS: usize = 20;

#[test]
fn a_killed_daemon_finds_everything_again() -> Result<()> {
    survive(Signal::SIGKILL)
}

#[test]
fn a_stopped_daemon_finds_everything_again() -> Result<()> {
    survive(Signal::SIGTERM)
}

fn survive(signal: Signal) -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(scenario(&mut daemon, signal))
}

pub(crate) async fn scenario(daemon: &mut Daemon, signal: Signal) -> Result<()> {
    let parent = image::digest(&image::busybox_layer()?);
    let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
    let stdout = daemon.path("stdout");
    mkfifo(&stdout, Mode::from_bits_truncate(0o600))?;
    let reader = Reader::start(&stdout);
    let count = "i=0; while :; do echo $i; i=$((i+1)); done";
    client.start_writing("writer", &parent, &["sh", "-c", count], &stdout.display().to_string()).await?;
    let term = "trap 'exit 7' TERM; while :; do sleep 1 & wait $!; done";
    for n in 1..CONTAINERS {
        client.start(&format!("c-{n}"), &parent, &["sh", "-c", term]).await?;
    }
    let before = pids(&mut client).await?;
    ensure!(before.len() == CONTAINERS, "{before:?}");
    wait::until("the writer writes", || (reader.lines() > 1000).then_some(()))?;
    wait::until("c-1 has set its trap", || catches(before["c-1"], Signal::SIGTERM).then_some(()))?;

    for ignored in [Signal::SIGHUP, Signal::SIGUSR1] {
        daemon.signal(ignored)?;
        ensure!(pids(&mut client).await? == before, "{ignored} has an effect");
    }

    daemon.stop(signal)?;
    let down = SystemTime::now();
    kill(Pid::from_raw(before["c-1"] as i32), Signal::SIGTERM)?;
    kill(Pid::from_raw(before["c-2"] as i32), Signal::SIGKILL)?;
    let gone = |pid: u32| (!Path::new(&format!("/proc/{pid}")).exists()).then_some(());
    wait::until("c-1 ends without a daemon", || gone(before["c-1"]))?;
    wait::until("c-2 ends without a daemon", || gone(before["c-2"]))?;
    let up = SystemTime::now();
    let lines = reader.lines();
    wait::until("the writer goes on without a daemon", || (reader.lines() > lines + 1000).then_some(()))?;

    // A subscriber that tries from before the start, as an orchestrator's would.
    let mut exits = subscribe(daemon.address());
    daemon.restart()?;
    let mut seen = BTreeMap::new();
    while seen.len() < 2 {
        let exit = tokio::time::timeout(wait::PATIENCE, exits.recv()).await;
        let exit: TaskExit = exit.context("no exit event")?.context("the subscription ended")?;
        let at = SystemTime::try_from(exit.exited_at.context("an exit without a time")?)?;
        ensure!(at >= down && at <= up, "{} ended at {at:?}, not between {down:?} and {up:?}", exit.id);
        ensure!(exit.id == exit.container_id);
        ensure!(seen.insert(exit.id.clone(), exit.exit_status).is_none(), "{} is told twice", exit.id);
    }
    ensure!(seen == BTreeMap::from([("c-1".into(), 7), ("c-2".into(), 137)]), "{seen:?}");

    let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
    ensure!(pids(&mut client).await? == before, "the pids have changed");
    for (id, status) in [("c-1", 7), ("c-2", 137)] {
        let request = GetRequest { container_id: id.into(), ..Default::default() };
        let process = client.tasks.get(request).await?.into_inner().process.context("no process")?;
        ensure!(process.exit_status == status, "{id}: {process:?}");
        ensure!(client.finish(id).await? == status);
    }
    let lines = reader.lines();
    wait::until("the writer goes on", || (reader.lines() > lines + 1000).then_some(()))?;
    for n in 3..CONTAINERS {
        ensure!(client.kill(&format!("c-{n}")).await? == 137);
    }
    ensure!(client.kill("writer").await? == 137);
    reader.finish()
}

/// Whether a process has a handler for a signal: the first of a pid namespace is not ended by one that it does not catch.
fn catches(pid: u32, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    caught.is_some_and(|mask| mask & (1 << (signal as i32 - 1)) != 0)
}

async fn pids(client: &mut Client) -> Result<BTreeMap<String, u32>> {
    let tasks = client.tasks.list(ListTasksRequest::default()).await?.into_inner().tasks;
    Ok(tasks.into_iter().map(|task| (task.id, task.pid)).collect())
}

/// The exits in the event stream of a subscriber who connects as soon as anybody listens.
fn subscribe(address: PathBuf) -> mpsc::Receiver<TaskExit> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut stream = loop {
            if let Ok(channel) = connect(&address).await {
                let filters = vec!["topic==\"/tasks/exit\"".to_owned()];
                if let Ok(stream) = EventsClient::new(channel).subscribe(SubscribeRequest { filters }).await {
                    break stream.into_inner();
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        while let Ok(Some(envelope)) = stream.message().await {
            let event = envelope.event.unwrap_or_default();
            if let Ok(exit) = TaskExit::decode(event.value.as_slice())
                && sender.send(exit).await.is_err()
            {
                break;
            }
        }
    });
    receiver
}

/// A client that holds the reading end of a FIFO and checks that the numbers in it have no gap.
pub(crate) struct Reader {
    lines: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Reader {
    pub(crate) fn start(fifo: &Path) -> Reader {
        let (lines, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (fifo, count, stop) = (fifo.to_owned(), lines.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            let mut reader = BufReader::new(File::open(fifo)?);
            let mut line = String::new();
            for expected in 0.. {
                line.clear();
                if reader.read_line(&mut line)? == 0 || !line.ends_with('\n') {
                    break;
                }
                let number: u64 = line.trim_end().parse().with_context(|| format!("{line:?}"))?;
                if number != expected {
                    bail!("the output jumps from {expected} to {number}");
                }
                count.store(number, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        });
        Reader { lines, done, thread }
    }

    pub(crate) fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }

    pub(crate) fn finish(self) -> Result<()> {
        self.done.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    }
}
