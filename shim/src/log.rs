//! The shim's log: lines on stderr, which is the bundle's `log` FIFO that the daemon reads. A daemon that
//! does not read must not stop the shim: a line that finds no room is dropped.

use std::cell::Cell;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

thread_local! {
    static DEBUG: Cell<bool> = const { Cell::new(false) };
}

/// Says whether [`debug`] writes anything.
pub(crate) fn set_debug(on: bool) {
    DEBUG.set(on);
}

/// Something that an operator must look into.
pub(crate) fn error(message: impl std::fmt::Display) {
    line("error", &message.to_string());
}

/// Something that did not work, and without which the shim goes on.
pub(crate) fn warn(message: impl std::fmt::Display) {
    line("warning", &message.to_string());
}

/// What the shim does, for those who ask by `-debug`.
pub(crate) fn debug(message: impl std::fmt::Display) {
    if DEBUG.get() {
        line("debug", &message.to_string());
    }
}

/// The form is that of the daemon's own text log, into which it copies the lines.
fn line(level: &str, message: &str) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let line = format!(
        "time=\"{}.{:09}Z\" level={level} msg={message:?} runtime=io.containerd.davit.v2\n",
        date_and_time(now.as_secs()),
        now.subsec_nanos()
    );
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// `YYYY-MM-DDTHH:MM:SS` of a time since the epoch, in UTC.
pub(crate) fn date_and_time(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // The proleptic Gregorian calendar in eras of 400 years that begin on the first of March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::date_and_time;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_827_696, "2000-02-29T12:34:56"),
            (1_709_251_199, "2024-02-29T23:59:59"),
            (1_709_251_200, "2024-03-01T00:00:00"),
            (4_102_444_800, "2100-01-01T00:00:00"),
        ] {
            assert_eq!(date_and_time(seconds), text);
        }
    }
}
