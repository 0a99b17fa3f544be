//! The Events service: publish, forward and subscribe.

use std::pin::Pin;
use std::time::SystemTime;

use davit_model::identifier::{validate, validate_topic};
use davit_model::{Any, Filter};
use davit_proto::containerd::services::events::v1 as wire;
use davit_proto::containerd::services::events::v1::events_server::Events;
use davit_proto::containerd::types;
use futures::{Stream, StreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert;
use super::status::invalid;
use crate::events::{Cause, Envelope, Hub};

/// Serves the hub.
pub struct EventsService {
    hub: Hub,
}

impl EventsService {
    /// A service over `hub`.
    pub fn new(hub: Hub) -> EventsService {
        EventsService { hub }
    }
}

/// What shims tell of tasks, those among them too that know no other way than `publish` and so tell it again and again
/// until they are answered.
const OF_TASKS: &str = "/tasks/";

/// Checks and publishes one event from a client.
fn publish(
    hub: &Hub,
    namespace: &str,
    topic: &str,
    timestamp: SystemTime,
    event: Option<Any>,
) -> Result<(), Status> {
    validate(namespace).map_err(|error| invalid(format!("event envelope has invalid namespace: {error}")))?;
    validate_topic(topic).map_err(|error| invalid(format!("envelope topic {topic:?}: {}", error.reason)))?;
    let event = event.unwrap_or_default();
    let (namespace, topic) = (namespace.to_owned(), topic.to_owned());
    let of_task = topic.starts_with(OF_TASKS);
    let envelope = Envelope { timestamp, namespace, topic, event, cause: Cause::None };
    if of_task {
        hub.publish_once(hub.report(envelope));
    } else {
        hub.publish(envelope);
    }
    Ok(())
}

#[tonic::async_trait]
impl Events for EventsService {
    async fn publish(&self, request: Request<wire::PublishRequest>) -> Result<Response<()>, Status> {
        let context = Context::of(&request);
        let wire::PublishRequest { topic, event } = request.into_inner();
        let event = event.map(convert::any_from_wire);
        publish(&self.hub, context.namespace()?, &topic, SystemTime::now(), event)?;
        Ok(Response::new(()))
    }

    async fn forward(&self, request: Request<wire::ForwardRequest>) -> Result<Response<()>, Status> {
        let envelope = request.into_inner().envelope.ok_or_else(|| invalid("envelope is required"))?;
        // containerd takes an event without a time for one of 1970.
        let timestamp = envelope.timestamp.unwrap_or_default();
        let timestamp = convert::time_from_wire(timestamp)
            .ok_or_else(|| invalid("event envelope has a timestamp out of range"))?;
        let event = envelope.event.map(convert::any_from_wire);
        publish(&self.hub, &envelope.namespace, &envelope.topic, timestamp, event)?;
        Ok(Response::new(()))
    }

    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<types::Envelope, Status>> + Send>>;

    async fn subscribe(
        &self,
        request: Request<wire::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let filter = Filter::parse(&request.into_inner().filters).map_err(invalid)?;
        let events = ReceiverStream::new(self.hub.subscribe(filter)).map(|envelope| {
            Ok(types::Envelope {
                timestamp: Some(envelope.timestamp.into()),
                namespace: envelope.namespace.clone(),
                topic: envelope.topic.clone(),
                event: Some(convert::any_to_wire(envelope.event.clone())),
            })
        });
        Ok(Response::new(Box::pin(events)))
    }
}
