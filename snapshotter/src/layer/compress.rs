//! The back half of making a layer: a thread of its own compresses and writes while the caller's thread walks the
//! trees, reads their files and hashes the archive. Buffers go round as in [`decompress`](super::decompress).

use std::io::{self, Write};
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use davit_content_store::Hasher;
use davit_model::Algorithm;
use flate2::write::GzEncoder;

use super::Diffed;
use super::error::Error;
use super::media_type::Compression;

/// The size of a buffer.
const BUFFER_SIZE: usize = 256 * 1024;
/// How many buffers go round.
const BUFFERS: usize = 6;
/// The level that the zstd program and containerd use unless told otherwise.
const ZSTD_LEVEL: i32 = 3;

enum Message {
    Data(Vec<u8>),
    /// The archive is complete. Without this, nothing is finished: a reader must see a truncated stream.
    End,
}

/// Where the uncompressed archive is written to.
pub(super) struct Sink {
    messages: Sender<Message>,
    free: Receiver<Vec<u8>>,
    current: Vec<u8>,
    hasher: Hasher,
    size: u64,
}

/// Runs `produce` with a place to write an archive to, which arrives compressed at `writer`. Answers the digest
/// and size of the uncompressed archive.
pub(super) fn with_sink(
    writer: impl Write + Send,
    compression: Compression,
    produce: impl FnOnce(&mut Sink) -> Result<(), Error>,
) -> Result<Diffed, Error> {
    let (messages, message_receiver) = channel();
    let (free_sender, free) = channel();
    for _ in 0..BUFFERS {
        // The receiver is alive: it is on this stack.
        let _ = free_sender.send(Vec::with_capacity(BUFFER_SIZE));
    }
    thread::scope(|scope| {
        let compressor = thread::Builder::new()
            .name("layer-compress".to_owned())
            .spawn_scoped(scope, move || compress(writer, compression, &message_receiver, &free_sender))
            .map_err(|source| Error::Workspace { operation: "start a thread", source })?;
        let hasher = Hasher::new(Algorithm::Sha256);
        let mut sink = Sink { messages, free, current: Vec::new(), hasher, size: 0 };
        let mut result = produce(&mut sink);
        if result.is_ok() {
            result = sink.finish().map_err(|source| Error::Write { source });
        }
        let Sink { hasher, size, messages, free, .. } = sink;
        drop((messages, free));
        let compressed = compressor.join().unwrap_or_else(|panic| resume_unwind(panic));
        // When the thread failed, what the producer saw was only that it had gone.
        compressed.map_err(|source| Error::Write { source })?;
        result?;
        Ok(Diffed { digest: hasher.finish(), size })
    })
}

fn compress(
    mut writer: impl Write,
    compression: Compression,
    messages: &Receiver<Message>,
    free: &Sender<Vec<u8>>,
) -> io::Result<()> {
    match compression {
        Compression::Plain => {
            copy(&mut writer, messages, free)?;
        }
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(&mut writer, flate2::Compression::default());
            if copy(&mut encoder, messages, free)? {
                encoder.finish()?;
            }
        }
        Compression::Zstd => {
            let mut encoder = zstd::Encoder::new(&mut writer, ZSTD_LEVEL)?;
            if copy(&mut encoder, messages, free)? {
                encoder.finish()?;
            }
        }
    }
    writer.flush()
}

/// Passes on what comes. True when it came to its end.
fn copy(writer: &mut impl Write, messages: &Receiver<Message>, free: &Sender<Vec<u8>>) -> io::Result<bool> {
    while let Ok(message) = messages.recv() {
        match message {
            Message::Data(mut data) => {
                writer.write_all(&data)?;
                data.clear();
                // The producer may be done and gone; then nobody needs the buffer.
                let _ = free.send(data);
            }
            Message::End => return Ok(true),
        }
    }
    Ok(false)
}

impl Sink {
    /// Hands the current buffer over.
    fn pass_on(&mut self) -> io::Result<()> {
        if self.current.is_empty() {
            return Ok(());
        }
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let full = std::mem::take(&mut self.current);
        self.hasher.update(&full);
        self.size += full.len() as u64;
        self.messages.send(Message::Data(full)).map_err(|_| gone())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.pass_on()?;
        self.messages.send(Message::End).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.current.capacity() == 0 {
            self.current = self.free.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        }
        let length = data.len().min(BUFFER_SIZE - self.current.len());
        self.current.extend_from_slice(&data[..length]);
        if self.current.len() == BUFFER_SIZE {
            self.pass_on()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
