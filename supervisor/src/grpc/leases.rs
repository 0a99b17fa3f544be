//! The Leases service.

use davit_proto::containerd::services::leases::v1 as wire;
use davit_proto::containerd::services::leases::v1::leases_server::Leases;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::status::{from, invalid};
use crate::metadata::{Lease, Metadata, Resource};

/// Serves the leases.
pub struct LeasesService {
    metadata: Metadata,
}

impl LeasesService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> LeasesService {
        LeasesService { metadata }
    }
}

fn to_wire(lease: Lease) -> wire::Lease {
    wire::Lease { id: lease.id, created_at: Some(lease.created_at.into()), labels: lease.labels }
}

fn resource(resource: Option<wire::Resource>) -> Result<Resource, Status> {
    let wire::Resource { id, r#type } = resource.ok_or_else(|| invalid("resource is required"))?;
    Ok(Resource { id, kind: r#type })
}

#[tonic::async_trait]
impl Leases for LeasesService {
    async fn create(
        &self,
        request: Request<wire::CreateRequest>,
    ) -> Result<Response<wire::CreateResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::CreateRequest { id, labels } = request.into_inner();
        let lease = self.metadata.leases(&scope).create(Some(&id), labels).await.map_err(from)?;
        Ok(Response::new(wire::CreateResponse { lease: Some(to_wire(lease)) }))
    }

    async fn delete(&self, request: Request<wire::DeleteRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::DeleteRequest { id, sync } = request.into_inner();
        self.metadata.leases(&scope).delete(&id, sync).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn list(
        &self,
        request: Request<wire::ListRequest>,
    ) -> Result<Response<wire::ListResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let leases = self.metadata.leases(&scope).list(&request.into_inner().filters).map_err(from)?;
        Ok(Response::new(wire::ListResponse { leases: leases.into_iter().map(to_wire).collect() }))
    }

    async fn add_resource(&self, request: Request<wire::AddResourceRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::AddResourceRequest { id, resource: wanted } = request.into_inner();
        self.metadata.leases(&scope).add_resource(&id, &resource(wanted)?).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn delete_resource(
        &self,
        request: Request<wire::DeleteResourceRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::DeleteResourceRequest { id, resource: wanted } = request.into_inner();
        self.metadata.leases(&scope).delete_resource(&id, &resource(wanted)?).await.map_err(from)?;
        Ok(Response::new(()))
    }

    async fn list_resources(
        &self,
        request: Request<wire::ListResourcesRequest>,
    ) -> Result<Response<wire::ListResourcesResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let resources = self.metadata.leases(&scope).resources(&request.into_inner().id).map_err(from)?;
        let resources =
            resources.into_iter().map(|Resource { id, kind }| wire::Resource { id, r#type: kind }).collect();
        Ok(Response::new(wire::ListResourcesResponse { resources }))
    }
}
