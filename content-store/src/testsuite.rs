//! The conformance suite of content stores.
