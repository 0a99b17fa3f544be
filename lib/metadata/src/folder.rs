//! The database's folder: its lock and its format file.
//!
//! ```text
//! <folder>/lock            flock(2)ed for as long as the database is open
//! <folder>/format          what this is: a version, the engine, and whether it was ever complete
//! <folder>/metadata.redb   the engine's file, or
//! <folder>/sled/           the engine's folder
//! ```
//!
//! ```text
//! nothing ── format says "creating" ── engine creates its files ── format says "ready"
//! ```
//! Before "ready" nothing was ever acknowledged, so that what is there may be thrown away. After it, a missing
//! file is damage and never taken for a new database.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::engine::EngineKind;
use crate::error::OpenError;

/// The version of the folder's layout and of the engines' encoding of records.
const FORMAT: &str = "davit-metadata 1";

pub(crate) struct Folder {
    path: PathBuf,
    engine: EngineKind,
    ready: bool,
    lock: File,
}

impl Folder {
    /// Creates the folder if need be, locks it, and checks that it can be opened with this engine.
    pub(crate) fn lock(path: &Path, engine: EngineKind) -> Result<Folder, OpenError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(path).map_err(OpenError::io("create", path))?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(OpenError::io("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(OpenError::io("lock", &lock_path)(source)),
        }
        let mut folder = Folder { path: path.to_owned(), engine, ready: false, lock };
        folder.ready = folder.check()?;
        if !folder.ready {
            folder.write_format(false)?;
        }
        Ok(folder)
    }

    /// Whether the engine's files are yet to be created.
    pub(crate) fn is_new(&self) -> bool {
        !self.ready
    }

    /// To be called when the engine's files exist and are synced.
    pub(crate) fn set_ready(&mut self) -> Result<(), OpenError> {
        if !self.ready {
            self.write_format(true)?;
            self.ready = true;
        }
        Ok(())
    }

    /// Whether there is a complete database. If there is an incomplete one, its files are removed.
    fn check(&self) -> Result<bool, OpenError> {
        let path = self.path.clone();
        let files = self.path.join(self.engine.file_name());
        let present = match fs::symlink_metadata(&files) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(source) => return Err(OpenError::io("stat", &files)(source)),
        };
        let format = self.path.join("format");
        let text = match fs::read_to_string(&format) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && present => {
                return Err(OpenError::MissingFormat { path });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(OpenError::io("read", &format)(source)),
        };
        let unknown = || OpenError::UnknownFormat { path: path.clone(), found: text.clone() };
        let lines: Vec<&str> = text.lines().collect();
        let [FORMAT, engine, state] = lines[..] else { return Err(unknown()) };
        let found: EngineKind = engine.parse().map_err(|_| unknown())?;
        match state {
            "ready" if found != self.engine => {
                Err(OpenError::OtherEngine { path, found, wanted: self.engine })
            }
            "ready" if !present => Err(OpenError::Missing { path, missing: files }),
            "ready" => Ok(true),
            "creating" => {
                let files = self.path.join(found.file_name());
                let removed = match found {
                    EngineKind::Sled => fs::remove_dir_all(&files),
                    EngineKind::Redb => fs::remove_file(&files),
                };
                match removed {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        Err(OpenError::io("remove", &files)(error))
                    }
                    _ => Ok(false),
                }
            }
            _ => Err(unknown()),
        }
    }

    fn write_format(&self, ready: bool) -> Result<(), OpenError> {
        let state = if ready { "ready" } else { "creating" };
        let (new, path) = (self.path.join("format.new"), self.path.join("format"));
        let text = format!("{FORMAT}\n{}\n{state}\n", self.engine);
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(OpenError::io("write", &new))?;
        fs::rename(&new, &path).map_err(OpenError::io("rename", &new))?;
        for folder in [&self.path, self.path.parent().unwrap_or(Path::new("/"))] {
            // The parent of a relative path of one part is the empty path.
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            let synced = File::open(folder).and_then(|file| file.sync_all());
            synced.map_err(OpenError::io("sync", folder))?;
        }
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Closing the file would do, if no child of this process were between `fork` and `exec` and held it, too.
        let _ = self.lock.unlock();
    }
}
