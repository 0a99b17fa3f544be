//! A running shim executes other builds of itself, and nothing is lost.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use davit_model::ErrorCode;
use davit_proto::containerd::task::v3::{StateRequest, WaitRequest, WaitResponse};
use davit_proto::davit::shim::v1::{StatusRequest, StatusResponse, UpgradeRequest, UpgradeResponse};
use davit_shim_protocol::frame::{self, Decoder, Received, RpcError};
use davit_shim_protocol::journal;
use prost::Message;

use crate::support::{Client, Host, PATIENCE, SHIM, TASK, cannot_run, eventually};

const SERVICE: &str = "davit.shim.v1.Shim";
pub(crate) const NAME: &str = "containerd-shim-davit-v2";

/// Programs to upgrade to, in a folder that only root can write to.
pub(crate) struct Programs {
    pub(crate) folder: tempfile::TempDir,
}

impl Programs {
    pub(crate) fn new() -> Programs {
        let folder = tempfile::Builder::new().prefix("davit-upgrade").tempdir_in("/var/lib").unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Programs { folder }
    }

    /// A copy of a program, in a folder of its own.
    pub(crate) fn copy(&self, name: &str, of: &Path) -> PathBuf {
        let bytes = std::fs::read(of).unwrap_or_else(|error| panic!("{}: {error}", of.display()));
        self.write(name, &bytes)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Two builds of the shim.
    pub(crate) fn builds(&self) -> [PathBuf; 2] {
        let first = self.copy(&format!("first/{NAME}"), Path::new(SHIM));
        [first, self.copy(&format!("second/{NAME}"), other_build())]
    }
}

/// Another build of the shim, the example of this crate unless the environment names one. Tests of a single target do not
/// build examples, so it is built if it is missing or old.
fn other_build() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(named) = std::env::var_os("DAVIT_TEST_OTHER_SHIM") {
            return PathBuf::from(named);
        }
        let folder = Path::new(SHIM).parent().unwrap();
        let example = folder.join("examples/other_build");
        let modified = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        if modified(&example) < modified(Path::new(SHIM)) {
            let profile = folder.file_name().unwrap().to_str().unwrap();
            let status = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "--package", "davit-shim", "--example", "other_build"])
                .args(["--profile", if profile == "debug" { "dev" } else { profile }])
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .status()
                .unwrap();
            assert!(status.success());
        }
        example
    })
}

impl Client {
    pub(crate) fn upgrade(&self, binary: &Path) -> Result<UpgradeResponse, RpcError> {
        let request = UpgradeRequest { binary: binary.display().to_string() };
        self.call_version(SERVICE, "Upgrade", &request, None)
    }

    pub(crate) fn status(&self) -> StatusResponse {
        self.call_version(SERVICE, "Status", &StatusRequest {}, None).unwrap()
    }
}

pub(crate) fn executed_by(pid: u32) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

/// Waits for the end of a process in a thread, over a connection of its own. The shim waits already when this is back: calls of
/// one connection are begun in their order, and the next one has its answer, whatever it is.
pub(crate) fn wait_in_thread(
    client: &Client,
    id: &str,
    exec_id: &str,
) -> std::thread::JoinHandle<WaitResponse> {
    let client = client.again();
    let request = WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
    let number = client.send(TASK, "Wait", &request, None);
    let _ = client.state(id, "");
    std::thread::spawn(move || client.receive(number).unwrap())
}

/// Reads lines that count up from zero, until their end; returns how many there were, and the longest wait for one.
fn count_lines(path: &str) -> std::thread::JoinHandle<(u64, Duration)> {
    let path = path.to_owned();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(std::fs::File::open(path).unwrap());
        let (mut line, mut expected, mut longest) = (String::new(), 0u64, Duration::ZERO);
        loop {
            line.clear();
            let begun = Instant::now();
            if lines.read_line(&mut line).unwrap() == 0 || !line.ends_with('\n') {
                return (expected, longest);
            }
            if expected > 0 {
                longest = longest.max(begun.elapsed());
            }
            assert_eq!(line.trim_end().parse(), Ok(expected), "a line is missing, doubled or torn");
            expected += 1;
        }
    })
}

#[test]
fn two_hundred_upgrades_lose_nothing() {
    if cannot_run() {
        return;
    }
    let rounds = std::env::var("DAVIT_TEST_UPGRADES").ok().and_then(|rounds| rounds.parse().ok());
    let rounds: usize = rounds.unwrap_or(200);
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let events = host.receive_events();
    let bundle = host.bundle("box", "i=0; while :; do echo $i; i=$((i+1)); done", |_| ());
    let output = host.fifo("out");
    let lines = count_lines(&output);
    let client = host.start(&bundle);
    let mut request = host.create_request(&bundle);
    request.stdout = output;
    let init = client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    let ended = wait_in_thread(&client, &bundle.id, "");
    let before = client.status();
    assert_eq!((before.upgrades, before.containers.len()), (0, 1));
    let done = AtomicBool::new(false);
    let execs = std::thread::scope(|scope| {
        let executing = scope.spawn(|| {
            let client = client.again();
            let mut count = 0;
            while !done.load(Ordering::SeqCst) {
                let (exec, code) = (format!("e{count}"), count % 200);
                client.exec(&bundle.id, &exec, &format!("exit {code}")).unwrap();
                // Half of them are waited for from before their start, half of them after their end.
                let waiting = (count % 2 == 0).then(|| wait_in_thread(&client, &bundle.id, &exec));
                client.start(&bundle.id, &exec).unwrap();
                let ended = match waiting {
                    Some(waiting) => waiting.join().unwrap(),
                    None => client.wait(&bundle.id, &exec).unwrap(),
                };
                assert_eq!(ended.exit_status, code);
                client.delete(&bundle.id, &exec).unwrap();
                count += 1;
            }
            count
        });
        // Whatever fails in here, the thread above must end.
        let stop = scopeguard(&done);
        let mut times = Vec::new();
        for round in 0..rounds {
            let build = &builds[round % 2];
            let begun = Instant::now();
            let upgraded = client.upgrade(build).unwrap_or_else(|error| panic!("round {round}: {error}"));
            times.push(begun.elapsed());
            let [was, is] = [upgraded.before, upgraded.after].map(Option::unwrap);
            assert_eq!(Path::new(&is.path), build);
            assert_ne!(was.path, is.path);
            if round > 0 {
                assert_ne!(was.build, is.build);
            }
            assert_eq!(&executed_by(before.pid), build);
        }
        drop(stop);
        times.sort_unstable();
        eprintln!("an upgrade takes {:?}, at most {:?}", times[rounds / 2], times[rounds - 1]);
        executing.join().unwrap()
    });
    assert!(execs > 0);
    let status = client.status();
    assert_eq!((status.pid, status.upgrades), (before.pid, rounds as u64));
    assert_eq!(status.containers[0].processes[0].pid, init);
    client.kill(&bundle.id, "", 9).unwrap();
    assert_eq!(ended.join().unwrap().exit_status, 137);
    client.delete(&bundle.id, "").unwrap();
    let (lines, longest) = lines.join().unwrap();
    assert!(lines > 0);
    client.shutdown();
    let told = events.until("delete");
    for exec in 0..execs {
        let exit = format!("exit e{exec} {}", exec % 200);
        assert_eq!(told.iter().filter(|event| **event == exit).count(), 1, "{exit}");
    }
    let exits: Vec<&String> = told.iter().filter(|event| event.starts_with("exit ")).collect();
    assert_eq!(exits.len(), execs as usize + 1, "told twice");
    eprintln!("{rounds} upgrades, {execs} execs, {lines} lines, the longest pause of output {longest:?}");
}

/// Sets a flag at the end of a scope, also if that is a panic.
fn scopeguard(flag: &AtomicBool) -> impl Drop + '_ {
    struct Guard<'a>(&'a AtomicBool);
    impl Drop for Guard<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    Guard(flag)
}

/// A connection on which calls are open at the same time.
struct Raw {
    stream: UnixStream,
    decoder: Decoder,
}

impl Raw {
    fn connect(path: &Path) -> Raw {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Raw { stream, decoder: Decoder::new() }
    }

    /// The stream and the result of the next call that is answered.
    fn next(&mut self) -> (u32, Result<Vec<u8>, RpcError>) {
        loop {
            match self.decoder.next_frame() {
                Some(Received::Frame(frame)) => {
                    return (frame.stream, frame::decode_response(&frame.payload));
                }
                Some(other) => panic!("{other:?}"),
                None => {
                    let mut buffer = [0; 4096];
                    let count = self.stream.read(&mut buffer).unwrap();
                    assert_ne!(count, 0, "the shim closed the connection");
                    self.decoder.feed(&buffer[..count]);
                }
            }
        }
    }
}

fn task_frame(stream: u32, method: &str, request: &impl Message, timeout: Option<Duration>) -> Vec<u8> {
    let service = "containerd.task.v3.Task";
    let request = frame::request(service, method, request.encode_to_vec(), timeout, &[]);
    frame::encode_request(stream, &request).unwrap()
}

#[test]
fn open_calls_and_half_frames_go_on() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let mut raw = Raw::connect(client.socket());
    let wait = WaitRequest { id: bundle.id.clone(), ..WaitRequest::default() };
    let state = StateRequest { id: bundle.id.clone(), ..StateRequest::default() };
    // One that waits for ever, one that gives up after some upgrades, and the better half of a third.
    raw.stream.write_all(&task_frame(1, "Wait", &wait, None)).unwrap();
    raw.stream.write_all(&task_frame(3, "Wait", &wait, Some(Duration::from_millis(1500)))).unwrap();
    let half = task_frame(5, "State", &state, None);
    let (first, second) = half.split_at(half.len() / 2);
    raw.stream.write_all(first).unwrap();
    // The whole of a call that is answered tells that all before it has been read.
    for round in 0..4 {
        client.upgrade(&builds[round % 2]).unwrap();
    }
    raw.stream.write_all(second).unwrap();
    // Where all is slow the time of the one is over before the other is asked.
    let mut answers = [raw.next(), raw.next()];
    answers.sort_by_key(|(stream, _)| *stream);
    let [(3, given_up), (5, Ok(_))] = answers else { panic!("{answers:?}") };
    assert_eq!(given_up.unwrap_err().code, ErrorCode::DeadlineExceeded);

    // Requests behind that of the upgrade are read by the next program, and so is what a client leaves unread.
    let upgrade = UpgradeRequest { binary: builds[0].display().to_string() };
    let upgrade = frame::request(SERVICE, "Upgrade", upgrade.encode_to_vec(), None, &[]);
    let mut bytes = frame::encode_request(7, &upgrade).unwrap();
    for stream in 0..200 {
        bytes.extend(task_frame(9 + 2 * stream, "State", &state, None));
    }
    raw.stream.write_all(&bytes).unwrap();
    let mut answered: Vec<u32> = (0..201)
        .map(|_| {
            let (stream, result) = raw.next();
            result.unwrap();
            stream
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..201).map(|call| 7 + 2 * call).collect::<Vec<_>>());

    client.kill(&bundle.id, "", 15).unwrap();
    client.kill(&bundle.id, "", 9).unwrap();
    let (stream, ended) = raw.next();
    assert_eq!((stream, WaitResponse::decode(&*ended.unwrap()).unwrap().exit_status), (1, 137));
    client.finish(&bundle.id);
}

#[test]
fn an_upgrade_without_a_daemon_keeps_what_it_has_to_tell() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    client.create(&host.create_request(&bundle)).unwrap();
    client.upgrade(&builds[0]).unwrap();
    client.start(&bundle.id, "").unwrap();
    for (round, exec) in ["e1", "e2", "e3"].iter().enumerate() {
        client.exec(&bundle.id, exec, &format!("exit {round}")).unwrap();
        // Between its registration and its start, and again after its end.
        client.upgrade(&builds[(round + 1) % 2]).unwrap();
        client.start(&bundle.id, exec).unwrap();
        assert_eq!(client.wait(&bundle.id, exec).unwrap().exit_status, round as u32);
        client.upgrade(&builds[round % 2]).unwrap();
        assert_eq!(client.state(&bundle.id, exec).unwrap().exit_status, round as u32);
    }
    client.delete(&bundle.id, "e1").unwrap();
    client.kill(&bundle.id, "", 9).unwrap();
    client.wait(&bundle.id, "").unwrap();
    client.upgrade(&builds[1]).unwrap();
    client.delete(&bundle.id, "").unwrap();
    // Of the container nothing is left but its events.
    client.upgrade(&builds[0]).unwrap();
    assert_eq!(client.status().containers, []);
    let recorded = journal::read(&bundle.path.join(journal::FILE_NAME)).unwrap();
    assert_eq!(recorded.unsent.len() as u64, client.status().unsent_events);

    let events = host.receive_events();
    let again = client.again();
    let mut expected = vec!["create".to_owned(), "start box".to_owned()];
    for (round, exec) in ["e1", "e2", "e3"].iter().enumerate() {
        let of_exec =
            ["exec-added".to_owned(), format!("exec-started {exec}"), format!("exit {exec} {round}")];
        expected.extend(of_exec);
    }
    expected.extend(["exit box 137".to_owned(), "delete".to_owned()]);
    assert_eq!(events.until("delete"), expected);
    again.shutdown();
}

#[test]
fn running_out_of_memory_is_still_told() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let events = host.receive_events();
    let script = "while [ ! -e /host/go ]; do sleep 0.01; done; exec tail /dev/zero";
    let bundle = host.bundle("box", script, |config| {
        config["linux"]["resources"] = serde_json::json!({"memory": {"limit": 16 << 20}});
        config["mounts"].as_array_mut().unwrap().push(serde_json::json!(
            {"destination": "/dev/zero", "type": "bind", "source": "/dev/zero", "options": ["bind"]}
        ));
    });
    let client = host.launch(&bundle, &host.create_request(&bundle));
    for round in 0..3 {
        client.upgrade(&builds[round % 2]).unwrap();
    }
    assert!(!events.list().contains(&"oom".to_owned()), "the new program has to know what was told");
    std::fs::write(host.path("go"), "").unwrap();
    // It may happen in the middle of one.
    while client.state(&bundle.id, "").unwrap().exited_at.is_none() {
        client.upgrade(&builds[1]).unwrap();
    }
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 137);
    let told = events.until("exit box 137");
    let position = |wanted: &str| told.iter().position(|event| event == wanted);
    assert!(position("oom").is_some_and(|oom| oom < position("exit box 137").unwrap()), "{told:?}");
    client.finish(&bundle.id);
}

#[test]
fn an_upgrade_waits_for_calls_but_not_for_ever() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let hold = host.path("hold");
    // A runtime whose kill lasts as long as there is a file.
    let runtime = host.script(
        "slow",
        &format!(
            "#!/bin/sh\ncase \" $* \" in *\" kill \"*) while [ -e {} ]; do sleep 0.01; done;; esac\nexec runc \"$@\"\n",
            hold.display()
        ),
    );
    let client = host.start(&bundle);
    let request = host.create_request_by(&bundle, &runtime);
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    let hang = || {
        std::fs::write(&hold, "").unwrap();
        let (other, id) = (client.again(), bundle.id.clone());
        let killing = std::thread::spawn(move || other.kill(&id, "", 10));
        eventually("the runtime runs", || {
            let children = format!("/proc/{0}/task/{0}/children", client.status().pid);
            std::fs::read_to_string(children).unwrap().split(' ').any(|pid| {
                let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                line.contains("/slow") && line.contains("kill")
            })
        });
        killing
    };
    let killing = hang();
    let error = client.upgrade(&builds[1]).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(!killing.is_finished());
    assert_eq!(client.state(&bundle.id, "").unwrap().id, bundle.id, "requests are read again");
    std::fs::remove_file(&hold).unwrap();
    killing.join().unwrap().unwrap();

    // One that comes to its end in time is answered by the program that has begun it, and the upgrade goes on.
    let killing = hang();
    let upgrading = std::thread::spawn({
        let (client, build) = (client.again(), builds[1].clone());
        move || client.upgrade(&build)
    });
    eventually("the gate is closed", || {
        // Nobody reads a request any more: a call that gives up quickly says so.
        let mut raw = Raw::connect(client.socket());
        raw.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let state = StateRequest { id: bundle.id.clone(), ..StateRequest::default() };
        raw.stream.write_all(&task_frame(1, "State", &state, None)).unwrap();
        raw.stream.read(&mut [0; 64]).is_err()
    });
    assert!(!upgrading.is_finished());
    std::fs::remove_file(&hold).unwrap();
    killing.join().unwrap().unwrap();
    upgrading.join().unwrap().unwrap();
    assert_eq!(executed_by(client.status().pid), builds[1]);
    client.finish(&bundle.id);
}
