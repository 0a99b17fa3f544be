//! Messages of a type that is told with them: [`prost_types::Any`] as containerd's peers write it.
//!
//! The type is the message's bare full name, such as `containerd.events.TaskExit`, without the prefix
//! `type.googleapis.com/` that protobuf suggests. Clients compare it letter for letter. Both forms are read.
//! (`Any::from_msg` of prost-types writes a slash before the name, which no peer understands.)

use prost::{DecodeError, Name};
use prost_types::Any;

const PREFIX: &str = "type.googleapis.com/";

/// Wraps a message, naming its type by the bare full name.
#[must_use]
pub fn pack<M: Name>(message: &M) -> Any {
    Any { type_url: M::full_name(), value: message.encode_to_vec() }
}

/// Unwraps a message of type `M`; `None` if it is of another type.
///
/// # Errors
///
/// Fails if it is said to be of type `M` but its bytes are not an encoding of that.
pub fn unpack<M: Name + Default>(any: &Any) -> Result<Option<M>, DecodeError> {
    if is::<M>(any) { M::decode(any.value.as_slice()).map(Some) } else { Ok(None) }
}

/// Whether it is said to be of type `M`.
#[must_use]
pub fn is<M: Name>(any: &Any) -> bool {
    any.type_url.strip_prefix(PREFIX).unwrap_or(&any.type_url) == M::full_name()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::events::{TaskExit, TaskStart};

    fn exit() -> TaskExit {
        TaskExit { container_id: "c1".into(), id: "c1".into(), pid: 7, exit_status: 137, exited_at: None }
    }

    #[test]
    fn packs_with_the_bare_name() {
        let any = pack(&exit());
        assert_eq!(any.type_url, "containerd.events.TaskExit");
        assert_eq!(unpack(&any), Ok(Some(exit())));
    }

    #[test]
    fn image_events_are_named_by_their_odd_package() {
        let any = pack(&crate::containerd::services::images::v1::ImageCreate::default());
        assert_eq!(any.type_url, "containerd.services.images.v1.ImageCreate");
    }

    #[test]
    fn unpacks_prefixed_names() {
        let mut any = pack(&exit());
        any.type_url.insert_str(0, PREFIX);
        assert_eq!(unpack(&any), Ok(Some(exit())));
    }

    #[test]
    fn other_types_are_none() {
        let any = pack(&exit());
        assert_eq!(unpack::<TaskStart>(&any), Ok(None));
        for type_url in
            ["", "TaskExit", "x.googleapis.com/containerd.events.TaskExit", "/containerd.events.TaskExit"]
        {
            let any = Any { type_url: type_url.into(), value: any.value.clone() };
            assert_eq!(unpack::<TaskExit>(&any), Ok(None), "{type_url}");
        }
    }

    #[test]
    fn bytes_of_another_message_are_an_error() {
        let any = Any { type_url: TaskExit::full_name(), value: vec![0xff] };
        assert!(unpack::<TaskExit>(&any).is_err());
    }
}
