//! `--restart`: the daemon starts a container again that has ended. What it goes by are labels of containerd's
//! (`core/runtime/restart`); davitd and containerd look at them every ten seconds.
//!
//! They are on a container from its start until a user ends it, so that what a user has stopped stays stopped; the policy
//! itself stays in a label of ours.

use std::collections::BTreeMap;

use davit_proto::containerd::services::containers::v1::Container;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::{container, labels, log};

const STATUS: &str = "containerd.io/restart.status";
const POLICY: &str = "containerd.io/restart.policy";
const LOG_URI: &str = "containerd.io/restart.loguri";
const COUNT: &str = "containerd.io/restart.count";

/// Reads `--restart`; `None` for `no`.
///
/// # Errors
/// [`Error::Usage`].
pub(crate) fn policy(text: &str) -> Result<Option<String>> {
    let (name, times) = text.split_once(':').map_or((text, None), |(name, times)| (name, Some(times)));
    match (name, times) {
        ("no", None) => Ok(None),
        ("always" | "unless-stopped" | "on-failure", None) => Ok(Some(text.to_owned())),
        ("on-failure", Some(times)) if times.parse::<u32>().is_ok_and(|times| times > 0) => {
            Ok(Some(text.to_owned()))
        }
        _ => Err(Error::usage(
            format!("invalid restart policy {text:?}"),
            "want no, always, unless-stopped or on-failure[:TIMES]",
        )),
    }
}

/// Has the daemon look after a container that was started in the background, if that was asked for when it was made.
///
/// # Errors
/// Those of the call.
pub(crate) async fn begin(client: &Client, container: &Container) -> Result<()> {
    match wanted(&container.labels) {
        Some(labels) => container::set_labels(client, &container.id, labels).await,
        None => Ok(()),
    }
}

fn wanted(labels: &BTreeMap<String, String>) -> Option<Vec<(&'static str, String)>> {
    let policy = labels.get(labels::RESTART)?;
    let path = labels.get(labels::LOG)?;
    let rotation = labels.get(labels::LOG_OPTIONS).map_or("", String::as_str);
    Some(vec![
        (POLICY, policy.clone()),
        (LOG_URI, log::address(path.as_ref(), rotation)),
        (COUNT, String::new()),
        (STATUS, "running".to_owned()),
    ])
}

/// Has the daemon let a container alone that a user is about to end.
///
/// # Errors
/// Those of the call.
pub(crate) async fn end(client: &Client, container: &Container) -> Result<()> {
    if !container.labels.contains_key(STATUS) {
        return Ok(());
    }
    container::set_labels(client, &container.id, vec![(STATUS, String::new())]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_dockers() {
        assert_eq!(policy("no").unwrap(), None);
        for text in ["always", "unless-stopped", "on-failure", "on-failure:3"] {
            assert_eq!(policy(text).unwrap().as_deref(), Some(text));
        }
        for bad in ["", "yes", "always:3", "on-failure:", "on-failure:0", "on-failure:x", "no:1"] {
            assert!(policy(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_who_asks_is_looked_after() {
        let mut all = BTreeMap::from([(labels::LOG.to_owned(), "/l/box-json.log".to_owned())]);
        assert_eq!(wanted(&all), None);
        all.insert(labels::RESTART.to_owned(), "always".to_owned());
        let wanted = wanted(&all).unwrap();
        assert!(wanted.contains(&(LOG_URI, "json-file:///l/box-json.log".to_owned())), "{wanted:?}");
        assert!(wanted.contains(&(STATUS, "running".to_owned())));
    }
}
