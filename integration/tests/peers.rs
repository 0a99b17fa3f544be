//! Parts of ours among parts of others: whoever changes over does it piece by piece.

use std::fs;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::client::Client;
use davit_integration::ctr::{Ctr, text};
use davit_integration::peer::Containerd;
use davit_integration::{Daemon, bins, image, memory, wait};
use davit_proto::containerd::services::tasks::v1::GetRequest;
use davit_proto::containerd::v1::types::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::root;

const IMAGE: &str = image::BUSYBOX;

/// Our shim under Debian's containerd: what an operator does with one container.
#[test]
fn our_shim_under_containerd() -> Result<()> {
    if !root() {
        return Ok(());
    }
    if bins::on_path("containerd").is_none() {
        eprintln!("skipped: containerd is not installed");
        return Ok(());
    }
    let peer = Containerd::start()?;
    peer.import_busybox()?;
    let ctr = Ctr::new(&peer.address(), &peer.namespace());
    let before = Census::take(peer.folder());
    tour(&ctr).map_err(|error| error.context(log(&peer)))?;
    before.settle(peer.folder())
}

fn log(peer: &Containerd) -> String {
    fs::read_to_string(peer.folder().join("log")).unwrap_or_default()
}

fn tour(ctr: &Ctr) -> Result<()> {
    let runtime = "--runtime io.containerd.davit.v2";
    let hello = ctr.run(&format!("run --rm {runtime} {IMAGE} hello echo hello"))?;
    ensure!(hello == "hello\n", "{hello}");
    let mut seven = ctr.words(&format!("run --rm {runtime} {IMAGE} seven"));
    let seven = seven.args(["sh", "-c", "exit 7"]).output()?;
    ensure!(seven.status.code() == Some(7), "{}", text(&seven));
    let terminal = ctr.on_terminal(&format!("run --rm -t {runtime} {IMAGE} tty sh -c 'tty; sleep 1'"))?;
    ensure!(terminal.contains("/dev/pts/0"), "{terminal}");

    ctr.run(&format!("run -d {runtime} --memory-limit 67108864 {IMAGE} long sleep 3600"))?;
    ensure!(!memory::named("containerd-shim-davit-v2", "-id\0long").is_empty(), "another shim serves");
    ensure!(ctr.run("tasks ls")?.contains("RUNNING"));
    let inside = ctr.run("tasks exec --exec-id e1 long echo inside")?;
    ensure!(inside == "inside\n", "{inside}");
    let code = ctr.words("tasks exec --exec-id e2 long false").status()?.code();
    ensure!(code == Some(1), "{code:?}");
    let inside = ctr.on_terminal("tasks exec -t --exec-id e3 long sh -c 'tty; sleep 1'")?;
    ensure!(inside.contains("/dev/pts/"), "{inside}");
    ensure!(ctr.run("tasks ps long")?.lines().count() == 2);
    ctr.run("tasks pause long")?;
    ensure!(ctr.run("tasks ls")?.contains("PAUSED"));
    ctr.run("tasks resume long")?;
    ensure!(ctr.run("tasks ls")?.contains("RUNNING"));
    let metrics = ctr.run("tasks metrics long")?;
    ensure!(metrics.contains("memory.") && metrics.contains("pids."), "{metrics}");
    ctr.run("tasks kill -s SIGKILL long")?;
    wait::until("the task is stopped", || ctr.run("tasks ls").ok()?.contains("STOPPED").then_some(()))?;
    let removed = text(&ctr.words("tasks rm long").output()?);
    ensure!(removed.contains("137"), "{removed}");
    ctr.run("containers rm long")?;
    Ok(())
}

/// A shim made with the crate that makers of other runtimes use, under our daemon: named by its path, it runs, outlives
/// a daemon that is killed, and is found again with what happened meanwhile.
#[test]
fn a_shim_of_others_under_our_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let shim = bins::folder()?.join("davit-peer-shim");
    if !shim.exists() {
        eprintln!("skipped: {} is not built; `cargo xtask test` builds it", shim.display());
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    daemon.import_busybox()?;
    let before = Census::take(&daemon.path(""));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(others(&mut daemon, &shim.display().to_string()))?;
    before.settle(&daemon.path(""))
}

async fn others(daemon: &mut Daemon, shim: &str) -> Result<()> {
    let parent = image::digest(&image::busybox_layer()?);
    let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
    client.runtime = shim.to_owned();
    client.run("short", &parent).await?;
    let lasting = client.start("lasting", &parent, &["sleep", "3600"]).await?;
    let ending = client.start("ending", &parent, &["sleep", "3600"]).await?;
    daemon.stop(Signal::SIGKILL)?;
    kill(Pid::from_raw(ending as i32), Signal::SIGTERM)?;
    let gone = || fs::metadata(format!("/proc/{ending}")).is_err().then_some(());
    wait::until("a process ends without a daemon", gone)?;
    daemon.restart()?;

    let mut client = Client::new(&daemon.address(), &daemon.namespace()).await?;
    let get = |id: &str| GetRequest { container_id: id.into(), ..Default::default() };
    let process = client.tasks.get(get("lasting")).await?.into_inner().process.context("no process")?;
    ensure!(process.pid == lasting && process.status() == Status::Running, "{process:?}");
    ensure!(client.finish("ending").await? == 143);
    ensure!(client.kill("lasting").await? == 137);
    Ok(())
}
