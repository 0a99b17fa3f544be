//! Streams: what clients and the daemon's own services say to each other beside a call.
//!
//! A client opens a stream and names it; a call that follows, such as Transfer, is given that name, gets the stream here and
//! sends and receives messages of any type: bytes of an image, questions for credentials, progress.
//!
//! ```text
//!            register            first message answered
//!   client ───────────► Registered ◄──────────────────► get(): send, receive
//!                            │ the client goes, a service closes it, or its lease ends
//!                            ▼
//!                          Closed: its name is free again
//! ```
//!
//! A stream that was registered under a lease lives no longer than that lease, unless the label
//! `containerd.io/gc.ref.stream` of something else names it (containerd `plugins/streaming`). Unlike there, the name of a
//! client that has gone is free at once, not never.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use davit_model::{Any, Coded, ErrorCode};
use futures::stream::{Stream as Messages, unfold};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How many messages wait in each direction; who sends more waits for the reader.
const QUEUE: usize = 16;

/// Why there is no stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Another stream of the namespace has the name.
    #[error("stream {id:?}")]
    AlreadyExists {
        /// The name.
        id: String,
    },
    /// No stream has the name.
    #[error("stream {id:?}")]
    NotFound {
        /// The name.
        id: String,
    },
    /// The client has gone, or the stream was closed.
    #[error("stream {id:?} is closed")]
    Closed {
        /// The name.
        id: String,
    },
}

impl Coded for StreamError {
    fn code(&self) -> ErrorCode {
        match self {
            StreamError::AlreadyExists { .. } => ErrorCode::AlreadyExists,
            StreamError::NotFound { .. } => ErrorCode::NotFound,
            StreamError::Closed { .. } => ErrorCode::Unavailable,
        }
    }
}

/// The name of a stream: its namespace, which may be empty, and its id.
type Name = (String, String);

/// All streams. Clones are handles of the same.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    registered: Mutex<HashMap<Name, Entry>>,
}

#[derive(Debug)]
struct Entry {
    lease: Option<String>,
    stream: Stream,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Entry>> {
        // Whoever panicked with the lock has left a map that is whole.
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that the collector may have to close.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) lease: String,
    stream: Stream,
}

impl Streams {
    /// Registers a stream; the client's side of it is returned.
    ///
    /// # Errors
    /// [`StreamError::AlreadyExists`].
    pub fn register(
        &self,
        namespace: &str,
        lease: Option<&str>,
        id: &str,
    ) -> Result<ClientSide, StreamError> {
        let name = (namespace.to_owned(), id.to_owned());
        let mut registered = self.shared.lock();
        if registered.contains_key(&name) {
            return Err(StreamError::AlreadyExists { id: id.to_owned() });
        }
        let (to_service, from_client) = mpsc::channel(QUEUE);
        let (to_client, from_service) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let stream = Stream {
            id: Arc::from(id),
            sender: to_client,
            receiver: Arc::new(tokio::sync::Mutex::new(from_client)),
            finished: Arc::default(),
            closed: closed.clone(),
        };
        let finished = stream.finished.clone();
        registered.insert(name.clone(), Entry { lease: lease.map(str::to_owned), stream });
        let registration = Registration { shared: self.shared.clone(), name, closed };
        Ok(ClientSide { to_service, from_service, finished, registration })
    }

    /// The stream of a name.
    ///
    /// # Errors
    /// [`StreamError::NotFound`].
    pub fn get(&self, namespace: &str, id: &str) -> Result<Stream, StreamError> {
        let registered = self.shared.lock();
        let entry = registered.get(&(namespace.to_owned(), id.to_owned()));
        entry.map(|entry| entry.stream.clone()).ok_or_else(|| StreamError::NotFound { id: id.to_owned() })
    }

    /// The streams that a lease was to keep, for a collection that begins now.
    pub(crate) fn leased(&self) -> Vec<Candidate> {
        let candidate = |((namespace, id), entry): (&Name, &Entry)| {
            Some(Candidate {
                namespace: namespace.clone(),
                id: id.clone(),
                lease: entry.lease.clone()?,
                stream: entry.stream.clone(),
            })
        };
        self.shared.lock().iter().filter_map(candidate).collect()
    }
}

impl Candidate {
    /// Closes the stream: nothing keeps it.
    pub(crate) fn close(self) {
        self.stream.close();
    }
}

/// A service's side of a stream. Clones are the same.
#[derive(Debug, Clone)]
pub struct Stream {
    id: Arc<str>,
    sender: mpsc::Sender<Any>,
    receiver: Arc<tokio::sync::Mutex<mpsc::Receiver<Any>>>,
    /// The client has said that it sends no more.
    finished: Arc<AtomicBool>,
    closed: CancellationToken,
}

impl Stream {
    /// Sends a message; waits while the client does not read.
    ///
    /// # Errors
    /// [`StreamError::Closed`].
    pub async fn send(&self, message: Any) -> Result<(), StreamError> {
        let closed = || StreamError::Closed { id: self.id.as_ref().to_owned() };
        // A send that is given up has sent nothing.
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(closed()),
            sent = self.sender.send(message) => sent.map_err(|_| closed()),
        }
    }

    /// The next message of the client; none when it has said that it sends no more.
    ///
    /// # Errors
    /// [`StreamError::Closed`], also when the client was lost: what it has sent may be a part.
    pub async fn receive(&self) -> Result<Option<Any>, StreamError> {
        let mut receiver = self.receiver.lock().await;
        // A receive that is given up has taken nothing.
        let message = tokio::select! {
            biased;
            () = self.closed.cancelled() => None,
            message = receiver.recv() => message,
        };
        if message.is_none() && !self.finished.load(Ordering::Acquire) {
            return Err(StreamError::Closed { id: self.id.as_ref().to_owned() });
        }
        Ok(message)
    }

    /// Ends the client's call, once it has been given all that was sent; its name is free.
    pub fn close(&self) {
        self.closed.cancel();
    }
}

/// The client's side of a stream. The registration lasts as long as it, or as what it was turned into.
#[derive(Debug)]
pub struct ClientSide {
    to_service: mpsc::Sender<Any>,
    from_service: mpsc::Receiver<Any>,
    finished: Arc<AtomicBool>,
    registration: Registration,
}

/// Frees the name when it is dropped.
#[derive(Debug)]
struct Registration {
    shared: Arc<Shared>,
    name: Name,
    closed: CancellationToken,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.closed.cancel();
        self.shared.lock().remove(&self.name);
    }
}

impl ClientSide {
    /// Where the client's messages go, and those that it is sent. When either is dropped, the client is gone, unless it has
    /// [finished](ToService::finish) before.
    pub fn split(self) -> (ToService, impl Messages<Item = Any> + Send + use<>) {
        let ClientSide { to_service, from_service, finished, registration } = self;
        let to_service = ToService { sender: to_service, finished, closed: registration.closed.clone() };
        let messages = unfold((from_service, registration, false), async |(mut messages, owner, ended)| {
            if !ended {
                // A receive that is given up has taken nothing.
                tokio::select! {
                    biased;
                    message = messages.recv() => return message.map(|message| (message, (messages, owner, false))),
                    () = owner.closed.cancelled() => messages.close(),
                }
            }
            messages.recv().await.map(|message| (message, (messages, owner, true)))
        });
        (to_service, messages)
    }
}

/// Takes the client's messages.
#[derive(Debug)]
pub struct ToService {
    sender: mpsc::Sender<Any>,
    finished: Arc<AtomicBool>,
    closed: CancellationToken,
}

impl ToService {
    /// Passes a message on; waits while the service does not read. False when the stream is closed.
    pub async fn send(&self, message: Any) -> bool {
        // A send that is given up has sent nothing.
        tokio::select! {
            biased;
            () = self.closed.cancelled() => false,
            sent = self.sender.send(message) => sent.is_ok(),
        }
    }

    /// The client sends no more, and still listens.
    pub fn finish(self) {
        self.finished.store(true, Ordering::Release);
    }

    /// Waits until the stream is closed.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::StreamExt;

    use super::*;

    fn message(text: &str) -> Any {
        Any { type_url: "x".into(), value: text.into() }
    }

    #[tokio::test]
    async fn both_sides_hear_each_other_until_one_ends() {
        let streams = Streams::default();
        let (to_service, from_service) = streams.register("ns", None, "s").unwrap().split();
        let mut from_service = pin!(from_service);
        let service = streams.get("ns", "s").unwrap();
        assert!(to_service.send(message("a")).await);
        assert_eq!(service.receive().await, Ok(Some(message("a"))));
        service.send(message("b")).await.unwrap();
        service.send(message("c")).await.unwrap();
        to_service.finish();
        assert_eq!(service.receive().await, Ok(None));
        service.close();
        let closed = StreamError::Closed { id: "s".into() };
        assert_eq!(service.send(message("d")).await, Err(closed));
        // What was sent before the end arrives.
        assert_eq!(from_service.next().await, Some(message("b")));
        assert_eq!(from_service.next().await, Some(message("c")));
        assert_eq!(from_service.next().await, None);
    }

    #[tokio::test]
    async fn a_name_is_taken_once_in_a_namespace_and_free_when_the_client_is_gone() {
        let streams = Streams::default();
        let first = streams.register("ns", None, "s").unwrap();
        let taken = StreamError::AlreadyExists { id: "s".into() };
        assert_eq!(streams.register("ns", None, "s").unwrap_err(), taken);
        let _other = streams.register("other", None, "s").unwrap();
        let service = streams.get("ns", "s").unwrap();
        drop(first);
        let closed = StreamError::Closed { id: "s".into() };
        assert_eq!(service.receive().await, Err(closed));
        assert_eq!(streams.get("ns", "s").unwrap_err(), StreamError::NotFound { id: "s".into() });
        streams.register("ns", None, "s").unwrap();
    }

    #[tokio::test]
    async fn a_client_that_is_lost_has_not_finished() {
        let streams = Streams::default();
        let (to_service, _from_service) = streams.register("ns", None, "s").unwrap().split();
        let service = streams.get("ns", "s").unwrap();
        assert!(to_service.send(message("a part")).await);
        drop(to_service);
        assert_eq!(service.receive().await, Ok(Some(message("a part"))));
        assert_eq!(service.receive().await, Err(StreamError::Closed { id: "s".into() }));
    }

    #[tokio::test]
    async fn who_sends_more_than_is_read_waits() {
        let streams = Streams::default();
        let (_to_service, from_service) = streams.register("ns", None, "s").unwrap().split();
        let service = streams.get("ns", "s").unwrap();
        for _ in 0..QUEUE {
            service.send(message("x")).await.unwrap();
        }
        {
            let mut one_more = pin!(service.send(message("last")));
            assert!(futures::poll!(&mut one_more).is_pending());
        }
        drop(from_service);
        service.send(message("x")).await.unwrap_err();
    }
}
