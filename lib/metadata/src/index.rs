//! The map in memory, and the two ways to look at it: [`View`] to read, [`Txn`] to change.

use std::ops::Bound;

use bytes::Bytes;

use crate::engine::Write;
use crate::error::CommitError;

/// The largest key that a transaction accepts, in bytes. References and snapshot keys are texts of the client's
/// choice; the largest that containerd's own clients make are a few hundred bytes.
pub const MAX_KEY_SIZE: usize = 32 << 10;

/// The largest value that a transaction accepts, in bytes: more than any gRPC message that a client may send.
pub const MAX_VALUE_SIZE: usize = 64 << 20;

/// A persistent map: a clone costs a reference count, and a change copies one path of the tree.
pub(crate) type Index = rpds::RedBlackTreeMapSync<Bytes, Bytes>;

/// The state of the database at one moment. It never changes, and costs nothing to keep but the records that
/// have been replaced since.
#[derive(Debug, Clone)]
pub struct View {
    index: Index,
}

impl View {
    pub(crate) fn new(index: Index) -> View {
        View { index }
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<Bytes> {
        self.index.get(key).cloned()
    }

    /// All records whose key starts with `prefix`, in the order of their keys' bytes.
    pub fn scan(&self, prefix: &[u8]) -> impl Iterator<Item = (Bytes, Bytes)> + use<'_> {
        scan(&self.index, prefix)
    }
}

/// A change in the making: reads see its own writes. It takes effect if its closure returns `Ok`.
#[derive(Debug)]
pub struct Txn<'a> {
    index: &'a mut Index,
    writes: &'a mut Vec<Write>,
}

impl<'a> Txn<'a> {
    pub(crate) fn new(index: &'a mut Index, writes: &'a mut Vec<Write>) -> Txn<'a> {
        Txn { index, writes }
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<Bytes> {
        self.index.get(key).cloned()
    }

    /// All records whose key starts with `prefix`, in the order of their keys' bytes.
    pub fn scan(&self, prefix: &[u8]) -> impl Iterator<Item = (Bytes, Bytes)> + use<'_, 'a> {
        scan(self.index, prefix)
    }

    /// Sets the value of a key. One beyond [`MAX_KEY_SIZE`] or [`MAX_VALUE_SIZE`] fails the whole transaction
    /// with [`CommitError::TooLarge`] when its closure has returned.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        self.index.insert_mut(key.clone(), value.clone());
        self.writes.push(Write { key, value: Some(value) });
    }

    /// Removes a key; one that does not exist is no error.
    pub fn delete(&mut self, key: &[u8]) {
        if self.index.remove_mut(key) {
            self.writes.push(Write { key: Bytes::copy_from_slice(key), value: None });
        }
    }
}

/// Whether every write is within the limits.
pub(crate) fn check_sizes(writes: &[Write]) -> Result<(), CommitError> {
    for write in writes {
        let value_size = write.value.as_ref().map_or(0, Bytes::len);
        if write.key.len() > MAX_KEY_SIZE || value_size > MAX_VALUE_SIZE {
            return Err(CommitError::TooLarge { key_size: write.key.len(), value_size });
        }
    }
    Ok(())
}

fn scan<'index>(index: &'index Index, prefix: &[u8]) -> impl Iterator<Item = (Bytes, Bytes)> + use<'index> {
    let prefix = Bytes::copy_from_slice(prefix);
    index
        .range::<[u8], _>(PrefixRange { start: prefix.clone() })
        .take_while(move |(key, _)| key.starts_with(&prefix))
        .map(|(key, value)| (key.clone(), value.clone()))
}

/// From a key on. An own type, because a tuple of bounds cannot own an unsized `[u8]`.
struct PrefixRange {
    start: Bytes,
}

impl std::ops::RangeBounds<[u8]> for PrefixRange {
    fn start_bound(&self) -> Bound<&[u8]> {
        Bound::Included(&self.start)
    }

    fn end_bound(&self) -> Bound<&[u8]> {
        Bound::Unbounded
    }
}
