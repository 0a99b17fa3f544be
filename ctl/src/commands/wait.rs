//! `davit wait`: the exit codes of containers, once they have exited.

use std::io::Write;

use crate::client::Client;
use crate::commands::for_each;
use crate::container::{self, State};
use crate::error::Result;
use crate::process::{self, ProcessId};

/// Options of `davit wait`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Containers, by name or id
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `davit wait`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let wait = async |given: &str| {
        let container = container::find(client, given).await?;
        if let State::Exited { code, .. } = container::state(client, &container).await? {
            return Ok(Some(code.to_string()));
        }
        let process = ProcessId { container: container.id, exec: String::new() };
        let exit = process::wait(client, &process).await?;
        Ok(Some(exit.code.to_string()))
    };
    for_each(&options.containers, out, wait).await
}
