//! When to ask again, and how long to wait before.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::RETRY_AFTER;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use crate::registry::Retry;

/// The pauses of one request.
pub(crate) struct Backoff {
    settings: Retry,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(settings: Retry) -> Backoff {
        Backoff { settings, failures: 0 }
    }

    /// How long to wait after one more failure: twice as long each time, less a random part, so that clients which
    /// failed together do not come back together; `None` when that was the last attempt. A server that asks for a
    /// longer pause gets it, up to the limit of the settings; beyond, there is no use in waiting.
    pub(crate) fn after_failure(&mut self, asked: Option<Duration>) -> Option<Duration> {
        self.failures += 1;
        if self.failures >= self.settings.attempts {
            return None;
        }
        let doubled = self.settings.first.saturating_mul(1 << (self.failures - 1).min(16));
        let own = doubled.min(self.settings.longest).mul_f64(0.5 + 0.5 * fraction());
        match asked {
            Some(asked) if asked > self.settings.longest_asked => None,
            asked => Some(own.max(asked.unwrap_or_default())),
        }
    }

    /// Something was achieved: the next failure is the first again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// What `Retry-After` asks for: seconds or a date (RFC 9110, section 10.2.3).
pub(crate) fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = SystemTime::from(OffsetDateTime::parse(text, &Rfc2822).ok()?);
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A random number from 0 to 1. The seed of each hash map is one; nothing here needs a better one.
fn fraction() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let settings = Retry {
            attempts: 4,
            first: Duration::from_millis(100),
            longest: Duration::from_millis(150),
            longest_asked: Duration::from_secs(5),
        };
        let mut backoff = Backoff::new(settings);
        let first = backoff.after_failure(None).unwrap();
        assert!((50..=100).contains(&first.as_millis()), "{first:?}");
        let second = backoff.after_failure(None).unwrap();
        assert!((75..=150).contains(&second.as_millis()), "{second:?}");
        assert_eq!(backoff.after_failure(Some(Duration::from_secs(5))), Some(Duration::from_secs(5)));
        assert_eq!(backoff.after_failure(None), None);
        backoff.reset();
        assert_eq!(backoff.after_failure(Some(Duration::from_secs(6))), None);
    }

    #[test]
    fn reads_both_forms_of_retry_after() {
        let headers = |text: &str| HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
        assert_eq!(asked(&headers("120")), Some(Duration::from_secs(120)));
        assert_eq!(asked(&headers("Sun, 06 Nov 1994 08:49:37 GMT")), Some(Duration::ZERO));
        assert!(asked(&headers("Fri, 31 Dec 9998 23:59:59 GMT")).unwrap() > Duration::from_secs(1 << 30));
        assert_eq!(asked(&headers("soon")), None);
    }
}
