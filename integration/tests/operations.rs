//! What whoever operates the daemon meets: health, versions, configurations, and a second daemon by mistake.

use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use davit_integration::client::connect;
use davit_integration::ctr::text;
use davit_integration::{Daemon, bins, image};
use nix::sys::signal::Signal;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::root;

/// `davitd` with these arguments; it must end by itself, so it must not be able to serve.
fn davitd(args: &[&str]) -> Result<Output> {
    let davitd = bins::folder()?.join("davitd");
    // A daemon that serves after all is a failure, not a test without end.
    let mut command = Command::new("timeout");
    Ok(command.args(["--signal=KILL", "60"]).arg(davitd).args(args).output()?)
}

/// What it printed; it must have succeeded.
fn printed(args: &[&str]) -> Result<String> {
    let output = davitd(args)?;
    ensure!(output.status.success(), "{args:?}: {}", text(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// What it complained of; it must have ended with 1.
fn refused(args: &[&str]) -> Result<String> {
    let output = davitd(args)?;
    ensure!(output.status.code() == Some(1), "{args:?}: {}: {}", output.status, text(&output));
    Ok(String::from_utf8(output.stderr)?)
}

#[test]
fn health_is_served() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut health = HealthClient::new(connect(&daemon.address()).await?);
        let answer = health.check(HealthCheckRequest::default()).await?.into_inner();
        ensure!(answer.status() == ServingStatus::Serving, "{answer:?}");
        let unknown = health.check(HealthCheckRequest { service: "no.such.Service".into() }).await;
        let status = unknown.err().context("an unknown service is healthy")?;
        ensure!(status.code() == tonic::Code::NotFound, "{status:?}");
        anyhow::Ok(())
    })?;
    daemon.stop(Signal::SIGTERM)
}

#[test]
fn a_second_daemon_is_refused() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let own = |name: &str| daemon.path(name).display().to_string();
    let second = |root: &str, state: &str, socket: &str| {
        let (config, root, state, socket) = (own("config.toml"), own(root), own(state), own(socket));
        refused(&["--config", &config, "--root", &root, "--state", &state, "--address", &socket])
    };
    let error = second("root", "state2", "e.sock")?;
    ensure!(error.contains("/root/") && error.contains("in use by another process"), "{error}");
    let error = second("root2", "state", "e.sock")?;
    ensure!(error.contains("/state") && error.contains("in use by another daemon"), "{error}");
    let error = second("root2", "state2", "d.sock")?;
    ensure!(error.contains("another daemon answers on") && error.contains("d.sock"), "{error}");
    // The first goes on, on its own socket.
    ensure!(daemon.ctr().run("version")?.contains("Server"));
    daemon.stop(Signal::SIGKILL)?;
    // What a killed daemon leaves behind (socket, locks) is in nobody's way.
    daemon.restart()?;
    daemon.stop(Signal::SIGTERM)
}

#[test]
fn a_wrong_configuration_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("c.toml");
    let path = file.display().to_string();
    for (config, flags, words) in [
        ("[grpc]\nadress = \"/x\"\n", vec![], vec![path.as_str(), "line 2", "adress", "address"]),
        ("root =\n", vec![], vec![path.as_str(), "line 1"]),
        ("[metadata]\nengine = \"bolt\"\n", vec![], vec!["bolt", "sled", "redb"]),
        ("root = \"relative\"\n", vec![], vec!["root", "relative", "absolute path"]),
        ("", vec!["--root", "/tmp/x", "--state", "/tmp/x"], vec!["state", "another folder than root"]),
        ("", vec!["--log-level", "loud"], vec!["log.level", "loud"]),
    ] {
        fs::write(&file, config)?;
        let error = refused(&[&["--config", &path], flags.as_slice()].concat())?;
        ensure!(words.iter().all(|word| error.contains(word)), "{config:?} {flags:?}: {error}");
    }
    let missing = dir.path().join("missing.toml").display().to_string();
    let error = refused(&["--config", &missing])?;
    ensure!(error.contains(&missing) && error.contains("No such file"), "{error}");
    Ok(())
}

#[test]
fn configurations_are_shown() -> Result<()> {
    let version = printed(&["--version"])?;
    ensure!(version.starts_with("davitd ") && version.lines().count() == 1, "{version}");
    let default = printed(&["config", "default"])?;
    ensure!(default.contains("/var/lib/davit") && default.contains("/run/containerd/s"), "{default}");
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("c.toml");
    let path = file.display().to_string();
    // The defaults are a configuration; what a file and then a flag say goes over them.
    fs::write(&file, &default)?;
    ensure!(printed(&["--config", &path, "config", "dump"])? == default);
    fs::write(&file, "root = \"/a\"\nstate = \"/b\"\n")?;
    let dump = printed(&["--config", &path, "--root", "/c", "config", "dump"])?;
    ensure!(dump.contains("root = \"/c\"\nstate = \"/b\"\n"), "{dump}");
    Ok(())
}

/// Whoever starts the daemon may ignore SIGCHLD, and a program inherits that.
#[test]
fn a_parent_that_ignores_its_children_does_no_harm() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start_wrapped(&["env", "--ignore-signal=CHLD"])?;
    daemon.import_busybox()?;
    let output = daemon.ctr().run(&format!("run --rm {} child echo here", image::BUSYBOX))?;
    ensure!(output == "here\n", "{output}");
    Ok(())
}
