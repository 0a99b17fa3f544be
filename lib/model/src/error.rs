//! The classes of error that cross a socket.
//!
//! Every error enum of the project maps to one of these with an exhaustive `match`; the adapters at the sockets
//! (gRPC in the supervisor, ttrpc in the shim protocol) map the class to a wire status in one place each.

/// What went wrong, in the sixteen words that gRPC has for it (`google.rpc.Code`, without `OK`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The call was given up by its caller.
    Canceled,
    /// Nothing better is known.
    Unknown,
    /// The request itself is malformed, whatever the state of the system.
    InvalidArgument,
    /// A limit of time ran out.
    DeadlineExceeded,
    /// The thing named does not exist.
    NotFound,
    /// The thing to create exists.
    AlreadyExists,
    /// The caller may not do this.
    PermissionDenied,
    /// A limit of space or number was hit.
    ResourceExhausted,
    /// The system is not in the state that the request needs.
    FailedPrecondition,
    /// The operation was aborted, usually by a concurrent one.
    Aborted,
    /// An offset lies outside of what exists.
    OutOfRange,
    /// Not built, or not supported here.
    Unimplemented,
    /// An invariant is broken.
    Internal,
    /// Not now; the caller may try again.
    Unavailable,
    /// Data is lost or corrupt.
    DataLoss,
    /// The caller's identity is not known.
    Unauthenticated,
}

impl ErrorCode {
    /// Every code, in the order of their wire numbers.
    pub const ALL: [ErrorCode; 16] = [
        ErrorCode::Canceled,
        ErrorCode::Unknown,
        ErrorCode::InvalidArgument,
        ErrorCode::DeadlineExceeded,
        ErrorCode::NotFound,
        ErrorCode::AlreadyExists,
        ErrorCode::PermissionDenied,
        ErrorCode::ResourceExhausted,
        ErrorCode::FailedPrecondition,
        ErrorCode::Aborted,
        ErrorCode::OutOfRange,
        ErrorCode::Unimplemented,
        ErrorCode::Internal,
        ErrorCode::Unavailable,
        ErrorCode::DataLoss,
        ErrorCode::Unauthenticated,
    ];

    /// The number on the wire (`google.rpc.Code`).
    pub fn number(self) -> i32 {
        match self {
            ErrorCode::Canceled => 1,
            ErrorCode::Unknown => 2,
            ErrorCode::InvalidArgument => 3,
            ErrorCode::DeadlineExceeded => 4,
            ErrorCode::NotFound => 5,
            ErrorCode::AlreadyExists => 6,
            ErrorCode::PermissionDenied => 7,
            ErrorCode::ResourceExhausted => 8,
            ErrorCode::FailedPrecondition => 9,
            ErrorCode::Aborted => 10,
            ErrorCode::OutOfRange => 11,
            ErrorCode::Unimplemented => 12,
            ErrorCode::Internal => 13,
            ErrorCode::Unavailable => 14,
            ErrorCode::DataLoss => 15,
            ErrorCode::Unauthenticated => 16,
        }
    }

    /// The code of a wire number; what is not known is [`ErrorCode::Unknown`].
    pub fn from_number(number: i32) -> ErrorCode {
        ErrorCode::ALL.into_iter().find(|code| code.number() == number).unwrap_or(ErrorCode::Unknown)
    }

    /// The words that containerd's errors of this class end with. Its Go client cuts them off the message and
    /// rebuilds the class from the code; Docker Engine and `ctr` also read them as text.
    pub fn text(self) -> &'static str {
        match self {
            ErrorCode::Canceled => "context canceled",
            ErrorCode::Unknown => "unknown",
            ErrorCode::InvalidArgument => "invalid argument",
            ErrorCode::DeadlineExceeded => "context deadline exceeded",
            ErrorCode::NotFound => "not found",
            ErrorCode::AlreadyExists => "already exists",
            ErrorCode::PermissionDenied => "permission denied",
            ErrorCode::ResourceExhausted => "resource exhausted",
            ErrorCode::FailedPrecondition => "failed precondition",
            ErrorCode::Aborted => "aborted",
            ErrorCode::OutOfRange => "out of range",
            ErrorCode::Unimplemented => "not implemented",
            ErrorCode::Internal => "internal",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::DataLoss => "data loss",
            ErrorCode::Unauthenticated => "unauthenticated",
        }
    }
}

/// An error that knows its class.
pub trait Coded: std::error::Error {
    /// The class of this error.
    fn code(&self) -> ErrorCode;

    /// Why, for programs, where the class alone does not say it: upper-case words as in `google.rpc.ErrorInfo`.
    fn reason(&self) -> Option<&'static str> {
        None
    }
}

/// The whole chain of an error on one line, `outer: inner: innermost`, for logs and replies. The errors of this
/// project never repeat their source in their own text.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_are_those_of_the_wire() {
        for (index, code) in ErrorCode::ALL.into_iter().enumerate() {
            assert_eq!(code.number(), index as i32 + 1);
            assert_eq!(ErrorCode::from_number(code.number()), code);
        }
        assert_eq!(ErrorCode::from_number(99), ErrorCode::Unknown);
    }
}
