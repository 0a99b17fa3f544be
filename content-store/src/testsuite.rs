//! The conformance suite of content stores: what clients of containerd rely on, for the local store and for any
//! service in front of one. The behaviour is that of containerd's own suite (`core/content/testsuite`); labels are
//! left out, because the store has none; what it says of damaged ingests (`resume_damaged`) is our own.
//!
//! An implementation is wrapped in [`ContentStore`], which is object-safe and has errors of codes only, so that
//! the same cases run on this crate's store and through a socket.

use std::time::SystemTime;

use davit_model::{Algorithm, Coded, Digest, ErrorCode};

use crate::{Hasher, Info, Status, Store, Writer};

/// An error as a client sees it.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Its class, which the suite checks.
    pub code: ErrorCode,
    /// Its text, for the report of a failed case.
    pub text: String,
}

impl<E: Coded> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { code: error.code(), text: error.to_string() }
    }
}

/// A content store under test. The calls are those of [`Store`](crate::Store).
pub trait ContentStore {
    /// See [`Store::info`].
    fn info(&self, digest: &Digest) -> Result<Info, Failure>;
    /// The blob's bytes from `offset` on, at most `limit` of them.
    fn read(&self, digest: &Digest, offset: u64, limit: usize) -> Result<Vec<u8>, Failure>;
    /// See [`Store::writer`].
    fn writer(
        &self,
        reference: &str,
        total: u64,
        expected: Option<&Digest>,
    ) -> Result<Box<dyn ContentWriter>, Failure>;
    /// See [`Store::status`].
    fn status(&self, reference: &str) -> Result<Status, Failure>;
    /// See [`Store::statuses`].
    fn statuses(&self) -> Result<Vec<Status>, Failure>;
    /// See [`Store::abort`].
    fn abort(&self, reference: &str) -> Result<(), Failure>;
    /// See [`Store::delete`].
    fn delete(&self, digest: &Digest) -> Result<(), Failure>;
    /// See [`Store::walk`].
    fn walk(&self) -> Result<Vec<Info>, Failure>;
}

/// A writer under test. Dropping it releases the reference before the drop returns.
pub trait ContentWriter {
    /// See [`Writer::write`].
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure>;
    /// [`Writer::truncate`] to nothing.
    fn truncate(&mut self) -> Result<(), Failure>;
    /// See [`Writer::status`].
    fn status(&mut self) -> Result<Status, Failure>;
    /// See [`Writer::digest`].
    fn digest(&mut self) -> Result<Digest, Failure>;
    /// See [`Writer::commit`].
    fn commit(self: Box<Self>, size: u64, expected: Option<&Digest>) -> Result<Digest, Failure>;
}

impl ContentStore for Store {
    fn info(&self, digest: &Digest) -> Result<Info, Failure> {
        Ok(Store::info(self, digest)?)
    }

    fn read(&self, digest: &Digest, offset: u64, limit: usize) -> Result<Vec<u8>, Failure> {
        let reader = self.reader(digest)?;
        let mut bytes = vec![0; limit];
        let mut filled = 0;
        loop {
            match reader.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) => return Err(Failure { code: ErrorCode::Internal, text: error.to_string() }),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn writer(
        &self,
        reference: &str,
        total: u64,
        expected: Option<&Digest>,
    ) -> Result<Box<dyn ContentWriter>, Failure> {
        Ok(Box::new(Store::writer(self, reference, total, expected)?))
    }

    fn status(&self, reference: &str) -> Result<Status, Failure> {
        Ok(Store::status(self, reference)?)
    }

    fn statuses(&self) -> Result<Vec<Status>, Failure> {
        Ok(Store::statuses(self)?)
    }

    fn abort(&self, reference: &str) -> Result<(), Failure> {
        Ok(Store::abort(self, reference)?)
    }

    fn delete(&self, digest: &Digest) -> Result<(), Failure> {
        Ok(Store::delete(self, digest)?)
    }

    fn walk(&self) -> Result<Vec<Info>, Failure> {
        Ok(Store::walk(self)?)
    }
}

impl ContentWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        Ok(Writer::write(self, bytes)?)
    }

    fn truncate(&mut self) -> Result<(), Failure> {
        Ok(Writer::truncate(self, 0)?)
    }

    fn status(&mut self) -> Result<Status, Failure> {
        Ok(Writer::status(self))
    }

    fn digest(&mut self) -> Result<Digest, Failure> {
        Ok(Writer::digest(self))
    }

    fn commit(self: Box<Self>, size: u64, expected: Option<&Digest>) -> Result<Digest, Failure> {
        Ok(Writer::commit(*self, size, expected)?)
    }
}

/// One case: it panics if the store, which is empty at its start, is not as it should be.
pub type Case = fn(&dyn ContentStore);

/// All cases by their names.
pub const CASES: &[(&str, Case)] = &[
    ("writer", writer),
    ("update_status", update_status),
    ("commit_exists", commit_exists),
    ("expected_exists", expected_exists),
    ("commit_error_state", commit_error_state),
    ("empty_blob", empty_blob),
    ("small_blob", small_blob),
    ("sha512", sha512),
    ("resume_writer", resume_writer),
    ("resume_truncate", resume_truncate),
    ("resume_discard", resume_discard),
    ("resume_copy", resume_copy),
    ("resume_other_total", resume_other_total),
    ("resume_damaged", resume_damaged),
    ("references", references),
    ("statuses", statuses),
    ("abort", abort),
    ("delete", delete),
    ("walk", walk),
];

/// Runs all cases, each on a store of its own. A failed one panics with its name printed before.
pub fn run(mut new_store: impl FnMut(&str) -> Box<dyn ContentStore>) {
    for (name, case) in CASES {
        println!("content suite: {name}");
        case(&*new_store(name));
    }
}

/// Bytes that no other call returns, and their digest.
fn content(seed: u64, size: usize) -> (Vec<u8>, Digest) {
    // A xorshift generator: any fixed noise will do.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes: Vec<u8> = (0..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect();
    let digest = sha256(&bytes);
    (bytes, digest)
}

fn sha256(bytes: &[u8]) -> Digest {
    Hasher::digest_of(Algorithm::Sha256, bytes)
}

#[track_caller]
fn ok<T>(result: Result<T, Failure>) -> T {
    match result {
        Ok(value) => value,
        Err(failure) => panic!("{:?}: {}", failure.code, failure.text),
    }
}

#[track_caller]
fn refused<T>(result: Result<T, Failure>, code: ErrorCode) {
    match result {
        Ok(_) => panic!("no error, expected {code:?}"),
        Err(failure) => assert_eq!(failure.code, code, "{}", failure.text),
    }
}

/// The reference has a writer.
#[track_caller]
fn busy(store: &dyn ContentStore, reference: &str) {
    refused(store.writer(reference, 0, None), ErrorCode::Unavailable);
}

/// The blob is there and was committed between two times.
#[track_caller]
fn blob(store: &dyn ContentStore, digest: &Digest, bytes: &[u8], before: SystemTime) {
    let info = ok(store.info(digest));
    assert_eq!((&info.digest, info.size), (digest, bytes.len() as u64));
    let after = SystemTime::now();
    assert!(before <= info.created_at && info.created_at <= after, "{before:?} {info:?} {after:?}");
    assert!(before <= info.updated_at && info.updated_at <= after, "{before:?} {info:?} {after:?}");
    assert!(ok(store.read(digest, 0, bytes.len() + 1)) == bytes, "the blob is not what was written");
}

/// The writer has written `bytes`, all of its reference.
#[track_caller]
fn progress(writer: &mut dyn ContentWriter, reference: &str, bytes: &[u8], total: u64) -> Status {
    let status = ok(writer.status());
    assert_eq!(status.reference, reference);
    assert_eq!((status.offset, status.total), (bytes.len() as u64, total));
    assert_eq!(ok(writer.digest()), sha256(bytes));
    status
}

/// Writers that know the size, the digest, both or nothing, open at the same time.
fn writer(store: &dyn ContentStore) {
    let before = SystemTime::now();
    let sizes = [256, 256, 256, 256, 8 << 20];
    let blobs: Vec<_> = sizes.into_iter().zip(1..).map(|(size, seed)| content(seed, size)).collect();
    let mut writers = Vec::new();
    for (number, (bytes, digest)) in blobs.iter().enumerate() {
        let total = if number % 2 == 1 || number == 4 { bytes.len() as u64 } else { 0 };
        let expected = (number >= 2).then_some(digest);
        writers.push(ok(store.writer(&format!("writer-{number}"), total, expected)));
    }
    for ((bytes, digest), mut writer) in blobs.iter().zip(writers) {
        // Small pieces for the small ones.
        for piece in bytes.chunks((bytes.len() / 100).max(32)) {
            ok(writer.write(piece));
        }
        refused(store.info(digest), ErrorCode::NotFound);
        assert_eq!(ok(writer.commit(0, None)), *digest);
        blob(store, digest, bytes, before);
    }
    assert!(ok(store.statuses()).is_empty());
}

/// Offset, digest and times follow each write.
fn update_status(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    let before = SystemTime::now();
    let mut writer = ok(store.writer("status", 256, Some(&digest)));
    let opened = SystemTime::now();
    let first = progress(&mut *writer, "status", b"", 256);
    assert!(before <= first.started_at && first.started_at <= opened, "{before:?} {first:?} {opened:?}");
    let mut written = 0;
    for end in [64, 192, 256] {
        let before = SystemTime::now();
        ok(writer.write(&bytes[written..end]));
        written = end;
        let status = progress(&mut *writer, "status", &bytes[..end], 256);
        assert_eq!(status.started_at, first.started_at);
        assert!(
            before <= status.updated_at && status.updated_at <= SystemTime::now(),
            "{before:?} {status:?}"
        );
    }
    ok(writer.commit(0, None));
    blob(store, &digest, &bytes, before);
}

/// A blob that is there already is not written again, whether its digest was announced or not.
fn commit_exists(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    let mut writer = ok(store.writer("first", 0, None));
    ok(writer.write(&bytes));
    ok(writer.commit(256, Some(&digest)));
    for expected in [Some(&digest), None] {
        let mut writer = ok(store.writer("second", 0, None));
        ok(writer.write(&bytes));
        refused(writer.commit(256, expected), ErrorCode::AlreadyExists);
        // The ingest is gone, and its reference free.
        refused(store.status("second"), ErrorCode::NotFound);
    }
}

/// A writer that announces the digest of a blob is refused at once.
fn expected_exists(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    let mut writer = ok(store.writer("first", 0, Some(&digest)));
    ok(writer.write(&bytes));
    ok(writer.commit(256, Some(&digest)));
    refused(store.writer("second", 256, Some(&digest)), ErrorCode::AlreadyExists);
    ok(store.writer("second", 0, None));
}

/// After a failed commit the reference is free; what was written is kept if only the announcement was wrong.
fn commit_error_state(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    let (_, other) = content(2, 256);
    let mut writer = ok(store.writer("first", 0, None));
    ok(writer.write(&bytes));
    ok(writer.commit(0, None));

    let more = [&bytes[..], b"more"].concat();
    let mut writer = ok(store.writer("state", 0, None));
    busy(store, "state");
    ok(writer.write(&bytes));
    refused(writer.commit(256, Some(&digest)), ErrorCode::AlreadyExists);

    let mut writer = ok(store.writer("state", 0, None));
    busy(store, "state");
    ok(writer.write(&more));
    refused(writer.commit(260, Some(&other)), ErrorCode::FailedPrecondition);

    let mut writer = ok(store.writer("state", 0, None));
    busy(store, "state");
    progress(&mut *writer, "state", &more, 0);
    refused(writer.commit(256, None), ErrorCode::FailedPrecondition);

    let mut writer = ok(store.writer("state", 0, None));
    busy(store, "state");
    progress(&mut *writer, "state", &more, 0);
    assert_eq!(ok(writer.commit(260, None)), sha256(&more));

    // The reference can be used anew.
    let mut writer = ok(store.writer("state", 0, None));
    progress(&mut *writer, "state", b"", 0);
    ok(writer.write(&bytes));
    ok(writer.truncate());
    drop(writer);
    let mut writer = ok(store.writer("state", 0, None));
    progress(&mut *writer, "state", b"", 0);
}

/// A blob of no bytes is one.
fn empty_blob(store: &dyn ContentStore) {
    let before = SystemTime::now();
    let writer = ok(store.writer("empty", 0, Some(&sha256(b""))));
    ok(writer.commit(0, Some(&sha256(b""))));
    blob(store, &sha256(b""), b"", before);
}

/// Reads at offsets, within and beyond the end.
fn small_blob(store: &dyn ContentStore) {
    let mut writer = ok(store.writer("small", 6, None));
    ok(writer.write(b"foobar"));
    let digest = ok(writer.commit(6, None));
    assert_eq!(ok(store.read(&digest, 0, 7)), b"foobar");
    assert_eq!(ok(store.read(&digest, 2, 3)), b"oba");
    assert_eq!(ok(store.read(&digest, 5, 9)), b"r");
    assert_eq!(ok(store.read(&digest, 6, 1)), b"");
    refused(store.read(&sha256(b"other"), 0, 1), ErrorCode::NotFound);
    refused(store.info(&sha256(b"other")), ErrorCode::NotFound);
}

/// The algorithm is that of the announced digest, whenever it is announced.
fn sha512(store: &dyn ContentStore) {
    let before = SystemTime::now();
    for (seed, early) in [(1, true), (2, false)] {
        let (bytes, _) = content(seed, 5000);
        let digest = Hasher::digest_of(Algorithm::Sha512, &bytes);
        let mut writer = ok(store.writer("sha512", 0, early.then_some(&digest)));
        ok(writer.write(&bytes));
        assert_eq!(ok(writer.commit(0, Some(&digest))), digest);
        blob(store, &digest, &bytes, before);
        let wrong = Hasher::digest_of(Algorithm::Sha512, b"wrong");
        let mut writer = ok(store.writer("wrong", 0, None));
        ok(writer.write(b"right"));
        refused(writer.commit(0, Some(&wrong)), ErrorCode::FailedPrecondition);
        ok(store.abort("wrong"));
    }
}

/// A second writer goes on where the first stopped, and says so.
fn resume_writer(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    let before = SystemTime::now();
    let mut writer = ok(store.writer("resume", 256, Some(&digest)));
    ok(writer.write(&bytes[..128]));
    let first = progress(&mut *writer, "resume", &bytes[..128], 256);
    drop(writer);
    let stored = ok(store.status("resume"));
    assert_eq!((stored.offset, stored.total, stored.started_at), (128, 256, first.started_at));

    let mut writer = ok(store.writer("resume", 256, Some(&digest)));
    let second = progress(&mut *writer, "resume", &bytes[..128], 256);
    assert_eq!((second.started_at, second.updated_at), (first.started_at, first.updated_at));
    ok(writer.write(&bytes[128..]));
    progress(&mut *writer, "resume", &bytes, 256);
    ok(writer.commit(0, None));
    blob(store, &digest, &bytes, before);
}

/// Writes parts of several sizes, opens each again, and finishes it in one way.
fn resume(store: &dyn ContentStore, finish: impl Fn(&mut dyn ContentWriter, &[u8], usize)) {
    for (size, seed) in [(500, 1), (5000, 2), (50_000, 3)] {
        for tenths in [0, 1, 5, 9, 10] {
            let before = SystemTime::now();
            let (bytes, digest) = content(seed * 100 + tenths, size);
            let limit = size * tenths as usize / 10;
            let reference = format!("resume-{size}-{tenths}");
            let mut writer = ok(store.writer(&reference, size as u64, Some(&digest)));
            ok(writer.write(&bytes[..limit]));
            drop(writer);
            let mut writer = ok(store.writer(&reference, size as u64, Some(&digest)));
            progress(&mut *writer, &reference, &bytes[..limit], size as u64);
            finish(&mut *writer, &bytes, limit);
            ok(writer.commit(size as u64, Some(&digest)));
            blob(store, &digest, &bytes, before);
        }
    }
}

/// The client starts over.
fn resume_truncate(store: &dyn ContentStore) {
    resume(store, |writer, bytes, _| {
        ok(writer.truncate());
        bytes.chunks(1024).for_each(|piece| ok(writer.write(piece)));
    });
}

/// The client leaves out what was written.
fn resume_discard(store: &dyn ContentStore) {
    resume(store, |writer, bytes, limit| {
        bytes[limit..].chunks(1024).for_each(|piece| ok(writer.write(piece)));
    });
}

/// The client asks for the offset and goes on there.
fn resume_copy(store: &dyn ContentStore) {
    resume(store, |writer, bytes, _| {
        let offset = ok(writer.status()).offset as usize;
        ok(writer.write(&bytes[offset..]));
    });
}

/// Another total means that it is another blob.
fn resume_other_total(store: &dyn ContentStore) {
    let mut writer = ok(store.writer("total", 100, None));
    ok(writer.write(b"of another blob"));
    drop(writer);
    let mut writer = ok(store.writer("total", 6, None));
    progress(&mut *writer, "total", b"", 6);
    ok(writer.write(b"foo"));
    drop(writer);
    // Who does not know the total gets the one that is known.
    let mut writer = ok(store.writer("total", 0, None));
    progress(&mut *writer, "total", b"foo", 6);
    ok(writer.write(b"bar"));
    assert_eq!(ok(writer.commit(0, None)), sha256(b"foobar"));
}

/// What an earlier writer wrote turns out to be wrong: the client gets an error once, and starts anew.
fn resume_damaged(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    let mut writer = ok(store.writer("damaged", 256, Some(&digest)));
    ok(writer.write(&[0; 128]));
    drop(writer);
    let mut writer = ok(store.writer("damaged", 256, Some(&digest)));
    ok(writer.write(&bytes[128..]));
    refused(writer.commit(256, Some(&digest)), ErrorCode::FailedPrecondition);
    let mut writer = ok(store.writer("damaged", 256, Some(&digest)));
    progress(&mut *writer, "damaged", b"", 256);
    ok(writer.write(&bytes));
    assert_eq!(ok(writer.commit(256, Some(&digest))), digest);
}

/// References are texts, not paths.
fn references(store: &dyn ContentStore) {
    refused(store.writer("", 0, None), ErrorCode::InvalidArgument);
    let long = "long/".repeat(1000);
    let references = ["..", "/", "../../blobs/sha256", "a/b", "a", "A", "ä\n\t", " ", long.as_str()];
    let writers: Vec<_> = references.iter().map(|reference| ok(store.writer(reference, 0, None))).collect();
    for reference in references {
        busy(store, reference);
        assert_eq!(ok(store.status(reference)).reference, reference);
    }
    let mut listed: Vec<_> = ok(store.statuses()).into_iter().map(|status| status.reference).collect();
    listed.sort();
    let mut wanted: Vec<_> = references.iter().map(ToString::to_string).collect();
    wanted.sort();
    assert_eq!(listed, wanted);
    drop(writers);
    for reference in references {
        ok(store.abort(reference));
    }
}

/// Listing shows the ingests that there are, whether they have a writer or not.
fn statuses(store: &dyn ContentStore) {
    assert!(ok(store.statuses()).is_empty());
    let (bytes, digest) = content(1, 300);
    let mut one = ok(store.writer("one", 300, Some(&digest)));
    let two = ok(store.writer("two", 0, None));
    ok(one.write(&bytes[..100]));
    let mut statuses = ok(store.statuses());
    statuses.sort_by(|a, b| a.reference.cmp(&b.reference));
    let seen: Vec<_> =
        statuses.iter().map(|status| (&*status.reference, status.offset, status.total)).collect();
    assert_eq!(seen, [("one", 100, 300), ("two", 0, 0)]);
    drop(two);
    assert_eq!(ok(store.statuses()).len(), 2);
    ok(one.write(&bytes[100..]));
    ok(one.commit(0, None));
    assert_eq!(ok(store.statuses()).len(), 1);
    refused(store.status("one"), ErrorCode::NotFound);
    assert_eq!(ok(store.status("two")).offset, 0);
}

/// An aborted ingest is gone; what comes after it starts with nothing.
fn abort(store: &dyn ContentStore) {
    refused(store.abort("abort"), ErrorCode::NotFound);
    let mut writer = ok(store.writer("abort", 0, None));
    ok(writer.write(b"gone"));
    drop(writer);
    ok(store.abort("abort"));
    refused(store.status("abort"), ErrorCode::NotFound);
    refused(store.abort("abort"), ErrorCode::NotFound);
    let mut writer = ok(store.writer("abort", 0, None));
    progress(&mut *writer, "abort", b"", 0);
}

/// A deleted blob is gone and can be written again.
fn delete(store: &dyn ContentStore) {
    let (bytes, digest) = content(1, 256);
    refused(store.delete(&digest), ErrorCode::NotFound);
    for _ in 0..2 {
        let before = SystemTime::now();
        let mut writer = ok(store.writer("delete", 256, Some(&digest)));
        ok(writer.write(&bytes));
        ok(writer.commit(256, Some(&digest)));
        blob(store, &digest, &bytes, before);
        ok(store.delete(&digest));
        refused(store.info(&digest), ErrorCode::NotFound);
        refused(store.read(&digest, 0, 1), ErrorCode::NotFound);
        refused(store.delete(&digest), ErrorCode::NotFound);
    }
}

/// Walking shows all blobs, and no ingest.
fn walk(store: &dyn ContentStore) {
    let mut wanted = Vec::new();
    for seed in 0..20 {
        let (bytes, digest) = content(seed, 100 + seed as usize);
        let mut writer = ok(store.writer("walk", 0, None));
        ok(writer.write(&bytes));
        ok(writer.commit(0, None));
        wanted.push((digest, bytes.len() as u64));
    }
    let _ingest = ok(store.writer("walk", 0, None));
    let mut found: Vec<_> = ok(store.walk()).into_iter().map(|info| (info.digest, info.size)).collect();
    found.sort();
    wanted.sort();
    assert_eq!(found, wanted);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_store_conforms() {
        let folder = tempfile::tempdir().unwrap();
        run(|name| Box::new(Store::open(&folder.path().join(name)).unwrap()));
    }
}
