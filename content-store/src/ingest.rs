//! The folder of one ingest: its files, and what they tell.

use std::fs::File;
use std::time::{Duration, SystemTime};

use davit_model::{Algorithm, Digest};
use nix::sys::stat::FileStat;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::error::{Error, timestamp};
use crate::folder::Folder;
use crate::hasher::Hasher;
use crate::store::MAX_REFERENCE_SIZE;

/// A time or a number of an ingest is shorter than this, in bytes.
const SHORT_TEXT: usize = 64;

/// How far an ingest has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The name that the client chose.
    pub reference: String,
    /// Bytes written.
    pub offset: u64,
    /// Bytes announced; 0 if unknown.
    pub total: u64,
    /// The digest announced to this writer. The store does not keep it, so it is known of writers only.
    pub expected: Option<Digest>,
    /// When the first writer was opened.
    pub started_at: SystemTime,
    /// When bytes were written last.
    pub updated_at: SystemTime,
}

/// The name of a reference's folder: a reference is any text, its hash is a safe name of fixed length.
pub(crate) fn folder_name(reference: &str) -> String {
    Hasher::digest_of(Algorithm::Sha256, reference.as_bytes()).hex().to_owned()
}

/// Creates an ingest's files in an empty folder; returns its data file, open and empty.
pub(crate) fn create(folder: &Folder, reference: &str, total: u64, now: SystemTime) -> Result<File, Error> {
    let now = timestamp(now);
    for (name, text) in [("ref", reference), ("startedat", &now), ("updatedat", &now)] {
        folder.write_text(name, text)?;
    }
    if total > 0 {
        write_total(folder, total)?;
    }
    // The data file comes last: an ingest that has one is complete.
    Ok(folder.open_or_create("data")?.0)
}

/// Records the announced size.
pub(crate) fn write_total(folder: &Folder, total: u64) -> Result<(), Error> {
    folder.write_text("total", &total.to_string())
}

/// The reference of an ingest. It must be the one that the folder is named after: after a power cut the file may be
/// there, but empty.
fn read_reference(folder: &Folder) -> Result<String, Error> {
    let reference = folder.read_text("ref", MAX_REFERENCE_SIZE)?;
    if folder.path().ends_with(folder_name(&reference)) {
        return Ok(reference);
    }
    Err(Error::Foreign { path: folder.path().join("ref"), expected: "reference of this ingest" })
}

/// What is known of an ingest. It has none without a reference or without data; other files that are missing or
/// damaged are made up for by the times of the data file.
pub(crate) fn read_status(folder: &Folder) -> Result<Status, Error> {
    let reference = read_reference(folder)?;
    let data = folder.stat("data")?;
    let modified = modified(&data);
    let started_at = read_time(folder, "startedat").unwrap_or(modified);
    // Writers do not touch `updatedat`: the file's own time says the same without a write.
    let updated_at = read_time(folder, "updatedat").map_or(modified, |time| time.max(modified));
    let total = folder.read_text("total", SHORT_TEXT).ok().and_then(|text| text.parse().ok());
    let (offset, total) = (size(&data), total.unwrap_or(0));
    Ok(Status { reference, offset, total, expected: None, started_at, updated_at })
}

/// The size of a file.
pub(crate) fn size(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// When a file was written last.
pub(crate) fn modified(stat: &FileStat) -> SystemTime {
    let seconds = Duration::from_secs(stat.st_mtime.unsigned_abs());
    let nanoseconds = Duration::from_nanos(stat.st_mtime_nsec.unsigned_abs());
    if stat.st_mtime < 0 {
        return SystemTime::UNIX_EPOCH - seconds + nanoseconds;
    }
    SystemTime::UNIX_EPOCH + seconds + nanoseconds
}

fn read_time(folder: &Folder, name: &str) -> Option<SystemTime> {
    let text = folder.read_text(name, SHORT_TEXT).ok()?;
    OffsetDateTime::parse(&text, &Rfc3339).ok().map(SystemTime::from)
}
