//! `davit top`: the processes of a container, as the host sees them.

use std::fs;
use std::io::Write;
use std::time::SystemTime;

use davit_proto::containerd::services::tasks::v1::ListPidsRequest;

use crate::client::Client;
use crate::commands::ps;
use crate::container;
use crate::error::{CallContext, Error, Result};
use crate::table::Table;

/// Options of `davit top`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The container, by name or id
    container: String,
}

/// `davit top`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let container = container::find(client, &options.container).await?;
    if !container::state(client, &container).await?.is_live() {
        return Err(Error::NotRunning { given: options.container });
    }
    let request = ListPidsRequest { container_id: container.id };
    let processes = client.tasks().list_pids(request).await.call("list the processes")?.processes;
    let mut pids: Vec<u32> = processes.iter().map(|process| process.pid).collect();
    pids.sort_unstable();
    let mut table = Table::new(&["UID", "PID", "PPID", "STARTED", "TIME", "CMD"]);
    let now = SystemTime::now();
    for row in pids.into_iter().filter_map(|pid| describe(pid, now)) {
        table.row(row);
    }
    table.write(out).map_err(Error::Output)
}

/// One process; `None` when it is gone by now.
fn describe(pid: u32, now: SystemTime) -> Option<Vec<String>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next().map(str::to_owned)
    };
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut command = String::from_utf8_lossy(&arguments).replace('\0', " ").trim_end().to_owned();
    if command.is_empty() {
        command = format!("[{}]", field("Name:")?);
    }
    let started = ps::started_at(pid).map(|time| crate::format::ago(time, now)).unwrap_or_default();
    Some(vec![field("Uid:")?, pid.to_string(), field("PPid:")?, started, cpu_time(pid)?, command])
}

/// The CPU time of a process as ps(1) shows it: fields 14 and 15 of proc_pid_stat(5).
fn cpu_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks: u64 =
        rest.split_ascii_whitespace().skip(11).take(2).filter_map(|text| text.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let seconds = ticks / u64::try_from(per_second).ok()?;
    Some(format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_a_process_and_forgives_one_that_is_gone() {
        let row = describe(std::process::id(), SystemTime::now()).unwrap();
        assert_eq!(row[1], std::process::id().to_string());
        assert_eq!(row.len(), 6);
        assert!(describe(u32::MAX, SystemTime::now()).is_none());
    }
}
