//! What the daemon tells of itself on a socket of its own (`[debug]` of containerd's configuration): what it is at, and how much
//! it logs.
//!
//! containerd serves the profiles of Go's runtime there. This daemon has no such runtime; who asks for them is told so, and where
//! else to look. The socket is its owner's alone, because the pages name containers.

use std::borrow::Cow;
use std::fmt::Write;
use std::path::Path;
use std::time::SystemTime;

use serde_json::json;

use crate::calls::Calls;
use crate::logs::Logs;
use crate::metadata::Metadata;
use crate::pages::{Answer, JSON, Request, Site, TEXT};

/// What stands on the first page.
const INDEX: &str = "\
GET  /debug/vars           the daemon in numbers, as JSON
GET  /debug/calls          the calls of clients that are under way
GET  /debug/threads        the threads, and where in the kernel they are
GET  /debug/log            the level or filter of the logs
POST /debug/log?level=...  another one
GET  /debug/pprof/cmdline  the command line
";

/// The profiles of Go's runtime: `ctr pprof` shows no more of an answer than these words.
const NO_GO: &str =
    "404 davitd is no Go program and has no such profile: see /debug/calls and /debug/threads";

/// Who knows the pages.
#[derive(Clone)]
pub(super) struct Diagnostics {
    pub(super) calls: Calls,
    pub(super) logs: Logs,
    pub(super) metadata: Metadata,
    pub(super) version: String,
    pub(super) started: SystemTime,
}

impl Site for Diagnostics {
    async fn answer(&self, request: Request<'_>) -> Answer {
        match (request.method, request.path) {
            ("GET", "/" | "/debug" | "/debug/") => Answer::page(TEXT, INDEX.to_owned()),
            ("GET", "/debug/vars") => Answer::page(JSON, self.vars()),
            ("GET", "/debug/calls") => Answer::page(TEXT, self.calls.table()),
            ("GET", "/debug/threads") => Answer::page(TEXT, threads()),
            ("GET", "/debug/log") => Answer::page(TEXT, format!("{}\n", self.logs.level())),
            ("POST" | "PUT", "/debug/log") => self.set_level(request.query),
            ("GET", "/debug/pprof/cmdline") => Answer::page(TEXT, command_line().join("\0")),
            (_, path) if path.starts_with("/debug/pprof") => Answer::error(NO_GO),
            (_, "/debug/vars" | "/debug/calls" | "/debug/threads" | "/debug/log") => {
                Answer::error("405 Method Not Allowed")
            }
            _ => Answer::error("404 Not Found"),
        }
    }
}

impl Diagnostics {
    fn set_level(&self, query: &str) -> Answer {
        let Some(level) = wanted_level(query) else {
            return Answer::error("400 say which: /debug/log?level=debug");
        };
        match self.logs.set_level(&level) {
            Ok(()) => {
                tracing::info!(%level, "the level of the logs was changed");
                Answer::page(TEXT, format!("{level}\n"))
            }
            Err(error) => Answer::error(format!("400 {error}")),
        }
    }

    fn vars(&self) -> String {
        let (calls, underway) = self.calls.count();
        let runtime = tokio::runtime::Handle::current().metrics();
        let namespaces = self.metadata.namespaces().list().map_or(0, |namespaces| namespaces.len());
        let vars = json!({
            "cmdline": command_line(),
            "version": self.version,
            "pid": std::process::id(),
            "uptime_seconds": self.started.elapsed().unwrap_or_default().as_secs(),
            "log_level": self.logs.level(),
            "calls": { "started": calls, "underway": underway },
            "namespaces": namespaces,
            "memory": memory(),
            "open_files": count(Path::new("/proc/self/fd")),
            "threads": count(Path::new("/proc/self/task")),
            "runtime": {
                "workers": runtime.num_workers(),
                "tasks": runtime.num_alive_tasks(),
                "queued": runtime.global_queue_depth(),
            },
        });
        format!("{vars:#}\n")
    }
}

/// The level in a query, whose pairs are encoded as those of a form.
fn wanted_level(query: &str) -> Option<Cow<'_, str>> {
    form_urlencoded::parse(query.as_bytes()).find_map(|(key, value)| (key == "level").then_some(value))
}

fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, |entries| entries.count())
}

fn command_line() -> Vec<String> {
    std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect()
}

/// What the kernel says of this process's memory, in bytes (proc_pid_status(5)).
fn memory() -> serde_json::Map<String, serde_json::Value> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let sizes = status.lines().filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        let kilobytes: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
        key.starts_with("Vm").then(|| (key.to_owned(), json!(kilobytes * 1024)))
    });
    sizes.collect()
}

/// The threads of this process as the kernel sees them: their states, their time on a processor, and where they sleep. What may
/// not be read, as stacks without privileges, is left out.
pub(super) fn threads() -> String {
    let mut page = String::new();
    let mut threads: Vec<_> = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten().collect();
    threads.sort_by_key(|thread| thread.file_name());
    for thread in threads {
        let read = |name: &str| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let status = read("status");
        let field = |key: &str| {
            let found = status.lines().find_map(|line| line.strip_prefix(key));
            found.unwrap_or_default().trim().to_owned()
        };
        // The times stand behind the name, which is in parentheses and may hold anything (proc_pid_stat(5)).
        let stat = read("stat");
        let times: Vec<u64> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse().ok())
            .collect();
        // Writing to a text cannot fail.
        let _ = writeln!(
            page,
            "thread {} {:?}: {}, {} ticks in user mode and {} in the kernel, waits in {}",
            thread.file_name().to_string_lossy(),
            field("Name:"),
            field("State:"),
            times.first().copied().unwrap_or_default(),
            times.get(1).copied().unwrap_or_default(),
            Some(read("wchan"))
                .filter(|place| !matches!(place.as_str(), "" | "0"))
                .as_deref()
                .unwrap_or("nothing"),
        );
        for line in read("stack").lines() {
            let _ = writeln!(page, "    {line}");
        }
    }
    page
}

/// Logs what SIGUSR1 asks for; containerd logs its stacks then.
pub(super) fn log_everything(calls: &Calls) {
    let (table, threads) = (calls.table(), threads());
    tracing::info!("=== BEGIN calls under way ===\n{table}=== END calls under way ===");
    tracing::info!("=== BEGIN threads ===\n{threads}=== END threads ===");
}

#[cfg(test)]
mod tests {
    use super::wanted_level;

    #[test]
    fn the_level_of_a_query_may_be_encoded() {
        assert_eq!(wanted_level("level=info%2Cdavit=debug").as_deref(), Some("info,davit=debug"));
        assert_eq!(wanted_level("a=b&level=warn").as_deref(), Some("warn"));
        assert_eq!(wanted_level("levels=warn"), None);
    }
}
