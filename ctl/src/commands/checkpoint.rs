//! `davit checkpoint`: what a container is doing, kept to go on from there.
//!
//! A checkpoint is content that a label of its container refers to: it is kept as long as the container, and goes with it.

use std::io::Write;
use std::time::SystemTime;

use davit_model::identifier;
use davit_proto::any;
use davit_proto::containerd::runc::v1::CheckpointOptions;
use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::services::content::v1::InfoRequest;
use davit_proto::containerd::services::tasks::v1::CheckpointTaskRequest;
use davit_proto::containerd::types::Descriptor;

use crate::client::Client;
use crate::container;
use crate::error::{CallContext, Error, Result};
use crate::format;
use crate::lease::with_lease;
use crate::table::Table;

/// The images of criu in a tar archive (containerd `core/images/mediatypes.go`).
const IMAGES: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
/// The label of a container that refers to a checkpoint, before its name: the collector knows the first part of it.
const LABEL: &str = "containerd.io/gc.ref.content.checkpoint.";

const EXAMPLES: &str = "\
Examples:
  davit checkpoint create web before-update     web has stopped then; --leave-running lets it run
  davit start --checkpoint before-update web    and goes on from there";

/// Options of `davit checkpoint`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write down what a running container is doing, and stop it
    Create(CreateOptions),
    /// List the checkpoints of a container
    Ls(ListOptions),
    /// Remove a checkpoint
    Rm(RemoveOptions),
}

/// Options of `davit checkpoint create`.
#[derive(Debug, clap::Args)]
struct CreateOptions {
    /// Leave the container running
    #[arg(long)]
    leave_running: bool,
    /// Its TCP connections may be open
    #[arg(long)]
    tcp_established: bool,
    /// It may hold locks on files
    #[arg(long)]
    file_locks: bool,
    /// The container, by name or id
    container: String,
    /// The name of the checkpoint
    checkpoint: String,
}

/// Options of `davit checkpoint ls`.
#[derive(Debug, clap::Args)]
struct ListOptions {
    /// The container, by name or id
    container: String,
}

/// Options of `davit checkpoint rm`.
#[derive(Debug, clap::Args)]
struct RemoveOptions {
    /// The container, by name or id
    container: String,
    /// The name of the checkpoint
    checkpoint: String,
}

/// `davit checkpoint`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    match options.command {
        Command::Create(options) => create(client, options, out).await,
        Command::Ls(options) => list(client, &options, out).await,
        Command::Rm(options) => remove(client, &options).await,
    }
}

async fn create(client: &Client, options: CreateOptions, out: &mut dyn Write) -> Result<()> {
    let container = container::find(client, &options.container).await?;
    let name = options.checkpoint;
    identifier::validate(&name).map_err(|source| {
        let hint = "a name is made of letters, digits and single . _ - between them";
        Error::usage(format!("invalid checkpoint name: {source}"), hint)
    })?;
    if digest(&container, &name).is_some() {
        let hint = "remove it with `davit checkpoint rm`, or take another name";
        return Err(Error::usage(format!("container {} has a checkpoint {name}", options.container), hint));
    }
    let wanted = CheckpointOptions {
        exit: !options.leave_running,
        open_tcp: options.tcp_established,
        file_locks: options.file_locks,
        // What has a terminal cannot be written down without this.
        terminal: container::spec(&container)?["process"]["terminal"].as_bool().unwrap_or(false),
        ..CheckpointOptions::default()
    };
    let id = container.id.clone();
    let take = async |client: Client| {
        let request = CheckpointTaskRequest {
            container_id: id.clone(),
            options: Some(any::pack(&wanted)),
            ..CheckpointTaskRequest::default()
        };
        let taken = client.tasks().checkpoint(request).await.call("write the checkpoint")?.descriptors;
        let images = taken.into_iter().find(|blob| blob.media_type == IMAGES).unwrap_or_default();
        container::set_labels(&client, &id, vec![(&label(&name), images.digest)]).await
    };
    with_lease(client, take).await?;
    format::line(out, &name)
}

async fn list(client: &Client, options: &ListOptions, out: &mut dyn Write) -> Result<()> {
    let container = container::find(client, &options.container).await?;
    let mut table = Table::new(&["CHECKPOINT NAME", "CREATED", "SIZE"]);
    for (label, digest) in &container.labels {
        let Some(name) = label.strip_prefix(LABEL) else { continue };
        let info = info(client, digest).await?;
        let created = info.created_at.as_ref().and_then(format::system_time);
        let created = created.map(|at| format::ago(at, SystemTime::now())).unwrap_or_default();
        table.row(vec![name.to_owned(), created, format::decimal_size(info.size.unsigned_abs())]);
    }
    table.write(out).map_err(Error::Output)
}

async fn remove(client: &Client, options: &RemoveOptions) -> Result<()> {
    let container = container::find(client, &options.container).await?;
    let name = &options.checkpoint;
    digest(&container, name).ok_or_else(|| none(&options.container, name))?;
    container::set_labels(client, &container.id, vec![(&label(name), String::new())]).await
}

/// The checkpoint of a container that has this name, as its task is to be restored from it.
///
/// # Errors
/// There is none, and those of the call.
pub(crate) async fn find(client: &Client, container: &Container, name: &str) -> Result<Descriptor> {
    let digest = digest(container, name).ok_or_else(|| none(&container::name(container), name))?;
    let info = info(client, digest).await?;
    let (media_type, digest, size) = (IMAGES.to_owned(), digest.to_owned(), info.size);
    Ok(Descriptor { media_type, digest, size, ..Descriptor::default() })
}

fn label(name: &str) -> String {
    format!("{LABEL}{name}")
}

fn digest<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    container.labels.get(&label(name)).map(String::as_str)
}

fn none(container: &str, name: &str) -> Error {
    let hint = format!("`davit checkpoint ls {container}` lists those that there are");
    Error::usage(format!("container {container} has no checkpoint {name}"), hint)
}

async fn info(client: &Client, digest: &str) -> Result<davit_proto::containerd::services::content::v1::Info> {
    let request = InfoRequest { digest: digest.to_owned() };
    Ok(client.content().info(request).await.call("look up the checkpoint")?.info.unwrap_or_default())
}
