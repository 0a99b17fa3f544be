//! The history of events: nothing that shims report is missing in it or in it twice, however often the daemon dies.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use davit_integration::client::{Client, connect};
use davit_integration::{Daemon, daemon, image, lifecycle, ttrpc, wait};
use davit_proto::any::pack;
use davit_proto::containerd::events::TaskExit;
use davit_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient as Publisher;
use davit_proto::containerd::services::events::v1::{PublishRequest, SubscribeRequest};
use davit_proto::containerd::types::Envelope;
use davit_proto::davit::services::events::v1::entry::What;
use davit_proto::davit::services::events::v1::events_client::EventsClient;
use davit_proto::davit::services::events::v1::{
    Entry, FollowRequest, ListRequest, follow_request, list_request,
};
use nix::sys::signal::{Signal, kill};
use prost::Message;
use tokio::time::timeout;
use tonic::Request;

use crate::root;

/// The folder of the history below the daemon's root.
const FOLDER: &str = "root/io.davit.events.v1";

const EXITS: &str = "topic==\"/tasks/exit\"";

/// The exit that an entry tells of.
fn exit(entry: &Entry) -> Option<TaskExit> {
    let Some(What::Event(event)) = &entry.what else { return None };
    let event = event.envelope.as_ref()?.event.as_ref()?;
    TaskExit::decode(event.value.as_slice()).ok()
}

/// The entries behind a cursor that match a filter.
async fn list(daemon: &Daemon, after: u64, filter: &str) -> Result<Vec<Entry>> {
    let mut client = EventsClient::new(connect(&daemon.address()).await?).max_decoding_message_size(16 << 20);
    let since = Some(list_request::Since::Cursor(after));
    let filters = vec![filter.to_owned()];
    let request = ListRequest { since, until: None, filters, limit: 0 };
    let mut stream = client.list(request).await?.into_inner();
    let mut entries = Vec::new();
    while let Some(entry) = timeout(wait::PATIENCE, stream.message()).await?? {
        ensure!(entries.last().is_none_or(|last: &Entry| last.cursor < entry.cursor), "cursors do not rise");
        entries.push(entry);
    }
    Ok(entries)
}

/// A client that follows the exits of a daemon, and comes back with its last cursor each time that the daemon has died.
#[derive(Clone)]
struct Follower {
    address: PathBuf,
    seen: Arc<Mutex<Vec<Entry>>>,
}

impl Follower {
    fn start(daemon: &Daemon) -> Follower {
        let follower = Follower { address: daemon.address(), seen: Arc::default() };
        tokio::spawn(follower.clone().run());
        follower
    }

    async fn run(self) {
        loop {
            // The daemon is away, or has just died: both are no news.
            let _ = self.follow().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn follow(&self) -> Result<()> {
        let mut client = EventsClient::new(connect(&self.address).await?);
        let after = self.seen().last().map_or(0, |entry| entry.cursor);
        let since = Some(follow_request::Since::Cursor(after));
        let filters = vec![EXITS.to_owned()];
        let mut stream = client.follow(FollowRequest { since, filters }).await?.into_inner();
        while let Some(entry) = stream.message().await? {
            self.seen().push(entry);
        }
        Ok(())
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Vec<Entry>> {
        self.seen.lock().expect("nobody panics with it")
    }
}

#[test]
fn every_exit_is_there_once_however_often_the_daemon_dies() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(storm(&mut daemon))
}

async fn storm(daemon: &mut Daemon) -> Result<()> {
    const ROUNDS: u32 = 10;
    const CONTAINERS: u32 = 20;
    let parent = image::digest(&image::busybox_layer()?);
    let follower = Follower::start(daemon);
    let status = |number: u32| number % 100 + 1;
    for round in 0..ROUNDS {
        let client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        let numbers: Vec<u32> = (round * CONTAINERS..(round + 1) * CONTAINERS).collect();
        let starts = numbers.chunks(5).map(|numbers| {
            let (mut client, parent, numbers) = (client.clone(), parent.clone(), numbers.to_vec());
            tokio::spawn(async move {
                for number in numbers {
                    // Some end before the death, some while no daemon is there, some under the next.
                    let sleep = 100_000 + number * 37 % 8 * 60_000;
                    let script = format!("usleep {sleep}; exit {}", status(number));
                    client.start(&format!("c{number}"), &parent, &["sh", "-c", &script]).await?;
                }
                anyhow::Ok(())
            })
        });
        for start in starts.collect::<Vec<_>>() {
            start.await??;
        }
        daemon.stop(Signal::SIGKILL)?;
        daemon.restart()?;
        let client = Client::new(&daemon.address(), &daemon.namespace()).await?;
        let ends = numbers.chunks(5).map(|numbers| {
            let (mut client, numbers) = (client.clone(), numbers.to_vec());
            tokio::spawn(async move {
                for number in numbers {
                    let ended = client.finish(&format!("c{number}")).await?;
                    ensure!(ended == status(number), "c{number} ended with {ended}");
                }
                Ok(())
            })
        });
        for end in ends.collect::<Vec<_>>() {
            end.await??;
        }
    }
    let expected: BTreeMap<String, u32> =
        (0..ROUNDS * CONTAINERS).map(|number| (format!("c{number}"), status(number))).collect();
    let check = |entries: &[Entry]| -> Result<()> {
        let mut seen = BTreeMap::new();
        for exit in entries.iter().filter_map(exit) {
            let before = seen.insert(exit.container_id.clone(), exit.exit_status);
            ensure!(before.is_none(), "the exit of {} is there twice", exit.container_id);
        }
        let missing: Vec<_> = expected.iter().filter(|(id, _)| !seen.contains_key(*id)).collect();
        ensure!(missing.is_empty(), "missing: {missing:?}");
        ensure!(seen == expected);
        Ok(())
    };
    let kept = list(daemon, 0, EXITS).await?;
    check(&kept).context("in the history")?;
    let all = kept.len();
    wait::until("the follower has all", || (follower.seen().len() >= all).then_some(()))?;
    let followed = follower.seen().clone();
    check(&followed).context("with a follower")?;
    ensure!(followed == kept, "the follower has seen something else");
    Ok(())
}

/// Tells the daemon of an event as a shim does, and waits for its answer.
fn forward(daemon: &Daemon, envelope: &Envelope) -> Result<()> {
    let socket = PathBuf::from(format!("{}.ttrpc", daemon.address().display()));
    let mut shim = ttrpc::Client::connect(&socket, &daemon.namespace())?;
    let request = ForwardRequest { envelope: Some(envelope.clone()) };
    shim.call("containerd.services.events.ttrpc.v1.Events", "Forward", &request)
}

#[test]
fn an_event_whose_answer_was_lost_is_kept_once_and_told() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let exit = TaskExit { container_id: "x".into(), id: "x".into(), pid: 7, exit_status: 3, exited_at: None };
    let envelope = Envelope {
        timestamp: Some(SystemTime::now().into()),
        namespace: daemon.namespace(),
        topic: "/tasks/exit".into(),
        event: Some(pack(&exit)),
    };
    forward(&daemon, &envelope)?;
    // As soon as it is answered it survives a kill -9; had the kill been sooner, the shim would not know.
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    runtime.block_on(async {
        let mut events = Publisher::new(connect(&daemon.address()).await?);
        let filters = vec![EXITS.to_owned()];
        let mut live = events.subscribe(SubscribeRequest { filters }).await?.into_inner();
        forward(&daemon, &envelope)?;
        forward(&daemon, &envelope)?;
        let told = timeout(wait::PATIENCE, live.message()).await??;
        ensure!(told.as_ref() == Some(&envelope), "{told:?}");
        let last = Envelope { timestamp: Some(SystemTime::now().into()), ..envelope.clone() };
        let other = TaskExit { pid: 8, ..exit };
        forward(&daemon, &Envelope { event: Some(pack(&other)), ..last })?;
        let told = timeout(wait::PATIENCE, live.message()).await??.and_then(|told| told.event);
        ensure!(told == Some(pack(&other)), "told twice on one connection: {told:?}");
        let kept: Vec<_> =
            list(&daemon, 0, EXITS).await?.iter().filter_map(self::exit).map(|exit| exit.pid).collect();
        ensure!(kept == [7, 8], "{kept:?}");
        Ok(())
    })
}

#[test]
fn the_past_is_shown_with_the_cause_of_an_exit() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let run = |args: &[&str]| daemon::ok(daemon.davit(args)?);
    run(&["run", "--name", "short", "--rm", "busybox", "true"])?;
    let id = run(&["run", "-d", "--name", "long", "busybox", "sleep", "1000"])?.trim().to_owned();
    let shims = lifecycle::shims(&daemon.namespace(), &id);
    ensure!(shims.len() == 1, "the shims of {id}: {shims:?}");
    kill(shims[0], Signal::SIGKILL)?;
    let past = |daemon: &Daemon, more: &[&str]| -> Result<Vec<String>> {
        let args = ["events", "--since", "1h", "--until", "0s", "-f", "event=die"];
        let text = daemon::ok(daemon.davit(args.iter().chain(more))?)?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    wait::until("the death is reported", || {
        let lines = past(&daemon, &[]).ok()?;
        (lines.len() == 2).then_some(())
    })?;
    daemon.stop(Signal::SIGKILL)?;
    daemon.restart()?;
    let lines = past(&daemon, &[])?;
    ensure!(lines.len() == 2 && lines[0].ends_with("exit_status=0"), "{lines:?}");
    ensure!(lines[1].ends_with("exit_status=137 cause=shim-killed"), "{lines:?}");
    ensure!(lines[1].contains(&id));
    ensure!(past(&daemon, &["-f", "container=long"])? == lines[1..]);
    ensure!(past(&daemon, &["-f", &format!("container={}", &id[..12])])? == lines[1..]);
    ensure!(past(&daemon, &["-f", "cause=shim-killed"])? == lines[1..]);
    let json = past(&daemon, &["--format", "json"])?;
    let first: serde_json::Value = serde_json::from_str(&json[0])?;
    let since = format!("cursor:{}", first["cursor"]);
    let args = ["events", "--since", &since, "--until", "0s", "-f", "event=die", "--format", "json"];
    ensure!(daemon::ok(daemon.davit(args)?)?.lines().collect::<Vec<_>>() == json[1..]);
    // Its task is gone with its shim, and nobody has written down how it ended.
    let listed = daemon::ok(daemon.davit(["ps", "-a"])?)?;
    ensure!(listed.contains("Exited (137)") && !listed.contains("Created "), "{listed}");
    daemon::ok(daemon.davit(["rm", "-f", "long"])?)?;
    Ok(())
}

#[test]
fn who_follows_waits_for_the_daemon_and_goes_on() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut davit =
        daemon.davit_command(["events", "-f", "topic~=^/test/"]).stdout(Stdio::piped()).spawn()?;
    let (line, lines) = std::sync::mpsc::channel();
    let stdout = BufReader::new(davit.stdout.take().context("no output")?);
    let reading =
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
    let mut number = 0;
    let mut publish = |daemon: &Daemon| {
        number += 1;
        let event = Some(prost_types::Any { type_url: format!("n{number}"), value: Vec::new() });
        let mut request = Request::new(PublishRequest { topic: "/test/follow".into(), event });
        runtime.block_on(async {
            request.metadata_mut().insert("containerd-namespace", daemon.namespace().parse()?);
            Publisher::new(connect(&daemon.address()).await?).publish(request).await?;
            anyhow::Ok(number)
        })
    };
    // Until it listens.
    let mut last = wait::until("the first event", || {
        let number = publish(&daemon).ok()?;
        let soon = || lines.recv_timeout(Duration::from_millis(200)).ok();
        std::iter::from_fn(soon).any(|text| text.ends_with(&format!("type=n{number}"))).then_some(number)
    })?;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        daemon.stop(signal)?;
        daemon.restart()?;
        let number = publish(&daemon)?;
        ensure!(number == last + 1);
        last = number;
        let text = lines.recv_timeout(wait::PATIENCE)?;
        ensure!(text.ends_with(&format!("type=n{number}")), "{text}, not {number}");
    }
    davit.kill()?;
    davit.wait()?;
    let _ = reading.join();
    ensure!(lines.try_recv().is_err(), "something is told twice");
    Ok(())
}

#[test]
fn the_history_is_bounded() -> Result<()> {
    const BOUND: u64 = 64 << 20;
    const EVENTS: usize = 30;
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut events = Publisher::new(connect(&daemon.address()).await?);
        let mut last = 0;
        for number in 0..EVENTS {
            let mut value = vec![0; 3 << 20];
            value[0] = number as u8;
            let event = Some(prost_types::Any { type_url: "x".into(), value });
            let mut request = Request::new(PublishRequest { topic: "/test/bound".into(), event });
            request.metadata_mut().insert("containerd-namespace", daemon.namespace().parse()?);
            events.publish(request).await?;
            // So that the writer keeps up: what waits for it is bounded, too.
            let newest = list(&daemon, last, "topic~=^/test/bound").await?;
            last = newest.last().context("an event that is published is listed")?.cursor;
            let files = fs::read_dir(daemon.path(FOLDER))?.flatten();
            let total: u64 = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
            ensure!(total <= BOUND, "{total} bytes");
        }
        let kept = list(&daemon, 0, "topic~=^/test/bound").await?;
        let number = |entry: &Entry| match &entry.what {
            Some(What::Event(event)) => event
                .envelope
                .as_ref()
                .and_then(|envelope| envelope.event.as_ref())
                .map(|event| event.value[0]),
            _ => None,
        };
        let kept: Vec<_> = kept.iter().filter_map(number).map(usize::from).collect();
        ensure!(kept.len() >= 15 && kept == (EVENTS - kept.len()..EVENTS).collect::<Vec<_>>(), "{kept:?}");
        Ok(())
    })
}
