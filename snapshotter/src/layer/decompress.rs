//! The front half of applying: a thread of its own inflates and hashes the stream while the caller's thread
//! unpacks what came out.
//!
//! A fixed set of buffers goes round between the two: the thread fills free ones, the reader gives them back. So
//! whichever side is slower holds the other up, and the memory is [`BUFFERS`] times [`BUFFER_SIZE`] and the
//! window of the decompressor (32 KiB for gzip, at most 2^[`ZSTD_WINDOW_LOG`] bytes for zstd).

use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, Read};
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use davit_content_store::Hasher;
use davit_model::Algorithm;
use flate2::bufread::MultiGzDecoder;

use super::Applied;
use super::error::Error;
use super::media_type::Declared;

/// The size of a buffer: large enough that the hand-over costs nothing, small enough to stay in the cache.
const BUFFER_SIZE: usize = 256 * 1024;
/// How many buffers go round.
const BUFFERS: usize = 6;
/// How much is read from the blob at once.
const SOURCE_BUFFER_SIZE: usize = 128 * 1024;
/// 128 MiB, the largest window that the zstd program itself accepts unless told otherwise.
const ZSTD_WINDOW_LOG: u32 = 27;

/// What the thread says to the reader.
enum Message {
    Data(Vec<u8>),
    Failed(Error),
    End,
}

/// The uncompressed stream as the unpacker reads it. Its errors are [`Error`]s inside of [`io::Error`]s.
pub(super) struct Stream {
    messages: Receiver<Message>,
    free: Sender<Vec<u8>>,
    current: Vec<u8>,
    taken: usize,
    ended: bool,
}

/// Runs `consume` on the uncompressed stream of `reader`, which it must read to the end unless it fails. Answers
/// its result, and the digest and size of that stream.
pub(super) fn with_stream<T>(
    reader: impl Read + Send,
    declared: Declared,
    consume: impl FnOnce(&mut Stream) -> Result<T, Error>,
) -> Result<(T, Applied), Error> {
    let (message_sender, messages) = channel();
    let (free, free_receiver) = channel();
    for _ in 0..BUFFERS {
        // The receiver is alive: it is on this stack.
        let _ = free.send(vec![0; BUFFER_SIZE]);
    }
    thread::scope(|scope| {
        let producer = thread::Builder::new()
            .name("layer-inflate".to_owned())
            .spawn_scoped(scope, move || produce(reader, declared, &message_sender, &free_receiver))
            .map_err(|source| Error::Workspace { operation: "start a thread", source })?;
        let mut stream = Stream { messages, free, current: Vec::new(), taken: 0, ended: false };
        let result = consume(&mut stream);
        // With its channels closed the thread stops at once if it has not finished.
        drop(stream);
        let applied = producer.join().unwrap_or_else(|panic| resume_unwind(panic));
        let value = result?;
        // A consumer that succeeded has read up to the end message, which is sent last.
        let applied = applied.ok_or(Error::Truncated)?;
        Ok((value, applied))
    })
}

/// Inflates, hashes and hands over until the end, an error, or until nobody wants it. Answers the digest only
/// when the whole stream was handed over.
fn produce(
    reader: impl Read,
    declared: Declared,
    messages: &Sender<Message>,
    free: &Receiver<Vec<u8>>,
) -> Option<Applied> {
    let (mut reader, compression) = match decompressor(reader, declared) {
        Ok(found) => found,
        Err(error) => {
            let _ = messages.send(Message::Failed(error));
            return None;
        }
    };
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut size = 0;
    loop {
        let mut buffer = free.recv().ok()?;
        buffer.resize(BUFFER_SIZE, 0);
        let (length, result) = fill(&mut reader, &mut buffer);
        buffer.truncate(length);
        hasher.update(&buffer);
        size += length as u64;
        let at_end = length < BUFFER_SIZE;
        if length > 0 {
            messages.send(Message::Data(buffer)).ok()?;
        }
        if let Err(source) = result {
            let _ = messages.send(Message::Failed(classify(source, compression)));
            return None;
        }
        if at_end {
            messages.send(Message::End).ok()?;
            return Some(Applied { digest: hasher.finish(), size });
        }
    }
}

/// Fills a whole buffer unless the stream ends or fails before.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> (usize, io::Result<()>) {
    let mut length = 0;
    while length < buffer.len() {
        match reader.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (length, Err(error)),
        }
    }
    (length, Ok(()))
}

/// The reader of the uncompressed stream, and the name of the compression.
pub(super) fn decompressor<'a>(
    reader: impl Read + 'a,
    declared: Declared,
) -> Result<(Box<dyn Read + 'a>, &'static str), Error> {
    let mut source = Source(reader);
    if declared == Declared::Plain {
        return Ok((Box::new(source), "tar"));
    }
    let mut magic = [0; 4];
    let (length, result) = fill(&mut source, &mut magic);
    result.map_err(|error| classify(error, "tar"))?;
    let whole = Cursor::new(magic).take(length as u64).chain(source);
    match magic {
        [0x1f, 0x8b, 0x08, _] => {
            let buffered = BufReader::with_capacity(SOURCE_BUFFER_SIZE, whole);
            // A gzip file may have several members, and `GzDecoder` would stop after the first.
            Ok((Box::new(MultiGzDecoder::new(buffered)), "gzip"))
        }
        // A zstd frame, or a skippable one before it.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let mut decoder =
                zstd::Decoder::new(whole).map_err(|source| Error::Corrupt { compression: "zstd", source })?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG)
                .map_err(|source| Error::Corrupt { compression: "zstd", source })?;
            Ok((Box::new(decoder), "zstd"))
        }
        _ => Ok((Box::new(whole), "tar")),
    }
}

/// Tells what the store could not read from what does not decompress.
pub(super) fn classify(error: io::Error, compression: &'static str) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => error,
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Error::Truncated,
        Err(source) => Error::Corrupt { compression, source },
    }
}

/// The blob's reader, whose errors are marked so that they pass through a decompressor as they are.
struct Source<R>(R);

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(io::Error::other(Error::Read { source })),
                Ok(length) => return Ok(length),
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.taken == self.current.len() && !self.ended {
            match self.messages.recv() {
                Ok(Message::Data(data)) => {
                    let used = std::mem::replace(&mut self.current, data);
                    self.taken = 0;
                    if used.capacity() > 0 {
                        // The thread may be done and gone; then nobody needs the buffer.
                        let _ = self.free.send(used);
                    }
                }
                Ok(Message::End) => self.ended = true,
                Ok(Message::Failed(error)) => return Err(io::Error::other(error)),
                // The thread panicked or failed before: no end of a stream, whatever was read.
                Err(_) => return Err(io::Error::other(Error::Truncated)),
            }
        }
        Ok(&self.current[self.taken..])
    }

    fn consume(&mut self, length: usize) {
        self.taken += length;
    }
}
