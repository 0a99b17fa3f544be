//! `davit stats`: what containers use, once.

use std::io::Write;
use std::time::{Duration, Instant};

use davit_proto::containerd::services::tasks::v1::MetricsRequest;
use davit_proto::containerd::types::Metric;
use davit_proto::io::containerd::cgroups::{v1, v2};

use crate::client::Client;
use crate::container;
use crate::error::{CallContext, Error, Result};
use crate::format::{binary_size, short_id};
use crate::table::Table;

/// The time between the two measurements that CPU usage is the difference of.
const INTERVAL: Duration = Duration::from_millis(500);

/// Options of `davit stats`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measure once, which is all that is there yet
    #[arg(long)]
    no_stream: bool,
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
    /// Processes and threads.
    pids: u64,
}

/// `davit stats`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let mut containers = Vec::new();
    for given in &options.containers {
        containers.push(container::find(client, given).await?);
    }
    if containers.is_empty() {
        containers = container::list(client, Vec::new()).await?;
    }
    let machine = machine_memory();
    let before = measure(client).await?;
    let start = Instant::now();
    tokio::time::sleep(INTERVAL).await;
    let after = measure(client).await?;
    let elapsed = start.elapsed().as_nanos().max(1) as f64;
    let mut table = Table::new(&["CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "PIDS"]);
    for container in &containers {
        let find = |metrics: &[Metric]| {
            metrics.iter().find(|m| m.id == container.id).and_then(|m| usage(m, machine))
        };
        let Some(now) = find(&after) else { continue };
        let then = find(&before).unwrap_or(now);
        let cpu = now.cpu.saturating_sub(then.cpu) as f64 / elapsed * 100.0;
        let memory = if now.limit == 0 { 0.0 } else { now.memory as f64 / now.limit as f64 * 100.0 };
        table.row(vec![
            short_id(&container.id).to_owned(),
            container::name(container),
            format!("{cpu:.2}%"),
            format!("{} / {}", binary_size(now.memory), binary_size(now.limit)),
            format!("{memory:.2}%"),
            now.pids.to_string(),
        ]);
    }
    table.write(out).map_err(Error::Output)
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
        return Some(Usage {
            cpu: metrics.cpu.map_or(0, |cpu| cpu.usage_usec.saturating_mul(1000)),
            memory: memory.usage.saturating_sub(memory.inactive_file),
            limit: limit(memory.usage_limit),
            pids: metrics.pids.map_or(0, |pids| pids.current),
        });
    }
    let metrics = davit_proto::any::unpack::<v1::Metrics>(data).ok()??;
    let memory = metrics.memory.unwrap_or_default();
    let entry = memory.usage.unwrap_or_default();
    Some(Usage {
        cpu: metrics.cpu.and_then(|cpu| cpu.usage).map_or(0, |usage| usage.total),
        memory: entry.usage.saturating_sub(memory.total_inactive_file),
        limit: limit(entry.limit),
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
            ..Default::default()
        };
        let metric = Metric { data: Some(davit_proto::any::pack(&two)), ..Default::default() };
        assert_eq!(usage(&metric, 1000), Some(Usage { cpu: 5000, memory: 70, limit: 50, pids: 2 }));
        let one = v1::Metrics {
            memory: Some(v1::MemoryStat {
                usage: Some(v1::MemoryEntry { usage: 10, limit: u64::MAX, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let metric = Metric { data: Some(davit_proto::any::pack(&one)), ..Default::default() };
        assert_eq!(usage(&metric, 1000), Some(Usage { cpu: 0, memory: 10, limit: 1000, pids: 0 }));
        assert_eq!(usage(&Metric::default(), 1000), None);
    }
}
