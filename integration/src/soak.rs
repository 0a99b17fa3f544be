//! Many lives of containers, while daemons and shims are killed at random: at the end nothing is left, and how every process
//! ended is known, once.
//!
//! Each life is drawn from the seed and its number; which moment a kill hits is up to the machine. Workers go through
//! lives (`life`), one thread kills the daemon and starts it again, and one follows its history of exits, which is
//! compared with what the workers expect (`ledger`).

mod ledger;
mod life;
pub(crate) mod random;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use davit_proto::davit::services::events::v1::events_client::EventsClient;
use davit_proto::davit::services::events::v1::{Entry, FollowRequest, follow_request};
use nix::sys::signal::Signal;

use crate::census::Census;
use crate::client::connect;
use crate::{Daemon, image, wait};
use ledger::Ledger;
use random::Random;

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many containers.
    pub lifecycles: u64,
    /// What is drawn is drawn from this.
    pub seed: u64,
    /// Lives that go on at once.
    pub concurrency: usize,
    /// The mean time between two kills of the daemon.
    pub daemon_kills: Duration,
    /// One of so many lives loses its shim; 0 for none.
    pub shim_kills: u64,
}

impl Plan {
    /// The usual rates.
    pub fn new(lifecycles: u64, seed: u64) -> Plan {
        Plan { lifecycles, seed, concurrency: 6, daemon_kills: Duration::from_secs(1), shim_kills: 8 }
    }
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Lives by their kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Kills of the daemon.
    pub daemon_kills: u64,
    /// The longest time until a daemon that was started again served.
    pub longest_start: Duration,
    /// Kills of shims.
    pub shim_kills: u64,
    /// Exits by what they were: with the code of the process, by a client's kill, with the shim.
    pub exits: BTreeMap<&'static str, u64>,
    /// All of it.
    pub elapsed: Duration,
}

/// What all threads share.
struct Run {
    plan: Plan,
    address: PathBuf,
    namespace: String,
    parent: String,
    next: AtomicU64,
    done: AtomicU64,
    daemon_kills: AtomicU64,
    shim_kills: AtomicU64,
    /// The workers are done: no more kills.
    over: AtomicBool,
    /// What was wrong; there is no use in going on.
    failures: Mutex<Vec<String>>,
    ledger: Mutex<Ledger>,
}

impl Run {
    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, what: String) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    fn has_failed(&self) -> bool {
        !self.failures.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// Runs the plan on a private daemon.
///
/// # Errors
/// Something is left, an exit is missing, or is told twice or wrongly; the text says what.
pub fn run(plan: &Plan) -> Result<Summary> {
    let begun = Instant::now();
    let config = "[log]\nlevel = \"info\"\n[runtime]\nsocket_dir = \"{folder}/s\"\n";
    let daemon = Daemon::start_with(&[], config)?;
    daemon.import_busybox()?;
    let census = Census::take(&daemon.path(""));
    let rows = daemon.rows()?;
    let run = Arc::new(Run {
        plan: plan.clone(),
        address: daemon.address(),
        namespace: daemon.namespace(),
        parent: image::digest(&image::busybox_layer()?),
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        daemon_kills: AtomicU64::new(0),
        shim_kills: AtomicU64::new(0),
        over: AtomicBool::new(false),
        failures: Mutex::default(),
        ledger: Mutex::default(),
    });
    let shared = run.clone();
    let follower = thread::spawn(move || follow(&shared));
    let workers: Vec<_> = (0..plan.concurrency)
        .map(|_| {
            let run = run.clone();
            thread::spawn(move || life::work(&run))
        })
        .collect();
    let shared = run.clone();
    let killer = thread::spawn(move || kill_daemons(&shared, daemon));
    show_progress(&run, begun);
    for worker in workers {
        worker.join().map_err(|_| anyhow!("a worker panicked"))?;
    }
    run.over.store(true, Ordering::Relaxed);
    let (daemon, longest_start) = killer.join().map_err(|_| anyhow!("the killer panicked"))??;
    let verdict = judge(&run, &daemon, &census, &rows);
    follower.join().map_err(|_| anyhow!("the follower panicked"))?;
    if let Err(error) = verdict {
        let log = std::env::temp_dir().join(format!("davit-soak-{}.log", plan.seed));
        let _ = std::fs::write(&log, daemon.log());
        return Err(error.context(format!("seed {}; the daemon's log is {}", plan.seed, log.display())));
    }
    let (kinds, exits) = run.ledger().sums();
    Ok(Summary {
        kinds,
        daemon_kills: run.daemon_kills.load(Ordering::Relaxed),
        longest_start,
        shim_kills: run.shim_kills.load(Ordering::Relaxed),
        exits,
        elapsed: begun.elapsed(),
    })
}

/// Kills the daemon again and again, and starts it again; gives the last one, which runs.
fn kill_daemons(run: &Run, mut daemon: Daemon) -> Result<(Daemon, Duration)> {
    let mut random = Random::new(run.plan.seed ^ 0xda3e_39cb_94b9_5bdb);
    let mut longest = Duration::ZERO;
    loop {
        // From a half to one and a half of the mean.
        let mean = run.plan.daemon_kills.as_millis() as u64;
        let end = Instant::now() + Duration::from_millis(mean / 2 + random.below(mean.max(1)));
        while Instant::now() < end {
            if run.over.load(Ordering::Relaxed) {
                return Ok((daemon, longest));
            }
            thread::sleep(Duration::from_millis(10));
        }
        daemon.stop(Signal::SIGKILL)?;
        run.daemon_kills.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(random.below(100)));
        let begun = Instant::now();
        if let Err(error) = daemon.restart() {
            run.fail(format!("the daemon does not start: {error:#}"));
            return Err(error);
        }
        longest = longest.max(begun.elapsed());
    }
}

/// Takes the exits from the history into the ledger until all is judged, going on behind the last cursor each time that
/// the daemon has died.
fn follow(run: &Run) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let mut cursor = 0;
    while !run.ledger().is_judged() {
        // A daemon that is away, or dies, is no news.
        let _ = runtime.block_on(follow_one(run, &mut cursor));
        thread::sleep(Duration::from_millis(5));
    }
}

async fn follow_one(run: &Run, cursor: &mut u64) -> Result<()> {
    let mut client = EventsClient::new(connect(&run.address).await?).max_decoding_message_size(16 << 20);
    let since = Some(follow_request::Since::Cursor(*cursor));
    let filters = vec![format!("topic==\"/tasks/exit\",namespace==\"{}\"", run.namespace)];
    let mut stream = client.follow(FollowRequest { since, filters }).await?.into_inner();
    loop {
        let next = tokio::time::timeout(Duration::from_millis(200), stream.message());
        let entry: Entry = match next.await {
            Ok(entry) => entry?.context("the stream ended")?,
            Err(_) if run.ledger().is_judged() => return Ok(()),
            Err(_) => continue,
        };
        if entry.cursor <= *cursor {
            run.fail(format!("the history goes back from {cursor} to {}", entry.cursor));
        }
        *cursor = entry.cursor;
        if let Err(error) = run.ledger().told(&entry) {
            run.fail(format!("{error:#}"));
        }
    }
}

fn show_progress(run: &Run, begun: Instant) {
    let terminal = std::io::stderr().is_terminal();
    let every = if terminal { Duration::from_millis(200) } else { Duration::from_secs(10) };
    let mut shown = Instant::now();
    loop {
        let done = run.done.load(Ordering::Relaxed);
        let finished = done >= run.plan.lifecycles || run.has_failed();
        if shown.elapsed() >= every || finished {
            shown = Instant::now();
            let seconds = begun.elapsed().as_secs_f64();
            let line = format!(
                "{done} of {} lives, {:.1} a second; {} daemons and {} shims killed",
                run.plan.lifecycles,
                done as f64 / seconds,
                run.daemon_kills.load(Ordering::Relaxed),
                run.shim_kills.load(Ordering::Relaxed),
            );
            // Nobody may be looking.
            let _ = if terminal {
                write!(std::io::stderr(), "\r{line}\u{1b}[K")
            } else {
                writeln!(std::io::stderr(), "{line}")
            };
        }
        if finished {
            if terminal {
                eprintln!();
            }
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Compares what is there with what was there before, and what was told with what happened.
fn judge(run: &Run, daemon: &Daemon, census: &Census, before: &str) -> Result<()> {
    let judged = || -> Result<()> {
        // What a shim has not told yet it tells within thirty seconds; the patience is twice as long.
        wait::until("every exit is told", || run.ledger().missing().is_empty().then_some(()))
            .with_context(|| format!("missing: {:#?}", run.ledger().missing()))?;
        census.settle(&daemon.path(""))?;
        wait::until("no row is left", || (daemon.rows().ok()? == before).then_some(()))
            .with_context(|| format!("now: {:?}\nbefore: {before:?}", daemon.rows()))
    };
    let result = judged();
    let wrong = run.ledger().judge();
    let failures = run.failures.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut all: Vec<String> = failures.into_iter().chain(wrong).collect();
    all.extend(result.err().map(|error| format!("{error:#}")));
    if all.is_empty() {
        return Ok(());
    }
    let more = all.len().saturating_sub(20);
    all.truncate(20);
    bail!("{}{}", all.join("\n"), if more > 0 { format!("\nand {more} more") } else { String::new() })
}
