//! `davit pause` and `davit unpause`.

use std::io::Write;

use davit_proto::containerd::services::tasks::v1::{PauseTaskRequest, ResumeTaskRequest};

use crate::client::Client;
use crate::commands::for_each;
use crate::container::{self, State};
use crate::error::{CallContext, Error, Result};

/// Options of both.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Containers, by name or id
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `davit pause`.
pub(crate) async fn pause(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let pause = async |given: &str| {
        let container = container::find(client, given).await?;
        match container::state(client, &container).await? {
            State::Running { .. } => {}
            State::Paused { .. } => return Err(Error::Paused { given: given.to_owned() }),
            State::Created | State::Exited { .. } => {
                return Err(Error::NotRunning { given: given.to_owned() });
            }
        }
        let request = PauseTaskRequest { container_id: container.id };
        client.tasks().pause(request).await.call("pause the container")?;
        Ok(Some(given.to_owned()))
    };
    for_each(&options.containers, out, pause).await
}

/// `davit unpause`.
pub(crate) async fn unpause(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let unpause = async |given: &str| {
        let container = container::find(client, given).await?;
        if !matches!(container::state(client, &container).await?, State::Paused { .. }) {
            return Err(Error::usage(format!("container {given} is not paused"), ""));
        }
        let request = ResumeTaskRequest { container_id: container.id };
        client.tasks().resume(request).await.call("continue the container")?;
        Ok(Some(given.to_owned()))
    };
    for_each(&options.containers, out, unpause).await
}
