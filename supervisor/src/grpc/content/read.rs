//! Reading a blob.

use std::io;

use bytes::Bytes;
use davit_model::ErrorCode;
use davit_proto::containerd::services::content::v1::ReadContentResponse;
use futures::stream::{BoxStream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::bytes;
use crate::blobs::BlobReader;
use crate::grpc::status::status;
use crate::lane::Lane;

/// The most bytes of one message, as in containerd.
const CHUNK: u64 = 1 << 20;

/// The bytes of a blob from `offset` on, `size` of them or, with 0, all. What lies beyond the end is left out; a negative
/// number counts as 0, as with containerd.
///
/// Offsets in the answers count from the start of the answer, not of the blob: containerd's client relies on that.
pub(super) fn stream(
    lane: Lane,
    reader: BlobReader,
    offset: i64,
    size: i64,
) -> Result<BoxStream<'static, Result<ReadContentResponse, Status>>, Status> {
    let whole = reader.size();
    let start = u64::try_from(offset).unwrap_or(0);
    if start > whole {
        let text = format!("read past object length {whole} bytes");
        return Err(status(ErrorCode::OutOfRange, &text));
    }
    let rest = whole - start;
    let wanted = match u64::try_from(size) {
        Ok(0) | Err(_) => rest,
        Ok(size) => size.min(rest),
    };
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        let (mut reader, mut done) = (reader, 0);
        while done < wanted {
            // A job for each piece: however long a client takes to read, it holds none of the threads that may block.
            let (offset, length) = (start + done, CHUNK.min(wanted - done));
            let job = lane.run(move || {
                let piece = read_piece(&reader, offset, length);
                (reader, piece)
            });
            // The runtime ends.
            let Ok((back, piece)) = job.await else { break };
            reader = back;
            let answer = match piece {
                Ok(data) if data.is_empty() => {
                    Err(status(ErrorCode::DataLoss, "the blob is shorter than its record says"))
                }
                Ok(data) => {
                    let answer = ReadContentResponse { offset: bytes(done), data: Bytes::from(data) };
                    done += answer.data.len() as u64;
                    Ok(answer)
                }
                Err(error) => Err(status(ErrorCode::Unknown, &format!("cannot read the blob: {error}"))),
            };
            let failed = answer.is_err();
            if sender.send(answer).await.is_err() || failed {
                break;
            }
        }
    });
    Ok(ReceiverStream::new(receiver).boxed())
}

/// Up to `length` bytes at `offset`, none at the end. Blocks.
fn read_piece(reader: &BlobReader, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
    let count = reader.read_at(&mut data, offset)?;
    data.truncate(count);
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use davit_content_store::Store;
    use tokio::time::timeout;

    use super::*;
    use crate::blobs::Blobs;

    /// More than a stream keeps ready for its client.
    const SIZE: usize = 8 << 20;

    #[tokio::test]
    async fn a_range_is_clamped_to_the_blob() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut writer = store.writer("blob", 0, None).unwrap();
        writer.write(b"0123456789").unwrap();
        let digest = writer.commit(0, None).unwrap();
        let store = Blobs::from(store);
        let read = |offset, size| {
            let reader = store.reader(&digest).unwrap();
            async move {
                let mut pieces =
                    stream(Lane::content(), reader, offset, size).map_err(|status| status.code())?;
                let mut data = Vec::new();
                while let Some(piece) = pieces.next().await {
                    data.extend_from_slice(&piece.unwrap().data);
                }
                Ok(String::from_utf8(data).unwrap())
            }
        };
        for (offset, size, wanted) in [
            (0, 0, "0123456789"),
            (3, 4, "3456"),
            (8, 100, "89"),
            (8, i64::MAX, "89"),
            (10, 0, ""),
            (-1, 2, "01"),
            (7, -1, "789"),
        ] {
            assert_eq!(read(offset, size).await.as_deref(), Ok(wanted), "{size} from {offset} on");
        }
        assert_eq!(read(11, 0).await, Err(tonic::Code::OutOfRange));
    }

    #[test]
    fn clients_that_do_not_read_hold_no_thread() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut writer = store.writer("blob", 0, None).unwrap();
        writer.write(&vec![7; SIZE]).unwrap();
        let digest = writer.commit(0, None).unwrap();
        let store = Blobs::from(store);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().max_blocking_threads(2).enable_all().build().unwrap();
        let limit = Duration::from_secs(20);
        runtime.block_on(async {
            let mut streams: Vec<_> = (0..4)
                .map(|_| stream(Lane::content(), store.reader(&digest).unwrap(), 0, 0).unwrap())
                .collect();
            for stream in &mut streams {
                let first = timeout(limit, stream.next()).await.expect("each gets its turn");
                assert_eq!(first.unwrap().unwrap().offset, 0);
            }
            timeout(limit, tokio::task::spawn_blocking(|| ())).await.expect("a thread is free").unwrap();
            let mut offset = CHUNK as i64;
            while let Some(piece) = timeout(limit, streams[0].next()).await.unwrap() {
                let piece = piece.unwrap();
                assert_eq!(piece.offset, offset);
                assert!(piece.data.iter().all(|byte| *byte == 7));
                offset += piece.data.len() as i64;
            }
            assert_eq!(offset, SIZE as i64);
        });
    }
}
