//! Standard streams: FIFOs whose readers come and go, files, loggers, terminals.

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use davit_model::ErrorCode;
use davit_proto::containerd::task::v3::{CloseIoRequest, CreateTaskRequest, ResizePtyRequest};

use crate::support::{Client, Host, PATIENCE, cannot_run, eventually, reader};

/// Reads from a FIFO until `enough`.
#[track_caller]
fn read_until(file: &mut File, mut enough: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 65536];
    let deadline = Instant::now() + PATIENCE;
    while !enough(&all) {
        match file.read(&mut buffer) {
            Ok(count) if count > 0 => all.extend_from_slice(&buffer[..count]),
            // No writer yet, or nothing written.
            Ok(_) => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(Instant::now() < deadline, "only {} bytes arrived", all.len());
    }
    all
}

fn contains(text: &[u8], part: &str) -> bool {
    String::from_utf8_lossy(text).contains(part)
}

#[test]
fn readers_come_and_go() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "while read line; do echo \"got $line\"; done", |_| ());
    let client = host.start(&bundle);
    let request = CreateTaskRequest {
        stdin: host.fifo("in"),
        stdout: host.fifo("out"),
        stderr: host.fifo("err"),
        ..host.create_request(&bundle)
    };
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    let mut stdin = File::options().write(true).open(&request.stdin).unwrap();
    let mut stdout = reader(&request.stdout);
    stdin.write_all(b"one\n").unwrap();
    assert_eq!(read_until(&mut stdout, |text| text.ends_with(b"\n")), b"got one\n");
    // Both sides leave, as in the restart of a daemon. The container does not notice.
    drop((stdin, stdout));
    let mut stdin = File::options().write(true).open(&request.stdin).unwrap();
    stdin.write_all(b"two\n").unwrap();
    let mut stdout = reader(&request.stdout);
    assert_eq!(read_until(&mut stdout, |text| text.ends_with(b"\n")), b"got two\n");
    drop(stdin);
    let close = CloseIoRequest { id: bundle.id.clone(), exec_id: String::new(), stdin: true };
    client.act("CloseIO", &close).unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0);
    client.finish(&bundle.id);
}

#[test]
fn large_output_arrives_whole() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "head -c 20000000 /host/large; echo end >&2", |_| ());
    let pattern: Vec<u8> = (0..20_000_000u32).map(|number| (number % 251) as u8).collect();
    std::fs::write(host.path("large"), &pattern).unwrap();
    let client = host.start(&bundle);
    let request = CreateTaskRequest {
        stdout: host.fifo("out"),
        stderr: host.fifo("err"),
        ..host.create_request(&bundle)
    };
    client.create(&request).unwrap();
    let mut stdout = reader(&request.stdout);
    let mut stderr = reader(&request.stderr);
    client.start(&bundle.id, "").unwrap();
    let received = read_until(&mut stdout, |text| text.len() == pattern.len());
    assert!(received == pattern, "the bytes are the same");
    assert_eq!(read_until(&mut stderr, |text| !text.is_empty()), b"end\n");
    client.finish(&bundle.id);
}

#[test]
fn a_reader_that_does_not_read_stops_its_own_process_alone() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let exec = |name: &str, script: &str| {
        let mut request = Client::exec_request(&bundle.id, name, script);
        request.stdout = host.fifo(name);
        client.act("Exec", &request).unwrap();
        client.start(&bundle.id, name).unwrap();
        request.stdout
    };
    let stuck = exec("stuck", "yes");
    let _does_not_read = reader(&stuck);
    let read = exec("free", "head -c 1000000 /dev/zero 2>/dev/null || yes | head -c 1000000");
    let mut output = reader(&read);
    read_until(&mut output, |bytes| bytes.len() == 1_000_000);
    assert_eq!(client.wait(&bundle.id, "free").unwrap().exit_status, 0);
    assert_eq!(client.state(&bundle.id, "stuck").unwrap().exit_status, 0);
    client.kill(&bundle.id, "stuck", 9).unwrap();
    assert_eq!(client.wait(&bundle.id, "stuck").unwrap().exit_status, 137);
    client.finish(&bundle.id);
}

#[test]
fn output_goes_to_files() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "echo out; echo err >&2; exec cat", |_| ());
    let client = host.start(&bundle);
    let log = host.path("logs/deep/box.log");
    let address = format!("file://{}", log.display());
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "before\n").unwrap();
    let request =
        CreateTaskRequest { stdout: address.clone(), stderr: address, ..host.create_request(&bundle) };
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    client.wait(&bundle.id, "").unwrap();
    client.finish(&bundle.id);
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.starts_with("before\n") && text.contains("out\n") && text.contains("err\n"), "{text}");
}

#[test]
fn a_full_log_does_not_stop_the_container() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "yes | head -c 3000000; exit 6", |_| ());
    let client = host.start(&bundle);
    // Writing there always fails with ENOSPC.
    let request = CreateTaskRequest { stdout: "file:///dev/full".to_owned(), ..host.create_request(&bundle) };
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 6);
    client.finish(&bundle.id);
}

#[test]
fn a_logger_gets_the_output() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let logger = host.script(
        "logger",
        "#!/bin/sh\nexec 5>&-\nfile=$2\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $1\" > $file\n\
         cat <&3 >> $file\ncat <&4 >> $file\necho end >> $file\n",
    );
    let log = host.path("log");
    let bundle = host.bundle("box", "echo out; echo err >&2", |_| ());
    let client = host.start(&bundle);
    let request = CreateTaskRequest {
        stdout: format!("binary://{}?key={}", logger.display(), log.display()),
        stderr: format!("binary://{}?key={}", logger.display(), log.display()),
        ..host.create_request(&bundle)
    };
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    client.wait(&bundle.id, "").unwrap();
    client.finish(&bundle.id);
    let expected = format!("{} shimtest key\nout\nerr\nend\n", bundle.id);
    eventually("the logger is done", || std::fs::read_to_string(&log).is_ok_and(|text| text == expected));
}

#[test]
fn a_logger_must_be_ready_when_it_promises_to() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let crashing = host.script("crashing", "#!/bin/sh\nexit 1\n");
    let ready = host.script("ready", "#!/bin/sh\nprintf x >&5\nexec 5>&-\ncat <&3\n");
    let bundle = host.bundle("box", "true", |_| ());
    let client = host.start(&bundle);
    let mut request = CreateTaskRequest {
        stdout: format!("binary-v2://{}", crashing.display()),
        ..host.create_request(&bundle)
    };
    let error = client.create(&request).unwrap_err();
    assert!(error.message.contains("logging binary did not call ready"), "{error}");
    request.stdout = "gopher://x".to_owned();
    let error = client.create(&request).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    request.stdout = format!("binary-v2://{}", ready.display());
    client.create(&request).unwrap();
    client.start(&bundle.id, "").unwrap();
    client.finish(&bundle.id);
}

#[test]
fn a_terminal_has_a_size_and_two_directions() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let script = "echo is $(tty); read line; echo size $(stty size); read line; echo \"read $line\"; exit 9";
    let bundle = host.bundle("box", script, |config| config["process"]["terminal"] = true.into());
    let client = host.start(&bundle);
    let request = CreateTaskRequest {
        terminal: true,
        stdin: host.fifo("in"),
        stdout: host.fifo("out"),
        ..host.create_request(&bundle)
    };
    client.create(&request).unwrap();
    let mut stdout = reader(&request.stdout);
    client.start(&bundle.id, "").unwrap();
    read_until(&mut stdout, |text| contains(text, "is /dev/pts/0"));
    let resize = ResizePtyRequest { id: bundle.id.clone(), exec_id: String::new(), width: 111, height: 44 };
    client.act("ResizePty", &resize).unwrap();
    let mut stdin = File::options().write(true).open(&request.stdin).unwrap();
    stdin.write_all(b"\n").unwrap();
    read_until(&mut stdout, |text| contains(text, "size 44 111"));
    stdin.write_all(b"words\n").unwrap();
    read_until(&mut stdout, |text| contains(text, "read words"));
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 9);
    client.finish(&bundle.id);
    // Nothing of the terminal stays behind.
    assert_eq!(
        std::fs::read_dir(host.path("s"))
            .unwrap()
            .flatten()
            .filter(|entry| { entry.file_name().to_string_lossy().starts_with("pty") })
            .count(),
        0
    );
}

#[test]
fn an_exec_can_have_a_terminal() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let mut request = Client::exec_request(&bundle.id, "e1", "tty; sleep 1000 & exit 3");
    request.terminal = true;
    request.stdout = host.fifo("out");
    client.act("Exec", &request).unwrap();
    let mut stdout = reader(&request.stdout);
    client.start(&bundle.id, "e1").unwrap();
    read_until(&mut stdout, |text| contains(text, "/dev/pts/0"));
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exit_status, 3);
    // A process that was left behind keeps the terminal open, and must not keep the exec from being deleted.
    let before = std::time::Instant::now();
    client.delete(&bundle.id, "e1").unwrap();
    assert!(before.elapsed() < PATIENCE);
    client.finish(&bundle.id);
}

#[test]
fn deleting_waits_for_output_but_not_for_ever() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    // The process that is left behind holds the pipe.
    let mut request = Client::exec_request(&bundle.id, "e1", "sleep 1000 & echo done");
    request.stdout = host.fifo("out");
    client.act("Exec", &request).unwrap();
    client.start(&bundle.id, "e1").unwrap();
    let mut stdout = reader(&request.stdout);
    assert_eq!(client.wait(&bundle.id, "e1").unwrap().exit_status, 0);
    client.delete(&bundle.id, "e1").unwrap();
    assert_eq!(read_until(&mut stdout, |text| !text.is_empty()), b"done\n");
    client.finish(&bundle.id);
}
