//! The Diff service: layers into snapshots, and snapshots into layers.

use std::io::{self, Write};

use davit_model::{Digest, Labels, Mount};
use davit_proto::containerd::services::diff::v1 as wire;
use davit_proto::containerd::services::diff::v1::diff_server::Diff;
use davit_proto::containerd::types;
use davit_snapshotter::layer::{self, ApplyOptions, DiffOptions};
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{mount_from_wire, time_from_wire};
use super::status::{from, invalid};
use crate::lane::Lane;
use crate::metadata::{self, Content, Metadata, NsWriter};

/// The type of a layer once it is unpacked, and of one that is asked for without naming a type.
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The label of a compressed layer that names the digest of its uncompressed form.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Serves the applying and the making of layers.
pub struct DiffService {
    metadata: Metadata,
    lane: Lane,
}

impl DiffService {
    /// A service over `metadata`, which holds the layers; they are made and applied in `lane`.
    pub fn new(metadata: Metadata, lane: Lane) -> DiffService {
        DiffService { metadata, lane }
    }
}

fn mounts(mounts: Vec<types::Mount>) -> Vec<Mount> {
    mounts.into_iter().map(mount_from_wire).collect()
}

/// Runs what blocks in the lane of layers.
async fn blocking<T: Send + 'static>(
    lane: &Lane,
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    lane.run(work).await.map_err(|error| Status::internal(format!("the call was interrupted: {error}")))?
}

/// Lets a layer be written into an ingest.
struct Ingest<'a> {
    writer: &'a mut NsWriter,
    failure: &'a mut Option<metadata::Error>,
    size: &'a mut u64,
}

impl Write for Ingest<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.write(bytes) {
            Ok(()) => {
                *self.size += bytes.len() as u64;
                Ok(bytes.len())
            }
            Err(error) => {
                *self.failure = Some(error);
                Err(io::Error::other("the content store refused the layer"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A layer to be made.
struct Wanted {
    left: Vec<Mount>,
    right: Vec<Mount>,
    media_type: String,
    labels: Labels,
    options: DiffOptions,
}

/// Makes a layer in an ingest and commits it. Blocks.
fn make(content: &Content, mut writer: NsWriter, wanted: Wanted) -> Result<types::Descriptor, Status> {
    let Wanted { left, right, media_type, mut labels, options } = wanted;
    writer.truncate(0).map_err(from)?;
    let (mut failure, mut size) = (None, 0);
    let ingest = Ingest { writer: &mut writer, failure: &mut failure, size: &mut size };
    let made = layer::diff(&left, &right, &media_type, ingest, &options);
    if let Some(failure) = failure {
        return Err(from(failure));
    }
    let made = made.map_err(from)?;
    labels.insert(UNCOMPRESSED.to_owned(), made.digest.to_string());
    let digest = writer.digest();
    match writer.commit(size, None, labels) {
        Ok(()) => {}
        // The same layer was made before: that is the answer.
        Err(metadata::Error::AlreadyExists { .. }) => {
            content.info(&digest).map_err(from)?;
        }
        Err(error) => return Err(from(error)),
    }
    let size = i64::try_from(size).unwrap_or(i64::MAX);
    Ok(types::Descriptor { media_type, digest: digest.to_string(), size, ..Default::default() })
}

#[tonic::async_trait]
impl Diff for DiffService {
    async fn apply(
        &self,
        request: Request<wire::ApplyRequest>,
    ) -> Result<Response<wire::ApplyResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::ApplyRequest { diff, mounts: target, .. } = request.into_inner();
        let diff = diff.ok_or_else(|| invalid("diff is required"))?;
        let digest: Digest = diff.digest.parse().map_err(invalid)?;
        let reader = self.metadata.content(&scope).reader(&digest).await.map_err(from)?;
        let target = mounts(target);
        // Layers are always synced, whether or not the request asks for it: what is acknowledged survives a power cut.
        let work =
            move || layer::apply(reader, &diff.media_type, &target, &ApplyOptions::default()).map_err(from);
        let applied = blocking(&self.lane, work).await?;
        let applied = types::Descriptor {
            media_type: OCI_LAYER.to_owned(),
            digest: applied.digest.to_string(),
            size: i64::try_from(applied.size).unwrap_or(i64::MAX),
            ..Default::default()
        };
        Ok(Response::new(wire::ApplyResponse { applied: Some(applied) }))
    }

    async fn diff(
        &self,
        request: Request<wire::DiffRequest>,
    ) -> Result<Response<wire::DiffResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let request = request.into_inner();
        let media_type =
            if request.media_type.is_empty() { OCI_LAYER_GZIP.to_owned() } else { request.media_type };
        let reference = if request.r#ref.is_empty() {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            format!("diff-{}-{}", now.as_nanos(), std::process::id())
        } else {
            request.r#ref
        };
        let content = self.metadata.content(&scope);
        let writer = content.writer(&reference, 0, None).await.map_err(from)?;
        let wanted = Wanted {
            left: mounts(request.left),
            right: mounts(request.right),
            media_type,
            labels: request.labels,
            options: DiffOptions { source_date_epoch: request.source_date_epoch.and_then(time_from_wire) },
        };
        let made = {
            let content = content.clone();
            blocking(&self.lane, move || make(&content, writer, wanted)).await
        };
        if made.is_err() {
            // What is half made is of no use to a second try.
            let _ = content.abort(&reference).await;
        }
        Ok(Response::new(wire::DiffResponse { diff: Some(made?) }))
    }
}
