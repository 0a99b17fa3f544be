//! Sandboxes with a shim of their own, which here is the test itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use davit_model::{Any, Coded, ErrorCode};
use davit_proto::containerd::runtime::sandbox::v1 as wire;
use davit_proto::containerd::task::v3 as task;
use davit_proto::containerd::types::{Metric, Platform};
use davit_shim_protocol::frame::RpcError;
use davit_supervisor::events::Hub;
use davit_supervisor::grpc::notice;
use davit_supervisor::runtime::{CreateOptions, SandboxError, SandboxOptions, Sandboxes, Tasks};
use prost::Message;
use tokio::task::JoinHandle;

use crate::fake::{FakeShim, script, serve};
use crate::world::{World, eventually_equal};

const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";
const TASK: &str = "containerd.task.v3.Task";

fn world() -> World {
    let mut world = World::new(&PathBuf::from("/nonexistent"));
    world.timeouts.start = Duration::from_secs(20);
    world.timeouts.cleanup = Duration::from_secs(20);
    world.timeouts.shutdown = Duration::from_millis(500);
    let body = format!(
        "[ $action = start ] && printf '{{\"version\":3,\"address\":\"unix://{}\",\"protocol\":\"ttrpc\"}}'; true",
        world.path("shim.sock").display()
    );
    world.shim = script(world.folder.path(), &body);
    world
}

struct Daemon {
    runtime: tokio::runtime::Runtime,
    tasks: Tasks,
    sandboxes: Sandboxes,
    hub: Hub,
}

fn daemon(world: &World, known: bool) -> Daemon {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let hub = Hub::new(notice::READING);
    let tasks = Tasks::open(world.config(), hub.clone()).unwrap();
    let folders = (world.path("sandbox-root"), world.path("sandbox-state"));
    let entered = runtime.enter();
    let sandboxes = Sandboxes::open(&tasks, folders.0, folders.1, Arc::new(move |_, _| known)).unwrap();
    drop(entered);
    Daemon { runtime, tasks, sandboxes, hub }
}

/// A shim that serves until the sandbox is shut down, as a real one.
fn shim(daemon: &Daemon, world: &World) -> (Arc<FakeShim>, JoinHandle<()>) {
    let shim = Arc::new(FakeShim::new());
    let started = wire::StartSandboxResponse { pid: 77, ..Default::default() };
    shim.answer("StartSandbox", Ok(started.encode_to_vec()));
    let _entered = daemon.runtime.enter();
    (shim.clone(), serve(&world.path("shim.sock"), shim))
}

fn options() -> SandboxOptions {
    SandboxOptions {
        id: "s".into(),
        runtime: "io.containerd.runc.v2".into(),
        spec: Some(Any { type_url: String::new(), value: b"{}".to_vec() }),
        options: Some(Any { type_url: "odd".into(), value: vec![1] }),
        network_namespace: "/netns".into(),
        annotations: BTreeMap::from([("a".into(), "b".into())]),
        ..SandboxOptions::default()
    }
}

fn bundle(world: &World) -> PathBuf {
    world.path("sandbox-state").join(&world.namespace).join("s")
}

#[test]
fn a_sandbox_lives_from_create_to_shutdown() {
    let mut world = world();
    // Its shim ends by itself, however long that takes on a busy machine.
    world.timeouts.shutdown = Duration::from_secs(40);
    let daemon = daemon(&world, true);
    let (shim, serving) = shim(&daemon, &world);
    let platform = Platform { os: "linux".into(), architecture: "riscv64".into(), ..Default::default() };
    shim.answer("Platform", Ok(wire::PlatformResponse { platform: Some(platform) }.encode_to_vec()));
    let status = wire::SandboxStatusResponse { pid: 77, state: "SANDBOX_READY".into(), ..Default::default() };
    shim.answer("SandboxStatus", Ok(status.encode_to_vec()));
    let metrics = Some(Metric { id: "s".into(), ..Default::default() });
    shim.answer("SandboxMetrics", Ok(wire::SandboxMetricsResponse { metrics }.encode_to_vec()));
    let exit = wire::WaitSandboxResponse { exit_status: 137, exited_at: None };
    shim.answer("WaitSandbox", Ok(exit.encode_to_vec()));
    let mut events = daemon.hub.subscribe(davit_model::Filter::parse(&[]).unwrap());
    let (sandboxes, namespace) = (&daemon.sandboxes, world.namespace.as_str());

    daemon.runtime.block_on(async {
        sandboxes.create(namespace, options()).await.unwrap();
        let again = sandboxes.create(namespace, options()).await.unwrap_err();
        assert_eq!(again.code(), ErrorCode::AlreadyExists);
        assert_eq!(again.to_string(), "sandbox s already running");
        assert_eq!(sandboxes.start(namespace, "s").await.unwrap().pid, 77);
        assert_eq!(sandboxes.platform(namespace, "s").await.unwrap().architecture, "riscv64");
        assert_eq!(sandboxes.status(namespace, "s", true).await.unwrap().state, "SANDBOX_READY");
        assert_eq!(sandboxes.metrics(namespace, "s").await.unwrap().unwrap().id, "s");
        assert_eq!(sandboxes.wait(namespace, "s").await.unwrap().status, 137);
        sandboxes.stop(namespace, "s", Duration::from_secs(7)).await.unwrap();

        // A container of the sandbox is created by the sandbox's shim, and no other is started.
        fs::remove_file(world.folder.path().join("start.arguments")).unwrap();
        let spec = Some(Any { type_url: String::new(), value: b"{}".to_vec() });
        let container = CreateOptions {
            container_id: "one".into(),
            spec,
            runtime: "io.containerd.runc.v2".into(),
            sandbox_id: "s".into(),
            ..CreateOptions::default()
        };
        daemon.tasks.create(namespace, container).await.unwrap();
        assert!(!world.folder.path().join("start.arguments").exists());
        daemon.tasks.delete(namespace, "one").await.unwrap();

        // The shim goes as it answers.
        let ending = async {
            while !shim.called().iter().any(|(_, method)| method == "ShutdownSandbox") {
                tokio::task::yield_now().await;
            }
            serving.abort();
        };
        let (down, ()) = tokio::join!(sandboxes.shutdown(namespace, "s"), ending);
        down.unwrap();
        assert!(matches!(sandboxes.shutdown(namespace, "s").await, Err(SandboxError::NotFound { .. })));
        for topic in ["/sandboxes/create", "/sandboxes/start", "/sandboxes/exit"] {
            assert_eq!(events.recv().await.unwrap().topic, topic);
        }
    });
    let calls = shim.calls.lock().unwrap();
    let create = calls.iter().find(|call| call.method == "CreateSandbox").unwrap();
    assert_eq!(create.service, SANDBOX);
    let create = wire::CreateSandboxRequest::decode(create.payload.as_slice()).unwrap();
    assert_eq!(create.bundle_path, bundle(&world).display().to_string());
    assert_eq!((create.netns_path.as_str(), create.annotations["a"].as_str()), ("/netns", "b"));
    let stop = calls.iter().find(|call| call.method == "StopSandbox").unwrap();
    assert_eq!(wire::StopSandboxRequest::decode(stop.payload.as_slice()).unwrap().timeout_secs, 7);
    assert!(!calls.iter().any(|call| call.service == TASK && call.method == "Shutdown"));
    assert!(!bundle(&world).exists());
}

#[test]
fn a_refusal_undoes_the_sandbox_and_keeps_the_words() {
    for method in ["CreateSandbox", "StartSandbox"] {
        let world = world();
        let daemon = daemon(&world, true);
        let (shim, _serving) = shim(&daemon, &world);
        shim.answer(method, Err(RpcError::new(ErrorCode::ResourceExhausted, "no room")));
        daemon.runtime.block_on(async {
            let created = daemon.sandboxes.create(&world.namespace, options()).await;
            let error = match created {
                Err(error) => error,
                Ok(()) => daemon.sandboxes.start(&world.namespace, "s").await.unwrap_err(),
            };
            assert_eq!(error.code(), ErrorCode::ResourceExhausted);
            let action = if method == "CreateSandbox" { "create" } else { "start" };
            let text = davit_model::error::chain(&error);
            assert_eq!(text, format!("failed to {action} sandbox s: no room"));
            let status = daemon.sandboxes.status(&world.namespace, "s", false).await.unwrap();
            assert!(status.state.is_empty() && status.exited_at.is_some());
        });
        // A shim that goes on after its shutdown is told by the Task service as well.
        let called = shim.called();
        assert!(called.contains(&(SANDBOX.into(), "ShutdownSandbox".into())), "{called:?}");
        assert!(called.contains(&(TASK.into(), "Shutdown".into())), "{called:?}");
        assert!(!bundle(&world).exists());
        assert!(world.folder.path().join("delete.arguments").exists());
    }
}

#[test]
fn the_next_daemon_finds_the_sandbox_or_cleans_up() {
    // With a record, and a shim that runs; without a record; with a shim that is gone.
    for (known, running) in [(true, true), (false, true), (true, false)] {
        let world = world();
        let first = daemon(&world, true);
        let shims =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shim = Arc::new(FakeShim::new());
        let serving = {
            let _entered = shims.enter();
            serve(&world.path("shim.sock"), shim.clone())
        };
        first.runtime.block_on(first.sandboxes.create(&world.namespace, options())).unwrap();
        first.runtime.shutdown_timeout(Duration::from_secs(5));
        if !running {
            serving.abort();
            shims.block_on(serving).unwrap_err();
        }
        shim.answer("Pids", Ok(task::PidsResponse::default().encode_to_vec()));
        let status = wire::SandboxStatusResponse { state: "SANDBOX_READY".into(), ..Default::default() };
        shim.answer("SandboxStatus", Ok(status.encode_to_vec()));

        let second = daemon(&world, known);
        let expected = if known && running { "SANDBOX_READY" } else { "" };
        let state = || {
            let status = second.sandboxes.status(&world.namespace, "s", false);
            second.runtime.block_on(status).map(|status| status.state).unwrap_or_default()
        };
        eventually_equal(&expected.to_owned(), state);
        eventually_equal(&(known && running), || bundle(&world).exists());
    }
}
