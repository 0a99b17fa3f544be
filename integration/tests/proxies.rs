//! Plugins in other processes: whole daemons, ours and Debian's, that serve snapshots, layers and content to another; and
//! programs that layers are piped through.

mod lazy;
mod served;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use davit_integration::census::Census;
use davit_integration::ctr::Ctr;
use davit_integration::daemon::{self, FOLDER};
use davit_integration::image::{self, Stored};
use davit_integration::peer::Containerd;
use davit_integration::{Daemon, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::root;

/// A daemon that uses the service `kind` of the daemon on `address` under the name `name`.
fn front(name: &str, kind: &str, address: &Path, more: &str) -> Result<Daemon> {
    let plugin = format!("[proxy_plugins.{name}]\ntype = \"{kind}\"\naddress = {address:?}\n");
    Daemon::start_with(&[], &format!("{plugin}{more}"))
}

/// The keys of the snapshots that a daemon has.
fn snapshots(ctr: &Ctr, snapshotter: &str) -> Result<Vec<String>> {
    let listed = ctr.run(&format!("snapshots --snapshotter {snapshotter} ls"))?;
    Ok(listed.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// Runs a container on a snapshotter of a plugin, and takes everything away; what the plugin has for others stays.
fn a_life(daemon: &Daemon, plugin: &Ctr, snapshotter: &str) -> Result<()> {
    daemon.import_busybox()?;
    let own = plugin.run(&format!("snapshots --snapshotter {snapshotter} prepare of-others"));
    own.context("a snapshot of the plugin's own")?;
    let run = |args: &[&str]| daemon::ok(daemon.davit(args)?);
    let said = run(&["run", "--snapshotter", snapshotter, "--name", "one", "busybox", "echo", "hello"])?;
    ensure!(said == "hello\n", "{said}");
    // The layer and the container's own, by the keys of the metadata.
    let there = snapshots(plugin, snapshotter)?;
    let prefix = format!("{}/", daemon.namespace());
    let ours = there.iter().filter(|key| key.starts_with(&prefix)).count();
    ensure!(ours == 2 && there.len() == 3, "{there:?}");
    let known = snapshots(&daemon.ctr(), snapshotter)?;
    ensure!(known.len() == 2 && known.iter().all(|key| !key.starts_with(&prefix)), "{known:?}");
    let usage = daemon.ctr().run(&format!("snapshots --snapshotter {snapshotter} usage"))?;
    ensure!(usage.lines().count() == 3, "{usage}");

    // The plugin's collector runs at a removal, and has no reason to keep ours but what we told it.
    plugin.run(&format!("snapshots --snapshotter {snapshotter} prepare short"))?;
    plugin.run(&format!("snapshots --snapshotter {snapshotter} rm short"))?;
    plugin.run("leases create --id collect")?;
    plugin.run("leases delete --sync collect")?;
    ensure!(snapshots(plugin, snapshotter)?.iter().filter(|key| key.starts_with(&prefix)).count() == 2);

    run(&["rm", "one"])?;
    run(&["rmi", "busybox"])?;
    let left = || snapshots(plugin, snapshotter).unwrap_or_default();
    let only_ours_are_gone = || left().iter().all(|key| !key.starts_with(&prefix)).then_some(());
    wait::until("the collector has removed our snapshots", only_ours_are_gone)
        .with_context(|| format!("{:?}", left()))
}

#[test]
fn containers_run_on_snapshots_of_containerd() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plugin = Containerd::start()?;
    // By a file of containerd's form, in place of the snapshotter of this name.
    let config = format!(
        "version = 2\n[proxy_plugins.native]\ntype = \"snapshot\"\naddress = {:?}\ncapabilities = \
         [\"remap-ids\"]\n[proxy_plugins.native.exports]\nkey = \"value\"\n",
        plugin.address()
    );
    let daemon = Daemon::start_with(&[], &format!("{config}[debug]\nlevel = \"debug\"\n[log]\n"))?;
    let listed = daemon.ctr().run("plugins ls -d id==native")?;
    for words in ["remap-ids", "value", &plugin.address().display().to_string(), "linux/"] {
        ensure!(listed.contains(words), "{words}: {listed}");
    }
    a_life(&daemon, &Ctr::new(&plugin.address(), &daemon.namespace()), "native")
}

#[test]
fn containers_survive_the_plugin_that_their_snapshots_are_of() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut plugin = Daemon::start()?;
    let daemon = front("overlayfs", "snapshot", &plugin.address(), "")?;
    let behind = Ctr::new(&plugin.address(), &daemon.namespace());
    a_life(&daemon, &behind, "overlayfs")?;

    daemon.import_busybox()?;
    let census = Census::take(&daemon.path(""));
    let run = |args: &[&str]| daemon::ok(daemon.davit(args)?);
    let on = ["--snapshotter", "overlayfs"];
    run(&["run", "-d", on[0], on[1], "--name", "long", "busybox", "sleep", "1000"])?;
    let ctr = daemon.ctr();
    ctr.run("snapshots --snapshotter overlayfs prepare short")?;
    let collect = || -> Result<()> {
        ctr.run("leases create --id collect")?;
        ctr.run("leases delete --sync collect").map(drop)
    };
    let pid = Pid::from_raw(plugin.pid().context("the plugin runs")? as i32);
    kill(pid, Signal::SIGSTOP)?;
    // Who has nothing to do with the plugin does not notice, and the collector does not wait for it.
    ctr.run("snapshots --snapshotter overlayfs rm short")?;
    run(&["run", "--rm", "--snapshotter", "native", "busybox", "true"])?;
    collect()?;
    run(&["exec", "long", "true"])?;
    kill(pid, Signal::SIGKILL)?;
    plugin.stop(Signal::SIGKILL)?;
    run(&["exec", "long", "true"])?;
    let refused = ctr.fails("snapshots --snapshotter overlayfs prepare x")?;
    ensure!(refused.contains("proxy plugin overlayfs: the connection failed"), "{refused}");
    plugin.restart()?;
    wait::until("what was removed meanwhile is collected", || {
        collect().ok()?;
        (!snapshots(&behind, "overlayfs").ok()?.iter().any(|key| key.ends_with("/short"))).then_some(())
    })?;
    run(&["run", "--rm", on[0], on[1], "busybox", "true"])?;
    run(&["rm", "-f", "long"])?;
    census.settle(&daemon.path(""))
}

#[test]
fn differs_are_asked_in_their_order() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plugin = Daemon::start()?;
    let order = "[diff]\ndefault = [\"other\", \"walking\"]\n";
    let daemon = front("other", "diff", &plugin.address(), order)?;
    let archive = plugin.path("busybox.tar");
    image::busybox(&archive)?;
    daemon.ctr().run(&format!("images import --no-unpack {}", archive.display()))?;
    // It does not have the layer, and says so: that is an answer.
    let run = || daemon.davit(["run", "--rm", "busybox", "true"]);
    let refused = run()?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && text.contains("proxy plugin other: "), "{text}");
    let behind = Ctr::new(&plugin.address(), &daemon.namespace());
    behind.run(&format!("images import {}", archive.display()))?;
    daemon::ok(run()?)?;
    // What it makes must be in our store, where it is not.
    daemon.ctr().run("snapshots prepare one")?;
    let refused = daemon.ctr().fails("snapshots diff one")?;
    ensure!(refused.contains("which is not there"), "{refused}");

    let unknown = Daemon::start_with(&[], "[diff]\ndefault = [\"absent\"]\n");
    ensure!(unknown.is_err_and(|error| format!("{error:#}").contains("needed differ not loaded: absent")));
    Ok(())
}

#[test]
fn content_of_containerd_is_the_content_of_a_daemon() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plugin = Containerd::start()?;
    let daemon = front("store", "content", &plugin.address(), "")?;
    daemon.import_busybox()?;
    let said = daemon::ok(daemon.davit(["run", "--rm", "busybox", "echo", "hello"])?)?;
    ensure!(said == "hello\n", "{said}");
    let behind = Ctr::new(&plugin.address(), &daemon.namespace());
    let blobs = || -> Result<usize> { Ok(behind.run("content ls -q")?.lines().count()) };
    // An index, a manifest, a configuration and a layer.
    ensure!(blobs()? >= 3, "{}", behind.run("content ls")?);
    ensure!(!daemon.path("root/io.containerd.content.v1.content/blobs").exists());
    let listed = daemon.ctr().run("plugins ls type==io.containerd.content.v1")?;
    ensure!(listed.contains("store") && listed.lines().count() == 2, "{listed}");
    // What the plugin has for others is not ours to collect.
    let file = daemon.path("others");
    fs::write(&file, "others")?;
    let label = format!("content label {} containerd.io/gc.root=theirs", image::digest(b"others"));
    // The plugin's own collector may take it away before it has its label.
    wait::until("the others' content is there to stay", || {
        let mut others = behind.command(&["content", "ingest", "others"]);
        others.stdin(fs::File::open(&file).ok()?).output().ok()?;
        behind.run(&label).ok()
    })?;
    daemon::ok(daemon.davit(["rmi", "busybox"])?)?;
    let kept = format!("{}\n", image::digest(b"others"));
    wait::until("only the others' content is left", || {
        (behind.run("content ls -q").ok()? == kept).then_some(())
    })
    .with_context(|| behind.run("content ls").unwrap_or_default())
}

/// A type of layers that no daemon knows: each byte is one more than it should be.
const ROTATED: &str = "layer.v1.tar+rotated";

/// Puts an image into the daemon whose layer is of that type.
fn import_rotated(daemon: &Daemon) -> Result<()> {
    let layer = image::busybox_layer()?;
    let blob = layer.iter().map(|byte| byte.wrapping_add(1)).collect();
    let layers = [Stored { kind: ROTATED, blob, diff_id: image::digest(&layer) }];
    let archive = daemon.path("rotated.tar");
    image::oci_archive_of(&archive, image::BUSYBOX, &layers, &json!({ "Env": ["PATH=/bin"] }))?;
    daemon.ctr().run(&format!("images import --no-unpack {}", archive.display())).map(drop)
}

#[test]
fn layers_go_through_programs() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let config = format!(
        "[stream_processors.rotate]\naccepts = [\"application/vnd.oci.image.{ROTATED}\"]\nreturns = \
         \"application/vnd.oci.image.layer.v1.tar\"\npath = \"{FOLDER}rotate\"\nenv = [\"LC_ALL=C\"]\n"
    );
    let daemon = Daemon::start_with(&[], &config)?;
    let script = |text: &str| -> Result<()> {
        fs::write(daemon.path("new"), format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(daemon.path("new"), fs::Permissions::from_mode(0o755))?;
        Ok(fs::rename(daemon.path("new"), daemon.path("rotate"))?)
    };
    import_rotated(&daemon)?;
    let census = Census::take(&daemon.path(""));
    let pid = daemon.pid().context("the daemon runs")?;
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let run = || daemon.davit(["run", "--rm", "busybox", "echo", "hello"]);
    let rotate = r"tr '\001-\377\000' '\000-\377'";

    // One that fails spoils the layer, even when all of it came out.
    script(&format!("{rotate}; echo the key is wrong >&2; exit 4"))?;
    let refused = run()?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "{text}");
    ensure!(text.contains("stream processor \"rotate\" ended with 4: the key is wrong"), "{text}");
    ensure!(snapshots(&daemon.ctr(), "overlayfs")?.is_empty(), "nothing of it is kept");
    let open = descriptors();

    // A client that goes away takes it along.
    script(&format!("echo $$ > {}; exec sleep 1000", daemon.path("pid").display()))?;
    let mut waiting =
        daemon.davit_command(["run", "--rm", "busybox", "true"]).stderr(Stdio::null()).spawn()?;
    let program = wait::until("the program runs", || {
        fs::read_to_string(daemon.path("pid")).ok()?.trim().parse::<i32>().ok()
    })?;
    waiting.kill()?;
    waiting.wait()?;
    wait::until("the program is gone", || (!Path::new(&format!("/proc/{program}")).exists()).then_some(()))?;

    script(rotate)?;
    let said = daemon::ok(run()?)?;
    ensure!(said == "hello\n", "{said}");
    wait::until("no descriptor is left open", || (descriptors() <= open).then_some(()))
        .with_context(|| format!("{} of {open}", descriptors()))?;
    census.settle(&daemon.path(""))
}

#[test]
fn what_cannot_be_is_refused_at_the_start() -> Result<()> {
    for (config, words) in [
        ("[proxy_plugins.x]\ntype = \"volume\"\naddress = \"/x\"\n", "unknown variant `volume`"),
        ("[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"x\"\n", "want the path of a unix socket"),
        (
            "[proxy_plugins.x]\ntype = \"content\"\naddress = \"/x\"\n[proxy_plugins.y]\ntype = \"content\"\naddress = \
             \"/y\"\n",
            "want one content store",
        ),
        ("[stream_processors.x]\npath = \"x\"\n", "want path, accepts and returns"),
    ] {
        let refused = Daemon::start_with(&[], config).err().map(|error| format!("{error:#}"));
        ensure!(refused.as_ref().is_some_and(|text| text.contains(words)), "{words}: {refused:?}");
    }
    Ok(())
}
