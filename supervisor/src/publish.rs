//! `davitd publish`: what shims before the ttrpc socket call to report an event.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use davit_proto::containerd::services::events::v1::PublishRequest;
use davit_proto::containerd::services::events::v1::events_client::EventsClient;
use prost::Message;

use crate::grpc::context::NAMESPACE;

/// The most bytes of an event.
const LIMIT: u64 = 4 << 20;

/// Sends the event on standard input (an encoded `google.protobuf.Any`) to the daemon at `address`.
///
/// # Errors
/// No daemon, no event, or the daemon's refusal.
pub async fn run(address: &Path, topic: &str, namespace: &str) -> anyhow::Result<()> {
    let mut event = Vec::new();
    std::io::stdin()
        .take(LIMIT)
        .read_to_end(&mut event)
        .context("cannot read the event from standard input")?;
    let event = prost_types::Any::decode(event.as_slice()).context("standard input holds no event")?;
    let socket = address.to_owned();
    let connect = tower::service_fn(move |_: http::Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    let channel = tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(connect)
        .await
        .with_context(|| format!("no daemon answers on {}", address.display()))?;
    let mut request = tonic::Request::new(PublishRequest { topic: topic.to_owned(), event: Some(event) });
    request.metadata_mut().insert(NAMESPACE, namespace.parse().context("the namespace is no header value")?);
    EventsClient::new(channel).publish(request).await?;
    Ok(())
}
