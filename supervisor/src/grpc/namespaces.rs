//! The Namespaces service.

use davit_proto::containerd::services::namespaces::v1 as wire;
use davit_proto::containerd::services::namespaces::v1::namespaces_server::Namespaces;
use tonic::{Request, Response, Status};

use super::convert::paths;
use super::status::{from, invalid};
use crate::metadata::{Metadata, Namespace};

/// Serves the namespaces.
pub struct NamespacesService {
    metadata: Metadata,
}

impl NamespacesService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> NamespacesService {
        NamespacesService { metadata }
    }
}

fn to_wire(namespace: Namespace) -> wire::Namespace {
    wire::Namespace { name: namespace.name, labels: namespace.labels }
}

fn from_wire(namespace: Option<wire::Namespace>) -> Result<Namespace, Status> {
    let wire::Namespace { name, labels } = namespace.ok_or_else(|| invalid("namespace is required"))?;
    Ok(Namespace { name, labels })
}

#[tonic::async_trait]
impl Namespaces for NamespacesService {
    async fn get(
        &self,
        request: Request<wire::GetNamespaceRequest>,
    ) -> Result<Response<wire::GetNamespaceResponse>, Status> {
        let namespace = self.metadata.namespaces().get(&request.into_inner().name).map_err(from)?;
        Ok(Response::new(wire::GetNamespaceResponse { namespace: Some(to_wire(namespace)) }))
    }

    async fn list(
        &self,
        _: Request<wire::ListNamespacesRequest>,
    ) -> Result<Response<wire::ListNamespacesResponse>, Status> {
        let namespaces = self.metadata.namespaces().list().map_err(from)?;
        let namespaces = namespaces.into_iter().map(to_wire).collect();
        Ok(Response::new(wire::ListNamespacesResponse { namespaces }))
    }

    async fn create(
        &self,
        request: Request<wire::CreateNamespaceRequest>,
    ) -> Result<Response<wire::CreateNamespaceResponse>, Status> {
        let namespace = from_wire(request.into_inner().namespace)?;
        let namespace = self.metadata.namespaces().create(namespace).await.map_err(from)?;
        Ok(Response::new(wire::CreateNamespaceResponse { namespace: Some(to_wire(namespace)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateNamespaceRequest>,
    ) -> Result<Response<wire::UpdateNamespaceResponse>, Status> {
        let wire::UpdateNamespaceRequest { namespace, update_mask } = request.into_inner();
        let namespace = from_wire(namespace)?;
        let namespace =
            self.metadata.namespaces().update(namespace, &paths(update_mask)).await.map_err(from)?;
        Ok(Response::new(wire::UpdateNamespaceResponse { namespace: Some(to_wire(namespace)) }))
    }

    async fn delete(&self, request: Request<wire::DeleteNamespaceRequest>) -> Result<Response<()>, Status> {
        self.metadata.namespaces().delete(&request.into_inner().name).await.map_err(from)?;
        Ok(Response::new(()))
    }
}
