//! What the daemon tells of itself: calls, threads, logs, and that it has no profiles of Go.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use davit_integration::client::connect;
use davit_integration::daemon::FOLDER;
use davit_integration::{Daemon, bins, wait};
use davit_proto::containerd::services::events::v1::SubscribeRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient;
use nix::sys::signal::Signal;

use super::page;
use crate::root;

const SUBSCRIBE: &str = "containerd.services.events.v1.Events/Subscribe";

fn daemon() -> Result<Daemon> {
    let config = format!(
        "[diagnostics]\naddress = \"{FOLDER}/debug.sock\"\n[log]\nlevel = \"info\"\nformat = \"json\"\n"
    );
    Daemon::start_with(&[], &config)
}

#[test]
fn a_daemon_can_be_looked_into() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    let socket = daemon.path("debug.sock");
    ensure!(std::fs::metadata(&socket)?.permissions().mode() & 0o777 == 0o600);
    let get = |target: &str| page(&socket, "GET", target);

    let vars: serde_json::Value = serde_json::from_str(&get("/debug/vars")?.1)?;
    ensure!(vars["pid"] == daemon.pid().context("it runs")?, "{vars}");
    ensure!(vars["memory"]["VmRSS"].as_u64() > Some(1 << 20) && vars["threads"].as_u64() > Some(1), "{vars}");

    // A call that waits is seen while it waits, and counted when it is given up.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let events = runtime.block_on(async {
        let mut events = EventsClient::new(connect(&daemon.address()).await?);
        Ok::<_, anyhow::Error>(events.subscribe(SubscribeRequest::default()).await?)
    })?;
    let calls = get("/debug/calls")?.1;
    ensure!(calls.contains(SUBSCRIBE), "{calls}");
    daemon.signal(Signal::SIGUSR1)?;
    wait::until("the calls are in the log", || {
        let log = daemon.log();
        (log.contains("BEGIN calls under way") && log.contains(SUBSCRIBE) && log.contains("BEGIN threads"))
            .then_some(())
    })?;
    drop(events);
    drop(runtime);
    wait::until("the call is over", || (!get("/debug/calls").ok()?.1.contains(SUBSCRIBE)).then_some(()))?;

    let threads = get("/debug/threads")?.1;
    ensure!(threads.lines().any(|line| line.contains("davitd") && line.contains("ticks")), "{threads}");
    let command = get("/debug/pprof/cmdline")?.1;
    ensure!(command.split('\0').next().is_some_and(|program| program.ends_with("davitd")), "{command}");
    Ok(())
}

#[test]
fn the_level_of_the_logs_changes_at_once() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    let socket = daemon.path("debug.sock");
    let set = |level: &str| page(&socket, "POST", &format!("/debug/log?level={level}"));
    let debugged = || daemon.log().lines().any(|line| line.contains("\"level\":\"DEBUG\""));
    // What is refused is logged at debug, and when it is, the call that is refused is over.
    let refused = || daemon.ctr().fails("containers info nothing");
    refused()?;
    ensure!(!debugged(), "it logs at info");
    ensure!(set("debug")? == ("200 OK".into(), "debug\n".into()));
    ensure!(page(&socket, "GET", "/debug/log")?.1 == "debug\n");
    refused()?;
    ensure!(debugged(), "it does not log at debug");
    for bad in ["loud", "davit=loud", ""] {
        let (status, _) = set(bad)?;
        ensure!(status.starts_with("400 "), "{bad}: {status}");
    }
    ensure!(page(&socket, "GET", "/debug/log")?.1 == "debug\n", "what is refused changes nothing");
    // Each line is a document, but for one that is being written.
    let log = daemon.log();
    for line in log.rsplit_once('\n').map_or("", |(whole, _)| whole).lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| line.to_owned())?;
    }
    Ok(())
}

#[test]
fn who_asks_for_profiles_of_go_is_told_so() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = daemon()?;
    let socket = daemon.path("debug.sock");
    for (method, target, status) in [
        ("GET", "/debug/pprof/heap", "404 davitd is no Go program"),
        ("GET", "/debug/pprof/goroutine?debug=2", "404 davitd is no Go program"),
        ("GET", "/debug/other", "404 Not Found"),
        ("DELETE", "/debug/vars", "405 Method Not Allowed"),
        ("POST", "/debug/log", "400 say which"),
    ] {
        let (answer, body) = page(&socket, method, target)?;
        ensure!(
            answer.starts_with(status) && body.trim_end() == answer,
            "{method} {target}: {answer}\n{body}"
        );
    }
    let Some(ctr) = bins::on_path("ctr") else {
        eprintln!("skipped in part: needs ctr (apt-get install containerd)");
        return Ok(());
    };
    let output = Command::new(ctr).arg("pprof").arg("-d").arg(&socket).arg("heap").output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("davitd is no Go program"), "{said}");
    Ok(())
}

/// A group that is named may read, and nobody else.
#[test]
fn the_socket_is_its_owners() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let config = format!(
        "version = 2\n[debug]\naddress = \"{FOLDER}/d/debug.sock\"\nuid = 7\ngid = 8\nformat = \"json\"\nlevel = \"warn\"\n"
    );
    let daemon = Daemon::start_with(&[], &config)?;
    let found = std::fs::metadata(daemon.path(Path::new("d/debug.sock")))?;
    ensure!((found.uid(), found.gid(), found.permissions().mode() & 0o777) == (7, 8, 0o660), "{found:?}");
    Ok(())
}
