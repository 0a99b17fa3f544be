//! The bodies of calls, as they pass: how many messages are in them, and how a call ended.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};

/// The length of what stands before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// Counts messages in the bytes of a body, whose pieces are cut anywhere.
#[derive(Debug, Default)]
pub(super) struct Messages {
    prefix: [u8; PREFIX],
    /// How much of the prefix is there.
    have: usize,
    /// How much of the message is still to come.
    rest: usize,
}

impl Messages {
    /// Takes the next piece; gives how many messages have begun in it.
    pub(super) fn feed(&mut self, mut piece: &[u8]) -> u64 {
        let mut begun = 0;
        while !piece.is_empty() {
            if self.rest > 0 {
                let skipped = self.rest.min(piece.len());
                self.rest -= skipped;
                piece = &piece[skipped..];
                continue;
            }
            let taken = (PREFIX - self.have).min(piece.len());
            self.prefix[self.have..self.have + taken].copy_from_slice(&piece[..taken]);
            self.have += taken;
            piece = &piece[taken..];
            if self.have == PREFIX {
                let [_, length @ ..] = self.prefix;
                self.rest = u32::from_be_bytes(length) as usize;
                self.have = 0;
                begun += 1;
            }
        }
        begun
    }
}

/// Who is told of a body.
pub(super) trait Observer: Send + Unpin + 'static {
    /// So many messages have begun.
    fn messages(&self, count: u64);
    /// The body has ended, with these trailers.
    fn ended(&self, trailers: Option<&HeaderMap>);
}

/// A body that is looked at while it passes.
pub(super) struct Observed<O> {
    body: Body,
    messages: Messages,
    observer: O,
}

impl<O: Observer> Observed<O> {
    /// A body whose messages `observer` is told of.
    pub(super) fn wrap(body: Body, observer: O) -> Body {
        Body::new(Observed { body, messages: Messages::default(), observer })
    }
}

impl<O: Observer> http_body::Body for Observed<O> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let count = this.messages.feed(data);
                    if count > 0 {
                        this.observer.messages(count);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.observer.ended(Some(trailers));
                }
            }
            Some(Err(_)) | None => this.observer.ended(None),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The code that headers or trailers tell, if they do.
pub(super) fn told(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However a body is cut, each of its messages counts once.
        #[test]
        fn pieces_do_not_matter(
            lengths in proptest::collection::vec(0_usize..40, 0..20),
            cuts in proptest::collection::vec(1_usize..17, 1..80),
        ) {
            let mut bytes = Vec::new();
            for length in &lengths {
                bytes.push(0);
                bytes.extend((*length as u32).to_be_bytes());
                bytes.extend(std::iter::repeat_n(0xff, *length));
            }
            let mut messages = Messages::default();
            let (mut counted, mut rest, mut cuts) = (0, bytes.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                counted += messages.feed(piece);
                rest = after;
            }
            prop_assert_eq!(counted, lengths.len() as u64);
        }
    }
}
