//! Terminals on a machine that is too busy to be on time.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use davit_proto::containerd::task::v3::CreateTaskRequest;

use crate::support::{Client, Host, PATIENCE, cannot_run, reader};

/// Threads that take all the processors' time until this is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start() -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let burn = |stop: Arc<AtomicBool>| {
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        let threads = (0..8).map(|_| burn(stop.clone())).collect();
        Load { stop, threads }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

/// Reads to the end of a FIFO that the shim has open.
fn read_all(path: &str) -> String {
    let mut reader = reader(path);
    let mut text = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match reader.read_to_end(&mut text) {
            Ok(_) => return String::from_utf8(text).unwrap(),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(Instant::now() < deadline, "no end after {text:?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The reader comes when the process may long be over, and finds all of its words.
#[test]
fn the_words_of_a_process_that_ends_at_once_are_not_lost() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let _load = Load::start();
    for number in 0..20 {
        // Every other time a process is left behind that keeps the terminal open.
        let script = if number % 2 == 0 { "echo hello" } else { "sleep 1000 & echo hello" };
        let name = format!("e{number}");
        let mut exec = Client::exec_request(&bundle.id, &name, script);
        exec.terminal = true;
        exec.stdout = host.fifo(&name);
        client.act("Exec", &exec).unwrap();
        client.start(&bundle.id, &name).unwrap();
        assert_eq!(client.wait(&bundle.id, &name).unwrap().exit_status, 0);
        assert_eq!(read_all(&exec.stdout), "hello\r\n", "the {number}th");
        client.delete(&bundle.id, &name).unwrap();
    }
    client.finish(&bundle.id);
}

/// As `ctr run -t` does it: the reader is there from the beginning, and waits for its end before the container is
/// deleted.
#[test]
fn the_words_of_a_container_that_ends_at_once_are_not_lost() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let _load = Load::start();
    for number in 0..6 {
        let bundle = host.bundle(&format!("box{number}"), "echo hello", |config| {
            config["process"]["terminal"] = true.into();
        });
        let client = host.start(&bundle);
        let request = CreateTaskRequest {
            terminal: true,
            stdout: host.fifo(&format!("out{number}")),
            ..host.create_request(&bundle)
        };
        let path = request.stdout.clone();
        // Opening waits for the shim.
        let reader = std::thread::spawn(move || std::fs::read_to_string(path).unwrap());
        client.create(&request).unwrap();
        client.start(&bundle.id, "").unwrap();
        client.wait(&bundle.id, "").unwrap();
        assert_eq!(reader.join().unwrap(), "hello\r\n", "the {number}th");
        client.finish(&bundle.id);
    }
}
