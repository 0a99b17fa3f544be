//! Spans: one for each call, under the trace that the client's headers name, and where they are sent.
//!
//! Without the feature `otel` a span is there for the logs alone, and nothing is sent.

#[cfg(feature = "otel")]
mod otel;

use http::HeaderMap;
use tonic::Code;
use tracing::{Span, field};

use crate::config::Config;

#[cfg(feature = "otel")]
pub(crate) use otel::{Sender, layer};

/// The variables that name a collector, the more particular one first.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// The first of some variables that says something.
fn variable(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

/// Whether a collector is named, and spans are not disabled: what the plugin list says goes before the environment.
pub(crate) fn is_wanted(config: &Config) -> bool {
    let named = !config.tracing.endpoint.is_empty() || variable(&ENDPOINTS).is_some();
    named && !config.plugin_list.disables_tracing()
}

/// Says when spans are wanted of a daemon that sends none.
pub(crate) fn warn_if_deaf(config: &Config) {
    if is_wanted(config) && !cfg!(feature = "otel") {
        tracing::warn!(
            "spans are sent by a davitd that was built with the feature otel, and this one was not"
        );
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_that_are_disabled_are_not_wanted() {
        let mut config = Config::default();
        config.tracing.endpoint = "http://127.0.0.1:4318".into();
        assert!(is_wanted(&config));
        for name in ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"] {
            config.plugin_list.disabled = vec![name.to_owned()];
            assert!(!is_wanted(&config), "{name}");
        }
    }
}
