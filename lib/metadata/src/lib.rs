//! The daemon's database: an ordered map from bytes to bytes, wholly in memory to read and durable before a
//! change is acknowledged. What the keys and values mean is its user's business.
//!
//! ```text
//! update(closure) ──▶ pending state ──▶ queue ──▶ committer thread ──▶ engine (redb or sled)
//!        ▲                 │                          │  one sync for all that waited
//!        └──── view() ◀────┘                          └─▶ answers to all of them
//! ```
//!
//! * A closure runs in its caller, one at a time, against a state that holds all changes before it, so that a
//!   precondition sees its predecessors even while those are on their way to the disk.
//! * Every change takes effect whole or not at all, and changes reach the disk in the order in which they were
//!   made: one that is durable implies all before it.
//! * Reading takes a snapshot of a persistent map, which costs the same whatever the map holds, and never waits
//!   for a disk.
//! * The first error of the engine ends all writing ([`CommitError::Failed`]): what a failed sync left in the
//!   page cache cannot be known, so it is not tried again. Reading goes on, from what is known to be durable.
//!
//! The folder is locked for as long as the database is open, and carries a format version of its own.

mod committer;
mod db;
mod engine;
mod error;
mod folder;
mod index;

pub use db::Db;
pub use engine::{EngineError, EngineKind};
pub use error::{CommitError, OpenError, VerifyError};
pub use index::{MAX_KEY_SIZE, MAX_VALUE_SIZE, Txn, View};
