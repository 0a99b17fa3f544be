//! Carries out the same calls on two daemons at once: ours and containerd.
//!
//! Each has its model, which lacks the rules that it lacks. A call that the models would answer differently, or that would
//! leave them different, is one of the known differences: it is counted by its method and left out. All others both daemons
//! must answer alike, and in the end have the same on disk.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::Code;

use super::Subject;
use super::call::{Call, Labels, NewSnapshot, SnapshotKey, Step};
use super::draw::Draw;
use super::filter::Filters;
use super::rule::Rule;
use super::wire::Wire;
use super::world::{SNAPSHOTTERS, World};

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Calls that both were asked.
    pub calls: u64,
    /// Collections that both were asked for.
    pub collections: u64,
    /// Calls that are known to be answered differently, by their method.
    pub known: BTreeMap<&'static str, u64>,
}

/// A daemon, a connection to it, and its model.
struct Side<'a> {
    subject: &'a dyn Subject,
    wire: Wire,
    world: World,
}

/// Two daemons.
pub struct Together<'a> {
    runtime: Runtime,
    ours: Side<'a>,
    peer: Side<'a>,
    /// What was done.
    pub summary: Summary,
}

impl<'a> Together<'a> {
    /// Both daemons, of which the peer lacks some rules.
    ///
    /// # Errors
    /// One of them does not answer.
    pub fn new(ours: &'a dyn Subject, peer: &'a dyn Subject, lacking: &[Rule]) -> Result<Together<'a>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let side = |subject: &'a dyn Subject, rules: &[Rule]| {
            let wire = runtime.block_on(Wire::connect(&subject.address()))?;
            anyhow::Ok(Side { subject, wire, world: World::new(rules.iter().copied()) })
        };
        let (ours, peer) = (side(ours, &[])?, side(peer, lacking)?);
        Ok(Together { runtime, ours, peer, summary: Summary::default() })
    }

    /// Draws calls from a seed until so many were carried out, then compares all that is left.
    ///
    /// # Errors
    /// The daemons differ.
    pub fn draw(&mut self, seed: u64, steps: u64, lacking: &[Rule]) -> Result<()> {
        let mut draw = Draw::avoiding(seed, lacking);
        while self.summary.calls < steps {
            let step = draw.step(&self.ours.world);
            self.step(&step)?;
        }
        self.sweep()?;
        self.compare()
    }

    /// A call on both, unless they are known to differ in it. True if both did what was asked.
    ///
    /// # Errors
    /// They answer differently.
    pub fn step(&mut self, step: &Step) -> Result<bool> {
        let (mut ours, mut peer) = (self.ours.world.clone(), self.peer.world.clone());
        let same = ours.answer(step) == peer.answer(step) && ours.is_like(&peer);
        if !self.peer.subject.serves(&step.call) || self.peer.world.leaves_open(step) || !same {
            *self.summary.known.entry(step.call.method()).or_default() += 1;
            return Ok(false);
        }
        (self.ours.world, self.peer.world) = (ours, peer);
        let found = self.ask(&self.ours, step);
        let wanted = self.ask(&self.peer, step);
        ensure!(found == wanted, "{step:?}\nours answers     {found:?}\ncontainerd does  {wanted:?}");
        self.summary.calls += 1;
        if found.is_ok() && step.call.collects() {
            self.summary.collections += 1;
            self.compare()?;
        }
        Ok(found.is_ok())
    }

    fn ask(&self, side: &Side<'_>, step: &Step) -> Result<Value, Code> {
        self.runtime.block_on(side.wire.answer(step)).map_err(|status| side.subject.code(&status))
    }

    /// Compares all lists.
    fn compare(&self) -> Result<()> {
        let none = Filters::default;
        for namespace in self.ours.world.namespaces() {
            let mut calls = vec![
                Call::ListContainers { filters: none() },
                Call::ListImages { filters: none() },
                Call::ListContent { filters: none() },
                Call::ListStatuses { filters: none() },
                Call::ListLeases { filters: none() },
            ];
            calls.extend(
                SNAPSHOTTERS.map(|name| Call::ListSnapshots { snapshotter: name.into(), filters: none() }),
            );
            for call in calls {
                let step = Step { namespace: Some(namespace.clone()), lease: None, call };
                let (found, wanted) = (self.ask(&self.ours, &step), self.ask(&self.peer, &step));
                ensure!(found == wanted, "{step:?}\nours has {found:?}\ncontainerd has {wanted:?}");
            }
        }
        Ok(())
    }

    /// Compares what is on disk, after a collection before which everything was touched: containerd sweeps nothing else.
    ///
    /// # Errors
    /// One of them has something that the other has not.
    pub fn sweep(&mut self) -> Result<()> {
        let call = |call| Step { namespace: Some("sweep".to_owned()), lease: None, call };
        let blob = super::world::digest_of(b"sweep");
        let message = super::call::Message {
            action: super::call::Action::Commit,
            data: b"sweep".to_vec(),
            ..Default::default()
        };
        self.step(&call(Call::Write { reference: "sweep".into(), messages: vec![message], second: false }))?;
        self.step(&call(Call::DeleteContent { digest: blob }))?;
        for snapshotter in SNAPSHOTTERS.map(str::to_owned) {
            let at = SnapshotKey { snapshotter, key: "sweep".into() };
            let new = NewSnapshot { at: at.clone(), parent: String::new(), labels: Labels::new() };
            self.step(&call(Call::Prepare(new)))?;
            self.step(&call(Call::Remove(at)))?;
        }
        self.step(&call(Call::CreateLease { id: "sweep".into(), labels: Labels::new() }))?;
        let collected = self.step(&call(Call::DeleteLease { id: "sweep".into(), sync: true }))?;
        ensure!(collected, "the daemons are known to differ in what a collection leaves");
        let (found, wanted) = (self.ours.subject.blobs()?, self.peer.subject.blobs()?);
        ensure!(found == wanted, "on our disk are {found:?}, on containerd's {wanted:?}");
        ensure!(
            found == self.ours.world.blobs(),
            "on disk are {found:?}, needed {:?}",
            self.ours.world.blobs()
        );
        for Side { subject, world, .. } in [&self.ours, &self.peer] {
            let ingests = (subject.ingests()?, world.ingests());
            ensure!(ingests.0 == ingests.1, "on disk are {} ingests, needed {}", ingests.0, ingests.1);
            for name in SNAPSHOTTERS {
                let (found, wanted) =
                    (subject.snapshots(name)?, world.snapshots(name, subject.views_have_folders(name)));
                ensure!(found == wanted, "on disk are {found} of {name}, needed {wanted}");
            }
        }
        Ok(())
    }
}
