//! The labels and names by which containerd and its clients know the parts of an image.

use std::collections::HashMap;

use davit_model::Labels;
use davit_model::label::MAX_LABEL_SIZE;
use davit_oci::image::{ANNOTATION_REF_NAME, Descriptor};
use davit_oci::media_type;
use davit_oci::reference::Reference;

use crate::uri;

/// The label that holds, for the registry after the last dot, the repositories that content came from or went to.
const SOURCE: &str = "containerd.io/distribution.source";
/// The longest annotation that becomes part of an ingest's name.
const MAX_NAME: usize = 512;

/// The name of the ingest of a descriptor: what kind of thing it is, and its digest.
pub fn ingest_reference(descriptor: &Descriptor) -> String {
    let kind = match descriptor.media_type.as_str() {
        name if media_type::is_manifest(name) => "manifest",
        name if media_type::is_index(name) => "index",
        name if media_type::is_layer(name) || name == "application/vnd.erofs.layer.v1" => "layer",
        name if is_config(name) => "config",
        "application/vnd.in-toto+json" => "attestation",
        _ => "unknown",
    };
    match descriptor.annotations.get(ANNOTATION_REF_NAME) {
        Some(name) if name.len() <= MAX_NAME => format!("{kind}-{name}@{}", descriptor.digest),
        _ => format!("{kind}-{}", descriptor.digest),
    }
}

/// Configurations, those of containerd's checkpoints included.
fn is_config(name: &str) -> bool {
    media_type::is_config(name)
        || matches!(
            name,
            "application/vnd.containerd.container.criu.checkpoint.criu.tar"
                | "application/vnd.containerd.container.checkpoint.config.v1+proto"
        )
}

/// The labels by which a document keeps its children from being collected, in the order of the document.
pub fn of_children<'a>(children: impl IntoIterator<Item = &'a Descriptor>) -> Labels {
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut labels = Labels::new();
    for child in children {
        let key = match child.media_type.as_str() {
            name if is_config(name) => "containerd.io/gc.ref.content.config",
            name if media_type::is_manifest(name) => "containerd.io/gc.ref.content.m.",
            name if media_type::is_layer(name) || name == "application/vnd.erofs.layer.v1" => {
                "containerd.io/gc.ref.content.l."
            }
            _ => "containerd.io/gc.ref.content.",
        };
        let number = numbers.entry(key).or_default();
        // The first configuration has no number.
        let key = if *number > 0 || key.ends_with('.') { format!("{key}{number}") } else { key.to_owned() };
        *number += 1;
        labels.insert(key, child.digest.to_string());
    }
    labels
}

/// The key of the label of a reference's registry; the port is no part of it.
pub fn source_key(reference: &Reference) -> String {
    format!("{SOURCE}.{}", uri::without_port(reference.domain()))
}

/// Whether a label tells where content comes from.
pub fn is_source(key: &str) -> bool {
    key.starts_with(SOURCE)
}

/// The value of the label with the reference's repository added to what it was; `None` if it would be too long, and is
/// better left alone.
pub fn with_source(before: Option<&str>, reference: &Reference) -> Option<String> {
    let mut repositories: Vec<&str> = before.unwrap_or_default().split(',').collect();
    repositories.push(reference.path());
    repositories.retain(|repository| !repository.is_empty());
    repositories.sort_unstable();
    repositories.dedup();
    let value = repositories.join(",");
    (source_key(reference).len() + value.len() <= MAX_LABEL_SIZE).then_some(value)
}

/// The repository of the same registry that content with these labels can be mounted from: the one that has the most
/// parts of its path in common with the reference's own.
pub fn mount_source(labels: &Labels, reference: &Reference) -> Option<String> {
    let common = |repository: &str| {
        repository.split('/').zip(reference.path().split('/')).take_while(|(one, other)| one == other).count()
    };
    // The text comes from a label, which clients set: it becomes part of an address and of a scope.
    let is_name = |repository: &&str| {
        *repository != reference.path()
            && format!("{}/{repository}", reference.domain()).parse::<Reference>().is_ok()
    };
    let value = labels.get(&source_key(reference))?;
    let plain = |repository: &&str| !repository.contains([':', '@']);
    value.split(',').filter(plain).filter(is_name).max_by_key(|name| common(name)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, number: u8) -> Descriptor {
        Descriptor::new(media_type, format!("sha256:{number:064x}").parse().unwrap(), 1)
    }

    #[test]
    fn children_are_numbered_by_kind() {
        let children = [
            descriptor(media_type::OCI_CONFIG, 1),
            descriptor(media_type::OCI_LAYER_GZIP, 2),
            descriptor(media_type::DOCKER_LAYER_GZIP, 3),
            descriptor("text/plain", 4),
            descriptor(media_type::OCI_MANIFEST, 5),
            descriptor(media_type::OCI_INDEX, 6),
        ];
        let labels = of_children(&children);
        let mut keys: Vec<&str> =
            labels.keys().map(|key| key.trim_start_matches("containerd.io/gc.ref.content.")).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["0", "1", "config", "l.0", "l.1", "m.0"]);
        assert_eq!(labels["containerd.io/gc.ref.content.l.1"], children[2].digest.as_str());
    }

    #[test]
    fn ingests_have_the_names_of_containerd() {
        let mut layer = descriptor(media_type::DOCKER_LAYER_GZIP, 0);
        let zeros = "0".repeat(64);
        assert_eq!(ingest_reference(&layer), format!("layer-sha256:{zeros}"));
        layer.annotations.insert(ANNOTATION_REF_NAME.to_owned(), "name".to_owned());
        assert_eq!(ingest_reference(&layer), format!("layer-name@sha256:{zeros}"));
        layer.annotations.insert(ANNOTATION_REF_NAME.to_owned(), "x".repeat(1000));
        assert_eq!(ingest_reference(&layer), format!("layer-sha256:{zeros}"));
        assert_eq!(ingest_reference(&descriptor("x", 0)), format!("unknown-sha256:{zeros}"));
    }

    #[test]
    fn sources_are_sorted_and_chosen_by_nearness() {
        let reference: Reference = "localhost:5000/team/app/web:1".parse().unwrap();
        assert_eq!(source_key(&reference), "containerd.io/distribution.source.localhost");
        assert_eq!(with_source(None, &reference).as_deref(), Some("team/app/web"));
        assert_eq!(with_source(Some("z,a,team/app/web"), &reference).as_deref(), Some("a,team/app/web,z"));
        assert_eq!(with_source(Some(&"x".repeat(4090)), &reference), None);
        let labels = |value: &str| Labels::from([(source_key(&reference), value.to_owned())]);
        assert_eq!(
            mount_source(&labels("other,team/app/db,team/x"), &reference).as_deref(),
            Some("team/app/db")
        );
        assert_eq!(mount_source(&labels("team/app/web"), &reference), None);
        assert_eq!(mount_source(&labels("a&mount=x,../..,A,a:b"), &reference), None);
        assert_eq!(mount_source(&Labels::new(), &reference), None);
    }
}
