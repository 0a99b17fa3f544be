//! The pipe in which a shim writes its own log. The daemon opens it for both directions, so that it never
//! blocks and never ends; it is read as long as the shim is connected.

use std::io;

use davit_shim_protocol::bundle::Bundle;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::{debug, warn};

use super::ShimError;

/// The longest line; more of it becomes lines of their own.
const MAX_LINE: usize = 8 * 1024;

/// The open pipe.
pub(super) struct Log {
    pipe: pipe::Receiver,
}

impl Log {
    /// Opens the pipe of a bundle, and makes it if it is not there.
    pub(super) fn open(bundle: &Bundle) -> Result<Log, ShimError> {
        let path = bundle.log();
        let open = || -> io::Result<pipe::Receiver> {
            match nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)) {
                Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            pipe::OpenOptions::new().read_write(true).open_receiver(&path)
        };
        let pipe = open().map_err(|source| ShimError::Log { path: path.clone(), source })?;
        Ok(Log { pipe })
    }

    /// Passes lines on to the daemon's log until `end`, and what is in the pipe then.
    pub(super) async fn follow(mut self, end: impl Future<Output = ()>) {
        let mut line = Vec::new();
        let mut buffer = [0; 4096];
        tokio::pin!(end);
        loop {
            // A read that is dropped has read nothing.
            let read = tokio::select! {
                read = self.pipe.read(&mut buffer) => read,
                () = &mut end => break,
            };
            match read {
                Ok(length) if length > 0 => take(&mut line, &buffer[..length]),
                Ok(_) => break,
                Err(error) => {
                    debug!(%error, "cannot read the log of a shim");
                    break;
                }
            }
        }
        while let Ok(length) = self.pipe.try_read(&mut buffer) {
            if length == 0 {
                break;
            }
            take(&mut line, &buffer[..length]);
        }
        emit(&line);
    }
}

fn take(line: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        if *byte == b'\n' || line.len() == MAX_LINE {
            emit(line);
            line.clear();
        }
        if *byte != b'\n' {
            line.push(*byte);
        }
    }
}

fn emit(line: &[u8]) {
    if line.is_empty() {
        return;
    }
    let text = printable(line);
    // Shims in Go write `level=…`; those in Rust and C have no common form.
    let quiet = ["level=info", "level=debug", "level=trace", " INFO ", " DEBUG "];
    if quiet.iter().any(|level| text.contains(level)) {
        debug!(line = %text, "shim");
    } else {
        warn!(line = %text, "shim");
    }
}

/// A line that can be shown: what would move the cursor of a terminal, or begin another line there, is spelled out. What a
/// shim logs has texts of runtimes in it, and those have what a container wants.
fn printable(line: &[u8]) -> String {
    let mut text = String::with_capacity(line.len());
    for character in String::from_utf8_lossy(line).chars() {
        if character.is_control() && character != '\t' {
            text.extend(character.escape_default());
        } else {
            text.push(character);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn a_line_is_one_line_of_text() {
        assert_eq!(printable(b"msg=\"a\tb\" \xc3\xa4"), "msg=\"a\tb\" \u{e4}");
        assert_eq!(printable(b"a\r\x1b[2Kb\0\xc2\x9b"), "a\\r\\u{1b}[2Kb\\u{0}\\u{9b}");
    }
}
