//! Streams of every kind go on across upgrades.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::thread::JoinHandle;

use davit_proto::containerd::task::v3::{CloseIoRequest, CreateTaskRequest, ResizePtyRequest};

use crate::support::{Bundle, Client, Host, cannot_run, eventually};
use crate::upgrade::Programs;

#[test]
fn a_terminal_goes_on() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let bundle = host.bundle(
        "box",
        "stty -echo; while read -r word; do stty size; echo got $word; done; exit 5",
        |config| {
            config["process"]["terminal"] = true.into();
        },
    );
    let (input, output) = (host.fifo("in"), host.fifo("out"));
    let shown = std::thread::spawn({
        let output = output.clone();
        move || std::fs::File::open(output).unwrap()
    });
    let client = host.start(&bundle);
    let mut request = host.create_request(&bundle);
    (request.stdin, request.stdout, request.terminal) = (input.clone(), output, true);
    client.create(&request).unwrap();
    let mut typed = std::fs::File::options().write(true).open(&input).unwrap();
    let mut shown = BufReader::new(shown.join().unwrap());
    client.start(&bundle.id, "").unwrap();
    for round in 0..6u32 {
        client.upgrade(&builds[round as usize % 2]).unwrap();
        let size = ResizePtyRequest {
            id: bundle.id.clone(),
            width: 80 + round,
            height: 24,
            ..ResizePtyRequest::default()
        };
        client.act("ResizePty", &size).unwrap();
        typed.write_all(format!("word{round}\n").as_bytes()).unwrap();
        for expected in [format!("24 {}", 80 + round), format!("got word{round}")] {
            let mut line = String::new();
            while line.trim().is_empty() || line.contains("word") && !line.contains("got") {
                line.clear();
                assert_ne!(shown.read_line(&mut line).unwrap(), 0);
            }
            assert_eq!(line.trim(), expected);
        }
    }
    client.upgrade(&builds[0]).unwrap();
    // What ends a terminal's input.
    typed.write_all(&[4]).unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 5);
    client.finish(&bundle.id);
}

/// Counts until there is a file `stop`, and says so at the end.
const COUNT: &str = "i=0; while [ ! -e /host/stop ]; do echo $i; i=$((i+1)); done; echo end";

/// Counts to so many, and then waits for the file.
const COUNT_TO: u64 = 5000;

/// Checks that lines count up from zero without a gap and end with `end`; returns how many there were.
#[track_caller]
fn counted(what: &str, lines: impl Iterator<Item = String>) -> u64 {
    let mut expected = 0;
    for line in lines {
        if line == "end" {
            return expected;
        }
        assert_eq!(line.parse(), Ok(expected), "{what}: a line is missing, doubled or torn");
        expected += 1;
    }
    panic!("{what} ends after {expected} lines");
}

fn read_fifo(path: &str) -> JoinHandle<Vec<String>> {
    let path = path.to_owned();
    std::thread::spawn(move || {
        let lines = BufReader::new(std::fs::File::open(path).unwrap()).lines();
        lines.map(Result::unwrap).collect()
    })
}

fn in_file(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// The lines of one stream in a log of JSON lines.
fn in_json(path: &Path, stream: &str) -> Vec<String> {
    let all = in_file(path).into_iter().map(|line| serde_json::from_str::<serde_json::Value>(&line).unwrap());
    let own = all.filter(|line| line["stream"] == stream);
    own.map(|line| line["log"].as_str().unwrap().trim_end().to_owned()).collect()
}

#[test]
fn streams_of_every_kind_go_on_in_a_shared_shim() {
    if cannot_run() {
        return;
    }
    let (host, programs) = (Host::new(), Programs::new());
    let builds = programs.builds();
    let bundle = |name: &str, script: &str| {
        host.bundle(name, script, |config| {
            config["annotations"] = serde_json::json!({
                "io.kubernetes.cri.sandbox-id": "pod",
                // None of them may drop anything.
                "io.davit.stdio.mode": if name == "later" { "non-blocking" } else { "blocking" },
            });
        })
    };
    let both =
        "i=0; while [ ! -e /host/stop ]; do echo $i; echo $i >&2; i=$((i+1)); done; echo end; echo end >&2";
    let later = format!(
        "i=0; while [ $i -lt {COUNT_TO} ]; do echo $i; i=$((i+1)); done; echo end; : >/host/counted; \
         while [ ! -e /host/stop ]; do sleep 0.1; done"
    );
    let [fifo, json, file, logger, piped, later] = [
        bundle("fifo", COUNT),
        bundle("json", both),
        bundle("file", COUNT),
        bundle("logger", COUNT),
        bundle("piped", "cat"),
        bundle("later", &later),
    ];
    let all = [&fifo, &json, &file, &logger, &piped, &later];
    let logged = host.path("logged");
    let program = host.script("log", &format!("#!/bin/sh\nexec 5>&-\nexec cat <&3 >{}\n", logged.display()));
    let [out, input, echoed, unread] = ["out", "input", "echoed", "unread"].map(|name| host.fifo(name));
    let [json_log, plain_log] = ["json.log", "plain.log"].map(|name| host.path(name));
    let json_address = format!("json-file://{}", json_log.display());

    let client = host.start(&fifo);
    let create = |bundle: &Bundle, stdin: &str, stdout: &str, stderr: &str| {
        let request = CreateTaskRequest {
            stdin: stdin.to_owned(),
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            ..host.create_request(bundle)
        };
        client.create(&request).unwrap();
    };
    let (lines, back) = (read_fifo(&out), read_fifo(&echoed));
    create(&fifo, "", &out, "");
    create(&json, "", &json_address, &json_address);
    create(&file, "", &format!("file://{}", plain_log.display()), "");
    create(&logger, "", &format!("binary://{}", program.display()), "");
    create(&piped, &input, &echoed, "");
    create(&later, "", &unread, "");
    let stop = host.path("stop");
    let stopped = stop.clone();
    let typing = std::thread::spawn(move || {
        let mut input = std::fs::File::options().write(true).open(input).unwrap();
        let mut typed = 0;
        while !stopped.exists() {
            writeln!(input, "{typed}").unwrap();
            typed += 1;
        }
        writeln!(input, "end").unwrap();
        typed
    });
    for (round, bundle) in all.iter().enumerate() {
        client.upgrade(&builds[round % 2]).unwrap();
        client.start(&bundle.id, "").unwrap();
    }
    let shim = client.status();
    assert_eq!(shim.containers.len(), all.len());
    for round in 0..40 {
        client.upgrade(&builds[round % 2]).unwrap();
    }
    eventually("all has been counted", || host.path("counted").exists());
    client.upgrade(&builds[0]).unwrap();
    // Whoever comes late gets what has waited in the bundle.
    let waited = read_fifo(&unread);
    client.upgrade(&builds[1]).unwrap();
    std::fs::write(&stop, "").unwrap();
    client.upgrade(&builds[0]).unwrap();
    let typed = typing.join().unwrap();
    let close = CloseIoRequest { id: piped.id.clone(), stdin: true, ..CloseIoRequest::default() };
    client.act("CloseIO", &close).unwrap();
    for bundle in all {
        end(&client, bundle);
    }
    assert_eq!(client.status().pid, shim.pid);

    let mut counts = vec![counted("fifo", lines.join().unwrap().into_iter())];
    counts.push(counted("json stdout", in_json(&json_log, "stdout").into_iter()));
    counts.push(counted("json stderr", in_json(&json_log, "stderr").into_iter()));
    counts.push(counted("file", in_file(&plain_log).into_iter()));
    eventually("the logger has written all", || in_file(&logged).last().is_some_and(|last| last == "end"));
    counts.push(counted("logger", in_file(&logged).into_iter()));
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    assert_eq!(counted("stdin", back.join().unwrap().into_iter()), typed);
    assert_eq!(counted("late reader", waited.join().unwrap().into_iter()), COUNT_TO);
    client.shutdown();
    eprintln!("lines: {counts:?}, typed {typed}");
}

fn end(client: &Client, bundle: &Bundle) {
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0, "{}", bundle.id);
    client.delete(&bundle.id, "").unwrap();
}
