//! A checksum of all records together, stored with every commit.
//!
//! An engine finds out that a page is torn, at best; `redb`, for one, checks no checksum when a file that was closed
//! in order is opened again. A record that is gone unnoticed is the worst that can happen to this database, because
//! what it refers to is then collected as garbage. So what is read must add up to what was written.

use bytes::Bytes;

use super::Write;

/// The number of records and the sum of their checksums, which does not depend on any order and can be kept up to
/// date record by record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    records: u64,
    sum: u64,
}

impl Summary {
    pub(crate) const SIZE: usize = 16;

    /// A record is there now.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.records = self.records.wrapping_add(1);
        self.sum = self.sum.wrapping_add(checksum(key, value));
    }

    fn remove(&mut self, key: &[u8], value: &[u8]) {
        self.records = self.records.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(checksum(key, value));
    }

    /// A record had the value `before`, and is written.
    pub(crate) fn apply(&mut self, before: Option<&Bytes>, write: &Write) {
        if let Some(value) = before {
            self.remove(&write.key, value);
        }
        if let Some(value) = &write.value {
            self.add(&write.key, value);
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; Summary::SIZE] {
        (u128::from(self.records) << 64 | u128::from(self.sum)).to_be_bytes()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Summary> {
        let number = u128::from_be_bytes(bytes.try_into().ok()?);
        Some(Summary { records: (number >> 64) as u64, sum: number as u64 })
    }
}

/// CRC-32C of the key, and of key and value.
fn checksum(key: &[u8], value: &[u8]) -> u64 {
    let key = crc32c::crc32c(key);
    u64::from(key) << 32 | u64::from(crc32c::crc32c_append(key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_follows_its_records_and_survives_encoding() {
        let (key, one, two) = (Bytes::from("key"), Bytes::from("1"), Bytes::from("2"));
        let write = |value: Option<&Bytes>| Write { key: key.clone(), value: value.cloned() };
        let mut summary = Summary::default();
        summary.apply(None, &write(Some(&one)));
        let first = summary;
        assert_ne!(first, Summary::default());
        summary.apply(Some(&one), &write(Some(&two)));
        assert_ne!(summary, first);
        assert_eq!(Summary::from_bytes(&summary.to_bytes()), Some(summary));
        summary.apply(Some(&two), &write(None));
        assert_eq!(summary, Summary::default());
        assert_eq!(Summary::from_bytes(b"short"), None);
    }
}
