//! `davit run`: make a container, start it, and stay with it unless told not to.

use std::io::Write;

use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::types::Mount;

use crate::client::Client;
use crate::commands::create::{self, CreateOptions};
use crate::commands::reap;
use crate::error::{Error, Result};
use crate::keys::{self, DetachKeys};
use crate::process::{Ended, Exit, ProcessId, Streams};
use crate::task::{self, TaskIo};
use crate::{container, format, labels, restart};

const EXAMPLES: &str = "\
Examples:
  davit run --rm -it busybox sh
  davit run -d --name web -v /srv/www:/www:ro -m 256m --cpus 0.5 busybox httpd -f -h /www
  davit run --rm --net=host -e KEY=value -u 1000:1000 busybox env
Exit codes: 125 if davit or the daemon failed, 126 if the command cannot be invoked, 127 if it was not
found, else that of the command. Flags end at IMAGE. Networks other than \"none\" and \"host\", and named
volumes, are not there yet.";

/// Options of `davit run`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, override_usage = "davit run [OPTIONS] IMAGE [COMMAND] [ARGUMENT...]")]
pub(crate) struct Options {
    /// Run in the background and print the id; the output goes to a log
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Remove the container when it exits; with --detach a small process waits for that
    #[arg(long)]
    pub(crate) rm: bool,
    /// The keys that leave a container with a terminal alone; `davit attach` comes back
    #[arg(long, value_name = "KEYS", default_value = keys::DEFAULT)]
    detach_keys: DetachKeys,
    #[command(flatten)]
    pub(crate) create: CreateOptions,
}

/// `davit run`; returns the exit code of the container.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<u8> {
    if options.rm && options.create.is_restarted() {
        return Err(Error::usage("--restart does not go with --rm", "leave one of them out"));
    }
    if options.detach {
        let created = create::create(client, &options.create, None).await?;
        start_new(client, &created.container, created.rootfs, None).await?;
        restart::begin(client, &created.container).await?;
        if options.rm {
            reap::leave_behind(client, &created.container.id)?;
        }
        format::line(out, created.container.id)?;
        return Ok(0);
    }
    // The streams come first: what is wrong with them is found before anything is made.
    let streams = Streams::open(options.create.interactive, options.create.tty, &options.detach_keys)?;
    let created = create::create(client, &options.create, streams.folder()).await?;
    foreground(client, &created.container, created.rootfs, streams, options.rm, true).await
}

/// Starts a container that was just made, and removes it again if that fails: it never was anything.
async fn start_new(
    client: &Client,
    container: &Container,
    rootfs: Vec<Mount>,
    streams: Option<&Streams>,
) -> Result<()> {
    let started = async {
        let io = match (streams, container.labels.get(labels::LOG)) {
            (Some(streams), _) => TaskIo::attached(streams),
            (None, Some(log)) => TaskIo::detached(container, log.as_ref())?,
            (None, None) => TaskIo::default(),
        };
        task::create_and_start(client, container, rootfs, io, None).await
    };
    let result = started.await;
    if result.is_err() {
        let _ = task::remove_container(client, container).await;
    }
    result
}

/// Starts a container and stays until it exits.
///
/// # Errors
/// When it does not start, or the daemon loses it.
pub(crate) async fn foreground(
    client: &Client,
    container: &Container,
    rootfs: Vec<Mount>,
    mut streams: Streams,
    remove: bool,
    is_new: bool,
) -> Result<u8> {
    streams.engage()?;
    if is_new {
        start_new(client, container, rootfs, Some(&streams)).await?;
    } else {
        task::create_and_start(client, container, rootfs, TaskIo::attached(&streams), None).await?;
    }
    stay(client, container, streams, remove).await
}

/// Stays with a container that runs until it exits, or its user leaves it alone; with `remove` it is gone after its end.
///
/// # Errors
/// When the daemon loses it.
pub(crate) async fn stay(
    client: &Client,
    container: &Container,
    mut streams: Streams,
    remove: bool,
) -> Result<u8> {
    let process = ProcessId { container: container.id.clone(), exec: String::new() };
    let ended = streams.supervise(client, &process).await;
    match &ended {
        Ok(Ended::Exited(exit)) => finish(client, container, &mut streams, *exit, remove).await?,
        Ok(Ended::Interrupted(_)) if remove => {
            task::kill_and_wait(client, &container.id).await?;
            task::remove_container(client, container).await?;
        }
        Ok(Ended::Interrupted(_)) => streams.leave(),
        Ok(Ended::Detached) => {
            streams.leave();
            if remove {
                reap::leave_behind(client, &container.id)?;
            }
            say_detached(&format!("`davit attach {}` comes back", container::name(container)));
        }
        Err(_) if remove => {
            let _ = task::kill_and_wait(client, &container.id).await;
            let _ = task::remove_container(client, container).await;
        }
        Err(_) => {}
    }
    ended.map(|ended| exit_code(&ended))
}

/// Tells a user who has pressed the keys what becomes of the process. The cursor is somewhere in its output.
pub(crate) fn say_detached(what_now: &str) {
    // In one write, since the output may go on until we end. That nobody can read it changes nothing.
    let _ = std::io::stderr().write_all(format!("\ndavit: detached; {what_now}\n").as_bytes());
}

/// The exit code of a command that has stayed with a process.
pub(crate) fn exit_code(ended: &Ended) -> u8 {
    let code = match ended {
        Ended::Exited(exit) => exit.code,
        Ended::Interrupted(signal) => 128 + signal.unsigned_abs(),
        Ended::Detached => 0,
    };
    // Exit codes have eight bits.
    u8::try_from(code & 0xff).expect("eight bits")
}

/// After the exit: the task is deleted, which closes the shim's ends of the streams, so that they can be drained.
/// What is known of the exit then lives in the container's labels.
async fn finish(
    client: &Client,
    container: &Container,
    streams: &mut Streams,
    exit: Exit,
    remove: bool,
) -> Result<()> {
    let deleted = task::delete(client, &container.id).await;
    streams.drain().await;
    deleted?;
    if remove {
        return task::remove_container(client, container).await;
    }
    let labels = vec![
        (labels::EXIT_CODE, exit.code.to_string()),
        (labels::EXITED_AT, format::rfc3339(exit.at)),
        (labels::FIFOS, String::new()),
    ];
    container::set_labels(client, &container.id, labels).await
}
