//! The one place where an error becomes a gRPC status.

use davit_model::error::chain;
use davit_model::{Coded, ErrorCode};
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
    if matches!(code, ErrorCode::Internal | ErrorCode::DataLoss | ErrorCode::Unknown) {
        tracing::warn!(error = %text, "call failed");
    } else {
        tracing::debug!(error = %text, "call refused");
    }
    status(code, &text)
}

/// A status of our own making.
pub fn status(code: ErrorCode, text: &str) -> Status {
    Status::new(Code::from_i32(code.number()), text)
}

/// A request that is malformed.
pub fn invalid(text: impl std::fmt::Display) -> Status {
    status(ErrorCode::InvalidArgument, &format!("{text}: invalid argument"))
}

/// What is not built.
pub fn unimplemented(what: &str) -> Status {
    status(ErrorCode::Unimplemented, &format!("{what}: not implemented"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_text_ends_with_its_class_once() {
        assert_eq!(from(Missing).message(), "image \"x\": not found");
    }
}
