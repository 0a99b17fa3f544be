//! Devices of the host that a container is given.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::SpecError;
use super::document::{DeviceRule, SpecDevice};

/// A device node and what may be done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Where it appears in the container.
    pub path: String,
    /// `c` for a character device, `b` for a block device.
    pub kind: char,
    /// The driver.
    pub major: u64,
    /// The instance.
    pub minor: u64,
    /// Permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Some of `r`, `w` and `m` (mknod).
    pub access: String,
}

impl Device {
    /// Describes the node at `source`, links followed, as `path` in the container.
    ///
    /// # Errors
    /// [`SpecError::Device`] when there is none, or it is no device.
    pub fn from_host(source: &Path, path: &str, access: &str) -> Result<Device, SpecError> {
        let error =
            |source_error| SpecError::Device { path: source.display().to_string(), source: source_error };
        let status = fs::metadata(source).map_err(error)?;
        let kind = match status.file_type() {
            kind if kind.is_char_device() => 'c',
            kind if kind.is_block_device() => 'b',
            _ => return Err(error(std::io::Error::other("it is not a device"))),
        };
        Ok(Device {
            path: path.to_owned(),
            kind,
            major: nix::libc::major(status.rdev()).into(),
            minor: nix::libc::minor(status.rdev()).into(),
            mode: status.mode() & 0o7777,
            uid: status.uid(),
            gid: status.gid(),
            access: access.to_owned(),
        })
    }

    pub(super) fn to_spec(&self) -> SpecDevice {
        SpecDevice {
            kind: self.kind.to_string(),
            path: self.path.clone(),
            major: self.major,
            minor: self.minor,
            file_mode: self.mode,
            uid: self.uid,
            gid: self.gid,
        }
    }

    pub(super) fn to_rule(&self) -> DeviceRule {
        DeviceRule {
            allow: true,
            kind: Some(self.kind.to_string()),
            major: Some(self.major),
            minor: Some(self.minor),
            access: self.access.clone(),
        }
    }
}

/// The folders and links of `/dev` that the container has of its own.
const OWN: [&str; 9] = ["pts", "shm", "fd", "mqueue", "console", "ptmx", "stdin", "stdout", "stderr"];

/// Every device node below the host's `/dev`, for a privileged container. What vanishes while it is listed, or cannot
/// be read, is left out.
pub fn host_devices() -> Vec<Device> {
    let mut devices = Vec::new();
    collect(Path::new("/dev"), &mut devices);
    devices.sort_by(|one, other| one.path.cmp(&other.path));
    devices
}

fn collect(folder: &Path, devices: &mut Vec<Device>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Ok(kind) = entry.file_type() else { continue };
        if OWN.iter().any(|own| name == *own) {
            continue;
        }
        let path = entry.path();
        if kind.is_dir() {
            collect(&path, devices);
        } else if kind.is_char_device() || kind.is_block_device() {
            devices.extend(Device::from_host(&path, &path.display().to_string(), "rwm"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_nodes_and_refuses_files() {
        let null = Device::from_host(Path::new("/dev/null"), "/dev/x", "rw").unwrap();
        assert_eq!((null.kind, null.major, null.minor, null.path.as_str()), ('c', 1, 3, "/dev/x"));
        assert!(Device::from_host(Path::new("/proc/self/status"), "/dev/x", "rw").is_err());
        assert!(Device::from_host(Path::new("/dev/none"), "/dev/x", "rw").is_err());
        assert!(host_devices().iter().any(|device| device.path == "/dev/null"));
    }
}
