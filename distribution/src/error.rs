//! What can go wrong between a client and a registry.

use davit_model::{Coded, Digest, ErrorCode};
use davit_oci::image::DocumentError;
use http::{Method, StatusCode};

use crate::credentials::CredentialError;
use crate::hosts::HostsError;
use crate::store::SinkError;
use crate::transport::TransportError;

/// An error of resolving, fetching, pushing or listing. Texts are containerd's where its clients show or match them;
/// addresses in them are without user information and without the values of queries.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A reference without tag and digest names no image.
    #[error("object required: {reference} has neither tag nor digest")]
    NoObject {
        /// The reference.
        reference: String,
    },
    /// The configuration of the registry's hosts cannot be used.
    #[error("cannot configure the hosts of {registry}")]
    Hosts {
        /// The registry.
        registry: String,
        /// What is wrong.
        source: HostsError,
    },
    /// No configured host may do what is asked.
    #[error("no {operation} hosts")]
    NoHosts {
        /// What was to be done.
        operation: &'static str,
    },
    /// No response.
    #[error("failed to do request: {method} {url}")]
    Transport {
        /// The method.
        method: Method,
        /// The address.
        url: String,
        /// What went wrong.
        source: TransportError,
    },
    /// A response with a status that does not belong here.
    #[error("unexpected status from {method} request to {url}: {status}{}", message.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Status {
        /// The method.
        method: Method,
        /// The address.
        url: String,
        /// The status.
        status: StatusCode,
        /// What the registry says of it (`code: message`, bounded).
        message: Option<String>,
    },
    /// What was asked for is not there.
    #[error("{what}")]
    NotFound {
        /// The reference, digest or address.
        what: String,
    },
    /// A registry refuses an index whose manifests it lacks.
    #[error("manifest list/index references to blobs and/or manifests are missing in your target registry")]
    Incomplete {
        /// What it says.
        source: Box<Error>,
    },
    /// The registry wants to know who asks, or does not let who asks.
    #[error("{operation} access denied, repository does not exist or may require authorization")]
    Denied {
        /// `pull` or `push`.
        operation: &'static str,
        /// Why.
        source: Box<Error>,
    },
    /// The credentials, or none, were not accepted.
    #[error("authorization failed{}", reason.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Unauthorized {
        /// What the server says of it, or that there were none.
        reason: Option<String>,
    },
    /// A challenge that cannot be answered.
    #[error("cannot answer the challenge of {host}: {reason}")]
    Challenge {
        /// The host.
        host: String,
        /// Why not.
        reason: &'static str,
    },
    /// A token service answered with something that is no token.
    #[error("unusable answer of the token service {url}: {reason}")]
    Token {
        /// The address.
        url: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The source of credentials failed.
    #[error("cannot get credentials for {host}")]
    Credentials {
        /// The host.
        host: String,
        /// Why.
        source: CredentialError,
    },
    /// A redirect that is not followed.
    #[error("redirect of {url} is not followed: {reason}")]
    Redirect {
        /// The address that redirects.
        url: String,
        /// Why not.
        reason: &'static str,
    },
    /// More than is taken.
    #[error("rejecting {what}: more than {limit} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// The most bytes.
        limit: u64,
    },
    /// A host sends another number of bytes than the descriptor says.
    #[error("{digest} has {} bytes at {url}, its descriptor says {expected}", actual.map_or_else(|| "more".to_owned(), |size| size.to_string()))]
    WrongSize {
        /// The content.
        digest: Digest,
        /// The address.
        url: String,
        /// What the host says, if it does.
        actual: Option<u64>,
        /// What the descriptor says.
        expected: u64,
    },
    /// A host sends something else than what was asked for.
    #[error("unexpected digest {actual} from {url}, expected {expected}")]
    WrongDigest {
        /// The address.
        url: String,
        /// Of what came.
        actual: String,
        /// Of what was asked for.
        expected: Digest,
    },
    /// A response that breaks the rules of the protocol.
    #[error("malformed response from {url}: {reason}")]
    Malformed {
        /// The address.
        url: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A descriptor that cannot be fetched or pushed.
    #[error("unusable descriptor of {digest}: {reason}")]
    Descriptor {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        reason: &'static str,
    },
    /// An image with more parts than any has.
    #[error("the image has more than {limit} {parts}")]
    TooMany {
        /// Of what.
        parts: &'static str,
        /// The most.
        limit: usize,
    },
    /// No manifest of an index is for the platform asked for.
    #[error("no match for platform in manifest {digest}")]
    NoPlatform {
        /// The index.
        digest: Digest,
    },
    /// A document of the image cannot be read.
    #[error("document {digest}")]
    Document {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        source: DocumentError,
    },
    /// The local content store failed.
    #[error("content store: {action}")]
    Store {
        /// What was done.
        action: &'static str,
        /// What went wrong.
        source: SinkError,
    },
    /// A task of this client ended without a result, which is a mistake in it.
    #[error("internal task ended early: {task}")]
    Task {
        /// Which.
        task: &'static str,
    },
}

impl Error {
    /// Whether the same request may succeed later, or at another time of the connection.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Error::Transport { source, .. } => source.is_transient(),
            Error::Status { status, .. } => is_transient_status(*status),
            _ => false,
        }
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound { .. })
    }

    /// How far a request came that failed so: of several hosts, the error of the one that came farthest is told.
    pub(crate) fn rank(&self) -> u8 {
        match self {
            Error::Transport { .. } => 1,
            Error::NotFound { .. } => 2,
            _ => 3,
        }
    }
}

/// The statuses that say "not now".
pub(crate) fn is_transient_status(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::NoObject { .. } | Error::Descriptor { .. } => ErrorCode::InvalidArgument,
            Error::Hosts { source, .. } => source.code(),
            Error::Transport { source, .. } => {
                if source.is_transient() {
                    ErrorCode::Unavailable
                } else {
                    ErrorCode::FailedPrecondition
                }
            }
            Error::Status { status, .. } => match status.as_u16() {
                401 => ErrorCode::Unauthenticated,
                403 => ErrorCode::PermissionDenied,
                404 => ErrorCode::NotFound,
                408 | 500..=599 => ErrorCode::Unavailable,
                429 => ErrorCode::ResourceExhausted,
                _ => ErrorCode::Unknown,
            },
            Error::NoHosts { .. } | Error::NotFound { .. } | Error::NoPlatform { .. } => ErrorCode::NotFound,
            Error::Denied { source, .. } => source.code(),
            Error::Incomplete { .. } => ErrorCode::FailedPrecondition,
            Error::Unauthorized { .. } => ErrorCode::Unauthenticated,
            Error::Challenge { .. } | Error::Token { .. } | Error::Credentials { .. } => {
                ErrorCode::Unauthenticated
            }
            Error::Redirect { .. } | Error::Malformed { .. } => ErrorCode::FailedPrecondition,
            Error::TooLarge { .. } | Error::TooMany { .. } => ErrorCode::ResourceExhausted,
            Error::WrongSize { .. } | Error::WrongDigest { .. } => ErrorCode::FailedPrecondition,
            Error::Document { source, .. } => source.code(),
            Error::Store { source, .. } => source.code(),
            Error::Task { .. } => ErrorCode::Internal,
        }
    }
}
