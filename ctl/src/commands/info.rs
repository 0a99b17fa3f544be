//! `davit info`: what the daemon and this machine are.

use std::io::Write;

use davit_oci::spec::Host;
use davit_proto::containerd::services::introspection::v1::PluginsRequest;

use crate::client::Client;
use crate::container::{self, State};
use crate::error::{CallContext, Result};
use crate::format::{binary_size, line};
use crate::image;

/// `davit info`.
pub(crate) async fn run(client: &Client, address: &str, out: &mut dyn Write) -> Result<()> {
    let action = "ask for information";
    let version = client.version().version(()).await.call(action)?;
    let server = client.introspection().server(()).await.call(action)?;
    let plugins =
        client.introspection().plugins(PluginsRequest { filters: Vec::new() }).await.call(action)?.plugins;
    let containers = container::list(client, Vec::new()).await?;
    let tasks = container::tasks(client).await?;
    let mut counts = [0_usize; 3];
    for container in &containers {
        let task = tasks.iter().find(|task| task.id == container.id);
        match container::state_of(container, task) {
            State::Running { .. } => counts[0] += 1,
            State::Paused { .. } => counts[1] += 1,
            State::Created | State::Exited { .. } => counts[2] += 1,
        }
    }
    let of_type = |kind: &str| {
        let usable = plugins.iter().filter(|plugin| plugin.r#type == kind && plugin.init_err.is_none());
        usable.map(|plugin| plugin.id.as_str()).collect::<Vec<_>>().join(", ")
    };
    let host = Host::detect();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or("");
    let kilobytes: u64 = memory.trim().trim_end_matches(" kB").parse().unwrap_or(0);
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let rows = [
        ("Client Version", env!("CARGO_PKG_VERSION").to_owned()),
        ("Server Version", version.version),
        ("Server UUID", server.uuid),
        ("Server PID", server.pid.to_string()),
        ("Address", address.to_owned()),
        ("Namespace", client.namespace().to_owned()),
        ("Containers", containers.len().to_string()),
        (" Running", counts[0].to_string()),
        (" Paused", counts[1].to_string()),
        (" Stopped", counts[2].to_string()),
        ("Images", image::list(client).await?.len().to_string()),
        ("Snapshotters", of_type("io.containerd.snapshotter.v1")),
        ("Cgroup Version", if host.unified_cgroups { "2" } else { "1" }.to_owned()),
        ("Kernel Version", kernel.trim().to_owned()),
        ("Architecture", host.architecture),
        ("CPUs", cpus.to_string()),
        ("Total Memory", binary_size(kilobytes * 1024)),
    ];
    for (name, value) in rows {
        line(out, format!("{name}: {value}").trim_end())?;
    }
    for warning in server.deprecations {
        line(out, format!("WARNING: {}", warning.message))?;
    }
    Ok(())
}
