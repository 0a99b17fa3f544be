//! `davit logs`: what a container in the background has written.

mod json;

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::client::Client;
use crate::commands::events::when;
use crate::error::{Error, Result};
use crate::place::{self, Places};
use crate::process::{self, ProcessId};
use crate::{container, labels, log};
use json::{JsonLog, Outputs, Show};

/// How often a followed log is looked at.
const INTERVAL: Duration = Duration::from_millis(100);
const BUFFER_SIZE: usize = 64 << 10;
/// The most parts that a log is looked through for when nobody says how many there may be.
const MOST_PARTS: u32 = 100;

/// Options of `davit logs`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  davit logs -n 20 web\n  davit logs -ft --since 10m web")]
pub(crate) struct Options {
    /// Go on until the container exits
    #[arg(short, long)]
    follow: bool,
    /// Show the last lines only
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = parse_tail)]
    tail: Tail,
    /// Show the output since then only: a duration before now such as 10m, or a time of RFC 3339
    #[arg(long, value_name = "WHEN", value_parser = when::parse_time)]
    since: Option<SystemTime>,
    /// Show the time of each line
    #[arg(short, long)]
    timestamps: bool,
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
    let Some(path) = Places::of(client).await?.log_of(&container) else {
        return Err(Error::usage(
            format!("container {} was run in the foreground, so its output was not kept", options.container),
            "run it with -d to have its output in a log",
        ));
    };
    let rotation = container.labels.get(labels::LOG_OPTIONS).map_or("", String::as_str);
    let mut log = AnyLog::open(path, log::max_files(rotation), &options)?;
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

/// `davit logs` while there is no daemon, for the reason `error`: shims write on, and of a log whose name begins with the
/// container's id all is known but how many parts it may have.
pub(crate) fn without_daemon(
    namespace: &str,
    options: &Options,
    error: Error,
    out: &mut dyn Write,
) -> Result<()> {
    let folder = Path::new(place::LOG_FOLDER).join(namespace);
    let Ok(entries) = std::fs::read_dir(folder) else { return Err(error) };
    let is_it = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&options.container) && name.ends_with(".log")
    };
    let mut found = entries.flatten().map(|entry| entry.path()).filter(is_it);
    let (Some(path), None, false) = (found.next(), found.next(), options.follow) else { return Err(error) };
    AnyLog::open(path, MOST_PARTS, options)?.copy(out)
}

/// What a log gets from now on.
///
/// # Errors
/// When it cannot be read.
pub(super) fn from_now(path: &Path, rotation: &str) -> Result<AnyLog> {
    AnyLog::open_at(path.to_owned(), log::max_files(rotation), Show::default(), Tail::Lines(0))
}

/// A log in either form.
pub(super) enum AnyLog {
    Plain(Log),
    Json(JsonLog),
}

impl AnyLog {
    fn open(path: PathBuf, max_files: u32, options: &Options) -> Result<AnyLog> {
        let show = Show { since: options.since, timestamps: options.timestamps };
        AnyLog::open_at(path, max_files, show, options.tail)
    }

    fn open_at(path: PathBuf, max_files: u32, show: Show, tail: Tail) -> Result<AnyLog> {
        if log::is_json(&path) {
            return JsonLog::open(path, max_files, show, tail).map(AnyLog::Json);
        }
        if show.since.is_some() || show.timestamps {
            return Err(Error::usage(
                "this log is plain text, without times",
                "leave out --since and --timestamps",
            ));
        }
        let mut log = Log { path, file: None, position: 0 };
        if let (Tail::Lines(lines), true) = (tail, log.open()?) {
            log.position = log
                .file
                .as_mut()
                .map_or(Ok((0, 0)), |file| tail_position(file, lines))
                .map_err(|source| log.error(source))?
                .0;
        }
        Ok(AnyLog::Plain(log))
    }

    /// Writes everything new.
    pub(super) fn copy(&mut self, out: &mut dyn Write) -> Result<()> {
        match self {
            AnyLog::Plain(log) => log.copy(out),
            AnyLog::Json(log) => log.copy(&mut Outputs { out, err: &mut std::io::stderr() }),
        }
    }
}

/// A log file that may not exist yet, may be cut, and may be replaced by a new one.
pub(super) struct Log {
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

/// Where the last `lines` lines begin, and how many there are from there. A last line without an end counts.
fn tail_position(file: &mut (impl Read + Seek), lines: u64) -> std::io::Result<(u64, u64)> {
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 || end == 0 {
        return Ok((end, 0));
    }
    let mut position = end;
    let mut found = 0;
    let mut buffer = vec![0; BUFFER_SIZE];
    while position > 0 {
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
                    return Ok((at + 1, found));
                }
            }
        }
    }
    Ok((0, found + 1))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn the_last_lines() {
        let tail = |text: &str, lines| {
            let (position, found) = tail_position(&mut Cursor::new(text), lines).unwrap();
            assert_eq!(found, text[usize::try_from(position).unwrap()..].lines().count() as u64);
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
