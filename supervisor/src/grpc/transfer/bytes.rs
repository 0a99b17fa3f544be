//! Bytes on a stream: as many as the receiver grants, in messages of at most 32 KiB.

use davit_proto::any;
use davit_proto::containerd::types::transfer::{Data, WindowUpdate};
use tokio::sync::mpsc;
use tonic::Status;

use crate::grpc::convert::{any_from_wire, any_to_wire};
use crate::grpc::status::{from, invalid};
use crate::streams::Stream;

/// The most bytes of a message (containerd `core/transfer/streaming`).
const MAX_DATA: usize = 32 << 10;

/// Sends what comes, and closes the stream after that.
pub(super) async fn send(stream: &Stream, mut pieces: mpsc::Receiver<Vec<u8>>) -> Result<(), Status> {
    let mut window = 0_usize;
    while let Some(piece) = pieces.recv().await {
        let mut rest = piece.as_slice();
        while !rest.is_empty() {
            while window == 0 {
                let gone = || Status::unavailable("the client reads no more: unavailable");
                let message = any_to_wire(stream.receive().await.ok_or_else(gone)?);
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
