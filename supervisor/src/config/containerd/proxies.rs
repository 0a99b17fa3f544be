//! What a file of containerd's says of proxy plugins, stream processors and differs.

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{Place, Reader, Section};
use crate::config::{Config, ConfigError};

impl Reader<'_> {
    pub(super) fn proxies(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        config: &mut Config,
    ) -> Result<(), ConfigError> {
        let keys = ["type", "address", "platform", "exports", "capabilities"];
        for (name, plugin) in self.named(file, plugins, "proxy_plugins", &keys)? {
            config.proxy_plugins.insert(name, plugin);
        }
        let keys = ["accepts", "returns", "path", "args", "env"];
        for (id, processor) in self.named(file, plugins, "stream_processors", &keys)? {
            config.stream_processors.insert(id, processor);
        }
        let mut diff = self.plugin(plugins, "io.containerd.service.v1.diff-service")?;
        let order = self.list(&mut diff, "default")?;
        if !order.is_empty() {
            config.diff.default = order;
        }
        // Layers are always synced.
        diff.table.remove("sync_fs");
        self.ignore_rest(diff);
        let mut transfer = self.plugin(plugins, "io.containerd.transfer.v1.local")?;
        self.unpacks(&mut transfer, config)?;
        self.ignore_rest(transfer);
        Ok(())
    }

    /// Which differ a transfer takes for which snapshotter.
    fn unpacks(&mut self, transfer: &mut Section, config: &mut Config) -> Result<(), ConfigError> {
        let Some(list) = transfer.table.remove("unpack_config") else { return Ok(()) };
        let key = format!("{}unpack_config", transfer.prefix);
        let Value::Array(list) = list else { return Err(self.wrong(key, "a list of tables")) };
        for unpack in list {
            let Value::Table(table) = unpack else { return Err(self.wrong(key, "a list of tables")) };
            let mut unpack = Section { prefix: format!("{key}."), table };
            let snapshotter = self.text(&mut unpack, "snapshotter")?;
            let differ = self.text(&mut unpack, "differ")?;
            if let (Some(snapshotter), Some(differ)) = (snapshotter, differ) {
                config.diff.snapshotters.insert(snapshotter, differ);
            }
            // Images are unpacked for every platform and snapshotter that is there.
            unpack.table.remove("platform");
            unpack.table.remove("optional");
            self.ignore_rest(unpack);
        }
        Ok(())
    }

    /// The tables of a table, each with these keys; others are named.
    fn named<T: DeserializeOwned>(
        &mut self,
        file: &mut Section,
        plugins: &mut Section,
        name: &'static str,
        keys: &[&str],
    ) -> Result<Vec<(String, T)>, ConfigError> {
        let section = self.section(file, plugins, Place::Top(name))?;
        let mut found = Vec::new();
        for (id, value) in section.table {
            let key = format!("{name}.{id:?}");
            let Value::Table(table) = value else { return Err(self.wrong(key, "a table")) };
            let (known, other): (Table, Table) =
                table.into_iter().partition(|(name, _)| keys.contains(&name.as_str()));
            self.ignore_rest(Section { prefix: format!("{key}."), table: other });
            let value = Value::Table(known).try_into().map_err(|source: toml::de::Error| {
                let rule = format!("{key}: {}", source.message());
                ConfigError::Containerd { path: self.path.to_owned(), rule }
            })?;
            found.push((id, value));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::ProxyKind;
    use crate::config::containerd::{is_one, read};

    fn load(text: &str) -> Result<(Config, Vec<String>), ConfigError> {
        read(Path::new("/etc/containerd/config.toml"), toml::from_str(text).unwrap())
    }

    #[test]
    fn what_other_programs_do_is_read() {
        let text = r#"
            version = 2
            [proxy_plugins.stargz]
              type = "snapshot"
              address = "/run/stargz.sock"
              capabilities = ["remap-ids"]
              color = "red"
              [proxy_plugins.stargz.exports]
                enable_remote_snapshot_annotations = "true"
            [proxy_plugins.far]
              type = "io.containerd.differ.v1"
              address = "unix:///run/far.sock"
              platform = "linux/arm64"
            [stream_processors."io.containerd.processor.v1.pigz"]
              accepts = ["application/vnd.docker.image.rootfs.diff.tar.gzip"]
              returns = "application/vnd.oci.image.layer.v1.tar"
              path = "unpigz"
              args = ["-d", "-c"]
            [plugins."io.containerd.service.v1.diff-service"]
              default = ["far", "walking"]
              sync_fs = true
            [[plugins."io.containerd.transfer.v1.local".unpack_config]]
              platform = "linux/amd64"
              snapshotter = "stargz"
              differ = "far"
              layer_types = ["x"]
        "#;
        let (config, ignored) = load(text).unwrap();
        config.validate().unwrap();
        let stargz = &config.proxy_plugins["stargz"];
        assert_eq!(
            (stargz.kind, stargz.socket().as_path()),
            (ProxyKind::Snapshot, Path::new("/run/stargz.sock"))
        );
        assert_eq!(stargz.exports()["enable_remote_snapshot_annotations"], "true");
        assert_eq!(stargz.exports()["address"], "/run/stargz.sock");
        let far = &config.proxy_plugins["far"];
        assert_eq!((far.kind, far.socket().as_path()), (ProxyKind::Diff, Path::new("/run/far.sock")));
        assert_eq!(far.platform().architecture, "arm64");
        let pigz = &config.stream_processors["io.containerd.processor.v1.pigz"];
        assert_eq!((pigz.path.as_path(), pigz.args.len()), (Path::new("unpigz"), 2));
        assert_eq!(config.diff.default, ["far", "walking"]);
        assert_eq!(config.diff.snapshotters["stargz"], "far");
        let expected = [
            "plugins.\"io.containerd.transfer.v1.local\".unpack_config.layer_types",
            "proxy_plugins.\"stargz\".color",
        ];
        assert_eq!(ignored, expected);
        // As one of ours it says the same.
        assert!(!is_one(&toml::from_str(&config.to_toml()).unwrap()));
        assert_eq!(toml::from_str::<Config>(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, words) in [
            ("[proxy_plugins.x]\ntype = \"x\"\naddress = \"/x\"", "proxy_plugins.\"x\": unknown variant `x`"),
            ("[proxy_plugins.x]\ntype = \"snapshot\"", "proxy_plugins.\"x\": missing field `address`"),
            ("[proxy_plugins]\nx = 1", "proxy_plugins.\"x\": want a table"),
            ("[stream_processors.x]\nargs = 1", "stream_processors.\"x\": invalid type"),
        ] {
            let error = load(&format!("version = 2\n{text}")).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let socket = "[proxy_plugins.x]\ntype = \"snapshot\"\naddress = \"relative\"";
        assert!(load(&format!("version = 2\n{socket}")).unwrap().0.validate().is_err());
    }
}
