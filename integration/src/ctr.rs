//! Debian's `ctr`, unmodified, as a client of any daemon.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use crate::daemon::ok;

/// A client of one socket.
#[derive(Debug, Clone)]
pub struct Ctr {
    address: PathBuf,
    namespace: String,
}

impl Ctr {
    /// A client of the daemon on this socket, in this namespace.
    pub fn new(address: &Path, namespace: &str) -> Ctr {
        Ctr { address: address.to_owned(), namespace: namespace.to_owned() }
    }

    /// A command with these arguments, separated by blanks; for arguments with blanks there is [`Ctr::command`].
    pub fn words(&self, line: &str) -> Command {
        self.command(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// A command with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.address).arg("--namespace").arg(&self.namespace);
        command.args(args).stdin(Stdio::null());
        command
    }

    /// What the command printed; it must succeed.
    ///
    /// # Errors
    /// It failed.
    pub fn run(&self, line: &str) -> Result<String> {
        ok(self.words(line).output()?).with_context(|| format!("ctr {line}"))
    }

    /// What the command printed; it must succeed.
    ///
    /// # Errors
    /// It failed.
    pub fn run_args(&self, args: &[&str]) -> Result<String> {
        ok(self.command(args).output()?).with_context(|| format!("ctr {}", args.join(" ")))
    }

    /// What the command said; it must fail.
    ///
    /// # Errors
    /// It succeeded.
    pub fn fails(&self, line: &str) -> Result<String> {
        let output = self.words(line).output()?;
        if output.status.success() {
            bail!("ctr {line} should fail and printed {}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(text(&output))
    }

    /// The command on a terminal of its own (script(1)), as a person runs it.
    ///
    /// # Errors
    /// It failed.
    pub fn on_terminal(&self, line: &str) -> Result<String> {
        let line = format!("ctr --address {} --namespace {} {line}", self.address.display(), self.namespace);
        let output = Command::new("script")
            .args(["--quiet", "--return", "--echo", "never", "--command", &line, "/dev/null"])
            .stdin(Stdio::null())
            .output()?;
        ok(output).with_context(|| line)
    }
}

/// Standard output and standard error together.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
