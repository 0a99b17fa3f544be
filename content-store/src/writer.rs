//! Writing and committing a blob.

use std::fs::{File, FileTimes, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::SystemTime;

use davit_model::{Algorithm, Digest};
use tracing::warn;

use crate::error::Error;
use crate::folder::Folder;
use crate::hasher::Hasher;
use crate::ingest::{self, Status};
use crate::store::Lock;

/// How much of a file is read at once to hash it.
const BUFFER_SIZE: usize = 1 << 20;

/// The one writer of an ingest. Dropping it keeps what was written, for the next writer of the reference.
#[derive(Debug)]
pub struct Writer {
    lock: Lock,
    /// By descriptor: an ingest that is aborted and started anew is another one.
    folder: Folder,
    data: File,
    hasher: Hasher,
    offset: u64,
    total: u64,
    expected: Option<Digest>,
    started_at: SystemTime,
    updated_at: SystemTime,
    /// Something was written or truncated, and the ingest still exists.
    dirty: bool,
    /// Part of the data was written by an earlier writer, maybe before a power cut.
    resumed: bool,
}

impl Writer {
    pub(crate) fn open(lock: Lock, total: u64, expected: Option<&Digest>) -> Result<Writer, Error> {
        let algorithm = expected.map_or(Algorithm::Sha256, Digest::algorithm);
        let name = ingest::folder_name(&lock.reference);
        let expected = expected.cloned();
        let ingests = &lock.inner.ingests;
        let mut new = ingests.make_folder(&name)?;
        if !new {
            match resume(ingests, &name, total, algorithm) {
                Ok((folder, status, data, hasher)) => {
                    let Status { offset, total, started_at, updated_at, .. } = status;
                    return Ok(Writer {
                        lock,
                        folder,
                        data,
                        hasher,
                        offset,
                        total,
                        expected,
                        started_at,
                        updated_at,
                        dirty: false,
                        resumed: offset > 0,
                    });
                }
                Err(reason) => {
                    match reason {
                        Unusable::OtherTotal => {}
                        Unusable::Failed(error) if error.is_damage() => {
                            warn!(reference = lock.reference, %error, "starting a damaged ingest anew");
                        }
                        // What can be read at another time must not be thrown away.
                        Unusable::Failed(error) => return Err(error),
                    }
                    match ingests.remove_folder(&name) {
                        Err(error) if !error.is_missing() => return Err(error),
                        _ => new = ingests.make_folder(&name)?,
                    }
                }
            }
        }
        if !new {
            // It was removed a moment ago, and the reference is locked.
            return Err(Error::Foreign { path: ingests.path().join(&name), expected: "new ingest" });
        }
        let folder = ingests.folder(&name)?;
        let now = SystemTime::now();
        let data = ingest::create(&folder, &lock.reference, total, now)?;
        let (started_at, updated_at) = (now, now);
        let hasher = Hasher::new(algorithm);
        Ok(Writer {
            lock,
            folder,
            data,
            hasher,
            offset: 0,
            total,
            expected,
            started_at,
            updated_at,
            dirty: false,
            resumed: false,
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`Error::Io`]. What was written before the error counts.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let written = match self.data.write_at(bytes, self.offset) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.failed("write")(source)),
            };
            if written == 0 {
                return Err(self.failed("write")(io::ErrorKind::WriteZero.into()));
            }
            self.hasher.update(&bytes[..written]);
            self.offset += written as u64;
            bytes = &bytes[written..];
        }
        self.touch();
        Ok(())
    }

    /// Throws away what was written; `size` must be 0.
    ///
    /// # Errors
    /// [`Error::BadTruncation`], [`Error::Io`].
    pub fn truncate(&mut self, size: u64) -> Result<(), Error> {
        if size != 0 {
            return Err(Error::BadTruncation { size });
        }
        self.data.set_len(0).map_err(self.failed("truncate"))?;
        self.hasher = Hasher::new(self.hasher.algorithm());
        self.offset = 0;
        self.resumed = false;
        self.touch();
        Ok(())
    }

    fn touch(&mut self) {
        self.updated_at = SystemTime::now();
        self.dirty = true;
    }

    /// How far it has come.
    pub fn status(&self) -> Status {
        Status {
            reference: self.lock.reference.clone(),
            offset: self.offset,
            total: self.total,
            expected: self.expected.clone(),
            started_at: self.started_at,
            updated_at: self.updated_at,
        }
    }

    /// The digest of what was written so far.
    pub fn digest(&self) -> Digest {
        self.hasher.digest()
    }

    /// Makes what was written a blob, if it has the size (0 = any) and the digest that are expected; returns its
    /// digest when the blob is durable. The ingest is gone then, and the reference is free in any case.
    ///
    /// # Errors
    /// [`Error::WrongSize`] leaves the ingest as it is, and so does [`Error::WrongDigest`], unless part of it was
    /// written by an earlier writer. [`Error::BlobExists`] removes it. [`Error::NoIngest`] if it was aborted.
    pub fn commit(mut self, size: u64, expected: Option<&Digest>) -> Result<Digest, Error> {
        if size > 0 && size != self.offset {
            return Err(Error::WrongSize { actual: self.offset, expected: size });
        }
        if let Some(expected) = expected
            && expected.algorithm() != self.hasher.algorithm()
        {
            // The digest was not announced when the writer was opened.
            let (hasher, _) =
                hash(&self.data, Hasher::new(expected.algorithm())).map_err(self.failed("read"))?;
            self.hasher = hasher;
        }
        let digest = self.hasher.digest();
        if let Some(expected) = expected
            && *expected != digest
        {
            if self.resumed {
                // Data that was not synced when the power failed may be damaged. Kept, it would spoil every attempt.
                warn!(reference = self.lock.reference, %expected, "removing a resumed ingest of another digest");
                self.remove_ingest();
            }
            return Err(Error::WrongDigest { actual: digest, expected: expected.clone() });
        }
        let inner = self.lock.inner.clone();
        let blobs = inner.blobs(digest.algorithm());
        if inner.exists(&digest)? {
            self.remove_ingest();
            return Err(Error::BlobExists { digest });
        }

        let now = SystemTime::now();
        self.data.set_permissions(Permissions::from_mode(0o444)).map_err(self.failed("chmod"))?;
        let times = FileTimes::new().set_accessed(now).set_modified(now);
        self.data.set_times(times).map_err(self.failed("set the times of"))?;
        self.data.sync_all().map_err(self.failed("sync"))?;
        let publishing = inner.publishing();
        if inner.exists(&digest)? {
            // Another writer was faster, while this one synced.
            self.remove_ingest();
            return Err(Error::BlobExists { digest });
        }
        match self.folder.rename("data", blobs, digest.hex()) {
            Err(error) if error.is_missing() => {
                return Err(Error::NoIngest { reference: self.lock.reference.clone() });
            }
            result => result?,
        }
        drop(publishing);
        blobs.sync()?;
        self.remove_ingest();
        Ok(digest)
    }

    /// The blob exists, so that this cannot fail the commit; what is left is removed when the store is opened.
    fn remove_ingest(&mut self) {
        self.dirty = false;
        let name = ingest::folder_name(&self.lock.reference);
        match self.lock.inner.ingests.remove_folder(&name) {
            Err(error) if !error.is_missing() => {
                warn!(reference = self.lock.reference, %error, "cannot remove a finished ingest");
            }
            _ => {}
        }
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = self.folder.path().join("data");
        move |source| Error::Io { operation, path, source }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.dirty {
            // The kernel stamps files with a clock that ticks every few milliseconds only; a status read later is
            // to say what this writer said. Should it fail, the coarse time stays.
            let _ = self.data.set_modified(self.updated_at);
        }
    }
}

/// Why an ingest cannot be resumed.
enum Unusable {
    /// The writer announces another size.
    OtherTotal,
    /// A file is missing, or not what it should be, or cannot be read now.
    Failed(Error),
}

impl From<Error> for Unusable {
    fn from(error: Error) -> Unusable {
        Unusable::Failed(error)
    }
}

fn resume(
    ingests: &Folder,
    name: &str,
    total: u64,
    algorithm: Algorithm,
) -> Result<(Folder, Status, File, Hasher), Unusable> {
    let folder = ingests.folder(name)?;
    let mut status = ingest::read_status(&folder)?;
    if total > 0 && status.total > 0 && status.total != total {
        return Err(Unusable::OtherTotal);
    }
    if total > 0 && status.total == 0 {
        ingest::write_total(&folder, total)?;
        status.total = total;
    }
    let (data, _) = folder.open_or_create("data")?;
    let (hasher, offset) =
        hash(&data, Hasher::new(algorithm)).map_err(Error::io("read", &folder.path().join("data")))?;
    status.offset = offset;
    Ok((folder, status, data, hasher))
}

/// Hashes a file from its start; returns the number of bytes, too.
fn hash(file: &File, mut hasher: Hasher) -> io::Result<(Hasher, u64)> {
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok((hasher, offset)),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
