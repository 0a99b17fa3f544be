//! The Content service.

mod read;
mod write;

use davit_model::Digest;
use davit_proto::containerd::services::content::v1 as wire;
use davit_proto::containerd::services::content::v1::content_server::Content;
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use super::context::Context;
use super::convert::{in_pages, paths};
use super::status::{from, invalid};
use crate::metadata::{ContentInfo, IngestStatus, Metadata};

/// Serves blobs and ingests.
pub struct ContentService {
    metadata: Metadata,
}

impl ContentService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> ContentService {
        ContentService { metadata }
    }
}

/// The digest in a request.
fn digest(text: &str) -> Result<Digest, Status> {
    text.parse().map_err(|error| invalid(format!("{text:?} failed validation: {error}")))
}

/// A number of bytes on the wire. No file has more than fits.
fn bytes(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn to_wire(info: ContentInfo) -> wire::Info {
    wire::Info {
        digest: info.digest.to_string(),
        size: bytes(info.size),
        created_at: Some(info.created_at.into()),
        updated_at: Some(info.updated_at.into()),
        labels: info.labels,
    }
}

fn status_to_wire(status: IngestStatus) -> wire::Status {
    wire::Status {
        started_at: Some(status.started_at.into()),
        updated_at: Some(status.updated_at.into()),
        r#ref: status.reference,
        offset: bytes(status.offset),
        total: bytes(status.total),
        expected: status.expected.map(|digest| digest.to_string()).unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl Content for ContentService {
    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let digest = digest(&request.into_inner().digest)?;
        let info = self.metadata.content(&scope).info(&digest).map_err(from)?;
        Ok(Response::new(wire::InfoResponse { info: Some(to_wire(info)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateRequest>,
    ) -> Result<Response<wire::UpdateResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::UpdateRequest { info, update_mask } = request.into_inner();
        let info = info.unwrap_or_default();
        let digest = digest(&info.digest)?;
        let content = self.metadata.content(&scope);
        let info = content.update(&digest, info.labels, &paths(update_mask)).await.map_err(from)?;
        Ok(Response::new(wire::UpdateResponse { info: Some(to_wire(info)) }))
    }

    type ListStream = BoxStream<'static, Result<wire::ListContentResponse, Status>>;

    async fn list(
        &self,
        request: Request<wire::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let scope = Context::of(&request).scope()?;
        let infos = self.metadata.content(&scope).list(&request.into_inner().filters).map_err(from)?;
        let message =
            |page: Vec<_>| wire::ListContentResponse { info: page.into_iter().map(to_wire).collect() };
        Ok(Response::new(in_pages(infos, message)))
    }

    async fn delete(&self, request: Request<wire::DeleteContentRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let digest = digest(&request.into_inner().digest)?;
        self.metadata.content(&scope).delete(&digest).await.map_err(from)?;
        Ok(Response::new(()))
    }

    type ReadStream = BoxStream<'static, Result<wire::ReadContentResponse, Status>>;

    async fn read(
        &self,
        request: Request<wire::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let scope = Context::of(&request).scope()?;
        let request = request.into_inner();
        let digest = digest(&request.digest)?;
        let content = self.metadata.content(&scope);
        let reader = content.reader(&digest).await.map_err(from)?;
        Ok(Response::new(read::stream(content.lane().clone(), reader, request.offset, request.size)?))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let reference = request.into_inner().r#ref;
        let status = self.metadata.content(&scope).status(&reference).await.map_err(|error| {
            let refused = from(error);
            let text = format!("could not get status for ref {reference:?}: {}", refused.message());
            Status::new(refused.code(), text)
        })?;
        Ok(Response::new(wire::StatusResponse { status: Some(status_to_wire(status)) }))
    }

    async fn list_statuses(
        &self,
        request: Request<wire::ListStatusesRequest>,
    ) -> Result<Response<wire::ListStatusesResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let statuses =
            self.metadata.content(&scope).statuses(&request.into_inner().filters).await.map_err(from)?;
        let statuses = statuses.into_iter().map(status_to_wire).collect();
        Ok(Response::new(wire::ListStatusesResponse { statuses }))
    }

    type WriteStream = BoxStream<'static, Result<wire::WriteContentResponse, Status>>;

    async fn write(
        &self,
        request: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let scope = Context::of(&request).scope()?;
        let content = self.metadata.content(&scope);
        Ok(Response::new(write::session(content, request.into_inner())))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        self.metadata.content(&scope).abort(&request.into_inner().r#ref).await.map_err(from)?;
        Ok(Response::new(()))
    }
}
