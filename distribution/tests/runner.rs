//! The client against registries: one that is made in here and does what a test wants, and Debian's.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "runner/auth.rs"]
mod auth;
#[path = "runner/chaos.rs"]
mod chaos;
#[path = "runner/fake.rs"]
mod fake;
#[path = "runner/hostile.rs"]
mod hostile;
#[path = "runner/mirrors.rs"]
mod mirrors;
#[path = "runner/pull.rs"]
mod pull;
#[path = "runner/push.rs"]
mod push;
#[path = "runner/real.rs"]
mod real;
#[path = "runner/resume.rs"]
mod resume;
#[path = "runner/setup.rs"]
mod setup;
#[path = "runner/tls.rs"]
mod tls;

/// A file that is not listed above would never run.
#[test]
fn no_file_is_forgotten() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let listed = std::fs::read_to_string(folder.join("runner.rs")).unwrap();
    for entry in std::fs::read_dir(folder.join("runner")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(listed.contains(&format!("\"runner/{name}\"")), "{name} is not listed");
    }
}
