//! What shims report: taken in once, in order, and from nobody else.

use std::path::Path;
use std::time::{Duration, SystemTime};

use davit_model::{ErrorCode, error::chain};
use davit_proto::any;
use davit_proto::containerd::events::{TaskExit, TaskStart};
use davit_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use davit_proto::containerd::types::Envelope;
use davit_shim_protocol::client::{CallError, Client, Target};
use nix::sys::signal::{Signal, kill};

use crate::life::with;
use crate::world::{Daemon, World, alive, eventually_equal, own_shim};

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";

fn daemon() -> (World, Daemon) {
    let world = World::new(Path::new("/nonexistent"));
    let daemon = world.daemon();
    (world, daemon)
}

pub fn connect(world: &World, daemon: &Daemon) -> Client {
    let socket = world.config().ttrpc_address;
    daemon.block_on(Client::connect(Path::new(&socket))).unwrap()
}

pub fn forward(daemon: &Daemon, client: &Client, envelope: Option<Envelope>) -> Result<(), CallError> {
    let target =
        Target { service: SERVICE, method: "Forward", namespace: "n", limit: Some(Duration::from_secs(20)) };
    daemon.block_on(client.call(target, &ForwardRequest { envelope }))
}

pub fn envelope(topic: &str, event: prost_types::Any) -> Envelope {
    let timestamp = Some(SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_890_123_456_789));
    Envelope {
        timestamp: timestamp.map(prost_types::Timestamp::from),
        namespace: "n".into(),
        topic: topic.into(),
        event: Some(event),
    }
}

fn exit(id: &str, pid: u32, seconds: i64) -> TaskExit {
    TaskExit {
        container_id: "c".into(),
        id: id.into(),
        pid,
        exit_status: 1,
        exited_at: Some(prost_types::Timestamp { seconds, nanos: 5 }),
    }
}

#[test]
fn events_are_passed_on_byte_for_byte_and_in_order() {
    let (world, daemon) = daemon();
    let client = connect(&world, &daemon);
    // A field of a later release, and a type that is not known at all.
    let mut start = any::pack(&TaskStart { container_id: "c".into(), pid: 7 });
    start.value.extend_from_slice(&[0xfa, 0x7, 1, b'x']);
    let other = prost_types::Any { type_url: "kata.Event".into(), value: vec![0xff, 0, 1] };
    for (topic, event) in [("/tasks/start", &start), ("/kata/event", &other)] {
        forward(&daemon, &client, Some(envelope(topic, event.clone()))).unwrap();
    }
    let events = daemon.events();
    let seen: Vec<_> = events.iter().map(|event| (event.topic.as_str(), &event.event.value)).collect();
    assert_eq!(seen, [("/tasks/start", &start.value), ("/kata/event", &other.value)]);
    assert_eq!((events[0].namespace.as_str(), events[1].event.type_url.as_str()), ("n", "kata.Event"));
    let since = events[0].timestamp.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(since.as_nanos(), 1_234_567_890_123_456_789);
}

#[test]
fn an_exit_that_is_reported_again_is_acknowledged_and_dropped() {
    let (world, daemon) = daemon();
    let client = connect(&world, &daemon);
    let exits = [
        exit("c", 7, 100),
        exit("c", 7, 100),
        // The same process number, later.
        exit("c", 7, 101),
        exit("e", 7, 100),
        exit("c", 8, 100),
        exit("e", 7, 100),
    ];
    for exit in &exits {
        forward(&daemon, &client, Some(envelope("/tasks/exit", any::pack(exit)))).unwrap();
    }
    // A shim that reconnects may repeat, too.
    let client = connect(&world, &daemon);
    forward(&daemon, &client, Some(envelope("/tasks/exit", any::pack(&exits[0])))).unwrap();
    assert_eq!(daemon.events().len(), 4);
}

#[test]
fn what_is_no_event_is_refused() {
    let (world, daemon) = daemon();
    let client = connect(&world, &daemon);
    let event = any::pack(&exit("c", 7, 100));
    let mut bad = vec![None];
    for topic in ["", "tasks/exit", "/", "/a b"] {
        bad.push(Some(envelope(topic, event.clone())));
    }
    let broken = prost_types::Any { type_url: event.type_url.clone(), value: vec![0xff] };
    bad.push(Some(envelope("/tasks/exit", broken)));
    let mut outside = envelope("/tasks/exit", event.clone());
    outside.namespace = "../..".into();
    bad.push(Some(outside));
    for envelope in bad {
        match forward(&daemon, &client, envelope) {
            Err(CallError::Refused { error }) => assert_eq!(error.code, ErrorCode::InvalidArgument),
            other => panic!("{other:?}"),
        }
    }
    for (service, method) in [("x.Y", "Forward"), (SERVICE, "Publish")] {
        let target = Target { service, method, namespace: "n", limit: None };
        match daemon.block_on(client.call::<()>(target, &())) {
            Err(CallError::Refused { error }) => {
                assert_eq!(error.code, ErrorCode::Unimplemented, "{}", chain(&error));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(daemon.events().is_empty());
    forward(&daemon, &client, Some(envelope("/tasks/exit", event))).unwrap();
    assert_eq!(daemon.events().len(), 1);
}

#[test]
fn an_exit_while_no_daemon_runs_is_told_to_the_next() {
    with(own_shim(), |world| {
        let daemon = world.daemon();
        let script = "while ! cat /go 2>/dev/null; do sleep 0.02; done; exit 7";
        let pid = daemon.run(world.container("one", script));
        drop(daemon);
        std::fs::write(world.path("busybox/go"), "").unwrap();
        eventually_equal(&false, || alive(pid));
        let daemon = world.next_daemon();
        eventually_equal(&vec![("one".to_owned(), 7)], || daemon.exits("one"));
        assert_eq!(daemon.delete("one").unwrap(), 7);
        eventually_equal(&1, || daemon.deletions("one"));
        assert_eq!(daemon.exits("one").len(), 1);
        world.assert_nothing_left();
    });
}

#[test]
fn the_journal_of_a_dead_shim_tells_how_its_container_ended() {
    with(own_shim(), |world| {
        let daemon = world.daemon();
        let script = "while ! cat /go 2>/dev/null; do sleep 0.02; done; exit 7";
        let pid = daemon.run(world.container("one", script));
        drop(daemon);
        std::fs::write(world.path("busybox/go"), "").unwrap();
        eventually_equal(&false, || alive(pid));
        // The shim has reaped it, and so recorded it.
        eventually_equal(&false, || Path::new(&format!("/proc/{pid}")).exists());
        let journal = world.bundle("one").join("journal");
        eventually_equal(&true, || {
            davit_shim_protocol::journal::read(&journal)
                .is_ok_and(|journal| journal.exits.contains_key("one"))
        });
        kill(world.shim_of("one"), Signal::SIGKILL).unwrap();
        eventually_equal(&0, || world.shims().len());
        let daemon = world.next_daemon();
        eventually_equal(&1, || daemon.deletions("one"));
        assert_eq!(daemon.exits("one"), [("one".to_owned(), 7)]);
        world.assert_nothing_left();
    });
}

#[test]
fn no_exit_is_lost_however_often_the_daemon_dies() {
    const CONTAINERS: u32 = 16;
    const DEATHS: u32 = 8;
    with(own_shim(), |world| {
        let mut daemon = world.daemon();
        for number in 0..CONTAINERS {
            let script = format!("while ! cat /go{number} 2>/dev/null; do sleep 0.01; done; exit {number}");
            daemon.run(world.container(&format!("c{number}"), &script));
        }
        let mut seen = Vec::new();
        for death in 0..DEATHS {
            for number in (0..CONTAINERS).filter(|number| number % DEATHS == death) {
                std::fs::write(world.path(&format!("busybox/go{number}")), "").unwrap();
            }
            // Some end before the death, some while no daemon is there, some under the next.
            seen.push(daemon.collected());
            drop(daemon);
            daemon = world.daemon();
            // Not waited for: the next death may come while it still looks for shims.
            daemon.inside(|| daemon.tasks.load(crate::world::every_record()).detach());
        }
        let ids: Vec<_> = (0..CONTAINERS).map(|number| format!("c{number}")).collect();
        for (number, id) in ids.iter().enumerate() {
            let expected = (id.clone(), number as u32);
            eventually_equal(&true, || {
                let before = seen
                    .iter()
                    .any(|events| Daemon::exits_in(&events.lock().unwrap().all(), id).contains(&expected));
                before || daemon.exits(id).contains(&expected)
            });
        }
        for (number, id) in ids.iter().enumerate() {
            assert_eq!(daemon.wait(id, "").unwrap(), number as u32);
            assert_eq!(daemon.delete(id).unwrap(), number as u32);
        }
        world.assert_nothing_left();
    });
}
