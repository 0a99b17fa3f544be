//! The private Shims service: what the shims are, and upgrading them while their containers run.

use std::path::PathBuf;

use davit_proto::davit::services::shims::v1 as wire;
use davit_proto::davit::services::shims::v1::shims_server::Shims;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::status::{from, invalid};
use crate::runtime::{RunningShim, Tasks};

/// Serves the shims.
pub struct ShimsService {
    tasks: Tasks,
}

impl ShimsService {
    /// A service over the shims of `tasks`.
    pub fn new(tasks: Tasks) -> ShimsService {
        ShimsService { tasks }
    }
}

#[tonic::async_trait]
impl Shims for ShimsService {
    async fn list(
        &self,
        request: Request<wire::ListRequest>,
    ) -> Result<Response<wire::ListResponse>, Status> {
        let context = Context::of(&request);
        let shims = self.tasks.shims(context.namespace()?).await.into_iter().map(to_wire).collect();
        // A daemon without a shim of its own can still tell of those that run.
        let binary = self.tasks.own_shim().map(|path| path.display().to_string()).unwrap_or_default();
        Ok(Response::new(wire::ListResponse { shims, binary }))
    }

    async fn upgrade(
        &self,
        request: Request<wire::UpgradeRequest>,
    ) -> Result<Response<wire::UpgradeResponse>, Status> {
        let context = Context::of(&request);
        let namespace = context.namespace()?;
        let wire::UpgradeRequest { container_id, binary } = request.into_inner();
        let program = (!binary.is_empty()).then(|| PathBuf::from(&binary));
        if program.as_ref().is_some_and(|program| !program.is_absolute()) {
            return Err(invalid(format_args!("binary {binary:?} is no absolute path")));
        }
        let upgraded = self.tasks.upgrade_shim(namespace, &container_id, program).await;
        let (response, containers) = upgraded.map_err(from)?;
        Ok(Response::new(wire::UpgradeResponse {
            before: response.before,
            after: response.after,
            containers,
        }))
    }
}

fn to_wire(shim: RunningShim) -> wire::Shim {
    let (status, error) = match shim.status {
        Ok(status) => (Some(status), String::new()),
        Err(error) => (None, error),
    };
    wire::Shim {
        containers: shim.containers,
        pid: shim.pid,
        address: shim.address,
        memory: shim.memory.unwrap_or(0),
        status,
        error,
    }
}
