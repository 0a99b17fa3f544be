//! The user's own terminal: its size, and raw mode while a container's terminal is attached to it.

use std::io::{IsTerminal, stdin, stdout};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::error::{Error, Result};

/// Rows and columns of the terminal at standard output or input; `None` when neither is one.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = terminal_size::terminal_size_of(stdout()).or_else(|| terminal_size::terminal_size_of(stdin()));
    size.map(|(width, height)| (height.0, width.0))
}

/// Raw mode of the terminal at standard input. Dropping it, however that comes about, restores what was.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Sets raw mode; `None` when standard input is no terminal.
    ///
    /// # Errors
    /// Those of tcgetattr(3) and tcsetattr(3).
    pub(crate) fn enter() -> Result<Option<RawMode>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let error =
            |errno: nix::errno::Errno| Error::System { action: "set up the terminal", source: errno.into() };
        let before = tcgetattr(stdin()).map_err(error)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin(), SetArg::TCSANOW, &raw).map_err(error)?;
        Ok(Some(RawMode { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that went away has no mode to restore.
        let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &self.before);
    }
}
