//! What the daemon checks before it serves: it starts as it was told to, or not at all.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use davit_integration::daemon::FOLDER;
use davit_integration::{Daemon, loopback};

use super::certificates::{Authority, Identity, settings};
use super::page;
use crate::root;

/// Why a daemon with this configuration does not start.
fn refusal(config: &str) -> Result<String> {
    match Daemon::start_with(&[], config) {
        Ok(_) => anyhow::bail!("it started with\n{config}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

#[test]
fn tcp_that_is_not_safe_keeps_the_daemon_from_starting() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let (authority, other) = (Authority::new()?, Authority::new()?);
    let (server, stranger) = (authority.server()?, other.server()?);
    let address = loopback::address().to_string();
    fs::write(authority.path("nothing"), "no certificate")?;
    let mixed = Identity { cert: server.cert.clone(), key: stranger.key };
    let missing = Identity { cert: server.cert.clone(), key: authority.path("absent") };
    let ca = authority.ca();
    for (config, words) in [
        (format!("[grpc.tcp]\naddress = \"{address}\"\n"), "with mutual TLS only"),
        (format!("version = 2\n[grpc]\ntcp_address = \"{address}\"\n"), "with mutual TLS only"),
        (
            format!(
                "version = 2\n[grpc]\ntcp_address = \"{address}\"\ntcp_tls_cert = {:?}\ntcp_tls_key = {:?}\n",
                server.cert, server.key
            ),
            "grpc.tcp.ca",
        ),
        (settings(&address, &authority.path("nothing"), &server), "there is no certificate in"),
        (settings(&address, &authority.path("absent"), &server), "absent"),
        (settings(&address, &ca, &mixed), "is no certificate of the key"),
        (settings(&address, &ca, &missing), "cannot read the key in"),
        (settings("192.0.2.1:1", &ca, &server), "cannot listen on 192.0.2.1:1"),
    ] {
        let told = refusal(&config)?;
        ensure!(told.contains(words), "{words} is not in\n{told}");
    }
    Ok(())
}

#[test]
fn what_is_required_is_there_or_the_daemon_is_not() -> Result<()> {
    if !root() {
        return Ok(());
    }
    for (config, words) in [
        (
            "version = 2\nrequired_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
            "required plugin [io.containerd.grpc.v1.cri] not included",
        ),
        ("required_plugins = [\"cri\"]\n", "required plugin [io.containerd.grpc.v1.cri] not included"),
        ("version = 2\nrequired_plugins = [\"cri\"]\n", "invalid required plugin URI \"cri\""),
        (
            "[plugin_list]\nrequired = [\"io.containerd.snapshotter.v1.native\"]\n\
             disabled = [\"io.containerd.snapshotter.v1.native\"]\n",
            "required plugin [io.containerd.snapshotter.v1.native] not included",
        ),
    ] {
        let told = refusal(config)?;
        ensure!(told.contains(words), "{words} is not in\n{told}");
    }
    let daemon = Daemon::start_with(
        &[],
        "version = 2\nrequired_plugins = [\"io.containerd.snapshotter.v1.overlayfs\"]\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.native\", \
         \"io.containerd.internal.v1.restart\", \"io.containerd.grpc.v1.tasks\"]\n",
    )?;
    let plugins = daemon.ctr().run("plugins ls")?;
    ensure!(plugins.contains("overlayfs"), "{plugins}");
    for gone in ["native", "restart"] {
        ensure!(
            !plugins.lines().any(|line| line.split_whitespace().nth(1) == Some(gone)),
            "{gone}\n{plugins}"
        );
    }
    let log = daemon.log();
    let warned =
        log.lines().any(|line| line.contains("this cannot be disabled") && line.contains("grpc.v1.tasks"));
    ensure!(warned, "{log}");
    Ok(())
}

/// Who may have whose content is for the operator to say, and clients are told.
#[test]
fn content_is_shared_or_not() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let bolt = "version = 2\n[plugins.\"io.containerd.metadata.v1.bolt\"]\n";
    for (config, policy) in [
        (format!("{bolt}content_sharing_policy = \"isolated\"\n"), "isolated"),
        (format!("{bolt}content_sharing_policy = \"shared\"\n"), "shared"),
        ("[metadata]\nsharing = \"isolated\"\n".to_owned(), "isolated"),
    ] {
        let daemon = Daemon::start_with(&[], &config)?;
        let told = daemon.ctr().run("plugins ls -d id==bolt")?;
        let told = told.split_whitespace().skip_while(|word| *word != "policy").nth(1);
        ensure!(told == Some(policy), "{config}\n{told:?}");
    }
    let told = refusal(&format!("{bolt}content_sharing_policy = \"none\"\n"))?;
    ensure!(told.contains("want shared or isolated"), "{told}");
    Ok(())
}

/// Spans are sent by a build with the feature `otel`, which the tests do not run.
#[test]
fn spans_that_nobody_sends_are_named() -> Result<()> {
    if !root() {
        return Ok(());
    }
    for config in [
        "[tracing]\nendpoint = \"http://127.0.0.1:1\"\n",
        "version = 2\n[plugins.\"io.containerd.tracing.processor.v1.otlp\"]\nendpoint = \"127.0.0.1:1\"\n",
    ] {
        let log = Daemon::start_with(&[], config)?.log();
        ensure!(log.contains("built with the feature otel"), "{config}\n{log}");
    }
    ensure!(!Daemon::start()?.log().contains("feature otel"));
    Ok(())
}

/// `oom_score`, `temp` and the variables of shims are honoured, in containerd's file as in ours.
#[test]
fn the_process_is_as_it_was_told_to_be() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start_with(
        &[],
        &format!(
            "version = 2\noom_score = 321\ntemp = \"{FOLDER}/tmp\"\n[debug]\naddress = \"{FOLDER}/debug.sock\"\n"
        ),
    )?;
    let pid = daemon.pid().context("it runs")?;
    ensure!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim() == "321");
    let temp = daemon.path("tmp");
    ensure!(fs::metadata(&temp)?.permissions().mode() & 0o7777 == 0o700);
    // The block of variables that the kernel shows is the one from the start; what shims get says it.
    daemon.import_busybox()?;
    let ctr = daemon.ctr();
    ctr.run(&format!("run -d {} told sleep 3600", davit_integration::image::BUSYBOX))?;
    let found = shim_environments(&daemon)?;
    let wanted = format!("TMPDIR={}/tmp", daemon.path("").display());
    ensure!(found.iter().any(|variables| variables.contains(&wanted)), "{wanted} is not in {found:?}");
    ensure!(page(&daemon.path("debug.sock"), "GET", "/debug/log")?.0 == "200 OK");
    ctr.run("tasks kill -s SIGKILL told")?;
    Ok(())
}

/// The variables of the shims of a daemon, which have its socket among them.
fn shim_environments(daemon: &Daemon) -> Result<Vec<Vec<String>>> {
    let own = format!("GRPC_ADDRESS={}", daemon.address().display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(block) = fs::read(entry.path().join("environ")) else { continue };
        let variables = block.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
        let variables: Vec<String> = variables.collect();
        if variables.contains(&own) {
            found.push(variables);
        }
    }
    Ok(found)
}
