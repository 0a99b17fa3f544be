//! `davit attach`: come back to a container that runs.

use std::io::Write;
use std::time::Duration;

use davit_proto::containerd::services::containers::v1::Container;

use crate::client::Client;
use crate::commands::{logs, run};
use crate::container::{self, State};
use crate::error::{Error, Result};
use crate::keys::{self, DetachKeys};
use crate::labels;
use crate::place::Places;
use crate::process::{Ended, ProcessId, Streams};

const EXAMPLES: &str = "\
Examples:
  davit run -it --name web busybox sh       then ctrl-p ctrl-q: the shell runs on
  davit attach web                          and is here again
A container that was run with -d shows what it adds to its log from now on, line by line.";

/// How often a log is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Options of `davit attach`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Do not pass standard input on
    #[arg(long)]
    no_stdin: bool,
    /// Pass signals on to the container
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    sig_proxy: bool,
    /// The keys that leave a container with a terminal alone again
    #[arg(long, value_name = "KEYS", default_value = keys::DEFAULT)]
    detach_keys: DetachKeys,
    /// The container, by name or id
    container: String,
}

/// `davit attach`; returns the exit code of the container.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<u8> {
    let given = &options.container;
    let container = container::find(client, given).await?;
    let task = container::task(client, &container.id).await?;
    match container::state_of(&container, task.as_ref()) {
        State::Running { .. } => {}
        State::Paused { .. } => return Err(Error::Paused { given: given.clone() }),
        State::Created | State::Exited { .. } => return Err(Error::NotRunning { given: given.clone() }),
    }
    let task = task.unwrap_or_default();
    let mut streams = Streams::reopen(&task, !options.no_stdin, options.sig_proxy, &options.detach_keys)?;
    let process = ProcessId { container: container.id.clone(), exec: String::new() };
    if streams.has_output() {
        streams.engage()?;
        streams.redraw(client, &process).await;
        return run::stay(client, &container, streams, false).await;
    }
    follow(client, &container, streams, &process, out).await
}

/// Stays with a container whose output is in a log.
async fn follow(
    client: &Client,
    container: &Container,
    mut streams: Streams,
    process: &ProcessId,
    out: &mut dyn Write,
) -> Result<u8> {
    let Some(path) = Places::of(client).await?.log_of(container) else {
        let hint = "containers that davit has started can be attached to";
        return Err(Error::usage("another client has the output of this container", hint));
    };
    let rotation = container.labels.get(labels::LOG_OPTIONS).map_or("", String::as_str);
    let mut log = logs::from_now(&path, rotation)?;
    streams.engage()?;
    let supervised = streams.supervise(client, process);
    tokio::pin!(supervised);
    let mut ticks = tokio::time::interval(INTERVAL);
    let ended = loop {
        // Cancel safety: `supervised` is pinned outside of the loop, and a tick that is missed comes again.
        tokio::select! {
            ended = &mut supervised => break ended?,
            _ = ticks.tick() => log.copy(out)?,
        }
    };
    log.copy(out)?;
    if ended == Ended::Detached {
        run::say_detached("the container goes on");
    }
    Ok(run::exit_code(&ended))
}
