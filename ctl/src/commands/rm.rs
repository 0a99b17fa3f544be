//! `davit rm`: remove containers, with their root filesystem and their log.

use std::io::Write;

use davit_proto::containerd::services::containers::v1::Container;

use crate::client::Client;
use crate::commands::for_each;
use crate::container::{self, State};
use crate::error::{Error, Result};
use crate::{restart, task};

/// Options of `davit rm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kill those that run
    #[arg(short, long)]
    force: bool,
    /// Accepted for Docker's sake: there are no anonymous volumes
    #[arg(short, long)]
    volumes: bool,
    /// Containers, by name or id
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `davit rm`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let remove_one = async |given: &str| {
        let container = match container::find(client, given).await {
            // What is to be gone is gone.
            Err(Error::NoContainer { .. }) if options.force => return Ok(None),
            other => other?,
        };
        remove(client, &container, given, options.force).await?;
        Ok(Some(given.to_owned()))
    };
    for_each(&options.containers, out, remove_one).await
}

async fn remove(client: &Client, container: &Container, given: &str, force: bool) -> Result<()> {
    let task = container::task(client, &container.id).await?;
    match container::state_of(container, task.as_ref()) {
        State::Running { .. } | State::Paused { .. } if !force => {
            return Err(Error::Running { given: given.to_owned() });
        }
        State::Exited { .. } => restart::end(client, container).await?,
        // A task that was never started has a process all the same, which waits for the start.
        State::Running { .. } | State::Paused { .. } | State::Created => {
            restart::end(client, container).await?;
            task::kill_and_wait(client, &container.id).await?;
        }
    }
    task::remove_container(client, container).await
}
