//! The life of tasks with real shims and runc.

use std::fs;
use std::path::Path;
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use davit_supervisor::runtime::{Error, Status, UpdateOptions};
use nix::sys::signal::{Signal, kill};

use crate::world::{GO_SHIM, World, alive, can_run, eventually, eventually_equal, own_shim, stop};

/// Runs a test with Debian's shim and with our own.
macro_rules! with_both_shims {
    ($($test:ident),* $(,)?) => {
        mod go_shim { $(#[test] fn $test() { super::with(Some(super::GO_SHIM.into()), super::$test); })* }
        mod own_shim { $(#[test] fn $test() { super::with(super::own_shim(), super::$test); })* }
    };
}
pub(crate) use with_both_shims;

pub fn with(shim: Option<std::path::PathBuf>, test: fn(World)) {
    match shim {
        Some(shim) if can_run(&shim) => test(World::new(&shim)),
        Some(_) => {}
        None => eprintln!("skipped: our own shim is not built"),
    }
}

with_both_shims!(
    a_whole_life,
    execs,
    refusals,
    a_failed_create_leaves_nothing,
    concurrent_creates_of_one_name,
    a_caller_that_goes_away_stops_nothing,
    a_killed_shim_is_reported,
    a_stopped_shim_delays_only_its_own,
    other_calls,
    a_name_is_free_at_once,
);

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorCode {
    result.unwrap_err().code()
}

/// What runs cannot be started or deleted. Debian's shim says so without a code of its own.
#[track_caller]
fn assert_runs<T: std::fmt::Debug>(world: &World, result: Result<T, Error>) {
    let old = world.shim == Path::new(GO_SHIM);
    let expected = if old { ErrorCode::Unknown } else { ErrorCode::FailedPrecondition };
    assert_eq!(code(result), expected);
}

fn a_whole_life(world: World) {
    let daemon = world.daemon();
    let out = world.path("out");
    let mut options = world.container("one", "echo hello; exec sleep 1000");
    options.stdio.stdout = format!("file://{}", out.display());
    options.stdio.stderr = options.stdio.stdout.clone();
    let spec = options.spec.clone().unwrap().value;
    let pid = daemon.create(options).unwrap();
    assert!(alive(pid));
    assert_eq!(daemon.status("one").unwrap(), Status::Created);
    assert_eq!(fs::read(world.bundle("one").join("config.json")).unwrap(), spec);
    let waiting = daemon.spawn({
        let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
        async move { tasks.wait(&namespace, "one", "").await }
    });
    assert_eq!(daemon.start("one", "").unwrap(), pid);
    assert_eq!(daemon.status("one").unwrap(), Status::Running);
    eventually_equal(&"hello\n".to_owned(), || fs::read_to_string(&out).unwrap_or_default());
    let list = daemon.block_on(daemon.tasks.list(&daemon.namespace));
    assert_eq!((list.len(), list[0].pid, list[0].id.as_str()), (1, pid, "one"));
    assert!(daemon.block_on(daemon.tasks.list("other")).is_empty());
    daemon.kill("one", "").unwrap();
    let exit = daemon.block_on(waiting).unwrap().unwrap();
    assert_eq!(exit.status, 137);
    assert!(exit.exited_at.is_some());
    assert_eq!(daemon.status("one").unwrap(), Status::Stopped);
    assert_eq!(daemon.wait("one", "").unwrap(), 137, "a wait after the end answers at once");
    let deleted = daemon.block_on(daemon.tasks.delete(&daemon.namespace, "one")).unwrap();
    assert_eq!((deleted.pid, deleted.status), (pid, 137));
    assert_eq!(code(daemon.status("one")), ErrorCode::NotFound);
    let topics: Vec<String> =
        ["create", "start", "exit", "delete"].map(|name| format!("/tasks/{name}")).into();
    eventually_equal(&topics, || daemon.topics("one"));
    assert_eq!(daemon.exits("one"), [("one".to_owned(), 137)]);
    world.assert_nothing_left();
    // The name is free again.
    daemon.run(world.container("one", "exit 3"));
    assert_eq!(daemon.wait("one", "").unwrap(), 3);
    assert_eq!(daemon.delete("one").unwrap(), 3);
    world.assert_nothing_left();
}

fn execs(world: World) {
    let daemon = world.daemon();
    let namespace = daemon.namespace.clone();
    daemon.run(world.container("one", "sleep 1000"));
    let exec = |options| daemon.block_on(daemon.tasks.exec(&namespace, "one", options));
    exec(world.exec("e1", "exit 5")).unwrap();
    assert_eq!(code(exec(world.exec("e1", "exit 5"))), ErrorCode::AlreadyExists);
    assert_eq!(code(exec(world.exec("one", "exit 5"))), ErrorCode::AlreadyExists);
    let pid = daemon.start("one", "e1").unwrap();
    assert_ne!(pid, 0);
    assert_eq!(daemon.wait("one", "e1").unwrap(), 5);
    // Many at once.
    let many: Vec<_> = (0..8)
        .map(|number| {
            let (tasks, namespace) = (daemon.tasks.clone(), namespace.clone());
            let options = world.exec(&format!("m{number}"), &format!("exit {number}"));
            daemon.spawn(async move {
                let id = options.exec_id.clone();
                tasks.exec(&namespace, "one", options).await.unwrap();
                tasks.start(&namespace, "one", &id).await.unwrap();
                let exit = tasks.wait(&namespace, "one", &id).await.unwrap();
                let deleted = tasks.delete_process(&namespace, "one", &id).await.unwrap();
                assert_eq!(deleted.status, exit.status);
                exit.status
            })
        })
        .collect();
    for (number, exec) in many.into_iter().enumerate() {
        assert_eq!(daemon.block_on(exec).unwrap(), number as u32);
    }
    exec(world.exec("e2", "exec sleep 1000")).unwrap();
    let pid = daemon.start("one", "e2").unwrap();
    let pids = daemon.block_on(daemon.tasks.pids(&namespace, "one")).unwrap();
    assert!(pids.iter().any(|process| process.pid == pid && process.info.is_some()), "{pids:?}");
    let delete = |exec: &str| daemon.block_on(daemon.tasks.delete_process(&namespace, "one", exec));
    assert_runs(&world, delete("e2"));
    daemon.kill("one", "e2").unwrap();
    assert_eq!(daemon.wait("one", "e2").unwrap(), 137);
    let state = daemon.block_on(daemon.tasks.state(&namespace, "one", "e2")).unwrap();
    assert_eq!((state.id.as_str(), state.status, state.exit_status), ("e2", Status::Stopped, 137));
    assert_eq!(delete("e2").unwrap().status, 137);
    assert_eq!(code(delete("e2")), ErrorCode::NotFound);
    assert_eq!(code(daemon.wait("one", "e2")), ErrorCode::NotFound);
    assert_eq!(code(daemon.start("one", "e2")), ErrorCode::NotFound);
    eventually("each exit is published once", || {
        let exits = daemon.exits("one");
        if exits.len() == 10 { Ok(()) } else { Err(format!("{exits:?}")) }
    });
    daemon.kill("one", "").unwrap();
    assert_eq!(daemon.wait("one", "").unwrap(), 137);
    daemon.delete("one").unwrap();
    world.assert_nothing_left();
}

fn refusals(world: World) {
    let daemon = world.daemon();
    let namespace = daemon.namespace.clone();
    for result in [
        daemon.start("none", "").map(drop),
        daemon.kill("none", ""),
        daemon.wait("none", "").map(drop),
        daemon.delete("none").map(drop),
        daemon.status("none").map(drop),
    ] {
        let error = result.unwrap_err();
        assert_eq!((error.code(), error.to_string().as_str()), (ErrorCode::NotFound, "task none not found"));
    }
    let pid = daemon.run(world.container("one", "sleep 1000"));
    assert_eq!(code(daemon.create(world.container("one", "true"))), ErrorCode::AlreadyExists);
    assert_runs(&world, daemon.start("one", ""));
    assert_runs(&world, daemon.delete("one"));
    assert_eq!(code(daemon.start("one", "nothing")), ErrorCode::NotFound);
    for bad in ["../one", "", "a/b"] {
        assert_eq!(code(daemon.create(world.container(bad, "true"))), ErrorCode::InvalidArgument);
        let exec = daemon.block_on(daemon.tasks.exec(&namespace, "one", world.exec(bad, "true")));
        assert_eq!(code(exec), ErrorCode::InvalidArgument);
    }
    let outside = daemon.block_on(daemon.tasks.create("../../etc", world.container("x", "true")));
    assert_eq!(code(outside), ErrorCode::InvalidArgument);
    assert!(alive(pid));
    daemon.kill("one", "").unwrap();
    daemon.wait("one", "").unwrap();
    assert_eq!(code(daemon.kill("one", "")), ErrorCode::NotFound);
    daemon.delete("one").unwrap();
    world.assert_nothing_left();
}

fn a_failed_create_leaves_nothing(world: World) {
    let daemon = world.daemon();
    let mut options = world.container("one", "true");
    options.rootfs[0].source = "/nothing/here".into();
    let error = daemon.create(options).unwrap_err();
    assert!(error.to_string().starts_with("failed to create shim task: "), "{error}");
    world.assert_nothing_left();
    let mut options = world.container("one", "true");
    let spec = String::from_utf8(options.spec.take().unwrap().value).unwrap();
    let value = spec.replace("/bin/sh", "/bin/nothing-like-it").into_bytes();
    options.spec = Some(davit_model::Any { type_url: String::new(), value });
    let error = daemon.create(options).unwrap_err();
    // Docker Engine reads exit code 127 out of these words.
    assert!(error.to_string().contains("no such file or directory"), "{error}");
    world.assert_nothing_left();
    assert!(daemon.topics("one").is_empty(), "{:?}", daemon.topics("one"));
    // The name is free.
    daemon.run(world.container("one", "true"));
    daemon.wait("one", "").unwrap();
    daemon.delete("one").unwrap();
    world.assert_nothing_left();
}

fn concurrent_creates_of_one_name(world: World) {
    let daemon = world.daemon();
    let creates: Vec<_> = (0..5)
        .map(|_| {
            let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
            let options = world.container("one", "sleep 1000");
            daemon.spawn(async move { tasks.create(&namespace, options).await })
        })
        .collect();
    let results: Vec<_> = creates.into_iter().map(|create| daemon.block_on(create).unwrap()).collect();
    let refused = results.iter().filter_map(|result| result.as_ref().err());
    let codes: Vec<_> = refused.map(Coded::code).collect();
    assert_eq!(codes, [ErrorCode::AlreadyExists; 4]);
    assert_eq!(world.serving().len(), 1);
    // A task that was never started can be deleted.
    daemon.delete("one").unwrap();
    world.assert_nothing_left();
}

fn a_caller_that_goes_away_stops_nothing(world: World) {
    let daemon = world.daemon();
    let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
    let options = world.container("one", "exit 4");
    daemon.block_on(async {
        let create = tokio::spawn({
            let (tasks, namespace) = (tasks.clone(), namespace.clone());
            async move { tasks.create(&namespace, options).await }
        });
        while !tasks.exists(&namespace, "one") {
            tokio::task::yield_now().await;
        }
        create.abort();
        assert!(create.await.unwrap_err().is_cancelled());
    });
    eventually_equal(&Some(Status::Created), || daemon.status("one").ok());
    let start = {
        let (tasks, namespace) = (tasks.clone(), namespace.clone());
        daemon.spawn(async move { tasks.start(&namespace, "one", "").await })
    };
    start.abort();
    // It was begun or it was not; a second start tells, and either way the container runs.
    let _ = daemon.start("one", "");
    assert_eq!(daemon.wait("one", "").unwrap(), 4);
    let delete = {
        let (tasks, namespace) = (tasks.clone(), namespace.clone());
        daemon.spawn(async move { tasks.delete(&namespace, "one").await })
    };
    delete.abort();
    let again = daemon.delete("one");
    assert!(matches!(again, Ok(4)) || again.as_ref().is_err_and(|error| error.code() == ErrorCode::NotFound));
    world.assert_nothing_left();
}

fn a_killed_shim_is_reported(world: World) {
    let daemon = world.daemon();
    let namespace = daemon.namespace.clone();
    let pid = daemon.run(world.container("one", "sleep 1000"));
    let other = daemon.run(world.container("other", "sleep 1000"));
    daemon.block_on(daemon.tasks.exec(&namespace, "one", world.exec("e", "exec sleep 1000"))).unwrap();
    let exec_pid = daemon.start("one", "e").unwrap();
    let waits: Vec<_> = ["", "e"]
        .map(|exec| {
            let (tasks, namespace) = (daemon.tasks.clone(), namespace.clone());
            daemon.spawn(async move { tasks.wait(&namespace, "one", exec).await })
        })
        .into();
    kill(world.shim_of("one"), Signal::SIGKILL).unwrap();
    for wait in waits {
        assert_eq!(daemon.block_on(wait).unwrap().unwrap().status, 137);
    }
    eventually_equal(&false, || alive(pid) || alive(exec_pid));
    eventually_equal(&1, || daemon.deletions("one"));
    assert_eq!(daemon.exits("one"), [("e".to_owned(), 137), ("one".to_owned(), 137)]);
    eventually_equal(&Some(ErrorCode::NotFound), || daemon.status("one").err().map(|error| error.code()));
    assert!(!world.bundle("one").exists());
    assert!(alive(other));
    daemon.kill("other", "").unwrap();
    daemon.wait("other", "").unwrap();
    daemon.delete("other").unwrap();
    world.assert_nothing_left();
}

fn a_stopped_shim_delays_only_its_own(mut world: World) {
    // So long is waited for the one that is stopped, and the other answers within that also where all is slow.
    world.timeouts.state = Duration::from_secs(10);
    let daemon = world.daemon();
    let pid = daemon.run(world.container("stopped", "sleep 1000"));
    daemon.run(world.container("fine", "sleep 1000"));
    let shim = world.shim_of("stopped");
    stop(shim);
    let hanging = daemon.spawn({
        let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
        async move { tasks.kill(&namespace, "stopped", "", 9, false).await }
    });
    assert_eq!(code(daemon.status("stopped")), ErrorCode::DeadlineExceeded);
    let list = daemon.block_on(daemon.tasks.list(&daemon.namespace));
    let of = |id: &str| list.iter().find(|process| process.id == id).unwrap();
    assert_eq!((of("stopped").status, of("stopped").pid), (Status::Unknown, pid));
    assert_eq!(of("fine").status, Status::Running);
    daemon.kill("fine", "").unwrap();
    daemon.wait("fine", "").unwrap();
    daemon.delete("fine").unwrap();
    assert!(alive(pid), "slow is not dead");
    kill(shim, Signal::SIGCONT).unwrap();
    daemon.block_on(hanging).unwrap().unwrap();
    assert_eq!(daemon.wait("stopped", "").unwrap(), 137);
    daemon.delete("stopped").unwrap();
    world.assert_nothing_left();
}

fn other_calls(world: World) {
    let daemon = world.daemon();
    let namespace = daemon.namespace.clone();
    daemon.run(world.container("one", "sleep 1000"));
    daemon.block_on(daemon.tasks.pause(&namespace, "one")).unwrap();
    assert_eq!(daemon.status("one").unwrap(), Status::Paused);
    daemon.block_on(daemon.tasks.resume(&namespace, "one")).unwrap();
    assert_eq!(daemon.status("one").unwrap(), Status::Running);
    let resources = davit_model::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: br#"{"pids":{"limit":50}}"#.to_vec(),
    };
    let update = UpdateOptions { resources: Some(resources), ..UpdateOptions::default() };
    daemon.block_on(daemon.tasks.update(&namespace, "one", update)).unwrap();
    daemon.block_on(daemon.tasks.resize_pty(&namespace, "one", "", 80, 25)).unwrap();
    daemon.block_on(daemon.tasks.close_io(&namespace, "one", "", false)).unwrap();
    let metrics = daemon.block_on(daemon.tasks.metrics(&namespace, |id| id == "one"));
    assert_eq!(metrics.len(), 1);
    assert!(metrics[0].data.as_ref().unwrap().type_url.starts_with("io.containerd.cgroups."));
    assert!(daemon.block_on(daemon.tasks.metrics(&namespace, |_| false)).is_empty());
    daemon.kill("one", "").ok();
    daemon.wait("one", "").unwrap();
    daemon.delete("one").unwrap();
    world.assert_nothing_left();
}

/// A deletion does not wait until the files are gone; the end of the daemon does.
fn a_name_is_free_at_once(world: World) {
    let daemon = world.daemon();
    for _ in 0..5 {
        daemon.run(world.container("again", "exit 3"));
        assert_eq!(daemon.wait("again", "").unwrap(), 3);
        assert_eq!(daemon.delete("again").unwrap(), 3);
    }
    daemon.block_on(daemon.tasks.settle());
    for folder in ["state", "root"] {
        let left: Vec<_> = fs::read_dir(world.path(folder).join(&daemon.namespace))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
    world.assert_nothing_left();
}
