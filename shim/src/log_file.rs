//! Files that output is written to: plain ones, and json logs that are rotated. All of this may sleep in the kernel for
//! as long as a filesystem takes, so that only helpers call it (see [`crate::offload`]).
//!
//! A json log that is full becomes `NAME.1`, that one before `NAME.2`, and so on, as Docker names them. Each step of a
//! rotation is one rename, and after each the next rotation finds its way: a crash loses nothing.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::stdio::saved;

/// What a file holds, and how it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The bytes of the container.
    Plain,
    /// Lines of JSON.
    Json {
        /// The size in bytes that no file grows beyond, unless one line is longer; 0 for no limit.
        max_size: u64,
        /// How many files there may be, at least 1.
        max_files: u32,
    },
}

/// A log to append to.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    format: Format,
    /// `None` after a rotation that could not be finished.
    file: Option<File>,
    /// Its size. Only for json logs, which nobody else writes to.
    size: u64,
}

/// How much of what was to be written is in the file, and why not the rest.
#[derive(Debug)]
pub(crate) struct Written {
    /// The bytes that need not be written again.
    pub(crate) count: usize,
    /// The answer of the kernel.
    pub(crate) error: Option<io::Error>,
}

impl LogFile {
    /// Opens a log, which is made if it is missing, with its folder.
    ///
    /// # Errors
    /// That of the kernel.
    pub(crate) fn open(path: &Path, format: Format) -> io::Result<LogFile> {
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        }
        let mut log = LogFile { path: path.to_owned(), format, file: None, size: 0 };
        log.reopen()?;
        Ok(log)
    }

    /// Opens what is there already, which may be a device.
    ///
    /// # Errors
    /// That of the kernel.
    pub(crate) fn open_existing(path: &Path) -> io::Result<LogFile> {
        let file = open_waiting(File::options().append(true), path)?;
        Ok(LogFile { path: path.to_owned(), format: Format::Plain, file: Some(file), size: 0 })
    }

    /// What it holds.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    fn reopen(&mut self) -> io::Result<&mut File> {
        let mut options = File::options();
        options.append(true).create(true);
        let file = match self.format {
            Format::Plain => open_waiting(options.mode(0o644), &self.path)?,
            Format::Json { .. } => {
                let file = open_waiting(options.read(true).mode(0o640), &self.path)?;
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
                }
                self.size = metadata.len();
                let mut last = [b'\n'];
                if self.size > 0 {
                    file.read_exact_at(&mut last, self.size - 1)?;
                }
                if last != [b'\n'] {
                    // Whoever wrote that line died over it.
                    (&file).write_all(b"\n")?;
                    self.size += 1;
                }
                file
            }
        };
        Ok(self.file.insert(file))
    }

    /// Appends bytes; to a json log whole lines.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Written {
        let mut count = 0;
        let error = match self.format {
            Format::Plain => self.write_plain(bytes, &mut count),
            Format::Json { max_size, max_files } => self.write_lines(bytes, max_size, max_files, &mut count),
        }
        .err();
        Written { count, error }
    }

    fn write_plain(&mut self, bytes: &[u8], count: &mut usize) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.reopen()?,
        };
        write_counting(file, bytes, count)
    }

    fn write_lines(
        &mut self,
        bytes: &[u8],
        max_size: u64,
        max_files: u32,
        count: &mut usize,
    ) -> io::Result<()> {
        while *count < bytes.len() {
            if self.file.is_none() {
                self.reopen()?;
            }
            let room = if max_size == 0 { u64::MAX } else { max_size.saturating_sub(self.size) };
            let rest = &bytes[*count..];
            let mut part = whole_lines(rest, room);
            if part == 0 && self.size > 0 && max_size > 0 {
                self.rotate(max_files)?;
                continue;
            }
            if part == 0 {
                // A line that is longer than any file may be gets a file of its own.
                part = first_line(rest);
            }
            let file = self.file.as_mut().expect("it was opened above");
            let mut written = 0;
            let result = write_counting(file, &rest[..part], &mut written);
            let kept = if result.is_ok() { part } else { whole_lines(&rest[..written], u64::MAX) };
            if kept < written {
                // Half a line would spoil the next.
                file.set_len(self.size + kept as u64)?;
            }
            self.size += kept as u64;
            *count += kept;
            result?;
        }
        Ok(())
    }

    /// Makes room: this file gets the number 1, and those with numbers the next, up to the first that is free or must
    /// go.
    fn rotate(&mut self, max_files: u32) -> io::Result<()> {
        if max_files < 2 {
            if let Some(file) = &self.file {
                file.set_len(0)?;
            }
            self.size = 0;
            return Ok(());
        }
        let mut free = 1;
        while free < max_files - 1 && self.numbered(free).symlink_metadata().is_ok() {
            free += 1;
        }
        for number in (1..free).rev() {
            rename(&self.numbered(number), &self.numbered(number + 1))?;
        }
        rename(&self.path, &self.numbered(1))?;
        self.file = None;
        self.reopen().map(drop)
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    /// Describes it; `fds` takes note of the file.
    pub(crate) fn save(&self, fds: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> saved::Log {
        let (json, max_size, max_files) = match self.format {
            Format::Plain => (false, 0, 0),
            Format::Json { max_size, max_files } => (true, max_size, max_files),
        };
        saved::Log {
            path: self.path.display().to_string(),
            json,
            max_size,
            max_files,
            file: self.file.as_ref().map_or(0, |file| fds(file.as_fd())),
            file_size: self.size,
            ..saved::Log::default()
        }
    }

    /// What [`LogFile::save`] described.
    ///
    /// # Errors
    /// The file is missing.
    pub(crate) fn restore(
        saved: &saved::Log,
        fds: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<LogFile> {
        let file = if saved.file == 0 { None } else { Some(File::from(fds(saved.file)?)) };
        let format = match saved.json {
            true => Format::Json { max_size: saved.max_size, max_files: saved.max_files },
            false => Format::Plain,
        };
        Ok(LogFile { path: PathBuf::from(&saved.path), format, file, size: saved.file_size })
    }
}

/// Opens a file without waiting for anybody, as one would at a FIFO, for operations that may wait. A FIFO without a reader
/// is an error.
fn open_waiting(options: &mut std::fs::OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// A name that is not there needs no other.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The bytes of the lines that fit into `room`.
fn whole_lines(bytes: &[u8], room: u64) -> usize {
    let room = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
    bytes[..room].iter().rposition(|byte| *byte == b'\n').map_or(0, |index| index + 1)
}

fn first_line(bytes: &[u8]) -> usize {
    bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |index| index + 1)
}

fn write_counting(file: &mut File, bytes: &[u8], count: &mut usize) -> io::Result<()> {
    while *count < bytes.len() {
        match file.write(&bytes[*count..]) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => *count += written,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn json(max_size: u64, max_files: u32) -> Format {
        Format::Json { max_size, max_files }
    }

    fn write(log: &mut LogFile, text: &str) {
        let written = log.write(text.as_bytes());
        assert!(written.error.is_none() && written.count == text.len(), "{written:?}");
    }

    #[test]
    fn a_full_log_moves_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/log");
        let mut log = LogFile::open(&path, json(10, 3)).unwrap();
        write(&mut log, "1234\n5678\n");
        write(&mut log, "abc\n");
        write(&mut log, "def\nghi\njkl\n");
        write(&mut log, "a line of its own\nx\n");
        let read = |name: &str| std::fs::read_to_string(folder.path().join("deep").join(name)).unwrap();
        assert_eq!(names(&folder.path().join("deep")), ["log", "log.1", "log.2"]);
        assert_eq!([read("log.2"), read("log.1"), read("log")], ["ghi\njkl\n", "a line of its own\n", "x\n"]);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn one_file_alone_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = LogFile::open(&path, json(8, 1)).unwrap();
        write(&mut log, "one\ntwo\nthree\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        assert_eq!(names(folder.path()), ["log"]);
    }

    #[test]
    fn a_rotation_goes_on_where_a_crash_left_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        // Died after `log.1` had become `log.2`.
        std::fs::write(folder.path().join("log.2"), "old\n").unwrap();
        std::fs::write(&path, "new\nhal").unwrap();
        let mut log = LogFile::open(&path, json(9, 4)).unwrap();
        write(&mut log, "next\n");
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!([read("log.2"), read("log.1"), read("log")], ["old\n", "new\nhal\n", "next\n"]);
        // Died after `log` had become `log.1`.
        drop(log);
        std::fs::remove_file(&path).unwrap();
        let mut log = LogFile::open(&path, json(9, 4)).unwrap();
        write(&mut log, "again\n");
        assert_eq!([read("log.1"), read("log")], ["new\nhal\n", "again\n"]);
    }

    #[test]
    fn a_log_that_takes_nothing_says_so() {
        let mut log = LogFile::open_existing(Path::new("/dev/full")).unwrap();
        let written = log.write(b"text");
        assert_eq!(written.count, 0);
        assert_eq!(written.error.unwrap().kind(), ErrorKind::StorageFull);
    }
}
