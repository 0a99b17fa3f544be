//! Why a layer could not be applied or made, and the classes that these errors have on the wire.

use std::io;

use davit_model::{Coded, ErrorCode};
use davit_sys::mount;
use nix::errno::Errno;

/// Why a layer could not be applied or made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The media type is none of a layer, or of one that is encrypted or compressed in another way.
    #[error("unsupported layer media type {media_type:?}")]
    MediaType {
        /// The media type that was asked for.
        media_type: String,
    },
    /// The reader of the stored layer failed.
    #[error("failed to read the archive")]
    Read {
        /// What the reader answered.
        source: io::Error,
    },
    /// The writer that takes the new layer failed.
    #[error("failed to write the layer")]
    Write {
        /// What the writer answered.
        source: io::Error,
    },
    /// The compressed stream does not decompress: a bad header, a wrong checksum, or bytes after its end that are
    /// no further member.
    #[error("corrupt {compression} stream")]
    Corrupt {
        /// `gzip` or `zstd`.
        compression: &'static str,
        /// What the decompressor answered.
        source: io::Error,
    },
    /// The stream ends in the middle of a compressed block, a tar header or a file.
    #[error("unexpected EOF: the archive is truncated")]
    Truncated,
    /// The tar archive breaks a rule of the format.
    #[error("invalid tar archive after {offset} bytes: {fault}")]
    Archive {
        /// How many bytes of the uncompressed archive come before the end of the offending header.
        offset: u64,
        /// The rule.
        fault: ArchiveFault,
    },
    /// A well-formed entry asks for something that no layer may have.
    #[error("invalid archive entry {entry:?}: {fault}")]
    Entry {
        /// The name of the entry, as far as it is text.
        entry: String,
        /// The rule.
        fault: EntryFault,
    },
    /// The filesystem refused an operation.
    #[error("failed to {operation} {path:?}")]
    File {
        /// What was attempted, as a verb: `create file`, `set xattr user.x of`, …
        operation: String,
        /// The path within the root of the layer, or of the root itself.
        path: String,
        /// What the kernel answered.
        source: Errno,
    },
    /// A file became shorter while it was read into a layer.
    #[error("file {path:?} changed while it was read")]
    Changed {
        /// The path within the tree.
        path: String,
    },
    /// The given mounts cannot be mounted.
    #[error("failed to mount the snapshot")]
    Mount {
        /// Which mount, and why.
        source: mount::Error,
    },
    /// The private place for the mounts could not be made.
    #[error("failed to {operation}")]
    Workspace {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// The rules of the tar format (POSIX pax, GNU tar) that a reader must insist on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveFault {
    /// The sum in a header is not that of its bytes: this is no tar archive, or it is damaged.
    #[error("header checksum mismatch")]
    Checksum,
    /// A zero block that no second one follows.
    #[error("zero block that does not end the archive")]
    LoneZeroBlock,
    /// A number in a header is no number, or out of range.
    #[error("bad number in header field {field}")]
    Number {
        /// The field of the header, or the key of the pax record.
        field: &'static str,
    },
    /// A pax record has not the form `length key=value`.
    #[error("malformed pax record")]
    Record,
    /// Two extended headers of one sort describe one entry: readers differ in which one counts.
    #[error("two {sort} headers for one entry")]
    Repeated {
        /// `pax`, `long name` or `long link`.
        sort: &'static str,
    },
    /// An extended header is larger than the limit.
    #[error("extended header of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// Extended headers at the end of the archive describe no entry.
    #[error("extended header without an entry")]
    Dangling,
    /// The map of a sparse file overlaps, is out of order, too long, or does not match its sizes.
    #[error("malformed sparse map")]
    Sparse,
}

/// What no entry of a layer may ask for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryFault {
    /// The name leads out of the root.
    #[error("name leads outside of the root")]
    Escape,
    /// The name or link target is empty.
    #[error("empty name")]
    EmptyName,
    /// The name or link target has a NUL in it.
    #[error("NUL byte in name")]
    NulInName,
    /// The name is longer than the kernel's limit for paths.
    #[error("name of {length} bytes is too long")]
    NameTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// `.wh.` that names nothing, the folder itself, its parent, or a folder on the way.
    #[error("invalid whiteout")]
    Whiteout,
    /// The type is none that this reader knows, so the entry cannot be applied faithfully.
    #[error("unhandled tar header type {kind:?}")]
    Kind {
        /// The type flag.
        kind: char,
    },
    /// An owner beyond 32 bits, or the id -1, which chown(2) takes for "leave as it is".
    #[error("owner {id} is out of range")]
    Owner {
        /// The id in the header.
        id: u64,
    },
    /// The parent of the entry is neither a folder nor a symlink to one.
    #[error("parent is not a folder")]
    ParentNotFolder,
    /// The parent is reached by more symlinks than the kernel would follow.
    #[error("too many levels of symbolic links")]
    LinkLoop,
    /// The target of a hard link is not in the tree, or is a folder.
    #[error("hard link target {target:?} cannot be linked")]
    LinkTarget {
        /// The target as far as it is text.
        target: String,
    },
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::MediaType { .. } => ErrorCode::Unimplemented,
            Error::Read { .. } | Error::Write { .. } | Error::Workspace { .. } => ErrorCode::Unknown,
            Error::Corrupt { .. } | Error::Truncated => ErrorCode::DataLoss,
            Error::Archive { .. } | Error::Entry { .. } => ErrorCode::InvalidArgument,
            Error::File { source: Errno::ENOSPC | Errno::EDQUOT, .. } => ErrorCode::ResourceExhausted,
            Error::File { .. } => ErrorCode::Unknown,
            Error::Changed { .. } => ErrorCode::Aborted,
            Error::Mount { source } => source.code(),
        }
    }
}

impl Error {
    /// An error of a file operation on a path of the tree.
    pub(super) fn file(operation: impl Into<String>, path: &[u8], source: Errno) -> Error {
        Error::File { operation: operation.into(), path: text(path), source }
    }

    /// An error of an entry.
    pub(super) fn entry(name: &[u8], fault: EntryFault) -> Error {
        Error::Entry { entry: text(name), fault }
    }
}

/// A name from outside as text for messages, cut so that a hostile one does not flood a log.
pub(super) fn text(name: &[u8]) -> String {
    const LIMIT: usize = 512;
    match name.get(..LIMIT) {
        Some(start) => format!("{}…", String::from_utf8_lossy(start)),
        None => String::from_utf8_lossy(name).into_owned(),
    }
}
