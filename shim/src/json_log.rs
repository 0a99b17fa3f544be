//! Container output as lines of JSON, in the format of Docker's `json-file`: one object per line of output with `log`,
//! `stream` and `time`. A line of more than 16 KiB becomes several objects, of which only the last has a `log` that ends
//! in a newline.

use std::time::SystemTime;
use std::time::{Duration, UNIX_EPOCH};

use crate::log;

/// The most bytes of output in one object.
const PART: usize = 16 * 1024;

/// Cuts one stream into lines.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: &'static str,
    /// The line whose end has not come.
    partial: Vec<u8>,
}

impl Lines {
    /// For the stream of this name.
    pub(crate) fn new(stream: &'static str) -> Lines {
        Lines { stream, partial: Vec::new() }
    }

    /// The line whose end has not come.
    pub(crate) fn partial(&self) -> &[u8] {
        &self.partial
    }

    /// Takes output and writes an object to `out` for each line that has its end, or is long enough.
    pub(crate) fn feed(&mut self, bytes: &[u8], now: SystemTime, out: &mut Vec<u8>) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let mut rest = piece;
            while !rest.is_empty() {
                let (part, behind) = rest.split_at(rest.len().min(PART - self.partial.len()));
                self.partial.extend_from_slice(part);
                rest = behind;
                if self.partial.ends_with(b"\n") {
                    self.emit(self.partial.len(), now, out);
                } else if self.partial.len() == PART {
                    self.emit(whole_characters(&self.partial), now, out);
                }
            }
        }
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
    }

    /// Writes what is left at the end of the stream.
    pub(crate) fn finish(&mut self, now: SystemTime, out: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.emit(self.partial.len(), now, out);
        }
    }

    fn emit(&mut self, count: usize, now: SystemTime, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"log\":\"");
        escape(&self.partial[..count], out);
        out.extend_from_slice(b"\",\"stream\":\"");
        out.extend_from_slice(self.stream.as_bytes());
        out.extend_from_slice(b"\",\"time\":\"");
        out.extend_from_slice(timestamp(now).as_bytes());
        out.extend_from_slice(b"\"}\n");
        self.partial.drain(..count);
    }
}

/// How many bytes come before a character of UTF-8 that is cut off at the end. All, if the end is no such.
fn whole_characters(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len() - bytes.len().min(3)..];
    for (distance, byte) in tail.iter().rev().enumerate() {
        let length = match byte {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => break,
        };
        return if length > distance + 1 { bytes.len() - distance - 1 } else { bytes.len() };
    }
    bytes.len()
}

fn escape(bytes: &[u8], out: &mut Vec<u8>) {
    for chunk in bytes.utf8_chunks() {
        for byte in chunk.valid().bytes() {
            match byte {
                b'"' | b'\\' => out.extend([b'\\', byte]),
                b'\n' => out.extend(b"\\n"),
                b'\r' => out.extend(b"\\r"),
                b'\t' => out.extend(b"\\t"),
                0..0x20 => {
                    const DIGITS: &[u8; 16] = b"0123456789abcdef";
                    out.extend(b"\\u00");
                    out.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
                }
                _ => out.push(byte),
            }
        }
        // Bytes that are no characters cannot be said in JSON.
        if !chunk.invalid().is_empty() {
            out.extend("\u{fffd}".as_bytes());
        }
    }
}

/// RFC 3339 in UTC with nine digits of the second.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    format!("{}.{:09}Z", log::date_and_time(since.as_secs()), since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Entry {
        log: String,
        stream: String,
        time: String,
    }

    fn entries(out: &[u8]) -> Vec<Entry> {
        let text = std::str::from_utf8(out).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_is_an_object() {
        let mut lines = Lines::new("stdout");
        let now = UNIX_EPOCH + Duration::new(1_709_251_199, 5);
        let mut out = Vec::new();
        lines.feed(b"one\ntw", now, &mut out);
        assert_eq!(
            std::str::from_utf8(&out).unwrap(),
            "{\"log\":\"one\\n\",\"stream\":\"stdout\",\"time\":\"2024-02-29T23:59:59.000000005Z\"}\n"
        );
        lines.feed(b"o \"\\\t\x01\x7f\xff \xc3\xa4\r\n\nend", now, &mut out);
        assert_eq!(lines.partial(), b"end");
        lines.finish(now, &mut out);
        let logs: Vec<String> = entries(&out).into_iter().map(|entry| entry.log).collect();
        assert_eq!(logs, ["one\n", "two \"\\\t\x01\x7f\u{fffd} ä\r\n", "\n", "end"]);
        let first = &entries(&out)[0];
        assert_eq!((first.stream.as_str(), first.time.len()), ("stdout", 30));
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let text = "x".repeat(PART - 1) + &"ä€🦀".repeat(PART) + "\n";
        for step in [1, 100, 5000, usize::MAX] {
            let mut lines = Lines::new("stderr");
            let mut out = Vec::new();
            for piece in text.as_bytes().chunks(step) {
                lines.feed(piece, UNIX_EPOCH, &mut out);
            }
            let logs: Vec<String> = entries(&out).into_iter().map(|entry| entry.log).collect();
            assert!(logs.concat() == text, "nothing is lost");
            assert!(logs.iter().all(|log| log.len() <= PART));
            assert!(logs[..logs.len() - 1].iter().all(|log| log.len() > PART - 4 && !log.ends_with('\n')));
        }
    }
}
