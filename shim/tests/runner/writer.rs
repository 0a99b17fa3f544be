//! A program that notices when nobody takes its output.

use crate::support::Host;

/// A program for a container that writes numbered lines of 200 bytes, and measures the longest time that a line took.
pub(crate) struct Writer {
    pub(crate) lines: usize,
}

impl Writer {
    /// The bytes of a line.
    pub(crate) fn width(&self) -> usize {
        200
    }

    pub(crate) fn line(&self, number: usize) -> String {
        format!("{number:07}{}\n", "x".repeat(self.width() - 8))
    }

    /// The script. Its clock has hundredths of a second.
    pub(crate) fn script(&self) -> String {
        format!(
            "i=10000000; max=0; x={}; now() {{ read t _ </proc/uptime; t=${{t%.*}}${{t#*.}}; }}; now; last=$t; \
             while [ $i -lt {} ]; do echo \"${{i#1}}$x\"; now; d=$((t - last)); \
             [ $d -gt $max ] && max=$d; last=$t; i=$((i + 1)); done; echo ${{max}} >/host/stall",
            "x".repeat(self.width() - 8),
            10_000_000 + self.lines
        )
    }

    /// The numbers of the lines in a text, which must hold whole lines of this writer alone.
    #[track_caller]
    pub(crate) fn numbers(&self, text: &[u8]) -> Vec<usize> {
        let text = std::str::from_utf8(text).unwrap();
        let number = |line: &str| {
            let number = line[..7].parse().unwrap();
            assert_eq!(format!("{line}\n"), self.line(number));
            number
        };
        text.lines().map(number).collect()
    }

    /// Prints the longest time that a line took.
    pub(crate) fn print_stall(&self, host: &Host, case: &str) {
        let text = std::fs::read_to_string(host.path("stall")).unwrap();
        println!("longest stall of a writer, {case}: {} ms", text.trim().parse::<u64>().unwrap() * 10);
    }
}
