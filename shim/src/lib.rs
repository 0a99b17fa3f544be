//! `containerd-shim-davit-v2`: keeps the containers of one group running, whatever becomes of the daemon.
//!
//! One process of one thread. A daemon runs it with the action `start`, which leaves the serving process
//! behind (`start` then `serve`); over ttrpc (`rpc`) it is then asked to create, start, signal and
//! delete containers (`service`, `container`, `process`), which it does by calling an OCI runtime
//! (`runtime`). What happens to containers goes through a journal (`outbox`) to the daemon.
//!
//! It is a library only so that the tests can build it a second time, as another build to upgrade to.

mod arguments;
mod cgroup;
mod checkpoint;
mod console;
mod container;
mod control;
mod copy;
mod deadline;
mod delete;
mod error;
mod executor;
mod identity;
mod info;
#[doc(hidden)]
pub mod inputs;
mod json_log;
mod leftovers;
mod log;
mod log_file;
mod log_sink;
mod logger;
mod offload;
mod options;
mod outbox;
mod process;
mod publisher;
mod quiesce;
mod reactor;
mod reaper;
mod rootfs;
mod rpc;
mod runtime;
mod serve;
mod service;
mod shim;
mod socket;
mod spec;
mod spool;
mod start;
mod state;
mod stdio;
mod sync;
mod upgrade;

use std::io::Write;
use std::process::ExitCode;

use davit_model::error::chain;

/// The whole program. `build` names this build of it, for people who compare two.
pub fn main(build: &'static str) -> ExitCode {
    davit_sys::process::keep_children();
    identity::set_build(build);
    let arguments = match arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&error),
    };
    if arguments.version {
        println!("containerd-shim-davit-v2:\n  Version:  {}\n  Build:    {build}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if arguments.info {
        return done(info::run());
    }
    if arguments.upgrade_check {
        return done(upgrade::answer_check());
    }
    if arguments.namespace.is_empty() {
        return fail(&std::io::Error::other("shim namespace cannot be empty"));
    }
    for name in [&arguments.namespace, &arguments.id] {
        if let Err(error) = davit_model::identifier::validate(name) {
            return fail(&error);
        }
    }
    if let Some(number) = arguments.upgrade_state {
        return done(serve::resume(arguments, number));
    }
    match arguments.action.as_deref() {
        Some("start") => done(start::run(&arguments)),
        Some("delete") => done(delete::run(arguments)),
        _ => done(serve::run(arguments)),
    }
}

fn done<E: std::error::Error + 'static>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// The daemon shows this text to its client.
fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "io.containerd.davit.v2: {}", chain(error));
    ExitCode::FAILURE
}
