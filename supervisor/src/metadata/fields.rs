//! Field masks (`google.protobuf.FieldMask`) on maps: `labels` the whole map, `labels.KEY` one entry. Everything
//! behind the first dot is the key, dots included.

use std::collections::BTreeMap;

use davit_model::{Labels, label};

use super::error::Error;

/// Carries out `path` if it is `name` or `name.KEY`; an entry that is not wanted is removed. False for another path.
pub(crate) fn replace<V: Clone>(
    name: &str,
    path: &str,
    current: &mut BTreeMap<String, V>,
    wanted: &BTreeMap<String, V>,
) -> bool {
    let Some(rest) = path.strip_prefix(name) else { return false };
    if rest.is_empty() {
        current.clone_from(wanted);
        return true;
    }
    let Some(key) = rest.strip_prefix('.') else { return false };
    match wanted.get(key) {
        Some(value) => current.insert(key.to_owned(), value.clone()),
        None => current.remove(key),
    };
    true
}

/// Labels with an empty value are not kept: that is how a client deletes one.
pub(crate) fn drop_empty(labels: &mut Labels) {
    labels.retain(|_, value| !value.is_empty());
}

/// Checks the labels that `field` holds.
pub(crate) fn check_labels(field: &'static str, labels: &Labels) -> Result<(), Error> {
    check_keys(labels)?;
    label::validate(labels).map_err(|source| Error::Label { field, source })
}

/// Checks that each label has a key. containerd's database takes none without; but one that is being deleted may have any.
pub(crate) fn check_keys(labels: &Labels) -> Result<(), Error> {
    if labels.get("").is_some_and(|value| !value.is_empty()) {
        return Err(Error::Invalid { rule: "label key must not be empty" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_label_has_a_key() {
        for (key, value, fits) in [("", "v", false), ("", "", true), ("k", "", true)] {
            assert_eq!(check_labels("labels", &labels(&[(key, value)])).is_ok(), fits, "{key:?}={value:?}");
        }
    }

    #[test]
    fn a_path_is_the_map_or_one_entry() {
        let wanted = labels(&[("a.b", "2"), ("c", "")]);
        let with = |path: &str| {
            let mut current = labels(&[("a.b", "1"), ("c", "1"), ("d", "1")]);
            let known = replace("labels", path, &mut current, &wanted);
            drop_empty(&mut current);
            known.then_some(current)
        };
        assert_eq!(with("labels"), Some(labels(&[("a.b", "2")])));
        assert_eq!(with("labels.a.b"), Some(labels(&[("a.b", "2"), ("c", "1"), ("d", "1")])));
        assert_eq!(with("labels.c"), Some(labels(&[("a.b", "1"), ("d", "1")])));
        assert_eq!(with("labels.d"), Some(labels(&[("a.b", "1"), ("c", "1")])));
        assert_eq!(with("labelsx"), None);
        assert_eq!(with("spec"), None);
    }
}
