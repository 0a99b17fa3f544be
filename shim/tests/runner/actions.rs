//! The binary's actions and flags: `start` for every generation of daemons, `delete`, `-info`, `-v`.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use davit_proto::any;
use davit_proto::containerd::runc::v1::Options;
use davit_proto::containerd::types::RuntimeInfo;
use davit_shim_protocol::address;
use davit_shim_protocol::bootstrap::{Generation, StartResult};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;

use crate::events::delete_action;
use crate::support::{Bundle, Client, Host, SHIM, cannot_run, eventually};

#[test]
fn every_daemon_learns_the_address_in_its_own_way() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    for generation in [Generation::Plain, Generation::Json, Generation::Bootstrap] {
        let bundle = host.bundle("box", "true", |_| ());
        let printed = host.run_start(&bundle, generation);
        let result = StartResult::parse(&printed).unwrap();
        assert_eq!(printed, result.print(generation));
        assert_eq!(result.version, if generation == Generation::Bootstrap { 3 } else { 2 });
        let path = address::parse(&result.address).unwrap();
        assert_eq!(std::fs::read_to_string(bundle.path.join("address")).unwrap(), result.address);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        Client::connect(&path).shutdown();
        eventually("the socket is removed", || !path.exists());
        // Older daemons cannot name a folder for sockets, and get the default one.
        let own = path.starts_with(host.path("s"));
        assert_eq!(own, generation == Generation::Bootstrap);
        std::fs::remove_dir_all(&bundle.path).unwrap();
    }
}

#[test]
fn a_group_shares_one_shim() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let group = |config: &mut serde_json::Value| {
        config["annotations"] = serde_json::json!({"io.kubernetes.cri.sandbox-id": "pod"});
    };
    let first = host.bundle("first", "sleep 1000", group);
    let second = host.bundle("second", "sleep 1000", group);
    let client = host.start(&first);
    let other = host.start(&second);
    assert_eq!(client.socket(), other.socket());
    client.create(&host.create_request(&first)).unwrap();
    other.create(&host.create_request(&second)).unwrap();
    client.start(&first.id, "").unwrap();
    client.kill(&first.id, "", 9).unwrap();
    client.wait(&first.id, "").unwrap();
    client.delete(&first.id, "").unwrap();
    // It serves until the last of its containers is gone.
    client.shutdown();
    assert_eq!(other.connect_call(&second.id).shim_pid, client.connect_call(&first.id).shim_pid);
    other.start(&second.id, "").unwrap();
    other.finish(&second.id);
    eventually("the socket is removed", || !other.socket().exists());
}

#[test]
fn a_socket_that_a_dead_shim_left_is_replaced() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "true", |_| ());
    let client = host.start(&bundle);
    let shim = client.connect_call(&bundle.id).shim_pid;
    kill(Pid::from_raw(shim as i32), Signal::SIGKILL).unwrap();
    eventually("nobody listens", || std::os::unix::net::UnixStream::connect(client.socket()).is_err());
    let next = host.start(&bundle);
    assert_eq!(next.socket(), client.socket());
    assert_ne!(next.connect_call(&bundle.id).shim_pid, shim);
    next.shutdown();
}

#[test]
fn delete_works_on_bundles_that_are_half_there() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let id = host.id("box");
    let bundle = Bundle { path: host.path(&id), id };
    let response = delete_action(&bundle);
    assert_eq!((response.pid, response.exit_status), (0, 137));
    std::fs::create_dir(&bundle.path).unwrap();
    std::fs::write(bundle.path.join("init.pid"), "4194999").unwrap();
    std::fs::write(bundle.path.join("options.json"), "not json").unwrap();
    std::fs::write(bundle.path.join("journal"), "not a journal").unwrap();
    std::fs::write(bundle.path.join("address"), "vsock://1:2").unwrap();
    let response = delete_action(&bundle);
    assert_eq!((response.pid, response.exit_status), (4_194_999, 137));
    assert!(response.exited_at.is_some());
}

#[test]
fn the_binary_tells_about_itself() {
    let output = Command::new(SHIM).arg("-v").output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains(env!("CARGO_PKG_VERSION")));
    let output = Command::new(SHIM).args(["-frob"]).output().unwrap();
    assert!(!output.status.success());
    let output = Command::new(SHIM).args(["-id", "x", "start"]).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("shim namespace cannot be empty"));

    let options = any::pack(&Options { binary_name: "runc".to_owned(), ..Options::default() });
    let mut child =
        Command::new(SHIM).arg("-info").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&options.encode_to_vec()).unwrap();
    let output = child.wait_with_output().unwrap();
    let info = RuntimeInfo::decode(&*output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.davit.v2");
    assert_eq!(info.options, Some(options));
    let features: serde_json::Value = serde_json::from_slice(&info.features.unwrap().value).unwrap();
    assert!(features["ociVersionMin"].is_string());
}
