//! The one place where an error becomes a gRPC status.

use davit_model::error::chain;
use davit_model::{Coded, ErrorCode};
use prost::Message;
use prost_types::Any;
use tonic::{Code, Status};

/// The status of an error: its code, and its chain of texts ended by the words of its class, as containerd's
/// errors end. The Go client cuts these words off and rebuilds the class from the code; Docker Engine reads them.
pub fn from<E: Coded + 'static>(error: E) -> Status {
    let code = error.code();
    let mut text = chain(&error);
    if !text.ends_with(code.text()) && code != ErrorCode::Unknown {
        text.push_str(": ");
        text.push_str(code.text());
    }
    let text = shortened(text);
    // Not by `Display`: the words of a runtime, with what a container has put into them, must not become lines of the log.
    if matches!(code, ErrorCode::Internal | ErrorCode::DataLoss | ErrorCode::Unknown) {
        tracing::warn!(error = text, "call failed");
    } else {
        tracing::debug!(error = text, "call refused");
    }
    match error.reason() {
        Some(reason) => {
            Status::with_details(Code::from_i32(code.number()), &text, details(code, &text, reason).into())
        }
        None => status(code, &text),
    }
}

/// The most bytes of an error's text. It goes out as an HTTP/2 header, percent-encoded, and with details a second time; of
/// all headers together, clients take 16 KiB (`max_header_list_size` of hyper), and more breaks the connection.
const MAX_TEXT: usize = 2048;

/// A text of at most [`MAX_TEXT`] bytes, with its beginning, and its end, by which clients know the class.
fn shortened(text: String) -> String {
    if text.len() <= MAX_TEXT {
        return text;
    }
    let boundary = |at: &usize| text.is_char_boundary(*at);
    let head = (0..=MAX_TEXT / 2).rev().find(boundary).unwrap_or_default();
    let tail = (text.len() - (MAX_TEXT / 2 - 8)..=text.len()).find(boundary).unwrap_or(text.len());
    format!("{} … {}", &text[..head], &text[tail..])
}

/// The domain of our reasons.
const DOMAIN: &str = "davit";

/// `google.rpc.ErrorInfo`: why a call failed, for programs.
#[derive(Clone, PartialEq, Eq, Message)]
struct ErrorInfo {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    domain: String,
}

/// `google.rpc.Status`: what the details of a gRPC status are packed in.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

fn details(code: ErrorCode, text: &str, reason: &str) -> Vec<u8> {
    let info = ErrorInfo { reason: reason.to_owned(), domain: DOMAIN.to_owned() };
    let info =
        Any { type_url: "type.googleapis.com/google.rpc.ErrorInfo".to_owned(), value: info.encode_to_vec() };
    RpcStatus { code: code.number(), message: text.to_owned(), details: vec![info] }.encode_to_vec()
}

/// A status of our own making.
pub fn status(code: ErrorCode, text: &str) -> Status {
    Status::new(Code::from_i32(code.number()), text)
}

/// A request that is malformed.
pub fn invalid(text: impl std::fmt::Display) -> Status {
    let text = text.to_string();
    let class = ErrorCode::InvalidArgument.text();
    if text.ends_with(class) {
        return status(ErrorCode::InvalidArgument, &text);
    }
    status(ErrorCode::InvalidArgument, &format!("{text}: {class}"))
}

/// What is not built.
pub fn unimplemented(what: &str) -> Status {
    status(ErrorCode::Unimplemented, &format!("{what}: not implemented"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_its_ends() {
        assert_eq!(shortened("short".to_owned()), "short");
        let text = shortened(format!("runc: {}: not found", "ä".repeat(100_000)));
        assert!(text.len() <= MAX_TEXT, "{}", text.len());
        assert!(text.starts_with("runc: ä") && text.ends_with("ä: not found"), "{text}");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("image \"x\"")]
    struct Missing;

    impl Coded for Missing {
        fn code(&self) -> ErrorCode {
            ErrorCode::NotFound
        }
    }

    #[test]
    fn every_code_reaches_the_wire_as_itself() {
        for code in ErrorCode::ALL {
            assert_eq!(status(code, "x").code() as i32, code.number());
        }
    }

    #[test]
    fn a_reason_goes_into_the_details() {
        let status = from(crate::runtime::Error::Timeout { id: "x".into(), method: "Kill" });
        assert_eq!(status.code(), Code::DeadlineExceeded);
        let details = RpcStatus::decode(status.details()).unwrap();
        assert_eq!(
            (details.code, details.message.as_str()),
            (Code::DeadlineExceeded as i32, status.message())
        );
        let info = ErrorInfo::decode(details.details[0].value.as_slice()).unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("SHIM_TIMEOUT", "davit"));
        assert!(from(Missing).details().is_empty());
    }

    #[test]
    fn the_text_ends_with_its_class_once() {
        assert_eq!(from(Missing).message(), "image \"x\": not found");
        for text in ["no filter", "no filter: invalid argument"] {
            assert_eq!(invalid(text).message(), "no filter: invalid argument");
        }
    }
}
