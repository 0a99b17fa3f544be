//! Everything in the project that reads bytes from outside, as one function of bytes each.
//!
//! A target panics when a promise is broken: the code under it panicked, something outside of a root was touched,
//! or what was accepted does not mean the same when it is read again. The programs in `fuzz_targets/` hand these
//! functions to libFuzzer (`cargo +nightly fuzz run frame`); `tests/smoke.rs` runs all of them on its own inputs for
//! a few seconds with a stable compiler.

mod archive;
mod entries;
mod history;
mod layer;
mod protocol;
mod registry;
mod text;

pub use archive::image_archive;
pub use davit_shim::inputs as shim;
pub use history::history;
pub use layer::{layer_bytes, layer_entries};
pub use protocol::{bootstrap, frame, journal};
pub use registry::{challenge, hosts};
pub use text::{documents, filter, names, rootfs};

/// One target: its name and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 18] = [
    ("frame", frame),
    ("bootstrap", bootstrap),
    ("journal", journal),
    ("shim_options", shim::options),
    ("shim_stream_address", shim::stream_address),
    ("shim_specification", shim::specification),
    ("shim_command_line", shim::command_line),
    ("shim_state", shim::state),
    ("history", history),
    ("filter", filter),
    ("names", names),
    ("documents", documents),
    ("challenge", challenge),
    ("hosts", hosts),
    ("rootfs", rootfs),
    ("image_archive", image_archive),
    ("layer_bytes", layer_bytes),
    ("layer_entries", layer_entries),
];
