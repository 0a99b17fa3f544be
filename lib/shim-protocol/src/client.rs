//! A ttrpc client on tokio: the daemon's end of the connection to a shim.
//!
//! One connection carries any number of unary calls at once. A reading task hands each response to its call;
//! a writing task takes frames from a short queue. So a shim that does not read (it is stopped, say) makes
//! calls wait at most until their own deadline, and never anything else. Dropping a call gives it up; its
//! answer is ignored when it comes. There is no word in ttrpc to tell the other end so.
//!
//! **Invariant.** A connection ends only when the other end closes it, breaks the protocol, or
//! [`Client::close`] is called; never because of slowness.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use crate::frame::{self, Decoder, Received, RpcError};

/// Frames that wait to be written before calls wait to queue theirs.
const QUEUE: usize = 16;

/// The bytes that are read at once.
const READ: usize = 16 * 1024;

/// Why a call has no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The connection has ended, before the call or during it. The words of Go's client: clients know them.
    #[error("ttrpc: closed")]
    Closed,
    /// The deadline passed.
    #[error("no answer within {} ms", limit.as_millis())]
    Deadline {
        /// The time that the call had.
        limit: Duration,
    },
    /// The other end refused. Its text is unchanged.
    #[error("{}", error.message)]
    Refused {
        /// Its class and text.
        error: RpcError,
    },
    /// The request is too long for a frame.
    #[error("the request does not fit into a frame")]
    TooLong {
        /// Its length.
        source: frame::TooLong,
    },
    /// The response is too long for a frame, and was dropped.
    #[error("a response of {length} bytes is longer than a frame may be")]
    OversizedResponse {
        /// The length that it claimed.
        length: u32,
    },
    /// The reply is not the message that the method returns.
    #[error("the reply cannot be read")]
    Reply {
        /// Why not.
        source: prost::DecodeError,
    },
}

impl Coded for CallError {
    fn code(&self) -> ErrorCode {
        match self {
            CallError::Closed => ErrorCode::Unavailable,
            CallError::Deadline { .. } => ErrorCode::DeadlineExceeded,
            CallError::Refused { error } => error.code,
            CallError::TooLong { .. } | CallError::OversizedResponse { .. } => ErrorCode::ResourceExhausted,
            CallError::Reply { .. } => ErrorCode::Internal,
        }
    }
}

/// What a call is addressed to.
#[derive(Debug, Clone, Copy)]
pub struct Target<'call> {
    /// The full name of the service, such as `containerd.task.v2.Task`.
    pub service: &'call str,
    /// The method.
    pub method: &'call str,
    /// The namespace that goes along.
    pub namespace: &'call str,
    /// The most time for the call; the other end is told of it. `None` waits until the connection ends.
    pub limit: Option<Duration>,
}

/// One connection. Clones are the same connection; it is closed when the last of them is dropped.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
    frames: mpsc::Sender<Vec<u8>>,
    /// Closes the connection when the last client is dropped.
    _guard: Arc<Guard>,
}

#[derive(Debug)]
struct Shared {
    calls: Mutex<Calls>,
    closed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Calls {
    /// The number of the last stream; odd numbers are a client's.
    last: u32,
    /// `None` once the connection has ended.
    waiting: Option<HashMap<u32, oneshot::Sender<Outcome>>>,
}

type Outcome = Result<Vec<u8>, CallError>;

#[derive(Debug)]
struct Guard {
    shared: Arc<Shared>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        // A panic while the lock is held cannot leave the map half changed.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends every call and tells whoever waits for the end. The two tasks of the connection see it and go.
    fn end(&self) {
        let waiting = self.calls().waiting.take();
        // Dropping the senders answers their calls with `Closed`.
        drop(waiting);
        self.closed.send_replace(true);
    }
}

/// Takes a call out of the table when its caller gives it up.
struct Registration<'client> {
    shared: &'client Shared,
    stream: u32,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = &mut self.shared.calls().waiting {
            waiting.remove(&self.stream);
        }
    }
}

impl Client {
    /// Connects to the socket at `path`, if it is our own user who listens there: whoever else has got hold of the name
    /// would be trusted with containers, and believed what becomes of them.
    ///
    /// # Errors
    /// `ECONNREFUSED` and `ENOENT` when nobody listens there; `WouldBlock` (`EAGAIN`) when somebody does and
    /// has more connections waiting than it takes; `PermissionDenied` for a stranger.
    pub async fn connect(path: &Path) -> io::Result<Client> {
        let stream = UnixStream::connect(path).await?;
        let (listener, us) = (stream.peer_cred()?.uid(), nix::unistd::geteuid().as_raw());
        if listener != us {
            let text = format!("the socket is served by user {listener}, not by {us}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Client::new(stream))
    }

    /// Speaks over a stream that is connected. Must be called on a tokio runtime.
    pub fn new(stream: UnixStream) -> Client {
        let (read, write) = stream.into_split();
        let calls = Calls { last: u32::MAX, waiting: Some(HashMap::new()) };
        let shared = Arc::new(Shared { calls: Mutex::new(calls), closed: watch::Sender::new(false) });
        let (frames, queue) = mpsc::channel(QUEUE);
        tokio::spawn(read_responses(read, shared.clone()));
        tokio::spawn(write_frames(write, queue, shared.clone()));
        Client { shared: shared.clone(), frames, _guard: Arc::new(Guard { shared }) }
    }

    /// Makes a call and waits for its reply.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call<Reply: Message + Default>(
        &self,
        target: Target<'_>,
        message: &impl Message,
    ) -> Result<Reply, CallError> {
        let reply = match target.limit {
            None => self.exchange(target, message.encode_to_vec()).await?,
            Some(limit) => {
                let exchange = self.exchange(target, message.encode_to_vec());
                tokio::time::timeout(limit, exchange).await.map_err(|_| CallError::Deadline { limit })??
            }
        };
        Reply::decode(reply.as_slice()).map_err(|source| CallError::Reply { source })
    }

    async fn exchange(&self, target: Target<'_>, payload: Vec<u8>) -> Outcome {
        let metadata = [(frame::NAMESPACE_KEY, target.namespace)];
        let request = frame::request(target.service, target.method, payload, target.limit, &metadata);
        let (sender, answer) = oneshot::channel();
        let place = self.frames.reserve().await.map_err(|_| CallError::Closed)?;
        // Numbered and queued under one lock: numbers must rise on the wire.
        let registration = {
            let mut calls = self.shared.calls();
            let stream = calls.last.wrapping_add(2);
            let bytes =
                frame::encode_request(stream, &request).map_err(|source| CallError::TooLong { source })?;
            calls.waiting.as_mut().ok_or(CallError::Closed)?.insert(stream, sender);
            calls.last = stream;
            place.send(bytes);
            Registration { shared: &self.shared, stream }
        };
        let outcome = answer.await.unwrap_or(Err(CallError::Closed));
        drop(registration);
        outcome
    }

    /// Ends the connection; calls under way end with [`CallError::Closed`].
    pub fn close(&self) {
        self.shared.end();
    }

    /// True once the connection has ended.
    pub fn is_closed(&self) -> bool {
        *self.shared.closed.borrow()
    }

    /// Resolves when the connection has ended, by whichever side. The future does not keep the connection
    /// open.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closed = self.shared.closed.subscribe();
        async move {
            // An error means that the connection is not even remembered any more.
            let _ = closed.wait_for(|closed| *closed).await;
        }
    }
}

/// Resolves when the connection has ended.
async fn ended(shared: &Shared) {
    let mut closed = shared.closed.subscribe();
    let _ = closed.wait_for(|closed| *closed).await;
}

async fn read_responses(mut stream: OwnedReadHalf, shared: Arc<Shared>) {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; READ];
    loop {
        // Both arms may be dropped at any time: a read that is dropped has read nothing.
        let read = tokio::select! {
            read = stream.read(&mut buffer) => read,
            () = ended(&shared) => break,
        };
        match read {
            Ok(0) => break,
            Ok(length) => decoder.feed(&buffer[..length]),
            Err(error) => {
                tracing::debug!(%error, "ttrpc connection broke");
                break;
            }
        }
        while let Some(received) = decoder.next_frame() {
            deliver(&shared, received);
        }
    }
    shared.end();
}

fn deliver(shared: &Shared, received: Received) {
    let (stream, outcome) = match received {
        Received::Frame(frame) if frame.kind == frame::TYPE_RESPONSE => {
            let reply = frame::decode_response(&frame.payload);
            (frame.stream, reply.map_err(|error| CallError::Refused { error }))
        }
        Received::Oversized { stream, length, .. } => (stream, Err(CallError::OversizedResponse { length })),
        // Frames of kinds that we never asked for.
        Received::Frame(_) => return,
    };
    let waiting = shared.calls().waiting.as_mut().and_then(|waiting| waiting.remove(&stream));
    if let Some(call) = waiting {
        // Whoever gave the call up needs no answer.
        let _ = call.send(outcome);
    }
}

async fn write_frames(mut stream: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>, shared: Arc<Shared>) {
    loop {
        // A frame that is dropped between the queue and the socket is never half written: the connection ends
        // then.
        let written = tokio::select! {
            frame = queue.recv() => match frame {
                Some(bytes) => tokio::select! {
                    written = stream.write_all(&bytes) => written,
                    () = ended(&shared) => break,
                },
                None => break,
            },
            () = ended(&shared) => break,
        };
        if let Err(error) = written {
            tracing::debug!(%error, "ttrpc connection broke");
            // New calls are refused from here on. Answers that are on their way are still read; the end of
            // file behind them ends the connection.
            break;
        }
    }
}
