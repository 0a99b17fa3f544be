//! Deaths at the worst moments. A fake shim, or a script that waits, stands at the moment until the test has done its harm;
//! nothing depends on who is quicker.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use davit_model::{Any, Coded, ErrorCode};
use davit_proto::any;
use davit_proto::containerd::events::{TaskDelete, TaskExit};
use davit_proto::containerd::task::v3 as wire;
use davit_proto::containerd::v1::types::Status as WireStatus;
use davit_shim_protocol::frame::RpcError;
use davit_shim_protocol::journal::{EventRecord, ExitRecord, Journal, Record, StartRecord};
use davit_supervisor::runtime::{CreateOptions, Status};
use prost::Message;
use prost_types::Timestamp;
use tokio::task::JoinHandle;

use crate::events::{connect, envelope, forward};
use crate::fake::{FakeShim, LastingSocket, script, serve};
use crate::life::with;
use crate::world::{Daemon, World, alive, eventually, eventually_equal, every_record, own_shim};

/// A world with a fake shim at `shim.sock`. Its binary notes each `start` and `delete`; a `delete` waits for the file `go`
/// and then tells of an exit with 9.
fn fake_world() -> World {
    let mut world = World::new(Path::new("/nonexistent"));
    world.timeouts.load = Duration::from_millis(300);
    world.shim = script(
        world.folder.path(),
        "cd $(dirname $0)\necho x >> $action.count\n\
         case $action in\n\
         start) if [ -e elsewhere ]; then mv elsewhere used; printf unix://$PWD/nobody.sock; else printf unix://$PWD/shim.sock; fi ;;\n\
         delete) while [ ! -e go ]; do sleep 0.01; done; cat answer ;;\n\
         esac",
    );
    let exited_at = Some(Timestamp { seconds: 1_000, nanos: 0 });
    let answer = wire::DeleteResponse { pid: 77, exit_status: 9, exited_at };
    fs::write(world.path("answer"), answer.encode_to_vec()).unwrap();
    world
}

fn count(world: &World, action: &str) -> usize {
    fs::read_to_string(world.path(&format!("{action}.count"))).unwrap_or_default().lines().count()
}

fn options(id: &str) -> CreateOptions {
    let spec = Some(Any { type_url: String::new(), value: b"{}".to_vec() });
    CreateOptions {
        container_id: id.into(),
        spec,
        runtime: "io.containerd.runc.v2".into(),
        ..CreateOptions::default()
    }
}

fn grouped(id: &str) -> CreateOptions {
    let spec = br#"{"annotations": {"io.containerd.runc.v2.group": "pod"}}"#.to_vec();
    CreateOptions { spec: Some(Any { type_url: String::new(), value: spec }), ..options(id) }
}

fn start_shim(world: &World, daemon: &Daemon) -> (Arc<FakeShim>, JoinHandle<()>) {
    let shim = Arc::new(FakeShim::new());
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim.clone()));
    (shim, server)
}

/// The death of a fake shim.
fn end_shim(world: &World, server: JoinHandle<()>) {
    server.abort();
    fs::remove_file(world.path("shim.sock")).unwrap();
}

/// The daemon after this one, which does not wait until it has found everything.
fn hasty_daemon(world: &World) -> Daemon {
    let daemon = world.daemon();
    daemon.inside(|| daemon.tasks.load(every_record()).detach());
    daemon
}

fn exit_of(id: &str, status: u32) -> TaskExit {
    let exited_at = Some(Timestamp { seconds: 500, nanos: 0 });
    TaskExit { container_id: id.into(), id: id.into(), pid: 77, exit_status: status, exited_at }
}

#[test]
fn an_event_before_the_answer_of_a_creation_takes_nothing_from_it() {
    let world = fake_world();
    let daemon = world.daemon();
    let (shim, server) = start_shim(&world, &daemon);
    let held = shim.hold("Create");
    let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
    let create = daemon.spawn(async move { tasks.create(&namespace, options("one")).await });
    eventually_equal(&1, || shim.count("Create"));
    let client = connect(&world, &daemon);
    let mut early = envelope("/tasks/exit", any::pack(&exit_of("one", 3)));
    early.namespace = daemon.namespace.clone();
    forward(&daemon, &client, Some(early)).unwrap();
    held.add_permits(1);
    assert_eq!(daemon.block_on(create).unwrap().unwrap(), 77);
    daemon.delete("one").unwrap();
    server.abort();
}

#[test]
fn a_container_whose_groups_shim_ends_meanwhile_gets_another() {
    let world = fake_world();
    let daemon = world.daemon();
    let (shim, server) = start_shim(&world, &daemon);
    let ending =
        || vec![Err(RpcError::new(ErrorCode::Unavailable, "the shim is ending: unavailable".to_owned()))];
    // It says so itself.
    shim.first_answers.lock().unwrap().insert("Create", ending());
    assert_eq!(daemon.create(grouped("one")).unwrap(), 77);
    assert_eq!((count(&world, "start"), shim.count("Create")), (2, 2));
    daemon.delete("one").unwrap();
    // Nobody listens any more where it was a moment ago.
    fs::write(world.path("elsewhere"), "").unwrap();
    assert_eq!(daemon.create(grouped("two")).unwrap(), 77);
    assert_eq!((count(&world, "start"), shim.count("Create")), (4, 3));
    daemon.delete("two").unwrap();
    // A new shim that ends is no shim of a group that does; and one that is nobody else's has no reason to.
    shim.first_answers.lock().unwrap().insert("Create", [ending(), ending()].concat());
    assert_eq!(daemon.create(grouped("three")).unwrap_err().code(), ErrorCode::Unavailable);
    assert_eq!(shim.count("Create"), 5);
    shim.first_answers.lock().unwrap().insert("Create", ending());
    assert_eq!(daemon.create(options("four")).unwrap_err().code(), ErrorCode::Unavailable);
    assert_eq!(shim.count("Create"), 6);
    world.assert_nothing_left();
    server.abort();
}

#[test]
fn a_daemon_that_dies_before_it_has_told_of_a_dead_shim_leaves_that_to_the_next() {
    let world = fake_world();
    let daemon = world.daemon();
    let (_shim, server) = start_shim(&world, &daemon);
    daemon.create(options("one")).unwrap();
    fs::write(world.bundle("one").join("init.pid"), "77").unwrap();
    // The shim had seen the end of a second process, of which nobody was told.
    let mut journal = Journal::open(&world.bundle("one").join("journal")).unwrap().0;
    let exec = ExitRecord { id: "e".into(), pid: 78, status: 5, seconds: 400, ..ExitRecord::default() };
    let start = |id: &str, pid| Record::Start(StartRecord { id: id.into(), pid, start_time: 1 });
    journal.append(&[start("one", 77), start("e", 78), Record::Exit(exec)]).unwrap();
    end_shim(&world, server);
    eventually_equal(&1, || count(&world, "delete"));
    let before = daemon.collected();
    drop(daemon);
    assert!(before.lock().unwrap().all().is_empty(), "nothing was told yet");
    let daemon = hasty_daemon(&world);
    eventually_equal(&2, || count(&world, "delete"));
    fs::write(world.path("go"), "").unwrap();
    eventually_equal(&1, || daemon.deletions("one"));
    let told = daemon.exits("one");
    assert_eq!(told, [("e".to_owned(), 5), ("one".to_owned(), 9)], "each once, init last");
    eventually_equal(&false, || world.bundle("one").exists());
    world.assert_nothing_left();
    assert_eq!(daemon.exits("one").len(), 2);
}

#[test]
fn a_daemon_that_dies_after_a_deletion_leaves_the_last_events_to_the_next() {
    let mut world = fake_world();
    world.timeouts.shutdown = Duration::from_secs(20);
    let daemon = world.daemon();
    let (shim, server) = start_shim(&world, &daemon);
    daemon.create(options("one")).unwrap();
    // What the shim could not send is in its journal.
    let mut journal = Journal::open(&world.bundle("one").join("journal")).unwrap().0;
    let event = |sequence, topic: &str, event: prost_types::Any| {
        Record::Event(EventRecord {
            sequence,
            seconds: 500,
            nanos: 0,
            namespace: world.namespace.clone(),
            topic: topic.into(),
            type_url: event.type_url,
            value: event.value,
        })
    };
    let deleted = TaskDelete { container_id: "one".into(), pid: 77, exit_status: 3, ..TaskDelete::default() };
    journal
        .append(&[
            event(1, "/tasks/exit", any::pack(&exit_of("one", 3))),
            event(2, "/tasks/delete", any::pack(&deleted)),
        ])
        .unwrap();
    shim.hold("Shutdown");
    let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
    daemon.spawn(async move { tasks.delete(&namespace, "one").await });
    eventually_equal(&1, || shim.count("Shutdown"));
    let before = daemon.collected();
    drop(daemon);
    assert!(before.lock().unwrap().all().is_empty(), "nothing was told yet");
    // The shim of that daemon's time ended as it was told to.
    fs::remove_file(world.path("shim.sock")).unwrap();
    drop(server);
    fs::write(world.path("go"), "").unwrap();
    let daemon = hasty_daemon(&world);
    eventually_equal(&1, || daemon.deletions("one"));
    assert_eq!(daemon.exits("one"), [("one".to_owned(), 3)]);
    world.assert_nothing_left();
    assert_eq!((daemon.exits("one").len(), daemon.deletions("one")), (1, 1));
}

#[test]
fn what_does_not_go_away_is_tried_again_and_holds_up_nobody() {
    let mut world = fake_world();
    // What does not wait for anything is done within that, also where all is slow.
    world.timeouts.cleanup = Duration::from_secs(1);
    let daemon = world.daemon();
    let (_shim, server) = start_shim(&world, &daemon);
    daemon.create(options("one")).unwrap();
    end_shim(&world, server);
    // Longer than any call is kept waiting.
    eventually("it is tried again", || match count(&world, "delete") {
        4.. => Ok(()),
        tries => Err(format!("{tries} tries")),
    });
    assert_eq!(daemon.kill("one", "").unwrap_err().code(), ErrorCode::Unavailable);
    assert_eq!(daemon.create(options("one")).unwrap_err().code(), ErrorCode::AlreadyExists);
    assert!(daemon.events().is_empty(), "nobody knows yet how it ended");
    fs::write(world.path("go"), "").unwrap();
    eventually_equal(&1, || daemon.deletions("one"));
    assert_eq!(daemon.exits("one"), [("one".to_owned(), 9)]);
    world.assert_nothing_left();
}

#[test]
fn a_shim_that_waits_for_a_reader_of_its_log_is_no_silent_one() {
    let world = fake_world();
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    let state = wire::StateResponse { pid: 77, status: WireStatus::Running as i32, ..Default::default() };
    shim.answer("State", Ok(state.encode_to_vec()));
    let socket = LastingSocket::bind(&world.path("shim.sock"));
    let first = daemon.inside(|| socket.serve(&shim));
    daemon.create(options("one")).unwrap();
    // The connection is lost, and the shim answers again when somebody reads what it has to say.
    let held = shim.hold("Connect");
    let log = world.bundle("one").join("log");
    first.abort();
    eventually_equal(&true, || daemon.status("one").is_err() || shim.count("Connect") > 0);
    let opened = std::thread::spawn(move || {
        let writer = fs::OpenOptions::new().write(true).open(log).unwrap();
        held.add_permits(100);
        writer
    });
    let second = daemon.inside(|| socket.serve(&shim));
    eventually_equal(&Some(Status::Running), || daemon.status("one").ok());
    drop(opened.join().unwrap());
    daemon.delete("one").unwrap();
    second.abort();
}

#[test]
fn a_container_that_looks_like_a_shim_is_none() {
    with(own_shim(), |world| {
        let daemon = world.daemon();
        // A shim that fails to start is looked for by the command line that it would have.
        let lost = script(world.folder.path(), "exit 1");
        let inside = world.path("busybox").join(lost.strip_prefix("/").unwrap());
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::write(&inside, "while :; do sleep 1000; done\n").unwrap();
        let flags = ["-namespace", &world.namespace, "-id", "victim"];
        let mut decoy = world.container("decoy", "");
        let spec = decoy.spec.as_mut().unwrap();
        let mut document: serde_json::Value = serde_json::from_slice(&spec.value).unwrap();
        let mut line = vec!["/bin/sh".to_owned(), lost.display().to_string()];
        line.extend(flags.iter().map(|flag| (*flag).to_owned()));
        document["process"]["args"] = serde_json::json!(line);
        spec.value = serde_json::to_vec(&document).unwrap();
        let pid = daemon.run(decoy);
        let wanted = line.join("\0") + "\0";
        eventually_equal(&wanted, || fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap());
        // The same on the host is one that its daemon has lost.
        let program = world.path("loops");
        fs::write(&program, "#!/bin/sh\nwhile :; do sleep 1000; done\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&lost, world.path("failing")).unwrap();
        fs::rename(&program, &lost).unwrap();
        let mut left = Command::new(&lost).args(flags).stdout(Stdio::null()).spawn().unwrap();
        fs::rename(world.path("failing"), &lost).unwrap();
        let victim =
            CreateOptions { runtime: lost.display().to_string(), ..world.container("victim", "true") };
        daemon.create(victim).unwrap_err();
        left.wait().unwrap();
        assert!(alive(pid));
        assert_eq!(daemon.status("decoy").unwrap(), Status::Running);
        daemon.kill("decoy", "").unwrap();
        daemon.wait("decoy", "").unwrap();
        daemon.delete("decoy").unwrap();
        world.assert_nothing_left();
    });
}

#[test]
fn a_shim_whose_start_is_killed_behind_its_fork_is_found_and_ended() {
    if !Path::new("/usr/bin/strace").exists() {
        eprintln!("skipped: needs strace (apt-get install strace)");
        return;
    }
    with(own_shim(), |mut world| {
        // Between its fork and the address that it prints, `start` removes an old address: there it is killed. What it has
        // forked is not traced.
        let own = world.shim.display().to_string();
        world.shim = script(
            world.folder.path(),
            &format!(
                "case $action in\n\
                 start) exec strace -qq -o /dev/null -e trace=unlink --inject=unlink:signal=KILL {own} \"$@\" ;;\n\
                 *) exec {own} \"$@\" ;;\n\
                 esac"
            ),
        );
        let daemon = world.daemon();
        let begun = SystemTime::now();
        let error = daemon.create(world.container("one", "sleep 1000")).unwrap_err();
        assert!(error.to_string().contains("failed to start shim"), "{error}");
        assert!(begun.elapsed().unwrap() < crate::world::PATIENCE);
        world.assert_nothing_left();
        assert!(!daemon.tasks.exists(&daemon.namespace, "one"));
    });
}
