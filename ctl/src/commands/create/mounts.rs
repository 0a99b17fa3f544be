//! `--volume`, `--mount` and `--tmpfs`: folders and files of the host, and memory, in the container.

use std::fs;
use std::path::Path;

use davit_oci::spec::{BindMount, TmpfsMount};

use crate::error::{Error, Result};
use crate::format;

const PROPAGATIONS: [&str; 6] = ["private", "rprivate", "shared", "rshared", "slave", "rslave"];
const NO_VOLUMES: &str = "mount a folder or file of the host: -v /HOST/PATH:/CONTAINER/PATH[:ro]";

/// What `--mount` asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mount {
    /// Something of the host.
    Bind(BindMount),
    /// Memory.
    Tmpfs(TmpfsMount),
}

/// `/host:/container[:options]`. A folder of the host that does not exist is made, as with Docker.
pub(super) fn volume(text: &str) -> Result<BindMount> {
    let mut parts = text.splitn(3, ':');
    let (source, destination, options) =
        (parts.next().unwrap_or(""), parts.next(), parts.next().unwrap_or(""));
    let is_path = source.starts_with(['/', '.']);
    let Some(destination) = destination.filter(|_| is_path) else {
        let message = format!("invalid volume {text:?}: named and anonymous volumes are not there yet");
        return Err(Error::usage(message, NO_VOLUMES));
    };
    let mut mount = BindMount {
        source: source.to_owned(),
        destination: destination.to_owned(),
        read_only: false,
        propagation: String::new(),
    };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => mount.read_only = true,
            "rw" => mount.read_only = false,
            other if PROPAGATIONS.contains(&other) => mount.propagation = other.to_owned(),
            other => {
                return Err(Error::usage(
                    format!("invalid volume {text:?}: unknown option {other:?}"),
                    format!("want ro, rw, or one of {}", PROPAGATIONS.join(", ")),
                ));
            }
        }
    }
    if fs::symlink_metadata(source).is_err() {
        fs::create_dir_all(source).map_err(|error| unusable(source, error))?;
    }
    mount.source = real(source)?;
    Ok(mount)
}

/// `PATH[:OPTIONS]`.
pub(super) fn tmpfs(text: &str) -> TmpfsMount {
    let (destination, options) = text.split_once(':').unwrap_or((text, ""));
    let options = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned).collect();
    TmpfsMount { destination: destination.to_owned(), options }
}

/// `type=bind,source=/host,target=/container[,readonly][,bind-propagation=MODE]`, or
/// `type=tmpfs,target=/container[,tmpfs-size=BYTES][,tmpfs-mode=MODE]`. Here a source of the host must exist.
pub(super) fn mount(text: &str) -> Result<Mount> {
    let invalid =
        |reason: String, hint: &str| Error::usage(format!("invalid mount {text:?}: {reason}"), hint);
    let (mut kind, mut source, mut target) = ("volume", None, None);
    let (mut read_only, mut propagation, mut options) = (false, String::new(), Vec::new());
    for field in text.split(',').filter(|field| !field.is_empty()) {
        let (key, value) = field.split_once('=').unwrap_or((field, "true"));
        match (key, value) {
            ("type", value) => kind = value,
            ("source" | "src", value) => source = Some(value),
            ("target" | "destination" | "dst", value) => target = Some(value),
            ("readonly" | "ro", "true" | "1") => read_only = true,
            ("readonly" | "ro", "false" | "0") => read_only = false,
            ("bind-propagation", value) if PROPAGATIONS.contains(&value) => propagation = value.to_owned(),
            ("tmpfs-size", value) => {
                let size = format::parse_size(value).map_err(|reason| invalid(reason, ""))?;
                options.push(format!("size={size}"));
            }
            ("tmpfs-mode", value) if u32::from_str_radix(value, 8).is_ok_and(|mode| mode <= 0o7777) => {
                options.push(format!("mode={value}"));
            }
            _ => {
                let hint = "want type, source, target, readonly, bind-propagation, tmpfs-size or tmpfs-mode";
                return Err(invalid(format!("{field:?} is not understood"), hint));
            }
        }
    }
    let example = "type=bind,source=/HOST/PATH,target=/CONTAINER/PATH";
    let target = target.ok_or_else(|| invalid("target is missing".to_owned(), example))?;
    match kind {
        "bind" if options.is_empty() => {
            let source = source.ok_or_else(|| invalid("source is missing".to_owned(), example))?;
            if !source.starts_with('/') {
                return Err(invalid("source must be an absolute path".to_owned(), example));
            }
            let (source, destination) = (real(source)?, target.to_owned());
            Ok(Mount::Bind(BindMount { source, destination, read_only, propagation }))
        }
        "tmpfs" if source.is_none() && propagation.is_empty() => {
            options.extend(read_only.then(|| "ro".to_owned()));
            Ok(Mount::Tmpfs(TmpfsMount { destination: target.to_owned(), options }))
        }
        "bind" => Err(invalid("a size and a mode are for type=tmpfs".to_owned(), example)),
        "tmpfs" => Err(invalid("source and propagation are for type=bind".to_owned(), example)),
        "volume" => Err(invalid("named and anonymous volumes are not there yet".to_owned(), NO_VOLUMES)),
        other => Err(invalid(format!("unknown type {other:?}"), "want type=bind or type=tmpfs")),
    }
}

fn real(path: &str) -> Result<String> {
    Ok(fs::canonicalize(path).map_err(|error| unusable(path, error))?.display().to_string())
}

fn unusable(path: &str, source: std::io::Error) -> Error {
    Error::File {
        action: "cannot use the folder or file of the host",
        path: Path::new(path).to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().display().to_string();
        let mount = volume(&format!("{path}:/data:ro,rslave")).unwrap();
        assert_eq!((mount.source.as_str(), mount.destination.as_str()), (path.as_str(), "/data"));
        assert!(mount.read_only);
        assert_eq!(mount.propagation, "rslave");
        let new = volume(&format!("{path}/new:/data")).unwrap();
        assert!(Path::new(&new.source).is_dir());
        for bad in ["data:/data", "/data", &format!("{path}:/data:nope")] {
            assert!(matches!(volume(bad), Err(Error::Usage { .. })), "{bad}");
        }
    }

    #[test]
    fn mounts_by_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().display().to_string();
        let text = format!("type=bind,src={path},dst=/data,readonly,bind-propagation=rshared");
        let want = BindMount {
            source: path.clone(),
            destination: "/data".to_owned(),
            read_only: true,
            propagation: "rshared".to_owned(),
        };
        assert_eq!(mount(&text).unwrap(), Mount::Bind(want));
        let Mount::Tmpfs(memory) = mount("type=tmpfs,target=/t,tmpfs-size=64m,tmpfs-mode=1770").unwrap()
        else {
            panic!("no memory")
        };
        assert_eq!(
            (memory.destination.as_str(), memory.options.join(",")),
            ("/t", "size=67108864,mode=1770".into())
        );
        let missing = mount(&format!("type=bind,source={path}/none,target=/data"));
        assert!(matches!(missing, Err(Error::File { .. })), "a source is not made: {missing:?}");
        for bad in [
            "type=bind,target=/data",
            "type=bind,source=relative,target=/data",
            "type=bind,source=/",
            "type=tmpfs,source=/,target=/data",
            "type=bind,source=/,target=/data,tmpfs-size=1m",
            "type=tmpfs,target=/t,tmpfs-mode=9",
            "type=tmpfs,target=/t,readonly=maybe",
            "source=name,target=/data",
            "type=npipe,source=/,target=/data",
            "type=bind,source=/,target=/data,volume-nocopy",
        ] {
            assert!(matches!(mount(bad), Err(Error::Usage { .. })), "{bad}");
        }
    }
}
