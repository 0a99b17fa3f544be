//! What an image is called: the names that a client asks for, and those that an archive gives
//! (containerd `core/transfer/image`).

use std::collections::BTreeMap;
use std::time::SystemTime;

use davit_model::Labels;
use davit_oci::image::{ANNOTATION_IMAGE_NAME, ANNOTATION_REF_NAME};

use super::{Error, ExtraName, Local, rfc3339};
use crate::metadata::gc;

/// The label by which an image goes when another one does.
const BACK_REFERENCE: &str = "containerd.io/gc.bref.image";

/// A name, and the labels of its record.
pub(super) type Named = (String, Labels);

/// The names of the one image that a pull, a tag or the index of an import makes.
pub(super) fn asked_for(to: &Local, digest: &str) -> Vec<Named> {
    let own = (!to.name.is_empty()).then(|| (to.name.clone(), to.labels.clone()));
    // A prefix alone is no name.
    let complete = to.extra_names.iter().filter(|extra| !extra.is_prefix || extra.add_digest);
    let extra = complete.map(|extra| match extra.add_digest {
        true => with_digest(extra, digest),
        false => extra.name.clone(),
    });
    own.into_iter().chain(extra.map(|name| (name, extra_labels(to)))).collect()
}

/// [`asked_for`], where there must be one.
pub(super) fn required(to: &Local, digest: &str) -> Result<Vec<Named>, Error> {
    Some(asked_for(to, digest)).filter(|names| !names.is_empty()).ok_or(Error::NoName)
}

/// The names of an image of an archive, whose annotations say how it is called: one for each prefix that is asked for
/// and that the annotation fits.
pub(super) fn annotated(to: &Local, digest: &str, annotations: &BTreeMap<String, String>) -> Vec<Named> {
    let mut names = Vec::new();
    for prefix in to.extra_names.iter().filter(|extra| extra.is_prefix) {
        let named = name_of(annotations, prefix);
        let by_digest = prefix.add_digest && (named.is_none() || !prefix.skip_named_digest);
        names.extend(named);
        names.extend(by_digest.then(|| with_digest(prefix, digest)));
    }
    names.into_iter().map(|name| (name, extra_labels(to))).collect()
}

fn with_digest(extra: &ExtraName, digest: &str) -> String {
    format!("{}@{digest}", extra.name)
}

/// The labels of all names but the first. They go when the image of the first does, and are kept by that alone.
fn extra_labels(to: &Local) -> Labels {
    let mut labels = to.labels.clone();
    if !to.name.is_empty() {
        labels.insert(BACK_REFERENCE.to_owned(), to.name.clone());
        labels.insert(gc::LABEL_EXPIRE.to_owned(), rfc3339(SystemTime::now()));
    }
    labels
}

/// The name in the annotations, as `prefix` allows it. containerd's own annotation must be a whole name, which is taken
/// as it is; that of the image spec may be a tag.
fn name_of(annotations: &BTreeMap<String, String>, prefix: &ExtraName) -> Option<String> {
    let annotation = |key: &str| annotations.get(key).filter(|value| !value.is_empty());
    if let Some(name) = annotation(ANNOTATION_IMAGE_NAME) {
        return within(name, prefix).filter(|found| found == name);
    }
    within(annotation(ANNOTATION_REF_NAME)?, prefix)
}

/// A name, or a tag behind `prefix`; none for a name that has another prefix and may not have it.
fn within(text: &str, prefix: &ExtraName) -> Option<String> {
    if prefix.name.is_empty() {
        return None;
    }
    if !text.contains(['/', ':', '@']) {
        return Some(format!("{}:{text}", prefix.name));
    }
    let rest = text.strip_prefix(&prefix.name);
    let fits = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ':', '@']));
    (fits || prefix.allow_overwrite).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(name: &str) -> ExtraName {
        ExtraName { name: name.to_owned(), is_prefix: true, ..ExtraName::default() }
    }

    fn to(extra_names: Vec<ExtraName>) -> Local {
        Local { extra_names, ..Local::default() }
    }

    /// The names for an image with containerd's annotation and that of the spec, either of which may be empty.
    fn names(extra: ExtraName, full: &str, spec: &str) -> Vec<String> {
        let annotations = [(ANNOTATION_IMAGE_NAME, full), (ANNOTATION_REF_NAME, spec)];
        let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let named = annotated(&to(vec![extra]), "sha256:1", &annotations.into());
        named.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn annotations_name_images_as_far_as_a_prefix_allows() {
        let none: [&str; 0] = [];
        let free = || ExtraName { allow_overwrite: true, ..prefix("import") };
        assert_eq!(names(free(), "x.io/a:1", "1"), ["x.io/a:1"]);
        assert_eq!(names(free(), "", "1"), ["import:1"]);
        assert_eq!(names(free(), "", "a:1"), ["a:1"]);
        assert_eq!(names(free(), "", ""), none);
        assert_eq!(names(prefix("x.io/a"), "x.io/a:1", ""), ["x.io/a:1"]);
        assert_eq!(names(prefix("x.io/a"), "", "x.io/a/b@sha256:2"), ["x.io/a/b@sha256:2"]);
        assert_eq!(names(prefix("x.io/a"), "x.io/ab:1", "1"), none);
        assert_eq!(names(prefix("x.io/a"), "", "1"), ["x.io/a:1"]);
        // A whole name is not made of a part of one.
        assert_eq!(names(free(), "1", "1"), none);
        assert_eq!(names(prefix(""), "", "1"), none);
        let whole = ExtraName { name: "x.io/a:1".to_owned(), ..ExtraName::default() };
        assert_eq!(names(whole, "x.io/a:1", "1"), none);
    }

    #[test]
    fn a_digest_is_added_to_a_name_or_stands_for_it() {
        let digests = || ExtraName { add_digest: true, ..prefix("a") };
        let unnamed = || ExtraName { skip_named_digest: true, ..digests() };
        assert_eq!(names(digests(), "", "1"), ["a:1", "a@sha256:1"]);
        assert_eq!(names(digests(), "", ""), ["a@sha256:1"]);
        assert_eq!(names(unnamed(), "", "1"), ["a:1"]);
        assert_eq!(names(unnamed(), "", ""), ["a@sha256:1"]);
        assert_eq!(names(unnamed(), "x.io/b:1", ""), ["a@sha256:1"]);
    }

    #[test]
    fn names_beside_the_first_go_with_it() {
        let whole = ExtraName { name: "whole:1".to_owned(), ..ExtraName::default() };
        let digests = ExtraName { add_digest: true, ..prefix("a") };
        let labels = Labels::from([("own".to_owned(), "label".to_owned())]);
        let mut to = to(vec![prefix("no-name"), digests, whole]);
        to.labels = labels.clone();
        let found = asked_for(&to, "sha256:1");
        assert_eq!(
            found,
            [("a@sha256:1".to_owned(), labels.clone()), ("whole:1".to_owned(), labels.clone())]
        );
        to.name = "first:1".to_owned();
        let found = asked_for(&to, "sha256:1");
        assert_eq!(found[0], ("first:1".to_owned(), labels));
        assert_eq!(found[2].1[BACK_REFERENCE], "first:1");
        assert!(found[1].1.contains_key(gc::LABEL_EXPIRE));
        assert_eq!(annotated(&to, "sha256:1", &BTreeMap::new())[0].1[BACK_REFERENCE], "first:1");
    }
}
