//! `davit stats`: what containers use, once or again and again.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use davit_proto::containerd::services::containers::v1::Container;
use davit_proto::containerd::services::tasks::v1::MetricsRequest;
use davit_proto::containerd::types::Metric;
use davit_proto::io::containerd::cgroups::{v1, v2};
use serde_json::{Value, json};

use crate::client::Client;
use crate::container;
use crate::error::{CallContext, Error, Result};
use crate::format::{binary_size, decimal_size, short_id};
use crate::template::Format;

/// The time between two measurements, which CPU usage is the difference of.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same when it is measured once.
const ONCE: Duration = Duration::from_millis(500);
/// What has a terminal show what follows in the place of what it shows (console_codes(4)).
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

const TABLE: &str =
    "table {{.ID}}\t{{.Name}}\t{{.CPUPerc}}\t{{.MemUsage}}\t{{.MemPerc}}\t{{.BlockIO}}\t{{.PIDs}}";

/// Options of `davit stats`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit stats\n  davit stats --no-stream --format '{{.Name}} {{.MemUsage}}' web\n\
                        Fields: ID, Name, CPUPerc, MemUsage, MemPerc, BlockIO, PIDs."
)]
pub(crate) struct Options {
    /// Measure once, not again and again
    #[arg(long)]
    no_stream: bool,
    /// Show those that do not run too
    #[arg(short, long)]
    all: bool,
    /// Show each by a template of Go's, or as json
    #[arg(long, value_name = "FORMAT", default_value = TABLE, hide_default_value = true)]
    format: Format,
    /// Containers, by name or id (default: all that run)
    #[arg(value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// What one container uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Usage {
    /// CPU time since the start, in nanoseconds.
    cpu: u64,
    /// Bytes of memory without those that can be dropped at any time.
    memory: u64,
    /// The limit of memory, the machine's if there is none.
    limit: u64,
    /// Bytes read from disks.
    read: u64,
    /// Bytes written to disks.
    written: u64,
    /// Processes and threads.
    pids: u64,
}

/// `davit stats`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let mut named = Vec::new();
    for given in &options.containers {
        named.push(container::find(client, given).await?);
    }
    let headings = json!({
        "ID": "CONTAINER ID", "Name": "NAME", "CPUPerc": "CPU %", "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %",
        "BlockIO": "BLOCK I/O", "PIDs": "PIDS",
    });
    let clears = !options.no_stream && std::io::stdout().is_terminal();
    let machine = machine_memory();
    let mut before = measure(client).await?;
    loop {
        let start = Instant::now();
        tokio::time::sleep(if options.no_stream { ONCE } else { INTERVAL }).await;
        let after = measure(client).await?;
        let elapsed = start.elapsed();
        let containers =
            if named.is_empty() { container::list(client, Vec::new()).await? } else { named.clone() };
        let mut rows = Vec::new();
        for container in &containers {
            let find = |metrics: &[Metric]| {
                metrics.iter().find(|m| m.id == container.id).and_then(|m| usage(m, machine))
            };
            let now = find(&after);
            if now.is_some() || options.all || !named.is_empty() {
                rows.push(row(container, find(&before), now, elapsed));
            }
        }
        if clears {
            out.write_all(CLEAR.as_bytes()).map_err(Error::Output)?;
        }
        options.format.write(&rows, &headings, out)?;
        out.flush().map_err(Error::Output)?;
        if options.no_stream {
            return Ok(());
        }
        before = after;
    }
}

fn row(container: &Container, before: Option<Usage>, now: Option<Usage>, elapsed: Duration) -> Value {
    let (id, name) = (short_id(&container.id), container::name(container));
    let Some(now) = now else {
        let none = "--";
        return json!({"ID": id, "Name": name, "CPUPerc": none, "MemUsage": "-- / --", "MemPerc": none,
            "BlockIO": "-- / --", "PIDs": none});
    };
    let used = now.cpu.saturating_sub(before.unwrap_or(now).cpu);
    let cpu = used as f64 / elapsed.as_nanos().max(1) as f64 * 100.0;
    let memory = if now.limit == 0 { 0.0 } else { now.memory as f64 / now.limit as f64 * 100.0 };
    json!({
        "ID": id,
        "Name": name,
        "CPUPerc": format!("{cpu:.2}%"),
        "MemUsage": format!("{} / {}", binary_size(now.memory), binary_size(now.limit)),
        "MemPerc": format!("{memory:.2}%"),
        "BlockIO": format!("{} / {}", decimal_size(now.read), decimal_size(now.written)),
        "PIDs": now.pids,
    })
}

async fn measure(client: &Client) -> Result<Vec<Metric>> {
    let request = MetricsRequest { filters: Vec::new() };
    Ok(client.tasks().metrics(request).await.call("measure the containers")?.metrics)
}

/// Reads either generation of cgroup metrics. Inactive file pages do not count, as with Docker.
fn usage(metric: &Metric, machine: u64) -> Option<Usage> {
    let data = metric.data.as_ref()?;
    let limit = |limit: u64| if limit == 0 || limit > machine { machine } else { limit };
    if let Ok(Some(metrics)) = davit_proto::any::unpack::<v2::Metrics>(data) {
        let memory = metrics.memory.unwrap_or_default();
        let io = metrics.io.unwrap_or_default().usage;
        return Some(Usage {
            cpu: metrics.cpu.map_or(0, |cpu| cpu.usage_usec.saturating_mul(1000)),
            memory: memory.usage.saturating_sub(memory.inactive_file),
            limit: limit(memory.usage_limit),
            read: io.iter().map(|device| device.rbytes).sum(),
            written: io.iter().map(|device| device.wbytes).sum(),
            pids: metrics.pids.map_or(0, |pids| pids.current),
        });
    }
    let metrics = davit_proto::any::unpack::<v1::Metrics>(data).ok()??;
    let memory = metrics.memory.unwrap_or_default();
    let entry = memory.usage.unwrap_or_default();
    let io = metrics.blkio.unwrap_or_default().io_service_bytes_recursive;
    let bytes =
        |op: &str| io.iter().filter(|entry| entry.op.eq_ignore_ascii_case(op)).map(|entry| entry.value).sum();
    Some(Usage {
        cpu: metrics.cpu.and_then(|cpu| cpu.usage).map_or(0, |usage| usage.total),
        memory: entry.usage.saturating_sub(memory.total_inactive_file),
        limit: limit(entry.limit),
        read: bytes("read"),
        written: bytes("write"),
        pids: metrics.pids.map_or(0, |pids| pids.current),
    })
}

fn machine_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or("");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_are_read() {
        let two = v2::Metrics {
            cpu: Some(v2::CpuStat { usage_usec: 5, ..Default::default() }),
            memory: Some(v2::MemoryStat {
                usage: 100,
                inactive_file: 30,
                usage_limit: 50,
                ..Default::default()
            }),
            pids: Some(v2::PidsStat { current: 2, limit: 0 }),
            io: Some(v2::IoStat {
                usage: vec![v2::IoEntry { rbytes: 7, wbytes: 8, ..Default::default() }; 2],
                psi: None,
            }),
            ..Default::default()
        };
        let metric = Metric { data: Some(davit_proto::any::pack(&two)), ..Default::default() };
        assert_eq!(
            usage(&metric, 1000),
            Some(Usage { cpu: 5000, memory: 70, limit: 50, read: 14, written: 16, pids: 2 })
        );
        let one = v1::Metrics {
            memory: Some(v1::MemoryStat {
                usage: Some(v1::MemoryEntry { usage: 10, limit: u64::MAX, ..Default::default() }),
                ..Default::default()
            }),
            blkio: Some(v1::BlkIoStat {
                io_service_bytes_recursive: vec![
                    v1::BlkIoEntry { op: "Read".to_owned(), value: 3, ..Default::default() },
                    v1::BlkIoEntry { op: "Total".to_owned(), value: 3, ..Default::default() },
                ],
                ..Default::default()
            }),
            ..Default::default()
        };
        let metric = Metric { data: Some(davit_proto::any::pack(&one)), ..Default::default() };
        assert_eq!(
            usage(&metric, 1000),
            Some(Usage { memory: 10, limit: 1000, read: 3, ..Usage::default() })
        );
        assert_eq!(usage(&Metric::default(), 1000), None);
    }
}
