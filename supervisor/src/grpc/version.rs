//! The Version service.

use davit_proto::containerd::services::version::v1::VersionResponse;
use davit_proto::containerd::services::version::v1::version_server::Version;
use tonic::{Request, Response, Status};

/// The containerd release whose behaviour is served. Clients compare it: nerdctl moves to the Transfer service from 2.0.
pub const CONTAINERD: &str = "2.3.4";

/// Serves the version.
#[derive(Debug, Default)]
pub struct VersionService;

/// The version that clients are told.
pub fn told() -> String {
    // Semantic versioning has a place for who built it: behind the plus sign, where no client compares.
    format!("v{CONTAINERD}+davit.{}", env!("CARGO_PKG_VERSION"))
}

#[tonic::async_trait]
impl Version for VersionService {
    async fn version(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        let revision = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(VersionResponse { version: told(), revision }))
    }
}
