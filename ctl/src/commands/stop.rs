//! `davit stop`: ask, wait, kill. `davit restart`: the same, and start again.

use std::io::Write;
use std::time::Duration;

use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::services::tasks::v1::ResumeTaskRequest;
use nix::libc;

use crate::client::Client;
use crate::commands::{for_each, start};
use crate::container::{self, State};
use crate::error::{CallContext, Error, Result};
use crate::process::{self, ProcessId};
use crate::{labels, restart, signal, task};

/// Options of `davit stop`, and of `davit restart`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds until it is killed; -1 for never
    #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 10)]
    #[arg(allow_negative_numbers = true)]
    time: i64,
    /// The signal that asks it to stop (default: the container's, or SIGTERM)
    #[arg(short, long, value_name = "SIGNAL")]
    signal: Option<String>,
    /// Containers, by name or id
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `davit stop`; with `again`, which is `davit restart`, each container is started when it has stopped.
pub(crate) async fn run(client: &Client, options: Options, again: bool, out: &mut dyn Write) -> Result<()> {
    let given_signal = options.signal.as_deref().map(parse).transpose()?;
    let timeout = u64::try_from(options.time).ok().map(Duration::from_secs);
    let stop_one = async |given: &str| {
        let container = container::find(client, given).await?;
        stop(client, &container, given_signal, timeout).await?;
        if again {
            start::start(client, &container.id, None).await?;
        }
        Ok(Some(given.to_owned()))
    };
    for_each(&options.containers, out, stop_one).await
}

/// The number of a signal that a user named.
///
/// # Errors
/// [`Error::Usage`].
pub(crate) fn parse(text: &str) -> Result<u32> {
    signal::parse(text).ok_or_else(|| {
        Error::usage(format!("invalid signal {text:?}"), "want a name such as SIGTERM, or a number")
    })
}

/// The signal that asks a container to stop.
pub(crate) fn signal_of(container: &Container) -> u32 {
    let own = container.labels.get(labels::STOP_SIGNAL).and_then(|text| signal::parse(text));
    own.unwrap_or(libc::SIGTERM.unsigned_abs())
}

/// Stops a container: its stop signal, then, after `timeout`, SIGKILL. One that does not run is stopped.
///
/// # Errors
/// Those of the calls.
pub(crate) async fn stop(
    client: &Client,
    container: &Container,
    signal: Option<u32>,
    timeout: Option<Duration>,
) -> Result<()> {
    let state = container::state(client, container).await?;
    if !state.is_live() {
        // It may be about to be started again.
        return restart::end(client, container).await;
    }
    restart::end(client, container).await?;
    let signal = signal.unwrap_or_else(|| signal_of(container));
    let process = ProcessId { container: container.id.clone(), exec: String::new() };
    match process::kill(client, &process, signal, false).await {
        Err(error) if error.is_not_found() => return Ok(()),
        other => other?,
    }
    if let State::Paused { .. } = state {
        // A frozen process cannot react.
        let request = ResumeTaskRequest { container_id: container.id.clone() };
        client.tasks().resume(request).await.call("continue the container")?;
    }
    let exit = process::wait(client, &process);
    let exited = match timeout {
        None => exit.await.map(Some),
        Some(timeout) => tokio::time::timeout(timeout, exit).await.map_or(Ok(None), |exit| exit.map(Some)),
    };
    match exited {
        Ok(Some(_)) => Ok(()),
        Ok(None) => task::kill_and_wait(client, &container.id).await,
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}
