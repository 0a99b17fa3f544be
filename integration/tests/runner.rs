//! The black-box tests, in one binary. They know sockets and binaries only.

mod api_model;
mod bad_input;
mod checkpoint;
mod clients;
mod command_line;
mod docker;
mod faults;
mod gc_differential;
mod gc_schedule;
mod history;
mod hostile;
mod limits;
mod logs;
mod net;
mod operations;
mod peers;
mod proxies;
mod restart;
mod services;
mod sharing;
mod slope;
mod snapshotters;
mod soak;
mod suites;
mod tour;
mod upgrade;

use std::sync::{Mutex, Once, PoisonError, RwLock};
use std::thread::{self, Thread, ThreadId};
use std::time::{Duration, Instant};

/// A test in a file that nobody includes is a test that nobody runs.
#[test]
fn no_test_file_is_forgotten() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let own = std::fs::read_to_string(folder.join("runner.rs")).unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "runner") else { continue };
        assert!(own.contains(&format!("mod {module};")), "{name} is not part of runner.rs");
    }
}

/// The cgroup controllers of the host: one test moves one of them for a while, and what reads all of them by itself, as
/// containerd's shim does for its metrics, must not look meanwhile.
static CONTROLLERS: RwLock<()> = RwLock::new(());

/// Far longer than any test takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// The tests that run now and their threads, and since when.
static RUNNING: Mutex<Vec<(Thread, Instant)>> = Mutex::new(Vec::new());

/// Is dropped with the thread of a test.
struct Running(ThreadId);

impl Running {
    /// Begins to count; in a thread that runs one test after the other it begins anew.
    fn begin(&self) {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|(test, _)| test.id() != self.0);
        running.push((thread::current(), Instant::now()));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).retain(|(test, _)| test.id() != self.0);
    }
}

thread_local! {
    static THIS: Running = Running(thread::current().id());
}

/// A test that hangs ends the run and is named: whoever waits for a run without end learns nothing from it.
fn end_if_it_hangs() {
    static WATCHER: Once = Once::new();
    THIS.with(Running::begin);
    WATCHER.call_once(|| {
        thread::spawn(|| {
            loop {
                thread::sleep(Duration::from_secs(1));
                for (test, begun) in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    if begun.elapsed() > LIMIT {
                        let name = test.name().unwrap_or_default();
                        eprintln!("{name} has not ended within {} minutes", LIMIT.as_secs() / 60);
                        std::process::abort();
                    }
                }
            }
        });
    });
}

/// True when this process may mount and make cgroups; says so when it may not. Every test that starts anything begins with
/// this.
fn root() -> bool {
    end_if_it_hangs();
    let root = nix::unistd::getuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}
