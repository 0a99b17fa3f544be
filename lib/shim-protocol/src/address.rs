//! Where a shim listens: the path that containerd's own tools and later daemons compute again.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use davit_model::{Coded, ErrorCode};
use sha2::{Digest as _, Sha256};

/// The folder of the sockets unless the daemon names another: where containerd and its tools look for them.
pub const DEFAULT_SOCKET_DIR: &str = "/run/containerd/s";

/// The longest path that fits into a `sockaddr_un` with its closing NUL, less what Go's runtime keeps
/// (containerd `pkg/shim`).
pub const MAX_SOCKET_PATH: usize = 106;

/// An address that this project cannot connect to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Another transport than a unix socket.
    #[error("unsupported protocol: {protocol}")]
    Protocol {
        /// The part before `://`.
        protocol: String,
    },
    /// No absolute path, or one that is too long for a socket.
    #[error("invalid socket path {path:?}")]
    Path {
        /// The path.
        path: PathBuf,
    },
}

impl Coded for AddressError {
    fn code(&self) -> ErrorCode {
        match self {
            AddressError::Protocol { .. } | AddressError::Path { .. } => ErrorCode::InvalidArgument,
        }
    }
}

/// The socket of the shim that serves `group` (a container's id, or that of its pod) for the daemon at
/// `grpc_address`: `<socket_dir>/<sha256 of "<grpc_address>/<namespace>/<group>">` (containerd
/// `CreateSocketAddress`; the hashed path is cleaned as Go's `filepath.Join` does it).
pub fn socket_path(socket_dir: &Path, grpc_address: &str, namespace: &str, group: &str) -> PathBuf {
    let hashed = clean(&[grpc_address, namespace, group]);
    let mut name = String::with_capacity(64);
    for byte in Sha256::digest(hashed.as_bytes()) {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    socket_dir.join(name)
}

/// The address of a socket path, as a shim prints it.
pub fn unix_address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// The socket path of an address that a shim printed: `unix:///path`, `ttrpc+unix:///path`, or a bare
/// absolute path.
///
/// # Errors
/// [`AddressError`] for another transport, and for a path that no socket can have.
pub fn parse(address: &str) -> Result<PathBuf, AddressError> {
    let path = match address.split_once("://") {
        None => Path::new(address),
        Some(("unix" | "ttrpc+unix" | "grpc+unix", path)) => Path::new(path),
        Some((protocol, _)) => return Err(AddressError::Protocol { protocol: protocol.to_owned() }),
    };
    let valid = path.is_absolute()
        && path.as_os_str().len() <= MAX_SOCKET_PATH
        && !path.as_os_str().as_encoded_bytes().contains(&0);
    if valid { Ok(path.to_owned()) } else { Err(AddressError::Path { path: path.to_owned() }) }
}

/// Joins with slashes and removes what is redundant: empty parts, `.`, and `..` with the part before it.
fn clean(parts: &[&str]) -> String {
    let joined = parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("/");
    let rooted = joined.starts_with('/');
    let mut kept: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if kept.last().is_some_and(|last| *last != "..") => {
                kept.pop();
            }
            ".." if rooted => {}
            part => kept.push(part),
        }
    }
    match (rooted, kept.is_empty()) {
        (true, _) => format!("/{}", kept.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => kept.join("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_the_one_that_containerd_computes() {
        // `printf /run/containerd/containerd.sock/default/test | sha256sum`
        let path =
            socket_path(Path::new(DEFAULT_SOCKET_DIR), "/run/containerd/containerd.sock", "default", "test");
        assert_eq!(
            path,
            Path::new("/run/containerd/s/cfa94b04d543b3f64f78eff8125c7a7cd0903173f673d87367be72ff09fc92c2")
        );
    }

    #[test]
    fn paths_are_cleaned_as_go_does() {
        for (parts, expected) in [
            (vec!["/a//b/", "c", "d"], "/a/b/c/d"),
            (vec!["/a/./b", "../c", ""], "/a/c"),
            (vec!["", "ns", "id"], "ns/id"),
            (vec!["/..", "a"], "/a"),
            (vec!["..", "..", "a"], "../../a"),
            (vec!["", ""], "."),
            (vec!["/", ".."], "/"),
        ] {
            assert_eq!(clean(&parts), expected, "{parts:?}");
        }
    }

    #[test]
    fn addresses_are_unix_sockets() {
        let path = Path::new("/run/containerd/s/abc");
        assert_eq!(parse(&unix_address(path)).unwrap(), path);
        assert_eq!(parse("ttrpc+unix:///x").unwrap(), Path::new("/x"));
        assert_eq!(parse("/x").unwrap(), Path::new("/x"));
        assert_eq!(parse("vsock://1:2"), Err(AddressError::Protocol { protocol: "vsock".into() }));
        for bad in ["", "unix://", "unix://relative", "unix:///a\0b", &format!("unix:///{}", "a".repeat(200))]
        {
            assert!(matches!(parse(bad), Err(AddressError::Path { .. })), "{bad:?}");
        }
    }
}
