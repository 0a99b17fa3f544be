//! Signals by name or number, as `kill`, `stop` and images name them.

use nix::libc;
use nix::sys::signal::Signal;

/// The number of `TERM`, `SIGTERM`, `sigterm`, `15`, `RTMIN+3` or `RTMAX-1`.
pub(crate) fn parse(text: &str) -> Option<u32> {
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let (low, high) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    if let Ok(number) = upper.parse::<i32>() {
        return u32::try_from(number).ok().filter(|_| (1..=high).contains(&number));
    }
    let real_time = |base: i32, rest: &str| {
        let offset = if rest.is_empty() { 0 } else { rest.parse::<i32>().ok()? };
        u32::try_from(base + offset).ok().filter(|_| (low..=high).contains(&(base + offset)))
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return real_time(low, rest);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return real_time(high, rest);
    }
    format!("SIG{name}").parse::<Signal>().ok().map(|signal| signal as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, want) in [("TERM", 15), ("SIGKILL", 9), ("sighup", 1), ("2", 2), ("SIGWINCH", 28)] {
            assert_eq!(parse(text), Some(want), "{text}");
        }
        assert_eq!(parse("RTMIN+3"), Some(libc::SIGRTMIN() as u32 + 3));
        assert_eq!(parse("SIGRTMAX-1"), Some(libc::SIGRTMAX() as u32 - 1));
        for text in ["", "0", "-9", "65", "NOPE", "RTMIN-1", "RTMIN+x", "15x"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
