//! `davit`: containers from the command line.
//!
//! A client of containerd's gRPC API and of nothing else: it works on `davitd`'s socket and on containerd's. Each
//! command is a struct of options, parsed by [`cli`], and a function in [`commands`] of those options, the client and
//! the output; [`error`] turns what went wrong into message, hint and exit code.

#![forbid(unsafe_code)]

mod archive;
mod cli;
mod client;
mod commands;
mod container;
mod display;
mod error;
mod etc;
mod fifo;
mod format;
mod image;
mod keys;
mod labels;
mod lease;
mod log;
mod name;
mod place;
mod process;
mod progress;
mod restart;
mod rootfs;
mod signal;
mod table;
mod task;
mod template;
mod terminal;
mod transfer;
mod unpack;
mod upload;

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(cli::run())
}
