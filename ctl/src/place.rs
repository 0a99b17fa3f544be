//! Where on the host a container's log and files are: beside the daemon's own, which says where that is.
//!
//! A container's labels say so, too. But other clients give the labels of an image to its containers, and an image must not choose what
//! is read, written or removed here: a label counts only if it names what `davit` would make.

use std::path::{Path, PathBuf};

use davit_proto::containerd::services::introspection::v1::PluginsRequest;

use davit_proto::containerd::services::containers::v1::Container;

use crate::client::Client;
use crate::error::{CallContext, Result};
use crate::{labels, log};

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

    /// The file that the label of a container says its log is, in whichever form.
    pub(crate) fn log_of(&self, container: &Container) -> Option<PathBuf> {
        let path = PathBuf::from(container.labels.get(labels::LOG)?);
        let folder = self.logs.join(&self.namespace);
        log::names(&container.id).iter().any(|name| path == folder.join(name)).then_some(path)
    }

    /// The folder that the label of a container says the files in its `/etc` are in.
    pub(crate) fn etc_of(&self, container: &Container) -> Option<PathBuf> {
        let folder = self.etc(&container.id);
        container.labels.get(labels::ETC).is_some_and(|label| Path::new(label) == folder).then_some(folder)
    }

    /// The folder of the files that a container has in its `/etc`.
    pub(crate) fn etc(&self, id: &str) -> PathBuf {
        self.root().join("etc").join(&self.namespace).join(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_names_only_what_is_made_here() {
        let places = Places { logs: "/r/logs".into(), json: true, namespace: "ns".to_owned() };
        let with = |key: &str, value: &str| Container {
            id: "box".to_owned(),
            labels: [(key.to_owned(), value.to_owned())].into(),
            ..Container::default()
        };
        for good in ["/r/logs/ns/box.log", "/r/logs/ns/box-json.log"] {
            assert_eq!(places.log_of(&with(labels::LOG, good)), Some(good.into()));
        }
        assert_eq!(places.etc_of(&with(labels::ETC, "/r/etc/ns/box")), Some("/r/etc/ns/box".into()));
        for bad in
            ["/etc/passwd", "/r/logs/ns/other.log", "/r/logs/ns/../ns/box.log", "/r/logs/other/box.log", ""]
        {
            assert_eq!(places.log_of(&with(labels::LOG, bad)), None, "{bad}");
        }
        for bad in ["/etc", "/r/etc/ns", "/r/etc/ns/other", ""] {
            assert_eq!(places.etc_of(&with(labels::ETC, bad)), None, "{bad}");
        }
        assert_eq!(places.log_of(&Container::default()), None);
    }
}
