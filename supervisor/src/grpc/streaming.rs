//! The Streaming service.

use davit_proto::any;
use davit_proto::containerd::services::streaming::v1::StreamInit;
use davit_proto::containerd::services::streaming::v1::streaming_server::Streaming;
use futures::stream::{BoxStream, StreamExt, once};
use prost::Name;
use prost_types::Any;
use tonic::{Request, Response, Status};

use super::context::Context;
use super::convert::{any_from_wire, any_to_wire};
use super::status::{from, invalid};
use crate::streams::{Streams, ToService};

/// Serves the streams.
pub struct StreamingService {
    streams: Streams,
}

impl StreamingService {
    /// A service over `streams`.
    pub fn new(streams: Streams) -> StreamingService {
        StreamingService { streams }
    }
}

#[tonic::async_trait]
impl Streaming for StreamingService {
    type StreamStream = BoxStream<'static, Result<Any, Status>>;

    /// The first message names the stream and is answered with an empty one; what follows is for the service that gets
    /// the stream by its name. Unlike for most calls, a namespace is not required (containerd `plugins/streaming`).
    async fn stream(
        &self,
        request: Request<tonic::Streaming<Any>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let context = Context::of(&request);
        let mut messages = request.into_inner();
        let first = messages.message().await?.ok_or_else(|| invalid("no message came"))?;
        let init = any::unpack::<StreamInit>(&first).map_err(invalid)?.ok_or_else(|| {
            let (found, wanted) = (&first.type_url, StreamInit::full_name());
            invalid(format!("can't unmarshal type {found:?} to output {wanted:?}"))
        })?;
        let (namespace, lease) = context.as_given();
        let registered = self.streams.register(namespace.unwrap_or_default(), lease, &init.id);
        let (to_service, from_service) = registered.map_err(from)?.split();
        tokio::spawn(pass_on(messages, to_service));
        let ready = Any { type_url: "google.protobuf.Empty".into(), value: Vec::new() };
        let answers = once(std::future::ready(ready)).chain(from_service.map(any_to_wire)).map(Ok);
        Ok(Response::new(answers.boxed()))
    }
}

/// Passes on what the client sends, until it sends no more or the stream is closed.
async fn pass_on(mut messages: tonic::Streaming<Any>, to_service: ToService) {
    loop {
        // A message that has begun to arrive is lost only with the stream itself.
        let message = tokio::select! {
            message = messages.message() => message,
            () = to_service.closed() => return,
        };
        match message {
            Ok(Some(message)) => {
                if !to_service.send(any_from_wire(message)).await {
                    return;
                }
            }
            Ok(None) => return to_service.finish(),
            Err(error) => {
                tracing::debug!(%error, "a stream broke off");
                return;
            }
        }
    }
}
