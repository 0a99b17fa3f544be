//! Durations as Go's programs write them (`time.ParseDuration`).

/// The nanoseconds of a text such as `1h30m`, `-1.5h` or `0`; none for one that Go refuses as well.
pub fn nanoseconds(text: &str) -> Option<f64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0.0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut sum = 0.0;
    while !rest.is_empty() {
        let unit_at = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, after) = rest.split_at(unit_at);
        let unit_end =
            after.find(|letter: char| letter.is_ascii_digit() || letter == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let unit = match unit {
            "ns" => 1.0,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        sum += number.parse::<f64>().ok()? * unit;
        rest = after;
    }
    // Go counts them in 64 bits: 292 years.
    (sum <= i64::MAX as f64).then_some(sign * sum)
}

#[cfg(test)]
mod tests {
    use super::nanoseconds;

    #[test]
    fn durations_are_gos() {
        for (text, expected) in [
            ("1h30m", 5400e9),
            ("1.5h", 5400e9),
            ("1h.5m", 3630e9),
            ("250ms", 250e6),
            ("7\u{b5}s", 7e3),
            ("-10ms", -10e6),
            ("0", 0.0),
            ("+2s", 2e9),
        ] {
            assert_eq!(nanoseconds(text), Some(expected), "{text}");
        }
        for text in ["", "-", "1", "h", "1d", "1..5h", "1 h", "--1s", "3000000h"] {
            assert_eq!(nanoseconds(text), None, "{text}");
        }
    }
}
