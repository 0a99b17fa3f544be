//! The metrics of the daemon and of its containers, for Prometheus: `GET /v1/metrics` on a TCP address of the
//! configuration, as containerd has it, in the text format 0.0.4.
//!
//! Who may connect may read: names of containers and what they use. So there is no such address by default, and it should be
//! one of the loopback. Nothing but this one path is answered, and no connection is kept.
//!
//! The names are containerd's (`core/metrics`) where it has such a metric: `containerd_build_info_total`,
//! `grpc_server_*`, and `container_*` with the labels `container_id`, `namespace` and `runtime`; `process_*` are those of
//! every Prometheus client.

mod containers;
mod page;

use std::time::SystemTime;

use nix::sys::resource::{Resource, getrlimit};

use crate::calls::Calls;
use crate::metadata::{Metadata, Scope};
use crate::pages::{Answer, Request, Site};
use crate::runtime::{Metric, Tasks};
use containers::Container;
pub use page::Page;

const PATH: &str = "/v1/metrics";

/// The type of the page.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the metrics are of.
#[derive(Clone)]
pub struct Source {
    /// The namespaces.
    pub metadata: Metadata,
    /// What runs.
    pub tasks: Tasks,
    /// What clients call.
    pub calls: Calls,
    /// The version that the daemon tells.
    pub version: String,
    /// When the daemon started.
    pub started: SystemTime,
    /// Tell how long calls took.
    pub grpc_histogram: bool,
    /// Tell what containers use.
    pub containers: bool,
}

impl Site for Source {
    async fn answer(&self, request: Request<'_>) -> Answer {
        match (request.method, request.path) {
            ("GET", PATH) => Answer::page(FORMAT, text(self).await),
            (_, PATH) => Answer::error("405 Method Not Allowed"),
            _ => Answer::error("404 Not Found"),
        }
    }
}

async fn text(source: &Source) -> String {
    let mut page = Page::default();
    let (version, revision) = (&source.version, env!("CARGO_PKG_VERSION"));
    let labels = [("revision", revision), ("version", version.as_str())];
    page.add("containerd_build_info_total", "counter", "containerd build information", &labels, 1.0);
    process(&mut page, source.started);
    source.calls.add_to(&mut page, source.grpc_histogram);
    source.metadata.add_collections(&mut page);
    if !source.containers {
        return page.finish();
    }
    match source.metadata.namespaces().list() {
        Ok(namespaces) => {
            // All at once: each may have a shim that does not answer, and who asks does not wait for the sum.
            let told = namespaces.iter().map(|namespace| source.tasks.metrics(&namespace.name, |_| true));
            let told = futures::future::join_all(told).await;
            for (namespace, metrics) in namespaces.iter().zip(told) {
                of_namespace(source, &mut page, &namespace.name, metrics);
            }
        }
        Err(error) => tracing::warn!(%error, "cannot list namespaces for metrics"),
    }
    page.finish()
}

fn of_namespace(source: &Source, page: &mut Page, namespace: &str, metrics: Vec<Metric>) {
    let records = Scope::new(namespace, None).map(|scope| source.metadata.containers(&scope));
    for metric in metrics {
        let record = records.as_ref().ok().and_then(|records| records.get(&metric.id).ok());
        let runtime = record.map(|record| record.runtime.name).unwrap_or_default();
        if let Some(data) = &metric.data {
            Container { page, id: &metric.id, namespace, runtime: &runtime }.add(data);
        }
    }
}

/// What every client library of Prometheus tells of its process. What cannot be read is left out.
fn process(page: &mut Page, started: SystemTime) {
    if let Ok(since) = started.duration_since(SystemTime::UNIX_EPOCH) {
        let help = "Start time of the process since unix epoch in seconds.";
        page.add("process_start_time_seconds", "gauge", help, &[], since.as_secs_f64());
    }
    if let Ok(usage) = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF) {
        let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        let total = seconds(usage.user_time()) + seconds(usage.system_time());
        let help = "Total user and system CPU time spent in seconds.";
        page.add("process_cpu_seconds_total", "counter", help, &[], total);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (key, name, help) in [
        ("VmRSS:", "process_resident_memory_bytes", "Resident memory size in bytes."),
        ("VmSize:", "process_virtual_memory_bytes", "Virtual memory size in bytes."),
    ] {
        let size = status.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB"));
        if let Some(kilobytes) = size.and_then(|number| number.trim().parse::<f64>().ok()) {
            page.add(name, "gauge", help, &[], kilobytes * 1024.0);
        }
    }
    if let Ok((files, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        page.add("process_max_fds", "gauge", "Maximum number of open file descriptors.", &[], files as f64);
    }
    if let Ok((memory, _)) = getrlimit(Resource::RLIMIT_AS) {
        let help = "Maximum amount of virtual memory available in bytes.";
        page.add("process_virtual_memory_max_bytes", "gauge", help, &[], memory as f64);
    }
    let traffic = std::fs::read_to_string("/proc/self/net/netstat").unwrap_or_default();
    for (key, name, help) in [
        (
            "InOctets",
            "process_network_receive_bytes_total",
            "Number of bytes received by the process over the network.",
        ),
        (
            "OutOctets",
            "process_network_transmit_bytes_total",
            "Number of bytes sent by the process over the network.",
        ),
    ] {
        if let Some(bytes) = octets(&traffic, key) {
            page.add(name, "counter", help, &[], bytes);
        }
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        let help = "Number of open file descriptors.";
        page.add("process_open_fds", "gauge", help, &[], open.count() as f64);
    }
}

/// A counter of IP in `/proc/net/netstat`: a line of names, then one of values. It counts for the network namespace, whatever
/// the name of the metric says.
fn octets(netstat: &str, key: &str) -> Option<f64> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("IpExt:"));
    let (names, values) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
    names.zip(values).find(|(name, _)| *name == key)?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_ip_are_found_by_name() {
        let netstat = "TcpExt: A InOctets\nTcpExt: 1 2\nIpExt: X InOctets OutOctets\nIpExt: 3 4 5\n";
        assert_eq!((octets(netstat, "InOctets"), octets(netstat, "OutOctets")), (Some(4.0), Some(5.0)));
        assert_eq!((octets(netstat, "Other"), octets("", "InOctets")), (None, None));
    }
}
