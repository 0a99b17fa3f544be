//! Connections of clients that name the socket's path as the authority of their calls.
//!
//! A gRPC client that is given `unix:/run/davit/davit.sock` has no host to put into `:authority`. Go's sends
//! `localhost`; those built on gRPC's C core (Python, Ruby, PHP, C++, .NET) send the path percent-encoded,
//! others as it is. Neither is an authority by RFC 3986, and the crate `h2` answers each such call with
//! `PROTOCOL_ERROR` before any of our code sees it. Go's server, and so containerd, does not look.
//!
//! So a thin layer in front of the HTTP/2 server reads the first header block of each connection. Is the authority
//! in it a valid one, the layer steps aside for good: that connection costs one comparison per read. If not, the octets
//! that h2 does not bear are replaced one by one, in this and in each later block of the connection. The value keeps its
//! length, so that both ends go on having the same dynamic table (RFC 7541, section 4.1), and nothing that is
//! indexed must be known here. What cannot be understood is passed on as it came, for h2 to refuse.
//!
//! ```text
//!              valid, or not understood
//!   Looking ─────────────────────────────► Passing
//!      │ replaced
//!      ▼
//!   Replacing ──── not understood ───────► Passing
//! ```

mod frames;
mod header_block;

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

use frames::Rewriter;

/// How much is read at once while the layer is at work.
const CHUNK: usize = 16 << 10;

/// The time for a client to begin to speak HTTP/2: its preface, and a frame behind that. Nothing else ends a connection whose
/// client says nothing, for an idle one is as good as any. containerd's server gives it two minutes.
const GREETING: Duration = Duration::from_secs(30);

/// A connection whose calls may have any authority.
pub(super) struct AnyAuthority<S> {
    stream: S,
    /// None once nothing needs to be replaced.
    rewriter: Option<Box<Rewriter>>,
    /// What has been rewritten and not been read yet, from `given`.
    pending: Vec<u8>,
    given: usize,
    /// None once the client has begun to speak.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> AnyAuthority<S> {
    /// Wraps a connection from its very first byte.
    pub(super) fn new(stream: S) -> AnyAuthority<S> {
        AnyAuthority::greeted_within(GREETING, stream)
    }

    fn greeted_within(limit: Duration, stream: S) -> AnyAuthority<S> {
        let deadline = Some(Box::pin(tokio::time::sleep(limit)));
        AnyAuthority { stream, rewriter: Some(Box::default()), pending: Vec::new(), given: 0, deadline }
    }
}

impl<S> Connected for AnyAuthority<S> {
    // No call asks who is at the other end: whoever may connect may call.
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.given < this.pending.len() {
                let rest = &this.pending[this.given..];
                let count = rest.len().min(buffer.remaining());
                buffer.put_slice(&rest[..count]);
                this.given += count;
                if this.given == this.pending.len() {
                    this.given = 0;
                    match this.rewriter {
                        Some(_) => this.pending.clear(),
                        None => this.pending = Vec::new(),
                    }
                }
                return Poll::Ready(Ok(()));
            }
            let Some(rewriter) = &mut this.rewriter else {
                return Pin::new(&mut this.stream).poll_read(cx, buffer);
            };
            let mut chunk = [0; CHUNK];
            let mut chunk = ReadBuf::new(&mut chunk);
            let read = Pin::new(&mut this.stream).poll_read(cx, &mut chunk);
            if read.is_pending()
                && let Some(deadline) = &mut this.deadline
                && deadline.as_mut().poll(cx).is_ready()
            {
                tracing::debug!("a client that does not begin to speak is given up");
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            ready!(read)?;
            if chunk.filled().is_empty() {
                // The end, perhaps within a frame: h2 says what it thinks of that.
                rewriter.finish(&mut this.pending);
                this.rewriter = None;
                if this.pending.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let progress = rewriter.feed(chunk.filled(), &mut this.pending);
            if progress.is_done() || rewriter.has_begun() {
                this.deadline = None;
            }
            if progress.is_done() {
                this.rewriter = None;
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, io::Error>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize, io::Error>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_connection_that_breaks_off_gives_all_it_got() {
        for sent in [&b""[..], b"PRI * HT", b"GET / HTTP/1.1\r\n\r\n"] {
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(sent).await.unwrap();
            drop(client);
            let mut got = Vec::new();
            AnyAuthority::new(server).read_to_end(&mut got).await.unwrap();
            assert_eq!(got, sent);
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_begin_to_speak_is_given_up() {
        let mut buffer = [0; 64];
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for sent in [&b""[..], b"PRI", preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0"] {
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(sent).await.unwrap();
            let mut server = AnyAuthority::greeted_within(Duration::from_millis(1), server);
            let ended = loop {
                match server.read(&mut buffer).await {
                    Ok(length) => assert!(length > 0),
                    Err(error) => break error,
                }
            };
            assert_eq!(ended.kind(), io::ErrorKind::TimedOut);
        }
        let (mut client, server) = tokio::io::duplex(64);
        client.write_all(&[&preface[..], b"\0\0\0\x04\0\0\0\0\0"].concat()).await.unwrap();
        let mut server = AnyAuthority::new(server);
        server.read_exact(&mut buffer[..preface.len() + 9]).await.unwrap();
        assert!(server.deadline.is_none(), "who has begun may take its time");
    }
}
