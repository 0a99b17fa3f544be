//! The types that several services share, to the wire and back.

use std::time::SystemTime;

use davit_model::{Any, Mount};
use davit_proto::containerd::types;

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

/// The paths of a field mask; none for no mask.
pub fn paths(mask: Option<prost_types::FieldMask>) -> Vec<String> {
    mask.map(|mask| mask.paths).unwrap_or_default()
}
