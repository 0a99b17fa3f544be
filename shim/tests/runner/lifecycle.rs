//! Create, start, exec, kill, delete: states, exit statuses, the order of events, and errors.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use davit_model::ErrorCode;
use davit_proto::containerd::task::v3::{
    DeleteRequest, DeleteResponse, KillRequest, PauseRequest, PidsRequest, PidsResponse, ResumeRequest,
    StateRequest, StateResponse, WaitRequest, WaitResponse,
};
use davit_proto::containerd::v1::types::Status;
use davit_shim_protocol::frame::{self, Decoder, Received};
use prost::Message;

use crate::support::{Client, Host, PATIENCE, cannot_run, children, eventually};

#[test]
fn a_container_lives_and_dies() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "exit 3", |_| ());
    let client = host.start(&bundle);
    let shim = client.connect_call(&bundle.id).shim_pid;
    let pid = client.create(&host.create_request(&bundle)).unwrap();
    let state = client.state(&bundle.id, "").unwrap();
    assert_eq!((state.status(), state.pid), (Status::Created, pid));
    assert_eq!(client.start(&bundle.id, "").unwrap(), pid);
    let waited = client.wait(&bundle.id, "").unwrap();
    assert_eq!(waited.exit_status, 3);
    let state = client.state(&bundle.id, "").unwrap();
    assert_eq!((state.status(), state.exit_status, state.exited_at), (Status::Stopped, 3, waited.exited_at));
    // Whoever asks late learns the same.
    assert_eq!(client.wait(&bundle.id, "").unwrap(), waited);
    let deleted = client.delete(&bundle.id, "").unwrap();
    assert_eq!((deleted.exit_status, deleted.pid, deleted.exited_at), (3, pid, waited.exited_at));
    assert_eq!(client.state(&bundle.id, "").unwrap_err().message, "container not created: not found");
    assert_eq!(events.until("delete"), ["create", "start box", "exit box 3", "delete"]);
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id));
    client.shutdown();
    eventually("the shim ends", || !Path::new(&format!("/proc/{shim}/root")).exists());
    assert!(!client.socket().exists());
}

#[test]
fn signals_become_statuses() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    client.kill(&bundle.id, "", 9).unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 137);
    let error = client.kill(&bundle.id, "", 9).unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::NotFound, "process already finished: not found")
    );
    client.finish(&bundle.id);
}

#[test]
fn execs_run_beside_each_other() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    std::thread::scope(|scope| {
        for number in 0..8u32 {
            let (client, id) = (client.again(), bundle.id.clone());
            scope.spawn(move || {
                let exec = format!("e{number}");
                client.exec(&id, &exec, &format!("exit {number}")).unwrap();
                let pid = client.start(&id, &exec).unwrap();
                assert_eq!(client.wait(&id, &exec).unwrap().exit_status, number);
                let deleted = client.delete(&id, &exec).unwrap();
                assert_eq!((deleted.exit_status, deleted.pid), (number, pid));
                let error = client.state(&id, &exec).unwrap_err();
                assert_eq!(error.code, ErrorCode::NotFound);
            });
        }
    });
    client.finish(&bundle.id);
    let events = events.until("delete");
    for number in 0..8 {
        let position = |event: String| events.iter().position(|other| *other == event).unwrap();
        let started = position(format!("exec-started e{number}"));
        assert!(started < position(format!("exit e{number} {number}")), "{events:?}");
    }
}

#[test]
fn a_start_is_published_before_its_exit() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "true", |_| ());
    let client = host.start(&bundle);
    for _ in 0..10 {
        client.create(&host.create_request(&bundle)).unwrap();
        client.start(&bundle.id, "").unwrap();
        client.wait(&bundle.id, "").unwrap();
        client.delete(&bundle.id, "").unwrap();
    }
    client.shutdown();
    eventually("all events arrive", || events.list().len() == 40);
    for life in events.list().chunks(4) {
        assert_eq!(life, ["create", "start box", "exit box 0", "delete"]);
    }
}

#[test]
fn the_exit_of_init_is_the_last() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    for exec in ["e1", "e2", "e3"] {
        client.exec(&bundle.id, exec, "sleep 1000").unwrap();
        client.start(&bundle.id, exec).unwrap();
    }
    client.exec(&bundle.id, "late", "true").unwrap();
    client.kill(&bundle.id, "", 9).unwrap();
    client.wait(&bundle.id, "").unwrap();
    let error = client.start(&bundle.id, "late").unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert!(error.message.ends_with("init process is not running: failed precondition"), "{error}");
    for exec in ["e1", "e2", "e3"] {
        assert_eq!(client.wait(&bundle.id, exec).unwrap().exit_status, 137);
    }
    let events = events.until("exit box 137");
    assert_eq!(events.last().unwrap(), "exit box 137");
    assert_eq!(events.iter().filter(|event| event.starts_with("exit e")).count(), 3);
    client.finish(&bundle.id);
}

#[test]
fn a_shared_pid_namespace_is_cleaned_up() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "sleep 1000 & sleep 1000 & exit 5", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
    });
    let client = host.start(&bundle);
    client.create(&host.create_request(&bundle)).unwrap();
    client.exec(&bundle.id, "e1", "sleep 1000").unwrap();
    client.start(&bundle.id, "e1").unwrap();
    client.start(&bundle.id, "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 5);
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exit_status, 137);
    client.delete(&bundle.id, "").unwrap();
    client.shutdown();
    let events = events.until("delete");
    assert_eq!(events[events.len() - 3..], ["exit e1 137", "exit box 5", "delete"]);
}

#[test]
fn a_paused_container_can_go_on_or_die() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let id = bundle.id.clone();
    client.create(&host.create_request(&bundle)).unwrap();
    let pause = PauseRequest { id: id.clone() };
    let error = client.act("Pause", &pause).unwrap_err();
    assert_eq!(error.message, "cannot pause a created container: failed precondition");
    client.start(&id, "").unwrap();
    client.act("Pause", &pause).unwrap();
    assert_eq!(client.state(&id, "").unwrap().status(), Status::Paused);
    assert_eq!(client.exec(&id, "e1", "true").unwrap_err().code, ErrorCode::FailedPrecondition);
    client.act("Resume", &ResumeRequest { id: id.clone() }).unwrap();
    assert_eq!(client.state(&id, "").unwrap().status(), Status::Running);
    client.act("Pause", &pause).unwrap();
    client.act("Resume", &ResumeRequest { id: id.clone() }).unwrap();
    client.finish(&id);
    let expected =
        ["create", "start box", "paused", "resumed", "paused", "resumed", "exit box 137", "delete"];
    assert_eq!(events.until("delete"), expected);
}

#[test]
fn what_was_never_started_can_be_deleted() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let events = host.receive_events();
    let bundle = host.bundle("box", "true", |_| ());
    let client = host.start(&bundle);
    client.create(&host.create_request(&bundle)).unwrap();
    client.exec(&bundle.id, "e1", "true").unwrap();
    client.delete(&bundle.id, "e1").unwrap();
    assert_eq!(client.delete(&bundle.id, "").unwrap().exit_status, 137);
    client.shutdown();
    assert_eq!(events.until("delete"), ["create", "exec-added", "exit box 137", "delete"]);
}

#[test]
fn kill_reaches_all_processes() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000 & wait", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    client.exec(&bundle.id, "e1", "sleep 1000").unwrap();
    let error = client.kill(&bundle.id, "e1", 9).unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::FailedPrecondition, "process not created: failed precondition")
    );
    client.start(&bundle.id, "e1").unwrap();
    let all = KillRequest { id: bundle.id.clone(), exec_id: String::new(), signal: 9, all: true };
    client.act("Kill", &all).unwrap();
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exit_status, 137);
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 137);
    client.finish(&bundle.id);
}

#[test]
fn an_exec_is_signalled_alone() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    client.exec(&bundle.id, "e1", "exec sleep 1000").unwrap();
    client.start(&bundle.id, "e1").unwrap();
    client.kill(&bundle.id, "e1", 15).unwrap();
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exit_status, 143);
    assert_eq!(client.kill(&bundle.id, "e1", 15).unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(client.state(&bundle.id, "").unwrap().status(), Status::Running);
    client.finish(&bundle.id);
}

#[test]
fn wrong_requests_get_the_errors_that_clients_know() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let id = bundle.id.as_str();
    let error = client.start("nobody", "").unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::NotFound, "container not created: not found")
    );
    let mut request = host.create_request(&bundle);
    request.id = "../escape".to_owned();
    assert_eq!(client.create(&request).unwrap_err().code, ErrorCode::InvalidArgument);
    request = host.create_request(&bundle);
    request.options.as_mut().unwrap().type_url = "some.other.Options".to_owned();
    assert_eq!(client.create(&request).unwrap_err().code, ErrorCode::InvalidArgument);
    client.create(&host.create_request(&bundle)).unwrap();
    assert_eq!(client.create(&host.create_request(&bundle)).unwrap_err().code, ErrorCode::AlreadyExists);
    client.start(id, "").unwrap();
    for (error, text) in [
        (client.start(id, "").unwrap_err(), "cannot start a running process: failed precondition"),
        (client.delete(id, "").unwrap_err(), "cannot delete a running process: failed precondition"),
    ] {
        assert_eq!((error.code, error.message.as_str()), (ErrorCode::FailedPrecondition, text));
    }
    assert_eq!(client.start(id, "nothing").unwrap_err().message, "process does not exist nothing: not found");
    client.exec(id, "e1", "true").unwrap();
    let error = client.exec(id, "e1", "true").unwrap_err();
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::AlreadyExists, "id e1: already exists"));
    assert_eq!(client.exec(id, "a/b", "true").unwrap_err().code, ErrorCode::InvalidArgument);
    assert_eq!(client.act("Frobnicate", &()).unwrap_err().code, ErrorCode::Unimplemented);
    let state: Result<StateResponse, _> = client.call_version(
        "containerd.runtime.sandbox.v1.Sandbox",
        "PingSandbox",
        &StateRequest::default(),
        None,
    );
    assert_eq!(state.unwrap_err().code, ErrorCode::Unimplemented);
    // Both versions of the service answer.
    let request = StateRequest { id: id.to_owned(), exec_id: String::new() };
    let state: StateResponse =
        client.call_version("containerd.task.v2.Task", "State", &request, None).unwrap();
    assert_eq!(state.status(), Status::Running);
    client.finish(id);
}

#[test]
fn no_exec_can_take_the_place_of_init() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let id = bundle.id.as_str();
    let pid = client.create(&host.create_request(&bundle)).unwrap();
    client.start(id, "").unwrap();
    assert_eq!(client.exec(id, id, "true").unwrap_err().code, ErrorCode::AlreadyExists);
    client.exec(id, "init", "true").unwrap();
    assert_ne!(client.start(id, "init").unwrap(), pid);
    let noted = || std::fs::read_to_string(bundle.path.join("init.pid")).unwrap();
    assert_eq!(noted(), pid.to_string());
    client.wait(id, "init").unwrap();
    client.delete(id, "init").unwrap();
    assert_eq!(noted(), pid.to_string());
    client.finish(id);
}

#[test]
fn who_waits_for_an_exec_that_never_starts_is_told() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let id = bundle.id.as_str();
    client.exec(id, "e", "true").unwrap();
    // On one connection, so that the shim has the first call when it carries out the second.
    let mut stream = std::os::unix::net::UnixStream::connect(client.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let wait = WaitRequest { id: id.to_owned(), exec_id: "e".to_owned() }.encode_to_vec();
    let delete = DeleteRequest { id: id.to_owned(), exec_id: "e".to_owned() }.encode_to_vec();
    for (number, method, request) in [(1, "Wait", wait), (3, "Delete", delete)] {
        let request = frame::request("containerd.task.v3.Task", method, request, None, &[]);
        stream.write_all(&frame::encode_request(number, &request).unwrap()).unwrap();
    }
    let mut decoder = Decoder::new();
    let mut waited = None;
    while waited.is_none() {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).unwrap();
        decoder.feed(&buffer[..count]);
        while let Some(Received::Frame(frame)) = decoder.next_frame() {
            let reply = frame::decode_response(&frame.payload).unwrap();
            waited = waited.or((frame.stream == 1).then_some(reply));
        }
    }
    assert_eq!(WaitResponse::decode(&*waited.unwrap()).unwrap().exit_status, 255);
    client.finish(id);
}

#[test]
fn an_exec_that_is_being_started_cannot_be_deleted() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let (begun, go) = (host.path("begun"), host.path("go"));
    let slow = format!(
        "#!/bin/sh\ncase \" $* \" in *' exec '*) : > {}; while [ ! -e {} ]; do sleep 0.01; done ;; esac\n\
         exec {} \"$@\"\n",
        begun.display(),
        go.display(),
        Some(host.options().binary_name).filter(|name| !name.is_empty()).unwrap_or("runc".to_owned()),
    );
    let slow = host.script("slow", &slow);
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let id = bundle.id.as_str();
    let request = host.create_request_by(&bundle, &slow);
    client.create(&request).unwrap();
    client.start(id, "").unwrap();
    client.exec(id, "e1", "exec sleep 1000").unwrap();
    std::thread::scope(|scope| {
        let starting = client.again();
        let started = scope.spawn(move || starting.start(id, "e1"));
        eventually("the runtime to be called", || begun.exists());
        let request = DeleteRequest { id: id.to_owned(), exec_id: "e1".to_owned() };
        let short = Some(Duration::from_millis(100));
        let deleted: Result<DeleteResponse, _> =
            client.call_version("containerd.task.v3.Task", "Delete", &request, short);
        assert_eq!(deleted.unwrap_err().code, ErrorCode::DeadlineExceeded);
        std::fs::write(&go, "").unwrap();
        started.join().unwrap().unwrap();
    });
    assert_eq!(client.state(id, "e1").unwrap().status(), Status::Running);
    client.kill(id, "e1", 9).unwrap();
    client.wait(id, "e1").unwrap();
    client.delete(id, "e1").unwrap();
    client.finish(id);
}

/// A runtime that is at an exec when init dies may say itself what that means; one that says nothing is cut short. The exit of
/// init waits for neither for long.
#[test]
fn a_runtime_has_the_last_word_on_its_exec() {
    if cannot_run() {
        return;
    }
    /// What a runtime is given for that.
    const LAST_WORDS: Duration = Duration::from_secs(2);
    for patient in [true, false] {
        let host = Host::new();
        let (begun, go) = (host.path("begun"), host.path("go"));
        let runtime = format!(
            "#!/bin/sh\ncase \" $* \" in *' exec '*) : > {}; while [ ! -e {} ]; do sleep 0.01; done ;; esac\n\
             exec {} \"$@\"\n",
            begun.display(),
            go.display(),
            Some(host.options().binary_name).filter(|name| !name.is_empty()).unwrap_or("runc".to_owned()),
        );
        let runtime = host.script("runtime", &runtime);
        let bundle = host.bundle("box", "sleep 1000", |_| ());
        let client = host.start(&bundle);
        let id = bundle.id.as_str();
        client.create(&host.create_request_by(&bundle, &runtime)).unwrap();
        client.start(id, "").unwrap();
        client.exec(id, "late", "exec sleep 1000").unwrap();
        client.exec(id, "later", "exec sleep 1000").unwrap();
        std::thread::scope(|scope| {
            let starting = client.again();
            let late = scope.spawn(move || starting.start(id, "late"));
            eventually("the runtime to be called", || begun.exists());
            let killed = Instant::now();
            client.kill(id, "", 9).unwrap();
            // What has not begun does not begin any more.
            let mut later = None;
            eventually("the shim to see the end of init", || {
                later = client
                    .start(id, "later")
                    .err()
                    .filter(|error| error.code == ErrorCode::FailedPrecondition);
                later.is_some()
            });
            if patient {
                std::fs::write(&go, "").unwrap();
            }
            let error = late.join().unwrap().unwrap_err();
            let cut_short = error.message.contains("init process is not running");
            // On a machine that is so slow a runtime may be too late although it does not wait.
            let in_time = killed.elapsed() < LAST_WORDS;
            assert!(if patient { !cut_short || !in_time } else { cut_short }, "{error}");
        });
        assert_eq!(client.wait(id, "").unwrap().exit_status, 137);
        for exec in ["late", "later"] {
            assert_eq!(client.state(id, exec).unwrap().status(), Status::Created);
            client.delete(id, exec).unwrap();
        }
        client.finish(id);
    }
}

#[test]
fn a_deadline_ends_the_waiting_alone() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let request = StateRequest { id: bundle.id.clone(), exec_id: String::new() };
    let short = Some(Duration::from_millis(20));
    let waited: Result<(), _> = client.call_version("containerd.task.v3.Task", "Wait", &request, short);
    assert_eq!(waited.unwrap_err().code, ErrorCode::DeadlineExceeded);
    client.finish(&bundle.id);
}

#[test]
fn the_words_of_the_runtime_reach_the_client() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "", |config| {
        config["process"]["args"] = serde_json::json!(["no-such-program"]);
    });
    let client = host.start(&bundle);
    let error = client.create(&host.create_request(&bundle)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unknown);
    assert!(error.message.starts_with("OCI runtime create failed: "), "{error}");
    assert!(error.message.contains("executable file not found in $PATH"), "{error}");
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id));
    // The id is free again.
    assert_eq!(client.create(&host.create_request(&bundle)).unwrap_err().code, ErrorCode::Unknown);
    client.shutdown();
}

#[test]
fn runtimes_that_misbehave_are_explained() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let silent = host.script("silent", "#!/bin/sh\nexit 9\n");
    let loud = host.script("loud", "#!/bin/sh\necho no luck at all >&2\nexit 1\n");
    let logging = host.script(
        "logging",
        "#!/bin/sh\nwhile [ \"$1\" != --log ]; do shift; done\n\
         echo '{\"level\":\"error\",\"msg\":\"deep reason\",\"time\":\"t\"}' >> \"$2\"\nexit 1\n",
    );
    let absent = host.path("absent");
    let bundle = host.bundle("box", "true", |_| ());
    let client = host.start(&bundle);
    for (binary, expected) in [
        (&silent, "did not terminate successfully: exit status 9"),
        (&loud, "did not terminate successfully: exit status 1"),
        (&logging, "OCI runtime create failed: deep reason"),
        (&absent, "executable file not found in $PATH"),
    ] {
        let request = host.create_request_by(&bundle, binary);
        let error = client.create(&request).unwrap_err();
        assert!(error.message.ends_with(expected), "{error}");
    }
    client.shutdown();
}

#[test]
fn a_failed_exec_is_explained_and_can_be_deleted() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let mut request = Client::exec_request(&bundle.id, "e1", "");
    request.spec.as_mut().unwrap().value =
        br#"{"args":["no-such-program"],"cwd":"/","env":["PATH=/bin"],"user":{"uid":0,"gid":0}}"#.to_vec();
    client.act("Exec", &request).unwrap();
    let error = client.start(&bundle.id, "e1").unwrap_err();
    assert!(error.message.starts_with("OCI runtime exec failed: "), "{error}");
    assert!(error.message.contains("executable file not found in $PATH"), "{error}");
    // Nobody waits for ever, and init does not wait for it either.
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exited_at, None);
    client.delete(&bundle.id, "e1").unwrap();
    request.spec.as_mut().unwrap().value = b"no json".to_vec();
    assert_eq!(client.act("Exec", &request).unwrap_err().code, ErrorCode::InvalidArgument);
    client.finish(&bundle.id);
}

#[test]
fn signals_of_operators_do_not_end_the_shim() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let shim = nix::unistd::Pid::from_raw(client.connect_call(&bundle.id).shim_pid as i32);
    client.create(&host.create_request(&bundle)).unwrap();
    client.start(&bundle.id, "").unwrap();
    use nix::sys::signal::{Signal, kill};
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGPIPE] {
        kill(shim, signal).unwrap();
    }
    assert_eq!(client.state(&bundle.id, "").unwrap().status(), Status::Running);
    // What the shim ignores, the container does not.
    client.exec(&bundle.id, "e1", "kill -TERM $$").unwrap();
    client.start(&bundle.id, "e1").unwrap();
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exit_status, 143);
    client.finish(&bundle.id);
}

/// Whoever is told of the end of a container that shares the pid namespace of its host finds nothing of it running.
#[test]
fn an_end_is_told_when_all_is_gone() {
    if cannot_run() {
        return;
    }
    /// So long the end of what was killed is waited for.
    const LAST_BREATH: Duration = Duration::from_secs(1);
    let host = Host::new();
    for _ in 0..5 {
        let script = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; while :; do :; done";
        let bundle = host.bundle("box", script, |config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "pid");
        });
        let client = host.launch(&bundle, &host.create_request(&bundle));
        let request = PidsRequest { id: bundle.id.clone() };
        let pids = || {
            let pids: PidsResponse = client.call("Pids", &request).unwrap();
            pids.processes.into_iter().map(|process| process.pid).collect::<Vec<_>>()
        };
        eventually("all processes are there", || pids().len() == 9);
        let pids = pids();
        let killed = Instant::now();
        client.kill(&bundle.id, "", 9).unwrap();
        client.wait(&bundle.id, "").unwrap();
        // A zombie has no command line any more, and whoever looks for programs does not see it.
        let line = |pid: &u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let left: Vec<_> = pids.iter().map(line).filter(|line| !line.is_empty()).collect();
        // What a machine that is so slow has not ended in that time is waited for no longer.
        assert!(left.is_empty() || killed.elapsed() >= LAST_BREATH, "{left:?}");
        client.finish(&bundle.id);
    }
}

#[test]
fn the_shim_is_one_thread_and_leaves_no_zombies() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "(sleep 0.01 &); (sleep 0.02 &); sleep 1000", |config| {
        // Orphans of a shared pid namespace come to the shim.
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
    });
    let client = host.start(&bundle);
    let shim = client.connect_call(&bundle.id).shim_pid;
    let pid = client.create(&host.create_request(&bundle)).unwrap();
    client.start(&bundle.id, "").unwrap();
    client.exec(&bundle.id, "e1", "(sleep 0.01 &); true").unwrap();
    client.start(&bundle.id, "e1").unwrap();
    client.wait(&bundle.id, "e1").unwrap();
    assert_eq!(std::fs::read_dir(format!("/proc/{shim}/task")).unwrap().count(), 1);
    eventually("only init is left", || children(shim) == [pid]);
    client.finish(&bundle.id);
}
