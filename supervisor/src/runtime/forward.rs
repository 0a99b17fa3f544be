//! What shims tell: the Events service on the daemon's ttrpc socket.
//!
//! A shim repeats an event until it is acknowledged, so an event may come twice; the second report is
//! acknowledged and dropped. The daemon publishes nothing that a shim publishes: of `/tasks/*` it
//! makes up the exit and the deletion of a task whose shim died, and no more.

use std::sync::Arc;
use std::time::SystemTime;

use davit_model::{Any, ErrorCode, identifier};
use davit_proto::any;
use davit_proto::containerd::events as wire;
use davit_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use davit_proto::containerd::ttrpc::Request;
use davit_proto::containerd::types as wire_types;
use davit_shim_protocol::frame::RpcError;
use davit_shim_protocol::server::{self, Handler};
use prost::Message;
use tokio::net::UnixListener;

use super::owner;
use super::registry::Shared;
use super::shim::{any_from_wire, time_from_wire, time_to_wire};
use super::task::Exit;
use crate::events::{Cause, Envelope};

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
const METHOD: &str = "Forward";

const EXIT_TOPIC: &str = "/tasks/exit";
const DELETE_TOPIC: &str = "/tasks/delete";

/// Serves the socket until the future is dropped.
pub(super) async fn serve(shared: Arc<Shared>, listener: UnixListener) {
    server::serve(listener, nix::unistd::geteuid(), Arc::new(Events { shared })).await;
}

struct Events {
    shared: Arc<Shared>,
}

impl Handler for Events {
    async fn call(&self, request: Request) -> Result<Vec<u8>, RpcError> {
        if request.service != SERVICE {
            let text = format!("service {}: not implemented", request.service);
            return Err(RpcError::new(ErrorCode::Unimplemented, text));
        }
        if request.method != METHOD {
            let text = format!("method {}: not implemented", request.method);
            return Err(RpcError::new(ErrorCode::Unimplemented, text));
        }
        let invalid =
            |text: String| RpcError::new(ErrorCode::InvalidArgument, format!("{text}: invalid argument"));
        let envelope = ForwardRequest::decode(request.payload.as_slice())
            .map_err(|error| invalid(error.to_string()))?
            .envelope
            .ok_or_else(|| invalid("no envelope".to_owned()))?;
        accept(&self.shared, envelope_from_wire(envelope))
            .await
            .map_err(|error| invalid(error.to_string()))?;
        // `google.protobuf.Empty`
        Ok(Vec::new())
    }
}

/// An event that no shim may report.
#[derive(Debug, thiserror::Error)]
pub(super) enum EventError {
    #[error("namespace: {source}")]
    Namespace { source: identifier::IdentifierError },
    #[error("{source}")]
    Topic { source: identifier::TopicError },
    #[error("event: {source}")]
    Event { source: prost::DecodeError },
}

/// Takes an event in: the owner of its container learns of it, then everyone who listens. Returns when it is in the
/// history, so that whoever is answered then may forget it.
pub(super) async fn accept(shared: &Shared, envelope: Envelope) -> Result<(), EventError> {
    identifier::validate(&envelope.namespace).map_err(|source| EventError::Namespace { source })?;
    identifier::validate_topic(&envelope.topic).map_err(|source| EventError::Topic { source })?;
    let news = match envelope.topic.as_str() {
        EXIT_TOPIC => unpack(&envelope.event)?.map(exit_news),
        DELETE_TOPIC => unpack(&envelope.event)?.and_then(delete_news),
        _ => None,
    };
    let namespace = envelope.namespace.clone();
    let report = shared.hub.report(envelope);
    if shared.hub.has_told(&report) {
        tracing::debug!(namespace, "event reported again");
    } else {
        if let Some((container, message)) = news
            && let Some(task) = shared.get(&namespace, &container)
        {
            task.tell(message).await;
        }
        shared.hub.publish_once(report);
    }
    // Also for what comes again: its first report may still be on its way to the disk.
    shared.hub.recorded().await;
    Ok(())
}

/// What the owner of its container is told of an exit.
fn exit_news(exit: wire::TaskExit) -> (String, owner::Message) {
    let exited_at = exit.exited_at.as_ref().and_then(time_from_wire);
    let known = Exit { pid: exit.pid, status: exit.exit_status, exited_at };
    (exit.container_id, owner::Message::Exited { process: exit.id, exit: known })
}

/// What it is told of a deletion, if that is the task's own.
fn delete_news(delete: wire::TaskDelete) -> Option<(String, owner::Message)> {
    let own = delete.id.is_empty() || delete.id == delete.container_id;
    own.then_some((delete.container_id, owner::Message::DeletePublished))
}

fn unpack<M: prost::Name + Default>(event: &Any) -> Result<Option<M>, EventError> {
    let event = prost_types::Any { type_url: event.type_url.clone(), value: event.value.clone() };
    any::unpack(&event).map_err(|source| EventError::Event { source })
}

fn envelope_from_wire(envelope: wire_types::Envelope) -> Envelope {
    Envelope {
        timestamp: envelope.timestamp.as_ref().and_then(time_from_wire).unwrap_or_else(SystemTime::now),
        namespace: envelope.namespace,
        topic: envelope.topic,
        event: envelope.event.map(any_from_wire).unwrap_or_default(),
        cause: Cause::None,
    }
}

/// `/tasks/exit` for a shim that can no longer say it. Every exit that the daemon reports of itself comes from here.
pub(super) fn exit_event(
    namespace: &str,
    container: &str,
    process: &str,
    exit: Exit,
    cause: Cause,
) -> Envelope {
    let event = wire::TaskExit {
        container_id: container.to_owned(),
        id: process.to_owned(),
        pid: exit.pid,
        exit_status: exit.status,
        exited_at: exit.exited_at.map(time_to_wire),
    };
    envelope(namespace, EXIT_TOPIC, any::pack(&event), cause)
}

/// `/tasks/delete` for a shim that can no longer say it.
pub(super) fn delete_event(namespace: &str, container: &str, exit: Exit) -> Envelope {
    let event = wire::TaskDelete {
        container_id: container.to_owned(),
        pid: exit.pid,
        exit_status: exit.status,
        exited_at: exit.exited_at.map(time_to_wire),
        id: String::new(),
    };
    envelope(namespace, DELETE_TOPIC, any::pack(&event), Cause::None)
}

fn envelope(namespace: &str, topic: &str, event: prost_types::Any, cause: Cause) -> Envelope {
    Envelope {
        timestamp: SystemTime::now(),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: any_from_wire(event),
        cause,
    }
}
