//! `davit restart`: stop, and start again.

use std::io::Write;
use std::time::Duration;

use crate::client::Client;
use crate::commands::{for_each, start, stop};
use crate::container;
use crate::error::Result;

/// Options of `davit restart`.
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

/// `davit restart`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let signal = options.signal.as_deref().map(stop::parse).transpose()?;
    let timeout = u64::try_from(options.time).ok().map(Duration::from_secs);
    let restart = async |given: &str| {
        let container = container::find(client, given).await?;
        stop::stop(client, &container, signal, timeout).await?;
        start::start(client, &container.id, None).await?;
        Ok(Some(given.to_owned()))
    };
    for_each(&options.containers, out, restart).await
}
