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
static CONTROLLERS: std::sync::RwLock<()> = std::sync::RwLock::new(());

/// True when this process may mount and make cgroups; says so when it may not.
fn root() -> bool {
    let root = nix::unistd::getuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}
