//! Logs whose disk is full, whose filesystem hangs, whose program has stopped or died, and that are rotated.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use davit_model::ErrorCode;
use davit_proto::containerd::task::v3::{CreateTaskRequest, ExecProcessRequest};
use serde_json::Value;

use crate::support::{Bundle, Client, Host, cannot_run, children, eventually};
use crate::upgrade::Programs;
use crate::writer::Writer;

/// What unmounts, or thaws, at the end of a test.
struct Undo(Vec<Vec<String>>);

impl Undo {
    fn add(&mut self, command: &[&str]) {
        self.0.push(command.iter().map(|part| (*part).to_owned()).collect());
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for command in self.0.iter().rev() {
            let _ = run(&command.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

fn run(command: &[&str]) -> bool {
    let mut process = Command::new(command[0]);
    process.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    process.status().is_ok_and(|status| status.success())
}

fn launch(host: &Host, bundle: &Bundle, stdout: String) -> Client {
    let request = CreateTaskRequest { stderr: stdout.clone(), stdout, ..host.create_request(bundle) };
    host.launch(bundle, &request)
}

/// The objects of a json log, but for a last one that is just being written.
fn objects(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text[..text.rfind('\n').map_or(0, |end| end + 1)]
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn texts(path: &Path) -> String {
    objects(path).iter().map(|object| object["log"].as_str().unwrap()).collect()
}

#[test]
fn a_json_log_is_rotated_by_size_and_count() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let writer = Writer { lines: 3_000 };
    let bundle = host.bundle("box", &format!("echo oops >&2; {}", writer.script()), |_| ());
    let log = host.path("logs/box-json.log");
    let client = launch(&host, &bundle, format!("json-file://{}?max-size=100000&max-file=3", log.display()));
    client.wait(&bundle.id, "").unwrap();
    writer.print_stall(&host, "a json log");
    client.finish(&bundle.id);
    let numbered = |number: &str| PathBuf::from(format!("{}{number}", log.display()));
    let mut text = String::new();
    for name in [".2", ".1", ""] {
        let file = numbered(name);
        assert!(file.metadata().unwrap().len() <= 100_000, "{name}");
        for object in objects(&file) {
            assert_eq!(object["stream"], "stdout");
            text.push_str(object["log"].as_str().unwrap());
        }
    }
    assert!(!numbered(".3").exists());
    let numbers = writer.numbers(text.as_bytes());
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert_eq!(numbers.last(), Some(&(writer.lines - 1)));
}

#[test]
fn a_full_disk_costs_output_until_there_is_space() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let disk = host.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let at = disk.display().to_string();
    let mut undo = Undo(Vec::new());
    assert!(run(&["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", &at]));
    undo.add(&["umount", "-l", &at]);
    let writer = Writer { lines: 20_000 };
    let script = format!(
        "{}; echo >/host/full; while ! [ -e /host/space ]; do sleep 0.05; done; echo the end",
        writer.script()
    );
    let bundle = host.bundle("box", &script, |_| ());
    let log = disk.join("log");
    let client = launch(&host, &bundle, format!("json-file://{}", log.display()));
    eventually("the container goes on", || host.path("full").exists());
    writer.print_stall(&host, "a json log on a full disk");
    eventually("what fits is there", || objects(&log).len() > 100);
    assert!(run(&["mount", "-o", "remount,size=64m", &at]));
    std::fs::write(host.path("space"), "").unwrap();
    eventually("the log goes on", || texts(&log).ends_with("the end\n"));
    client.wait(&bundle.id, "").unwrap();
    client.finish(&bundle.id);
    assert!(std::fs::read(&log).unwrap().ends_with(b"}\n"), "the last line is whole");
    let text = texts(&log);
    let numbers = writer.numbers(text.strip_suffix("the end\n").unwrap().as_bytes());
    let gaps = numbers.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert!(gaps >= 1 && numbers.len() < writer.lines, "more was written than fits");
    assert_eq!(numbers.last(), Some(&(writer.lines - 1)), "the newest was kept");
    assert!(numbers.is_sorted());
}

#[test]
fn a_filesystem_that_hangs_stops_nobody() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let (image, disk) = (host.path("image.ext4").display().to_string(), host.path("disk"));
    std::fs::create_dir(&disk).unwrap();
    let at = disk.display().to_string();
    let mut undo = Undo(Vec::new());
    if !(run(&["truncate", "-s", "16M", &image])
        && run(&["mkfs.ext4", "-q", "-F", &image])
        && run(&["mount", "-o", "loop", &image, &at]))
    {
        eprintln!("skipped: needs loop devices and mkfs.ext4");
        return;
    }
    undo.add(&["umount", "-l", &at]);
    let writer = Writer { lines: 20_000 };
    let script = format!("echo begin; while ! [ -e /host/frozen ]; do sleep 0.05; done; {}", writer.script());
    let bundle = host.bundle("box", &script, |_| ());
    let log = disk.join("log");
    let client = launch(&host, &bundle, format!("json-file://{}", log.display()));
    eventually("the log is in use", || texts(&log) == "begin\n");
    assert!(run(&["fsfreeze", "-f", &at]));
    undo.add(&["fsfreeze", "-u", &at]);
    std::fs::write(host.path("frozen"), "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0);
    writer.print_stall(&host, "a json log on a frozen filesystem");
    // The shim answers meanwhile, and other containers of it would run.
    client.state(&bundle.id, "").unwrap();
    assert!(run(&["fsfreeze", "-u", &at]));
    client.finish(&bundle.id);
    let text = texts(&log);
    let numbers = writer.numbers(text.strip_prefix("begin\n").unwrap().as_bytes());
    assert_eq!(numbers.last(), Some(&(writer.lines - 1)));
}

#[test]
fn a_logger_that_has_stopped_stops_nobody() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let log = host.path("log");
    let logger = host.script(
        "logger",
        &format!(
            "#!/bin/sh\nexec 5>&-\necho $$ >{0}.pid\nkill -STOP $$\ncat <&3 >{0}\ntouch {0}.done\n",
            log.display()
        ),
    );
    let writer = Writer { lines: 20_000 };
    let bundle = host.bundle("box", &writer.script(), |_| ());
    let client = launch(&host, &bundle, format!("binary://{}", logger.display()));
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0);
    writer.print_stall(&host, "a logger that has stopped");
    // It stops by itself, and one that goes on before that would stop for ever.
    let mut pid = None;
    eventually("the logger has stopped", || {
        let text = std::fs::read_to_string(host.path("log.pid")).unwrap_or_default();
        pid = text.trim().parse::<i32>().ok();
        let stat = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        stat.is_some_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
    });
    let pid = nix::unistd::Pid::from_raw(pid.unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    client.delete(&bundle.id, "").unwrap();
    eventually("the logger has its end", || host.path("log.done").exists());
    client.shutdown();
    let text = std::fs::read(&log).unwrap();
    // What was in its pipe when it stopped, and what was kept behind that.
    let numbers = writer.numbers(&text);
    assert_eq!((numbers[0], numbers.last()), (0, Some(&(writer.lines - 1))));
    assert!(numbers.is_sorted() && numbers.len() < writer.lines);
}

#[test]
fn a_logger_that_is_dead_stops_nobody() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let logger = host.script("logger", "#!/bin/sh\nexec 5>&-\nread line <&3\nexit 1\n");
    let writer = Writer { lines: 20_000 };
    let bundle = host.bundle("box", &format!("{}; exit 4", writer.script()), |_| ());
    let client = launch(&host, &bundle, format!("binary://{}", logger.display()));
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 4);
    writer.print_stall(&host, "a logger that is dead");
    client.finish(&bundle.id);
}

/// The kernel shows one dead child at a time: one that nobody buries hides all that die after it.
#[test]
fn a_logger_that_is_dead_hides_no_orphans_and_is_not_missed_after_an_upgrade() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let logger = host.script("logger", "#!/bin/sh\nexec 5>&-\nexit 1\n");
    let script = "for number in 1 2 3; do (sleep 0.01 &); done; : >/host/done; \
                  while [ ! -e /host/go ]; do sleep 0.05; done; echo more && exit 7";
    // Of a pid namespace of its own the container's init would be the parent of all orphans.
    let bundle = host.bundle("box", script, |config| {
        config["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    });
    let client = launch(&host, &bundle, format!("binary://{}", logger.display()));
    let connected = client.connect_call(&bundle.id);
    eventually("all orphans are there", || host.path("done").exists());
    eventually("the dead are buried", || children(connected.shim_pid) == [connected.task_pid]);
    client.upgrade(&programs.builds()[1]).unwrap();
    std::fs::write(host.path("go"), "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 7, "the output has somewhere to go");
    client.finish(&bundle.id);
}

#[test]
fn a_logger_of_what_never_ran_is_ended() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let logger = format!("#!/bin/sh\nexec 5>&-\necho $$ >{}\nexec sleep 1000\n", host.path("pid").display());
    let logger = host.script("logger", &logger);
    let bundle = host.bundle("box", "true", |_| ());
    let client = host.start(&bundle);
    let stdout = format!("binary://{}", logger.display());
    let stdin = "/nonexistent".to_owned();
    let request = CreateTaskRequest { stdin, stdout, ..host.create_request(&bundle) };
    client.create(&request).unwrap_err();
    let pid = || std::fs::read_to_string(host.path("pid")).ok()?.trim().parse::<u32>().ok();
    let mut logger = None;
    eventually("the logger runs", || {
        logger = pid();
        logger.is_some()
    });
    let gone = format!("/proc/{}", logger.unwrap());
    eventually("the logger is ended", || !Path::new(&gone).exists());
    client.shutdown();
}

/// A program that never says that it is ready costs whoever wants it the time that they have, and nothing else.
#[test]
fn a_logger_that_is_never_ready_holds_up_nobody() {
    const LIMIT: Option<Duration> = Some(Duration::from_secs(1));
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let pids = host.path("pids");
    // It writes down for whom it runs.
    let text = format!("#!/bin/sh\necho $$ $1 >>{}\nexec sleep 1000\n", pids.display());
    let logger = host.script("logger", &text);
    let stdout = format!("binary://{}?create=x", logger.display());
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.start(&bundle);
    let id = bundle.id.as_str();
    let screen = host.bundle("screen", "sleep 1000", |config| config["process"]["terminal"] = true.into());
    for (bundle, terminal) in [(&bundle, false), (&screen, true)] {
        let request = CreateTaskRequest { stdout: stdout.clone(), terminal, ..host.create_request(bundle) };
        let created = client.call_version::<()>("containerd.task.v3.Task", "Create", &request, LIMIT);
        let error = created.unwrap_err();
        assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error}");
    }
    // The id is free, and so is the rest.
    client.create(&host.create_request(&bundle)).unwrap();
    client.start(id, "").unwrap();
    let stdout = format!("binary://{}?exec=x", logger.display());
    let exec = ExecProcessRequest { stdout, ..Client::exec_request(id, "e", "true") };
    client.act("Exec", &exec).unwrap();
    std::thread::scope(|scope| {
        let (waiting, starting) = (client.again(), client.again());
        let waited = scope.spawn(move || waiting.wait(id, "e").unwrap().exit_status);
        let started = scope.spawn(move || starting.start(id, "e").unwrap_err());
        // Where all is slow the loggers of the creations were ended before they said a word.
        let runs =
            || std::fs::read_to_string(&pids).unwrap_or_default().lines().any(|line| line.ends_with(" exec"));
        eventually("the exec waits for its logger", runs);
        client.kill(id, "", 9).unwrap();
        assert_eq!(client.wait(id, "").unwrap().exit_status, 137);
        assert_eq!(started.join().unwrap().code, ErrorCode::FailedPrecondition);
        assert_eq!(waited.join().unwrap(), 255);
    });
    let all = std::fs::read_to_string(&pids).unwrap();
    let pids = || all.lines().filter_map(|line| line.split(' ').next());
    eventually("no logger is left", || pids().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()));
    client.finish(id);
}

#[test]
fn a_logger_that_works_gets_everything() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let log = host.path("log");
    let logger = host
        .script("logger", &format!("#!/bin/sh\nexec 5>&-\ncat <&3 >{0}\ntouch {0}.done\n", log.display()));
    let bundle = host.bundle("box", "dd if=/dev/zero bs=1000 count=30000 2>/dev/null", |_| ());
    let client = launch(&host, &bundle, format!("binary://{}", logger.display()));
    client.wait(&bundle.id, "").unwrap();
    client.delete(&bundle.id, "").unwrap();
    eventually("the logger has its end", || host.path("log.done").exists());
    client.shutdown();
    assert_eq!(log.metadata().unwrap().len(), 30_000_000, "a logger that reads is waited for");
}

/// Only the shim's own thread is there when nothing is to be written.
#[test]
fn helpers_are_gone_when_there_is_nothing_to_do() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "echo one; sleep 1000", |_| ());
    let log = host.path("log");
    let client = launch(&host, &bundle, format!("json-file://{}", log.display()));
    eventually("the log has a line", || texts(&log) == "one\n");
    let shim = client.connect_call(&bundle.id).shim_pid;
    let threads = || std::fs::read_dir(format!("/proc/{shim}/task")).unwrap().count();
    eventually("one thread is left", || threads() == 1);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(threads(), 1);
    client.finish(&bundle.id);
}
