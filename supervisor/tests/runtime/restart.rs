//! The daemon dies and another takes over.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use davit_shim_protocol::bundle::Bundle;
use davit_supervisor::runtime::Status;
use nix::sys::signal::{Signal, kill};

use crate::life::{with, with_both_shims};
use crate::world::{GO_SHIM, World, alive, eventually, eventually_equal, every_record, own_shim, stop};

with_both_shims!(
    the_next_daemon_finds_everything,
    a_shim_that_died_with_the_daemon_is_reported,
    a_silent_shim_delays_nobody_and_is_kept,
    a_daemon_that_dies_while_it_creates_leaves_nothing,
    a_shim_without_a_task_is_ended,
    tasks_without_a_record,
    what_was_left_is_removed,
    a_shim_that_nobody_wrote_down_is_found,
);

fn the_next_daemon_finds_everything(world: World) {
    let daemon = world.daemon();
    let running = daemon.run(world.container("running", "sleep 1000"));
    let created = daemon.create(world.container("created", "exit 1")).unwrap();
    let ending = world.container("ending", "while ! cat /go 2>/dev/null; do sleep 0.02; done; exit 7");
    let ending_pid = daemon.run(ending);
    daemon.block_on(daemon.tasks.exec(&daemon.namespace, "running", world.exec("e", "sleep 1000"))).unwrap();
    let exec = daemon.start("running", "e").unwrap();
    drop(daemon);
    // Nothing died with it, and what ends in the meantime is remembered.
    for pid in [running, created, ending_pid, exec] {
        assert!(alive(pid));
    }
    fs::write(world.path("busybox/go"), "").unwrap();
    eventually_equal(&false, || alive(ending_pid));

    let daemon = world.next_daemon();
    let mut list = daemon.block_on(daemon.tasks.list(&daemon.namespace));
    list.sort_by(|one, other| one.id.cmp(&other.id));
    let found: Vec<_> = list.iter().map(|task| (task.id.as_str(), task.pid, task.status)).collect();
    assert_eq!(
        found,
        [
            ("created", created, Status::Created),
            ("ending", ending_pid, Status::Stopped),
            ("running", running, Status::Running)
        ]
    );
    assert_eq!(daemon.wait("ending", "").unwrap(), 7);
    assert_eq!(daemon.delete("ending").unwrap(), 7);
    assert_eq!(daemon.start("created", "").unwrap(), created);
    assert_eq!(daemon.wait("created", "").unwrap(), 1);
    daemon.delete("created").unwrap();
    let state = daemon.block_on(daemon.tasks.state(&daemon.namespace, "running", "e")).unwrap();
    assert_eq!(state.pid, exec);
    daemon.kill("running", "").unwrap();
    assert_eq!(daemon.wait("running", "").unwrap(), 137);
    daemon.delete("running").unwrap();
    eventually_equal(&1, || {
        daemon.exits("running").iter().filter(|exit| **exit == ("running".to_owned(), 137)).count()
    });
    world.assert_nothing_left();
}

fn a_shim_that_died_with_the_daemon_is_reported(world: World) {
    let daemon = world.daemon();
    let pid = daemon.run(world.container("one", "sleep 1000"));
    drop(daemon);
    kill(world.shim_of("one"), Signal::SIGKILL).unwrap();
    eventually_equal(&0, || world.shims().len());
    let daemon = world.next_daemon();
    eventually_equal(&1, || daemon.deletions("one"));
    assert_eq!(daemon.exits("one"), [("one".to_owned(), 137)]);
    eventually_equal(&false, || alive(pid));
    eventually_equal(&false, || daemon.tasks.exists(&daemon.namespace, "one"));
    world.assert_nothing_left();
}

fn a_silent_shim_delays_nobody_and_is_kept(mut world: World) {
    world.timeouts.load = Duration::from_millis(300);
    let daemon = world.daemon();
    let pid = daemon.run(world.container("silent", "sleep 1000"));
    daemon.run(world.container("fine", "sleep 1000"));
    let shim = world.shim_of("silent");
    stop(shim);
    drop(daemon);
    let daemon = world.daemon();
    let loading = daemon.inside(|| daemon.tasks.load(every_record()));
    assert_eq!(loading.tasks(), 2);
    // So short is the time for an answer that one that answers may be asked again as well.
    eventually_equal(&Some(Status::Running), || daemon.status("fine").ok());
    let waiting = daemon.spawn({
        let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
        async move { tasks.wait(&namespace, "silent", "").await }
    });
    daemon.block_on(loading.finished());
    assert_eq!(daemon.kill("silent", "").unwrap_err().code(), ErrorCode::Unavailable);
    assert_eq!(daemon.delete("silent").unwrap_err().code(), ErrorCode::Unavailable);
    let again = daemon.create(world.container("silent", "true"));
    assert_eq!(again.unwrap_err().code(), ErrorCode::AlreadyExists);
    let list = daemon.block_on(daemon.tasks.list(&daemon.namespace));
    let silent = list.iter().find(|task| task.id == "silent").unwrap();
    assert_eq!((silent.status, silent.pid), (Status::Unknown, pid));
    assert!(alive(pid));
    kill(shim, Signal::SIGCONT).unwrap();
    eventually_equal(&Some(Status::Running), || daemon.status("silent").ok());
    daemon.kill("silent", "").unwrap();
    assert_eq!(daemon.block_on(waiting).unwrap().unwrap().status, 137);
    daemon.delete("silent").unwrap();
    daemon.kill("fine", "").unwrap();
    daemon.wait("fine", "").unwrap();
    daemon.delete("fine").unwrap();
    world.assert_nothing_left();
}

fn a_daemon_that_dies_while_it_creates_leaves_nothing(world: World) {
    for marker in ["config.json", "shim-binary-path", "log", "bootstrap.json", "init.pid"] {
        let daemon = world.daemon();
        let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
        let options = world.container("one", "sleep 1000");
        let create = daemon.spawn(async move { tasks.create(&namespace, options).await });
        let file = world.bundle("one").join(marker);
        while !file.exists() && !create.is_finished() {
            std::thread::yield_now();
        }
        drop(daemon);
        let daemon = world.next_daemon();
        // Either it had been created, and is there and whole, or it is cleaned up.
        eventually("the task is decided", || {
            if !daemon.tasks.exists(&daemon.namespace, "one") {
                return Ok(());
            }
            match daemon.delete("one") {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("{marker}: {error}")),
            }
        });
        world.assert_nothing_left();
    }
}

fn a_shim_without_a_task_is_ended(world: World) {
    // What a daemon leaves that dies right after it has started a shim.
    let bundle = start_shim_by_hand(&world, "one");
    bundle.write_binary(&world.shim).unwrap();
    assert_eq!(world.serving().len(), 1);
    let daemon = world.next_daemon();
    world.assert_nothing_left();
    assert!(daemon.events().is_empty(), "{:?}", daemon.events());
}

fn a_shim_that_nobody_wrote_down_is_found(world: World) {
    let bundle = start_shim_by_hand(&world, "one");
    for file in ["address", "bootstrap.json"] {
        let _ = fs::remove_file(bundle.path().join(file));
    }
    let _daemon = world.next_daemon();
    world.assert_nothing_left();
}

fn start_shim_by_hand(world: &World, id: &str) -> Bundle {
    let config = world.config();
    let bundle = Bundle::new(&config.state, &config.root, &world.namespace, id);
    bundle.create(world.container(id, "true").spec.as_ref().map(|spec| spec.value.as_slice())).unwrap();
    // A shim opens its log, which its daemon holds.
    let log = fs::OpenOptions::new().read(true).write(true).open(bundle.log()).unwrap();
    let output = std::process::Command::new(&world.shim)
        .args(["-namespace", &world.namespace, "-address", &config.grpc_address])
        .args(["-publish-binary", "/bin/true", "-id", id, "start"])
        .current_dir(bundle.path())
        .env("TTRPC_ADDRESS", &config.ttrpc_address)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    eventually_equal(&1, || world.serving().len());
    drop(log);
    bundle
}

fn tasks_without_a_record(world: World) {
    let daemon = world.daemon();
    let running = daemon.run(world.container("running", "sleep 1000"));
    daemon.create(world.container("created", "true")).unwrap();
    daemon.run(world.container("stopped", "true"));
    daemon.wait("stopped", "").unwrap();
    drop(daemon);
    let daemon = world.daemon();
    daemon.block_on(async { daemon.tasks.load(Arc::new(|_, _| false)).finished().await });
    for id in ["created", "stopped"] {
        eventually_equal(&false, || daemon.tasks.exists(&daemon.namespace, id));
    }
    assert!(alive(running), "what runs is no leak");
    assert_eq!(daemon.status("running").unwrap(), Status::Running);
    daemon.kill("running", "").unwrap();
    daemon.wait("running", "").unwrap();
    daemon.delete("running").unwrap();
    world.assert_nothing_left();
}

fn what_was_left_is_removed(world: World) {
    let daemon = world.daemon();
    let pid = daemon.run(world.container("one", "sleep 1000"));
    drop(daemon);
    let config = world.config();
    for left in ["empty", ".half", ".stale--3"] {
        fs::create_dir_all(config.state.join(&world.namespace).join(left)).unwrap();
    }
    fs::create_dir_all(world.bundle("no-shim").join("rootfs")).unwrap();
    fs::create_dir_all(config.root.join(&world.namespace).join("after-a-reboot/files")).unwrap();
    let daemon = world.next_daemon();
    eventually("only the task is left", || {
        let names: Vec<_> = [&config.state, &config.root]
            .iter()
            .flat_map(|root| fs::read_dir(root.join(&world.namespace)).unwrap())
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        if names == ["one", "one"] { Ok(()) } else { Err(format!("{names:?}")) }
    });
    assert_eq!((daemon.exits("no-shim"), daemon.deletions("no-shim")), (Vec::new(), 0));
    assert!(alive(pid));
    daemon.kill("one", "").unwrap();
    daemon.wait("one", "").unwrap();
    daemon.delete("one").unwrap();
    world.assert_nothing_left();
}
