//! The types that several services share, to the wire and back.

use std::time::SystemTime;

use davit_model::{Any, Mount};
use davit_proto::containerd::types;
use futures::stream::{self, BoxStream, StreamExt};
use tonic::Status;

use crate::metadata::Descriptor;

/// An `Any`, untouched.
pub fn any_from_wire(any: prost_types::Any) -> Any {
    Any { type_url: any.type_url, value: any.value }
}

/// An `Any`, untouched.
pub fn any_to_wire(any: Any) -> prost_types::Any {
    prost_types::Any { type_url: any.type_url, value: any.value }
}

/// A time; `None` for one that a `SystemTime` cannot hold.
pub fn time_from_wire(timestamp: prost_types::Timestamp) -> Option<SystemTime> {
    SystemTime::try_from(timestamp).ok()
}

/// A time. The zero of Go's `time.Time`, which containerd sends for "never", is left out here.
pub fn time_to_wire(time: Option<SystemTime>) -> Option<prost_types::Timestamp> {
    time.map(Into::into)
}

/// A mount.
pub fn mount_from_wire(mount: types::Mount) -> Mount {
    Mount { kind: mount.r#type, source: mount.source, target: mount.target, options: mount.options }
}

/// A mount.
pub fn mount_to_wire(mount: Mount) -> types::Mount {
    types::Mount { r#type: mount.kind, source: mount.source, target: mount.target, options: mount.options }
}

/// A descriptor.
pub fn descriptor_from_wire(descriptor: types::Descriptor) -> Descriptor {
    let types::Descriptor { media_type, digest, size, annotations } = descriptor;
    Descriptor { media_type, digest, size, annotations }
}

/// A descriptor.
pub fn descriptor_to_wire(descriptor: Descriptor) -> types::Descriptor {
    let Descriptor { media_type, digest, size, annotations } = descriptor;
    types::Descriptor { media_type, digest, size, annotations }
}

/// The items in one message of a list, as in containerd.
const PAGE: usize = 100;

/// A list as messages of so many items each; none for an empty list.
pub fn in_pages<T: Send + 'static, M: Send + 'static>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> BoxStream<'static, Result<M, Status>> {
    let mut items = items.into_iter();
    let pages = std::iter::from_fn(move || {
        let page: Vec<T> = items.by_ref().take(PAGE).collect();
        (!page.is_empty()).then(|| Ok(message(page)))
    });
    stream::iter(pages).boxed()
}

/// The paths of a field mask; none for no mask.
pub fn paths(mask: Option<prost_types::FieldMask>) -> Vec<String> {
    mask.map(|mask| mask.paths).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_list_comes_in_pages() {
        for (count, lengths) in [(0, &[][..]), (1, &[1]), (PAGE, &[PAGE]), (2 * PAGE + 1, &[PAGE, PAGE, 1])] {
            let pages: Vec<_> = in_pages((0..count).collect(), |page| page).collect().await;
            let pages: Vec<Vec<usize>> = pages.into_iter().map(Result::unwrap).collect();
            assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), lengths);
            assert_eq!(pages.concat(), (0..count).collect::<Vec<_>>());
        }
    }
}
