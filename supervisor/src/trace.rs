//! Spans: one for each call, under the trace that the client's headers name, and where they are sent.
//!
//! Without the feature `otel` a span is there for the logs alone, and nothing is sent.

use http::HeaderMap;
use tonic::Code;
use tracing::{Span, field};

/// The span of a call.
#[cfg_attr(not(feature = "otel"), expect(unused_variables, reason = "the headers name the trace"))]
pub(crate) fn call(id: u64, path: &str, namespace: &str, headers: &HeaderMap) -> Span {
    let span = tracing::debug_span!(
        target: "davit_supervisor::calls",
        "call",
        id,
        method = path,
        namespace,
        otel.name = field::Empty,
        otel.kind = field::Empty
    );
    #[cfg(feature = "otel")]
    otel::begin(&span, path, headers);
    span
}

/// A call has ended.
#[cfg_attr(not(feature = "otel"), expect(unused_variables, reason = "a span that is sent tells its code"))]
pub(crate) fn ended(span: &Span, code: Code) {
    #[cfg(feature = "otel")]
    otel::end(span, code);
}
