//! Plugins that misbehave, on real sockets.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use davit_content_store::Hasher;
use davit_metadata::{Db, EngineKind};
use davit_model::{Algorithm, Coded, Digest, ErrorCode, Labels};
use davit_proto::containerd::services::content::v1 as content;
use davit_proto::containerd::services::content::v1::content_server::{Content, ContentServer};
use davit_proto::containerd::services::sandbox::v1 as sandbox;
use davit_proto::containerd::services::sandbox::v1::controller_server::{Controller, ControllerServer};
use davit_proto::containerd::services::snapshots::v1 as wire;
use davit_proto::containerd::services::snapshots::v1::snapshots_server::{Snapshots, SnapshotsServer};
use davit_snapshotter::{Kind, Snapshotter, TARGET_LABEL};
use futures::stream::{self, BoxStream, StreamExt};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::connection::{self, Connection, Patience};
use super::snapshots::ProxySnapshotter;
use super::*;
use crate::blobs::Blobs;
use crate::grpc::context::Context;
use crate::metadata::{Metadata, Parts, Sharing};
use crate::mounts::Targets;

/// How a plugin behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Honest,
    /// It takes calls and says nothing.
    Hangs,
    /// What it says is about something else.
    Lies,
    /// Its lists have no end.
    Endless,
    /// Its messages are larger than any should be.
    Huge,
    /// It sends less than there is.
    Short,
    /// It has its reasons.
    Refuses,
    /// It says nothing to who wants something deleted.
    Keeps,
    /// Its blob is larger than anybody wants to read.
    Vast,
}

/// A plugin that has every snapshot that is asked for, and one blob.
#[derive(Clone)]
struct Plugin {
    mode: Arc<Mutex<Mode>>,
    /// The namespaces that it was told, in order.
    told: Arc<Mutex<Vec<String>>>,
}

const BLOB: &[u8] = b"a blob of some bytes";

impl Plugin {
    /// Its behaviour, once a call has told its namespace.
    async fn behave<T>(&self, request: &Request<T>) -> Result<Mode, Status> {
        let namespace = request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok());
        self.told.lock().unwrap().push(namespace.unwrap_or("none").to_owned());
        let mode = *self.mode.lock().unwrap();
        match mode {
            Mode::Hangs => std::future::pending().await,
            Mode::Refuses => Err(Status::failed_precondition("not today")),
            _ => Ok(mode),
        }
    }
}

fn snapshot(name: &str) -> wire::Info {
    let labels = BTreeMap::from([(TARGET_LABEL.to_owned(), "chain".to_owned())]);
    wire::Info { name: name.to_owned(), kind: wire::Kind::Committed.into(), labels, ..Default::default() }
}

/// One page, or as many as anybody reads.
fn pages<T: Clone + Send + 'static>(page: T, mode: Mode) -> BoxStream<'static, Result<T, Status>> {
    stream::repeat(Ok(page)).take(if mode == Mode::Endless { usize::MAX } else { 1 }).boxed()
}

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not asked for"))
}

#[tonic::async_trait]
impl Snapshots for Plugin {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        self.behave(&request).await?;
        Err(Status::already_exists("the target is there"))
    }

    async fn view(
        &self,
        _: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        unused()
    }

    async fn mounts(
        &self,
        _: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        unused()
    }

    async fn commit(&self, _: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        unused()
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        self.behave(&request).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let mode = self.behave(&request).await?;
        let key = request.into_inner().key;
        let mut info = snapshot(if mode == Mode::Lies { "another" } else { &key });
        if mode == Mode::Huge {
            info.labels.insert("x".into(), "x".repeat(17 << 20));
        }
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        _: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        unused()
    }

    type ListStream = BoxStream<'static, Result<wire::ListSnapshotsResponse, Status>>;

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let mode = self.behave(&request).await?;
        // The filters are not heeded.
        let other = wire::Info { parent: "another".into(), ..snapshot("on-another") };
        let mut info = vec![other, snapshot("sha256:found"), snapshot("x")];
        if mode == Mode::Endless {
            info.extend((0..10_000).map(|number| snapshot(&format!("{number:0>1000}"))));
        }
        let page = wire::ListSnapshotsResponse { info };
        Ok(Response::new(pages(page, mode)))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let mode = self.behave(&request).await?;
        let size = if mode == Mode::Lies { -1 } else { 7 };
        Ok(Response::new(wire::UsageResponse { size, inodes: 1 }))
    }

    async fn cleanup(&self, _: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        unused()
    }
}

#[tonic::async_trait]
impl Content for Plugin {
    async fn info(
        &self,
        request: Request<content::InfoRequest>,
    ) -> Result<Response<content::InfoResponse>, Status> {
        let mode = self.behave(&request).await?;
        let size = if mode == Mode::Vast { i64::MAX } else { BLOB.len() as i64 };
        let info = content::Info { digest: request.into_inner().digest, size, ..Default::default() };
        Ok(Response::new(content::InfoResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        _: Request<content::UpdateRequest>,
    ) -> Result<Response<content::UpdateResponse>, Status> {
        unused()
    }

    type ListStream = BoxStream<'static, Result<content::ListContentResponse, Status>>;

    async fn list(
        &self,
        request: Request<content::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let mode = self.behave(&request).await?;
        let info = content::Info { digest: digest_of(BLOB).to_string(), ..Default::default() };
        let nonsense = content::Info { digest: "../../etc".into(), size: -1, ..Default::default() };
        let mut page = content::ListContentResponse { info: vec![nonsense, info] };
        if mode == Mode::Keeps {
            let digests = (0..3_u8).map(|number| digest_of(&[number]).to_string());
            page.info.extend(digests.map(|digest| content::Info { digest, ..Default::default() }));
        }
        Ok(Response::new(pages(page, mode)))
    }

    async fn delete(&self, _: Request<content::DeleteContentRequest>) -> Result<Response<()>, Status> {
        self.told.lock().unwrap().push("delete".to_owned());
        std::future::pending().await
    }

    type ReadStream = BoxStream<'static, Result<content::ReadContentResponse, Status>>;

    async fn read(
        &self,
        request: Request<content::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let mode = self.behave(&request).await?;
        if mode == Mode::Vast {
            let piece = content::ReadContentResponse { data: vec![0; 64 << 10].into(), ..Default::default() };
            return Ok(Response::new(stream::repeat(Ok(piece)).boxed()));
        }
        let content::ReadContentRequest { offset, size, .. } = request.into_inner();
        let end = if size == 0 { BLOB.len() } else { (offset + size) as usize };
        let mut data = BLOB[offset as usize..end].to_vec();
        match mode {
            Mode::Lies => data[0] ^= 1,
            Mode::Short => data.truncate(3),
            Mode::Huge => data.extend([0; 100]),
            _ => {}
        }
        // In two messages, and two that say nothing.
        let halves = data.split_at(data.len() / 2);
        let pieces = [&[], halves.0, &[], halves.1].map(|piece| {
            Ok(content::ReadContentResponse { data: piece.to_vec().into(), ..Default::default() })
        });
        Ok(Response::new(stream::iter(pieces).boxed()))
    }

    async fn status(
        &self,
        _: Request<content::StatusRequest>,
    ) -> Result<Response<content::StatusResponse>, Status> {
        Err(Status::not_found("no such ingest"))
    }

    async fn list_statuses(
        &self,
        request: Request<content::ListStatusesRequest>,
    ) -> Result<Response<content::ListStatusesResponse>, Status> {
        self.behave(&request).await?;
        Ok(Response::new(Default::default()))
    }

    type WriteStream = BoxStream<'static, Result<content::WriteContentResponse, Status>>;

    async fn write(
        &self,
        request: Request<Streaming<content::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let mode = self.behave(&request).await?;
        let mut written = Vec::new();
        let answers = request.into_inner().map(move |message| {
            written.extend_from_slice(&message?.data);
            let (mut offset, mut digest) = (written.len() as i64, digest_of(&written));
            match mode {
                Mode::Lies if !written.is_empty() => digest = digest_of(b"other bytes"),
                Mode::Short if !written.is_empty() => offset -= 1,
                _ => {}
            }
            Ok(content::WriteContentResponse { offset, digest: digest.to_string(), ..Default::default() })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn abort(&self, _: Request<content::AbortRequest>) -> Result<Response<()>, Status> {
        unused()
    }
}

#[tonic::async_trait]
impl Controller for Plugin {
    async fn create(
        &self,
        request: Request<sandbox::ControllerCreateRequest>,
    ) -> Result<Response<sandbox::ControllerCreateResponse>, Status> {
        self.behave(&request).await?;
        Ok(Response::new(Default::default()))
    }

    async fn start(
        &self,
        request: Request<sandbox::ControllerStartRequest>,
    ) -> Result<Response<sandbox::ControllerStartResponse>, Status> {
        self.behave(&request).await?;
        let sandbox_id = request.into_inner().sandbox_id;
        Ok(Response::new(sandbox::ControllerStartResponse { sandbox_id, pid: 7, ..Default::default() }))
    }

    async fn platform(
        &self,
        _: Request<sandbox::ControllerPlatformRequest>,
    ) -> Result<Response<sandbox::ControllerPlatformResponse>, Status> {
        unused()
    }

    async fn stop(
        &self,
        _: Request<sandbox::ControllerStopRequest>,
    ) -> Result<Response<sandbox::ControllerStopResponse>, Status> {
        unused()
    }

    async fn wait(
        &self,
        request: Request<sandbox::ControllerWaitRequest>,
    ) -> Result<Response<sandbox::ControllerWaitResponse>, Status> {
        self.behave(&request).await?;
        Ok(Response::new(sandbox::ControllerWaitResponse { exit_status: 3, exited_at: None }))
    }

    async fn status(
        &self,
        request: Request<sandbox::ControllerStatusRequest>,
    ) -> Result<Response<sandbox::ControllerStatusResponse>, Status> {
        self.behave(&request).await?;
        Ok(Response::new(Default::default()))
    }

    async fn shutdown(
        &self,
        _: Request<sandbox::ControllerShutdownRequest>,
    ) -> Result<Response<sandbox::ControllerShutdownResponse>, Status> {
        unused()
    }

    async fn metrics(
        &self,
        _: Request<sandbox::ControllerMetricsRequest>,
    ) -> Result<Response<sandbox::ControllerMetricsResponse>, Status> {
        unused()
    }

    async fn update(
        &self,
        _: Request<sandbox::ControllerUpdateRequest>,
    ) -> Result<Response<sandbox::ControllerUpdateResponse>, Status> {
        unused()
    }
}

fn digest_of(data: &[u8]) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(data);
    hasher.finish()
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A place for sockets, and the threads of clients.
struct Scene {
    folder: tempfile::TempDir,
    runtime: Runtime,
    plugin: Plugin,
}

impl Scene {
    fn new() -> Scene {
        Scene {
            folder: tempfile::tempdir().unwrap(),
            runtime: runtime(),
            plugin: Plugin { mode: Arc::new(Mutex::new(Mode::Honest)), told: Arc::default() },
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("p.sock")
    }

    /// Serves the plugin for as long as its threads are there.
    fn serve(&self, socket: &Path) -> Runtime {
        let _ = std::fs::remove_file(socket);
        let threads = runtime();
        let inside = threads.enter();
        let listener = UnixListener::bind(socket).unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(SnapshotsServer::new(self.plugin.clone()).max_encoding_message_size(64 << 20))
            .add_service(ContentServer::new(self.plugin.clone()))
            .add_service(ControllerServer::new(self.plugin.clone()));
        threads.spawn(async move {
            server.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap();
        });
        drop(inside);
        threads
    }

    fn connection(&self, socket: &Path) -> Connection {
        let _inside = self.runtime.enter();
        Connection::new("remote", connection::channel(socket))
    }

    fn snapshotter(&self, socket: &Path) -> ProxySnapshotter {
        ProxySnapshotter::new(self.connection(socket), Vec::new(), BTreeMap::new())
    }

    /// One that waits a moment only.
    fn impatient(&self, socket: &Path) -> ProxySnapshotter {
        ProxySnapshotter::new(self.impatient_connection(socket), Vec::new(), BTreeMap::new())
    }

    fn impatient_connection(&self, socket: &Path) -> Connection {
        let mut connection = self.connection(socket);
        // What answers at all does so within that, also where all is slow.
        let moment = Duration::from_secs(2);
        connection.patience = Patience { look: moment, change: moment, cleanup: moment, layer: moment };
        connection
    }

    /// The metadata of a daemon whose content this is.
    fn metadata(&self, store: ProxyStore) -> Metadata {
        let path = |name: &str| self.folder.path().join(name);
        let parts = Parts {
            db: Db::open(&path("metadata"), EngineKind::Redb).unwrap(),
            store: Blobs::Proxy(store),
            snapshotters: BTreeMap::new(),
            mounts: Targets::open(&path("mounts"), self.folder.path()).unwrap(),
            sharing: Sharing::Shared,
            events: Arc::new(|_, _| ()),
        };
        Metadata::open(parts).unwrap()
    }

    fn set(&self, mode: Mode) {
        *self.plugin.mode.lock().unwrap() = mode;
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(
    outcome: Result<T, impl Coded + std::fmt::Display>,
    code: ErrorCode,
    words: &str,
) {
    let error = outcome.unwrap_err();
    assert_eq!(error.code(), code, "{error}");
    let text = error.to_string();
    assert!(text.starts_with("proxy plugin remote: ") && text.contains(words), "{text}");
}

#[test]
fn a_plugin_that_says_nothing_costs_its_deadline() {
    let scene = Scene::new();
    let (hung, well) = (scene.socket(), scene.folder.path().join("well.sock"));
    let _server = scene.serve(&hung);
    let _other = scene.serve(&well);
    scene.set(Mode::Hangs);
    let snapshotter = scene.impatient(&hung);
    refused(snapshotter.stat("x"), ErrorCode::DeadlineExceeded, "no answer within");
    refused(snapshotter.list(), ErrorCode::DeadlineExceeded, "no answer within");
    refused(snapshotter.prepare("a/1/b", None, &Labels::new()), ErrorCode::DeadlineExceeded, "");
    // One that does not even accept is no better.
    let silent = scene.folder.path().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    refused(scene.impatient(&silent).remove("x"), ErrorCode::DeadlineExceeded, "no answer within");
    scene.set(Mode::Honest);
    assert_eq!(scene.snapshotter(&well).stat("x").unwrap().name, "x");
    // The connection that calls were given up on is still of use.
    assert_eq!(snapshotter.stat("x").unwrap().kind, Kind::Committed);
}

#[test]
fn a_plugin_may_come_later_go_and_come_back() {
    let scene = Scene::new();
    let socket = scene.socket();
    let snapshotter = scene.snapshotter(&socket);
    refused(snapshotter.stat("x"), ErrorCode::Unavailable, "No such file");
    let server = scene.serve(&socket);
    assert_eq!(snapshotter.stat("x").unwrap().name, "x");
    // Its whole runtime ends, and its connections with it, as those of a process that is killed.
    server.shutdown_background();
    let gone = || snapshotter.stat("x").err().filter(|error| error.code() == ErrorCode::Unavailable);
    let begun = Instant::now();
    while gone().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the plugin is still there");
    }
    let _again = scene.serve(&socket);
    assert_eq!(snapshotter.stat("y").unwrap().name, "y");
}

#[test]
fn what_a_plugin_says_is_not_believed() {
    let scene = Scene::new();
    let _server = scene.serve(&scene.socket());
    let snapshotter = scene.snapshotter(&scene.socket());
    scene.set(Mode::Lies);
    refused(snapshotter.stat("x"), ErrorCode::Internal, "asked for \"x\", got \"another\"");
    refused(snapshotter.usage("x"), ErrorCode::Internal, "-1 bytes");
    scene.set(Mode::Endless);
    refused(snapshotter.list(), ErrorCode::ResourceExhausted, "more than 67108864 bytes");
    scene.set(Mode::Huge);
    refused(snapshotter.stat("x"), ErrorCode::OutOfRange, "too large");
    // Its own reasons are told as they are.
    scene.set(Mode::Refuses);
    refused(snapshotter.remove("x"), ErrorCode::FailedPrecondition, "not today");
    scene.set(Mode::Honest);
    snapshotter.cleanup().unwrap();
    assert_eq!(snapshotter.list().unwrap().len(), 3);
}

#[test]
fn a_plugin_is_told_namespaces_and_asked_for_targets() {
    let scene = Scene::new();
    let _server = scene.serve(&scene.socket());
    let snapshotter = scene.snapshotter(&scene.socket());
    let told = || std::mem::take(&mut *scene.plugin.told.lock().unwrap());
    snapshotter.stat("one/7/key").unwrap();
    snapshotter.stat("sha256:bare").unwrap();
    snapshotter.list().unwrap();
    assert_eq!(told(), ["one", "none", "none"]);
    let scoped = snapshotter.in_namespace("two").unwrap();
    scoped.stat("sha256:bare").unwrap();
    refused(
        scoped.prepare("two/8/key", None, &Labels::new()),
        ErrorCode::AlreadyExists,
        "the target is there",
    );
    // The first that fits, although the plugin lists others.
    let found = scoped.find_target("chain", None).unwrap().unwrap();
    assert_eq!(found.name, "sha256:found");
    assert!(scoped.find_target("chain", Some("absent")).unwrap().is_none());
    assert!(told().iter().all(|namespace| namespace == "two"));
}

#[test]
fn content_of_a_plugin_is_what_its_digest_says() {
    let scene = Scene::new();
    let _server = scene.serve(&scene.socket());
    let store = ProxyStore::new(scene.connection(&scene.socket()));
    let digest = digest_of(BLOB);
    let read = || {
        let mut data = Vec::new();
        store.reader(&digest).unwrap().read_to_end(&mut data).map(|_| data)
    };
    assert_eq!(read().unwrap(), BLOB);
    let mut part = [0; 4];
    assert_eq!(store.reader(&digest).unwrap().read_at(&mut part, 2).unwrap(), 4);
    assert_eq!(part, BLOB[2..6]);
    for (mode, words) in [
        (Mode::Lies, "came as sha256:"),
        (Mode::Short, "ends before its size"),
        (Mode::Huge, "goes on behind its size"),
    ] {
        scene.set(mode);
        let text = read().unwrap_err().to_string();
        assert!(text.contains(words) && text.contains("proxy plugin remote"), "{mode:?}: {text}");
    }
    assert!(store.reader(&digest).unwrap().read_at(&mut part, 0).is_ok());

    let write = || {
        let mut writer = store.writer("a/1/ref", 0).unwrap();
        writer.write(BLOB)?;
        writer.commit(0, None)
    };
    scene.set(Mode::Honest);
    assert_eq!(write().unwrap(), digest);
    scene.set(Mode::Lies);
    refused(write(), ErrorCode::Internal, "it made");
    scene.set(Mode::Short);
    refused(write(), ErrorCode::Internal, "an ingest of");
    scene.set(Mode::Honest);
    assert!(matches!(store.status("a/1/ref"), Err(davit_content_store::Error::NoIngest { .. })));
    // What is no blob is left out.
    assert_eq!(store.walk().unwrap().len(), 1);
}

#[test]
fn a_content_store_that_says_nothing_costs_a_collection_one_deadline() {
    let scene = Scene::new();
    let _server = scene.serve(&scene.socket());
    let store = ProxyStore::new(scene.impatient_connection(&scene.socket()));
    let metadata = scene.metadata(store);
    scene.set(Mode::Keeps);
    scene.runtime.block_on(metadata.collect()).unwrap();
    let told = scene.plugin.told.lock().unwrap();
    assert_eq!(told.iter().filter(|told| *told == "delete").count(), 1, "{told:?}");
}

#[test]
fn a_collection_goes_on_without_a_content_store_that_says_nothing() {
    let scene = Scene::new();
    let server = scene.serve(&scene.socket());
    let metadata = scene.metadata(ProxyStore::new(scene.connection(&scene.socket())));
    scene.set(Mode::Hangs);
    let limit = Patience::default().change / 2;
    let collected = scene.runtime.block_on(async { tokio::time::timeout(limit, metadata.collect()).await });
    collected.unwrap().unwrap();
    assert_eq!(scene.plugin.told.lock().unwrap().len(), 1, "it was asked");
    // The call that it does not answer ends with it.
    server.shutdown_background();
}

#[test]
fn blobs_that_are_read_slowly_hold_up_nothing_else() {
    let scene = Scene::new();
    let _server = scene.serve(&scene.socket());
    let store = ProxyStore::new(scene.connection(&scene.socket()));
    scene.set(Mode::Vast);
    let digest = digest_of(BLOB);
    let mut readers: Vec<_> = (0..64).map(|_| store.reader(&digest).unwrap()).collect();
    // Each has begun when the next does, and is not read on: as much comes as there is room for.
    for reader in &mut readers {
        reader.read_exact(&mut [0]).unwrap();
    }
    assert_eq!(store.info(&digest).unwrap().size, i64::MAX as u64);
    readers[0].read_exact(&mut vec![0; 1 << 20]).unwrap();
}

/// A request as the layer of this daemon makes it.
fn called<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(Context::within("ns"));
    request
}

#[test]
fn sandboxes_of_a_plugin_are_told_of_and_waited_for() {
    let scene = Scene::new();
    let socket = scene.socket();
    let hub = Hub::new(crate::grpc::notice::READING);
    let mut events = hub.subscribe(davit_model::Filter::parse(&[]).unwrap());
    let mut topic = move || events.try_recv().ok().map(|envelope| envelope.topic.clone());
    let mut connection = scene.connection(&socket);
    connection.patience.look = Duration::from_secs(5);
    let controller = ProxyController::new(connection, hub);
    let id = || "s".to_owned();
    let wait = move || called(sandbox::ControllerWaitRequest { sandbox_id: id(), ..Default::default() });
    let waiting = {
        let controller = controller.clone();
        scene.runtime.spawn(async move { controller.wait(wait()).await })
    };
    let status = || called(sandbox::ControllerStatusRequest { sandbox_id: id(), ..Default::default() });
    let gone = scene.runtime.block_on(controller.status(status())).unwrap_err();
    assert_eq!(gone.code(), tonic::Code::Unavailable, "{gone}");
    assert!(!waiting.is_finished(), "who waits waits for the plugin");

    let _server = scene.serve(&socket);
    scene.runtime.block_on(async {
        let exit = tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap().unwrap();
        assert_eq!(exit.into_inner().exit_status, 3);
        let create = called(sandbox::ControllerCreateRequest { sandbox_id: id(), ..Default::default() });
        assert_eq!(controller.create(create).await.unwrap().into_inner().sandbox_id, "s");
        let start = called(sandbox::ControllerStartRequest { sandbox_id: id(), ..Default::default() });
        assert_eq!(controller.start(start).await.unwrap().into_inner().pid, 7);
        assert!(controller.status(status()).await.unwrap().into_inner().extra.is_some());
    });
    assert_eq!(
        [topic(), topic(), topic(), topic()].map(Option::unwrap_or_default),
        ["/sandboxes/exit", "/sandboxes/create", "/sandboxes/start", ""]
    );
    assert!(scene.plugin.told.lock().unwrap().iter().all(|namespace| namespace == "ns"));
    scene.set(Mode::Hangs);
    let late = scene.runtime.block_on(controller.status(status())).unwrap_err();
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded, "{late}");
}
