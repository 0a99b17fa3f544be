//! `davit events`: what happens, as it happens.

use std::fmt::Write as _;
use std::io::Write;
use std::time::SystemTime;

use davit_proto::any::unpack;
use davit_proto::containerd::events as ev;
use davit_proto::containerd::services::events::v1::SubscribeRequest;
use davit_proto::containerd::services::images::v1 as images;
use davit_proto::containerd::types::Envelope;

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::format;

/// Options of `davit events`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit events\n  davit events -f 'topic~=^/tasks/'\n  davit events -f 'event.container_id==ID'"
)]
pub(crate) struct Options {
    /// A filter in containerd's language; several are alternatives
    #[arg(short, long, value_name = "FILTER")]
    filter: Vec<String>,
    /// Those of all namespaces
    #[arg(long)]
    all_namespaces: bool,
}

/// `davit events`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let action = "subscribe to events";
    let own = format!("namespace=={}", client.namespace());
    let filters = match (options.all_namespaces, options.filter.is_empty()) {
        (true, _) => options.filter,
        (false, true) => vec![own],
        (false, false) => options.filter.iter().map(|filter| format!("{own},{filter}")).collect(),
    };
    let mut stream = client.events().subscribe(SubscribeRequest { filters }).await.call(action)?;
    while let Some(envelope) =
        stream.message().await.map_err(|status| Error::Call { action: action.to_owned(), status })?
    {
        format::line(out, describe(&envelope))?;
        out.flush().map_err(Error::Output)?;
    }
    Ok(())
}

/// One line: time, namespace, topic, and what the event holds. Those of types that are not known show their type.
fn describe(envelope: &Envelope) -> String {
    let time = envelope.timestamp.as_ref().and_then(format::system_time).unwrap_or(SystemTime::UNIX_EPOCH);
    let mut text = format!("{} {} {}", format::rfc3339(time), envelope.namespace, envelope.topic);
    for (key, value) in fields(envelope) {
        let clean: String = value.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let quoted = clean.is_empty() || clean.contains([' ', '"']);
        // Writing to a string cannot fail.
        let _ = if quoted { write!(text, " {key}={clean:?}") } else { write!(text, " {key}={clean}") };
    }
    text
}

type Fields = Vec<(&'static str, String)>;

macro_rules! known {
    ($any:expr; $($type:ty { $($field:ident),* };)*) => {
        $(if let Ok(Some(event)) = unpack::<$type>($any) {
            return vec![$((stringify!($field), event.$field.to_string())),*];
        })*
    };
}

fn fields(envelope: &Envelope) -> Fields {
    let Some(any) = &envelope.event else { return Fields::new() };
    known! { any;
        ev::TaskCreate { container_id, pid };
        ev::TaskStart { container_id, pid };
        ev::TaskDelete { container_id, id, pid, exit_status };
        ev::TaskExit { container_id, id, pid, exit_status };
        ev::TaskOom { container_id };
        ev::TaskExecAdded { container_id, exec_id };
        ev::TaskExecStarted { container_id, exec_id, pid };
        ev::TaskPaused { container_id };
        ev::TaskResumed { container_id };
        ev::TaskCheckpointed { container_id, checkpoint };
        ev::ContainerCreate { id, image };
        ev::ContainerUpdate { id, image };
        ev::ContainerDelete { id };
        ev::ContentCreate { digest, size };
        ev::ContentDelete { digest };
        ev::SnapshotPrepare { snapshotter, key, parent };
        ev::SnapshotCommit { snapshotter, key, name };
        ev::SnapshotRemove { snapshotter, key };
        ev::NamespaceCreate { name };
        ev::NamespaceUpdate { name };
        ev::NamespaceDelete { name };
        ev::SandboxCreate { sandbox_id };
        ev::SandboxStart { sandbox_id };
        ev::SandboxExit { sandbox_id, exit_status };
        images::ImageCreate { name };
        images::ImageUpdate { name };
        images::ImageDelete { name };
    }
    vec![("type", any.type_url.clone())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each_event() {
        let exit = ev::TaskExit {
            container_id: "c".into(),
            id: "c".into(),
            pid: 7,
            exit_status: 137,
            exited_at: None,
        };
        let mut envelope = Envelope {
            timestamp: Some(prost_types::Timestamp { seconds: 1_000_000, nanos: 5 }),
            namespace: "default".to_owned(),
            topic: "/tasks/exit".to_owned(),
            event: Some(davit_proto::any::pack(&exit)),
        };
        let want =
            "1970-01-12T13:46:40.000000005Z default /tasks/exit container_id=c id=c pid=7 exit_status=137";
        assert_eq!(describe(&envelope), want);
        envelope.event = Some(davit_proto::any::pack(&images::ImageDelete { name: "a b\n".to_owned() }));
        assert!(describe(&envelope).ends_with(" name=\"a b?\""));
        envelope.event = Some(prost_types::Any { type_url: "x.Y".to_owned(), value: vec![1] });
        assert!(describe(&envelope).ends_with(" type=x.Y"));
    }
}
