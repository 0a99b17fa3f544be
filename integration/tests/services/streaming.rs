//! Streaming: a stream is named, acknowledged, and gone with its client or its lease.

use anyhow::{Context, Result, ensure};
use davit_integration::{Daemon, wait};
use davit_proto::any;
use davit_proto::containerd::services::leases::v1::leases_client::LeasesClient;
use davit_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use davit_proto::containerd::services::streaming::v1::StreamInit;
use davit_proto::containerd::services::streaming::v1::streaming_client::StreamingClient;
use prost_types::Any;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use super::{conn, plugins, refused, runtime};
use crate::root;

/// The client's two ends of one stream.
struct Client {
    sender: mpsc::Sender<Any>,
    answers: Streaming<Any>,
}

async fn open(daemon: &Daemon, lease: Option<&str>, first: Any) -> Result<Result<Client, Status>> {
    let mut streaming = StreamingClient::new(conn(daemon, lease).await?);
    let (sender, messages) = mpsc::channel(4);
    sender.send(first).await?;
    let opened = streaming.stream(ReceiverStream::new(messages)).await;
    Ok(opened.map(|response| Client { sender, answers: response.into_inner() }))
}

fn named(id: &str) -> Any {
    any::pack(&StreamInit { id: id.into() })
}

#[test]
fn a_stream_is_acknowledged_and_its_name_taken_until_the_client_goes() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    runtime()?.block_on(async {
        plugins(&daemon, &[("streaming.v1", "manager"), ("grpc.v1", "streaming")]).await?;
        let mut client = open(&daemon, None, named("s")).await??;
        let ready = timeout(wait::PATIENCE, client.answers.message()).await??.context("no answer")?;
        ensure!(ready == Any { type_url: "google.protobuf.Empty".into(), value: Vec::new() }, "{ready:?}");
        let again = open(&daemon, None, named("s")).await?;
        refused(again.map(|_| ()), Code::AlreadyExists, "stream \"s\": already exists");

        // The end of what the client says is not the end of what it hears.
        drop(client.sender);
        let again = open(&daemon, None, named("s")).await?;
        refused(again.map(|_| ()), Code::AlreadyExists, "stream \"s\": already exists");
        drop(client.answers);
        let end = std::time::Instant::now() + wait::PATIENCE;
        while open(&daemon, None, named("s")).await?.is_err() {
            ensure!(std::time::Instant::now() < end, "the name is not free");
            tokio::task::yield_now().await;
        }

        let odd = Any { type_url: "containerd.types.Mount".into(), value: Vec::new() };
        let text = "can't unmarshal type \"containerd.types.Mount\" to output \
                    \"containerd.services.streaming.v1.StreamInit\": invalid argument";
        refused(open(&daemon, None, odd).await?.map(|_| ()), Code::InvalidArgument, text);
        anyhow::Ok(())
    })
}

#[test]
fn a_stream_ends_with_its_lease() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let daemon = Daemon::start()?;
    runtime()?.block_on(async {
        let mut leases = LeasesClient::new(conn(&daemon, None).await?);
        leases.create(CreateRequest { id: "l".into(), ..Default::default() }).await?;
        let mut free = open(&daemon, None, named("free")).await??;
        let mut leased = open(&daemon, Some("l"), named("leased")).await??;
        for client in [&mut free, &mut leased] {
            timeout(wait::PATIENCE, client.answers.message()).await??.context("no answer")?;
        }
        leases.delete(Request::new(DeleteRequest { id: "l".into(), sync: true })).await?;
        let end = timeout(wait::PATIENCE, leased.answers.message()).await??;
        ensure!(end.is_none(), "{end:?}");
        let taken = open(&daemon, None, named("free")).await?;
        refused(taken.map(|_| ()), Code::AlreadyExists, "stream \"free\": already exists");
        anyhow::Ok(())
    })
}
