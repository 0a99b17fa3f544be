//! As much of ttrpc as it takes to drive a shim: a client for one call at a time, and a daemon's end for events, which
//! takes all of them.
//!
//! A frame is its length, the number of its stream (both big-endian, four bytes), a kind, a byte of flags, and a message.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use davit_proto::containerd::ttrpc::{KeyValue, Request, Response};
use prost::Message;

use crate::wait::PATIENCE;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// The longest message (`github.com/containerd/ttrpc`).
const MAX_LENGTH: usize = 4 << 20;

/// A connection to a shim.
pub struct Client {
    stream: UnixStream,
    namespace: String,
    last: u32,
}

impl Client {
    /// Connects to a shim's socket, for calls in a namespace.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(socket: &Path, namespace: &str) -> Result<Client> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("no shim on {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Client { stream, namespace: namespace.to_owned(), last: u32::MAX })
    }

    /// Makes a call and waits for its answer.
    ///
    /// # Errors
    /// The shim refuses, or ends.
    pub fn call<Reply: Message + Default>(
        &mut self,
        service: &str,
        method: &str,
        message: &impl Message,
    ) -> Result<Reply> {
        self.send(service, method, message)?;
        self.receive().with_context(|| format!("call {method}"))
    }

    /// Begins a call, which is the only one until its answer is [received](Client::receive).
    ///
    /// # Errors
    /// The shim has ended.
    pub fn send(&mut self, service: &str, method: &str, message: &impl Message) -> Result<()> {
        self.last = self.last.wrapping_add(2);
        let request = Request {
            service: service.into(),
            method: method.into(),
            payload: message.encode_to_vec(),
            metadata: vec![KeyValue {
                key: "containerd-namespace-ttrpc".into(),
                value: self.namespace.clone(),
            }],
            ..Request::default()
        };
        write_frame(&mut self.stream, self.last, REQUEST, &request)
    }

    /// Waits for the answer to the call that was begun.
    ///
    /// # Errors
    /// The shim refuses, or ends.
    pub fn receive<Reply: Message + Default>(&mut self) -> Result<Reply> {
        let (stream, kind, payload) = read_frame(&mut self.stream)?;
        ensure!(stream == self.last && kind == RESPONSE, "a frame {kind} of stream {stream}");
        let response = Response::decode(payload.as_slice())?;
        if let Some(status) = response.status.filter(|status| status.code != 0) {
            bail!("{}", status.message);
        }
        Ok(Reply::decode(response.payload.as_slice())?)
    }
}

/// Listens where shims send their events, and takes them all, until the process ends.
///
/// # Errors
/// The socket cannot be made.
pub fn take_events(socket: &Path) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || acknowledge(stream));
        }
    });
    Ok(())
}

/// Answers each request with an empty message; the end of the connection is an error.
fn acknowledge(mut stream: UnixStream) -> Result<()> {
    loop {
        let (number, kind, _) = read_frame(&mut stream)?;
        if kind == REQUEST {
            write_frame(&mut stream, number, RESPONSE, &Response::default())?;
        }
    }
}

fn write_frame(stream: &mut UnixStream, number: u32, kind: u8, message: &impl Message) -> Result<()> {
    let payload = message.encode_to_vec();
    let mut frame = u32::try_from(payload.len())?.to_be_bytes().to_vec();
    frame.extend(number.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(payload);
    Ok(stream.write_all(&frame)?)
}

fn read_frame(stream: &mut UnixStream) -> Result<(u32, u8, Vec<u8>)> {
    let mut head = [0; 10];
    stream.read_exact(&mut head)?;
    let [a, b, c, d, e, f, g, h, kind, _flags] = head;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    ensure!(length <= MAX_LENGTH, "a frame of {length} bytes");
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((u32::from_be_bytes([e, f, g, h]), kind, payload))
}
