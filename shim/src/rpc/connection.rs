//! One client: reads its requests, and answers each when it is done.
//!
//! All that is known of a client lies in [`Connection`] itself at each `.await`, so that an upgrade can hand it on:
//! the part of a frame that has come, the answers that the client has not taken, and the calls that only wait, which
//! the next program simply makes again.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use davit_model::ErrorCode;
use davit_proto::containerd::ttrpc::Request;
use davit_shim_protocol::frame::{self, Decoder, Received, RpcError};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::read;
use prost::Message;

use super::Server;
use crate::executor::{Either, race, spawn};
use crate::quiesce::{self, Busy};
use crate::reactor::{Async, sleep, yield_now};
use crate::shim::Shim;
use crate::sync::Condition;
use crate::{control, log, service, state};

/// The calls that one client can have open. Daemons hold one `Wait` per process.
const MAX_CALLS: usize = 16 * 1024;
/// The answers that a client can leave unread before its next requests are.
const MAX_UNREAD: usize = 4 << 20;

/// A client of the shim.
pub(crate) struct Connection {
    socket: Async<OwnedFd>,
    /// Holds the beginning of a frame at most, but while it is being read from.
    decoder: RefCell<Decoder>,
    /// The first of them has been sent up to `sent`.
    answers: RefCell<VecDeque<Vec<u8>>>,
    sent: Cell<usize>,
    unread: Cell<usize>,
    calls: Cell<usize>,
    /// The calls that only wait, by their streams.
    waits: RefCell<BTreeMap<u32, Waiting>>,
    closed: Cell<bool>,
    changed: Condition,
}

/// A call that can be made again.
struct Waiting {
    request: Vec<u8>,
    deadline: Option<Instant>,
}

impl Connection {
    /// A client that has just connected.
    ///
    /// # Errors
    /// The socket cannot be watched.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Connection> {
        Ok(Connection {
            socket: Async::new(socket)?,
            decoder: RefCell::default(),
            answers: RefCell::default(),
            sent: Cell::new(0),
            unread: Cell::new(0),
            calls: Cell::new(0),
            waits: RefCell::default(),
            closed: Cell::new(false),
            changed: Condition::default(),
        })
    }

    pub(super) async fn read_requests(self: Rc<Connection>, server: &Rc<Server>) {
        loop {
            loop {
                let received = self.decoder.borrow_mut().next_frame();
                let Some(received) = received else { break };
                self.receive(server, received);
            }
            // The calls get their turn, and with it their answers are counted: a client that sends without end is neither
            // served before all others nor ahead of its own answers.
            yield_now().await;
            self.changed.until(|| self.closed.get() || self.unread.get() < MAX_UNREAD).await;
            self.socket.readable().await;
            // What is not read stays in the socket, for whoever reads next.
            quiesce::opened().await;
            let mut buffer = [0; 4096];
            match read(self.socket.get(), &mut buffer) {
                Ok(count) if count > 0 && !self.closed.get() => {
                    self.decoder.borrow_mut().feed(&buffer[..count]);
                }
                Err(nix::errno::Errno::EAGAIN) => self.socket.clear_readable(),
                Err(nix::errno::Errno::EINTR) => {}
                Ok(_) | Err(_) => return self.close(),
            }
        }
    }

    fn receive(self: &Rc<Connection>, server: &Rc<Server>, received: Received) {
        match received {
            Received::Frame(frame) if frame.kind == frame::TYPE_REQUEST => {
                match frame::decode_request(&frame.payload) {
                    Ok(request) => {
                        let timeout = frame::timeout(&request);
                        self.start_call(server, frame.stream, request, timeout);
                    }
                    Err(error) => self.answer(frame.stream, Err(error)),
                }
            }
            // Unary calls have no data; what else there may be is from a later protocol.
            Received::Frame(_) => {}
            Received::Oversized { stream, kind: frame::TYPE_REQUEST, length } => {
                let message = format!(
                    "message length {length} exceed maximum message size of {}: resource exhausted",
                    frame::MAX_PAYLOAD
                );
                self.answer(stream, Err(RpcError::new(ErrorCode::ResourceExhausted, message)));
            }
            Received::Oversized { .. } => {}
        }
    }

    fn start_call(
        self: &Rc<Connection>,
        server: &Rc<Server>,
        stream: u32,
        request: Request,
        timeout: Option<Duration>,
    ) {
        if self.calls.get() >= MAX_CALLS {
            let message = "too many calls at once: resource exhausted";
            return self.answer(stream, Err(RpcError::new(ErrorCode::ResourceExhausted, message)));
        }
        log::debug(format_args!("call {}/{}", request.service, request.method));
        if request.service == control::SERVICE {
            if let Some(result) = control::call(server, self, stream, request) {
                self.answer(stream, result.map_err(RpcError::from));
            }
            return;
        }
        self.calls.set(self.calls.get() + 1);
        let only_waits = service::only_waits(&request);
        if only_waits {
            let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
            let waiting = Waiting { request: request.encode_to_vec(), deadline };
            self.waits.borrow_mut().insert(stream, waiting);
        }
        // Until its answer lies among the others, beside what the work itself holds, which may take longer.
        let busy = (!only_waits).then(Busy::begin);
        let (connection, shim) = (self.clone(), server.shim.clone());
        spawn(async move {
            let result = connection.call(shim, request, timeout).await;
            connection.calls.set(connection.calls.get() - 1);
            connection.waits.borrow_mut().remove(&stream);
            if let Some(result) = result {
                connection.answer(stream, result);
            }
            drop(busy);
        });
    }

    /// The result of a call, `None` if nobody is there to receive it. A caller that gives up or leaves does
    /// not stop what it has begun, only its waiting.
    async fn call(
        &self,
        shim: Rc<Shim>,
        request: Request,
        timeout: Option<Duration>,
    ) -> Option<Result<Vec<u8>, RpcError>> {
        let only_waits = service::only_waits(&request);
        let given_up = async {
            let closed = self.changed.until(|| self.closed.get());
            match timeout {
                None => {
                    closed.await;
                    None
                }
                Some(timeout) => match race(closed, sleep(timeout)).await {
                    Either::First(()) => None,
                    Either::Second(()) => {
                        let text = ErrorCode::DeadlineExceeded.text();
                        Some(Err(RpcError::new(ErrorCode::DeadlineExceeded, text)))
                    }
                },
            }
        };
        let work = service::call(shim, request);
        let result = if only_waits {
            race(work, given_up).await
        } else {
            let busy = Busy::begin();
            let work = async move {
                let result = work.await;
                drop(busy);
                result
            };
            race(spawn(work), given_up).await
        };
        match result {
            Either::First(result) => Some(result.map_err(RpcError::from)),
            Either::Second(given_up) => given_up,
        }
    }

    /// Answers the call of a stream.
    pub(crate) fn answer(&self, stream: u32, result: Result<Vec<u8>, RpcError>) {
        self.push(frame::encode_response(stream, &result));
    }

    fn push(&self, bytes: Vec<u8>) {
        if self.closed.get() {
            return;
        }
        self.unread.set(self.unread.get() + bytes.len());
        self.answers.borrow_mut().push_back(bytes);
        self.changed.changed();
    }

    pub(super) async fn write_answers(self: Rc<Connection>) {
        loop {
            self.changed.until(|| self.closed.get() || !self.answers.borrow().is_empty()).await;
            let send_some = |socket: &OwnedFd| {
                let answers = self.answers.borrow();
                let rest = answers.front().map(|answer| &answer[self.sent.get()..]).unwrap_or_default();
                Ok(send(socket.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL)?)
            };
            if self.closed.get() {
                return;
            }
            match self.socket.write_with(send_some).await {
                Ok(count) => self.sent(count),
                Err(_) => return self.close(),
            }
        }
    }

    /// Takes note that so many bytes of the first answer have been taken.
    fn sent(&self, count: usize) {
        let mut answers = self.answers.borrow_mut();
        // A connection that was closed meanwhile has none any more.
        let Some(length) = answers.front().map(Vec::len) else { return };
        self.sent.set(self.sent.get() + count);
        if self.sent.get() >= length {
            answers.pop_front();
            drop(answers);
            self.sent.set(0);
            self.unread.set(self.unread.get().saturating_sub(length));
            self.changed.changed();
        }
    }

    fn close(&self) {
        self.closed.set(true);
        self.answers.borrow_mut().clear();
        self.sent.set(0);
        self.unread.set(0);
        self.changed.changed();
    }

    /// Whether nobody is there any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Describes the connection for [`Connection::restore`].
    pub(crate) fn save(&self, lend: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> state::Connection {
        let decoder = self.decoder.borrow();
        let (partial, to_drop) = decoder.remainder();
        let mut answers: Vec<u8> = self.answers.borrow().iter().flatten().copied().collect();
        answers.drain(..self.sent.get());
        let now = Instant::now();
        let save = |(stream, waiting): (&u32, &Waiting)| state::Call {
            stream: *stream,
            request: waiting.request.clone(),
            // One that is over its time is given up by the next program.
            left_micros: waiting.deadline.map(|deadline| {
                let left = deadline.saturating_duration_since(now).as_micros();
                u64::try_from(left).unwrap_or(u64::MAX)
            }),
        };
        state::Connection {
            socket: lend(self.socket.get().as_fd()),
            partial: partial.to_vec(),
            to_drop: to_drop as u64,
            answers,
            calls: self.waits.borrow().iter().map(save).collect(),
        }
    }

    /// The connection that was saved. Its calls are to be made again by [`Connection::call_again`] when all containers are
    /// there.
    ///
    /// # Errors
    /// The socket is missing or cannot be watched.
    pub(crate) fn restore(
        saved: &state::Connection,
        take: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Connection> {
        let connection = Connection::new(take(saved.socket)?)?;
        *connection.decoder.borrow_mut() =
            Decoder::resume(saved.partial.clone(), usize::try_from(saved.to_drop).unwrap_or(usize::MAX));
        if !saved.answers.is_empty() {
            connection.push(saved.answers.clone());
        }
        Ok(connection)
    }

    /// Makes the calls again that only waited.
    pub(crate) fn call_again(self: &Rc<Connection>, server: &Rc<Server>, calls: Vec<state::Call>) {
        for call in calls {
            match frame::decode_request(&call.request) {
                Ok(request) => {
                    let left = call.left_micros.map(Duration::from_micros);
                    self.start_call(server, call.stream, request, left);
                }
                Err(error) => self.answer(call.stream, Err(error)),
            }
        }
    }
}
