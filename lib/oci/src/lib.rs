//! OCI images and runtime specs, as plain functions over plain types: what the CLI, CRI and transfer share.
//!
//! From the outside in: an image [`mod@reference`] names an image; its documents ([`image`]) are parsed with bounds and
//! keep their bytes; an [`archive`] holds several; a [`platform`] picks one manifest of an index; [`chain`] names the snapshots of its layers; a
//! [`rootfs`] is read without mounting it to resolve [`user`]s; and [`spec`] turns the image's configuration and the
//! caller's options into the document that an OCI runtime executes.
//!
//! **Invariant:** nothing here writes, mounts or talks to a socket; the only I/O is reading files below a rootfs.

pub mod archive;
pub mod chain;
pub mod environment;
pub mod image;
pub mod media_type;
pub mod platform;
pub mod reference;
pub mod rootfs;
pub mod spec;
pub mod user;
