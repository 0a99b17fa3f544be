//! When garbage is collected, as configured, and that calls go on meanwhile.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use davit_integration::ctr::Ctr;
use davit_integration::model::call::{Action, Call, Labels, Message, NewSnapshot, SnapshotKey, Step};
use davit_integration::model::filter::Filters;
use davit_integration::model::wire::Wire;
use davit_integration::model::world::digest_of;
use davit_integration::{Daemon, wait};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::root;

/// A daemon with this `[metadata.gc]`, and a connection to it.
struct Fixture {
    daemon: Daemon,
    wire: Wire,
    runtime: Runtime,
}

/// A day: longer than any test.
const NEVER: u64 = 86_400_000;

fn config(gc: &str) -> String {
    format!("[metadata.gc]\n{gc}\n")
}

impl Fixture {
    fn start(config: &str) -> Result<Fixture> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let daemon = Daemon::start_with(&[], config)?;
        let wire = runtime.block_on(Wire::connect(&daemon.address()))?;
        Ok(Fixture { daemon, wire, runtime })
    }

    /// Starts the daemon again with another configuration.
    fn restart(&mut self, config: &str) -> Result<()> {
        self.daemon.stop(Signal::SIGKILL)?;
        fs::write(self.daemon.path("config.toml"), config)?;
        self.daemon.restart()?;
        self.wire = self.runtime.block_on(Wire::connect(&self.daemon.address()))?;
        Ok(())
    }

    fn call(&self, lease: Option<&str>, call: Call) -> Result<Value> {
        self.runtime.block_on(answer(&self.wire, lease, call))
    }

    /// The number of blobs that the namespace has.
    fn blobs(&self) -> Result<usize> {
        let list = self.call(None, Call::ListContent { filters: Filters::default() })?;
        Ok(list.as_array().map_or(0, Vec::len))
    }

    fn wait_for(&self, blobs: usize) -> Result<()> {
        wait::until("the collector has come", || (self.blobs().ok()? == blobs).then_some(()))
            .with_context(|| format!("{:?} blobs", self.blobs()))
    }
}

async fn answer(wire: &Wire, lease: Option<&str>, call: Call) -> Result<Value> {
    let text = format!("{call:?}");
    let step = Step { namespace: Some("gc".into()), lease: lease.map(str::to_owned), call };
    wire.answer(&step).await.context(text)
}

/// A blob that nothing keeps, unless the call has a lease.
fn blob(number: usize) -> Call {
    let data = number.to_string().into_bytes();
    let message = Message { action: Action::Commit, data, ..Message::default() };
    Call::Write { reference: format!("ref-{number}"), messages: vec![message], second: false }
}

fn lease(id: usize) -> Call {
    Call::CreateLease { id: format!("lease-{id}"), labels: Labels::new() }
}

fn delete(id: usize, sync: bool) -> Call {
    Call::DeleteLease { id: format!("lease-{id}"), sync }
}

#[test]
fn a_removal_is_followed_by_a_collection() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let fixture = Fixture::start("")?;
    fixture.call(None, lease(0))?;
    fixture.call(Some("lease-0"), blob(1))?;
    ensure!(fixture.blobs()? == 1);
    fixture.call(None, delete(0, false))?;
    fixture.wait_for(0)
}

#[test]
fn so_many_removals_are_waited_for() -> Result<()> {
    if !root() {
        return Ok(());
    }
    // After the first collection the next rests a day, so small is the share of time; only the number can make one due.
    let gc = "pause_threshold = 1e-9\nmutation_threshold = 0\ndeletion_threshold = 20\nstartup_delay_ms = 0";
    let fixture = Fixture::start(&config(gc))?;
    fixture.call(None, lease(99))?;
    fixture.call(None, delete(99, true))?;
    fixture.call(None, blob(1))?;
    for id in 0..20 {
        ensure!(fixture.blobs()? == 1, "collected after {id} removals");
        fixture.call(None, lease(id))?;
        fixture.call(None, delete(id, false))?;
    }
    fixture.wait_for(0)
}

#[test]
fn so_many_changes_are_waited_for() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let gc = "pause_threshold = 0.0\nmutation_threshold = 50\nstartup_delay_ms = 0";
    let fixture = Fixture::start(&config(gc))?;
    fixture.call(None, lease(99))?;
    fixture.call(None, delete(99, true))?;
    // A blob is one change, or a few.
    fixture.call(None, blob(1))?;
    for id in 0..40 {
        fixture.call(None, lease(id))?;
        ensure!(fixture.blobs()? == 1, "collected after {id} changes");
    }
    for id in 40..60 {
        fixture.call(None, lease(id))?;
    }
    fixture.wait_for(0)
}

#[test]
fn the_delays_are_kept() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let delay = Duration::from_millis(700);
    let gc = |startup: u64| {
        let millis = delay.as_millis();
        let rest = "pause_threshold = 1e-9\nmutation_threshold = 0";
        config(&format!("{rest}\nschedule_delay_ms = {millis}\nstartup_delay_ms = {startup}"))
    };
    let mut fixture = Fixture::start(&gc(NEVER))?;
    fixture.call(None, blob(1))?;
    fixture.call(None, lease(0))?;
    let begun = Instant::now();
    fixture.call(None, delete(0, true))?;
    let took = begun.elapsed();
    ensure!(took >= delay, "collected after {took:?}");
    ensure!(fixture.blobs()? == 0);
    // What is left over is for the first collection of the next daemon, and that comes when it is to.
    fixture.call(None, blob(2))?;
    fixture.restart(&gc(NEVER))?;
    for id in 0..10 {
        fixture.call(None, lease(id))?;
    }
    ensure!(fixture.blobs()? == 1, "collected before its time");
    fixture.restart(&gc(50))?;
    fixture.wait_for(0)
}

/// The last of a collection is the backends. One of them is a snapshotter in another process here, which stands still.
#[test]
fn calls_go_on_during_a_collection() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plugin = Daemon::start()?;
    // A plugin with the name of a snapshotter takes its place.
    let config = format!(
        "version = 2\n[proxy_plugins.native]\ntype = \
         \"snapshot\"\naddress = {:?}\n[plugins.\"io.containerd.gc.v1.scheduler\"]\npause_threshold = \
         0.000000001\nmutation_threshold = 0\nstartup_delay = \"24h\"\n",
        plugin.address()
    );
    let fixture = Fixture::start(&config)?;
    let new = |key: &str, snapshotter: &str| {
        let at = SnapshotKey { snapshotter: snapshotter.into(), key: key.into() };
        NewSnapshot { at, parent: String::new(), labels: Labels::new() }
    };
    fixture.call(None, lease(0))?;
    fixture.call(Some("lease-0"), Call::Prepare(new("garbage", "native")))?;
    fixture.call(Some("lease-0"), blob(1))?;
    let ctr = Ctr::new(&plugin.address(), "gc");
    let there = || anyhow::Ok(ctr.run("snapshots --snapshotter native ls")?.contains("garbage"));
    ensure!(there()?, "the snapshotter has no snapshot");

    /// What a collection gives the plugins; then it goes on without them.
    const PATIENCE: Duration = Duration::from_secs(5);
    plugin.signal(Signal::SIGSTOP)?;
    let begun = Instant::now();
    let wire = fixture.wire.clone();
    let collecting = fixture.runtime.spawn(async move { answer(&wire, None, delete(0, true)).await });
    // The records are gone, the snapshotter does not answer: the collection is in its middle.
    fixture.wait_for(0)?;
    // On a machine that is so slow it has gone on already.
    let goes_on = || !collecting.is_finished() || begun.elapsed() >= PATIENCE;
    ensure!(goes_on(), "a collection is over although a snapshotter does not answer");

    let target = json!({ "digest": digest_of(b"2"), "size": 1, "mediatype": "application/x" });
    let image = json!({ "name": "image", "labels": {}, "target": target, "annotations": {} });
    let container = json!({
        "id": "container", "labels": {}, "image": "image", "runtime": { "name": "r", "options": null }, "spec": "s {}",
        "snapshotter": "overlayfs", "snapshotkey": "own", "extensions": {}, "sandbox": "",
    });
    let all = Filters::default;
    for call in [
        lease(1),
        blob(2),
        Call::Read { digest: digest_of(b"2"), offset: 0, size: 0 },
        Call::CreateImage { record: image },
        Call::CreateContainer { record: container },
        Call::Prepare(new("own", "overlayfs")),
        Call::Commit { new: new("layer", "overlayfs"), from: "own".into() },
        Call::ListImages { filters: all() },
        Call::ListContainers { filters: all() },
        Call::ListLeases { filters: all() },
        Call::ListSnapshots { snapshotter: "overlayfs".into(), filters: all() },
        delete(1, false),
        Call::DeleteContainer { id: "container".into() },
    ] {
        fixture.call(Some("lease-1").filter(|_| matches!(call, Call::Prepare(_))), call)?;
    }
    ensure!(goes_on(), "the collection was over before the calls were");

    plugin.signal(Signal::SIGCONT)?;
    fixture.runtime.block_on(collecting)??;
    wait::until("the snapshotter has removed it", || (!there().ok()?).then_some(()))?;
    ensure!(fixture.blobs()? == 1, "the image's blob");
    Ok(())
}
