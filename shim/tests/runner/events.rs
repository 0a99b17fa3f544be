//! Events survive: a daemon that is away, a daemon that comes back, and the death of the shim.

use std::path::Path;
use std::process::Command;

use davit_proto::containerd::task::v3::DeleteResponse;
use davit_shim_protocol::journal;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;

use crate::support::{Bundle, Host, NAMESPACE, cannot_run, eventually};

fn journal_of(bundle: &Bundle) -> journal::Contents {
    journal::read(&bundle.path.join(journal::FILE_NAME)).unwrap()
}

#[test]
fn events_wait_for_the_daemon() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    client.exec(&bundle.id, "e1", "exit 4").unwrap();
    client.start(&bundle.id, "e1").unwrap();
    client.wait(&bundle.id, "e1").unwrap();
    client.kill(&bundle.id, "", 9).unwrap();
    client.wait(&bundle.id, "").unwrap();
    let recorded = journal_of(&bundle);
    assert_eq!(recorded.unsent.len(), 6);
    assert_eq!((recorded.exits["e1"].status, recorded.exits[&bundle.id].status), (4, 137));
    // A daemon comes back: it listens, then it connects.
    let events = host.receive_events();
    let again = client.again();
    let expected = ["create", "start box", "exec-added", "exec-started e1", "exit e1 4", "exit box 137"];
    assert_eq!(events.until("exit box 137"), expected);
    eventually("all is acknowledged", || journal_of(&bundle).unsent.is_empty());
    again.finish(&bundle.id);
    events.until("delete");
}

#[test]
fn a_daemon_that_comes_and_goes_misses_nothing() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let mut received = Vec::new();
    for round in 0..6 {
        let exec = format!("e{round}");
        // Every other round nobody listens.
        let events = (round % 2 == 0).then(|| host.receive_events());
        let client = client.again();
        client.exec(&bundle.id, &exec, "true").unwrap();
        client.start(&bundle.id, &exec).unwrap();
        client.wait(&bundle.id, &exec).unwrap();
        if let Some(events) = events {
            events.until(&format!("exit {exec} 0"));
            received.extend(events.envelopes());
        }
    }
    let events = host.receive_events();
    client.again().finish(&bundle.id);
    events.until("delete");
    received.extend(events.envelopes());
    // At least once, and in order: duplicates are those of an acknowledgement that got lost.
    let times: Vec<_> = received.iter().map(|event| event.timestamp.unwrap()).collect();
    let mut distinct: Vec<_> = times.iter().map(|time| (time.seconds, time.nanos)).collect();
    distinct.dedup();
    assert!(distinct.is_sorted(), "{distinct:?}");
    let exits: Vec<_> = received.iter().filter(|event| event.topic == "/tasks/exit").collect();
    assert!(exits.len() >= 7, "{}", exits.len());
}

#[test]
fn a_killed_shim_leaves_the_truth() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "exit 42", |_| ());
    let client = host.start(&bundle);
    let shim = client.connect_call(&bundle.id).shim_pid;
    let pid = client.create(&host.create_request(&bundle)).unwrap();
    client.start(&bundle.id, "").unwrap();
    let waited = client.wait(&bundle.id, "").unwrap();
    kill(Pid::from_raw(shim as i32), Signal::SIGKILL).unwrap();
    eventually("the shim is dead", || !Path::new(&format!("/proc/{shim}/root")).exists());
    let unsent: Vec<String> = journal_of(&bundle).unsent.into_iter().map(|event| event.topic).collect();
    assert_eq!(unsent, ["/tasks/create", "/tasks/start", "/tasks/exit"]);
    let response = delete_action(&bundle);
    assert_eq!((response.pid, response.exit_status), (pid, 42));
    assert_eq!(response.exited_at, waited.exited_at);
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id));
    assert!(!client.socket().exists());
    assert!(!host.path("runc").join(NAMESPACE).join(&bundle.id).exists());
}

#[test]
fn a_second_life_in_a_bundle_does_not_inherit_the_first() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    for _ in 0..2 {
        client.create(&host.create_request(&bundle)).unwrap();
        client.start(&bundle.id, "").unwrap();
        client.kill(&bundle.id, "", 9).unwrap();
        client.wait(&bundle.id, "").unwrap();
        client.delete(&bundle.id, "").unwrap();
    }
    client.create(&host.create_request(&bundle)).unwrap();
    assert_eq!(journal_of(&bundle).exits.len(), 0);
    // The events of all lives are there, also those whose journal has been replaced.
    let events = host.receive_events();
    client.again().finish(&bundle.id);
    let life = ["create", "start box", "exit box 137", "delete"];
    let last = ["create", "exit box 137", "delete"];
    eventually("all events arrive", || events.list().len() == 11);
    assert_eq!(events.list(), [&life[..], &life, &last].concat());
    assert!(!journal_of(&bundle).torn);
}

#[test]
fn containers_of_a_killed_shim_are_killed_by_delete() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let shim = client.connect_call(&bundle.id).shim_pid;
    let pid = client.create(&host.create_request(&bundle)).unwrap();
    client.start(&bundle.id, "").unwrap();
    kill(Pid::from_raw(shim as i32), Signal::SIGKILL).unwrap();
    eventually("the shim is dead", || !Path::new(&format!("/proc/{shim}/root")).exists());
    assert!(Path::new(&format!("/proc/{pid}/root")).exists(), "the container outlives its shim");
    let response = delete_action(&bundle);
    assert_eq!((response.pid, response.exit_status), (pid, 137));
    eventually("the container is dead", || !Path::new(&format!("/proc/{pid}/root")).exists());
}

/// Runs the `delete` action as a daemon does.
pub(crate) fn delete_action(bundle: &Bundle) -> DeleteResponse {
    let output = Command::new(env!("CARGO_BIN_EXE_containerd-shim-davit-v2"))
        .args(["-namespace", NAMESPACE, "-id", &bundle.id, "-bundle"])
        .arg(&bundle.path)
        .arg("delete")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    DeleteResponse::decode(&*output.stdout).unwrap()
}
