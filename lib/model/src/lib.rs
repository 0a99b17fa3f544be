//! The plain types that every other crate speaks in: identifiers, digests, labels, filters, mounts, error
//! codes. No I/O and no protobuf in here; a type of this crate can be used on either side of any seam.

pub mod digest;
pub mod duration;
pub mod error;
pub mod filter;
pub mod identifier;
pub mod label;
pub mod mount;

pub use digest::{Algorithm, Digest};
pub use error::{Coded, ErrorCode};
pub use filter::{Adaptor, Filter};
pub use label::Labels;
pub use mount::Mount;

/// A typed message that is passed on unread: the name of its type and its bytes, both kept verbatim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Any {
    /// The bare full name of a protobuf message, or the `types.containerd.io/…` name of a JSON document.
    pub type_url: String,
    /// The encoded message.
    pub value: Vec<u8>,
}
