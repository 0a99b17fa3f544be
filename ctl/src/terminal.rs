//! The user's own terminal: its size, and its mode while a container's terminal is attached to it, or a
//! password is typed.

use std::io::{IsTerminal, stdin, stdout};

use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::error::{Error, Result};

/// Rows and columns of the terminal at standard output or input; `None` when neither is one.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = terminal_size::terminal_size_of(stdout()).or_else(|| terminal_size::terminal_size_of(stdin()));
    size.map(|(width, height)| (height.0, width.0))
}

/// The terminal at standard input in another mode. Dropping it, however that comes about, restores what was.
pub(crate) struct Changed {
    before: Termios,
}

impl Changed {
    /// Raw mode; `None` when standard input is no terminal.
    ///
    /// # Errors
    /// Those of tcgetattr(3) and tcsetattr(3).
    pub(crate) fn raw() -> Result<Option<Changed>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        Changed::enter(cfmakeraw).map(Some)
    }

    /// No echo of what is typed.
    ///
    /// # Errors
    /// As [`Changed::raw`].
    pub(crate) fn silence() -> Result<Changed> {
        Changed::enter(|mode| mode.local_flags.remove(LocalFlags::ECHO))
    }

    fn enter(change: impl FnOnce(&mut Termios)) -> Result<Changed> {
        let error =
            |errno: nix::errno::Errno| Error::System { action: "set up the terminal", source: errno.into() };
        let before = tcgetattr(stdin()).map_err(error)?;
        let mut changed = before.clone();
        change(&mut changed);
        tcsetattr(stdin(), SetArg::TCSANOW, &changed).map_err(error)?;
        Ok(Changed { before })
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        // A terminal that went away has no mode to restore.
        let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &self.before);
    }
}
