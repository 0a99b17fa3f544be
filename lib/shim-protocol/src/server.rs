//! A small ttrpc server on tokio: the daemon's socket on which shims report events. Unary calls only, and
//! those of one connection in the order in which they come, because events have an order.
//!
//! Memory is bounded: so many connections, and of each at most one frame.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use davit_model::ErrorCode;
use davit_proto::containerd::ttrpc::Request;
use nix::unistd::Uid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::frame::{self, Decoder, Received, RpcError};

/// The most connections at once; more wait in the kernel's queue. Every shim keeps one.
pub const MAX_CONNECTIONS: usize = 16 * 1024;

/// The bytes that are read at once.
const READ: usize = 16 * 1024;

/// How long to wait after an accept that failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What answers the calls.
pub trait Handler: Send + Sync + 'static {
    /// Answers one call with the encoded reply. The calls of one connection come one after another.
    fn call(&self, request: Request) -> impl Future<Output = Result<Vec<u8>, RpcError>> + Send;
}

/// Serves until the future is dropped, which ends all connections. Only processes of user `uid` are heard.
pub async fn serve(listener: UnixListener, uid: Uid, handler: Arc<impl Handler>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        // Both arms may be dropped at any time: an accept that is dropped has accepted nothing.
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Err(reason) = authorize(&stream, uid) {
                    tracing::warn!(reason, "refused a ttrpc connection");
                    continue;
                }
                connections.spawn(connection(stream, handler.clone(), place));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a ttrpc connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// By the credentials that the kernel noted when the peer connected.
fn authorize(stream: &UnixStream, uid: Uid) -> Result<(), String> {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == uid.as_raw() => Ok(()),
        Ok(peer) => Err(format!("peer has user id {}, expected {uid}", peer.uid())),
        Err(error) => Err(format!("peer has no credentials: {error}")),
    }
}

async fn connection(mut stream: UnixStream, handler: Arc<impl Handler>, _place: OwnedSemaphorePermit) {
    if let Err(error) = answer_calls(&mut stream, &*handler).await {
        tracing::debug!(%error, "ttrpc connection broke");
    }
}

async fn answer_calls(stream: &mut UnixStream, handler: &impl Handler) -> io::Result<()> {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; READ];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..length]);
        while let Some(received) = decoder.next_frame() {
            let (number, result) = match received {
                Received::Frame(frame) if frame.kind == frame::TYPE_REQUEST => {
                    let result = match frame::decode_request(&frame.payload) {
                        Ok(request) => handler.call(request).await,
                        Err(error) => Err(error),
                    };
                    (frame.stream, result)
                }
                Received::Frame(_) => continue,
                Received::Oversized { stream, length, .. } => {
                    let text = format!("message of {length} bytes is too long: resource exhausted");
                    (stream, Err(RpcError::new(ErrorCode::ResourceExhausted, text)))
                }
            };
            stream.write_all(&frame::encode_response(number, &result)).await?;
        }
    }
}
