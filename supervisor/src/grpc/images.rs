//! The Images service.

use davit_proto::containerd::services::images::v1 as wire;
use davit_proto::containerd::services::images::v1::images_server::Images;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{descriptor_from_wire, descriptor_to_wire, paths, time_from_wire};
use super::status::{from, invalid};
use crate::metadata::{Image, Metadata};

/// Serves the names of images.
pub struct ImagesService {
    metadata: Metadata,
}

impl ImagesService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> ImagesService {
        ImagesService { metadata }
    }
}

fn to_wire(image: Image) -> wire::Image {
    wire::Image {
        name: image.name,
        labels: image.labels,
        target: Some(descriptor_to_wire(image.target)),
        created_at: Some(image.created_at.into()),
        updated_at: Some(image.updated_at.into()),
    }
}

fn from_wire(image: Option<wire::Image>) -> Result<Image, Status> {
    let image = image.ok_or_else(|| invalid("image is required"))?;
    Ok(Image {
        name: image.name,
        labels: image.labels,
        target: image.target.map(descriptor_from_wire).unwrap_or_default(),
        ..Image::default()
    })
}

#[tonic::async_trait]
impl Images for ImagesService {
    async fn get(
        &self,
        request: Request<wire::GetImageRequest>,
    ) -> Result<Response<wire::GetImageResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let image = self.metadata.images(&scope).get(&request.into_inner().name).map_err(from)?;
        Ok(Response::new(wire::GetImageResponse { image: Some(to_wire(image)) }))
    }

    async fn list(
        &self,
        request: Request<wire::ListImagesRequest>,
    ) -> Result<Response<wire::ListImagesResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let images = self.metadata.images(&scope).list(&request.into_inner().filters).map_err(from)?;
        Ok(Response::new(wire::ListImagesResponse { images: images.into_iter().map(to_wire).collect() }))
    }

    async fn create(
        &self,
        request: Request<wire::CreateImageRequest>,
    ) -> Result<Response<wire::CreateImageResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::CreateImageRequest { image, source_date_epoch } = request.into_inner();
        let epoch = source_date_epoch.and_then(time_from_wire);
        let image = self.metadata.images(&scope).create(from_wire(image)?, epoch).await.map_err(from)?;
        Ok(Response::new(wire::CreateImageResponse { image: Some(to_wire(image)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateImageRequest>,
    ) -> Result<Response<wire::UpdateImageResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::UpdateImageRequest { image, update_mask, source_date_epoch } = request.into_inner();
        let epoch = source_date_epoch.and_then(time_from_wire);
        let images = self.metadata.images(&scope);
        let image = images.update(from_wire(image)?, &paths(update_mask), epoch).await.map_err(from)?;
        Ok(Response::new(wire::UpdateImageResponse { image: Some(to_wire(image)) }))
    }

    async fn delete(&self, request: Request<wire::DeleteImageRequest>) -> Result<Response<()>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::DeleteImageRequest { name, sync, target } = request.into_inner();
        let digest = target.map(|target| target.digest);
        self.metadata.images(&scope).delete(&name, digest.as_deref(), sync).await.map_err(from)?;
        Ok(Response::new(()))
    }
}
