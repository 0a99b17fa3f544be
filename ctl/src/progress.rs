//! Progress of long work on standard error: a line per event, and nothing when asked to be quiet.

use std::io::Write;

/// Where progress goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    quiet: bool,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Progress {
        Progress { quiet }
    }

    /// Reports one event, such as `sha256 prefix: extracting`. That nobody can read it is no failure of the work.
    pub(crate) fn report(self, what: &str, event: &str) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{what}: {event}");
        }
    }
}
