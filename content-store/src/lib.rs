//! The content-addressed blob store: blobs that are verified before they exist, and ingests that resume.
//!
//! The layout is containerd's, so that either daemon can take over the other's store:
//!
//! ```text
//! <root>/blobs/<algorithm>/<hex>       a blob, mode 0444, never written again
//! <root>/ingest/<sha256 of ref>/ref    the reference of an ingest, verbatim
//!                              /data   what has been written so far
//!                              /startedat, updatedat   RFC 3339 times
//!                              /total  the declared size in decimal digits, if there is one
//! ```
//!
//! The life of a blob:
//!
//! ```text
//! nothing ── writer() ──▶ ingest, locked ── commit() ──▶ blob ── delete() ──▶ nothing
//!                          │         ▲
//!                          ▼ drop    │ writer(): hashes what is there
//!                         ingest, unlocked ── abort() ──▶ nothing
//! ```
//!
//! A commit checks size and digest, syncs the file, renames it and syncs the folder, in this order: after a crash
//! or a power cut there is either the ingest or the whole blob. Labels, namespaces and leases are not the
//! store's business, and it has no memory of its own: everything is on disk, but the locks of references.
//!
//! All calls block. No symbolic link is followed below the root.

mod error;
mod folder;
mod hasher;
mod ingest;
mod reader;
mod store;
#[cfg(any(test, feature = "testsuite"))]
pub mod testsuite;
mod writer;

pub use error::Error;
pub use hasher::Hasher;
pub use ingest::Status;
pub use reader::Reader;
pub use store::{Info, MAX_REFERENCE_SIZE, Store};
pub use writer::Writer;
