//! The Containers service.

use davit_proto::containerd::services::containers::v1 as wire;
use davit_proto::containerd::services::containers::v1::containers_server::Containers;
use futures::stream::{self, BoxStream};
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{any_from_wire, any_to_wire, paths};
use super::status::{from, invalid};
use crate::metadata::{Container, Metadata, Runtime};

/// Serves the records of containers.
pub struct ContainersService {
    metadata: Metadata,
}

impl ContainersService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> ContainersService {
        ContainersService { metadata }
    }
}

fn to_wire(container: Container) -> wire::Container {
    wire::Container {
        id: container.id,
        labels: container.labels,
        image: container.image,
        runtime: Some(wire::container::Runtime {
            name: container.runtime.name,
            options: container.runtime.options.map(any_to_wire),
        }),
        spec: container.spec.map(any_to_wire),
        snapshotter: container.snapshotter,
        snapshot_key: container.snapshot_key,
        created_at: Some(container.created_at.into()),
        updated_at: Some(container.updated_at.into()),
        extensions: container.extensions.into_iter().map(|(key, any)| (key, any_to_wire(any))).collect(),
        sandbox: container.sandbox,
    }
}

fn from_wire(container: Option<wire::Container>) -> Result<Container, Status> {
    let container = container.ok_or_else(|| invalid("container is required"))?;
    let runtime = container.runtime.unwrap_or_default();
    Ok(Container {
        id: container.id,
        labels: container.labels,
        image: container.image,
        runtime: Runtime { name: runtime.name, options: runtime.options.map(any_from_wire) },
        spec: container.spec.map(any_from_wire),
        snapshotter: container.snapshotter,
        snapshot_key: container.snapshot_key,
        extensions: container.extensions.into_iter().map(|(key, any)| (key, any_from_wire(any))).collect(),
        sandbox: container.sandbox,
        ..Container::default()
    })
}

#[tonic::async_trait]
impl Containers for ContainersService {
    async fn get(
        &self,
        request: Request<wire::GetContainerRequest>,
    ) -> Result<Response<wire::GetContainerResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let container = self.metadata.containers(&scope).get(&request.into_inner().id).map_err(from)?;
        Ok(Response::new(wire::GetContainerResponse { container: Some(to_wire(container)) }))
    }

    async fn list(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Result<Response<wire::ListContainersResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let containers =
            self.metadata.containers(&scope).list(&request.into_inner().filters).map_err(from)?;
        let containers = containers.into_iter().map(to_wire).collect();
        Ok(Response::new(wire::ListContainersResponse { containers }))
    }

    type ListStreamStream = BoxStream<'static, Result<wire::ListContainerMessage, Status>>;

    async fn list_stream(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Result<Response<Self::ListStreamStream>, Status> {
        let scope = Context::of(&request).scope()?;
        let containers =
            self.metadata.containers(&scope).list(&request.into_inner().filters).map_err(from)?;
        let messages = containers
            .into_iter()
            .map(|container| Ok(wire::ListContainerMessage { container: Some(to_wire(container)) }));
        Ok(Response::new(Box::pin(stream::iter(messages))))
    }

    async fn create(
        &self,
        request: Request<wire::CreateContainerRequest>,
    ) -> Result<Response<wire::CreateContainerResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let container = from_wire(request.into_inner().container)?;
        let container = self.metadata.containers(&scope).create(container).await.map_err(from)?;
        Ok(Response::new(wire::CreateContainerResponse { container: Some(to_wire(container)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateContainerRequest>,
    ) -> Result<Response<wire::UpdateContainerResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::UpdateContainerRequest { container, update_mask } = request.into_inner();
        let container = from_wire(container)?;
        let containers = self.metadata.containers(&scope);
        let container = containers.update(container, &paths(update_mask)).await.map_err(from)?;
        Ok(Response::new(wire::UpdateContainerResponse { container: Some(to_wire(container)) }))
    }

    async fn delete(&self, request: Request<wire::DeleteContainerRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        self.metadata.containers(&scope).delete(&request.into_inner().id).await.map_err(from)?;
        Ok(Response::new(()))
    }
}
