//! Spans as a collector gets them from a daemon, over HTTP and over gRPC. It takes the feature `otel`.

#![allow(clippy::unwrap_used)] // helpers of tests, too, fail by panicking

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use davit_proto::containerd::services::containers::v1::containers_client::ContainersClient;
use davit_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, container::Runtime,
};
use davit_proto::containerd::services::tasks::v1::CreateTaskRequest;
use davit_proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use davit_proto::containerd::services::version::v1::version_client::VersionClient;
use http_body_util::BodyExt;
use prost::Message;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};

const PATIENCE: Duration = Duration::from_secs(60);

/// The parts of `opentelemetry.proto.collector.trace.v1` that are looked at.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Export {
        #[prost(message, repeated, tag = "1")]
        pub(super) resources: Vec<ResourceSpans>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResourceSpans {
        #[prost(message, optional, tag = "1")]
        pub(super) resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub(super) scopes: Vec<ScopeSpans>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub(super) attributes: Vec<KeyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ScopeSpans {
        #[prost(message, repeated, tag = "2")]
        pub(super) spans: Vec<Span>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) span_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "4")]
        pub(super) parent_span_id: Vec<u8>,
        #[prost(string, tag = "5")]
        pub(super) name: String,
        #[prost(int32, tag = "6")]
        pub(super) kind: i32,
        #[prost(message, repeated, tag = "9")]
        pub(super) attributes: Vec<KeyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct KeyValue {
        #[prost(string, tag = "1")]
        pub(super) key: String,
        #[prost(message, optional, tag = "2")]
        pub(super) value: Option<AnyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct AnyValue {
        #[prost(string, optional, tag = "1")]
        pub(super) text: Option<String>,
        #[prost(int64, optional, tag = "3")]
        pub(super) number: Option<i64>,
    }
}

/// Spans with the name of the service that sent them.
type Spans = Arc<Mutex<Vec<(String, wire::Span)>>>;

fn keep(spans: &Spans, message: &[u8]) {
    for resource in wire::Export::decode(message).unwrap().resources {
        let service = attributes(&resource.resource.unwrap_or_default().attributes).remove("service.name");
        let service = service.unwrap_or_default();
        let found = resource.scopes.into_iter().flat_map(|scope| scope.spans);
        spans.lock().unwrap().extend(found.map(|span| (service.clone(), span)));
    }
}

fn attributes(list: &[wire::KeyValue]) -> HashMap<String, String> {
    let text = |value: &wire::AnyValue| {
        value.text.clone().or(value.number.map(|number| number.to_string())).unwrap_or_default()
    };
    list.iter().map(|pair| (pair.key.clone(), pair.value.as_ref().map(text).unwrap_or_default())).collect()
}

/// A collector over HTTP/1.1.
fn over_http() -> (String, Spans) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let spans = Spans::default();
    let kept = spans.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, kept) = (stream.unwrap(), kept.clone());
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let mut chunk = [0; 4096];
                loop {
                    let Ok(count @ 1..) = stream.read(&mut chunk) else { return };
                    bytes.extend_from_slice(&chunk[..count]);
                    let Some(end) = bytes.windows(4).position(|end| end == b"\r\n\r\n") else { continue };
                    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
                    assert!(head.starts_with("post /v1/traces http/1.1"), "{head}");
                    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                    let all = end + 4 + length.parse::<usize>().unwrap();
                    if bytes.len() >= all {
                        keep(&kept, &bytes[end + 4..all]);
                        bytes.drain(..all);
                        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
                    }
                }
            });
        }
    });
    (format!("http://{address}"), spans)
}

/// The service of a collector over gRPC.
#[derive(Clone)]
struct Collector(Spans);

impl tonic::server::NamedService for Collector {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl tower::Service<http::Request<Body>> for Collector {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let spans = self.0.clone();
        Box::pin(async move {
            let message = request.into_body().collect().await.unwrap().to_bytes();
            keep(&spans, &message[5..]);
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            let body = http_body_util::Full::new(bytes::Bytes::from_static(&[0; 5]));
            let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
            let body = Body::new(body.map_err(|never: Infallible| match never {}));
            let response = http::Response::builder().header("content-type", "application/grpc").body(body);
            Ok(response.unwrap())
        })
    }
}

async fn over_grpc() -> (String, Spans) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let spans = Spans::default();
    let server = tonic::transport::Server::builder().add_service(Collector(spans.clone()));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(server.serve_with_incoming(incoming));
    (format!("http://{address}"), spans)
}

/// A daemon that is ended when it is dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a daemon in a folder, and connects to it.
async fn start(folder: &Path, config: &str, variables: &[(&str, &str)]) -> (Daemon, Channel) {
    let file = folder.join("config.toml");
    std::fs::write(&file, config).unwrap();
    let socket = folder.join("d.sock");
    let child = Command::new(env!("CARGO_BIN_EXE_davitd"))
        .arg("--config")
        .arg(file)
        .args([std::ffi::OsStr::new("--root"), folder.join("root").as_os_str()])
        .args([std::ffi::OsStr::new("--state"), folder.join("state").as_os_str()])
        .args([std::ffi::OsStr::new("--address"), socket.as_os_str()])
        .envs(variables.iter().copied())
        .stderr(std::fs::File::create(folder.join("log")).unwrap())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let daemon = Daemon(child);
    let begun = Instant::now();
    loop {
        let socket = socket.clone();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        });
        match Endpoint::from_static("http://localhost").connect_with_connector(connector).await {
            Ok(channel) => return (daemon, channel),
            Err(error) if begun.elapsed() > PATIENCE => {
                panic!("{error}\n{}", std::fs::read_to_string(folder.join("log")).unwrap())
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// The first span of this name, when it has come.
async fn span(spans: &Spans, name: &str) -> (String, wire::Span) {
    let begun = Instant::now();
    loop {
        let found = spans.lock().unwrap().iter().find(|(_, span)| span.name == name).cloned();
        if let Some(found) = found {
            return found;
        }
        let seen: Vec<_> = spans.lock().unwrap().iter().map(|(_, span)| span.name.clone()).collect();
        assert!(begun.elapsed() < PATIENCE, "no {name} among {seen:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn root() -> bool {
    let root = nix::unistd::getuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_call_is_a_span_in_the_trace_of_its_client() {
    if !root() {
        return;
    }
    let (endpoint, spans) = over_http();
    let folder = tempfile::tempdir().unwrap();
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_SERVICE_NAME", "told-by-the-environment"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ];
    let (_daemon, channel) = start(folder.path(), "", &variables).await;
    let mut request = tonic::Request::new(());
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    VersionClient::new(channel).version(request).await.unwrap();
    let (service, span) = span(&spans, "containerd.services.version.v1.Version/Version").await;
    assert_eq!(service, "told-by-the-environment");
    assert_eq!(span.trace_id, 0x0af7651916cd43dd8448eb211c80319c_u128.to_be_bytes());
    assert_eq!(span.parent_span_id, 0xb7ad6b7169203331_u64.to_be_bytes());
    assert_eq!(span.kind, 2, "a server's");
    let told = attributes(&span.attributes);
    assert_eq!((told["rpc.system"].as_str(), told["rpc.method"].as_str()), ("grpc", "Version"));
    assert_eq!(told["rpc.grpc.status_code"], "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_creation_of_a_task_is_part_of_its_call() {
    if !root() {
        return;
    }
    let (endpoint, spans) = over_grpc().await;
    let folder = tempfile::tempdir().unwrap();
    let config =
        format!("[tracing]\nendpoint = \"{endpoint}\"\nprotocol = \"grpc\"\nservice_name = \"told\"\n");
    let (_daemon, channel) = start(folder.path(), &config, &[("OTEL_BSP_SCHEDULE_DELAY", "50")]).await;
    let mut create = tonic::Request::new(CreateContainerRequest {
        container: Some(Container {
            id: "c".into(),
            // A shim that ends at once, and so a creation that fails.
            runtime: Some(Runtime { name: "/bin/false".into(), options: None }),
            spec: Some(prost_types::Any { type_url: "x".into(), value: b"{}".to_vec() }),
            ..Default::default()
        }),
    });
    create.metadata_mut().insert("containerd-namespace", "otel".parse().unwrap());
    ContainersClient::new(channel.clone()).create(create).await.unwrap();
    let mut task = tonic::Request::new(CreateTaskRequest { container_id: "c".into(), ..Default::default() });
    task.metadata_mut().insert("containerd-namespace", "otel".parse().unwrap());
    TasksClient::new(channel).create(task).await.unwrap_err();
    let (service, call) = span(&spans, "containerd.services.tasks.v1.Tasks/Create").await;
    assert_eq!(service, "told");
    assert_eq!(attributes(&call.attributes)["namespace"], "otel");
    let (_, work) = span(&spans, "create").await;
    assert_eq!((work.trace_id, work.parent_span_id), (call.trace_id, call.span_id));
    assert_eq!(attributes(&work.attributes)["container.id"], "c");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_collector_that_is_not_there_costs_nothing() {
    if !root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (name, value, said) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", ""),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "not implemented"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "unsupported traces exporter"),
        ("OTEL_SDK_DISABLED", "true", ""),
    ] {
        let endpoint = format!("http://{nobody}");
        let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), (name, value)];
        let (mut daemon, channel) = start(folder.path(), "", &variables).await;
        VersionClient::new(channel).version(()).await.unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.0.id() as i32), nix::sys::signal::SIGTERM)
            .unwrap();
        assert!(daemon.0.wait().unwrap().success());
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
        assert_eq!(log.contains("no spans are sent"), !said.is_empty(), "{name}={value}\n{log}");
        assert!(log.contains(said), "{log}");
    }
}
