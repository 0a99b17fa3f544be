//! Events on the wire: topics and messages of what the metadata services tell, and the fields that filters may ask for.

use std::hash::{DefaultHasher, Hash};
use std::time::SystemTime;

use davit_model::{Any, Labels};
use davit_proto::any::pack;
use davit_proto::containerd::events as messages;
use davit_proto::containerd::services::images::v1 as images;
use prost::{Message, Name};

use super::convert::{any_from_wire, any_to_wire};
use crate::events::{Cause, Envelope, Fields, Reading};
use crate::metadata::Event;

/// The envelope of a change.
pub fn envelope(namespace: &str, event: Event) -> Envelope {
    let (topic, event) = message(event);
    Envelope {
        timestamp: SystemTime::now(),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: any_from_wire(event),
        cause: Cause::None,
    }
}

/// The topic and the message of a change.
fn message(event: Event) -> (&'static str, prost_types::Any) {
    match event {
        Event::NamespaceCreate { name, labels } => {
            ("/namespaces/create", pack(&messages::NamespaceCreate { name, labels }))
        }
        Event::NamespaceUpdate { name, labels } => {
            ("/namespaces/update", pack(&messages::NamespaceUpdate { name, labels }))
        }
        Event::NamespaceDelete { name } => ("/namespaces/delete", pack(&messages::NamespaceDelete { name })),
        Event::ContainerCreate { id, image, runtime, runtime_options } => {
            let options = runtime_options.map(any_to_wire);
            let runtime = Some(messages::container_create::Runtime { name: runtime, options });
            ("/containers/create", pack(&messages::ContainerCreate { id, image, runtime }))
        }
        Event::ContainerUpdate { id, image, labels, snapshot_key } => {
            ("/containers/update", pack(&messages::ContainerUpdate { id, image, labels, snapshot_key }))
        }
        Event::ContainerDelete { id } => ("/containers/delete", pack(&messages::ContainerDelete { id })),
        Event::ImageCreate { name, labels } => {
            ("/images/create", pack(&images::ImageCreate { name, labels }))
        }
        Event::ImageUpdate { name, labels } => {
            ("/images/update", pack(&images::ImageUpdate { name, labels }))
        }
        Event::ImageDelete { name } => ("/images/delete", pack(&images::ImageDelete { name })),
        Event::ContentCreate { digest, size } => {
            let size = i64::try_from(size).unwrap_or(i64::MAX);
            ("/content/create", pack(&messages::ContentCreate { digest, size }))
        }
        Event::ContentDelete { digest } => ("/content/delete", pack(&messages::ContentDelete { digest })),
        Event::SnapshotPrepare { snapshotter, key, parent } => {
            ("/snapshot/prepare", pack(&messages::SnapshotPrepare { key, parent, snapshotter }))
        }
        Event::SnapshotCommit { snapshotter, key, name } => {
            ("/snapshot/commit", pack(&messages::SnapshotCommit { key, name, snapshotter }))
        }
        Event::SnapshotRemove { snapshotter, key } => {
            ("/snapshot/remove", pack(&messages::SnapshotRemove { key, snapshotter }))
        }
    }
}

/// What the hub asks of events.
pub const READING: Reading = Reading { fields, occurrence };

/// What makes an event one of its own. An exit is that of a process; whoever reports it, and when, does not matter. A shim
/// that repeats any other event repeats it to the byte, its time included.
fn occurrence(envelope: &Envelope, hasher: &mut DefaultHasher) {
    envelope.namespace.hash(hasher);
    envelope.topic.hash(hasher);
    if is_named::<messages::TaskExit>(&envelope.event.type_url)
        && let Ok(exit) = messages::TaskExit::decode(envelope.event.value.as_slice())
    {
        let time = exit.exited_at.map(|time| (time.seconds, time.nanos));
        return (exit.container_id, exit.id, exit.pid, time).hash(hasher);
    }
    (envelope.timestamp, &envelope.event.type_url, &envelope.event.value).hash(hasher);
}

/// What filters may ask of an event; nothing of one of an unknown type.
pub fn fields(event: &Any) -> Fields {
    /// Finds the message's type, and takes its fields by their names.
    macro_rules! fields {
        ($($message:ty { $($text:ident),* $(; $labels:ident)? })*) => {$(
            if is_named::<$message>(&event.type_url) {
                let Ok(message) = <$message>::decode(event.value.as_slice()) else { return Fields::default() };
                let texts = vec![$((stringify!($text), message.$text)),*];
                let fields = Fields { texts, labels: Labels::new() };
                $(let fields = Fields { labels: message.$labels, ..fields };)?
                return fields;
            }
        )*};
    }
    fields! {
        messages::TaskCreate { container_id, bundle, checkpoint }
        messages::TaskStart { container_id }
        messages::TaskExit { container_id, id }
        messages::TaskDelete { container_id, id }
        messages::TaskOom { container_id }
        messages::TaskExecAdded { container_id, exec_id }
        messages::TaskExecStarted { container_id, exec_id }
        messages::TaskPaused { container_id }
        messages::TaskResumed { container_id }
        messages::TaskCheckpointed { container_id, checkpoint }
        messages::ContainerCreate { id, image }
        messages::ContainerUpdate { id, image, snapshot_key; labels }
        messages::ContainerDelete { id }
        messages::ContentCreate { digest }
        messages::ContentDelete { digest }
        messages::NamespaceCreate { name; labels }
        messages::NamespaceUpdate { name; labels }
        messages::NamespaceDelete { name }
        messages::SnapshotPrepare { key, parent, snapshotter }
        messages::SnapshotCommit { key, name, snapshotter }
        messages::SnapshotRemove { key, snapshotter }
        images::ImageCreate { name; labels }
        images::ImageUpdate { name; labels }
        images::ImageDelete { name }
    }
    Fields::default()
}

/// Whether a type is that of `M`, without building the name of `M` for each event.
fn is_named<M: Name>(type_url: &str) -> bool {
    let name = type_url.strip_prefix(M::PACKAGE).and_then(|rest| rest.strip_prefix('.'));
    name == Some(M::NAME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use davit_model::filter::Adaptor;

    fn field(event: &Any, path: &[String]) -> Option<String> {
        fields(event).field(path).map(Into::into)
    }

    fn path(text: &str) -> Vec<String> {
        text.split('.').map(str::to_owned).collect()
    }

    #[test]
    fn image_events_are_of_their_odd_package() {
        let event =
            Event::ImageCreate { name: "i".into(), labels: Labels::from([("a.b".into(), "c".into())]) };
        let envelope = envelope("n", event);
        assert_eq!(envelope.topic, "/images/create");
        assert_eq!(envelope.event.type_url, "containerd.services.images.v1.ImageCreate");
        assert_eq!(field(&envelope.event, &path("name")).as_deref(), Some("i"));
        assert_eq!(field(&envelope.event, &path("labels.a.b")).as_deref(), Some("c"));
        assert_eq!(field(&envelope.event, &path("nothing")), None);
    }

    #[test]
    fn an_event_of_an_unknown_type_has_no_fields() {
        assert_eq!(field(&Any { type_url: "x".into(), value: vec![1] }, &path("id")), None);
        let garbage = Any { type_url: messages::TaskExit::full_name(), value: vec![0xff] };
        assert_eq!(field(&garbage, &path("id")), None);
    }
}
