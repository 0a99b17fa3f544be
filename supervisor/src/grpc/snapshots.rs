//! The Snapshots service.

use davit_model::Mount;
use davit_proto::containerd::services::snapshots::v1 as wire;
use davit_proto::containerd::services::snapshots::v1::snapshots_server::Snapshots;
use davit_proto::containerd::types;
use davit_snapshotter::Kind;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{in_pages, mount_to_wire, paths};
use super::status::{from, invalid, unimplemented};
use crate::metadata::{self, Metadata, SnapshotInfo};

/// Serves the snapshots of every snapshotter.
pub struct SnapshotsService {
    metadata: Metadata,
}

impl SnapshotsService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> SnapshotsService {
        SnapshotsService { metadata }
    }

    /// The snapshots of the snapshotter that a request names, in the namespace of the call.
    fn of(&self, context: &Context, snapshotter: &str) -> Result<metadata::Snapshots, Status> {
        self.metadata.snapshots(&context.scope()?, snapshotter).map_err(from)
    }
}

fn mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts.into_iter().map(mount_to_wire).collect()
}

fn to_wire(info: SnapshotInfo) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(info.created.into()),
        updated_at: Some(info.updated.into()),
        labels: info.labels,
    }
}

#[tonic::async_trait]
impl Snapshots for SnapshotsService {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let context = Context::of(&request);
        let wire::PrepareSnapshotRequest { snapshotter, key, parent, labels } = request.into_inner();
        let made = self.of(&context, &snapshotter)?.prepare(&key, Some(&parent), labels).await;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts: mounts(made.map_err(from)?) }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let context = Context::of(&request);
        let wire::ViewSnapshotRequest { snapshotter, key, parent, labels } = request.into_inner();
        let made = self.of(&context, &snapshotter)?.view(&key, Some(&parent), labels).await;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts: mounts(made.map_err(from)?) }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let context = Context::of(&request);
        let wire::MountsRequest { snapshotter, key } = request.into_inner();
        let found = self.of(&context, &snapshotter)?.mounts(&key).await.map_err(from)?;
        Ok(Response::new(wire::MountsResponse { mounts: mounts(found) }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let context = Context::of(&request);
        let wire::CommitSnapshotRequest { snapshotter, name, key, labels, parent } = request.into_inner();
        let snapshots = self.of(&context, &snapshotter)?;
        snapshots.commit(&name, &key, labels, Some(&parent)).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let context = Context::of(&request);
        let wire::RemoveSnapshotRequest { snapshotter, key } = request.into_inner();
        self.of(&context, &snapshotter)?.remove(&key).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let context = Context::of(&request);
        let wire::StatSnapshotRequest { snapshotter, key } = request.into_inner();
        let info = self.of(&context, &snapshotter)?.stat(&key).await.map_err(from)?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(to_wire(info)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let context = Context::of(&request);
        let wire::UpdateSnapshotRequest { snapshotter, info, update_mask } = request.into_inner();
        let info = info.ok_or_else(|| invalid("info is required"))?;
        let snapshots = self.of(&context, &snapshotter)?;
        let info = snapshots.update(&info.name, info.labels, &paths(update_mask)).await.map_err(from)?;
        Ok(Response::new(wire::UpdateSnapshotResponse { info: Some(to_wire(info)) }))
    }

    type ListStream = BoxStream<'static, Result<wire::ListSnapshotsResponse, Status>>;

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let context = Context::of(&request);
        let wire::ListSnapshotsRequest { snapshotter, filters } = request.into_inner();
        let infos = self.of(&context, &snapshotter)?.list(&filters).await.map_err(from)?;
        let message =
            |page: Vec<_>| wire::ListSnapshotsResponse { info: page.into_iter().map(to_wire).collect() };
        Ok(Response::new(in_pages(infos, message)))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let context = Context::of(&request);
        let wire::UsageRequest { snapshotter, key } = request.into_inner();
        let usage = self.of(&context, &snapshotter)?.usage(&key).await.map_err(from)?;
        Ok(Response::new(wire::UsageResponse { size: usage.size, inodes: usage.inodes }))
    }

    async fn cleanup(&self, request: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        self.of(&Context::of(&request), &request.into_inner().snapshotter)?;
        // The collector cleans up; containerd's daemon answers this call so, whatever the snapshotter can do.
        Err(unimplemented("snapshotter does not implement Cleanup method"))
    }
}
