//! `davit ps`: the containers and how they are.

mod filters;

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, SystemTime};

use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::v1::types::Process;
use serde_json::{Value, json};

use crate::client::Client;
use crate::container::{self, State};
use crate::error::Result;
use crate::template::Format;
use crate::{format, image, labels};
use filters::{Filter, Seen};

/// The characters of a command that are shown.
const COMMAND_LENGTH: usize = 20;

const TABLE: &str = "table {{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Names}}";

const EXAMPLES: &str = "\
Examples:
  davit ps -a --filter status=exited --filter label=tier=web
  davit ps --format '{{.Names}}: {{.Status}}'
  davit ps --format 'table {{.ID}}\\t{{.Labels}}'
  davit ps -a --format json
Fields: ID, Image, Command, CreatedAt, RunningFor, State, Status, Names, Labels.";

/// Options of `davit ps`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Show those that do not run too
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Do not shorten anything
    #[arg(long)]
    no_trunc: bool,
    /// Show only those with: id, name, label, status, exited, ancestor, before, since
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// Show the newest so many, whether they run or not
    #[arg(short = 'n', long, value_name = "NUMBER")]
    last: Option<usize>,
    /// Show the newest, whether it runs or not
    #[arg(short, long, conflicts_with = "last")]
    latest: bool,
    /// Show each by a template of Go's, or as json
    #[arg(long, value_name = "FORMAT", default_value = TABLE, hide_default_value = true)]
    format: Format,
}

/// `davit ps`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let (containers, tasks) =
        tokio::try_join!(container::list(client, Vec::new()), container::tasks(client))?;
    // Both containerd and davitd leave the container's id empty here, and tell the process' own.
    let tasks: BTreeMap<&str, &Process> = tasks.iter().map(|task| (task.id.as_str(), task)).collect();
    let state =
        |container: &Container| container::state_of(container, tasks.get(container.id.as_str()).copied());
    let lost: Vec<&Container> = containers
        .iter()
        .filter(|container| !tasks.contains_key(container.id.as_str()) && state(container) == State::Created)
        .collect();
    let past = container::past_exits(client, &lost).await;
    let see = |container: Container| {
        let state = past.get(&container.id).cloned().unwrap_or_else(|| state(&container));
        Seen { container, state }
    };
    let mut seen = filters::apply(&options.filter, containers.into_iter().map(see).collect())?;
    let last = if options.latest { Some(1) } else { options.last };
    if !options.all && last.is_none() && !options.filter.iter().any(Filter::is_about_state) {
        seen.retain(|seen| seen.state.is_live());
    }
    // The newest first.
    seen.reverse();
    seen.truncate(last.unwrap_or(usize::MAX));
    if options.quiet {
        let id = |seen: &Seen| id(seen, options.no_trunc);
        return seen.iter().try_for_each(|seen| format::line(out, id(seen)));
    }
    let now = SystemTime::now();
    let rows: Vec<Value> = seen.iter().map(|seen| row(seen, options.no_trunc, now)).collect();
    let headings = json!({
        "ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT", "RunningFor": "CREATED",
        "State": "STATE", "Status": "STATUS", "Names": "NAMES", "Labels": "LABELS",
    });
    options.format.write(&rows, &headings, out)
}

fn id(seen: &Seen, whole: bool) -> String {
    if whole { seen.container.id.clone() } else { format::short_id(&seen.container.id).to_owned() }
}

/// What there is to be shown of a container, by Docker's names.
fn row(seen: &Seen, whole: bool, now: SystemTime) -> Value {
    let Seen { container, state } = seen;
    // A spec that cannot be read must not hide the container.
    let args = container::spec(container).map(|spec| container::strings(&spec["process"]["args"]));
    let command = args.unwrap_or_default().join(" ");
    let length = if whole { usize::MAX } else { COMMAND_LENGTH };
    let created = container.created_at.as_ref().and_then(format::system_time);
    let users = container.labels.iter().filter(|(key, _)| labels::is_users(key));
    let users: Vec<String> = users.map(|(key, value)| format!("{key}={value}")).collect();
    json!({
        "ID": id(seen, whole),
        "Image": image::familiar(&container.image),
        "Command": format!("\"{}\"", format::ellipsis(&command, length)),
        "CreatedAt": created.map(format::rfc3339).unwrap_or_default(),
        "RunningFor": created.map(|time| format::ago(time, now)).unwrap_or_default(),
        "State": state.word(),
        "Status": status_text(state, now, started_at),
        "Names": container::name(container),
        "Labels": users.join(","),
    })
}

/// Docker's text for a state: `Up 8 seconds`, `Exited (137) 3 minutes ago`.
fn status_text(state: &State, now: SystemTime, started_at: impl Fn(u32) -> Option<SystemTime>) -> String {
    let up = |pid: u32| match started_at(pid) {
        Some(time) => format!("Up {}", format::duration(now.duration_since(time).unwrap_or_default())),
        None => "Up".to_owned(),
    };
    match state {
        State::Created => "Created".to_owned(),
        State::Running { pid } => up(*pid),
        State::Paused { pid } => format!("{} (Paused)", up(*pid)),
        State::Exited { code, at: Some(at) } => format!("Exited ({code}) {}", format::ago(*at, now)),
        State::Exited { code, at: None } => format!("Exited ({code})"),
    }
}

/// When a process of this machine started.
pub(crate) fn started_at(pid: u32) -> Option<SystemTime> {
    let ticks = davit_sys::process::start_time(i32::try_from(pid).ok()?).ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let since_boot = Duration::from_millis(ticks * 1000 / u64::try_from(per_second).ok()?);
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    let age = Duration::try_from_secs_f64(uptime).ok()?.saturating_sub(since_boot);
    SystemTime::now().checked_sub(age)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn status_texts_are_dockers() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000);
        let before = |seconds| now - Duration::from_secs(seconds);
        let text = |state| status_text(&state, now, |pid| (pid == 7).then(|| before(8)));
        assert_eq!(text(State::Created), "Created");
        assert_eq!(text(State::Running { pid: 7 }), "Up 8 seconds");
        assert_eq!(text(State::Running { pid: 8 }), "Up");
        assert_eq!(text(State::Paused { pid: 7 }), "Up 8 seconds (Paused)");
        assert_eq!(text(State::Exited { code: 137, at: Some(before(180)) }), "Exited (137) 3 minutes ago");
        assert_eq!(text(State::Exited { code: 0, at: Some(before(61)) }), "Exited (0) About a minute ago");
        assert_eq!(text(State::Exited { code: 1, at: None }), "Exited (1)");
    }

    #[test]
    fn our_own_start_is_in_the_past() {
        let started = started_at(std::process::id()).unwrap();
        assert!(SystemTime::now().duration_since(started).unwrap_or_default() < Duration::from_secs(3600));
    }
}
