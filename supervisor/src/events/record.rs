//! How an event lies in the history: a protobuf message of our own, so that a later release can add to it.

use std::time::SystemTime;

use davit_model::Any;
use prost::Message;

use super::{Cause, Envelope};

#[derive(Clone, PartialEq, Eq, Message)]
struct Record {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(string, tag = "4")]
    topic: String,
    #[prost(string, tag = "5")]
    type_url: String,
    #[prost(bytes = "vec", tag = "6")]
    value: Vec<u8>,
    #[prost(string, tag = "7")]
    cause: String,
}

/// The bytes of an event.
pub(super) fn encode(envelope: &Envelope) -> Vec<u8> {
    let time = prost_types::Timestamp::from(envelope.timestamp);
    let record = Record {
        seconds: time.seconds,
        nanos: time.nanos,
        namespace: envelope.namespace.clone(),
        topic: envelope.topic.clone(),
        type_url: envelope.event.type_url.clone(),
        value: envelope.event.value.clone(),
        cause: envelope.cause.name().to_owned(),
    };
    record.encode_to_vec()
}

/// The event of some bytes; `None` if they are none.
pub(super) fn decode(bytes: &[u8]) -> Option<Envelope> {
    let record = Record::decode(bytes).ok()?;
    let time = prost_types::Timestamp { seconds: record.seconds, nanos: record.nanos };
    Some(Envelope {
        timestamp: SystemTime::try_from(time).ok()?,
        namespace: record.namespace,
        topic: record.topic,
        event: Any { type_url: record.type_url, value: record.value },
        cause: Cause::from_name(&record.cause),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_is_written_is_read() {
        for cause in [Cause::None, Cause::ShimKilled] {
            let envelope = Envelope {
                timestamp: SystemTime::UNIX_EPOCH - Duration::new(5, 7),
                namespace: "n".into(),
                topic: "/tasks/exit".into(),
                event: Any { type_url: "t".into(), value: vec![0, 0xff] },
                cause,
            };
            assert_eq!(decode(&encode(&envelope)), Some(envelope));
        }
        assert_eq!(decode(&[0xff]), None);
    }
}
