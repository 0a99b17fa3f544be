//! Reading a log of JSON lines and its older parts, while a shim writes to it and rotates it.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::Deserialize;

use super::{Tail, tail_position};
use crate::error::{Error, Result};
use crate::{format, log};

/// The longest line that is read: the shim's are at most 100 KiB, Docker's parts at most as long.
const MAX_LINE: usize = 1 << 20;

/// An object of the log.
#[derive(Debug, Deserialize)]
struct Entry<'a> {
    #[serde(borrow)]
    log: Cow<'a, str>,
    #[serde(borrow, default)]
    stream: Cow<'a, str>,
    #[serde(borrow, default)]
    time: Cow<'a, str>,
}

/// What is shown of the entries.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Show {
    /// Only those from this time on.
    pub(super) since: Option<SystemTime>,
    /// Each with its time before it.
    pub(super) timestamps: bool,
}

/// Where entries go to, by their stream.
pub(super) struct Outputs<'a> {
    /// Standard output.
    pub(super) out: &'a mut dyn Write,
    /// Standard error.
    pub(super) err: &'a mut dyn Write,
}

/// A part of the log.
struct Part {
    file: BufReader<File>,
    identity: (u64, u64),
    /// Where the line begins that is to be read next.
    position: u64,
}

/// A log and its parts.
pub(in crate::commands) struct JsonLog {
    path: PathBuf,
    max_files: u32,
    show: Show,
    /// Those that are to be read, the oldest first. The last one is read on as it grows.
    parts: Vec<Part>,
    /// The part that was read last.
    last: Option<(u64, u64)>,
}

impl JsonLog {
    /// Opens what there is of a log, which may be nothing yet.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(super) fn open(path: PathBuf, max_files: u32, show: Show, tail: Tail) -> Result<JsonLog> {
        let mut log = JsonLog { path, max_files, show, parts: Vec::new(), last: None };
        log.parts = log.open_parts()?;
        if let Tail::Lines(mut lines) = tail {
            for part in log.parts.iter_mut().rev() {
                let (position, found) = tail_position(part.file.get_mut(), lines).map_err(|source| {
                    Error::File { action: "cannot read the log", path: log.path.clone(), source }
                })?;
                part.position = position;
                lines -= found;
            }
        }
        Ok(log)
    }

    fn error(&self, source: std::io::Error) -> Error {
        Error::File { action: "cannot read the log", path: self.path.clone(), source }
    }

    /// Opens all parts, the oldest first. The newest is opened first, since it may become the next while we are at it.
    fn open_parts(&self) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        for number in 0..self.max_files {
            let path = if number == 0 { self.path.clone() } else { log::rotated(&self.path, number) };
            let file = match File::open(path) {
                Ok(file) => file,
                // The newest is not there for a moment of a rotation, nor any before the first output.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(self.error(error)),
            };
            let metadata = file.metadata().map_err(|source| self.error(source))?;
            let identity = (metadata.dev(), metadata.ino());
            if parts.iter().all(|part| part.identity != identity) {
                parts.push(Part { file: BufReader::new(file), identity, position: 0 });
            }
        }
        parts.reverse();
        Ok(parts)
    }

    /// Shows everything new.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Output`].
    pub(super) fn copy(&mut self, outputs: &mut Outputs<'_>) -> Result<()> {
        loop {
            while let Some(part) = self.parts.first_mut() {
                let result = copy_part(part, self.show, outputs);
                self.last = Some(part.identity);
                result.map_err(|error| match error {
                    CopyError::Input(source) => self.error(source),
                    CopyError::Output(source) => Error::Output(source),
                })?;
                if self.parts.len() == 1 {
                    break;
                }
                self.parts.remove(0);
            }
            if !self.find_newer()? {
                break;
            }
        }
        outputs.out.flush().and_then(|()| outputs.err.flush()).map_err(Error::Output)
    }

    /// Whether there are parts behind the last one by now. That one is read once more, since it was written to until it
    /// was not the last.
    fn find_newer(&mut self) -> Result<bool> {
        let newest = std::fs::metadata(&self.path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        // In the middle of a rotation there is none.
        if newest.is_some() && newest == self.last {
            return Ok(false);
        }
        let mut parts = self.open_parts()?;
        if let Some(index) = parts.iter().position(|part| Some(part.identity) == self.last) {
            parts.drain(..=index);
        }
        let is_newer = !parts.is_empty();
        self.parts.append(&mut parts);
        Ok(is_newer)
    }
}

enum CopyError {
    Input(std::io::Error),
    Output(std::io::Error),
}

/// Shows the whole lines of a part. One without an end is read again when it has one.
fn copy_part(part: &mut Part, show: Show, outputs: &mut Outputs<'_>) -> std::result::Result<(), CopyError> {
    let length = part.file.get_ref().metadata().map_err(CopyError::Input)?.len();
    if length < part.position {
        // It was cut: what is in it now is all new.
        part.position = 0;
    }
    part.file.seek(SeekFrom::Start(part.position)).map_err(CopyError::Input)?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = std::io::Read::take(&mut part.file, MAX_LINE as u64);
        let count = limited.read_until(b'\n', &mut line).map_err(CopyError::Input)?;
        if count == 0 || !line.ends_with(b"\n") && count < MAX_LINE {
            return Ok(());
        }
        part.position += count as u64;
        show_entry(&line, show, outputs).map_err(CopyError::Output)?;
    }
}

/// Shows a line. One that a crash has cut off, which is no JSON, is passed over.
fn show_entry(line: &[u8], show: Show, outputs: &mut Outputs<'_>) -> std::io::Result<()> {
    let Ok(entry) = serde_json::from_slice::<Entry<'_>>(line) else { return Ok(()) };
    let is_older = |since| format::parse_rfc3339(&entry.time).is_some_and(|time| time < since);
    if show.since.is_some_and(is_older) {
        return Ok(());
    }
    let output = if entry.stream == "stderr" { &mut *outputs.err } else { &mut *outputs.out };
    if show.timestamps {
        write!(output, "{} ", entry.time)?;
    }
    output.write_all(entry.log.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn entry(log: &str, stream: &str, second: u32) -> String {
        let time = format!("2026-01-01T00:00:{second:02}.000000001Z");
        serde_json::json!({"log": log, "stream": stream, "time": time}).to_string() + "\n"
    }

    fn append(path: &Path, text: &str) {
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn new(log: &mut JsonLog) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        log.copy(&mut Outputs { out: &mut out, err: &mut err }).unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    fn open(path: &Path, show: Show, tail: Tail) -> JsonLog {
        JsonLog::open(path.to_owned(), 4, show, tail).unwrap()
    }

    fn rotate(path: &Path) {
        for number in (1..3).rev() {
            let _ = std::fs::rename(log::rotated(path, number), log::rotated(path, number + 1));
        }
        std::fs::rename(path, log::rotated(path, 1)).unwrap();
    }

    #[test]
    fn streams_times_and_tails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        append(&log::rotated(&path, 1), &(entry("one\n", "stdout", 1) + &entry("two\n", "stderr", 2)));
        append(
            &path,
            &(entry("three\n", "stdout", 3) + "{\"log\":\"cut" + "\n" + &entry("four", "stdout", 4)),
        );
        append(&path, "{\"log\":\"not yet");
        let all = |tail| new(&mut open(&path, Show::default(), tail));
        assert_eq!(all(Tail::All), ("one\nthree\nfour".to_owned(), "two\n".to_owned()));
        assert_eq!(all(Tail::Lines(5)).1, "two\n");
        assert_eq!(all(Tail::Lines(4)).1, "");
        assert_eq!(all(Tail::Lines(0)).0, "");
        let since = format::parse_rfc3339("2026-01-01T00:00:03Z");
        let shown = new(&mut open(&path, Show { since, timestamps: true }, Tail::All));
        assert_eq!(shown.0, "2026-01-01T00:00:03.000000001Z three\n2026-01-01T00:00:04.000000001Z four");
    }

    #[test]
    fn a_log_is_followed_across_rotations() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = open(&path, Show::default(), Tail::All);
        assert_eq!(new(&mut log).0, "");
        let mut expected = String::new();
        let mut seen = String::new();
        for number in 0..60u32 {
            let line = format!("{number}\n");
            append(&path, &entry(&line, "stdout", 0));
            expected += &line;
            if number % 3 == 2 {
                rotate(&path);
            }
            // Sometimes several rotations pass between two looks, and the newest part is not there.
            if number % 7 == 0 {
                seen += &new(&mut log).0;
            }
        }
        append(&path, &entry("end\n", "stdout", 0));
        seen += &new(&mut log).0;
        assert_eq!(seen, expected + "end\n");
    }

    #[test]
    fn a_log_that_was_cut_is_read_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        append(&path, &(entry("one\n", "stdout", 1) + &entry("two\n", "stdout", 1)));
        let mut log = open(&path, Show::default(), Tail::All);
        assert_eq!(new(&mut log).0, "one\ntwo\n");
        std::fs::write(&path, entry("three\n", "stdout", 1)).unwrap();
        assert_eq!(new(&mut log).0, "three\n");
    }
}
