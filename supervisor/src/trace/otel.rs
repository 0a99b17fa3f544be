//! Sending spans to a collector by OTLP, as containerd's plugin `io.containerd.tracing.processor.v1.otlp` does.
//!
//! The environment's `OTEL_*` decide as the specification of OpenTelemetry has it, and go before the configuration. Spans are
//! queued and sent in batches; a collector that is slow or gone costs spans, never time.

use std::sync::mpsc;
use std::time::Duration;

use hyper_rustls::HttpsConnectorBuilder;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Status, TracerProvider};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::{
    ExporterBuildError, OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, SpanExporter, WithExportConfig, WithHttpConfig,
    WithTonicConfig,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::span_processor_with_async_runtime::BatchSpanProcessor;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use opentelemetry_sdk::{Resource, runtime};
use tonic::Code;
use tonic::transport::ClientTlsConfig;
use tracing::{Level, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::registry::LookupSpan;

use super::{ENDPOINTS, variable};
use crate::config::{Tracing, TracingProtocol};

/// What is in the queue when the daemon ends has so long to be sent.
const FLUSH: Duration = Duration::from_secs(2);

/// Why no spans are sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    /// `OTEL_TRACES_EXPORTER`
    #[error("unsupported traces exporter {name:?}")]
    Exporter {
        /// What was asked for.
        name: String,
    },
    /// `OTEL_EXPORTER_OTLP_PROTOCOL`
    #[error("OpenTelemetry protocol {name:?}: not implemented")]
    Protocol {
        /// What was asked for.
        name: String,
    },
    /// The authorities of this machine cannot be read.
    #[error("cannot read the certificates of this machine")]
    Roots {
        /// Why not.
        source: std::io::Error,
    },
    /// An endpoint that cannot be one.
    #[error("cannot send spans")]
    Build {
        /// Why not.
        source: ExporterBuildError,
    },
}

/// Sends spans until it is told to end.
#[derive(Debug, Clone)]
pub(crate) struct Sender(SdkTracerProvider);

impl Sender {
    /// A sender to the collector that the environment or the configuration names, unless the environment wants none. Must be
    /// called in a runtime.
    ///
    /// # Errors
    /// Settings that are not understood.
    pub(crate) fn start(config: &Tracing) -> Result<Option<Sender>, TraceError> {
        let disabled = variable(&["OTEL_SDK_DISABLED"]);
        let disabled =
            disabled.is_some_and(|value| matches!(value.to_lowercase().as_str(), "true" | "1" | "t"));
        if disabled {
            return Ok(None);
        }
        match variable(&["OTEL_TRACES_EXPORTER"]).as_deref() {
            None | Some("otlp") => {}
            Some("none") => return Ok(None),
            Some(name) => return Err(TraceError::Exporter { name: name.to_owned() }),
        }
        let protocol = variable(&["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]);
        let protocol = match protocol.as_deref() {
            None => config.protocol,
            Some("http/protobuf") => TracingProtocol::Http,
            Some("grpc") => TracingProtocol::Grpc,
            Some(name) => return Err(TraceError::Protocol { name: name.to_owned() }),
        };
        let endpoint = variable(&ENDPOINTS).is_none().then_some(config.endpoint.as_str());
        let exporter = match protocol {
            TracingProtocol::Http => http(endpoint)?,
            TracingProtocol::Grpc => grpc(endpoint)?,
        };
        let mut provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter, runtime::Tokio).build())
            .with_resource(resource(config));
        if variable(&["OTEL_TRACES_SAMPLER"]).is_none() {
            let ratio = Sampler::TraceIdRatioBased(config.sampling_ratio);
            provider = provider.with_sampler(Sampler::ParentBased(Box::new(ratio)));
        }
        Ok(Some(Sender(provider.build())))
    }

    /// Sends what is left. Blocks, but not for long, and must not be called in a runtime, which must still be there.
    pub(crate) fn end(self) {
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = done.send(self.0.shutdown());
        });
        match ended.recv_timeout(FLUSH) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans could not be sent"),
            Err(_) => tracing::warn!("the collector does not take the last spans"),
        }
    }
}

fn resource(config: &Tracing) -> Resource {
    let builder = Resource::builder();
    match variable(&["OTEL_SERVICE_NAME"]) {
        Some(_) => builder.build(),
        None => builder.with_service_name(config.service_name.clone()).build(),
    }
}

fn http(endpoint: Option<&str>) -> Result<SpanExporter, TraceError> {
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
        .map_err(|source| TraceError::Roots { source })?
        .https_or_http()
        .enable_http1()
        .build();
    let mut exporter =
        SpanExporter::builder().with_http().with_http_client(HyperClient::new(connector, timeout(), None));
    if let Some(endpoint) = endpoint {
        // A server is named, and not what it is asked for.
        let path = match endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest).split_once('/') {
            None => "/v1/traces",
            Some((_, "")) => "v1/traces",
            Some(_) => "",
        };
        exporter = exporter.with_endpoint(format!("{endpoint}{path}"));
    }
    exporter.build().map_err(|source| TraceError::Build { source })
}

fn grpc(endpoint: Option<&str>) -> Result<SpanExporter, TraceError> {
    let mut exporter = SpanExporter::builder().with_tonic();
    let named = endpoint.map(str::to_owned).or_else(|| variable(&ENDPOINTS));
    if named.is_some_and(|endpoint| endpoint.starts_with("https:")) {
        exporter = exporter.with_tls_config(ClientTlsConfig::new().with_native_roots());
    }
    if let Some(endpoint) = endpoint {
        exporter = exporter.with_endpoint(endpoint);
    }
    exporter.build().map_err(|source| TraceError::Build { source })
}

/// How long a batch may take.
fn timeout() -> Duration {
    let given = variable(&["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"]);
    let given = given.and_then(|milliseconds| milliseconds.parse().ok());
    given.map_or(OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, Duration::from_millis)
}

/// The layer that gives spans to a sender: our own, and no others'.
pub(crate) fn layer<S>(sender: Option<&Sender>) -> Option<impl Layer<S>>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let tracer = sender?.0.tracer("davitd");
    let ours = filter_fn(|metadata| {
        metadata.is_span() && *metadata.level() <= Level::DEBUG && metadata.target().starts_with("davit")
    });
    let ours = ours.with_max_level_hint(LevelFilter::DEBUG);
    Some(tracing_opentelemetry::layer().with_tracer(tracer).with_location(false).with_filter(ours))
}

/// Puts the span of a call under the trace of the client (W3C Trace Context), and names it as the conventions for RPC do.
pub(super) fn begin(span: &Span, path: &str, headers: &http::HeaderMap) {
    if span.is_disabled() {
        return;
    }
    let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
    // It fails for a span that nobody sends.
    let _ = span.set_parent(parent);
    let name = path.trim_start_matches('/');
    span.record("otel.name", name);
    span.record("otel.kind", "server");
    let (service, method) = name.rsplit_once('/').unwrap_or(("", name));
    for (key, value) in [("rpc.system", "grpc"), ("rpc.service", service), ("rpc.method", method)] {
        span.set_attribute(key, value.to_owned());
    }
}

/// Tells how a call ended. What is the client's fault is no error of the server's.
pub(super) fn end(span: &Span, code: Code) {
    if span.is_disabled() {
        return;
    }
    span.set_attribute("rpc.grpc.status_code", i64::from(code as i32));
    let failed = [
        Code::Unknown,
        Code::DeadlineExceeded,
        Code::Unimplemented,
        Code::Internal,
        Code::Unavailable,
        Code::DataLoss,
    ];
    if failed.contains(&code) {
        span.set_status(Status::error(code.description()));
    }
}
