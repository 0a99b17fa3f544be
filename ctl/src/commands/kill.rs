//! `davit kill`: a signal for the first process of a container.

use std::io::Write;

use nix::libc;

use crate::client::Client;
use crate::commands::{for_each, stop};
use crate::container;
use crate::error::{Error, Result};
use crate::process::{self, ProcessId};
use crate::restart;

/// Options of `davit kill`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  davit kill web\n  davit kill -s HUP web db")]
pub(crate) struct Options {
    /// The signal
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    signal: String,
    /// Containers, by name or id
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `davit kill`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let signal = stop::parse(&options.signal)?;
    let kill = async |given: &str| {
        let container = container::find(client, given).await?;
        if !container::state(client, &container).await?.is_live() {
            return Err(Error::NotRunning { given: given.to_owned() });
        }
        // Another signal may mean anything.
        if [libc::SIGKILL.unsigned_abs(), stop::signal_of(&container)].contains(&signal) {
            restart::end(client, &container).await?;
        }
        let process = ProcessId { container: container.id, exec: String::new() };
        process::kill(client, &process, signal, false).await?;
        Ok(Some(given.to_owned()))
    };
    for_each(&options.containers, out, kill).await
}
