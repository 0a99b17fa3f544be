//! A snapshotter of our own behind a socket. It may have layers which nobody has unpacked, as those that mount images from afar,
//! and answers Prepare for a layer with "already exists" then; or it answers mounts that a process serves, see `served`.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use davit_integration::registry::Registry;
use davit_integration::{Daemon, daemon, image, wait};
use davit_proto::containerd::services::snapshots::v1 as wire;
use davit_proto::containerd::services::snapshots::v1::snapshots_server::{Snapshots, SnapshotsServer};
use davit_proto::containerd::types::Mount;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::front;
use crate::root;

/// The label by which it is told what a snapshot is going to be.
const TARGET: &str = "containerd.io/snapshot.ref";

/// The label with the digest of the layer, which it would fetch.
const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";

/// Where its snapshots are.
#[derive(Clone)]
pub(super) enum Place {
    /// All in the same folder.
    One(PathBuf),
    /// Each in a folder below this one, over those of its parents by fuse-overlayfs.
    Served(PathBuf),
}

/// It has every layer, or none.
#[derive(Clone)]
pub(super) struct Lazy {
    pub(super) place: Place,
    /// Whether it has layers now.
    pub(super) has: bool,
    pub(super) snapshots: Arc<Mutex<BTreeMap<String, wire::Info>>>,
}

impl Lazy {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<String, wire::Info>> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: &str, parent: String, kind: wire::Kind, labels: BTreeMap<String, String>) {
        let now = Some(SystemTime::now().into());
        let (kind, name) = (kind.into(), name.to_owned());
        let info = wire::Info { name: name.clone(), parent, kind, created_at: now, updated_at: now, labels };
        self.locked().insert(name, info);
    }

    fn find(&self, key: &str) -> Result<wire::Info, Status> {
        let found = self.locked().get(key).cloned();
        found.ok_or_else(|| Status::not_found(format!("snapshot {key}")))
    }

    /// Where the files of a snapshot are.
    fn folder(&self, key: &str) -> PathBuf {
        match &self.place {
            Place::One(folder) => folder.clone(),
            Place::Served(folder) => folder.join(key.replace(['/', ':'], "_")),
        }
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let (folder, mut parent) = (self.folder(key), self.find(key)?.parent);
        let Place::Served(_) = self.place else { return Ok(bind(&folder)) };
        let mut lowers = Vec::new();
        while !parent.is_empty() {
            lowers.push(self.folder(&parent).join("fs").display().to_string());
            parent = self.find(&parent)?.parent;
        }
        if lowers.is_empty() {
            return Ok(bind(&folder.join("fs")));
        }
        let of = |name: &str, below: &str| format!("{name}={}", folder.join(below).display());
        let options =
            vec![format!("lowerdir={}", lowers.join(":")), of("upperdir", "fs"), of("workdir", "work")];
        let (kind, source) = ("fuse3.fuse-overlayfs".to_owned(), "overlay".to_owned());
        Ok(vec![Mount { r#type: kind, source, options, ..Default::default() }])
    }

    /// Makes the folders of a snapshot, if it has its own.
    fn make(&self, key: &str) -> Result<(), Status> {
        let Place::Served(_) = self.place else { return Ok(()) };
        let folder = self.folder(key);
        ["fs", "work"].iter().try_for_each(|name| Ok(std::fs::create_dir_all(folder.join(name))?))
    }
}

fn bind(folder: &Path) -> Vec<Mount> {
    let (source, options) = (folder.display().to_string(), vec!["rbind".into(), "rw".into()]);
    vec![Mount { r#type: "bind".into(), source, options, ..Default::default() }]
}

#[tonic::async_trait]
impl Snapshots for Lazy {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let wire::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        if let Some(target) = labels.get(TARGET).cloned().filter(|_| self.has) {
            self.add(&target, parent, wire::Kind::Committed, labels);
            return Err(Status::already_exists(format!("target snapshot {target:?}")));
        }
        self.make(&key)?;
        self.add(&key, parent, wire::Kind::Active, labels);
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts: self.mounts(&key)? }))
    }

    async fn view(
        &self,
        _: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        Err(Status::unimplemented("view"))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        Ok(Response::new(wire::MountsResponse { mounts: self.mounts(&request.into_inner().key)? }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let wire::CommitSnapshotRequest { name, key, labels, .. } = request.into_inner();
        let info = self.find(&key)?;
        self.locked().remove(&key);
        if let Place::Served(_) = self.place {
            std::fs::rename(self.folder(&key), self.folder(&name))?;
        }
        self.add(&name, info.parent, wire::Kind::Committed, labels);
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        self.locked().remove(&key);
        if let Place::Served(_) = self.place {
            std::fs::remove_dir_all(self.folder(&key))?;
        }
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let info = self.find(&request.into_inner().key)?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        _: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        Err(Status::unimplemented("update"))
    }

    type ListStream = tokio_stream::Iter<std::vec::IntoIter<Result<wire::ListSnapshotsResponse, Status>>>;

    async fn list(
        &self,
        _: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let info = self.locked().values().cloned().collect();
        Ok(Response::new(tokio_stream::iter(vec![Ok(wire::ListSnapshotsResponse { info })])))
    }

    async fn usage(&self, _: Request<wire::UsageRequest>) -> Result<Response<wire::UsageResponse>, Status> {
        Ok(Response::new(wire::UsageResponse::default()))
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

/// Serves it for as long as the runtime is there.
pub(super) fn serve(lazy: Lazy, socket: &Path) -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let inside = runtime.enter();
    let listener = UnixListener::bind(socket)?;
    drop(inside);
    runtime.spawn(
        tonic::transport::Server::builder()
            .add_service(SnapshotsServer::new(lazy))
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
    UnixStream::connect(socket)?;
    Ok(runtime)
}

#[test]
fn layers_that_a_snapshotter_has_are_not_fetched() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("davit-lazy-").tempdir_in("/tmp")?;
    let (rootfs, socket) = (folder.path().join("rootfs"), folder.path().join("s.sock"));
    let layer = image::busybox_layer()?;
    tar::Archive::new(layer.as_slice()).unpack(&rootfs)?;
    // It is no differ, and says so: then the next one is asked.
    let more = format!(
        "exports = {{ enable_remote_snapshot_annotations = \"true\" }}\n[proxy_plugins.none]\ntype = \
         \"diff\"\naddress = {socket:?}\n[diff]\ndefault = [\"none\", \"walking\"]\nsnapshotters = {{ overlayfs = \
         \"walking\" }}\n"
    );
    let daemon = front("lazy", "snapshot", &socket, &more)?;
    let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(()) };
    let name = format!("{}/box:1", registry.address);
    let archive = daemon.path("busybox.tar");
    image::busybox(&archive)?;
    daemon.ctr().run(&format!("images import --no-unpack {}", archive.display()))?;
    daemon::ok(daemon.davit(["tag", "busybox", &name])?)?;
    daemon::ok(daemon.davit(["push", &name])?)?;
    daemon::ok(daemon.davit(["rmi", "busybox", &name])?)?;
    let content = || daemon.ctr().run("content ls -q");
    wait::until("the image is gone", || content().ok()?.trim().is_empty().then_some(()))?;

    // Without the layer it is fetched and unpacked, as for any other.
    let unpacked = folder.path().join("unpacked");
    std::fs::create_dir(&unpacked)?;
    let lazy = Lazy { place: Place::One(rootfs), has: true, snapshots: Arc::default() };
    let without = Lazy { has: false, place: Place::One(unpacked), ..lazy.clone() };
    let run = || daemon.davit(["run", "--rm", "--snapshotter", "lazy", &name, "echo", "hello"]);
    let server = serve(without, &socket)?;
    let said = daemon::ok(run()?)?;
    ensure!(said == "hello\n", "{said}");
    ensure!(content()?.contains(&image::digest(&layer)), "{}", content()?);
    daemon::ok(daemon.davit(["rmi", &name])?)?;
    wait::until("the image is gone", || content().ok()?.trim().is_empty().then_some(()))?;
    drop(server);
    std::fs::remove_file(&socket)?;

    lazy.locked().clear();
    let _server = serve(lazy.clone(), &socket)?;
    let said = daemon::ok(run()?)?;
    ensure!(said == "hello\n", "{said}");
    let there = content()?;
    ensure!(there.lines().count() == 2 && !there.contains(&image::digest(&layer)), "{there}");
    let told = lazy.find(&image::digest(&layer)).context("the snapshot of the layer")?.labels;
    ensure!(told.get(LAYER) == Some(&image::digest(&layer)), "{told:?}");
    ensure!(told["containerd.io/snapshot/cri.image-ref"] == name, "{told:?}");
    ensure!(told.contains_key("containerd.io/snapshot/cri.manifest-digest"), "{told:?}");
    ensure!(told["containerd.io/snapshot/diff-id"] == image::digest(&layer), "{told:?}");
    // The image keeps the snapshot, and it goes with the image.
    daemon.ctr().run("leases create --id collect")?;
    daemon.ctr().run("leases delete --sync collect")?;
    ensure!(lazy.locked().len() == 1);
    daemon::ok(daemon.davit(["rmi", &name])?)?;
    wait::until("the snapshot is removed", || lazy.locked().is_empty().then_some(()))
}

#[test]
fn pulls_that_wait_for_a_plugin_keep_no_others_from_their_turn() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plugin = Daemon::start()?;
    let daemon = front("overlayfs", "snapshot", &plugin.address(), "")?;
    let Some(registry) = Registry::start(&daemon.path("registry"), false)? else { return Ok(()) };
    let name = format!("{}/box:1", registry.address);
    let archive = daemon.path("busybox.tar");
    image::busybox(&archive)?;
    daemon.ctr().run(&format!("images import --no-unpack {}", archive.display()))?;
    daemon::ok(daemon.davit(["tag", "busybox", &name])?)?;
    daemon::ok(daemon.davit(["push", &name])?)?;
    daemon::ok(daemon.davit(["rmi", "busybox", &name])?)?;
    let content = || daemon.ctr().run("content ls -q");
    wait::until("the image is gone", || content().ok()?.trim().is_empty().then_some(()))?;

    /// What a plugin is given to look something up.
    const LOOK: Duration = Duration::from_secs(30);
    let pid = Pid::from_raw(plugin.pid().context("the plugin runs")? as i32);
    let stopped = Instant::now();
    kill(pid, Signal::SIGSTOP)?;
    let run = |snapshotter: &str| {
        daemon.davit_command(["run", "--rm", "--pull=always", "--snapshotter", snapshotter, &name, "true"])
    };
    // More than there are places for transfers.
    let waiting =
        (0..12).map(|_| run("overlayfs").stderr(Stdio::piped()).spawn()).collect::<Result<Vec<_>, _>>()?;
    wait::until("a pull has come as far as the plugin", || {
        (content().ok()?.lines().count() >= 2).then_some(())
    })?;
    daemon::ok(run("native").output()?)?;
    kill(pid, Signal::SIGCONT)?;
    // On a machine that is so slow the first have been given up.
    let given_up = stopped.elapsed() >= LOOK;
    for client in waiting {
        let goes_on = daemon::ok(client.wait_with_output()?);
        ensure!(goes_on.is_ok() || given_up, "it does not go on with the plugin: {goes_on:?}");
    }
    Ok(())
}
