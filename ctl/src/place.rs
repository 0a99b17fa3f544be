//! Where on the host a container's log and files are: beside the daemon's own, which says where that is.

use std::path::{Path, PathBuf};

use davit_proto::containerd::services::introspection::v1::PluginsRequest;

use crate::client::Client;
use crate::error::{CallContext, Result};
use crate::log;

/// Where logs are when the daemon does not say.
pub(crate) const LOG_FOLDER: &str = "/var/lib/davit/logs";

/// The places of one daemon and namespace.
#[derive(Debug)]
pub(crate) struct Places {
    logs: PathBuf,
    /// Whether its shims know json logs.
    json: bool,
    namespace: String,
}

impl Places {
    /// Asks the daemon.
    ///
    /// # Errors
    /// Those of the call.
    pub(crate) async fn of(client: &Client) -> Result<Places> {
        let filters = vec!["type==io.containerd.runtime.v2,id==task".to_owned()];
        let plugins =
            client.introspection().plugins(PluginsRequest { filters }).await.call("ask for the plugins")?;
        // Only davitd says where logs are to be.
        let folder = plugins.plugins.iter().find_map(|plugin| plugin.exports.get("logs"));
        // Others may be configured in the place of its own shims.
        let schemes = plugins.plugins.iter().find_map(|plugin| plugin.exports.get("log-uri-schemes"));
        let json = schemes.is_some_and(|schemes| schemes.split(',').any(|scheme| scheme == "json-file"));
        let logs = PathBuf::from(folder.map_or(LOG_FOLDER, String::as_str));
        Ok(Places { logs, json, namespace: client.namespace().to_owned() })
    }

    /// The folder that others may pass through, and below which all is private.
    pub(crate) fn root(&self) -> &Path {
        self.logs.parent().unwrap_or(&self.logs)
    }

    /// The file that the output of a container with this runtime goes to when nobody is attached.
    pub(crate) fn log(&self, id: &str, runtime: &str) -> PathBuf {
        self.logs.join(&self.namespace).join(log::file_name(id, runtime, self.json))
    }

    /// The folder of the files that a container has in its `/etc`.
    pub(crate) fn etc(&self, id: &str) -> PathBuf {
        self.root().join("etc").join(&self.namespace).join(id)
    }
}
