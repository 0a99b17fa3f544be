//! Runs steps on a daemon beside the model, and compares.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::Subject;
use super::call::{Call, Step};
use super::draw::Draw;
use super::filter::Filters;
use super::rule::Rule;
use super::wire::{Reply, Wire};
use super::world::{Answer, SNAPSHOTTERS, World};

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What is drawn is drawn from this.
    pub seed: u64,
    /// How many calls.
    pub steps: u64,
    /// One of so many steps ends with the daemon's death; 0 for none.
    pub kills: u64,
    /// Rules that do not hold for this daemon.
    pub without: Vec<Rule>,
    /// Rules that are left out of further models, one each, which the comparison has to find out.
    pub seeded: Vec<Rule>,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Calls by method.
    pub calls: BTreeMap<&'static str, u64>,
    /// Calls by the code of their errors.
    pub refused: BTreeMap<String, u64>,
    /// Collections that were waited for.
    pub collections: u64,
    /// Kills of the daemon.
    pub kills: u64,
    /// The step at which each seeded bug was found.
    pub caught: BTreeMap<Rule, u64>,
    /// All of it.
    pub elapsed: Duration,
}

/// A step that was carried out, or what happened in between.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A call.
    Step(Step),
    /// The daemon was killed and started again.
    Kill,
}

/// The models beside a daemon.
struct Beside<'a, S> {
    subject: &'a mut S,
    wire: Wire,
    runtime: Runtime,
    world: World,
    seeded: Vec<(Rule, World)>,
    summary: Summary,
    step: u64,
    /// What was answered last is on disk.
    settled: bool,
}

impl<S: Subject> Beside<'_, S> {
    fn connect(&mut self) -> Result<()> {
        self.wire = self.runtime.block_on(Wire::connect(&self.subject.address()))?;
        Ok(())
    }

    /// A call on the daemon and on all models.
    fn call(&mut self, step: &Step) -> Result<bool> {
        let reply: Reply = self.runtime.block_on(self.wire.answer(step));
        // Of errors the code counts, and that the text has the words by which clients know its class.
        let reply = reply.map_err(|status| (self.subject.code(&status), status));
        let agree = |answer: &Answer| match (answer, &reply) {
            (Ok(wanted), Ok(found)) => wanted == found,
            (Err(code), Err((found, _))) => code == found,
            _ => false,
        };
        let caught = &mut self.summary.caught;
        self.seeded.retain_mut(|(rule, world)| {
            let same = agree(&world.answer(step));
            if !same {
                caught.insert(*rule, self.step);
            }
            same
        });
        let answer = self.world.answer(step);
        if !agree(&answer) {
            let show = |value: &Value| serde_json::to_string(value).unwrap_or_default();
            let wanted = answer.as_ref().map(show);
            let found = reply.as_ref().map(show).map_err(|(code, status)| (code, status.message()));
            bail!("{step:?}\nthe model says {wanted:?}\nthe daemon says {found:?}");
        }
        if let Err((code, status)) = &reply {
            ensure!(self.subject.words(status), "{step:?}\nunexpected words: {status:?}");
            *self.summary.refused.entry(format!("{code:?}")).or_default() += 1;
        }
        Ok(reply.is_ok())
    }

    /// Compares all lists.
    fn compare(&mut self) -> Result<()> {
        let none = Filters::default;
        let mut calls = vec![(None, Call::ListNamespaces)];
        for namespace in self.world.namespaces() {
            let mut own = vec![
                Call::ListContainers { filters: none() },
                Call::ListImages { filters: none() },
                Call::ListContent { filters: none() },
                Call::ListStatuses { filters: none() },
                Call::ListLeases { filters: none() },
                Call::ListSandboxes { filters: none() },
            ];
            own.extend(self.world.leases(&namespace).into_iter().map(|lease| Call::ListResources { lease }));
            own.extend(
                SNAPSHOTTERS.map(|name| Call::ListSnapshots { snapshotter: name.into(), filters: none() }),
            );
            calls.extend(own.into_iter().map(|call| (Some(namespace.clone()), call)));
        }
        for (namespace, call) in calls {
            if self.subject.serves(&call) {
                self.call(&Step { namespace, lease: None, call })?;
            }
        }
        Ok(())
    }

    /// Compares what is on disk; after a collection nothing else may be there.
    fn compare_backends(&self) -> Result<()> {
        // What is left beyond that is a matter of time for a daemon that sweeps only what it knows to be in disorder.
        let exact = self.subject.sweeps_all();
        let (found, wanted) = (self.subject.blobs()?, self.world.blobs());
        let same = if exact { found == wanted } else { found.is_superset(&wanted) };
        ensure!(same, "on disk are the blobs {found:?}, needed {wanted:?}");
        let mut counts = vec![("ingests", self.subject.ingests()?, self.world.ingests())];
        for name in SNAPSHOTTERS {
            let wanted = self.world.snapshots(name, self.subject.views_have_folders(name));
            counts.push((name, self.subject.snapshots(name)?, wanted));
        }
        for (what, found, wanted) in counts {
            ensure!(
                found == wanted || (!exact && found > wanted),
                "on disk are {found} of {what}, needed {wanted}"
            );
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            // Directly after what need not be on disk yet nobody knows what is.
            Event::Kill if !self.settled => Ok(()),
            Event::Kill => {
                self.subject.kill()?;
                self.connect()?;
                self.summary.kills += 1;
                self.world.restart();
                self.seeded.iter_mut().for_each(|(_, world)| world.restart());
                self.compare().context("after the daemon was killed and started again")
            }
            Event::Step(step) => {
                let done = self.call(step)?;
                self.settled = done && step.call.settles();
                if done && step.call.collects() {
                    self.summary.collections += 1;
                    self.compare().context("after a collection")?;
                    self.compare_backends().context("after a collection")?;
                }
                Ok(())
            }
        }
    }
}

fn beside<'a, S: Subject>(subject: &'a mut S, plan: &Plan) -> Result<Beside<'a, S>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let wire = runtime.block_on(Wire::connect(&subject.address()))?;
    let world = World::new(plan.without.iter().copied());
    let seeded = plan
        .seeded
        .iter()
        .map(|rule| (*rule, World::new(plan.without.iter().copied().chain([*rule]))))
        .collect();
    Ok(Beside { subject, wire, runtime, world, seeded, summary: Summary::default(), step: 0, settled: false })
}

/// Runs the plan on a daemon that `start` starts. If daemon and model come to differ, the steps are shortened to those that it
/// takes, on further daemons.
///
/// # Errors
/// They differ; the text has the steps.
pub fn run<S: Subject>(plan: &Plan, start: impl Fn() -> Result<S>) -> Result<Summary> {
    let begun = Instant::now();
    let mut subject = start()?;
    let mut beside = beside(&mut subject, plan)?;
    let mut draw = Draw::new(plan.seed);
    let mut events = Vec::new();
    let mut kill = false;
    while beside.step < plan.steps {
        let step = draw.step(&beside.world);
        if !beside.subject.serves(&step.call) || beside.world.leaves_open(&step) {
            continue;
        }
        beside.step += 1;
        *beside.summary.calls.entry(step.call.method()).or_default() += 1;
        events.push(Event::Step(step));
        let mut outcome = beside.event(&events[events.len() - 1]);
        // What was answered is on disk: the daemon dies directly after it.
        kill |= plan.kills > 0 && draw.one_in(plan.kills);
        if kill && beside.settled && outcome.is_ok() {
            kill = false;
            events.push(Event::Kill);
            outcome = beside.event(&Event::Kill);
        }
        if let Err(error) = outcome {
            let at = beside.step;
            drop(beside);
            let text = format!("seed {}, step {at}: {error:#}", plan.seed);
            return Err(shrink(plan, events, &start).context(text));
        }
    }
    let mut summary = std::mem::take(&mut beside.summary);
    summary.elapsed = begun.elapsed();
    Ok(summary)
}

/// How long a failure may be shortened.
const SHRINK: Duration = Duration::from_secs(30);

/// Leaves out steps, fewer and fewer at a time, as long as daemon and model still differ.
fn shrink<S: Subject>(plan: &Plan, mut events: Vec<Event>, start: &impl Fn() -> Result<S>) -> anyhow::Error {
    let end = Instant::now() + SHRINK;
    let plan = Plan { seeded: Vec::new(), ..plan.clone() };
    let mut found = None;
    let mut chunk = events.len().div_ceil(2);
    while chunk > 0 && Instant::now() < end {
        let mut at = 0;
        while at < events.len() && Instant::now() < end {
            let mut fewer = events.clone();
            fewer.drain(at..(at + chunk).min(events.len()));
            match replay(&plan, &fewer, start) {
                Some((error, used)) => {
                    fewer.truncate(used);
                    events = fewer;
                    found = Some(error);
                }
                None => at += chunk,
            }
        }
        chunk = if chunk == 1 { 0 } else { chunk.div_ceil(2) };
    }
    let steps: Vec<String> = events.iter().rev().take(40).rev().map(|event| format!("{event:?}")).collect();
    let count = events.len();
    let text = format!("{count} steps of it are enough; the last of them:\n{}", steps.join("\n"));
    found.unwrap_or_else(|| anyhow::anyhow!("it did not happen again")).context(text)
}

/// The difference that these steps lead to, if any, and how many of them it takes.
fn replay<S: Subject>(
    plan: &Plan,
    events: &[Event],
    start: &impl Fn() -> Result<S>,
) -> Option<(anyhow::Error, usize)> {
    let mut subject = start().ok()?;
    let mut beside = beside(&mut subject, plan).ok()?;
    for (at, event) in events.iter().enumerate() {
        if matches!(event, Event::Step(step) if beside.world.leaves_open(step)) {
            continue;
        }
        if let Err(error) = beside.event(event) {
            return Some((error, at + 1));
        }
    }
    None
}

impl Summary {
    /// The calls of which there were fewer than a fiftieth.
    pub fn rare(&self) -> BTreeSet<&'static str> {
        let all: u64 = self.calls.values().sum();
        let methods = super::call::DEAL.into_iter();
        methods.filter(|method| self.calls.get(method).copied().unwrap_or_default() * 50 < all).collect()
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all: u64 = self.calls.values().sum();
        let seconds = self.elapsed.as_secs_f64();
        writeln!(
            f,
            "{all} calls in {seconds:.1} s, {:.0} a second; {} collections, {} kills",
            all as f64 / seconds,
            self.collections,
            self.kills
        )?;
        let percent = |count: &u64| 100.0 * *count as f64 / all as f64;
        let calls: Vec<String> =
            self.calls.iter().map(|(name, count)| format!("{name} {:.1}", percent(count))).collect();
        writeln!(f, "percent: {}", calls.join(", "))?;
        let refused: Vec<String> =
            self.refused.iter().map(|(code, count)| format!("{code} {count}")).collect();
        write!(f, "refused: {}", refused.join(", "))?;
        if self.caught.is_empty() {
            return Ok(());
        }
        let caught: Vec<String> = self.caught.iter().map(|(rule, step)| format!("{rule:?} {step}")).collect();
        write!(f, "\n{} seeded bugs found, at step: {}", caught.len(), caught.join(", "))
    }
}
