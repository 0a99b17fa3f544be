//! Shims that are old, odd or broken.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use davit_model::{Any, Coded, ErrorCode};
use davit_proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult};
use davit_proto::containerd::task::v3 as wire;
use davit_shim_protocol::frame::RpcError;
use davit_supervisor::runtime::{CreateOptions, Error, ShimError};
use prost::Message;
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::fake::{FakeShim, script, serve};
use crate::world::{Daemon, World, eventually_equal};

/// A world whose shim is a script.
fn world(body: &str) -> World {
    let mut world = World::new(&PathBuf::from("/nonexistent"));
    world.shim = script(world.folder.path(), body);
    world
}

fn options(runtime: &str) -> CreateOptions {
    let spec = Any { type_url: String::new(), value: b"{}".to_vec() };
    CreateOptions {
        container_id: "one".into(),
        spec: Some(spec),
        runtime: runtime.into(),
        ..CreateOptions::default()
    }
}

fn create(daemon: &Daemon) -> Result<u32, Error> {
    daemon.create(options("io.containerd.runc.v2"))
}

#[track_caller]
fn shim_error(result: Result<u32, Error>) -> ShimError {
    match result.unwrap_err() {
        Error::StartShim { source } => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_generation_of_answers_is_understood() {
    for (form, version) in [("plain", 2), ("json2", 2), ("json3", 3), ("proto", 3)] {
        let world = world(&format!("cat > {0}/start.input; cat {0}/answer", "$(dirname $0)"));
        let socket = world.path("shim.sock");
        let address = format!("unix://{}", socket.display());
        let answer = match form {
            "plain" => address.clone().into_bytes(),
            "proto" => BootstrapResult {
                version: 3,
                address: address.clone(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .encode_to_vec(),
            _ => format!("{{\"version\":{version},\"address\":\"{address}\",\"protocol\":\"ttrpc\"}}\n")
                .into_bytes(),
        };
        fs::write(world.path("answer"), answer).unwrap();
        let daemon = world.daemon();
        let shim = Arc::new(FakeShim::new());
        let server = daemon.inside(|| serve(&socket, shim.clone()));
        assert_eq!(create(&daemon).unwrap(), 77, "{form}");
        let service = format!("containerd.task.v{version}.Task");
        assert_eq!(shim.called(), [(service, "Create".to_owned())]);
        let kept = fs::read_to_string(world.bundle("one").join("bootstrap.json")).unwrap();
        assert_eq!(
            kept,
            format!("{{\"version\":{version},\"address\":\"{address}\",\"protocol\":\"ttrpc\"}}")
        );
        let binary = fs::read_to_string(world.bundle("one").join("shim-binary-path")).unwrap();
        assert_eq!(binary, world.shim.display().to_string());
        daemon.delete("one").unwrap();
        let methods: Vec<_> = shim.called().into_iter().map(|(_, method)| method).collect();
        assert_eq!(methods, ["Create", "Delete", "Shutdown"]);
        assert!(!world.bundle("one").exists());
        server.abort();
    }
}

#[test]
fn a_shim_is_told_what_it_needs() {
    let world = world("cat > $(dirname $0)/start.input; printf unix://$(dirname $0)/shim.sock");
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim.clone()));
    let mut with_options = options("io.containerd.runc.v2");
    with_options.runtime_options = Some(Any { type_url: "a.Options".into(), value: b"\x0a\x01x".to_vec() });
    with_options.task_options = Some(Any { type_url: "b.Options".into(), value: Vec::new() });
    daemon.create(with_options).unwrap();
    let read = |name: &str| fs::read_to_string(world.path(name)).unwrap();
    let config = world.config();
    assert_eq!(
        read("start.arguments"),
        format!(
            "-namespace {} -address {} -publish-binary /bin/true -id one start\n",
            world.namespace, config.grpc_address
        )
    );
    assert_eq!(read("start.folder").trim(), world.bundle("one").display().to_string());
    for line in [
        "MAX_SHIM_VERSION=2".to_owned(),
        "GOMAXPROCS=2".to_owned(),
        format!("TTRPC_ADDRESS={}", config.ttrpc_address),
        format!("GRPC_ADDRESS={}", config.grpc_address),
        format!("NAMESPACE={}", world.namespace),
    ] {
        assert!(read("start.environment").lines().any(|other| other == line), "{line}");
    }
    // Shims up to 2.2 read an `Any`; to those of 2.3 it must not look like `BootstrapParams`.
    let input = fs::read(world.path("start.input")).unwrap();
    let any = prost_types::Any::decode(input.as_slice()).unwrap();
    assert_eq!((any.type_url.as_str(), any.value.as_slice()), ("a.Options", b"\x0a\x01x".as_slice()));
    assert!(BootstrapParams::decode(input.as_slice()).is_err());
    // The options reach Create untouched.
    let create = shim.calls.lock().unwrap()[0].clone();
    assert_eq!(create.metadata[0].key, "containerd-namespace-ttrpc");
    assert_eq!(create.metadata[0].value, world.namespace);
    let create = wire::CreateTaskRequest::decode(create.payload.as_slice()).unwrap();
    assert_eq!(create.options.unwrap(), prost_types::Any { type_url: any.type_url, value: any.value });
    assert_eq!(create.bundle, world.bundle("one").display().to_string());
    daemon.delete("one").unwrap();
    server.abort();
}

#[test]
fn without_options_nothing_is_written() {
    let world = world("cat > $(dirname $0)/start.input; printf unix://$(dirname $0)/shim.sock");
    let daemon = world.daemon();
    let server = daemon.inside(|| serve(&world.path("shim.sock"), Arc::new(FakeShim::new())));
    create(&daemon).unwrap();
    assert_eq!(fs::read(world.path("start.input")).unwrap(), b"");
    daemon.delete("one").unwrap();
    server.abort();
}

#[test]
fn a_shim_that_claims_too_much_is_asked_again_as_version_2() {
    let world =
        world(r#"printf '{"version":3,"protocol":"ttrpc","address":"unix://%s/shim.sock"}' $(dirname $0)"#);
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim { services: vec!["containerd.task.v2.Task"], ..FakeShim::new() });
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim.clone()));
    assert_eq!(create(&daemon).unwrap(), 77);
    daemon.delete("one").unwrap();
    let services: Vec<_> = shim.called().iter().map(|(service, _)| service.contains("v3")).collect();
    assert_eq!(services, [true, false, false, false], "asked once");
    server.abort();
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    let world = world("echo first; echo second >&2; exit 3");
    let daemon = world.daemon();
    let error = create(&daemon).unwrap_err();
    let text = davit_model::error::chain(&error);
    assert_eq!(text, "failed to start shim: start failed: first\nsecond: exit status: 3");
    world.assert_nothing_left();
    assert!(!daemon.tasks.exists(&daemon.namespace, "one"));
}

#[test]
fn a_start_that_hangs_is_killed_with_all_that_it_started() {
    let mut world = world("case \"$action\" in start) echo working; sleep 1000 & sleep 1000;; esac");
    // Time enough to say something also where all is slow.
    world.timeouts.start = Duration::from_secs(10);
    let daemon = world.daemon();
    match shim_error(create(&daemon)) {
        ShimError::Timeout { output, action: "start", .. } => assert_eq!(output, "working"),
        other => panic!("{other:?}"),
    }
    world.assert_nothing_left();
    let bundle = world.bundle("one").display().to_string();
    eventually_equal(&0, || processes_in(&bundle));
}

#[test]
fn a_background_process_that_holds_the_output_does_not_hang_the_daemon() {
    let mut world = world("case \"$action\" in start) sleep 1000 & printf unix:///nowhere;; esac");
    world.timeouts.start = Duration::from_secs(1);
    let daemon = world.daemon();
    assert!(matches!(shim_error(create(&daemon)), ShimError::Timeout { .. }));
    let bundle = world.bundle("one").display().to_string();
    eventually_equal(&0, || processes_in(&bundle));
    world.assert_nothing_left();
}

fn processes_in(folder: &str) -> usize {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let folders = entries.filter_map(|entry| fs::read_link(entry.path().join("cwd")).ok());
    folders.filter(|cwd| cwd.to_string_lossy().starts_with(folder)).count()
}

#[test]
fn nonsense_is_no_address() {
    for (body, nonsense) in [
        ("echo hello world", true),
        ("true", true),
        ("printf '\\377\\377'", true),
        ("echo '{\"version\":9,\"address\":\"unix:///x\",\"protocol\":\"ttrpc\"}'", true),
        ("printf vsock://1:2", false),
        ("printf unix:///nobody/listens/here", false),
    ] {
        let world = world(body);
        let daemon = world.daemon();
        let error = shim_error(create(&daemon));
        assert_eq!(matches!(error, ShimError::Nonsense { .. }), nonsense, "{body}: {error:?}");
        world.assert_nothing_left();
    }
}

#[test]
fn output_is_bounded() {
    let world =
        world("case \"$action\" in start) while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done;; esac");
    let daemon = world.daemon();
    match shim_error(create(&daemon)) {
        ShimError::TooMuchOutput { output, .. } => assert!(output.len() < 8192),
        other => panic!("{other:?}"),
    }
    world.assert_nothing_left();
}

#[test]
fn a_refused_create_is_undone() {
    let world = world("printf unix://$(dirname $0)/shim.sock");
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    let words = "OCI runtime create failed: exec: \"x\": executable file not found in $PATH: unknown";
    shim.answer("Create", Err(RpcError::new(ErrorCode::Unknown, words)));
    shim.answer("Delete", Err(RpcError::new(ErrorCode::NotFound, "container not created: not found")));
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim.clone()));
    let error = create(&daemon).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unknown);
    assert_eq!(error.to_string(), format!("failed to create shim task: {words}"));
    let methods: Vec<_> = shim.called().into_iter().map(|(_, method)| method).collect();
    assert_eq!(methods, ["Create", "Delete", "Shutdown"]);
    assert!(!world.path("delete.arguments").exists(), "the shim itself has said that it holds nothing");
    world.assert_nothing_left();
    server.abort();
}

#[test]
fn a_create_that_hangs_ends() {
    let mut world = world("printf unix://$(dirname $0)/shim.sock");
    world.timeouts.create = Duration::from_millis(300);
    world.timeouts.shutdown = Duration::from_millis(300);
    // For the shim, which hangs, and then for its binary, which does not, however slow all is.
    world.timeouts.cleanup = Duration::from_secs(10);
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    shim.hangs.lock().unwrap().extend(["Create", "Delete", "Shutdown"]);
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim.clone()));
    let error = create(&daemon).unwrap_err();
    assert_eq!(error.code(), ErrorCode::DeadlineExceeded, "{error:?}");
    // The shim did not say that it holds nothing: its binary was asked.
    assert!(world.path("delete.arguments").exists());
    world.assert_nothing_left();
    server.abort();
}

#[test]
fn a_shim_that_dies_when_it_is_to_end_leaves_no_socket() {
    let mut world = world("printf unix://$(dirname $0)/shim.sock");
    world.timeouts.shutdown = crate::world::PATIENCE;
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    shim.hangs.lock().unwrap().push("Shutdown");
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim.clone()));
    create(&daemon).unwrap();
    let deleting = daemon.spawn({
        let (tasks, namespace) = (daemon.tasks.clone(), daemon.namespace.clone());
        async move { tasks.delete(&namespace, "one").await }
    });
    eventually_equal(&true, || shim.called().iter().any(|(_, method)| method == "Shutdown"));
    server.abort();
    daemon.block_on(deleting).unwrap().unwrap();
    assert!(!world.path("shim.sock").exists());
    world.assert_nothing_left();
}

#[test]
fn runtimes_are_found_by_name() {
    let world = world("true");
    fs::create_dir(world.path("bin")).unwrap();
    fs::copy(&world.shim, world.path("bin/containerd-shim-test-v7")).unwrap();
    let daemon = world.daemon();
    let resolve = |runtime: &str| daemon.tasks.resolve_runtime(runtime);
    assert_eq!(resolve("io.containerd.test.v7").unwrap(), world.path("bin/containerd-shim-test-v7"));
    assert_eq!(resolve("test.v7").unwrap(), world.path("bin/containerd-shim-test-v7"));
    assert_eq!(resolve("io.containerd.runc.v2").unwrap(), world.shim);
    assert_eq!(resolve(&world.shim.display().to_string()).unwrap(), world.shim);
    let text = |runtime: &str| {
        let error = daemon.create(options(runtime)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        davit_model::error::chain(&error)
    };
    assert_eq!(
        text("io.containerd.nothing.v1"),
        "failed to start shim: failed to resolve runtime path: runtime \"io.containerd.nothing.v1\" binary not \
         installed \"containerd-shim-nothing-v1\": file does not exist"
    );
    for bad in ["", "runc", "./shim", "a/b.c", "../x.v1"] {
        assert!(text(bad).starts_with("failed to start shim: failed to resolve runtime path: "), "{bad}");
    }
    assert!(text("/nothing/here").contains("invalid custom binary path /nothing/here"));
    world.assert_nothing_left();
}

/// Keeps the namespaces whose `create` spans have ended.
#[derive(Clone, Default)]
struct Ended {
    namespaces: Arc<Mutex<Vec<String>>>,
}

/// The namespace that a span names.
struct Namespace(String);

impl Visit for Namespace {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "namespace" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ended {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut namespace = Namespace(String::new());
        attributes.record(&mut namespace);
        context.span(id).unwrap().extensions_mut().insert(namespace);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).unwrap();
        if span.name() == "create" {
            let Namespace(namespace) = span.extensions_mut().remove().unwrap();
            self.namespaces.lock().unwrap().push(namespace);
        }
    }
}

/// A trace that waits for the end of a span of its call would wait for that of the container.
#[test]
fn the_span_of_a_creation_ends_before_the_task() {
    let ended = Ended::default();
    // Of the whole process: the calls of a runtime go on in its threads.
    tracing_subscriber::registry().with(ended.clone()).init();
    let world = world("printf unix://$(dirname $0)/shim.sock");
    let daemon = world.daemon();
    let shim = Arc::new(FakeShim::new());
    let server = daemon.inside(|| serve(&world.path("shim.sock"), shim));
    create(&daemon).unwrap();
    eventually_equal(&true, || ended.namespaces.lock().unwrap().contains(&world.namespace));
    daemon.delete("one").unwrap();
    server.abort();
}
