//! The ttrpc client of the daemon's event service. One connection, one call at a time.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use davit_model::ErrorCode;
use davit_shim_protocol::address;
use davit_shim_protocol::frame::{self, Decoder, NAMESPACE_KEY, Received, RpcError};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket};
use nix::unistd::read;

use crate::executor::{Either, race};
use crate::reactor::{Async, sleep};

/// The time that the daemon has to acknowledge an event (containerd `pkg/shim/publisher.go`).
const TIMEOUT: Duration = Duration::from_secs(5);

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
const METHOD: &str = "Forward";

/// Sends events to the daemon.
pub(crate) struct Publisher {
    address: Option<PathBuf>,
    namespace: String,
    connection: Option<Connection>,
}

struct Connection {
    socket: Async<OwnedFd>,
    decoder: Decoder,
    stream: u32,
}

impl Publisher {
    /// A client of the socket at `address`, the value of `TTRPC_ADDRESS`. It is not connected yet.
    pub(crate) fn new(address: &str, namespace: String) -> Publisher {
        Publisher { address: address::parse(address).ok(), namespace, connection: None }
    }

    /// Sends an encoded `ForwardRequest` and waits until the daemon has acknowledged it.
    ///
    /// # Errors
    /// The daemon's answer, or `Unavailable` if there is none.
    pub(crate) async fn forward(&mut self, request: &[u8]) -> Result<(), RpcError> {
        // A connection from before may have died with the daemon at its other end; a new one then tells more.
        if let Some(connection) = self.connection.take()
            && let Ok(answer) = self.exchange(connection, request).await
        {
            return answer;
        }
        let connection = self.connect().map_err(unavailable)?;
        self.exchange(connection, request).await.unwrap_or_else(|error| Err(unavailable(error)))
    }

    fn connect(&self) -> io::Result<Connection> {
        let Some(path) = &self.address else { return Err(io::ErrorKind::NotFound.into()) };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // A unix socket connects at once, or fails with EAGAIN if the daemon does not accept.
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Connection { socket: Async::new(socket)?, decoder: Decoder::new(), stream: 1 })
    }

    /// Makes one call. The connection is kept only if it worked.
    async fn exchange(
        &mut self,
        mut connection: Connection,
        request: &[u8],
    ) -> io::Result<Result<(), RpcError>> {
        let metadata = [(NAMESPACE_KEY, self.namespace.as_str())];
        let request = frame::request(SERVICE, METHOD, request.to_vec(), Some(TIMEOUT), &metadata);
        let stream = connection.stream;
        let bytes = match frame::encode_request(stream, &request) {
            Ok(bytes) => bytes,
            Err(error) => return Ok(Err(RpcError::new(ErrorCode::ResourceExhausted, error.to_string()))),
        };
        let answer = match race(connection.call(&bytes), sleep(TIMEOUT)).await {
            Either::First(answer) => answer?,
            Either::Second(()) => return Err(io::ErrorKind::TimedOut.into()),
        };
        connection.stream = stream.wrapping_add(2);
        self.connection = Some(connection);
        Ok(answer)
    }
}

impl Connection {
    async fn call(&mut self, mut bytes: &[u8]) -> io::Result<Result<(), RpcError>> {
        while !bytes.is_empty() {
            let flags = MsgFlags::MSG_NOSIGNAL;
            let sent = self.socket.write_with(|socket| Ok(send(socket.as_raw_fd(), bytes, flags)?)).await?;
            bytes = &bytes[sent..];
        }
        loop {
            while let Some(received) = self.decoder.next_frame() {
                if let Received::Frame(frame) = received
                    && frame.stream == self.stream
                    && frame.kind == frame::TYPE_RESPONSE
                {
                    return Ok(frame::decode_response(&frame.payload).map(drop));
                }
            }
            let mut buffer = [0; 512];
            let count = self.socket.read_with(|socket| Ok(read(socket, &mut buffer)?)).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.decoder.feed(&buffer[..count]);
        }
    }
}

fn unavailable(error: io::Error) -> RpcError {
    RpcError::new(ErrorCode::Unavailable, format!("event service: {error}: unavailable"))
}
