//! `davit ps --filter`: Docker's conditions on containers.

use std::str::FromStr;

use davit_oci::reference::Reference;
use davit_proto::containerd::services::containers::v1::Container;

use crate::container::{self, State};
use crate::error::{Error, Result};
use crate::image;

/// One condition. Several of one key are alternatives, but for labels; all keys must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Filter {
    /// The beginning of the id.
    Id(String),
    /// A part of the name.
    Name(String),
    /// A label, with its value or without.
    Label(String, Option<String>),
    /// The state, by Docker's word.
    Status(String),
    /// The exit code.
    Exited(u32),
    /// The image.
    Ancestor(String),
    /// Made before that container.
    Before(String),
    /// Made after it.
    Since(String),
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Filter, String> {
        let (key, value) = text.split_once('=').ok_or("want KEY=VALUE")?;
        let value = value.to_owned();
        match key {
            "id" => Ok(Filter::Id(value)),
            "name" => Ok(Filter::Name(value)),
            "label" => Ok(match value.split_once('=') {
                Some((key, value)) => Filter::Label(key.to_owned(), Some(value.to_owned())),
                None => Filter::Label(value, None),
            }),
            "status" if ["created", "running", "paused", "exited"].contains(&value.as_str()) => {
                Ok(Filter::Status(value))
            }
            "status" => Err("the states are created, running, paused and exited".to_owned()),
            "exited" => value.parse().map(Filter::Exited).map_err(|_| "want an exit code".to_owned()),
            "ancestor" => Ok(Filter::Ancestor(value)),
            "before" => Ok(Filter::Before(value)),
            "since" => Ok(Filter::Since(value)),
            _ => Err("the keys are id, name, label, status, exited, ancestor, before and since".to_owned()),
        }
    }
}

impl Filter {
    /// Whether it asks for containers that do not run, too.
    pub(crate) fn is_about_state(&self) -> bool {
        matches!(self, Filter::Status(_) | Filter::Exited(_))
    }

    fn is_alternative_of(&self, other: &Filter) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other) && !matches!(self, Filter::Label(..))
    }
}

/// A container and what it is at.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) container: Container,
    pub(crate) state: State,
}

/// Keeps the containers for which the filters hold, of all in the order of their making.
///
/// # Errors
/// One that a filter compares with is not there.
pub(crate) fn apply(filters: &[Filter], all: Vec<Seen>) -> Result<Vec<Seen>> {
    let position = |given: &String| {
        let is_it =
            |seen: &Seen| seen.container.id.starts_with(given) || container::name(&seen.container) == *given;
        all.iter().position(is_it).ok_or_else(|| Error::NoContainer { given: given.clone() })
    };
    let mut limits = Vec::new();
    for filter in filters {
        limits.push(match filter {
            Filter::Before(given) | Filter::Since(given) => position(given)?,
            _ => 0,
        });
    }
    let holds = |filter: usize, index: usize, seen: &Seen| match &filters[filter] {
        Filter::Before(_) => index < limits[filter],
        Filter::Since(_) => index > limits[filter],
        filter => matches(filter, seen),
    };
    let wanted = |index: usize, seen: &Seen| {
        (0..filters.len()).all(|filter| {
            let alternative =
                |other: &usize| *other == filter || filters[*other].is_alternative_of(&filters[filter]);
            (0..filters.len()).filter(alternative).any(|other| holds(other, index, seen))
        })
    };
    let keep: Vec<bool> = all.iter().enumerate().map(|(index, seen)| wanted(index, seen)).collect();
    Ok(all.into_iter().zip(keep).filter_map(|(seen, keep)| keep.then_some(seen)).collect())
}

fn matches(filter: &Filter, Seen { container, state }: &Seen) -> bool {
    match filter {
        Filter::Id(start) => container.id.starts_with(start),
        Filter::Name(part) => container::name(container).contains(part),
        Filter::Label(key, value) => {
            container.labels.get(key).is_some_and(|have| value.as_ref().is_none_or(|value| value == have))
        }
        Filter::Status(word) => state.word() == word,
        Filter::Exited(wanted) => matches!(state, State::Exited { code, .. } if code == wanted),
        Filter::Ancestor(name) => {
            let untagged = container.image.parse::<Reference>();
            // Without a tag any will do.
            let untagged =
                untagged.is_ok_and(|image| image.familiar_name() == *name || image.name() == *name);
            untagged || image::familiar(&container.image) == *name || container.image == *name
        }
        Filter::Before(_) | Filter::Since(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> Vec<Seen> {
        let make = |id: &str, name: &str, labels: &[(&str, &str)], state| Seen {
            container: Container {
                id: id.to_owned(),
                image: match name {
                    "db" => "r.example:5000/db:2".to_owned(),
                    _ => "docker.io/library/busybox:latest".to_owned(),
                },
                labels: labels
                    .iter()
                    .chain(&[(crate::labels::NAME, name)])
                    .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
                ..Container::default()
            },
            state,
        };
        vec![
            make("aa1", "web-1", &[("tier", "front")], State::Running { pid: 1 }),
            make("aa2", "web-2", &[("tier", "back"), ("x", "y")], State::Exited { code: 3, at: None }),
            make("bb1", "db", &[("x", "y")], State::Created),
        ]
    }

    fn kept(filters: &[&str]) -> String {
        let filters: Vec<Filter> = filters.iter().map(|text| text.parse().unwrap()).collect();
        let kept = apply(&filters, containers()).unwrap();
        kept.iter().map(|seen| seen.container.id.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn conditions_are_dockers() {
        assert_eq!(kept(&[]), "aa1 aa2 bb1");
        assert_eq!(kept(&["id=aa"]), "aa1 aa2");
        assert_eq!(kept(&["name=web"]), "aa1 aa2");
        assert_eq!(kept(&["name=web", "label=tier=back"]), "aa2");
        assert_eq!(kept(&["name=web-1", "name=db"]), "aa1 bb1");
        assert_eq!(kept(&["label=tier", "label=x"]), "aa2");
        assert_eq!(kept(&["status=exited"]), "aa2");
        assert_eq!(kept(&["exited=3"]), "aa2");
        assert_eq!(kept(&["exited=0"]), "");
        assert_eq!(kept(&["ancestor=busybox"]), "aa1 aa2");
        for name in ["r.example:5000/db", "r.example:5000/db:2"] {
            assert_eq!(kept(&[&format!("ancestor={name}")]), "bb1");
        }
        assert_eq!(kept(&["ancestor=r.example"]), "");
        assert_eq!(kept(&["ancestor=busybox:1"]), "");
        assert_eq!(kept(&["before=db"]), "aa1 aa2");
        assert_eq!(kept(&["since=aa1", "before=db"]), "aa2");
        for bad in ["x", "status=gone", "exited=x", "volume=v"] {
            assert!(bad.parse::<Filter>().is_err(), "{bad}");
        }
        assert!(apply(&["since=zz".parse().unwrap()], containers()).is_err());
    }
}
