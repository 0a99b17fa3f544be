//! The metrics of the daemon and of its containers, for Prometheus: `GET /v1/metrics` on a TCP address of the
//! configuration, as containerd has it, in the text format 0.0.4.
//!
//! Who may connect may read: names of containers and what they use. So there is no such address by default, and it should be
//! one of the loopback. Nothing but this one path is answered, and no connection is kept.
//!
//! The names are containerd's (`core/metrics`) where it has such a metric: `containerd_build_info_total`, and
//! `container_*` with the labels `container_id` and `namespace`; `process_*` are those of every Prometheus client.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use davit_model::Any;
use davit_proto::io::containerd::cgroups::{v1, v2};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::metadata::Metadata;
use crate::runtime::Tasks;

const PATH: &str = "/v1/metrics";

/// The most requests at once; more wait in the kernel's queue.
const REQUESTS: usize = 8;

/// The most bytes of a request.
const LONGEST_REQUEST: usize = 8 << 10;

/// A request and its answer take no longer.
const LIMIT: Duration = Duration::from_secs(30);

/// After an accept that failed, for want of descriptors mostly.
const PAUSE: Duration = Duration::from_millis(100);

/// What the metrics are of.
#[derive(Clone)]
pub struct Source {
    /// The namespaces.
    pub metadata: Metadata,
    /// What runs.
    pub tasks: Tasks,
    /// The version that the daemon tells.
    pub version: String,
    /// When the daemon started.
    pub started: SystemTime,
}

/// Answers requests until `stop`.
pub async fn serve(listener: TcpListener, source: Source, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(REQUESTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        // An accept that is dropped has accepted nothing.
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let source = source.clone();
                tokio::spawn(async move {
                    let _place = place;
                    let answered = tokio::time::timeout(LIMIT, answer(stream, &source)).await;
                    if let Ok(Err(error)) = answered {
                        tracing::debug!(%error, "a request for metrics broke off");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a request for metrics");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, source: &Source) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut buffer).await?;
        if length == 0 || request.len() + length > LONGEST_REQUEST {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..length]);
    }
    let (status, body) = match target(&request) {
        Some(("GET", PATH)) => ("200 OK", text(source).await),
        Some((_, PATH)) => ("405 Method Not Allowed", String::new()),
        Some(_) => ("404 Not Found", String::new()),
        None => ("400 Bad Request", String::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// The method and the path of a request, without its query.
fn target(request: &[u8]) -> Option<(&str, &str)> {
    let line = request.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let path = target.split('?').next()?;
    (version.starts_with("HTTP/1.") && words.next().is_none()).then_some((method, path))
}

async fn text(source: &Source) -> String {
    let mut page = Page::default();
    let (version, revision) = (&source.version, env!("CARGO_PKG_VERSION"));
    let labels = [("revision", revision), ("version", version.as_str())];
    page.add("containerd_build_info_total", "counter", "containerd build information", &labels, 1.0);
    process(&mut page, source.started);
    match source.metadata.namespaces().list() {
        Ok(namespaces) => {
            for namespace in namespaces {
                for metric in source.tasks.metrics(&namespace.name, |_| true).await {
                    container(&mut page, &namespace.name, &metric.id, metric.data.as_ref());
                }
            }
        }
        Err(error) => tracing::warn!(%error, "cannot list namespaces for metrics"),
    }
    page.finish()
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
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"));
    if let Some(kilobytes) = resident.and_then(|number| number.trim().parse::<f64>().ok()) {
        let help = "Resident memory size in bytes.";
        page.add("process_resident_memory_bytes", "gauge", help, &[], kilobytes * 1024.0);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        let help = "Number of open file descriptors.";
        page.add("process_open_fds", "gauge", help, &[], open.count() as f64);
    }
}

/// The counters of one container. Of what the shim does not say there is no line.
fn container(page: &mut Page, namespace: &str, id: &str, data: Option<&Any>) {
    let Some(data) = data else { return };
    let labels = [("container_id", id), ("namespace", namespace)];
    let mut add = |name: &str, help: &str, value: u64| {
        page.add(&format!("container_{name}"), "gauge", help, &labels, value as f64);
    };
    match data.type_url.rsplit('/').next() {
        Some("io.containerd.cgroups.v1.Metrics") => {
            let Ok(metrics) = v1::Metrics::decode(data.value.as_slice()) else { return };
            if let Some(usage) = metrics.cpu.and_then(|cpu| cpu.usage) {
                add("cpu_total_nanoseconds", "The total cpu time", usage.total);
                add("cpu_kernel_nanoseconds", "The total kernel cpu time", usage.kernel);
                add("cpu_user_nanoseconds", "The total user cpu time", usage.user);
            }
            if let Some(memory) = metrics.memory {
                add("memory_cache_bytes", "The cache amount used", memory.cache);
                add("memory_rss_bytes", "The rss amount used", memory.rss);
                if let Some(usage) = memory.usage {
                    add("memory_usage_usage_bytes", "The usage of memory", usage.usage);
                    add("memory_usage_limit_bytes", "The limit of memory", usage.limit);
                    add("memory_usage_max_bytes", "The most memory used", usage.max);
                }
            }
            if let Some(pids) = metrics.pids {
                add("pids_current", "The current number of pids", pids.current);
                add("pids_limit", "The limit to the number of pids allowed", pids.limit);
            }
        }
        Some("io.containerd.cgroups.v2.Metrics") => {
            let Ok(metrics) = v2::Metrics::decode(data.value.as_slice()) else { return };
            if let Some(cpu) = metrics.cpu {
                add("cpu_usage_usec_microseconds", "Total cpu usage (cgroup v2)", cpu.usage_usec);
                add(
                    "cpu_user_usec_microseconds",
                    "Current cpu usage in user space (cgroup v2)",
                    cpu.user_usec,
                );
                add(
                    "cpu_system_usec_microseconds",
                    "Current cpu usage in kernel space (cgroup v2)",
                    cpu.system_usec,
                );
                add("cpu_nr_periods_total", "Current cpu number of periods (cgroup v2)", cpu.nr_periods);
                add(
                    "cpu_nr_throttled_total",
                    "Total number of throttled periods (cgroup v2)",
                    cpu.nr_throttled,
                );
                add(
                    "cpu_throttled_usec_microseconds",
                    "Time spent throttled (cgroup v2)",
                    cpu.throttled_usec,
                );
            }
            if let Some(memory) = metrics.memory {
                add("memory_usage_bytes", "Current memory usage (cgroup v2)", memory.usage);
                add("memory_usage_limit_bytes", "Memory usage limit (cgroup v2)", memory.usage_limit);
                add("memory_swap_usage_bytes", "Current swap usage (cgroup v2)", memory.swap_usage);
                add("memory_swap_limit_bytes", "Current swap usage limit (cgroup v2)", memory.swap_limit);
            }
            if let Some(pids) = metrics.pids {
                add("pids_current", "The current number of pids (cgroup v2)", pids.current);
                add("pids_limit", "The limit to the number of pids allowed (cgroup v2)", pids.limit);
            }
        }
        _ => {}
    }
}

/// A page that is being written: the samples of one metric must stand together, below one head.
#[derive(Default)]
struct Page {
    metrics: std::collections::BTreeMap<String, String>,
}

impl Page {
    fn add(&mut self, name: &str, kind: &str, help: &str, labels: &[(&str, &str)], value: f64) {
        let head = || format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        let samples = self.metrics.entry(name.to_owned()).or_insert_with(head);
        samples.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            samples.push(if at == 0 { '{' } else { ',' });
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            // Writing to a text cannot fail.
            let _ = write!(samples, "{label}=\"{text}\"");
        }
        let _ = writeln!(samples, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn finish(self) -> String {
        self.metrics.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_metric_stand_together() {
        let mut page = Page::default();
        page.add("b", "gauge", "B.", &[("x", "1\"\\\n")], 1.0);
        page.add("a", "counter", "A.", &[], 0.5);
        page.add("b", "gauge", "B.", &[("x", "2"), ("y", "3")], 18_446_744_073_709_551_615_u64 as f64);
        let expected = "# HELP a A.\n# TYPE a counter\na 0.5\n# HELP b B.\n# TYPE b gauge\n\
                        b{x=\"1\\\"\\\\\\n\"} 1\nb{x=\"2\",y=\"3\"} 18446744073709552000\n";
        assert_eq!(page.finish(), expected);
    }

    #[test]
    fn only_well_formed_requests_have_a_target() {
        assert_eq!(target(b"GET /v1/metrics?x HTTP/1.1\r\n\r\n"), Some(("GET", PATH)));
        for bad in [
            &b""[..],
            b"GET\r\n\r\n",
            b"GET / x HTTP/1.1\r\n\r\n",
            b"GET / HTTP/2\r\n\r\n",
            b"\xff / HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(target(bad), None);
        }
    }
}
