//! The suites that the local content store and the local snapshotters pass, once more: through the services of a
//! daemon, by adapters that are clients of its socket. Whatever stands between the wire and the disk (namespaces,
//! leases, garbage collection) must not change what the traits promise.

mod content;
mod snapshots;

use anyhow::Result;
use davit_integration::Daemon;
use davit_snapshotter::testsuite::Traits;
use nix::sys::signal::Signal;

use crate::root;

#[test]
fn content_through_the_service() -> Result<()> {
    if !root() {
        return Ok(());
    }
    // A daemon for each case: they want an empty store, and namespaces share their blobs.
    davit_content_store::testsuite::run(|_| Box::new(content::Remote::start().expect("the daemon starts")));
    Ok(())
}

#[test]
fn content_of_a_proxy_plugin_through_the_service() -> Result<()> {
    if !root() {
        return Ok(());
    }
    davit_content_store::testsuite::run(|_| {
        Box::new(content::Remote::start_on_proxy().expect("the daemons start"))
    });
    Ok(())
}

#[test]
fn overlayfs_of_a_proxy_plugin_through_the_service() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plugin = Daemon::start()?;
    let address = plugin.address();
    let config = format!(
        "[proxy_plugins.overlayfs]\ntype = \"snapshot\"\naddress = {address:?}\ncapabilities = [\"rebase\", \"remap-ids\"]\n"
    );
    let mut daemon = Daemon::start_with(&[], &config)?;
    let remote = snapshots::Remote::connect(&daemon, "overlayfs")?;
    davit_snapshotter::testsuite::run(&daemon.path("suite"), Traits::default(), &|_| remote.clone());
    daemon.stop(Signal::SIGTERM)
}

#[test]
fn overlayfs_through_the_service() -> Result<()> {
    snapshots("overlayfs", Traits::default())
}

#[test]
fn native_through_the_service() -> Result<()> {
    snapshots("native", Traits { renames_folders: true, usage_excludes_parents: false, ..Traits::default() })
}

#[test]
fn erofs_through_the_service() -> Result<()> {
    if !std::fs::read_to_string("/proc/filesystems")?.contains("\terofs\n") {
        eprintln!("skipped: needs a kernel with erofs");
        return Ok(());
    }
    snapshots("erofs", Traits { committed_is_file: true, ..Traits::default() })
}

fn snapshots(name: &str, traits: Traits) -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut daemon = Daemon::start()?;
    let remote = snapshots::Remote::connect(&daemon, name)?;
    davit_snapshotter::testsuite::run(&daemon.path("suite"), traits, &|_| remote.clone());
    daemon.stop(Signal::SIGTERM)
}
