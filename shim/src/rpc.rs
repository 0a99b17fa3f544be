//! The ttrpc server: accepts clients of our own user, reads their requests, and answers each when it is done.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use davit_model::ErrorCode;
use davit_proto::containerd::ttrpc::Request;
use davit_shim_protocol::frame::{self, Decoder, Received, RpcError};
use nix::sys::socket::{MsgFlags, SockFlag, accept4, getsockopt, send, sockopt};
use nix::unistd::{geteuid, read};

use crate::executor::{Either, race, spawn};
use crate::log;
use crate::reactor::{Async, sleep};
use crate::service;
use crate::shim::Shim;
use crate::sync::Condition;

/// The calls that one client can have open. Daemons hold one `Wait` per process.
const MAX_CALLS: usize = 16 * 1024;
/// The answers that a client can leave unread before its next requests are.
const MAX_UNREAD: usize = 4 << 20;

/// Accepts clients for ever.
pub(crate) async fn serve(shim: Rc<Shim>, listener: OwnedFd) -> io::Result<()> {
    let listener = Async::new(listener)?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let accepted = listener
            .read_with(|listener| {
                let number = accept4(listener.as_raw_fd(), flags)?;
                davit_sys::io::inherited(number)
            })
            .await;
        match accepted {
            Ok(client) => accept(&shim, client),
            Err(error) => {
                // A client that has left already, or no descriptor to be had at present.
                log::warn(format_args!("accept client: {error}"));
                sleep(std::time::Duration::from_millis(10)).await;
            }
        }
    }
}

fn accept(shim: &Rc<Shim>, client: OwnedFd) {
    let peer = getsockopt(&client, sockopt::PeerCredentials);
    if !peer.is_ok_and(|peer| peer.uid() == geteuid().as_raw()) {
        log::warn("refused a client of another user");
        return;
    }
    let socket = match Async::new(client) {
        Ok(socket) => socket,
        Err(error) => return log::warn(format_args!("watch client: {error}")),
    };
    // Whoever connects is a daemon, mostly one that has just come back.
    shim.outbox.poke();
    let connection = Rc::new(Connection {
        socket,
        answers: RefCell::default(),
        unread: Cell::new(0),
        calls: Cell::new(0),
        closed: Cell::new(false),
        changed: Condition::default(),
    });
    spawn(connection.clone().write_answers());
    let shim = shim.clone();
    spawn(async move {
        shim.client_came();
        connection.read_requests(shim.clone()).await;
        shim.client_left();
    });
}

struct Connection {
    socket: Async<OwnedFd>,
    answers: RefCell<VecDeque<Vec<u8>>>,
    unread: Cell<usize>,
    calls: Cell<usize>,
    closed: Cell<bool>,
    changed: Condition,
}

impl Connection {
    async fn read_requests(self: Rc<Connection>, shim: Rc<Shim>) {
        let mut decoder = Decoder::new();
        loop {
            while let Some(received) = decoder.next_frame() {
                self.receive(&shim, received);
            }
            self.changed.until(|| self.closed.get() || self.unread.get() < MAX_UNREAD).await;
            let count = self.socket.read_with(|socket| {
                let mut buffer = [0; 4096];
                let count = read(socket, &mut buffer)?;
                decoder.feed(&buffer[..count]);
                Ok(count)
            });
            match count.await {
                Ok(count) if count > 0 && !self.closed.get() => {}
                Ok(_) | Err(_) => return self.close(),
            }
        }
    }

    fn receive(self: &Rc<Connection>, shim: &Rc<Shim>, received: Received) {
        match received {
            Received::Frame(frame) if frame.kind == frame::TYPE_REQUEST => {
                match frame::decode_request(&frame.payload) {
                    Ok(request) => self.start_call(shim, frame.stream, request),
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

    fn start_call(self: &Rc<Connection>, shim: &Rc<Shim>, stream: u32, request: Request) {
        if self.calls.get() >= MAX_CALLS {
            let message = "too many calls at once: resource exhausted";
            return self.answer(stream, Err(RpcError::new(ErrorCode::ResourceExhausted, message)));
        }
        log::debug(format_args!("call {}/{}", request.service, request.method));
        self.calls.set(self.calls.get() + 1);
        let (connection, shim) = (self.clone(), shim.clone());
        spawn(async move {
            let result = connection.call(shim, request).await;
            connection.calls.set(connection.calls.get() - 1);
            if let Some(result) = result {
                connection.answer(stream, result);
            }
        });
    }

    /// The result of a call, `None` if nobody is there to receive it. A caller that gives up or leaves does
    /// not stop what it has begun, only its waiting.
    async fn call(&self, shim: Rc<Shim>, request: Request) -> Option<Result<Vec<u8>, RpcError>> {
        let timeout = frame::timeout(&request);
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
        let result = if only_waits { race(work, given_up).await } else { race(spawn(work), given_up).await };
        match result {
            Either::First(result) => Some(result.map_err(RpcError::from)),
            Either::Second(given_up) => given_up,
        }
    }

    fn answer(&self, stream: u32, result: Result<Vec<u8>, RpcError>) {
        if self.closed.get() {
            return;
        }
        let bytes = frame::encode_response(stream, &result);
        self.unread.set(self.unread.get() + bytes.len());
        self.answers.borrow_mut().push_back(bytes);
        self.changed.changed();
    }

    async fn write_answers(self: Rc<Connection>) {
        loop {
            self.changed.until(|| self.closed.get() || !self.answers.borrow().is_empty()).await;
            let next = self.answers.borrow_mut().pop_front();
            let Some(answer) = next else { return };
            let mut bytes = answer.as_slice();
            while !bytes.is_empty() {
                let sent = self
                    .socket
                    .write_with(|socket| Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?))
                    .await;
                match sent {
                    Ok(count) => bytes = &bytes[count..],
                    Err(_) => return self.close(),
                }
            }
            self.unread.set(self.unread.get().saturating_sub(answer.len()));
            self.changed.changed();
        }
    }

    fn close(&self) {
        self.closed.set(true);
        self.answers.borrow_mut().clear();
        self.unread.set(0);
        self.changed.changed();
    }
}
