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
