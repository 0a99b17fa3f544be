//! The Diff service: layers into snapshots, and snapshots into layers.

use davit_model::Mount;
use davit_proto::containerd::services::diff::v1 as wire;
use davit_proto::containerd::services::diff::v1::diff_server::Diff;
use davit_proto::containerd::types;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{descriptor_from_wire, descriptor_to_wire, mount_from_wire, time_from_wire};
use super::status::{from, invalid};
use crate::differs::{Differs, Wanted};
use crate::metadata::Metadata;

/// Serves the applying and the making of layers.
pub struct DiffService {
    metadata: Metadata,
    differs: Differs,
}

impl DiffService {
    /// A service over `metadata`, which holds the layers.
    pub fn new(metadata: Metadata, differs: Differs) -> DiffService {
        DiffService { metadata, differs }
    }
}

fn mounts(mounts: Vec<types::Mount>) -> Vec<Mount> {
    mounts.into_iter().map(mount_from_wire).collect()
}

#[tonic::async_trait]
impl Diff for DiffService {
    async fn apply(
        &self,
        request: Request<wire::ApplyRequest>,
    ) -> Result<Response<wire::ApplyResponse>, Status> {
        let content = self.metadata.content(&Context::of(&request).scope()?);
        let wire::ApplyRequest { diff, mounts: target, payloads, .. } = request.into_inner();
        let layer = descriptor_from_wire(diff.ok_or_else(|| invalid("diff is required"))?);
        let applied = self.differs.apply(&content, &layer, &mounts(target), &payloads).await.map_err(from)?;
        Ok(Response::new(wire::ApplyResponse { applied: Some(descriptor_to_wire(applied)) }))
    }

    async fn diff(
        &self,
        request: Request<wire::DiffRequest>,
    ) -> Result<Response<wire::DiffResponse>, Status> {
        let content = self.metadata.content(&Context::of(&request).scope()?);
        let wire::DiffRequest { left, right, media_type, r#ref, labels, source_date_epoch } =
            request.into_inner();
        let wanted = Wanted {
            left: mounts(left),
            right: mounts(right),
            media_type,
            reference: r#ref,
            labels,
            source_date_epoch: source_date_epoch.and_then(time_from_wire),
        };
        let made = self.differs.diff(&content, &wanted).await.map_err(from)?;
        Ok(Response::new(wire::DiffResponse { diff: Some(descriptor_to_wire(made)) }))
    }
}
