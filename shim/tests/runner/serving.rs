//! The process that `start` leaves behind.

use std::collections::BTreeMap;

use davit_model::ErrorCode;

use crate::support::{Host, NAMESPACE, cannot_run, eventually};

/// It is found by the command line that operators and daemons know, and has nothing of `start` but the memory.
#[test]
fn the_serving_process_is_one_of_its_own() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("serving", "true", |_| {});
    nix::unistd::mkfifo(&bundle.path.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    // The shim opens it only if it is there, whether or not anybody reads.
    let client = host.start(&bundle);
    let pid = client.connect_call(&bundle.id).shim_pid;

    let line = || String::from_utf8(std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()).unwrap();
    let flags = ["-namespace", NAMESPACE, "-id", &bundle.id, "-address"].join("\0");
    assert!(line().contains(&format!("containerd-shim-davit-v2\0{flags}\0")), "{:?}", line());
    assert!(!line().contains("start"), "{:?}", line());

    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Threads:\t1\n"), "{status}");
    let group = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid as i32))).unwrap();
    assert_eq!(group.as_raw(), pid as i32, "it leads a group of its own");

    let open: BTreeMap<String, String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .map(|entry| {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            (entry.file_name().display().to_string(), target.display().to_string())
        })
        .collect();
    let log = bundle.path.join("log").display().to_string();
    assert_eq!((open["0"].as_str(), open["1"].as_str()), ("/dev/null", "/dev/null"), "{open:?}");
    assert_eq!(open["2"], log, "{open:?}");
    let kinds = ["/dev/null", "socket:", "anon_inode:", log.as_str()];
    let ours = |target: &str| kinds.iter().any(|kind| target.starts_with(kind));
    assert!(open.values().all(|target| ours(target)), "{open:?}");

    client.shutdown();
    eventually("the shim ends", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
}

/// It waits a while for the daemon to take its last events. Whoever has it create something meanwhile would find the
/// container alone soon after.
#[test]
fn a_shim_that_is_ending_makes_no_container() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let bundle = host.bundle("box", "sleep 1000", |_| ());
    // Nobody takes its events.
    let client = host.launch(&bundle, &host.create_request(&bundle));
    let late = client.again();
    let pid = late.connect_call(&bundle.id).shim_pid;
    client.finish(&bundle.id);
    let error = late.create(&host.create_request(&bundle)).unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::Unavailable, "the shim is ending: unavailable")
    );
    let events = host.receive_events();
    drop((client, late));
    eventually("the shim ends", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    drop(events);
}
