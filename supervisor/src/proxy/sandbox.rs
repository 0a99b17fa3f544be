//! A sandbox controller in another process: a service in front of the same service. What it does is told to the
//! subscribers of this daemon.

use std::future::Future;
use std::time::{Duration, SystemTime};

use davit_model::ErrorCode;
use davit_proto::any;
use davit_proto::containerd::events as messages;
use davit_proto::containerd::services::sandbox::v1 as wire;
use davit_proto::containerd::services::sandbox::v1::controller_client::ControllerClient;
use davit_proto::containerd::services::sandbox::v1::controller_server::Controller;
use prost::Name;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::connection::{Connection, Failure, MAX_MESSAGE};
use crate::events::{Cause, Envelope, Hub};
use crate::grpc::context::Context;
use crate::grpc::convert::any_from_wire;
use crate::grpc::status::{from, invalid};

/// The rests between two looks at a plugin that has gone while somebody waits for the end of a sandbox; containerd's.
const FIRST_REST: Duration = Duration::from_millis(128);
const LONGEST_REST: Duration = Duration::from_millis(4096);

/// A sandbox may run for years.
const LIFE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A sandbox controller behind a socket. Clones are the same.
#[derive(Clone)]
pub struct ProxyController {
    connection: Connection,
    hub: Hub,
}

impl ProxyController {
    pub(super) fn new(connection: Connection, hub: Hub) -> ProxyController {
        ProxyController { connection, hub }
    }

    /// Makes a call in a namespace, which takes so long at most.
    async fn ask<T, A, F>(
        &self,
        namespace: &str,
        limit: Duration,
        message: T,
        call: impl FnOnce(ControllerClient<Channel>, Request<T>) -> F,
    ) -> Result<A, Failure>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let client = ControllerClient::new(self.connection.channel())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let request = self.connection.session(Some(namespace), message);
        Ok(self.connection.answer(limit, call(client, request)).await?.into_inner())
    }

    fn publish(&self, namespace: &str, topic: &str, event: &impl Name) {
        self.hub.publish(Envelope {
            timestamp: SystemTime::now(),
            namespace: namespace.to_owned(),
            topic: topic.to_owned(),
            event: any_from_wire(any::pack(event)),
            cause: Cause::None,
        });
    }
}

/// Asks the plugin what the caller asks, in the caller's namespace.
macro_rules! ask {
    ($self:ident, $limit:expr, $request:ident, $method:ident) => {{
        let context = Context::of(&$request);
        let call =
            |mut client: ControllerClient<Channel>, request| async move { client.$method(request).await };
        $self.ask(context.namespace()?, $limit, $request.into_inner(), call).await.map_err(from)?
    }};
}

#[tonic::async_trait]
impl Controller for ProxyController {
    async fn create(
        &self,
        request: Request<wire::ControllerCreateRequest>,
    ) -> Result<Response<wire::ControllerCreateResponse>, Status> {
        let (context, sandbox_id) = (Context::of(&request), request.get_ref().sandbox_id.clone());
        ask!(self, self.connection.patience.change, request, create);
        let event = messages::SandboxCreate { sandbox_id: sandbox_id.clone() };
        self.publish(context.namespace()?, "/sandboxes/create", &event);
        Ok(Response::new(wire::ControllerCreateResponse { sandbox_id }))
    }

    async fn start(
        &self,
        request: Request<wire::ControllerStartRequest>,
    ) -> Result<Response<wire::ControllerStartResponse>, Status> {
        let (context, sandbox_id) = (Context::of(&request), request.get_ref().sandbox_id.clone());
        let started = ask!(self, self.connection.patience.change, request, start);
        let event = messages::SandboxStart { sandbox_id: sandbox_id.clone() };
        self.publish(context.namespace()?, "/sandboxes/start", &event);
        // containerd's daemon says no more of what its controllers say.
        let wire::ControllerStartResponse { pid, created_at, labels, .. } = started;
        let told =
            wire::ControllerStartResponse { sandbox_id, pid, created_at, labels, ..Default::default() };
        Ok(Response::new(told))
    }

    async fn platform(
        &self,
        request: Request<wire::ControllerPlatformRequest>,
    ) -> Result<Response<wire::ControllerPlatformResponse>, Status> {
        Ok(Response::new(ask!(self, self.connection.patience.look, request, platform)))
    }

    async fn stop(
        &self,
        request: Request<wire::ControllerStopRequest>,
    ) -> Result<Response<wire::ControllerStopResponse>, Status> {
        let grace = Duration::from_secs(request.get_ref().timeout_secs.into());
        Ok(Response::new(ask!(self, self.connection.patience.change + grace, request, stop)))
    }

    async fn wait(
        &self,
        request: Request<wire::ControllerWaitRequest>,
    ) -> Result<Response<wire::ControllerWaitResponse>, Status> {
        let context = Context::of(&request);
        let (namespace, message) = (context.namespace()?, request.into_inner());
        let mut rest = FIRST_REST;
        let exit = loop {
            let wait =
                |mut client: ControllerClient<Channel>, request| async move { client.wait(request).await };
            match self.ask(namespace, LIFE, message.clone(), wait).await {
                // The controller may have been started again, and know of its sandboxes.
                Err(failure) if failure.code == ErrorCode::Unavailable => {
                    tokio::time::sleep(rest).await;
                    rest = (rest * 2).min(LONGEST_REST);
                }
                exit => break exit.map_err(from)?,
            }
        };
        let event = messages::SandboxExit {
            sandbox_id: message.sandbox_id,
            exit_status: exit.exit_status,
            exited_at: exit.exited_at,
        };
        self.publish(namespace, "/sandboxes/exit", &event);
        Ok(Response::new(exit))
    }

    async fn status(
        &self,
        request: Request<wire::ControllerStatusRequest>,
    ) -> Result<Response<wire::ControllerStatusResponse>, Status> {
        let mut status = ask!(self, self.connection.patience.look, request, status);
        // Always there: Go's clients read it without asking.
        status.extra.get_or_insert_default();
        Ok(Response::new(status))
    }

    async fn shutdown(
        &self,
        request: Request<wire::ControllerShutdownRequest>,
    ) -> Result<Response<wire::ControllerShutdownResponse>, Status> {
        Ok(Response::new(ask!(self, self.connection.patience.change, request, shutdown)))
    }

    async fn metrics(
        &self,
        request: Request<wire::ControllerMetricsRequest>,
    ) -> Result<Response<wire::ControllerMetricsResponse>, Status> {
        Ok(Response::new(ask!(self, self.connection.patience.look, request, metrics)))
    }

    async fn update(
        &self,
        request: Request<wire::ControllerUpdateRequest>,
    ) -> Result<Response<wire::ControllerUpdateResponse>, Status> {
        if request.get_ref().sandbox.is_none() {
            return Err(invalid("sandbox can not be nil"));
        }
        Ok(Response::new(ask!(self, self.connection.patience.change, request, update)))
    }
}
