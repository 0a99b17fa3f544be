//! The frames of ttrpc, without any I/O: bytes go in, frames come out, and back.
//!
//! A frame is ten bytes of header and a payload of at most 4 MiB (ttrpc `PROTOCOL.md`):
//! ```text
//! length u32 | stream u32 | type u8 | flags u8 | payload      all integers big endian
//! ```
//! A client opens a stream, of an odd and rising number, with a request; a server answers with one response
//! on the same stream. This project makes and serves unary calls alone.
//!
//! This file is also the only place where the project's error codes become a `google.rpc.Status` on a ttrpc
//! connection, and back.

use std::time::Duration;

use davit_model::{Coded, ErrorCode};
use davit_proto::containerd::ttrpc::{KeyValue, Request, Response};
use davit_proto::google::rpc::Status;
use prost::Message;

/// The bytes of a frame's header.
pub const HEADER_LENGTH: usize = 10;

/// The most bytes of a payload.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// A frame that opens a stream.
pub const TYPE_REQUEST: u8 = 1;
/// A frame that answers, and closes the stream.
pub const TYPE_RESPONSE: u8 = 2;
/// A frame of a streaming call.
pub const TYPE_DATA: u8 = 3;

/// Set on the last frame that the sender has for a stream.
pub const FLAG_REMOTE_CLOSED: u8 = 1;
/// Set on a request whose sender will send data frames.
pub const FLAG_REMOTE_OPEN: u8 = 2;
/// Set on a data frame without a message.
pub const FLAG_NO_DATA: u8 = 4;

/// The metadata key of the namespace (containerd `pkg/namespaces`).
pub const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The number of the stream.
    pub stream: u32,
    /// One of the `TYPE_` constants, or something unknown.
    pub kind: u8,
    /// The `FLAG_` bits.
    pub flags: u8,
    /// The message.
    pub payload: Vec<u8>,
}

/// What the decoder found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A whole frame.
    Frame(Frame),
    /// A frame that is longer than [`MAX_PAYLOAD`]; its payload is dropped as it arrives. A server answers
    /// with
    /// `ResourceExhausted` and goes on, as Go's does.
    Oversized {
        /// The number of its stream.
        stream: u32,
        /// Its type.
        kind: u8,
        /// The length that it claims.
        length: u32,
    },
}

/// Cuts a stream of bytes into frames. It holds at most one frame and what was fed together with it.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Where the bytes begin that are not consumed yet.
    start: usize,
    /// The bytes of an oversized payload that are still to come.
    to_drop: usize,
}

impl Decoder {
    /// A decoder at the start of a connection.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// What [`Decoder::resume`] needs to go on: the bytes that are not consumed, and how many are to be dropped of
    /// those that come next.
    pub fn remainder(&self) -> (&[u8], usize) {
        (&self.buffer[self.start..], self.to_drop)
    }

    /// A decoder in the middle of a connection, where another one left off.
    pub fn resume(buffer: Vec<u8>, to_drop: usize) -> Decoder {
        Decoder { buffer, start: 0, to_drop }
    }

    /// Takes in bytes from the connection. Call [`Decoder::next_frame`] until it returns `None` before
    /// feeding more: then memory stays bounded by one frame.
    pub fn feed(&mut self, bytes: &[u8]) {
        let dropped = self.to_drop.min(bytes.len());
        self.to_drop -= dropped;
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(&bytes[dropped..]);
    }

    /// The next frame, or `None` if more bytes are needed for it.
    pub fn next_frame(&mut self) -> Option<Received> {
        let available = &self.buffer[self.start..];
        let (header, rest) = available.split_at_checked(HEADER_LENGTH)?;
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let stream = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let (kind, flags) = (header[8], header[9]);
        if length as usize > MAX_PAYLOAD {
            let here = rest.len().min(length as usize);
            self.to_drop = length as usize - here;
            self.consume(HEADER_LENGTH + here);
            return Some(Received::Oversized { stream, kind, length });
        }
        let payload = rest.get(..length as usize)?.to_vec();
        self.consume(HEADER_LENGTH + payload.len());
        Some(Received::Frame(Frame { stream, kind, flags, payload }))
    }

    fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.clear();
            // One large message must not cost its memory for the life of the connection.
            if self.buffer.capacity() > 64 * 1024 {
                self.buffer = Vec::new();
            }
        }
    }
}

/// A message that no frame can carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("message length {length} exceed maximum message size of {MAX_PAYLOAD}")]
pub struct TooLong {
    /// Its bytes.
    pub length: usize,
}

impl Coded for TooLong {
    fn code(&self) -> ErrorCode {
        ErrorCode::ResourceExhausted
    }
}

/// Encodes a frame.
///
/// # Errors
/// [`TooLong`] above [`MAX_PAYLOAD`].
pub fn encode(stream: u32, kind: u8, flags: u8, payload: &[u8]) -> Result<Vec<u8>, TooLong> {
    if payload.len() > MAX_PAYLOAD {
        return Err(TooLong { length: payload.len() });
    }
    let mut bytes = Vec::with_capacity(HEADER_LENGTH + payload.len());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(&[kind, flags]);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// What a call ended with, if not with a reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// The class.
    pub code: ErrorCode,
    /// The text for people, and for those clients that read it.
    pub message: String,
}

impl RpcError {
    /// An error of this class with this text.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> RpcError {
        RpcError { code, message: message.into() }
    }
}

impl Coded for RpcError {
    fn code(&self) -> ErrorCode {
        self.code
    }
}

/// Builds the request of a unary call.
pub fn request(
    service: &str,
    method: &str,
    payload: Vec<u8>,
    timeout: Option<Duration>,
    metadata: &[(&str, &str)],
) -> Request {
    Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload,
        timeout_nano: timeout.map_or(0, |timeout| i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX)),
        metadata: metadata
            .iter()
            .map(|(key, value)| KeyValue { key: (*key).to_owned(), value: (*value).to_owned() })
            .collect(),
    }
}

/// Encodes a request as the frame that opens `stream`.
///
/// # Errors
/// [`TooLong`].
pub fn encode_request(stream: u32, request: &Request) -> Result<Vec<u8>, TooLong> {
    encode(stream, TYPE_REQUEST, FLAG_REMOTE_CLOSED, &request.encode_to_vec())
}

/// Decodes the payload of a request frame.
///
/// # Errors
/// `InvalidArgument` for what is no request.
pub fn decode_request(payload: &[u8]) -> Result<Request, RpcError> {
    Request::decode(payload).map_err(|error| {
        RpcError::new(ErrorCode::InvalidArgument, format!("unmarshal request: {error}: invalid argument"))
    })
}

/// The time that the caller of a request is ready to wait, if it says so.
pub fn timeout(request: &Request) -> Option<Duration> {
    u64::try_from(request.timeout_nano).ok().filter(|nanos| *nanos > 0).map(Duration::from_nanos)
}

/// The first value of a metadata key.
pub fn metadata<'request>(request: &'request Request, key: &str) -> Option<&'request str> {
    request.metadata.iter().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
}

/// Encodes the answer to the request of `stream`. A reply that is too long becomes an error that says so.
pub fn encode_response(stream: u32, result: &Result<Vec<u8>, RpcError>) -> Vec<u8> {
    let response = match result {
        // The Go client reads an absent status and one of code 0 alike.
        Ok(payload) => Response { status: None, payload: payload.clone() },
        Err(error) => Response { status: Some(to_status(error)), payload: Vec::new() },
    };
    encode(stream, TYPE_RESPONSE, 0, &response.encode_to_vec()).unwrap_or_else(|too_long| {
        let mut error = RpcError::new(ErrorCode::ResourceExhausted, too_long.to_string());
        error.message.truncate(1024);
        let response = Response { status: Some(to_status(&error)), payload: Vec::new() };
        let payload = response.encode_to_vec();
        let mut bytes = Vec::with_capacity(HEADER_LENGTH + payload.len());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(&[TYPE_RESPONSE, 0]);
        bytes.extend_from_slice(&payload);
        bytes
    })
}

/// Decodes the payload of a response frame into the reply's message or the callee's error.
///
/// # Errors
/// The error that was answered, or `Internal` for what is no response.
pub fn decode_response(payload: &[u8]) -> Result<Vec<u8>, RpcError> {
    let response = Response::decode(payload).map_err(|error| {
        RpcError::new(ErrorCode::Internal, format!("unmarshal response: {error}: internal"))
    })?;
    match response.status {
        Some(status) if status.code != 0 => Err(from_status(status)),
        Some(_) | None => Ok(response.payload),
    }
}

fn to_status(error: &RpcError) -> Status {
    Status { code: error.code.number(), message: error.message.clone(), details: Vec::new() }
}

fn from_status(status: Status) -> RpcError {
    RpcError { code: ErrorCode::from_number(status.code), message: status.message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(decoder: &mut Decoder) -> Vec<Received> {
        std::iter::from_fn(|| decoder.next_frame()).collect()
    }

    #[test]
    fn the_layout_is_that_of_the_protocol() {
        let bytes = encode(0x0102_0305, TYPE_REQUEST, FLAG_REMOTE_CLOSED, b"ab").unwrap();
        assert_eq!(bytes, [0, 0, 0, 2, 1, 2, 3, 5, 1, 1, b'a', b'b']);
    }

    #[test]
    fn an_oversized_frame_is_dropped_and_the_next_one_read() {
        let length = MAX_PAYLOAD as u32 + 1;
        let mut decoder = Decoder::new();
        let mut header = Vec::new();
        header.extend_from_slice(&length.to_be_bytes());
        header.extend_from_slice(&[0, 0, 0, 3, TYPE_REQUEST, 0]);
        decoder.feed(&header);
        assert_eq!(all(&mut decoder), [Received::Oversized { stream: 3, kind: TYPE_REQUEST, length }]);
        let chunk = vec![0xffu8; 1 << 20];
        let mut left = length as usize;
        while left > 0 {
            let part = left.min(chunk.len());
            decoder.feed(&chunk[..part]);
            left -= part;
            assert_eq!(all(&mut decoder), []);
        }
        assert!(decoder.buffer.is_empty());
        decoder.feed(&encode(5, TYPE_REQUEST, 0, b"x").unwrap());
        assert!(matches!(&all(&mut decoder)[..], [Received::Frame(frame)] if frame.stream == 5));
    }

    #[test]
    fn every_error_code_survives_the_wire() {
        for code in ErrorCode::ALL {
            let error = RpcError::new(code, format!("some thing: {}", code.text()));
            let bytes = encode_response(7, &Err(error.clone()));
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            let Some(Received::Frame(frame)) = decoder.next_frame() else { panic!("no frame") };
            assert_eq!((frame.stream, frame.kind), (7, TYPE_RESPONSE));
            assert_eq!(decode_response(&frame.payload), Err(error));
        }
        let bytes = encode_response(7, &Ok(b"reply".to_vec()));
        assert_eq!(decode_response(&bytes[HEADER_LENGTH..]), Ok(b"reply".to_vec()));
    }

    #[test]
    fn a_reply_that_is_too_long_becomes_an_error() {
        let bytes = encode_response(1, &Ok(vec![0; MAX_PAYLOAD + 1]));
        let error = decode_response(&bytes[HEADER_LENGTH..]).unwrap_err();
        assert_eq!(error.code, ErrorCode::ResourceExhausted);
        assert!(encode(1, TYPE_REQUEST, 0, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    #[test]
    fn requests_carry_their_deadline_and_metadata() {
        let built = request("s", "m", b"p".to_vec(), Some(Duration::from_secs(5)), &[(NAMESPACE_KEY, "ns")]);
        let bytes = encode_request(1, &built).unwrap();
        let decoded = decode_request(&bytes[HEADER_LENGTH..]).unwrap();
        assert_eq!(decoded, built);
        assert_eq!(timeout(&decoded), Some(Duration::from_secs(5)));
        assert_eq!(metadata(&decoded, NAMESPACE_KEY), Some("ns"));
        assert_eq!(metadata(&decoded, "other"), None);
        assert_eq!(timeout(&request("s", "m", vec![], None, &[])), None);
        assert_eq!(decode_request(&[0xff]).unwrap_err().code, ErrorCode::InvalidArgument);
    }

    proptest! {
        /// However the bytes are cut, the frames are the same.
        #[test]
        fn frames_do_not_depend_on_how_bytes_arrive(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..8),
            step in 1usize..64,
        ) {
            let mut bytes = Vec::new();
            for (index, payload) in payloads.iter().enumerate() {
                bytes.extend(encode(index as u32, TYPE_REQUEST, 0, payload).unwrap());
            }
            let mut decoder = Decoder::new();
            let mut found = Vec::new();
            for chunk in bytes.chunks(step) {
                decoder.feed(chunk);
                found.extend(all(&mut decoder));
                // Also when another decoder goes on.
                let (rest, to_drop) = decoder.remainder();
                decoder = Decoder::resume(rest.to_vec(), to_drop);
            }
            prop_assert_eq!(found.len(), payloads.len());
            for (received, payload) in found.iter().zip(&payloads) {
                prop_assert!(matches!(received, Received::Frame(frame) if frame.payload == *payload));
            }
        }

        /// No bytes make it panic or hold more than one frame's worth.
        #[test]
        fn noise_is_harmless(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..64)) {
            let mut decoder = Decoder::new();
            for chunk in &chunks {
                decoder.feed(chunk);
                for received in all(&mut decoder) {
                    if let Received::Frame(frame) = received {
                        let _ = decode_request(&frame.payload);
                        let _ = decode_response(&frame.payload);
                    }
                }
                prop_assert!(decoder.buffer.len() <= HEADER_LENGTH + MAX_PAYLOAD);
            }
        }
    }
}
