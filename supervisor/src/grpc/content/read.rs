//! Reading a blob.

use bytes::Bytes;
use davit_content_store::Reader;
use davit_model::ErrorCode;
use davit_proto::containerd::services::content::v1::ReadContentResponse;
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::bytes;
use crate::grpc::status::{invalid, status};

/// The most bytes of one message, as in containerd.
const CHUNK: u64 = 1 << 20;

/// The bytes of a blob from `offset` on, `size` of them or, with 0, all. What lies beyond the end is left out.
///
/// Offsets in the answers count from the start of the answer, not of the blob: containerd's client relies on that.
pub(super) fn stream(
    reader: Reader,
    offset: i64,
    size: i64,
) -> Result<BoxStream<'static, Result<ReadContentResponse, Status>>, Status> {
    let whole = reader.size();
    let start = u64::try_from(offset).map_err(|_| invalid(format!("offset {offset} is negative")))?;
    if start > whole {
        let text = format!("read past object length {whole} bytes");
        return Err(status(ErrorCode::OutOfRange, &text));
    }
    let rest = whole - start;
    let wanted = match u64::try_from(size) {
        Err(_) => return Err(invalid(format!("size {size} is negative"))),
        Ok(0) => rest,
        Ok(size) => size.min(rest),
    };
    let (sender, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut done = 0;
        while done < wanted {
            let mut data = vec![0; usize::try_from(CHUNK.min(wanted - done)).unwrap_or(0)];
            let answer = match reader.read_at(&mut data, start + done) {
                Ok(0) => Err(status(ErrorCode::DataLoss, "the blob is shorter than its record says")),
                Ok(count) => {
                    data.truncate(count);
                    let answer = ReadContentResponse { offset: bytes(done), data: Bytes::from(data) };
                    done += count as u64;
                    Ok(answer)
                }
                Err(error) => Err(status(ErrorCode::Unknown, &format!("cannot read the blob: {error}"))),
            };
            let failed = answer.is_err();
            if sender.blocking_send(answer).is_err() || failed {
                break;
            }
        }
    });
    Ok(ReceiverStream::new(receiver).boxed())
}
