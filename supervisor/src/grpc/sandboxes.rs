//! The two Sandbox services: the store of records, and the controllers of what runs.

use std::collections::BTreeMap;
use std::time::Duration;

use davit_model::{Any, ErrorCode};
use davit_proto::containerd::services::sandbox::v1 as wire;
use davit_proto::containerd::services::sandbox::v1::controller_server::Controller;
use davit_proto::containerd::services::sandbox::v1::store_server::Store;
use davit_proto::containerd::types;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{any_from_wire, any_to_wire, mount_from_wire, time_to_wire};
use super::status::{from, invalid, status};
use crate::metadata::{Metadata, Runtime, Sandbox};
use crate::proxy::ProxyController;
use crate::runtime::{SandboxOptions, Sandboxes};

/// The one controller that is built in. CRI's `podsandbox` belongs to a CRI that is not served.
const SHIM: &str = "shim";

/// Serves the records.
pub struct StoreService {
    metadata: Metadata,
}

impl StoreService {
    /// A service over `metadata`.
    pub fn new(metadata: Metadata) -> StoreService {
        StoreService { metadata }
    }
}

fn from_wire(sandbox: Option<types::Sandbox>) -> Sandbox {
    let types::Sandbox { sandbox_id, runtime, spec, labels, extensions, sandboxer, .. } =
        sandbox.unwrap_or_default();
    let types::sandbox::Runtime { name, options } = runtime.unwrap_or_default();
    Sandbox {
        id: sandbox_id,
        labels,
        runtime: Runtime { name, options: options.map(any_from_wire) },
        spec: spec.map(any_from_wire),
        sandboxer,
        extensions: extensions.into_iter().map(|(name, any)| (name, any_from_wire(any))).collect(),
        ..Sandbox::default()
    }
}

fn to_wire(sandbox: Sandbox) -> types::Sandbox {
    let Runtime { name, options } = sandbox.runtime;
    let extensions = sandbox.extensions.into_iter().map(|(name, any)| (name, any_to_wire(any)));
    types::Sandbox {
        sandbox_id: sandbox.id,
        runtime: Some(types::sandbox::Runtime { name, options: options.map(any_to_wire) }),
        spec: sandbox.spec.map(any_to_wire),
        labels: sandbox.labels,
        created_at: Some(sandbox.created_at.into()),
        updated_at: Some(sandbox.updated_at.into()),
        extensions: extensions.collect(),
        sandboxer: sandbox.sandboxer,
    }
}

#[tonic::async_trait]
impl Store for StoreService {
    async fn create(
        &self,
        request: Request<wire::StoreCreateRequest>,
    ) -> Result<Response<wire::StoreCreateResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let sandbox = from_wire(request.into_inner().sandbox);
        let created = self.metadata.sandboxes(&scope).create(sandbox).await.map_err(from)?;
        Ok(Response::new(wire::StoreCreateResponse { sandbox: Some(to_wire(created)) }))
    }

    async fn update(
        &self,
        request: Request<wire::StoreUpdateRequest>,
    ) -> Result<Response<wire::StoreUpdateResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let wire::StoreUpdateRequest { sandbox, fields } = request.into_inner();
        let updated = self.metadata.sandboxes(&scope).update(from_wire(sandbox), &fields).await;
        Ok(Response::new(wire::StoreUpdateResponse { sandbox: Some(to_wire(updated.map_err(from)?)) }))
    }

    async fn delete(
        &self,
        request: Request<wire::StoreDeleteRequest>,
    ) -> Result<Response<wire::StoreDeleteResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        self.metadata.sandboxes(&scope).delete(&request.into_inner().sandbox_id).await.map_err(from)?;
        Ok(Response::new(wire::StoreDeleteResponse {}))
    }

    async fn list(
        &self,
        request: Request<wire::StoreListRequest>,
    ) -> Result<Response<wire::StoreListResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let found = self.metadata.sandboxes(&scope).list(&request.into_inner().filters).map_err(from)?;
        Ok(Response::new(wire::StoreListResponse { list: found.into_iter().map(to_wire).collect() }))
    }

    async fn get(
        &self,
        request: Request<wire::StoreGetRequest>,
    ) -> Result<Response<wire::StoreGetResponse>, Status> {
        let scope = Context::of(&request).scope()?;
        let found = self.metadata.sandboxes(&scope).get(&request.into_inner().sandbox_id).map_err(from)?;
        Ok(Response::new(wire::StoreGetResponse { sandbox: Some(to_wire(found)) }))
    }
}

/// Serves the controllers.
pub struct ControllerService {
    shim: Sandboxes,
    /// The controllers in other processes, by name.
    proxies: BTreeMap<String, ProxyController>,
}

impl ControllerService {
    /// A service over the controller `shim` and those of other processes.
    pub fn new(shim: Sandboxes, proxies: BTreeMap<String, ProxyController>) -> ControllerService {
        ControllerService { shim, proxies }
    }

    /// The controller of a name, with containerd's words if there is none.
    fn controller(&self, name: &str) -> Result<&Sandboxes, Status> {
        match name {
            SHIM => Ok(&self.shim),
            "" => {
                let text = "invalid argument: sandbox controller name can not be empty";
                Err(status(ErrorCode::InvalidArgument, text))
            }
            other => {
                let text = format!("not found: failed to get sandbox controller by {other}");
                Err(status(ErrorCode::NotFound, &text))
            }
        }
    }
}

/// Puts words before those of a status.
fn prefixed(prefix: String) -> impl Fn(Status) -> Status {
    move |status| Status::new(status.code(), format!("{prefix}: {}", status.message()))
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create(
        &self,
        request: Request<wire::ControllerCreateRequest>,
    ) -> Result<Response<wire::ControllerCreateResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.create(request).await;
        }
        let context = Context::of(&request);
        let request = request.into_inner();
        let controller = self.controller(&request.sandboxer)?;
        let namespace = context.namespace()?;
        let sandbox_id = request.sandbox_id;
        let sandbox = match request.sandbox {
            Some(sandbox) => from_wire(Some(sandbox)),
            None => Sandbox { id: sandbox_id.clone(), ..Sandbox::default() },
        };
        let options = SandboxOptions {
            id: sandbox.id,
            runtime: sandbox.runtime.name,
            runtime_options: sandbox.runtime.options,
            spec: sandbox.spec,
            rootfs: request.rootfs.into_iter().map(mount_from_wire).collect(),
            options: request.options.map(any_from_wire),
            network_namespace: request.netns_path,
            annotations: request.annotations,
        };
        controller.create(namespace, options).await.map_err(from)?;
        Ok(Response::new(wire::ControllerCreateResponse { sandbox_id }))
    }

    /// The reply names neither address nor version nor spec, as containerd's does not: containers join by the sandbox's id.
    async fn start(
        &self,
        request: Request<wire::ControllerStartRequest>,
    ) -> Result<Response<wire::ControllerStartResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.start(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerStartRequest { sandbox_id, sandboxer } = request.into_inner();
        let controller = self
            .controller(&sandboxer)
            .map_err(prefixed(format!("failed to get sandbox controller for {sandboxer:?}")))?;
        let started = controller.start(context.namespace()?, &sandbox_id).await;
        let failed = prefixed(format!("failed to start sandbox {sandbox_id:?}"));
        let started = started.map_err(from).map_err(failed)?;
        Ok(Response::new(wire::ControllerStartResponse {
            sandbox_id,
            pid: started.pid,
            created_at: time_to_wire(started.created_at),
            ..Default::default()
        }))
    }

    /// containerd's daemon answers this one with Unimplemented, although its controller can tell.
    async fn platform(
        &self,
        request: Request<wire::ControllerPlatformRequest>,
    ) -> Result<Response<wire::ControllerPlatformResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.platform(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerPlatformRequest { sandbox_id, sandboxer } = request.into_inner();
        let told = self.controller(&sandboxer)?.platform(context.namespace()?, &sandbox_id).await;
        let told = told.map_err(from)?;
        let platform = types::Platform {
            os: told.os,
            architecture: told.architecture,
            variant: told.variant,
            ..Default::default()
        };
        Ok(Response::new(wire::ControllerPlatformResponse { platform: Some(platform) }))
    }

    async fn stop(
        &self,
        request: Request<wire::ControllerStopRequest>,
    ) -> Result<Response<wire::ControllerStopResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.stop(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerStopRequest { sandbox_id, timeout_secs, sandboxer } = request.into_inner();
        let timeout = Duration::from_secs(timeout_secs.into());
        let stopped = self.controller(&sandboxer)?.stop(context.namespace()?, &sandbox_id, timeout).await;
        stopped.map_err(from)?;
        Ok(Response::new(wire::ControllerStopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<wire::ControllerWaitRequest>,
    ) -> Result<Response<wire::ControllerWaitResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.wait(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerWaitRequest { sandbox_id, sandboxer } = request.into_inner();
        let exit = self.controller(&sandboxer)?.wait(context.namespace()?, &sandbox_id).await;
        let exit = exit.map_err(from)?;
        let exited_at = time_to_wire(exit.exited_at);
        Ok(Response::new(wire::ControllerWaitResponse { exit_status: exit.status, exited_at }))
    }

    async fn status(
        &self,
        request: Request<wire::ControllerStatusRequest>,
    ) -> Result<Response<wire::ControllerStatusResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.status(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerStatusRequest { sandbox_id, verbose, sandboxer } = request.into_inner();
        let told = self.controller(&sandboxer)?.status(context.namespace()?, &sandbox_id, verbose).await;
        let told = told.map_err(from)?;
        let nothing = || Any { type_url: String::new(), value: Vec::new() };
        Ok(Response::new(wire::ControllerStatusResponse {
            sandbox_id,
            pid: told.pid,
            state: told.state,
            info: told.info,
            created_at: time_to_wire(told.created_at),
            exited_at: time_to_wire(told.exited_at),
            // Always there: Go's clients read it without asking.
            extra: Some(any_to_wire(told.extra.unwrap_or_else(nothing))),
            ..Default::default()
        }))
    }

    async fn shutdown(
        &self,
        request: Request<wire::ControllerShutdownRequest>,
    ) -> Result<Response<wire::ControllerShutdownResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.shutdown(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerShutdownRequest { sandbox_id, sandboxer } = request.into_inner();
        let down = self.controller(&sandboxer)?.shutdown(context.namespace()?, &sandbox_id).await;
        down.map_err(from)?;
        Ok(Response::new(wire::ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<wire::ControllerMetricsRequest>,
    ) -> Result<Response<wire::ControllerMetricsResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.metrics(request).await;
        }
        let context = Context::of(&request);
        let wire::ControllerMetricsRequest { sandbox_id, sandboxer } = request.into_inner();
        let metric = self.controller(&sandboxer)?.metrics(context.namespace()?, &sandbox_id).await;
        let metrics = metric.map_err(from)?.map(|metric| types::Metric {
            timestamp: time_to_wire(metric.timestamp),
            id: metric.id,
            data: metric.data.map(any_to_wire),
        });
        Ok(Response::new(wire::ControllerMetricsResponse { metrics }))
    }

    /// containerd's shim controller has nothing to update, and says so with success.
    async fn update(
        &self,
        request: Request<wire::ControllerUpdateRequest>,
    ) -> Result<Response<wire::ControllerUpdateResponse>, Status> {
        if let Some(proxy) = self.proxies.get(&request.get_ref().sandboxer) {
            return proxy.update(request).await;
        }
        let request = request.into_inner();
        self.controller(&request.sandboxer)?;
        if request.sandbox.is_none() {
            return Err(invalid("sandbox can not be nil"));
        }
        Ok(Response::new(wire::ControllerUpdateResponse {}))
    }
}
