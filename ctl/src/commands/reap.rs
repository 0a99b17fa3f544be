//! `davit reap`: what `davit run --rm` leaves behind when it does not stay itself. It waits for the end of a container,
//! through restarts of the daemon, and removes it. No daemon that speaks containerd's API does that by itself.

use std::process::{Command, Stdio};

use tokio::signal::unix::{SignalKind, signal};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::process::{self, ProcessId};
use crate::{container, task};

/// Options of `davit reap`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The container's whole id
    container: String,
}

/// `davit reap`.
pub(crate) async fn run(client: &Client, options: Options) -> Result<()> {
    // Whoever logs out does not mean this process. Without a session of its own it would get what is for the terminal's.
    let _ = nix::unistd::setsid();
    let error = |source| Error::System { action: "listen for signals", source };
    let _hangup = signal(SignalKind::hangup()).map_err(error)?;
    let process = ProcessId { container: options.container.clone(), exec: String::new() };
    match process::wait(client, &process).await {
        Err(error) if !error.is_not_found() => return Err(error),
        _ => {}
    }
    let container = match container::find(client, &options.container).await {
        // Somebody was faster.
        Err(Error::NoContainer { .. }) => return Ok(()),
        other => other?,
    };
    task::remove_container(client, &container).await
}

/// Leaves a process behind that removes a container when it has exited.
///
/// # Errors
/// It cannot be started.
pub(crate) fn leave_behind(client: &Client, id: &str) -> Result<()> {
    let error =
        |source| Error::System { action: "leave a process behind that removes the container", source };
    let program = std::env::current_exe().map_err(error)?;
    let mut command = Command::new(program);
    command.arg("--address").arg(client.address()).arg("--namespace").arg(client.namespace());
    command.args(["reap", id]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // It is to keep no folder of ours busy.
    command.current_dir("/");
    command.spawn().map(drop).map_err(error)
}
