//! Unpacking: the layers of an image, one on the other, into snapshots named by chain id.
//!
//! For each layer a snapshot is prepared on its parent, the layer is applied to it, the digest of what came out is
//! compared with the one in the configuration, and the snapshot is committed under its chain id. Layers that several
//! images share are thus unpacked once. Whoever commits first wins; for the other it is there.

use std::time::{SystemTime, UNIX_EPOCH};

use davit_oci::image::Descriptor;
use davit_proto::containerd::services::content::v1 as content;
use davit_proto::containerd::services::diff::v1::ApplyRequest;
use davit_proto::containerd::services::snapshots::v1 as snapshots;
use davit_proto::containerd::types::Mount;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::image::{PlatformImage, to_wire};
use crate::progress::Progress;
use crate::{container, format};

/// The label by which a snapshotter is told which snapshot a layer becomes.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// Where images are unpacked, and containers find them.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Snapshotter {
    /// The snapshotter that holds the layers
    #[arg(
        id = "snapshotter",
        long = "snapshotter",
        value_name = "NAME",
        env = "DAVIT_SNAPSHOTTER",
        hide_env_values = true,
        default_value = "overlayfs"
    )]
    pub(crate) name: String,
}

/// Unpacks what is not unpacked yet and returns the name of the topmost snapshot, empty for an image of no layers.
/// The client should hold a lease.
///
/// # Errors
/// Those of the calls, and when a layer is not what its image says.
pub(crate) async fn unpack(
    client: &Client,
    image: &PlatformImage,
    snapshotter: &str,
    progress: Progress,
) -> Result<String> {
    let chain = image.chain_ids()?;
    let Some(top) = chain.last() else { return Ok(String::new()) };
    if exists(client, snapshotter, top).await? {
        return Ok(top.clone());
    }
    let mut parent = String::new();
    for (index, name) in chain.iter().enumerate() {
        if !exists(client, snapshotter, name).await? {
            let layer = &image.manifest.layers[index];
            let diff_id = image.config.rootfs.diff_ids[index].as_str();
            let short = format::short_id(layer.digest.as_str()).to_owned();
            progress.report(&short, "extracting");
            unpack_layer(client, snapshotter, name, &parent, layer, diff_id).await?;
            progress.report(&short, "complete");
        }
        parent.clone_from(name);
    }
    // From now on the configuration, and with it the image, keeps the snapshots.
    let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
    set_content_labels(client, image.manifest.config.digest.as_str(), vec![(label, top.clone())]).await?;
    Ok(top.clone())
}

async fn unpack_layer(
    client: &Client,
    snapshotter: &str,
    name: &str,
    parent: &str,
    layer: &Descriptor,
    diff_id: &str,
) -> Result<()> {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let key = format!("extract-{nanos}-{} {name}", &container::new_id()?[..8]);
    let request = snapshots::PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.clone(),
        parent: parent.to_owned(),
        labels: [(SNAPSHOT_REF.to_owned(), name.to_owned())].into(),
    };
    let prepared = client.snapshots().prepare(request).await.call(format!("prepare a snapshot for {name}"));
    let mounts = match prepared {
        Ok(response) => response.mounts,
        // A snapshotter that fetches by itself has it already.
        Err(error) if error.is_already_exists() && exists(client, snapshotter, name).await? => return Ok(()),
        Err(error) => return Err(error),
    };
    let result = apply_and_commit(client, snapshotter, &key, name, layer, diff_id, mounts).await;
    if result.is_err() {
        let request = snapshots::RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key };
        let _ = client.snapshots().remove(request).await;
    }
    result
}

async fn apply_and_commit(
    client: &Client,
    snapshotter: &str,
    key: &str,
    name: &str,
    layer: &Descriptor,
    diff_id: &str,
    mounts: Vec<Mount>,
) -> Result<()> {
    let request = ApplyRequest { diff: Some(to_wire(layer)), mounts, ..ApplyRequest::default() };
    let action = format!("unpack layer {}", layer.digest);
    let applied = client.diff().apply(request).await.call(action)?.applied.unwrap_or_default();
    if applied.digest != diff_id {
        return Err(Error::Archive {
            reason: format!("layer {} unpacks to {}, not to {diff_id}", layer.digest, applied.digest),
        });
    }
    let label = ("containerd.io/uncompressed".to_owned(), diff_id.to_owned());
    set_content_labels(client, layer.digest.as_str(), vec![label]).await?;
    let request = snapshots::CommitSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        name: name.to_owned(),
        key: key.to_owned(),
        labels: [(SNAPSHOT_REF.to_owned(), name.to_owned())].into(),
        parent: String::new(),
    };
    match client.snapshots().commit(request).await.call(format!("commit snapshot {name}")) {
        Err(error) if error.is_already_exists() => {
            let request =
                snapshots::RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
            let _ = client.snapshots().remove(request).await;
            Ok(())
        }
        other => other,
    }
}

async fn exists(client: &Client, snapshotter: &str, name: &str) -> Result<bool> {
    let request =
        snapshots::StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: name.to_owned() };
    match client.snapshots().stat(request).await.call(format!("look up snapshot {name}")) {
        Ok(_) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sets labels of a blob.
///
/// # Errors
/// Those of the call.
pub(crate) async fn set_content_labels(
    client: &Client,
    digest: &str,
    labels: Vec<(String, String)>,
) -> Result<()> {
    if labels.is_empty() {
        return Ok(());
    }
    let paths = labels.iter().map(|(key, _)| format!("labels.{key}")).collect();
    let info = content::Info {
        digest: digest.to_owned(),
        labels: labels.into_iter().collect(),
        ..Default::default()
    };
    let request =
        content::UpdateRequest { info: Some(info), update_mask: Some(prost_types::FieldMask { paths }) };
    client.content().update(request).await.call(format!("label {digest}"))?;
    Ok(())
}
