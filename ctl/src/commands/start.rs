//! `davit start`: run containers that were created or have exited.

use std::io::Write;

use davit_proto::containerd::services::containers::v1::Container;

use crate::client::Client;
use crate::commands::{checkpoint, for_each, run};
use crate::container::{self, State};
use crate::error::{Error, Result};
use crate::keys::{self, DetachKeys};
use crate::place::Places;
use crate::process::Streams;
use crate::task::{self, TaskIo};
use crate::{fifo, labels, restart};

/// Options of `davit start`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit start web db\n  davit start -ai shell\n  davit start --checkpoint before-update web"
)]
pub(crate) struct Options {
    /// Stay with the container: show its output and pass its exit code on
    #[arg(short, long)]
    attach: bool,
    /// Stay with the container as with --attach, and pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Go on from this checkpoint of the container, in the background
    #[arg(long, value_name = "NAME", conflicts_with_all = ["attach", "interactive"])]
    checkpoint: Option<String>,
    /// The keys that leave a container with a terminal alone (with --attach)
    #[arg(long, value_name = "KEYS", default_value = keys::DEFAULT)]
    detach_keys: DetachKeys,
    /// Containers, by name or id
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// `davit start`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<u8> {
    if options.attach || options.interactive {
        let [given] = options.containers.as_slice() else {
            return Err(Error::usage("--attach is for one container", "name one only"));
        };
        return attach(client, given, options.interactive, &options.detach_keys).await;
    }
    let checkpoint = options.checkpoint.as_deref();
    if checkpoint.is_some() && options.containers.len() > 1 {
        return Err(Error::usage("--checkpoint is for one container", "name one only"));
    }
    let start = async |given: &str| start(client, given, checkpoint).await.map(|()| Some(given.to_owned()));
    for_each(&options.containers, out, start).await.map(|()| 0)
}

/// Starts one container in the background, afresh or from one of its checkpoints. One that runs is started.
pub(super) async fn start(client: &Client, given: &str, checkpoint: Option<&str>) -> Result<()> {
    let mut container = container::find(client, given).await?;
    let checkpoint = match checkpoint {
        Some(name) => Some(checkpoint::find(client, &container, name).await?),
        None => None,
    };
    if !prepare(client, given, &container).await? {
        return Ok(());
    }
    let places = Places::of(client).await?;
    let runtime = container.runtime.as_ref().map_or("", |runtime| &runtime.name);
    let log = places.log_of(&container).unwrap_or_else(|| places.log(&container.id, runtime));
    let text = log.display().to_string();
    let changes =
        vec![(labels::LOG, text), (labels::EXIT_CODE, String::new()), (labels::EXITED_AT, String::new())];
    container::set_labels(client, &container.id, changes).await?;
    container.labels.insert(labels::LOG.to_owned(), log.display().to_string());
    let rootfs = task::rootfs(client, &container).await?;
    let io = TaskIo::detached(&container, &log)?;
    task::create_and_start(client, &container, rootfs, io, checkpoint).await?;
    restart::begin(client, &container).await
}

async fn attach(client: &Client, given: &str, interactive: bool, keys: &DetachKeys) -> Result<u8> {
    let container = container::find(client, given).await?;
    if !prepare(client, given, &container).await? {
        return Err(Error::usage(format!("container {given} runs already"), "`davit attach` joins it"));
    }
    let terminal = container::spec(&container)?["process"]["terminal"].as_bool().unwrap_or(false);
    let streams = Streams::open(interactive, terminal, keys)?;
    if let Some(folder) = streams.folder() {
        let label = (labels::FIFOS, folder.display().to_string());
        container::set_labels(client, &container.id, vec![label]).await?;
    }
    let rootfs = task::rootfs(client, &container).await?;
    run::foreground(client, &container, rootfs, streams, false, false).await
}

/// Makes way for a new task, and for new FIFOs. False when the container runs.
async fn prepare(client: &Client, given: &str, container: &Container) -> Result<bool> {
    match container::task(client, &container.id).await? {
        None => {}
        Some(task) => match container::state_of(container, Some(&task)) {
            State::Running { .. } => return Ok(false),
            State::Paused { .. } => return Err(Error::Paused { given: given.to_owned() }),
            State::Exited { .. } => task::delete(client, &container.id).await?,
            State::Created => {
                task::kill_and_wait(client, &container.id).await?;
                task::delete(client, &container.id).await?;
            }
        },
    }
    if let Some(folder) = container.labels.get(labels::FIFOS) {
        fifo::remove_left(folder.as_ref());
    }
    Ok(true)
}
