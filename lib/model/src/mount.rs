//! A mount, as snapshotters hand them out and shims carry them out.

/// One mount in containerd's form. Several of them, in order, make a root filesystem.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Mount {
    /// The filesystem type (`overlay`, `bind`, `ext4`, …).
    pub kind: String,
    /// What is mounted: a device, a folder, or a word that the filesystem ignores.
    pub source: String,
    /// Where below the root it goes; mostly empty, the root itself.
    pub target: String,
    /// Options in the form of fstab(5): flags (`ro`, `rbind`, …) and the filesystem's own data, mixed.
    pub options: Vec<String>,
}

impl Mount {
    /// True when the options ask for a read-only mount.
    pub fn read_only(&self) -> bool {
        self.options.iter().any(|option| option == "ro")
    }
}
