//! Tasks: the running side of a container. Creating one, starting it, deleting it, and removing a container whole.

use std::fs;
use std::path::Path;

use davit_proto::containerd::services::containers::v1::{Container, DeleteContainerRequest};
use davit_proto::containerd::services::snapshots::v1::{MountsRequest, RemoveSnapshotRequest};
use davit_proto::containerd::services::tasks::v1 as api;
use davit_proto::containerd::types::{Descriptor, Mount};
use nix::libc;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::place::Places;
use crate::process::{self, ProcessId, Streams};
use crate::{container, etc, fifo, labels, log};

/// Where a task's streams lead.
#[derive(Debug, Default)]
pub(crate) struct TaskIo {
    stdin: String,
    stdout: String,
    stderr: String,
    terminal: bool,
}

impl TaskIo {
    /// To the client.
    pub(crate) fn attached(streams: &Streams) -> TaskIo {
        TaskIo {
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
        }
    }

    /// To the container's log, with an input that stays open if it was made with one.
    ///
    /// # Errors
    /// When the log's folder or the input cannot be made.
    pub(crate) fn detached(container: &Container, log: &Path) -> Result<TaskIo> {
        // `<root>/logs/<namespace>/<id>.log`: the root is the daemon's, and others may pass through it.
        if let Some(folder) = log.parent() {
            let root = folder.parent().and_then(Path::parent).unwrap_or(folder);
            fifo::private_folder(root, folder)?;
        }
        let stdin = match container.labels.get(labels::STDIN) {
            Some(_) => fifo::make_detached_stdin(&container.id)?.display().to_string(),
            None => String::new(),
        };
        let rotation = container.labels.get(labels::LOG_OPTIONS).map_or("", String::as_str);
        let log = log::address(log, rotation);
        let terminal = container::spec(container)?["process"]["terminal"].as_bool().unwrap_or(false);
        let stderr = if terminal { String::new() } else { log.clone() };
        Ok(TaskIo { stdin, stdout: log, stderr, terminal })
    }
}

/// Creates the task of a container and starts it, afresh or from a checkpoint. What was created is deleted again when it does not start.
///
/// # Errors
/// [`Error::Start`] when the runtime refuses, and those of the calls.
pub(crate) async fn create_and_start(
    client: &Client,
    container: &Container,
    rootfs: Vec<Mount>,
    io: TaskIo,
    checkpoint: Option<Descriptor>,
) -> Result<()> {
    let request = api::CreateTaskRequest {
        container_id: container.id.clone(),
        rootfs,
        stdin: io.stdin,
        stdout: io.stdout,
        stderr: io.stderr,
        terminal: io.terminal,
        checkpoint,
        options: container.runtime.as_ref().and_then(|runtime| runtime.options.clone()),
        ..api::CreateTaskRequest::default()
    };
    client.tasks().create(request).await.map_err(|status| Error::Start { what: "container", status })?;
    let request = api::StartRequest { container_id: container.id.clone(), exec_id: String::new() };
    if let Err(status) = client.tasks().start(request).await {
        let _ = delete(client, &container.id).await;
        return Err(Error::Start { what: "container", status });
    }
    Ok(())
}

/// The mounts of a container's root filesystem.
///
/// # Errors
/// Those of the call.
pub(crate) async fn rootfs(client: &Client, container: &Container) -> Result<Vec<Mount>> {
    let request =
        MountsRequest { snapshotter: container.snapshotter.clone(), key: container.snapshot_key.clone() };
    Ok(client.snapshots().mounts(request).await.call("look up the root filesystem")?.mounts)
}

/// Mounts of the wire as plain ones.
pub(crate) fn plain_mounts(mounts: &[Mount]) -> Vec<davit_model::Mount> {
    let plain = |mount: &Mount| davit_model::Mount {
        kind: mount.r#type.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    };
    mounts.iter().map(plain).collect()
}

/// Deletes a task that has exited. One that is not there is deleted.
///
/// # Errors
/// Those of the call.
pub(crate) async fn delete(client: &Client, id: &str) -> Result<()> {
    let request = api::DeleteTaskRequest { container_id: id.to_owned() };
    match client.tasks().delete(request).await.call("delete the task") {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// Kills the processes of a container, if there are any, and waits until they are gone.
///
/// # Errors
/// Those of the calls.
pub(crate) async fn kill_and_wait(client: &Client, id: &str) -> Result<()> {
    let process = ProcessId { container: id.to_owned(), exec: String::new() };
    match process::kill(client, &process, libc::SIGKILL.unsigned_abs(), true).await {
        // Gone already, or never started.
        Err(error) if error.is_not_found() => {}
        Err(Error::Call { status, .. }) if status.code() == tonic::Code::FailedPrecondition => {}
        other => other?,
    }
    match process::wait(client, &process).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// Removes a container that does not run: its task, its record, its snapshot, its log, its files and its input.
///
/// # Errors
/// Those of the calls. What is gone already is removed.
pub(crate) async fn remove_container(client: &Client, container: &Container) -> Result<()> {
    let places = Places::of(client).await?;
    delete(client, &container.id).await?;
    let request = DeleteContainerRequest { id: container.id.clone() };
    match client.containers().delete(request).await.call("remove the container") {
        Err(error) if !error.is_not_found() => return Err(error),
        _ => {}
    }
    if !container.snapshot_key.is_empty() {
        let request = RemoveSnapshotRequest {
            snapshotter: container.snapshotter.clone(),
            key: container.snapshot_key.clone(),
        };
        match client.snapshots().remove(request).await.call("remove the root filesystem") {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
    }
    if let Some(path) = places.log_of(container) {
        remove_quietly(fs::remove_file(&path));
        let rotation = container.labels.get(labels::LOG_OPTIONS).map_or("", String::as_str);
        for number in 1..log::max_files(rotation) {
            remove_quietly(fs::remove_file(log::rotated(&path, number)));
        }
    }
    if let Some(folder) = container.labels.get(labels::FIFOS) {
        fifo::remove_left(folder.as_ref());
    }
    if let Some(folder) = places.etc_of(container) {
        etc::remove(&folder);
    }
    if container.labels.contains_key(labels::STDIN) {
        remove_quietly(fs::remove_dir_all(fifo::detached_stdin(&container.id).0));
    }
    Ok(())
}

/// What belongs to a container that is gone is of no use to anyone, and may be gone too.
fn remove_quietly(_: std::io::Result<()>) {}
