//! Configuration files of containerd: the daemon starts with one, and says what of it has no effect.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use davit_integration::daemon::ok;
use davit_integration::{Daemon, bins};

use super::{plugins, runtime};
use crate::root;

const FILE: &str = r#"version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
imports = ["more/*.toml"]
[grpc]
tcp_tls_common_name = "of-windows"
[plugins."io.containerd.internal.v1.restart"]
interval = "3s"
"#;

#[test]
fn a_configuration_of_containerd_is_understood() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start_with(&[], FILE)?;
    runtime()?.block_on(plugins(&daemon, &[("runtime.v2", "task")]))?;
    let log = daemon.log();
    ensure!(log.contains("have no effect") && log.contains("grpc.tcp_tls_common_name"), "{log}");

    let file = daemon.path("containerd.toml");
    fs::create_dir(daemon.path("more"))?;
    fs::write(daemon.path("more/a.toml"), "version = 2\n[debug]\nlevel = \"warn\"\n")?;
    fs::write(&file, FILE)?;
    let davitd = bins::folder()?.join("davitd");
    let migrate = Command::new(&davitd).args(["config", "migrate", "--config"]).arg(&file).output()?;
    let said = String::from_utf8_lossy(&migrate.stderr).into_owned();
    ensure!(
        said == "davitd: grpc.tcp_tls_common_name of the containerd configuration has no effect\n",
        "{said}"
    );
    let migrated = ok(migrate)?;
    for line in ["level = \"warn\"", "interval = 3", "address = \"/run/containerd/containerd.sock\""] {
        ensure!(migrated.lines().any(|found| found == line), "{line} is not in\n{migrated}");
    }
    // What was migrated is a configuration of ours, and stays as it is.
    fs::write(&file, &migrated)?;
    let dump = ok(Command::new(&davitd).args(["config", "dump", "--config"]).arg(&file).output()?)?;
    ensure!(dump == migrated, "{dump}");

    // A root that containerd has worked in is no root of ours.
    let folder = daemon.path("theirs/io.containerd.metadata.v1.bolt");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("meta.db"), "")?;
    let refused = Command::new(&davitd)
        .arg("--config")
        .arg(&file)
        .arg("--root")
        .arg(daemon.path("theirs"))
        .arg("--state")
        .arg(daemon.path("their-state"))
        .arg("--address")
        .arg(daemon.path("t.sock"))
        .output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("holds the metadata of containerd"), "{said}");
    Ok(())
}
