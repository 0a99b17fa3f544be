//! The calls of clients: how many there were, how they ended, and which are under way.
//!
//! A `tower` layer around all services sees each call from its first header to the end of its answer. What it counts are the
//! metrics `grpc_server_*` under the names that containerd has them by; the calls under way are for who wants to know
//! what a daemon is at that does not answer. A call has the span that its logs and traces hang on.
//!
//! ```text
//!   begun ──▶ answered with headers ──▶ answered with trailers: the code that they tell
//!     │                 │
//!     └─────────────────┴──▶ dropped by the client: cancelled
//! ```

mod body;
mod methods;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use http::{HeaderMap, Request, Response};
use tonic::Code;
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Span;

use crate::grpc::context;
use crate::histogram::Histogram;
use crate::metrics::Page;
use crate::trace;
use body::{Observed, Observer, told};
use methods::Method;

/// The codes of gRPC, by number, as the metrics name them.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// The most letters of a namespace that are kept: a valid one has no more than 76 (`davit_model::identifier`).
const NAMESPACE: usize = 76;

/// What is known of the calls of one method.
#[derive(Debug, Default)]
struct Counters {
    started: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    handled: [AtomicU64; CODES.len()],
    took: Histogram,
}

/// A call that is not finished.
#[derive(Debug)]
struct Underway {
    /// Place in the list of methods; none for what is no method.
    method: Option<usize>,
    namespace: String,
    began: Instant,
}

#[derive(Debug)]
struct Shared {
    methods: Vec<Method>,
    paths: HashMap<String, usize>,
    counters: Vec<Counters>,
    next: AtomicU64,
    underway: Mutex<BTreeMap<u64, Underway>>,
}

/// All calls; a handle.
#[derive(Debug, Clone)]
pub struct Calls {
    shared: Arc<Shared>,
}

impl Default for Calls {
    fn default() -> Self {
        let methods = methods::all();
        let (paths, counters) =
            (methods::by_path(&methods), methods.iter().map(|_| Counters::default()).collect());
        let (next, underway) = (AtomicU64::default(), Mutex::default());
        Calls { shared: Arc::new(Shared { methods, paths, counters, next, underway }) }
    }
}

impl Calls {
    fn underway(&self) -> MutexGuard<'_, BTreeMap<u64, Underway>> {
        self.shared.underway.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, path: &str, headers: &HeaderMap) -> Arc<Call> {
        let method = self.shared.paths.get(path).copied();
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let namespace: String =
            context::namespace(headers).unwrap_or_default().chars().take(NAMESPACE).collect();
        let span = trace::call(id, path, &namespace, headers);
        let began = Instant::now();
        self.underway().insert(id, Underway { method, namespace, began });
        let call = Call { calls: self.clone(), id, method, began, span, ended: AtomicBool::new(false) };
        if let Some(counters) = call.counters() {
            counters.started.fetch_add(1, Ordering::Relaxed);
        }
        Arc::new(call)
    }

    /// How many calls there were, and how many of them are under way.
    pub fn count(&self) -> (u64, usize) {
        (self.shared.next.load(Ordering::Relaxed), self.underway().len())
    }

    /// The calls under way, the oldest first, as a table for people.
    pub fn table(&self) -> String {
        let mut table = String::from("AGE        NAMESPACE        METHOD\n");
        for call in self.underway().values() {
            let method = call.method.map(|at| self.shared.methods[at]);
            let (service, name) = method.map_or(("", "unknown"), |method| (method.service, method.name));
            let age = format!("{:.3}s", call.began.elapsed().as_secs_f64());
            let namespace = if call.namespace.is_empty() { "-" } else { &call.namespace };
            // Writing to a text cannot fail.
            let _ = writeln!(table, "{age:<10} {namespace:<16} {service}/{name}");
        }
        table
    }

    /// Adds what was counted. Of the codes other than `OK` there are lines for what has happened only.
    pub fn add_to(&self, page: &mut Page, histogram: bool) {
        for (method, counters) in self.shared.methods.iter().zip(&self.shared.counters) {
            let labels =
                [("grpc_method", method.name), ("grpc_service", method.service), ("grpc_type", method.kind)];
            for (name, help, value) in [
                ("started", "Total number of RPCs started on the server.", &counters.started),
                (
                    "msg_received",
                    "Total number of RPC stream messages received on the server.",
                    &counters.received,
                ),
                ("msg_sent", "Total number of gRPC stream messages sent by the server.", &counters.sent),
            ] {
                let name = format!("grpc_server_{name}_total");
                page.add(&name, "counter", help, &labels, value.load(Ordering::Relaxed) as f64);
            }
            for (code, count) in CODES.iter().zip(&counters.handled) {
                let count = count.load(Ordering::Relaxed);
                if count == 0 && *code != "OK" {
                    continue;
                }
                let help = "Total number of RPCs completed on the server, regardless of success or failure.";
                let [name, service, kind] = labels;
                let labels = [("grpc_code", *code), name, service, kind];
                page.add("grpc_server_handled_total", "counter", help, &labels, count as f64);
            }
            if histogram {
                let help = "Histogram of response latency (seconds) of gRPC that had been application-level handled \
                            by the server.";
                counters.took.add_to(page, "grpc_server_handling_seconds", help, &labels);
            }
        }
    }
}

/// One call, as long as somebody is at it.
#[derive(Debug)]
struct Call {
    calls: Calls,
    id: u64,
    method: Option<usize>,
    began: Instant,
    span: Span,
    ended: AtomicBool,
}

impl Call {
    fn counters(&self) -> Option<&Counters> {
        Some(&self.calls.shared.counters[self.method?])
    }

    /// Notes the end. Only the first counts: a body is dropped after its trailers, too.
    fn end(&self, code: Code) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        self.calls.underway().remove(&self.id);
        trace::ended(&self.span, code);
        let Some(counters) = self.counters() else { return };
        counters.handled[code as usize].fetch_add(1, Ordering::Relaxed);
        counters.took.count(self.began.elapsed());
    }
}

/// Sees the messages of a request.
struct Received(Arc<Call>);

impl Observer for Received {
    fn messages(&self, count: u64) {
        if let Some(counters) = self.0.counters() {
            counters.received.fetch_add(count, Ordering::Relaxed);
        }
    }

    fn ended(&self, _: Option<&HeaderMap>) {}
}

/// Sees the messages and the end of an answer; it ends its call when it is dropped.
struct Sent(Arc<Call>);

impl Observer for Sent {
    fn messages(&self, count: u64) {
        if let Some(counters) = self.0.counters() {
            counters.sent.fetch_add(count, Ordering::Relaxed);
        }
    }

    fn ended(&self, trailers: Option<&HeaderMap>) {
        self.0.end(trailers.and_then(told).unwrap_or(Code::Unknown));
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.0.end(Code::Cancelled);
    }
}

/// Counts calls and puts a span around each.
#[derive(Debug, Clone)]
pub struct CallsLayer(Calls);

impl CallsLayer {
    /// A layer that tells `calls`.
    pub fn new(calls: Calls) -> CallsLayer {
        CallsLayer(calls)
    }
}

impl<S> Layer<S> for CallsLayer {
    type Service = CallsService<S>;

    fn layer(&self, inner: S) -> CallsService<S> {
        CallsService { inner, calls: self.0.clone() }
    }
}

/// The service that [`CallsLayer`] makes.
#[derive(Debug, Clone)]
pub struct CallsService<S> {
    inner: S,
    calls: Calls,
}

impl<S> Service<Request<Body>> for CallsService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answering<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let call = self.calls.begin(request.uri().path(), request.headers());
        let request = request.map(|body| Observed::wrap(body, Received(call.clone())));
        let answer = Box::pin(call.span.in_scope(|| self.inner.call(request)));
        Answering { answer, sent: Some(Sent(call)) }
    }
}

/// The answer of a service, on its way.
pub struct Answering<F> {
    answer: Pin<Box<F>>,
    sent: Option<Sent>,
}

impl<F, E> Future for Answering<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = Result<Response<Body>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let answer = {
            let _entered = this.sent.as_ref().map(|sent| sent.0.span.enter());
            ready!(this.answer.as_mut().poll(cx))
        };
        let Some(sent) = this.sent.take() else { return Poll::Ready(answer) };
        Poll::Ready(answer.map(|response| {
            // An error has no message and no trailers: its headers say it all.
            if let Some(code) = told(response.headers()) {
                sent.0.end(code);
            }
            response.map(|body| Observed::wrap(body, sent))
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    const VERSION: &str = "/containerd.services.version.v1.Version/Version";

    fn request(path: &str) -> Request<Body> {
        let body = http_body_util::Full::new(bytes::Bytes::from_static(&[0; 5]));
        let request = Request::builder().uri(path).header("containerd-namespace", "n".repeat(100));
        request.body(Body::new(body.map_err(|never: Infallible| match never {}))).unwrap()
    }

    /// Serves one request with this answer.
    async fn serve(calls: &Calls, path: &str, answer: Response<Body>) -> Response<Body> {
        let answer = Mutex::new(Some(answer));
        let service = tower::service_fn(move |request: Request<Body>| {
            let answer = answer.lock().unwrap().take().unwrap();
            async move {
                request.into_body().collect().await.unwrap();
                Ok::<_, Infallible>(answer)
            }
        });
        CallsLayer::new(calls.clone()).layer(service).oneshot(request(path)).await.unwrap()
    }

    fn page(calls: &Calls) -> String {
        let mut page = Page::default();
        calls.add_to(&mut page, true);
        page.finish()
    }

    fn line(calls: &Calls, name: &str, code: &str) -> f64 {
        let code = if code.is_empty() { String::new() } else { format!("grpc_code=\"{code}\",") };
        let method = "grpc_method=\"Version\",grpc_service=\"containerd.services.version.v1.Version\"";
        let start = format!("grpc_server_{name}{{{code}{method},grpc_type=\"unary\"}} ");
        let page = page(calls);
        let found = page.lines().find_map(|line| line.strip_prefix(&start));
        found.map_or(-1.0, |value| value.parse().unwrap())
    }

    #[tokio::test]
    async fn calls_are_counted_by_how_they_end() {
        let calls = Calls::default();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let body = http_body_util::Full::new(bytes::Bytes::from_static(&[0; 10]));
        let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
        let body = Body::new(body.map_err(|never: Infallible| match never {}));
        let answer = serve(&calls, VERSION, Response::new(body)).await;
        assert_eq!(calls.count(), (1, 1), "it is under way until the answer is read");
        let table = calls.table();
        let line_of_call = table.lines().nth(1).unwrap();
        assert!(line_of_call.ends_with(&VERSION[1..]), "{table}");
        assert!(line_of_call.contains(&format!(" {} ", "n".repeat(76))), "{table}");
        answer.into_body().collect().await.unwrap();
        assert_eq!(calls.count(), (1, 0));
        assert_eq!(line(&calls, "handled_total", "OK"), 1.0);
        assert_eq!((line(&calls, "msg_received_total", ""), line(&calls, "msg_sent_total", "")), (1.0, 2.0));

        let error = Response::builder().header("grpc-status", "5").body(Body::empty()).unwrap();
        serve(&calls, VERSION, error).await;
        assert_eq!(line(&calls, "handled_total", "NotFound"), 1.0);
        drop(serve(&calls, VERSION, Response::new(Body::empty())).await);
        assert_eq!(line(&calls, "handled_total", "Canceled"), 1.0);
        let body = http_body_util::Full::new(bytes::Bytes::from_static(&[0; 5]));
        let body = Body::new(body.map_err(|never: Infallible| match never {}));
        let answer = serve(&calls, VERSION, Response::new(body)).await;
        answer.into_body().collect().await.unwrap();
        assert_eq!(line(&calls, "handled_total", "Unknown"), 1.0, "it has no trailers");
        assert_eq!(line(&calls, "started_total", ""), 4.0);
        assert_eq!(line(&calls, "handling_seconds_count", ""), 4.0);
        assert!(page(&calls).contains("le=\"+Inf\"} 4\n"));
    }

    #[tokio::test]
    async fn what_clients_make_up_leaves_nothing() {
        let calls = Calls::default();
        let before = page(&calls);
        serve(
            &calls,
            "/made/Up",
            Response::builder().header("grpc-status", "12").body(Body::empty()).unwrap(),
        )
        .await;
        assert_eq!(page(&calls), before);
        assert_eq!(calls.count(), (1, 0));
    }
}
