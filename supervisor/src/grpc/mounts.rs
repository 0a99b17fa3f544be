//! The Mounts service.

use davit_proto::containerd::services::mounts::v1 as wire;
use davit_proto::containerd::services::mounts::v1::mounts_server::Mounts;
use davit_proto::containerd::types;
use futures::stream::{self, BoxStream, StreamExt};
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{mount_from_wire, mount_to_wire};
use super::status::from;
use crate::metadata::{Activation, Metadata};

/// Serves the activated mounts.
pub struct MountsService {
    metadata: Metadata,
}

impl MountsService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> MountsService {
        MountsService { metadata }
    }
}

fn to_wire(activation: Activation) -> types::ActivationInfo {
    let active = activation.active.into_iter().map(|active| types::ActiveMount {
        mount: Some(mount_to_wire(active.mount)),
        mounted_at: Some(active.at.into()),
        mount_point: active.point.display().to_string(),
        data: Default::default(),
    });
    types::ActivationInfo {
        name: activation.name,
        active: active.collect(),
        system: activation.system.into_iter().map(mount_to_wire).collect(),
        labels: activation.labels,
    }
}

#[tonic::async_trait]
impl Mounts for MountsService {
    async fn activate(
        &self,
        request: Request<wire::ActivateRequest>,
    ) -> Result<Response<wire::ActivateResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::ActivateRequest { name, mounts, labels, temporary } = request.into_inner();
        let mounts = mounts.into_iter().map(mount_from_wire).collect();
        let activated = self.metadata.mounts(&scope).activate(&name, mounts, labels, temporary).await;
        let info = Some(to_wire(activated.map_err(from)?));
        Ok(Response::new(wire::ActivateResponse { info }))
    }

    async fn deactivate(&self, request: Request<wire::DeactivateRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        self.metadata.mounts(&scope).deactivate(&request.into_inner().name).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let found = self.metadata.mounts(&scope).get(&request.into_inner().name).map_err(from)?;
        Ok(Response::new(wire::InfoResponse { info: Some(to_wire(found)) }))
    }

    /// containerd has the method and no meaning for it.
    async fn update(
        &self,
        _: Request<wire::UpdateRequest>,
    ) -> Result<Response<wire::UpdateResponse>, Status> {
        Err(Status::unimplemented("not implemented"))
    }

    type ListStream = BoxStream<'static, Result<wire::ListMessage, Status>>;

    /// Filters are ignored, as by containerd.
    async fn list(&self, request: Request<wire::ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let scope = Context::of(&request).scope()?;
        let found = self.metadata.mounts(&scope).list().map_err(from)?;
        let messages =
            found.into_iter().map(|activation| Ok(wire::ListMessage { info: Some(to_wire(activation)) }));
        Ok(Response::new(stream::iter(messages).boxed()))
    }
}
