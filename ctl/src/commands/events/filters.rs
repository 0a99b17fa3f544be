//! What is shown: Docker's `key=value` and containerd's filters, as filters of the daemon.

use crate::client::Client;
use crate::container;
use crate::error::{Error, Result};

/// The filters of which an event must match one. As with Docker, values of one key are alternatives and all keys must
/// match; containerd's filters are alternatives, too.
pub(super) async fn build(client: &Client, all_namespaces: bool, given: &[String]) -> Result<Vec<String>> {
    let mut groups = Groups::default();
    if !all_namespaces {
        groups.add("namespace", vec![format!("namespace=={}", client.namespace())]);
    }
    for filter in given {
        match key_and_value(filter) {
            None => groups.add("", vec![filter.clone()]),
            Some(("container", given)) => {
                // One that is gone is in the history all the same, by its id or the beginning of it.
                let id = match container::find(client, given).await {
                    Ok(container) => container.id,
                    Err(Error::NoContainer { .. }) => given.to_owned(),
                    Err(error) => return Err(error),
                };
                groups.add("container", of_container(&id));
            }
            Some((key, value)) => groups.add(key, plain(key, value)?),
        }
    }
    Ok(groups.product())
}

/// Key and value of Docker's form. The operators of containerd's end in `=`, too.
fn key_and_value(filter: &str) -> Option<(&str, &str)> {
    let (key, value) = filter.split_once('=')?;
    let is_word = key.bytes().all(|byte| byte.is_ascii_lowercase());
    (is_word && !value.starts_with('=')).then_some((key, value))
}

fn of_container(id: &str) -> Vec<String> {
    let begins = format!("~={}", quoted(&format!("^{}", id.replace('.', "\\."))));
    vec![format!("event.container_id{begins}"), format!("topic~=^/containers/,event.id{begins}")]
}

fn plain(key: &str, value: &str) -> Result<Vec<String>> {
    let topics = |topics: &[&str]| topics.iter().map(|topic| format!("topic~=^/{topic}/")).collect();
    match (key, value) {
        ("event", name) => {
            let name = match name {
                "die" => "exit",
                "destroy" | "remove" => "delete",
                "pause" => "paused",
                "unpause" => "resumed",
                "exec_create" => "exec-added",
                "exec_start" => "exec-started",
                other => other,
            };
            Ok(vec![format!("topic~={}", quoted(&format!("/{name}$")))])
        }
        ("type", "container") => Ok(topics(&["tasks", "containers"])),
        ("type", "image") => Ok(topics(&["images", "content"])),
        ("type", "namespace") => Ok(topics(&["namespaces"])),
        ("type", "content" | "snapshot") => Ok(topics(&[value])),
        ("cause", cause) => Ok(vec![format!("cause=={}", quoted(cause))]),
        _ => Err(Error::usage(
            format!("unknown filter {key}={value}"),
            "known are container=, event=, cause=, type=container|image|content|snapshot|namespace, and \
             containerd's filters such as topic~=^/tasks/",
        )),
    }
}

/// A text in quotes, as the filters have them.
fn quoted(text: &str) -> String {
    format!("{text:?}")
}

/// Alternatives by what they are alternatives for.
#[derive(Default)]
struct Groups(Vec<(String, Vec<String>)>);

impl Groups {
    fn add(&mut self, key: &str, alternatives: Vec<String>) {
        match self.0.iter_mut().find(|(known, _)| known == key) {
            Some((_, known)) => known.extend(alternatives),
            None => self.0.push((key.to_owned(), alternatives)),
        }
    }

    /// Every choice of one alternative from each group.
    fn product(self) -> Vec<String> {
        let groups = self.0.into_iter().map(|(_, alternatives)| alternatives);
        let joined = groups.reduce(|chosen, alternatives| {
            let with = |one: &String| alternatives.iter().map(|other| format!("{one},{other}")).collect();
            chosen.iter().flat_map(|one| -> Vec<String> { with(one) }).collect()
        });
        joined.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use davit_model::Filter;

    #[test]
    fn keys_are_told_from_containerds_filters() {
        assert_eq!(key_and_value("event=die"), Some(("event", "die")));
        for filter in ["topic==/a", "topic~=^/tasks/", "event.id!=x", "event.image=x", "event"] {
            assert_eq!(key_and_value(filter), None, "{filter}");
        }
        assert!(plain("label", "x").is_err() && plain("type", "volume").is_err());
    }

    #[test]
    fn values_of_a_key_are_alternatives_and_keys_are_not() {
        let mut groups = Groups::default();
        groups.add("namespace", vec!["namespace==n".into()]);
        groups.add("event", plain("event", "die").unwrap());
        groups.add("event", plain("event", "oom").unwrap());
        groups.add("container", of_container("a.b\"c"));
        let filters = groups.product();
        assert_eq!(filters.len(), 4);
        assert_eq!(filters[0], r#"namespace==n,topic~="/exit$",event.container_id~="^a\\.b\"c""#);
        Filter::parse(&filters).unwrap();
        for (kind, count) in
            [("container", 2), ("image", 2), ("namespace", 1), ("content", 1), ("snapshot", 1)]
        {
            let filters = plain("type", kind).unwrap();
            assert_eq!(filters.len(), count);
            Filter::parse(&filters).unwrap();
        }
        assert_eq!(plain("type", "namespace").unwrap(), ["topic~=^/namespaces/"]);
        assert!(Groups::default().product().is_empty());
    }
}
