//! `davit events`: what happened, and what happens.

mod filters;
pub(super) mod when;

use std::fmt::Write as _;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

use davit_proto::any::unpack;
use davit_proto::containerd::events as ev;
use davit_proto::containerd::services::events::v1::SubscribeRequest;
use davit_proto::containerd::services::images::v1 as images;
use davit_proto::containerd::types::Envelope;
use davit_proto::davit::services::events::v1::entry::What;
use davit_proto::davit::services::events::v1::{
    Entry, Event, FollowRequest, Gap, ListRequest, follow_request, list_request,
};
use serde_json::{Map, Value, json};
use tonic::{Code, Status, Streaming};

use crate::client::Client;
use crate::error::{CallContext, Error, Result};
use crate::format;
use when::When;

const ACTION: &str = "read events";

/// A daemon that is restarted is away for less than this.
const AWAY: Duration = Duration::from_secs(30);
/// How often it is asked meanwhile.
const AGAIN: Duration = Duration::from_millis(100);

const EXAMPLES: &str = "\
Examples:
  davit events                                     what happens from now on
  davit events --since 10m                         the last ten minutes, and on
  davit events --since 1h --until 0s               the last hour, and no more
  davit events --since 2026-11-21 -f event=die -f container=web
  davit events --since cursor:1048592 --format json
  davit events -f 'topic~=^/tasks/,event.container_id==web'

A WHEN is a duration before now (90s, 10m, 1h30m, 7d), a time of RFC 3339 or
its date (in UTC unless it says otherwise), or seconds since 1970. Each event
has a cursor, which --format json shows: with --since cursor:N a reader that
was away gets every later event that is kept, once. The daemon may be restarted
meanwhile. An exit that no shim could report shows its cause.";

/// Options of `davit events`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Begin with the events of the past from there on
    #[arg(long, value_name = "WHEN|cursor:N", value_parser = when::parse)]
    since: Option<When>,
    /// End there; without it, follow what happens
    #[arg(long, value_name = "WHEN", value_parser = parse_until)]
    until: Option<SystemTime>,
    /// container=, event=, type= or cause=, or a filter in containerd's language
    #[arg(short, long, value_name = "KEY=VALUE|FILTER")]
    filter: Vec<String>,
    /// Print events as lines of words or as objects
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Those of all namespaces
    #[arg(long)]
    all_namespaces: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    #[value(alias = "{{json .}}")]
    Json,
}

/// `0s` is now, which as a duration is nothing.
fn parse_until(text: &str) -> std::result::Result<SystemTime, String> {
    if text == "0s" || text == "now" { Ok(SystemTime::now()) } else { when::parse_time(text) }
}

/// `davit events`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let filters = filters::build(client, options.all_namespaces, &options.filter).await?;
    let mut printer = Printer { format: options.format, until: options.until, last: None, out };
    if let Some(until) = options.until.filter(|until| *until <= SystemTime::now()) {
        let since = options.since.map(|since| match since {
            When::Time(time) => list_request::Since::Time(time.into()),
            When::Cursor(cursor) => list_request::Since::Cursor(cursor),
        });
        let request = ListRequest { since, until: Some(until.into()), filters, limit: 0 };
        let mut stream = known(client.history().list(request).await)?;
        while let Some(entry) = stream.message().await.map_err(failed)? {
            printer.print(entry)?;
        }
        return Ok(());
    }
    let begun = SystemTime::now();
    match client.history().follow(request(options.since, &filters)).await {
        // Other daemons tell what happens, and no more.
        Err(status)
            if status.code() == Code::Unimplemented && options.since.is_none() && options.until.is_none() =>
        {
            subscribe(client, filters, printer).await
        }
        stream => {
            let stream = known(stream)?;
            let end = async {
                match options.until {
                    Some(until) => tokio::time::sleep(until.duration_since(begun).unwrap_or_default()).await,
                    None => std::future::pending().await,
                }
            };
            // Cancel safety: after the end nothing is read any more.
            tokio::select! {
                result = follow(client, stream, options.since.unwrap_or(When::Time(begun)), &filters, &mut printer) => result,
                () = end => Ok(()),
            }
        }
    }
}

fn request(since: Option<When>, filters: &[String]) -> FollowRequest {
    let since = since.map(|since| match since {
        When::Time(time) => follow_request::Since::Time(time.into()),
        When::Cursor(cursor) => follow_request::Since::Cursor(cursor),
    });
    FollowRequest { since, filters: filters.to_vec() }
}

/// Follows for ever. When the daemon goes away it is waited for, and gone on where it was: nothing is missed.
async fn follow(
    client: &Client,
    mut stream: Streaming<Entry>,
    since: When,
    filters: &[String],
    printer: &mut Printer<'_>,
) -> Result<()> {
    loop {
        let error = loop {
            match stream.message().await {
                Ok(Some(entry)) => printer.print(entry)?,
                Ok(None) => break Status::unavailable("the daemon has ended the stream"),
                Err(status) => break status,
            }
        };
        let since = Some(printer.last.map_or(since, When::Cursor));
        let deadline = Instant::now() + AWAY;
        stream = loop {
            match client.history().follow(request(since, filters)).await {
                Ok(stream) => break stream.into_inner(),
                // What broke first says more than what follows from it.
                Err(_) if Instant::now() > deadline => return Err(failed(error)),
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
    }
}

fn known<T>(answer: std::result::Result<tonic::Response<T>, Status>) -> Result<T> {
    match answer {
        Err(status) if status.code() == Code::Unimplemented => Err(Error::usage(
            "this daemon keeps no history of events",
            "leave --since and --until out to see what happens from now on",
        )),
        answer => answer.call(ACTION),
    }
}

/// Prints entries in order.
struct Printer<'a> {
    format: Format,
    until: Option<SystemTime>,
    /// The cursor of the last that was printed.
    last: Option<u64>,
    out: &'a mut dyn Write,
}

impl Printer<'_> {
    fn print(&mut self, entry: Entry) -> Result<()> {
        self.last = Some(entry.cursor);
        match entry.what {
            Some(What::Event(Event { envelope: Some(envelope), cause })) => {
                if self.until.is_none_or(|until| time(&envelope) < until) {
                    self.event(Some(entry.cursor), &envelope, &cause)?;
                }
            }
            Some(What::Gap(gap)) => tell_gap(entry.cursor, &gap, self.format, self.out)?,
            // Something of a later release.
            Some(What::Event(Event { envelope: None, .. })) | None => {}
        }
        self.out.flush().map_err(Error::Output)
    }

    fn event(&mut self, cursor: Option<u64>, envelope: &Envelope, cause: &str) -> Result<()> {
        let text = match self.format {
            Format::Text => describe(envelope, cause),
            Format::Json => object(cursor, envelope, cause).to_string(),
        };
        format::line(self.out, text)
    }
}

fn tell_gap(cursor: u64, gap: &Gap, format: Format, out: &mut dyn Write) -> Result<()> {
    if format == Format::Json {
        return format::line(out, json!({ "cursor": cursor, "gap": { "lost": gap.lost } }));
    }
    // Not among the events, but where a person sees it; that nobody can read it is no failure.
    let stderr = &mut std::io::stderr();
    let _ = match gap.lost {
        0 => writeln!(stderr, "davit: events are missing here: they are too old or damaged"),
        lost => writeln!(stderr, "davit: {lost} events are missing here: they could not be kept"),
    };
    Ok(())
}

/// containerd's own way: live only, and without causes.
async fn subscribe(client: &Client, filters: Vec<String>, mut printer: Printer<'_>) -> Result<()> {
    let mut stream = client.events().subscribe(SubscribeRequest { filters }).await.call(ACTION)?;
    while let Some(envelope) = stream.message().await.map_err(failed)? {
        printer.event(None, &envelope, "")?;
        printer.out.flush().map_err(Error::Output)?;
    }
    Ok(())
}

fn failed(status: Status) -> Error {
    Error::Call { action: ACTION.to_owned(), status }
}

fn time(envelope: &Envelope) -> SystemTime {
    envelope.timestamp.as_ref().and_then(format::system_time).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// One line: time, namespace, topic, and what the event holds. Those of types that are not known show their type.
fn describe(envelope: &Envelope, cause: &str) -> String {
    let mut text = format!("{} {} {}", format::rfc3339(time(envelope)), envelope.namespace, envelope.topic);
    let cause = (!cause.is_empty()).then(|| ("cause", Value::from(cause)));
    for (key, value) in fields(envelope).into_iter().chain(cause) {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let clean: String = value.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let quoted = clean.is_empty() || clean.contains([' ', '"']);
        // Writing to a string cannot fail.
        let _ = if quoted { write!(text, " {key}={clean:?}") } else { write!(text, " {key}={clean}") };
    }
    text
}

/// The same as an object.
fn object(cursor: Option<u64>, envelope: &Envelope, cause: &str) -> Value {
    let mut object = Map::new();
    if let Some(cursor) = cursor {
        object.insert("cursor".to_owned(), cursor.into());
    }
    object.insert("time".to_owned(), format::rfc3339(time(envelope)).into());
    object.insert("namespace".to_owned(), envelope.namespace.as_str().into());
    object.insert("topic".to_owned(), envelope.topic.as_str().into());
    let event: Map<String, Value> =
        fields(envelope).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    object.insert("event".to_owned(), event.into());
    if !cause.is_empty() {
        object.insert("cause".to_owned(), cause.into());
    }
    object.into()
}

type Fields = Vec<(&'static str, Value)>;

macro_rules! known {
    ($any:expr; $($type:ty { $($field:ident),* };)*) => {
        $(if let Ok(Some(event)) = unpack::<$type>($any) {
            return vec![$((stringify!($field), Value::from(event.$field))),*];
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
    vec![("type", Value::from(any.type_url.as_str()))]
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
        assert_eq!(describe(&envelope, ""), want);
        assert_eq!(describe(&envelope, "shim-killed"), format!("{want} cause=shim-killed"));
        let json = object(Some(5), &envelope, "shim-killed").to_string();
        let want = r#"{"cause":"shim-killed","cursor":5,"event":{"container_id":"c","exit_status":137,"id":"c","pid":7},"#;
        assert!(json.starts_with(want), "{json}");
        envelope.event = Some(davit_proto::any::pack(&images::ImageDelete { name: "a b\n".to_owned() }));
        assert!(describe(&envelope, "").ends_with(" name=\"a b?\""));
        envelope.event = Some(prost_types::Any { type_url: "x.Y".to_owned(), value: vec![1] });
        assert!(describe(&envelope, "").ends_with(" type=x.Y"));
    }
}
