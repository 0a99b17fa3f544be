//! Several containers in one shim, and connections that are lost without a death.

use std::sync::Arc;

use davit_model::{Coded, ErrorCode};
use davit_proto::containerd::task::v3 as wire;
use davit_proto::containerd::v1::types::Status as WireStatus;
use davit_supervisor::runtime::{CreateOptions, Status};
use nix::sys::signal::{Signal, kill};
use prost::Message;

use crate::fake::{FakeShim, LastingSocket, script};
use crate::life::{with, with_both_shims};
use crate::world::{GO_SHIM, World, alive, eventually_equal, own_shim};

with_both_shims!(
    a_group_shares_a_shim_until_its_last,
    a_group_survives_the_daemon,
    a_group_dies_with_its_shim
);

fn member(world: &World, id: &str, group: &str) -> CreateOptions {
    let mut options = world.container(id, "sleep 1000");
    world.expect_group(group);
    let spec = options.spec.as_mut().unwrap();
    let mut document: serde_json::Value = serde_json::from_slice(&spec.value).unwrap();
    document["annotations"] = serde_json::json!({ "io.containerd.runc.v2.group": group });
    spec.value = serde_json::to_vec(&document).unwrap();
    options
}

fn end(daemon: &crate::world::Daemon, id: &str) {
    daemon.kill(id, "").unwrap();
    assert_eq!(daemon.wait(id, "").unwrap(), 137);
    assert_eq!(daemon.delete(id).unwrap(), 137);
}

fn a_group_shares_a_shim_until_its_last(world: World) {
    let daemon = world.daemon();
    let one = daemon.run(member(&world, "one", "pod"));
    let two = daemon.run(member(&world, "two", "pod"));
    assert_eq!(world.serving().len(), 1);
    end(&daemon, "one");
    assert!(!alive(one) && alive(two));
    assert_eq!(daemon.status("two").unwrap(), Status::Running);
    // A failure in the group is that of one only.
    let mut broken = member(&world, "three", "pod");
    broken.rootfs[0].source = "/nothing/here".into();
    daemon.create(broken).unwrap_err();
    assert_eq!(daemon.status("two").unwrap(), Status::Running);
    daemon.run(member(&world, "one", "pod"));
    end(&daemon, "two");
    assert_eq!(world.serving().len(), 1);
    end(&daemon, "one");
    world.assert_nothing_left();
}

fn a_group_survives_the_daemon(world: World) {
    let daemon = world.daemon();
    for id in ["one", "two", "three"] {
        daemon.run(member(&world, id, "pod"));
    }
    drop(daemon);
    let daemon = world.next_daemon();
    for id in ["one", "two", "three"] {
        assert_eq!(daemon.status(id).unwrap(), Status::Running);
        end(&daemon, id);
    }
    world.assert_nothing_left();
}

fn a_group_dies_with_its_shim(world: World) {
    let daemon = world.daemon();
    let pids = ["one", "two"].map(|id| daemon.run(member(&world, id, "pod")));
    kill(world.serving()[0], Signal::SIGKILL).unwrap();
    for id in ["one", "two"] {
        eventually_equal(&1, || daemon.deletions(id));
        assert_eq!(daemon.exits(id), [(id.to_owned(), 137)]);
    }
    eventually_equal(&false, || pids.into_iter().any(alive));
    world.assert_nothing_left();
}

#[test]
fn a_container_joins_the_shim_of_its_sandbox_if_that_can_hold_it() {
    with(own_shim(), |world| {
        let daemon = world.daemon();
        daemon.run(world.container("pod", "sleep 1000"));
        let member = |id| CreateOptions { sandbox_id: "pod".into(), ..world.container(id, "sleep 1000") };
        daemon.run(member("inner"));
        assert_eq!(world.serving().len(), 1);
        assert_eq!(std::fs::read_to_string(world.bundle("inner").join("sandbox")).unwrap(), "pod");
        drop(daemon);
        let daemon = world.next_daemon();
        end(&daemon, "inner");
        assert_eq!(daemon.status("pod").unwrap(), Status::Running);
        daemon.run(member("other"));
        kill(world.serving()[0], Signal::SIGKILL).unwrap();
        for id in ["pod", "other"] {
            eventually_equal(&1, || daemon.deletions(id));
            assert_eq!(daemon.exits(id).last(), Some(&(id.to_owned(), 137)));
        }
        world.assert_nothing_left();
    });
}

/// A world with a fake shim at `shim.sock`.
fn fake_world() -> World {
    let mut world = World::new(std::path::Path::new("/nonexistent"));
    world.shim = script(world.folder.path(), "printf unix://$(dirname $0)/shim.sock");
    world
}

fn options(id: &str) -> CreateOptions {
    CreateOptions { container_id: id.into(), runtime: "io.containerd.runc.v2".into(), ..Default::default() }
}

#[test]
fn a_connection_that_is_lost_is_no_death() {
    let world = fake_world();
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    let state = wire::StateResponse { pid: 77, status: WireStatus::Running as i32, ..Default::default() };
    shim.answer("State", Ok(state.encode_to_vec()));
    let socket = LastingSocket::bind(&world.path("shim.sock"));
    let first = daemon.inside(|| socket.serve(&shim));
    assert_eq!(daemon.create(options("one")).unwrap(), 77);
    let wait = daemon.spawn({
        let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
        async move { tasks.wait(&namespace, "one", "").await }
    });
    let bundle = world.bundle("one");
    first.abort();
    let second = daemon.inside(|| socket.serve(&shim));
    eventually_equal(&Some(Status::Running), || daemon.status("one").ok());
    assert!(bundle.exists());
    assert!(daemon.events().is_empty(), "{:?}", daemon.events());
    assert!(!world.path("delete.arguments").exists());
    daemon.block_on(wait).unwrap().unwrap();
    daemon.delete("one").unwrap();
    second.abort();
}

#[test]
fn a_container_may_join_the_shim_of_its_sandbox() {
    let world = fake_world();
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    let server = daemon.inside(|| crate::fake::serve(&world.path("shim.sock"), shim.clone()));
    let address = format!("ttrpc+unix://{}", world.path("shim.sock").display());
    let joining = CreateOptions { task_api_address: address, task_api_version: 3, ..options("one") };
    assert_eq!(daemon.create(joining).unwrap(), 77);
    assert!(!world.path("start.arguments").exists(), "no shim was started");
    assert!(world.bundle("one").join("sandbox").exists());
    daemon.delete("one").unwrap();
    let called: Vec<_> = shim.called().into_iter().map(|(_, method)| method).collect();
    assert_eq!(called, ["Create", "Delete"], "the sandbox's shim is not shut down");
    for bad in ["unix:///x", "grpc+vsock://3:4", "ttrpc+unix://relative"] {
        let joining = CreateOptions { task_api_address: bad.into(), ..options("one") };
        assert_eq!(daemon.create(joining).unwrap_err().code(), ErrorCode::InvalidArgument);
    }
    world.assert_nothing_left();
    server.abort();
}
