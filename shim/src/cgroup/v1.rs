//! Statistics of the first version of cgroups: `io.containerd.cgroups.v1.Metrics`.

use std::path::{Path, PathBuf};

use davit_proto::io::containerd::cgroups::v1::{
    BlkIoEntry, BlkIoStat, CpuStat, CpuUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat,
    Metrics, PidsStat, Throttle,
};

use super::{huge_page_sizes, number, pairs};

/// Nanoseconds of a tick: `cpuacct.stat` counts in `USER_HZ`, which is 100 on every architecture of Linux
/// today.
const TICK: u64 = 10_000_000;

/// Reads what the controllers tell. One that is missing leaves its part out, as containerd does it.
pub(super) fn metrics(folders: &[(String, PathBuf)]) -> Metrics {
    let mut metrics = Metrics::default();
    for (controller, folder) in folders {
        match controller.as_str() {
            "pids" => metrics.pids = pids(folder),
            "cpuacct" => metrics.cpu.get_or_insert_default().usage = usage(folder),
            "cpu" => metrics.cpu.get_or_insert_default().throttling = throttling(folder),
            "memory" => {
                metrics.memory = memory(folder);
                metrics.memory_oom_control = oom_control(folder);
            }
            "blkio" => metrics.blkio = Some(block_devices(folder)),
            "hugetlb" => metrics.hugetlb = huge_pages(folder),
            _ => {}
        }
    }
    if metrics.cpu == Some(CpuStat::default()) {
        metrics.cpu = None;
    }
    metrics
}

fn pids(folder: &Path) -> Option<PidsStat> {
    let current = number(folder, "pids.current")?;
    let limit = number(folder, "pids.max").filter(|limit| *limit != u64::MAX).unwrap_or(0);
    Some(PidsStat { current, limit })
}

fn usage(folder: &Path) -> Option<CpuUsage> {
    let mut usage = CpuUsage { total: number(folder, "cpuacct.usage")?, ..CpuUsage::default() };
    pairs(folder, "cpuacct.stat", |key, ticks| match key {
        "user" => usage.user = ticks * TICK,
        "system" => usage.kernel = ticks * TICK,
        _ => {}
    });
    let per_cpu = std::fs::read_to_string(folder.join("cpuacct.usage_percpu")).unwrap_or_default();
    usage.per_cpu = per_cpu.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    Some(usage)
}

fn throttling(folder: &Path) -> Option<Throttle> {
    let mut throttle = Throttle::default();
    pairs(folder, "cpu.stat", |key, value| match key {
        "nr_periods" => throttle.periods = value,
        "nr_throttled" => throttle.throttled_periods = value,
        "throttled_time" => throttle.throttled_time = value,
        _ => {}
    })
    .then_some(throttle)
}

fn memory(folder: &Path) -> Option<MemoryStat> {
    let mut stat = MemoryStat::default();
    let found = pairs(folder, "memory.stat", |key, value| {
        let (key, total) = key.strip_prefix("total_").map_or((key, false), |key| (key, true));
        let field = match (key, total) {
            ("cache", false) => &mut stat.cache,
            ("rss", false) => &mut stat.rss,
            ("rss_huge", false) => &mut stat.rss_huge,
            ("mapped_file", false) => &mut stat.mapped_file,
            ("dirty", false) => &mut stat.dirty,
            ("writeback", false) => &mut stat.writeback,
            ("pgpgin", false) => &mut stat.pg_pg_in,
            ("pgpgout", false) => &mut stat.pg_pg_out,
            ("pgfault", false) => &mut stat.pg_fault,
            ("pgmajfault", false) => &mut stat.pg_maj_fault,
            ("inactive_anon", false) => &mut stat.inactive_anon,
            ("active_anon", false) => &mut stat.active_anon,
            ("inactive_file", false) => &mut stat.inactive_file,
            ("active_file", false) => &mut stat.active_file,
            ("unevictable", false) => &mut stat.unevictable,
            ("hierarchical_memory_limit", false) => &mut stat.hierarchical_memory_limit,
            ("hierarchical_memsw_limit", false) => &mut stat.hierarchical_swap_limit,
            ("cache", true) => &mut stat.total_cache,
            ("rss", true) => &mut stat.total_rss,
            ("rss_huge", true) => &mut stat.total_rss_huge,
            ("mapped_file", true) => &mut stat.total_mapped_file,
            ("dirty", true) => &mut stat.total_dirty,
            ("writeback", true) => &mut stat.total_writeback,
            ("pgpgin", true) => &mut stat.total_pg_pg_in,
            ("pgpgout", true) => &mut stat.total_pg_pg_out,
            ("pgfault", true) => &mut stat.total_pg_fault,
            ("pgmajfault", true) => &mut stat.total_pg_maj_fault,
            ("inactive_anon", true) => &mut stat.total_inactive_anon,
            ("active_anon", true) => &mut stat.total_active_anon,
            ("inactive_file", true) => &mut stat.total_inactive_file,
            ("active_file", true) => &mut stat.total_active_file,
            ("unevictable", true) => &mut stat.total_unevictable,
            _ => return,
        };
        *field = value;
    });
    if !found {
        return None;
    }
    let entry = |name: &str| {
        let file = |suffix: &str| number(folder, &format!("memory.{name}{suffix}"));
        Some(MemoryEntry {
            usage: file("usage_in_bytes")?,
            limit: file("limit_in_bytes").unwrap_or(0),
            max: file("max_usage_in_bytes").unwrap_or(0),
            failcnt: file("failcnt").unwrap_or(0),
        })
    };
    stat.usage = entry("");
    stat.swap = entry("memsw.");
    stat.kernel = entry("kmem.");
    stat.kernel_tcp = entry("kmem.tcp.");
    Some(stat)
}

fn oom_control(folder: &Path) -> Option<MemoryOomControl> {
    let mut control = MemoryOomControl::default();
    pairs(folder, "memory.oom_control", |key, value| match key {
        "oom_kill_disable" => control.oom_kill_disable = value,
        "under_oom" => control.under_oom = value,
        "oom_kill" => control.oom_kill = value,
        _ => {}
    })
    .then_some(control)
}

fn block_devices(folder: &Path) -> BlkIoStat {
    let file = |name: &str| entries(&folder.join(format!("blkio.{name}")));
    // The counters of the throttling policy are there with every scheduler, those of BFQ only with it.
    let first =
        |names: [&str; 2]| names.into_iter().map(file).find(|found| !found.is_empty()).unwrap_or_default();
    BlkIoStat {
        io_service_bytes_recursive: first([
            "throttle.io_service_bytes_recursive",
            "bfq.io_service_bytes_recursive",
        ]),
        io_serviced_recursive: first(["throttle.io_serviced_recursive", "bfq.io_serviced_recursive"]),
        ..BlkIoStat::default()
    }
}

/// Lines `major:minor operation value`; the total at the end has no device.
fn entries(path: &Path) -> Vec<BlkIoEntry> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let (op, value) = (words.next()?, words.next()?);
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            Some(BlkIoEntry {
                op: op.to_owned(),
                device: device_name(major, minor),
                major,
                minor,
                value: value.parse().ok()?,
            })
        })
        .collect()
}

/// The path of a block device, empty if sysfs does not tell it.
fn device_name(major: u64, minor: u64) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok();
    let name = link.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    name.map(|name| format!("/dev/{name}")).unwrap_or_default()
}

fn huge_pages(folder: &Path) -> Vec<HugetlbStat> {
    let file = |size: &str, name: &str| number(folder, &format!("hugetlb.{size}.{name}")).unwrap_or(0);
    huge_page_sizes(folder, ".usage_in_bytes")
        .into_iter()
        .map(|size| HugetlbStat {
            usage: file(&size, "usage_in_bytes"),
            max: file(&size, "max_usage_in_bytes"),
            failcnt: file(&size, "failcnt"),
            pagesize: size,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_a_message() {
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("memory.stat", "cache 1\nrss 2\ntotal_rss 22\nhierarchical_memory_limit 9223372036854771712\n"),
            ("memory.usage_in_bytes", "4096\n"),
            ("memory.limit_in_bytes", "8192\n"),
            ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"),
            ("cpuacct.usage", "12345\n"),
            ("cpuacct.stat", "user 2\nsystem 3\n"),
            ("cpuacct.usage_percpu", "10 20 \n"),
            ("blkio.throttle.io_service_bytes_recursive", "254:0 Read 4096\n254:0 Write 1\nTotal 4097\n"),
        ] {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        let controllers = ["pids", "memory", "cpuacct", "cpu", "blkio"];
        let folders: Vec<_> = controllers.map(|name| (name.to_owned(), folder.path().to_owned())).into();
        let metrics = metrics(&folders);
        assert_eq!(metrics.pids, Some(PidsStat { current: 3, limit: 0 }));
        let memory = metrics.memory.unwrap();
        assert_eq!((memory.cache, memory.rss, memory.total_rss), (1, 2, 22));
        assert_eq!(memory.usage, Some(MemoryEntry { usage: 4096, limit: 8192, max: 0, failcnt: 0 }));
        assert_eq!(metrics.memory_oom_control.unwrap().oom_kill, 7);
        let cpu = metrics.cpu.unwrap();
        let usage = cpu.usage.unwrap();
        assert_eq!((usage.total, usage.user, usage.kernel), (12345, 20_000_000, 30_000_000));
        assert_eq!(usage.per_cpu, [10, 20]);
        assert_eq!(cpu.throttling, None);
        let bytes = metrics.blkio.unwrap().io_service_bytes_recursive;
        assert_eq!(bytes.len(), 2);
        assert_eq!((bytes[0].op.as_str(), bytes[0].major, bytes[0].value), ("Read", 254, 4096));
    }
}
