//! `davit logs`: what a container in the background has written.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::client::Client;
use crate::container;
use crate::error::{Error, Result};
use crate::labels;
use crate::process::{self, ProcessId};

/// How often a followed log is looked at.
const INTERVAL: Duration = Duration::from_millis(100);
const BUFFER_SIZE: usize = 64 << 10;

/// Options of `davit logs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Go on until the container exits
    #[arg(short, long)]
    follow: bool,
    /// Show the last lines only
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = parse_tail)]
    tail: Tail,
    /// The container, by name or id
    container: String,
}

/// How many lines from the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tail {
    All,
    Lines(u64),
}

fn parse_tail(text: &str) -> std::result::Result<Tail, String> {
    match text {
        "all" | "-1" => Ok(Tail::All),
        other => other.parse().map(Tail::Lines).map_err(|_| "want a number, or \"all\"".to_owned()),
    }
}

/// `davit logs`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let container = container::find(client, &options.container).await?;
    let Some(path) = container.labels.get(labels::LOG) else {
        return Err(Error::usage(
            format!("container {} was run in the foreground, so its output was not kept", options.container),
            "run it with -d to have its output in a log",
        ));
    };
    let mut log = Log { path: PathBuf::from(path), file: None, position: 0 };
    if let (Tail::Lines(lines), true) = (options.tail, log.open()?) {
        log.position = log
            .file
            .as_mut()
            .map_or(Ok(0), |file| tail_position(file, lines))
            .map_err(|source| log.error(source))?;
    }
    if !options.follow {
        return log.copy(out);
    }
    let process = ProcessId { container: container.id.clone(), exec: String::new() };
    let exit = process::wait(client, &process);
    tokio::pin!(exit);
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        // Cancel safety: `exit` is pinned outside of the loop, and a tick that is missed comes again.
        tokio::select! {
            result = &mut exit => {
                // What was written before the exit is in the file by now, and that is all.
                log.copy(out)?;
                return match result {
                    Err(error) if !error.is_not_found() => Err(error),
                    _ => Ok(()),
                };
            }
            _ = ticks.tick() => log.copy(out)?,
        }
    }
}

/// A log file that may not exist yet, may be cut, and may be replaced by a new one.
struct Log {
    path: PathBuf,
    file: Option<File>,
    position: u64,
}

impl Log {
    fn error(&self, source: std::io::Error) -> Error {
        Error::File { action: "cannot read the log", path: self.path.clone(), source }
    }

    /// Opens the file if it is not open; false when there is none.
    fn open(&mut self) -> Result<bool> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(self.error(error)),
            }
        }
        Ok(true)
    }

    /// Writes everything new.
    fn copy(&mut self, out: &mut dyn Write) -> Result<()> {
        while self.open()? {
            let Some(file) = &mut self.file else { break };
            let copied = copy_from(file, &mut self.position, out);
            match copied {
                Ok(()) => {}
                Err(CopyError::Output(source)) => return Err(Error::Output(source)),
                Err(CopyError::Input(source)) => return Err(self.error(source)),
            }
            if !self.is_replaced() {
                break;
            }
            self.file = None;
            self.position = 0;
        }
        out.flush().map_err(Error::Output)
    }

    /// Whether the name stands for another file by now.
    fn is_replaced(&self) -> bool {
        let identity = |status: std::fs::Metadata| (status.dev(), status.ino());
        let open = self.file.as_ref().and_then(|file| file.metadata().ok()).map(identity);
        let named = std::fs::metadata(Path::new(&self.path)).ok().map(identity);
        named.is_some() && named != open
    }
}

enum CopyError {
    Input(std::io::Error),
    Output(std::io::Error),
}

fn copy_from(file: &mut File, position: &mut u64, out: &mut dyn Write) -> std::result::Result<(), CopyError> {
    if file.metadata().map_err(CopyError::Input)?.len() < *position {
        // It was cut: what is in it now is all new.
        *position = 0;
    }
    file.seek(SeekFrom::Start(*position)).map_err(CopyError::Input)?;
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let count = file.read(&mut buffer).map_err(CopyError::Input)?;
        if count == 0 {
            return Ok(());
        }
        out.write_all(&buffer[..count]).map_err(CopyError::Output)?;
        *position += count as u64;
    }
}

/// Where the last `lines` lines begin. A last line without an end counts.
fn tail_position(file: &mut (impl Read + Seek), lines: u64) -> std::io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    let mut position = end;
    let mut found = 0;
    let mut buffer = vec![0; BUFFER_SIZE];
    while position > 0 && lines > 0 {
        let count = position.min(BUFFER_SIZE as u64);
        position -= count;
        file.seek(SeekFrom::Start(position))?;
        let part = &mut buffer[..usize::try_from(count).expect("no larger than the buffer")];
        file.read_exact(part)?;
        for (index, byte) in part.iter().enumerate().rev() {
            let at = position + index as u64;
            if *byte == b'\n' && at + 1 != end {
                found += 1;
                if found == lines {
                    return Ok(at + 1);
                }
            }
        }
    }
    Ok(if lines == 0 { end } else { 0 })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn the_last_lines() {
        let tail = |text: &str, lines| {
            let position = tail_position(&mut Cursor::new(text), lines).unwrap();
            text[usize::try_from(position).unwrap()..].to_owned()
        };
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a\nb\n", 5), "a\nb\n");
        assert_eq!(tail("a\nb\n", 0), "");
        assert_eq!(tail("", 3), "");
        assert_eq!(tail("\n\n\n", 2), "\n\n");
        let long = "x".repeat(BUFFER_SIZE) + "\nlast\n";
        assert_eq!(tail(&long, 1), "last\n");
        assert_eq!(tail(&long, 2), long);
    }

    #[test]
    fn a_log_may_come_late_be_cut_and_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = Log { path: path.clone(), file: None, position: 0 };
        let new = |log: &mut Log| {
            let mut out = Vec::new();
            log.copy(&mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(new(&mut log), "");
        std::fs::write(&path, "one").unwrap();
        assert_eq!(new(&mut log), "one");
        assert_eq!(new(&mut log), "");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(new(&mut log), "x");
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        std::fs::write(&path, "two").unwrap();
        assert_eq!(new(&mut log), "two");
    }
}
