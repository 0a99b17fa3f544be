//! The media types of layers: those of the OCI image specification, and those of Docker that came before.

use super::error::Error;

/// How a layer is compressed, as its media type has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Declared {
    /// Not at all.
    Plain,
    /// With gzip or zstd, or not said. Which of them, the first bytes tell: containerd reads no more than "in
    /// some way" out of the suffix, and images whose suffix is wrong work there.
    Compressed,
}

/// How a layer is to be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// What the media type of a stored layer says about its compression.
pub(super) fn declared(media_type: &str) -> Result<Declared, Error> {
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar" => Ok(Declared::Plain),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd" => Ok(Declared::Compressed),
        _ => Err(Error::MediaType { media_type: media_type.to_owned() }),
    }
}

/// How to compress a new layer. Only the OCI types can be made; none at all means gzip, as containerd has it.
pub(super) fn wanted(media_type: &str) -> Result<Compression, Error> {
    match media_type {
        "application/vnd.oci.image.layer.v1.tar" => Ok(Compression::Plain),
        "" | "application/vnd.oci.image.layer.v1.tar+gzip" => Ok(Compression::Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd" => Ok(Compression::Zstd),
        _ => Err(Error::MediaType { media_type: media_type.to_owned() }),
    }
}
