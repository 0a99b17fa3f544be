//! Moments as people write them: `10m`, `2026-11-21T03:00:00Z`, `1795230000`, `cursor:N`.

use std::time::{Duration, SystemTime};

use crate::format;

/// A moment, by the clock or by the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    Time(SystemTime),
    /// Behind the event with this cursor.
    Cursor(u64),
}

/// Parses a time or a cursor.
pub(super) fn parse(text: &str) -> Result<When, String> {
    if let Some(cursor) = text.strip_prefix("cursor:") {
        return cursor.parse().map(When::Cursor).map_err(|_| "want cursor:NUMBER".to_owned());
    }
    parse_time(text).map(When::Time)
}

/// Parses a time. Those without an offset are in UTC.
pub(in crate::commands) fn parse_time(text: &str) -> Result<SystemTime, String> {
    let whole_days = format!("{text}T00:00:00Z");
    let known = [text, &format!("{text}Z"), &whole_days].into_iter().find_map(format::parse_rfc3339);
    known.or_else(|| unix(text)).or_else(|| SystemTime::now().checked_sub(duration(text)?)).ok_or_else(|| {
        "want a duration (10m), a time (2026-11-21T03:00:00Z), seconds since 1970, or cursor:NUMBER"
            .to_owned()
    })
}

/// Seconds since 1970, with a fraction if need be.
fn unix(text: &str) -> Option<SystemTime> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let nanoseconds = format!("{fraction:0<9}").parse().ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds.parse().ok()?, nanoseconds))
}

/// `1h30m` and the like.
fn duration(mut text: &str) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    while !text.is_empty() {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = text.split_at(digits);
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, rest) = rest.split_at(letters);
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        let part = number.parse::<u64>().ok()?.checked_mul(milliseconds)?;
        sum = sum.checked_add(Duration::from_millis(part))?;
        text = rest;
    }
    (sum > Duration::ZERO).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_docker_reads_them() {
        let at = |seconds, nanoseconds| Ok(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds));
        assert_eq!(parse_time("1970-01-02T00:00:01Z"), at(86_401, 0));
        assert_eq!(parse_time("1970-01-02T01:00:01.5+01:00"), at(86_401, 500_000_000));
        assert_eq!(parse_time("1970-01-02T00:00:01"), at(86_401, 0));
        assert_eq!(parse_time("1970-01-02"), at(86_400, 0));
        assert_eq!(parse_time("86400.25"), at(86_400, 250_000_000));
        assert_eq!(parse("cursor:17"), Ok(When::Cursor(17)));
        let ago = |text: &str| {
            let then = parse_time(text).unwrap();
            SystemTime::now().duration_since(then).unwrap().as_secs()
        };
        assert!((5400..5460).contains(&ago("1h30m")));
        assert!((86_400 * 7..86_400 * 7 + 60).contains(&ago("7d")));
        assert!((0..60).contains(&ago("500ms")));
        for wrong in ["", "yesterday", "10x", "-5m", "1.5h", "cursor:", "cursor:-1", "1970-13-01"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
