//! The plugins of type `io.containerd.snapshotter.v1`.

use super::{Config, ConfigError, Reader, Section};

impl Reader<'_> {
    pub(super) fn snapshotters(
        &mut self,
        plugins: &mut Section,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        let ours = &mut config.snapshotters;
        let mut section = self.plugin(plugins, "io.containerd.snapshotter.v1.overlayfs")?;
        self.path_of(&mut section, "root_path", &mut ours.overlayfs.root_path)?;
        ours.overlayfs.mount_options = self.list(&mut section, "mount_options")?;
        self.truth(&mut section, "upperdir_label", &mut ours.overlayfs.upperdir_label)?;
        self.ignore_rest(section);

        let mut section = self.plugin(plugins, "io.containerd.snapshotter.v1.native")?;
        self.path_of(&mut section, "root_path", &mut ours.native.root_path)?;
        self.ignore_rest(section);

        let mut section = self.plugin(plugins, "io.containerd.snapshotter.v1.btrfs")?;
        self.path_of(&mut section, "root_path", &mut ours.btrfs.root_path)?;
        self.ignore_rest(section);

        let mut section = self.plugin(plugins, "io.containerd.snapshotter.v1.blockfile")?;
        self.path_of(&mut section, "root_path", &mut ours.blockfile.root_path)?;
        self.path_of(&mut section, "scratch_file", &mut ours.blockfile.scratch_file)?;
        self.truth(&mut section, "recreate_scratch", &mut ours.blockfile.recreate_scratch)?;
        ours.blockfile.fs_type = self.text(&mut section, "fs_type")?.unwrap_or_default();
        ours.blockfile.mount_options = self.list(&mut section, "mount_options")?;
        self.ignore_rest(section);

        let mut section = self.plugin(plugins, "io.containerd.snapshotter.v1.erofs")?;
        self.path_of(&mut section, "root_path", &mut ours.erofs.root_path)?;
        ours.erofs.ovl_mount_options = self.list(&mut section, "ovl_mount_options")?;
        self.truth(&mut section, "set_immutable", &mut ours.erofs.set_immutable)?;
        self.truth(&mut section, "enable_fsverity", &mut ours.erofs.enable_fsverity)?;
        ours.erofs.default_size = self.text(&mut section, "default_size")?.unwrap_or_default();
        ours.erofs.dmverity_mode = self.text(&mut section, "dmverity_mode")?.unwrap_or_default();
        self.ignore_rest(section);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::super::read;

    #[test]
    fn what_the_plugins_say_is_honoured() {
        let file = r#"
            version = 4
            [plugins."io.containerd.snapshotter.v1.overlayfs"]
            root_path = "/o"
            mount_options = ["volatile"]
            upperdir_label = true
            slow_chown = true
            sync_remove = false
            [plugins."io.containerd.snapshotter.v1.native"]
            root_path = "/n"
            [plugins."io.containerd.snapshotter.v1.btrfs"]
            root_path = "/b"
            [plugins."io.containerd.snapshotter.v1.blockfile"]
            root_path = ""
            scratch_file = "/scratch"
            fs_type = "xfs"
            mount_options = ["discard"]
            recreate_scratch = true
            [plugins."io.containerd.snapshotter.v1.erofs"]
            ovl_mount_options = ["index=off"]
            set_immutable = true
            enable_fsverity = true
            default_size = "20GiB"
            dmverity_mode = "on"
            [plugins."io.containerd.snapshotter.v1.devmapper"]
            pool_name = "p"
        "#;
        let (config, ignored) = read(Path::new("/c.toml"), toml::from_str(file).unwrap()).unwrap();
        let found = config.snapshotters;
        let list = |text: &str| vec![text.to_owned()];
        assert_eq!(found.overlayfs.root_path, PathBuf::from("/o"));
        assert_eq!((found.overlayfs.mount_options, found.overlayfs.upperdir_label), (list("volatile"), true));
        assert_eq!((found.native.root_path, found.btrfs.root_path), ("/n".into(), "/b".into()));
        let blockfile = found.blockfile;
        assert_eq!((blockfile.root_path, blockfile.scratch_file), (PathBuf::new(), "/scratch".into()));
        assert_eq!((blockfile.fs_type.as_str(), blockfile.recreate_scratch), ("xfs", true));
        assert_eq!(blockfile.mount_options, list("discard"));
        let erofs = found.erofs;
        assert_eq!((erofs.ovl_mount_options, erofs.set_immutable), (list("index=off"), true));
        assert!(erofs.enable_fsverity);
        assert_eq!((erofs.default_size.as_str(), erofs.dmverity_mode.as_str()), ("20GiB", "on"));
        assert_eq!(
            ignored,
            [
                "plugins.\"io.containerd.snapshotter.v1.devmapper\"",
                "plugins.\"io.containerd.snapshotter.v1.overlayfs\".slow_chown"
            ]
        );
    }
}
