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

use std::time::Duration;

use davit_proto::any;
use davit_proto::containerd::types::transfer::{Data, WindowUpdate};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Status;

use crate::grpc::convert::{any_from_wire, any_to_wire};
use crate::grpc::status::{from, invalid};
use crate::streams::Stream;

/// The most bytes of a message.
const MAX_DATA: usize = 32 << 10;
/// What is granted at once.
const WINDOW: i32 = 2 * (32 << 10);
/// How long a receiver is waited for that does not say that it has taken all.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many pieces wait between a stream and what is made of it.
pub(super) const QUEUE: usize = 4;

/// Sends bytes.
pub(super) struct Sender<'a> {
    stream: &'a Stream,
    /// What was granted and not sent.
    window: usize,
}

impl Sender<'_> {
    /// Sends to `stream`.
    pub(super) fn new(stream: &Stream) -> Sender<'_> {
        Sender { stream, window: 0 }
    }

    /// Sends what comes.
    pub(super) async fn send(&mut self, mut pieces: mpsc::Receiver<Vec<u8>>) -> Result<(), Status> {
        while let Some(piece) = pieces.recv().await {
            self.send_piece(&piece).await?;
        }
        Ok(())
    }

    async fn send_piece(&mut self, mut rest: &[u8]) -> Result<(), Status> {
        while !rest.is_empty() {
            while self.window == 0 {
                self.grant().await?;
            }
            let (now, later) = rest.split_at(rest.len().min(self.window).min(MAX_DATA));
            let data = Data { data: now.to_vec() };
            self.stream.send(any_from_wire(any::pack(&data))).await.map_err(from)?;
            self.window -= now.len();
            rest = later;
        }
        Ok(())
    }

    /// Takes what the receiver grants.
    async fn grant(&mut self) -> Result<(), Status> {
        let gone = || Status::unavailable("the client reads no more: unavailable");
        let message = any_to_wire(self.stream.receive().await.map_err(from)?.ok_or_else(gone)?);
        let update = any::unpack::<WindowUpdate>(&message).map_err(invalid)?;
        let update = update.ok_or_else(|| invalid("want a WindowUpdate"))?.update;
        self.window = self.window.saturating_add(usize::try_from(update).unwrap_or(0));
        Ok(())
    }

    /// Ends an archive so that its receiver has all of it before it hears of the end of the call. `ctr` goes away then,
    /// with what it has not written yet. So zeros follow, which mean nothing behind the end of a tar; who has granted
    /// a window beyond them has taken all but the last window of them, and written all but the last message of that.
    pub(super) async fn end_archive(&mut self) -> Result<(), Status> {
        self.send_piece(&[0; WINDOW as usize + MAX_DATA]).await?;
        let taken = async {
            while self.window < WINDOW as usize {
                self.grant().await?;
            }
            Ok(())
        };
        // A receiver that grants less at once, or goes away, knows what it does.
        let _: Result<Result<(), Status>, _> = timeout(PATIENCE, taken).await;
        Ok(())
    }
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
    async fn an_archive_ends_when_its_receiver_has_taken_it() {
        let streams = Streams::default();
        let (to_service, from_service) = streams.register("ns", None, "s").unwrap().split();
        let stream = streams.get("ns", "s").unwrap();
        let (out, pieces) = mpsc::channel(QUEUE);
        out.send(vec![7; 100_000]).await.unwrap();
        drop(out);
        let sending = async {
            let mut sender = Sender::new(&stream);
            sender.send(pieces).await.unwrap();
            sender.end_archive().await.unwrap();
            stream.close();
        };
        let receiving = async {
            let mut messages = std::pin::pin!(from_service);
            let (mut window, mut all) = (0, Vec::new());
            loop {
                if window < WINDOW {
                    let update = any_from_wire(any::pack(&WindowUpdate { update: WINDOW }));
                    assert!(to_service.send(update).await || all.len() > 100_000);
                    window += WINDOW;
                }
                let Some(message) = messages.next().await else { return all };
                let data = any::unpack::<Data>(&any_to_wire(message)).unwrap().unwrap().data;
                window -= i32::try_from(data.len()).unwrap();
                all.extend(data);
            }
        };
        let ((), all) = tokio::join!(sending, receiving);
        assert!(all[..100_000].iter().all(|byte| *byte == 7));
        assert!(all.len() > 100_000 && all[100_000..].iter().all(|byte| *byte == 0));
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
