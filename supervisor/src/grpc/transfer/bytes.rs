//! Bytes on a stream: as many as the receiver grants, in messages of at most 32 KiB (containerd
//! `core/transfer/streaming`).
//!
//! ```text
//!   receiver                      sender
//!      │── WindowUpdate 64 KiB ──▶│
//!      │◀──────── Data ───────────│ never more than was granted
//!      │── WindowUpdate 64 KiB ──▶│ as soon as less than 64 KiB are left of it
//!      │◀──────── end ────────────│ it sends no more: that was all
//! ```

use davit_proto::any;
use davit_proto::containerd::types::transfer::{Data, WindowUpdate};
use tokio::sync::mpsc;
use tonic::Status;

use crate::grpc::convert::{any_from_wire, any_to_wire};
use crate::grpc::status::{from, invalid};
use crate::streams::Stream;

/// The most bytes of a message.
const MAX_DATA: usize = 32 << 10;
/// What is granted at once.
const WINDOW: i32 = 2 * (32 << 10);
/// How many pieces wait between a stream and what is made of it.
pub(super) const QUEUE: usize = 4;

/// Sends what comes, and closes the stream after that.
pub(super) async fn send(stream: &Stream, mut pieces: mpsc::Receiver<Vec<u8>>) -> Result<(), Status> {
    let mut window = 0_usize;
    while let Some(piece) = pieces.recv().await {
        let mut rest = piece.as_slice();
        while !rest.is_empty() {
            while window == 0 {
                let gone = || Status::unavailable("the client reads no more: unavailable");
                let message = any_to_wire(stream.receive().await.map_err(from)?.ok_or_else(gone)?);
                let update = any::unpack::<WindowUpdate>(&message).map_err(invalid)?;
                let update = update.ok_or_else(|| invalid("want a WindowUpdate"))?.update;
                window = window.saturating_add(usize::try_from(update).unwrap_or(0));
            }
            let (now, later) = rest.split_at(rest.len().min(window).min(MAX_DATA));
            let data = Data { data: now.to_vec() };
            stream.send(any_from_wire(any::pack(&data))).await.map_err(from)?;
            window -= now.len();
            rest = later;
        }
    }
    Ok(())
}

/// Passes on what the client sends until it says that this was all, or until nobody wants more.
pub(super) async fn receive(stream: &Stream, out: mpsc::Sender<Vec<u8>>) -> Result<(), Status> {
    let mut window = 0_i64;
    loop {
        if window < i64::from(WINDOW) {
            let update = WindowUpdate { update: WINDOW };
            stream.send(any_from_wire(any::pack(&update))).await.map_err(from)?;
            window += i64::from(WINDOW);
        }
        let Some(message) = stream.receive().await.map_err(from)? else { return Ok(()) };
        // What a newer client may say beside its bytes is passed over.
        let Some(data) = any::unpack::<Data>(&any_to_wire(message)).map_err(invalid)? else { continue };
        window -= i64::try_from(data.data.len()).unwrap_or(i64::MAX);
        if out.send(data.data).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use crate::streams::Streams;

    fn data(bytes: &[u8]) -> davit_model::Any {
        any_from_wire(any::pack(&Data { data: bytes.to_vec() }))
    }

    #[tokio::test]
    async fn a_sender_is_granted_more_when_less_than_a_window_is_left() {
        let streams = Streams::default();
        let (to_service, from_service) = streams.register("ns", None, "s").unwrap().split();
        let stream = streams.get("ns", "s").unwrap();
        let (out, mut pieces) = mpsc::channel(QUEUE);
        let receiving = tokio::spawn(async move { receive(&stream, out).await });
        let mut granted =
            std::pin::pin!(from_service.map(|message| {
                any::unpack::<WindowUpdate>(&any_to_wire(message)).unwrap().unwrap().update
            }));
        // What it is granted at first, and then for each piece as much as is missing.
        assert_eq!(granted.next().await, Some(WINDOW));
        assert!(to_service.send(data(b"one")).await);
        assert_eq!(granted.next().await, Some(WINDOW));
        assert!(to_service.send(data(&[0; 1000])).await);
        to_service.finish();
        receiving.await.unwrap().unwrap();
        assert!(futures::poll!(granted.next()).is_pending(), "there was enough left");
        assert_eq!(pieces.recv().await.unwrap(), b"one");
        assert_eq!(pieces.recv().await.unwrap().len(), 1000);
        assert_eq!(pieces.recv().await, None);
    }

    #[tokio::test]
    async fn a_client_that_is_lost_has_not_sent_all() {
        let streams = Streams::default();
        let (to_service, _from_service) = streams.register("ns", None, "s").unwrap().split();
        let stream = streams.get("ns", "s").unwrap();
        let (out, _pieces) = mpsc::channel(QUEUE);
        assert!(to_service.send(data(b"a part")).await);
        drop(to_service);
        let status = receive(&stream, out).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
    }
}
