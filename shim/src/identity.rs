//! Which program this process executes.

use std::cell::Cell;

use davit_proto::davit::shim::v1::Program;

use crate::state;

thread_local! {
    static BUILD: Cell<&'static str> = const { Cell::new("") };
}

/// Says which build this is.
pub(crate) fn set_build(build: &'static str) {
    BUILD.set(build);
}

/// The name of this build.
pub(crate) fn build() -> &'static str {
    BUILD.get()
}

/// The program as clients are told.
pub(crate) fn program() -> Program {
    let path = std::env::current_exe().unwrap_or_default();
    Program {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build: build().to_owned(),
        path: path.display().to_string(),
        state_version: u32::from(state::VERSION),
    }
}
