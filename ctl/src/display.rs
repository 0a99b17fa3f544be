//! How a transfer goes, on standard error: a line for each part that changes in place on a terminal, else a line for each
//! change of its state.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use davit_proto::containerd::types::transfer::Progress;

use crate::format;
use crate::terminal;

/// How often lines on a terminal change.
const REDRAW: Duration = Duration::from_millis(100);

/// Shows a transfer.
pub(crate) struct Display {
    mode: Mode,
    parts: Vec<Part>,
}

enum Mode {
    Quiet,
    Plain,
    Terminal { drawn: usize, last: Option<Instant> },
}

/// One thing that is moved.
struct Part {
    key: String,
    title: String,
    event: String,
    progress: u64,
    total: u64,
}

impl Part {
    fn line(&self) -> String {
        let Part { title, event, progress, total, .. } = self;
        let moves = matches!(event.as_str(), "downloading" | "uploading");
        if !moves || *total == 0 {
            return format!("{title}: {event}");
        }
        let (done, all) = (format::decimal_size(*progress), format::decimal_size(*total));
        let hundredths = progress.saturating_mul(100) / total;
        format!("{title}: {event} {done} of {all} ({}%)", hundredths.min(100))
    }
}

impl Display {
    /// Shows what fits what standard error is, or nothing.
    pub(crate) fn new(quiet: bool) -> Display {
        let mode = match (quiet, io::stderr().is_terminal()) {
            (true, _) => Mode::Quiet,
            (false, true) => Mode::Terminal { drawn: 0, last: None },
            (false, false) => Mode::Plain,
        };
        Display { mode, parts: Vec::new() }
    }

    /// Shows one piece of news. That nobody can see it is no failure of the work.
    pub(crate) fn update(&mut self, news: Progress) {
        // The whole is told of by the command itself.
        let Some(content) = news.desc.filter(|_| !news.parents.is_empty()) else { return };
        let number = |number: i64| u64::try_from(number).unwrap_or(0);
        let (progress, total) = (number(news.progress), number(news.total));
        let event = printable(&news.event);
        let at = self.parts.iter().position(|part| part.key == content.digest);
        let changed = match at {
            Some(at) => {
                let part = &mut self.parts[at];
                let changed = part.event != event;
                (part.event, part.progress, part.total) = (event, progress, total);
                changed
            }
            None => {
                let kind = news.name.split('-').next().unwrap_or_default();
                let title = printable(&format!("{kind} {}", format::short_id(&content.digest)));
                self.parts.push(Part { key: content.digest, title, event, progress, total });
                true
            }
        };
        match &mut self.mode {
            Mode::Plain if changed => {
                let part = &self.parts[at.unwrap_or(self.parts.len() - 1)];
                let _ = writeln!(io::stderr(), "{}: {}", part.title, part.event);
            }
            Mode::Terminal { last, .. } if last.is_none_or(|last| last.elapsed() >= REDRAW) => self.draw(),
            Mode::Quiet | Mode::Plain | Mode::Terminal { .. } => {}
        }
    }

    /// Shows the last state.
    pub(crate) fn finish(&mut self) {
        if matches!(self.mode, Mode::Terminal { .. }) {
            self.draw();
        }
    }

    fn draw(&mut self) {
        let Mode::Terminal { drawn, last } = &mut self.mode else { return };
        let (rows, columns) = terminal::size().unwrap_or((24, 80));
        // Lines that have left the screen cannot be changed any more.
        let room = usize::from(rows).saturating_sub(1).max(1);
        let mut text = if *drawn > 0 { format!("\x1b[{drawn}A") } else { String::new() };
        let shown = &self.parts[self.parts.len().saturating_sub(room)..];
        for part in shown {
            text.push_str("\r\x1b[2K");
            text.push_str(&format::ellipsis(&part.line(), usize::from(columns).saturating_sub(1)));
            text.push('\n');
        }
        (*drawn, *last) = (shown.len(), Some(Instant::now()));
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// Words of a daemon, and names that a registry may have chosen, without what a terminal acts on.
fn printable(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let mut part = Part {
            key: String::new(),
            title: "layer 0123".to_owned(),
            event: "downloading".to_owned(),
            progress: 1_500_000,
            total: 3_000_000,
        };
        assert!(part.line().starts_with("layer 0123: downloading 1.5") && part.line().ends_with("(50%)"));
        part.event = "complete".to_owned();
        assert_eq!(part.line(), "layer 0123: complete");
    }

    #[test]
    fn nothing_reaches_the_terminal_that_it_would_act_on() {
        assert_eq!(printable("a\x1b[2Jb\r\n\u{9b}c"), "a[2Jbc");
    }
}
