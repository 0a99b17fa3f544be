//! Tests of the shim's binary with a real OCI runtime: they speak ttrpc to it as a daemon does, and are a
//! daemon for its events.
//!
//! They need root. Every test has a folder, ids and cgroups of its own, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "runner/support.rs"]
mod support;

#[path = "runner/actions.rs"]
mod actions;
#[path = "runner/checkpoint.rs"]
mod checkpoint;
#[path = "runner/deletes.rs"]
mod deletes;
#[path = "runner/events.rs"]
mod events;
#[path = "runner/isolation.rs"]
mod isolation;
#[path = "runner/lifecycle.rs"]
mod lifecycle;
#[path = "runner/resources.rs"]
mod resources;
#[path = "runner/security.rs"]
mod security;
#[path = "runner/serving.rs"]
mod serving;
#[path = "runner/streams.rs"]
mod streams;
#[path = "runner/streams_logs.rs"]
mod streams_logs;
#[path = "runner/streams_spool.rs"]
mod streams_spool;
#[path = "runner/streams_terminal.rs"]
mod streams_terminal;
#[path = "runner/upgrade.rs"]
mod upgrade;
#[path = "runner/upgrade_refused.rs"]
mod upgrade_refused;
#[path = "runner/upgrade_streams.rs"]
mod upgrade_streams;
#[path = "runner/writer.rs"]
mod writer;

#[test]
fn every_file_of_tests_is_a_module() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runner");
    let this = include_str!("runner.rs");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(this.contains(&format!("runner/{name}")), "{name} is not part of the test binary");
    }
}
