//! Texts for people: durations, sizes, times and commands, in Docker's words.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::error::{Error, Result};

/// A duration in words: `Less than a second`, `8 seconds`, `About an hour`, `3 weeks`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// How long ago a time was; what lies in the future was just now.
pub(crate) fn ago(time: SystemTime, now: SystemTime) -> String {
    format!("{} ago", duration(now.duration_since(time).unwrap_or_default()))
}

/// A time of the wire.
pub(crate) fn system_time(timestamp: &prost_types::Timestamp) -> Option<SystemTime> {
    SystemTime::try_from(*timestamp).ok().filter(|time| *time > SystemTime::UNIX_EPOCH)
}

/// A time as RFC 3339 in UTC, with as many digits as it has.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

/// A time from RFC 3339.
pub(crate) fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}

/// A size with decimal units and three digits: `4.26MB`, `813B`.
pub(crate) fn decimal_size(bytes: u64) -> String {
    with_unit(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"], 3)
}

/// A size with binary units and four digits: `1.941MiB`.
pub(crate) fn binary_size(bytes: u64) -> String {
    with_unit(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 4)
}

/// As C's `%.{digits}g` prints it: that many significant digits, no zeros at the end.
fn with_unit(bytes: u64, base: f64, units: &[&str], digits: usize) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let before = (value.max(1.0).log10().floor() as usize) + 1;
    let mut text = format!("{value:.*}", digits.saturating_sub(before));
    if text.contains('.') {
        text = text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text + units[unit]
}

/// A size as users give it: a number with an optional fraction and one of `b k m g t`, with an optional `b` or `ib`
/// behind it; units are binary, as for Docker's `--memory`.
pub(crate) fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let error = || format!("invalid size {text:?}: want a number and b, k, m or g, such as 512m");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let number: f64 = number.parse().map_err(|_| error())?;
    let power = match unit.trim().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(error()),
    };
    let bytes = number * 1024_f64.powi(power);
    if bytes.is_finite() && bytes < i64::MAX as f64 { Ok(bytes as u64) } else { Err(error()) }
}

/// The first `length` characters, the last of them an ellipsis if there were more.
pub(crate) fn ellipsis(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    text.chars().take(length.saturating_sub(1)).chain(['…']).collect()
}

/// The twelve characters by which people know an id; a digest loses its algorithm.
pub(crate) fn short_id(id: &str) -> &str {
    let id = id.split_once(':').map_or(id, |(_, hex)| hex);
    if id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) { &id[..12] } else { id }
}

/// Writes a line of output.
pub(crate) fn line(out: &mut dyn std::io::Write, text: impl std::fmt::Display) -> Result<()> {
    writeln!(out, "{text}").map_err(Error::Output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_in_dockers_words() {
        let table = [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (59 * 60, "59 minutes"),
            (3600, "About an hour"),
            (2 * 3600, "2 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (14 * 86400, "2 weeks"),
            (60 * 86400, "2 months"),
            (730 * 86400, "2 years"),
        ];
        for (seconds, want) in table {
            assert_eq!(duration(Duration::from_secs(seconds)), want, "{seconds}");
        }
    }

    #[test]
    fn sizes_both_ways() {
        for (bytes, want) in [
            (0, "0B"),
            (813, "813B"),
            (1000, "1kB"),
            (4_261_574, "4.26MB"),
            (77_800_000, "77.8MB"),
            (999_999, "1000kB"),
        ] {
            assert_eq!(decimal_size(bytes), want);
        }
        assert_eq!(binary_size(2_035_000), "1.941MiB");
        assert_eq!(binary_size(2 << 30), "2GiB");
        for (text, want) in
            [("512m", 512 << 20), ("1.5g", 3 << 29), ("4096", 4096), ("2048MB", 2 << 30), ("1GiB", 1 << 30)]
        {
            assert_eq!(parse_size(text), Ok(want), "{text}");
        }
        for text in ["", "m", "-1", "1x", "1e400", "nan"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_and_cuts() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert_eq!(ago(now - Duration::from_secs(8), now), "8 seconds ago");
        assert_eq!(ago(now + Duration::from_secs(8), now), "Less than a second ago");
        assert_eq!(rfc3339(now), "1970-01-12T13:46:40Z");
        assert_eq!(parse_rfc3339("1970-01-12T13:46:40Z"), Some(now));
        assert_eq!(ellipsis("abcdef", 4), "abc…");
        assert_eq!(ellipsis("abcd", 4), "abcd");
        assert_eq!(short_id(&"ab".repeat(32)), "abababababab");
        assert_eq!(short_id("web"), "web");
    }
}
