//! When to collect.
//!
//! ```text
//!   start ── startup delay ──▶ collect ──▶ rest ──▶ collect ──▶ …
//!                                           │ so long that collecting takes no more than `pause_threshold` of the time;
//!                                           │ it goes on until something was removed, or `mutation_threshold` changes
//!                                           │ were made, or something expires
//!                                           └─ cut short by a request, or by `deletion_threshold` removals
//! ```
//!
//! containerd wakes several times a second to see whether there is something to do, and an expired lease is noticed with
//! the next change only, or never. Here the task sleeps until there is something to do, and it knows when the next
//! lease expires. So that it learns of new ones, it collects within [`LONGEST_REST`] of any change.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::histogram::Histogram;
use crate::metadata::Metadata;
use crate::metadata::error::Error;
use crate::metrics::Page;

/// A collection counts as no shorter than this, so that short ones do not follow each other without rest.
const SHORTEST_RUN: Duration = Duration::from_millis(5);

/// How long a change can go without a collection.
const LONGEST_REST: Duration = Duration::from_secs(60 * 60);

/// The longest wait of any kind, whatever the configuration says: a time that far ahead can be counted with.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The rest before the next try when the first collection failed, and what is added to the usual one later.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How long a collection under way may go on when the daemon ends: a backend may hang.
const LAST_RUN: Duration = Duration::from_secs(5);

/// How eagerly to collect; the names and defaults are containerd's.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The share of time that collecting may take, from 0 (no limit) to 0.5; what is outside of that counts as the nearer
    /// end. The rest after a collection is a day at most, and so is each of the two delays.
    pub pause_threshold: f64,
    /// Collect as soon as so much was removed; 0 for never by number.
    pub deletion_threshold: u64,
    /// Collect at the next occasion after so many changes, even if nothing was removed; 0 for never by number.
    pub mutation_threshold: u64,
    /// How long a collection that is asked for, or due by number, is put off.
    pub schedule_delay: Duration,
    /// When the first collection is, after the start.
    pub startup_delay: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            pause_threshold: 0.02,
            deletion_threshold: 0,
            mutation_threshold: 100,
            schedule_delay: Duration::ZERO,
            startup_delay: Duration::from_millis(100),
        }
    }
}

/// What the collector is told.
#[derive(Debug, Default)]
pub(in crate::metadata) struct Schedule {
    /// Changes since the last collection began.
    mutations: AtomicU64,
    /// Those of them that removed something.
    deletions: AtomicU64,
    runs: Mutex<Runs>,
    wake: Notify,
    finished: watch::Sender<Finished>,
    /// The collections that failed, and how long the others took.
    failures: AtomicU64,
    took: Histogram,
}

#[derive(Debug, Default)]
struct Runs {
    started: u64,
    /// A run of this number, or a later one, is asked for.
    requested: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Finished {
    number: u64,
    failed: bool,
    /// The collector has ended.
    stopped: bool,
}

impl Schedule {
    /// Counts a change.
    pub(in crate::metadata) fn mutated(&self, removed: bool) {
        self.mutations.fetch_add(1, Ordering::Relaxed);
        if removed {
            self.deletions.fetch_add(1, Ordering::Relaxed);
        }
        self.wake.notify_one();
    }

    /// Waits for the end of a run that begins from now on.
    pub(in crate::metadata) async fn request(&self) -> Result<(), Error> {
        let number = {
            let mut runs = self.runs();
            runs.requested = runs.started + 1;
            runs.requested
        };
        let mut finished = self.finished.subscribe();
        self.wake.notify_one();
        let finished = finished.wait_for(|run| run.number >= number || run.stopped).await;
        match finished {
            Ok(run) if run.number >= number && !run.failed => Ok(()),
            Ok(_) | Err(_) => Err(Error::CollectionFailed),
        }
    }

    /// Adds what was collected to a page of metrics, by containerd's names.
    pub(in crate::metadata) fn add_to(&self, page: &mut Page) {
        let help = "duration of gc scheduler collections";
        self.took.add_to(page, "containerd_gc_gc_seconds", help, &[]);
        let (name, help) = ("containerd_gc_collections_total", "counter of gc scheduler collections");
        let counts = [("fail", self.failures.load(Ordering::Relaxed)), ("success", self.took.total())];
        for (status, count) in counts {
            page.add(name, "counter", help, &[("status", status)], count as f64);
        }
    }

    fn runs(&self) -> std::sync::MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn requested(&self) -> bool {
        let runs = self.runs();
        runs.requested > runs.started
    }

    fn start(&self) -> u64 {
        self.mutations.store(0, Ordering::Relaxed);
        self.deletions.store(0, Ordering::Relaxed);
        let mut runs = self.runs();
        runs.started += 1;
        runs.started
    }
}

/// What the runs so far say about the next.
struct Pace {
    /// When the last run ended, or the collector began.
    since: Instant,
    /// The rest after it.
    rest: Duration,
    first: bool,
    total: Duration,
    runs: u32,
    next_expiry: Option<SystemTime>,
    /// Since when a run is asked for.
    asked: Option<Instant>,
}

impl Pace {
    /// When the next run is due, as far as is known now.
    fn due(&mut self, now: Instant, schedule: &Schedule, config: &Config) -> Option<Instant> {
        let (mutations, deletions) =
            (schedule.mutations.load(Ordering::Relaxed), schedule.deletions.load(Ordering::Relaxed));
        let reached = |threshold: u64, count: u64| threshold > 0 && count >= threshold;
        if schedule.requested() || reached(config.deletion_threshold, deletions) {
            return Some(*self.asked.get_or_insert(now) + config.schedule_delay.min(LONGEST_WAIT));
        }
        let usual = self.since + self.rest;
        if self.first || deletions > 0 || reached(config.mutation_threshold, mutations) {
            return Some(usual);
        }
        let late = (mutations > 0).then(|| self.since + LONGEST_REST.max(self.rest));
        // Asked again after at most the longest rest: the clock may be set meanwhile.
        let expiry = self.next_expiry.map(|expiry| {
            let left = expiry.duration_since(SystemTime::now()).unwrap_or_default();
            (now + left.min(LONGEST_REST)).max(usual)
        });
        [late, expiry].into_iter().flatten().min()
    }

    fn ran(&mut self, now: Instant, outcome: Result<(Duration, Option<SystemTime>), ()>, config: &Config) {
        self.since = now;
        self.asked = None;
        match outcome {
            Ok((took, next_expiry)) => {
                self.first = false;
                self.total += took;
                self.runs = self.runs.saturating_add(1);
                self.next_expiry = next_expiry;
                let average = (self.total / self.runs).max(SHORTEST_RUN);
                let threshold = config.pause_threshold.min(0.5);
                self.rest = if threshold > 0.0 {
                    // The quotient of two ordinary numbers may be no duration.
                    Duration::try_from_secs_f64(average.as_secs_f64() / threshold)
                        .map_or(LONGEST_WAIT, |cycle| cycle.saturating_sub(average).min(LONGEST_WAIT))
                } else {
                    Duration::ZERO
                };
            }
            Err(()) => {
                // Whatever made this run due still does, but it may have been counted away.
                self.first = true;
                self.rest = self.rest.min(LONGEST_REST) + REST_AFTER_FAILURE;
            }
        }
    }
}

/// Collects whenever it is due, until the token is cancelled.
pub(super) async fn run(metadata: &Metadata, config: &Config, shutdown: &CancellationToken) {
    let schedule = &metadata.inner.schedule;
    let mut pace = Pace {
        since: Instant::now(),
        rest: config.startup_delay.min(LONGEST_WAIT),
        first: true,
        total: Duration::ZERO,
        runs: 0,
        next_expiry: None,
        asked: None,
    };
    loop {
        let due = pace.due(Instant::now(), schedule, config);
        // All arms can be dropped at any time: a permit that `notified` has not handed out stays.
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = sleep_until(due), if due.is_some() => {}
            () = schedule.wake.notified() => continue,
        }
        let number = schedule.start();
        // What is given up here is as after a crash: the next daemon looks everywhere.
        let outcome = tokio::select! {
            outcome = metadata.collect() => outcome,
            () = long_after(shutdown) => {
                tracing::warn!("a collection does not end; the next daemon goes on with it");
                break;
            }
        };
        if let Err(error) = &outcome {
            tracing::error!(error = davit_model::error::chain(error), "garbage collection failed");
        }
        match &outcome {
            Ok(stats) => schedule.took.count(stats.records),
            Err(_) => drop(schedule.failures.fetch_add(1, Ordering::Relaxed)),
        }
        let failed = outcome.is_err();
        let outcome = outcome.map(|stats| (stats.records, stats.next_expiry)).map_err(|_| ());
        pace.ran(Instant::now(), outcome, config);
        schedule.finished.send_replace(Finished { number, failed, stopped: false });
    }
    schedule.finished.send_modify(|finished| finished.stopped = true);
}

async fn long_after(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    tokio::time::sleep(LAST_RUN).await;
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(since: Instant) -> Pace {
        Pace {
            since,
            rest: Duration::ZERO,
            first: true,
            total: Duration::ZERO,
            runs: 0,
            next_expiry: None,
            asked: None,
        }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn rests_in_proportion_and_until_there_is_something_to_do() {
        let (schedule, config, now) = (Schedule::default(), Config::default(), Instant::now());
        let mut pace = pace(now);
        assert_eq!(pace.due(now, &schedule, &config), Some(now));
        schedule.start();
        pace.ran(now, Ok((ms(20), None)), &config);
        assert_eq!(pace.due(now, &schedule, &config), None);
        for _ in 0..99 {
            schedule.mutated(false);
        }
        assert_eq!(pace.due(now, &schedule, &config), Some(now + LONGEST_REST));
        schedule.mutated(false);
        // 20 ms are 2 % of a second.
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(980)));
        schedule.start();
        assert_eq!(pace.due(now, &schedule, &config), None);
        schedule.mutated(true);
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(980)));
        // Runs of 20 ms and none are 10 ms on average.
        pace.ran(now, Ok((Duration::ZERO, None)), &config);
        assert_eq!(pace.rest, ms(490));
        pace.ran(now, Err(()), &config);
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(1490)));
    }

    #[test]
    fn a_request_or_a_threshold_cuts_the_rest_short() {
        let (schedule, now) = (Schedule::default(), Instant::now());
        let config = Config { deletion_threshold: 2, schedule_delay: ms(10), ..Config::default() };
        let mut pace = pace(now);
        schedule.start();
        pace.ran(now, Ok((ms(20), None)), &config);
        schedule.mutated(true);
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(980)));
        schedule.mutated(true);
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(10)));
        // Looking again does not put it off.
        assert_eq!(pace.due(now + ms(5), &schedule, &config), Some(now + ms(10)));
        schedule.start();
        let now = now + ms(10);
        pace.ran(now, Ok((ms(20), None)), &config);
        assert_eq!(pace.due(now, &schedule, &config), None);
        schedule.runs().requested = 3;
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(10)));
    }

    #[test]
    fn no_configuration_stops_the_collector() {
        let (schedule, now) = (Schedule::default(), Instant::now());
        for threshold in [f64::MIN_POSITIVE, 1e-300, 1e-9, -1.0, 7.0, f64::NAN, f64::INFINITY, -f64::INFINITY]
        {
            let config = Config {
                pause_threshold: threshold,
                schedule_delay: Duration::MAX,
                startup_delay: Duration::MAX,
                ..Config::default()
            };
            let mut pace = pace(now);
            pace.ran(now, Ok((Duration::from_secs(60), None)), &config);
            pace.ran(now, Err(()), &config);
            assert!(pace.rest <= LONGEST_WAIT, "{threshold}");
            schedule.runs().requested = u64::MAX;
            assert_eq!(pace.due(now, &schedule, &config), Some(now + LONGEST_WAIT));
        }
    }

    #[test]
    fn an_expiry_ends_the_rest() {
        let (schedule, config, now) = (Schedule::default(), Config::default(), Instant::now());
        let mut pace = pace(now);
        schedule.start();
        pace.ran(now, Ok((ms(20), Some(SystemTime::now() - ms(1)))), &config);
        assert_eq!(pace.due(now, &schedule, &config), Some(now + ms(980)));
        pace.ran(now, Ok((ms(20), Some(SystemTime::now() + 24 * LONGEST_REST))), &config);
        assert_eq!(pace.due(now, &schedule, &config), Some(now + LONGEST_REST));
    }
}
