//! The records of a pax extended header (POSIX.1-2017, pax, "pax Extended Header"): `length key=value\n`.
//!
//! Records are cut by their length, never at a newline: the value of an extended attribute such as
//! `security.capability` is binary and may hold one, and a reader that splits there takes attacker-chosen bytes
//! for records. The last record of a key wins, as in GNU tar and Go.

use std::collections::BTreeMap;

use super::error::ArchiveFault;

/// What the records of one entry say. Absent keys leave the fields of the header as they are.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) modified: Option<Time>,
    pub(super) accessed: Option<Time>,
    /// Extended attributes by name. One header may have tens of thousands, which a list would be searched for.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: SparseRecords,
}

/// The records by which GNU tar describes a sparse file in formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.size` or `GNU.sparse.realsize`: the size of the file with its holes.
    pub(super) size: Option<u64>,
    /// Offsets and lengths in turn, from `map` (0.1) or from repeated `offset` and `numbytes` (0.0).
    pub(super) map: Vec<u64>,
}

/// A time of a file, in seconds and nanoseconds since 1970. What lies outside of what a file can have is 1970, as
/// containerd has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: i64,
}

impl Time {
    /// The latest time that is kept: 2^63 nanoseconds, in the year 2262.
    const LATEST: i64 = i64::MAX / 1_000_000_000;

    /// The time of whole seconds, possibly negative.
    pub(super) fn from_seconds(seconds: i64) -> Time {
        if (0..Time::LATEST).contains(&seconds) { Time { seconds, nanoseconds: 0 } } else { Time::default() }
    }

    /// Parses decimal seconds with an optional fraction; digits beyond nanoseconds are cut off.
    fn parse(text: &[u8]) -> Option<Time> {
        let text = std::str::from_utf8(text).ok()?;
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
        let whole: i64 = seconds.parse().ok()?;
        if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        if whole < 0 || seconds.starts_with('-') {
            return Some(Time::default());
        }
        let time = Time::from_seconds(whole);
        if time.seconds != whole {
            return Some(time);
        }
        let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
        Some(Time { seconds: whole, nanoseconds: digits.parse().ok()? })
    }
}

impl Records {
    /// Parses all records of one extended header.
    pub(super) fn parse(mut data: &[u8]) -> Result<Records, ArchiveFault> {
        let mut records = Records::default();
        while !data.is_empty() {
            let (key, value, rest) = split_record(data).ok_or(ArchiveFault::Record)?;
            records.take(key, value)?;
            data = rest;
        }
        Ok(records)
    }

    /// Takes over one record; unknown keys are ignored, as the standard demands. An empty value takes back
    /// earlier records of the key.
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveFault> {
        let sparse = &mut self.sparse;
        match key {
            b"path" => self.path = (!value.is_empty()).then(|| value.to_vec()),
            b"linkpath" => self.link = (!value.is_empty()).then(|| value.to_vec()),
            b"size" => self.size = number(value, "size")?,
            b"uid" => self.uid = number(value, "uid")?,
            b"gid" => self.gid = number(value, "gid")?,
            b"mtime" => self.modified = time(value, "mtime")?,
            b"atime" => self.accessed = time(value, "atime")?,
            b"GNU.sparse.major" => sparse.major = number(value, "GNU.sparse.major")?,
            b"GNU.sparse.minor" => sparse.minor = number(value, "GNU.sparse.minor")?,
            b"GNU.sparse.name" => sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => sparse.size = number(value, "GNU.sparse.size")?,
            b"GNU.sparse.map" => {
                sparse.map = value
                    .split(|&byte| byte == b',')
                    .map(|part| required(part, "GNU.sparse.map"))
                    .collect::<Result<_, _>>()?;
            }
            // Format 0.0 repeats these two, always in this order.
            b"GNU.sparse.offset" if sparse.map.len().is_multiple_of(2) => {
                sparse.map.push(required(value, "GNU.sparse.offset")?);
            }
            b"GNU.sparse.numbytes" if !sparse.map.len().is_multiple_of(2) => {
                sparse.map.push(required(value, "GNU.sparse.numbytes")?);
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => return Err(ArchiveFault::Sparse),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

/// Cuts the first record off: its key, its value, and what follows.
fn split_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(20).position(|&byte| byte == b' ')?;
    let length = decimal(&data[..space])?;
    let length = usize::try_from(length).ok()?;
    let record = data.get(space + 1..length)?;
    let (newline, record) = record.split_last()?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    if *newline != b'\n' || equals == 0 {
        return None;
    }
    Some((&record[..equals], &record[equals + 1..], &data[length..]))
}

/// A plain decimal number, without sign or blanks.
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn required(value: &[u8], field: &'static str) -> Result<u64, ArchiveFault> {
    decimal(value).ok_or(ArchiveFault::Number { field })
}

fn number(value: &[u8], field: &'static str) -> Result<Option<u64>, ArchiveFault> {
    if value.is_empty() { Ok(None) } else { required(value, field).map(Some) }
}

fn time(value: &[u8], field: &'static str) -> Result<Option<Time>, ArchiveFault> {
    if value.is_empty() {
        return Ok(None);
    }
    Time::parse(value).map(Some).ok_or(ArchiveFault::Number { field })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_cut_by_length_not_at_newlines() {
        // The attribute's value has a newline and then the text of a record that would lead out of the root.
        let hidden = b"29 SCHILY.xattr.user.a=\n20 path=../../etc/x\n";
        let mut data = format!("{} ", hidden.len() - 3 + 3).into_bytes();
        data.extend_from_slice(&hidden[3..]);
        let records = Records::parse(&data).unwrap();
        assert_eq!(records.path, None);
        let xattrs = BTreeMap::from([(b"user.a".to_vec(), b"\n20 path=../../etc/x".to_vec())]);
        assert_eq!(records.xattrs, xattrs);
    }

    #[test]
    fn the_last_record_wins_and_an_empty_one_takes_back() {
        let records = Records::parse(b"9 path=a\n9 path=b\n7 uid=\n8 gid=7\n").unwrap();
        assert_eq!(records.path.as_deref(), Some(b"b".as_slice()));
        assert_eq!((records.uid, records.gid), (None, Some(7)));
        assert_eq!(Records::parse(b"9 path=a\n8 path=\n").unwrap().path, None);
        let records = Records::parse(b"25 SCHILY.xattr.user.a=1\n25 SCHILY.xattr.user.a=2\n");
        let xattrs: Vec<_> = records.unwrap().xattrs.into_iter().collect();
        assert_eq!(xattrs, [(b"user.a".to_vec(), b"2".to_vec())]);
    }

    #[test]
    fn times_have_nanoseconds_and_stay_in_range() {
        let time = |text: &str| Time::parse(text.as_bytes());
        assert_eq!(time("12.5"), Some(Time { seconds: 12, nanoseconds: 500_000_000 }));
        assert_eq!(time("12.1234567899"), Some(Time { seconds: 12, nanoseconds: 123_456_789 }));
        assert_eq!(time("12"), Some(Time { seconds: 12, nanoseconds: 0 }));
        assert_eq!(time("-12.5"), Some(Time::default()));
        assert_eq!(time("-0.5"), Some(Time::default()));
        assert_eq!(time("99999999999999"), Some(Time::default()));
        for bad in ["", ".", "x", "1.x", "1.-5", "1e3", "99999999999999999999999"] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        let bad: [&[u8]; 9] = [
            b"0 path=a\n",
            b"8 path=a\n",
            b"11 path=a\n",
            b"9 path-a\n",
            b"4 =\n",
            b"path=a\n",
            b"18446744073709551615 path=a\n",
            b"9 path=a",
            b"-9 path=a\n",
        ];
        for data in bad {
            assert!(Records::parse(data).is_err(), "{}", String::from_utf8_lossy(data));
        }
        for data in [b"9 uid=-1\n".as_slice(), b"9 size=x\n", b"11 mtime=x\n"] {
            assert!(Records::parse(data).is_err(), "{}", String::from_utf8_lossy(data));
        }
    }
}
