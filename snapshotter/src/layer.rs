//! Layers: applying tar archives to snapshots, and making archives of the difference between two.
//!
//! ```text
//! apply:  blob ─► decompress + hash (own thread) ─► archive ─► extract ─► tree ─► syncfs
//!                                                          └─► pack ─► image ─► fsync
//! diff:   two trees ─► compare ─► archive writer ─► hash ─► compress (own thread) ─► blob
//! ```
//!
//! The rules are those of the OCI image specification ("Image Layer Filesystem Changeset"); where it is silent,
//! those of containerd 2.3. What a layer says is not trusted: nothing outside of the root of the tree is ever
//! read or changed, whatever the names, links and orders of the entries (`layer/root.rs` has the argument), and the
//! memory that an archive can take is bounded (`layer/archive.rs`).

mod archive;
mod compare;
mod compress;
mod decompress;
mod difference;
mod error;
mod extract;
mod media_type;
mod members;
mod name;
mod pack;
mod pax;
mod root;
mod target;
mod whiteout;
mod writer;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::SystemTime;

use davit_model::{Digest, Mount};
use nix::errno::Errno;
use nix::unistd::syncfs;

pub use error::{ArchiveFault, EntryFault, Error};
use media_type::Declared;
pub use members::{Member, read_members};
use target::{OverImages, Tree};
use whiteout::Whiteouts;

use crate::erofs;

/// How a layer is applied.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    /// Sync the filesystem before returning, so that an applied layer survives a power cut. On by default; off
    /// only where the tree need not outlive the machine's uptime.
    pub sync: bool,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        ApplyOptions { sync: true }
    }
}

/// What was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The digest of the whole uncompressed stream, which an image's config lists as the diff id of the layer.
    pub digest: Digest,
    /// The size of the whole uncompressed stream in bytes.
    pub size: u64,
}

/// How the difference is made.
#[derive(Debug, Clone, Default)]
pub struct DiffOptions {
    /// No modification time in the layer is later than this (`SOURCE_DATE_EPOCH` of reproducible builds).
    pub source_date_epoch: Option<SystemTime>,
}

/// The difference that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diffed {
    /// The digest of the uncompressed archive (the label `containerd.io/uncompressed`).
    pub digest: Digest,
    /// The size of the uncompressed archive in bytes.
    pub size: u64,
}

/// Applies a layer to the filesystem that `mounts` describe, and syncs it.
///
/// The layer is read to its end, also behind the end of the archive, so that the digest is of the whole stream.
/// After an error the tree holds a part of the layer; the caller removes the snapshot.
///
/// # Errors
/// See [`Error`]; [`Error::MediaType`] before anything is read.
pub fn apply(
    reader: impl Read + Send,
    media_type: &str,
    mounts: &[Mount],
    options: &ApplyOptions,
) -> Result<Applied, Error> {
    let declared = media_type::declared(media_type)?;
    let image = target::changes_of_image(mounts);
    if image.and_then(Path::parent).is_some_and(erofs::has_applied) {
        // The files of that are in an image, where nothing can be added.
        return Err(Error::file("apply a second layer to", b"/", Errno::EEXIST));
    }
    let options = &ApplyOptions { sync: options.sync && image.is_none() };
    if let Some(OverImages { upper: Some(upper), images }) = target::over_images(mounts) {
        let trees: Vec<Tree> = images.iter().map(|image| Tree::Mounts(vec![image.clone()])).collect();
        return target::with_trees(&trees, |lowers| {
            let whiteouts = Whiteouts::Overlay { prefix: "trusted.overlay.", lowers };
            apply_to(reader, declared, target::open_folder(Path::new(upper))?, whiteouts, options)
        });
    }
    match target::open_direct(mounts)? {
        Some((root, whiteouts)) => apply_to(reader, declared, root, whiteouts, options),
        None => target::with_trees(&[Tree::Mounts(mounts.to_vec())], |roots| {
            let [root] = <[OwnedFd; 1]>::try_from(roots).expect("as many roots as trees");
            let applied = apply_to(reader, declared, root, Whiteouts::Remove, options)?;
            if let Some(upper) = target::behind_helper(mounts).filter(|_| options.sync) {
                sync_filesystem_of(&target::open_folder(upper)?)?;
            }
            Ok(applied)
        }),
    }
}

/// One pass over the filesystem: a sync of each file would commit its journal thousands of times.
fn sync_filesystem_of(folder: &OwnedFd) -> Result<(), Error> {
    syncfs(folder).map_err(|errno| Error::file("sync the filesystem of", b"/", errno))
}

/// Applies a layer to a new snapshot to which nothing else is written before it is committed, and syncs it. One that becomes
/// an image is written as that at once. All others are as with [`apply`].
///
/// # Errors
/// Those of [`apply`].
pub fn apply_alone(reader: impl Read + Send, media_type: &str, mounts: &[Mount]) -> Result<Applied, Error> {
    let changes = target::changes_of_image(mounts);
    let Some((upper, snapshot)) = changes.and_then(|upper| Some((upper, upper.parent()?))) else {
        return apply(reader, media_type, mounts, &ApplyOptions::default());
    };
    let io_error = |operation| {
        move |error: io::Error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            Error::file(operation, snapshot.as_os_str().as_encoded_bytes(), errno)
        }
    };
    let is_new = fs::read_dir(upper).map_err(io_error("read folder of"))?.next().is_none();
    if !is_new || erofs::has_applied(snapshot) {
        return apply(reader, media_type, mounts, &ApplyOptions::default());
    }
    let declared = media_type::declared(media_type)?;
    let images = target::over_images(mounts).map(|over| over.images);
    let trees: Vec<Tree> = images
        .iter()
        .flat_map(|images| images.iter())
        .map(|image| Tree::Mounts(vec![image.clone()]))
        .collect();
    let top = fs::metadata(upper).map_err(io_error("stat"))?;
    target::with_trees(&trees, |lowers| {
        let lowers = images.is_some().then_some(lowers);
        let applied = erofs::Applied::begin(snapshot).map_err(io_error("create image in"))?;
        let file = applied.file();
        let ((), outcome) =
            decompress::with_stream(reader, declared, |stream| pack::pack(stream, file, &top, lowers))?;
        applied.finish().map_err(io_error("finish image in"))?;
        Ok(outcome)
    })
}

/// Applies a plain or compressed archive to the folder `root` itself; whiteouts delete what is there. Nothing is
/// synced.
///
/// # Errors
/// See [`Error`].
pub fn apply_to_folder(reader: impl Read + Send, root: &Path) -> Result<Applied, Error> {
    let options = ApplyOptions { sync: false };
    apply_to(reader, Declared::Compressed, target::open_folder(root)?, Whiteouts::Remove, &options)
}

fn apply_to(
    reader: impl Read + Send,
    declared: Declared,
    root: OwnedFd,
    whiteouts: Whiteouts,
    options: &ApplyOptions,
) -> Result<Applied, Error> {
    let sync =
        root.try_clone().map_err(|source| Error::Workspace { operation: "copy a descriptor", source })?;
    let ((), applied) =
        decompress::with_stream(reader, declared, |stream| extract::extract(stream, root, whiteouts))?;
    if options.sync {
        sync_filesystem_of(&sync)?;
    }
    Ok(applied)
}

/// Writes to `writer` the layer of media type `media_type` that turns the filesystem of `lower` into that of
/// `upper`. Empty `lower` stands for an empty tree.
///
/// # Errors
/// See [`Error`]; [`Error::MediaType`] before anything is mounted.
pub fn diff(
    lower: &[Mount],
    upper: &[Mount],
    media_type: &str,
    writer: impl Write + Send,
    options: &DiffOptions,
) -> Result<Diffed, Error> {
    let compression = media_type::wanted(media_type)?;
    compress::with_sink(writer, compression, |sink| difference::write(lower, upper, options, sink))
}
