//! Output that nobody takes, or not at once: what is kept, what is dropped, and that the container goes on.

use std::io::Read;
use std::time::Instant;

use davit_proto::containerd::task::v3::CreateTaskRequest;

use crate::support::{Client, Host, PATIENCE, cannot_run, eventually, reader};
use crate::writer::Writer;

/// Reads until `enough`, or to the end of the FIFO.
fn read_while(reader: &mut std::fs::File, text: &mut Vec<u8>, mut enough: impl FnMut(&[u8]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 65536];
    while !enough(text) {
        match reader.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => text.extend_from_slice(&buffer[..count]),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        assert!(Instant::now() < deadline, "only {} bytes arrived", text.len());
    }
}

fn to_end(reader: &mut std::fs::File, text: &mut Vec<u8>) {
    read_while(reader, text, |_| false);
}

fn fifo_request(host: &Host, bundle: &crate::support::Bundle) -> CreateTaskRequest {
    CreateTaskRequest { stdout: host.fifo("out"), ..host.create_request(bundle) }
}

#[test]
fn a_reader_that_is_there_gets_everything() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let writer = Writer { lines: 20_000 };
    let bundle = host.bundle("box", &writer.script(), |_| ());
    let request = fifo_request(&host, &bundle);
    let mut reader = reader(&request.stdout);
    let client = host.launch(&bundle, &request);
    let mut text = Vec::new();
    // Nothing is written yet, maybe: a FIFO without a writer looks like one at its end.
    eventually("something is written", || {
        to_end(&mut reader, &mut text);
        !text.is_empty()
    });
    assert_eq!(writer.numbers(&text), (0..writer.lines).collect::<Vec<_>>());
    client.wait(&bundle.id, "").unwrap();
    writer.print_stall(&host, "a FIFO with a reader");
    client.finish(&bundle.id);
}

#[test]
fn without_a_reader_the_last_megabyte_is_kept() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let writer = Writer { lines: 20_000 };
    let bundle = host.bundle("box", &writer.script(), |_| ());
    let request = fifo_request(&host, &bundle);
    let client = host.launch(&bundle, &request);
    assert_eq!(client.wait(&bundle.id, "").unwrap().exit_status, 0);
    writer.print_stall(&host, "a FIFO that nobody reads");
    let mut reader = reader(&request.stdout);
    let mut text = Vec::new();
    to_end(&mut reader, &mut text);
    let numbers = writer.numbers(&text);
    assert_eq!(numbers.last(), Some(&(writer.lines - 1)));
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "no line in between is missing");
    let kept = numbers.len() * writer.width();
    assert!((1_000_000..=1 << 20).contains(&kept), "{kept} bytes were kept");
    let again = Instant::now();
    client.finish(&bundle.id);
    assert!(again.elapsed() < PATIENCE);
}

#[test]
fn a_reader_that_leaves_and_comes_back_misses_nothing() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let writer = Writer { lines: 20_000 };
    let bundle = host.bundle("box", &writer.script(), |_| ());
    let request = fifo_request(&host, &bundle);
    let client = host.launch(&bundle, &request);
    let mut text = Vec::new();
    let mut visits = 0;
    let last = writer.line(writer.lines - 1);
    while !text.ends_with(last.as_bytes()) {
        let mut reader = reader(&request.stdout);
        let size = text.len();
        read_while(&mut reader, &mut text, |text| text.len() >= size + 300_000);
        visits += 1;
        assert!(visits < 100_000, "{} bytes arrived", text.len());
    }
    assert_eq!(writer.numbers(&text), (0..writer.lines).collect::<Vec<_>>());
    client.wait(&bundle.id, "").unwrap();
    writer.print_stall(&host, "a FIFO whose reader comes and goes");
    client.finish(&bundle.id);
}

#[test]
fn two_readers_share_what_there_is() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let writer = Writer { lines: 10_000 };
    let bundle = host.bundle("box", &writer.script(), |_| ());
    let request = fifo_request(&host, &bundle);
    let readers = [reader(&request.stdout), reader(&request.stdout)];
    let client = host.launch(&bundle, &request);
    let reading = readers.map(|mut reader| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            to_end(&mut reader, &mut text);
            text
        })
    });
    client.wait(&bundle.id, "").unwrap();
    let texts = reading.map(|reading| reading.join().unwrap());
    let total: usize = texts.iter().map(Vec::len).sum();
    assert_eq!(total, writer.lines * writer.width());
    let count = |byte: u8| texts.iter().flatten().filter(|other| **other == byte).count();
    let expected: Vec<u8> = (0..writer.lines).flat_map(|number| writer.line(number).into_bytes()).collect();
    for byte in b"0123456789\n" {
        assert_eq!(count(*byte), expected.iter().filter(|other| *other == byte).count());
    }
    client.finish(&bundle.id);
}

#[test]
fn the_blocking_mode_waits_for_a_reader() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let writer = Writer { lines: 10_000 };
    let bundle = host.bundle("box", &format!("echo >/host/begun; {}", writer.script()), |config| {
        config["annotations"] = serde_json::json!({"io.davit.stdio.mode": "blocking"});
    });
    let request = fifo_request(&host, &bundle);
    let client = host.launch(&bundle, &request);
    eventually("the container runs", || host.path("begun").exists());
    let mut reader = reader(&request.stdout);
    let mut text = Vec::new();
    to_end(&mut reader, &mut text);
    assert_eq!(writer.numbers(&text), (0..writer.lines).collect::<Vec<_>>());
    client.finish(&bundle.id);
}

#[test]
fn deleting_does_not_wait_for_readers_that_are_not_there() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let mut quickest = PATIENCE;
    for number in 0..3 {
        let name = format!("e{number}");
        let mut exec = Client::exec_request(&bundle.id, &name, "echo unread");
        exec.stdout = host.fifo(&name);
        client.act("Exec", &exec).unwrap();
        client.start(&bundle.id, &name).unwrap();
        client.wait(&bundle.id, &name).unwrap();
        let begin = Instant::now();
        client.delete(&bundle.id, &name).unwrap();
        quickest = quickest.min(begin.elapsed());
    }
    // The time that is given to readers is ten seconds, each time.
    assert!(quickest.as_secs() < 9, "{quickest:?}");
    client.finish(&bundle.id);
}
