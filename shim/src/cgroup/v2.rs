//! Statistics of the unified hierarchy: `io.containerd.cgroups.v2.Metrics`.

use std::path::Path;

use davit_proto::io::containerd::cgroups::v2::{
    CpuStat, HugeTlbStat, IoEntry, IoStat, MemoryEvents, MemoryStat, Metrics, PidsStat, PsiData, PsiStats,
    RdmaEntry, RdmaStat,
};

use super::{huge_page_sizes, number, pairs};

/// Reads what the enabled controllers tell; the part of one that is not enabled is left out.
pub(super) fn metrics(folder: &Path) -> Metrics {
    Metrics {
        pids: number(folder, "pids.current")
            .map(|current| PidsStat { current, limit: number(folder, "pids.max").unwrap_or(u64::MAX) }),
        cpu: cpu(folder),
        memory: memory(folder),
        rdma: rdma(folder),
        io: io(folder),
        hugetlb: huge_pages(folder),
        memory_events: memory_events(folder),
        network: Vec::new(),
    }
}

fn cpu(folder: &Path) -> Option<CpuStat> {
    let mut stat = CpuStat::default();
    let found = pairs(folder, "cpu.stat", |key, value| match key {
        "usage_usec" => stat.usage_usec = value,
        "user_usec" => stat.user_usec = value,
        "system_usec" => stat.system_usec = value,
        "nr_periods" => stat.nr_periods = value,
        "nr_throttled" => stat.nr_throttled = value,
        "throttled_usec" => stat.throttled_usec = value,
        "nr_bursts" => stat.nr_bursts = value,
        "burst_usec" => stat.burst_usec = value,
        _ => {}
    });
    stat.psi = pressure(folder, "cpu.pressure");
    found.then_some(stat)
}

fn memory(folder: &Path) -> Option<MemoryStat> {
    let mut stat = MemoryStat::default();
    let found = pairs(folder, "memory.stat", |key, value| {
        let field = match key {
            "anon" => &mut stat.anon,
            "file" => &mut stat.file,
            "kernel_stack" => &mut stat.kernel_stack,
            "slab" => &mut stat.slab,
            "sock" => &mut stat.sock,
            "shmem" => &mut stat.shmem,
            "file_mapped" => &mut stat.file_mapped,
            "file_dirty" => &mut stat.file_dirty,
            "file_writeback" => &mut stat.file_writeback,
            "anon_thp" => &mut stat.anon_thp,
            "inactive_anon" => &mut stat.inactive_anon,
            "active_anon" => &mut stat.active_anon,
            "inactive_file" => &mut stat.inactive_file,
            "active_file" => &mut stat.active_file,
            "unevictable" => &mut stat.unevictable,
            "slab_reclaimable" => &mut stat.slab_reclaimable,
            "slab_unreclaimable" => &mut stat.slab_unreclaimable,
            "pgfault" => &mut stat.pgfault,
            "pgmajfault" => &mut stat.pgmajfault,
            // Split into anonymous and file pages since Linux 5.9.
            "workingset_refault" | "workingset_refault_anon" | "workingset_refault_file" => {
                stat.workingset_refault += value;
                return;
            }
            "workingset_activate" | "workingset_activate_anon" | "workingset_activate_file" => {
                stat.workingset_activate += value;
                return;
            }
            "workingset_nodereclaim" => &mut stat.workingset_nodereclaim,
            "pgrefill" => &mut stat.pgrefill,
            "pgscan" => &mut stat.pgscan,
            "pgsteal" => &mut stat.pgsteal,
            "pgactivate" => &mut stat.pgactivate,
            "pgdeactivate" => &mut stat.pgdeactivate,
            "pglazyfree" => &mut stat.pglazyfree,
            "pglazyfreed" => &mut stat.pglazyfreed,
            "thp_fault_alloc" => &mut stat.thp_fault_alloc,
            "thp_collapse_alloc" => &mut stat.thp_collapse_alloc,
            _ => return,
        };
        *field = value;
    });
    if !found {
        return None;
    }
    let file = |name: &str| number(folder, name).unwrap_or(0);
    stat.usage = file("memory.current");
    stat.usage_limit = file("memory.max");
    stat.max_usage = file("memory.peak");
    stat.swap_usage = file("memory.swap.current");
    stat.swap_limit = file("memory.swap.max");
    stat.swap_max_usage = file("memory.swap.peak");
    stat.psi = pressure(folder, "memory.pressure");
    Some(stat)
}

fn memory_events(folder: &Path) -> Option<MemoryEvents> {
    let mut events = MemoryEvents::default();
    pairs(folder, "memory.events", |key, value| match key {
        "low" => events.low = value,
        "high" => events.high = value,
        "max" => events.max = value,
        "oom" => events.oom = value,
        "oom_kill" => events.oom_kill = value,
        "oom_group_kill" => events.oom_group_kill = value,
        _ => {}
    })
    .then_some(events)
}

/// Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn pressure(folder: &Path, file: &str) -> Option<PsiStats> {
    let text = std::fs::read_to_string(folder.join(file)).ok()?;
    let mut stats = PsiStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next()?;
        let mut data = PsiData::default();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = Some(data),
            "full" => stats.full = Some(data),
            _ => {}
        }
    }
    Some(stats)
}

/// Lines `major:minor rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn io(folder: &Path) -> Option<IoStat> {
    let text = std::fs::read_to_string(folder.join("io.stat")).ok()?;
    let usage = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry =
            IoEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoEntry::default() };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    });
    Some(IoStat { usage: usage.collect(), psi: pressure(folder, "io.pressure") })
}

/// Lines `device hca_handle=2 hca_object=max`.
fn rdma(folder: &Path) -> Option<RdmaStat> {
    let entries = |file: &str| -> Option<Vec<RdmaEntry>> {
        let text = std::fs::read_to_string(folder.join(file)).ok()?;
        let entries = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let mut entry = RdmaEntry { device: words.next()?.to_owned(), ..RdmaEntry::default() };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = if value == "max" { u32::MAX } else { value.parse().unwrap_or(0) };
                match key {
                    "hca_handle" => entry.hca_handles = value,
                    "hca_object" => entry.hca_objects = value,
                    _ => {}
                }
            }
            Some(entry)
        });
        Some(entries.collect())
    };
    Some(RdmaStat { current: entries("rdma.current")?, limit: entries("rdma.max").unwrap_or_default() })
}

fn huge_pages(folder: &Path) -> Vec<HugeTlbStat> {
    let file = |size: &str, name: &str| number(folder, &format!("hugetlb.{size}.{name}")).unwrap_or(0);
    huge_page_sizes(folder, ".current")
        .into_iter()
        .map(|size| {
            let mut failcnt = 0;
            pairs(folder, &format!("hugetlb.{size}.events"), |key, value| {
                if key == "max" {
                    failcnt = value;
                }
            });
            HugeTlbStat { current: file(&size, "current"), max: file(&size, "max"), failcnt, pagesize: size }
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
            ("cpu.stat", "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_bursts 1\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
            ),
            ("memory.stat", "anon 5\nworkingset_refault_anon 1\nworkingset_refault_file 2\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.events", "low 0\noom_kill 2\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 \n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("hugetlb.2MB.events", "max 9\n"),
        ] {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        let metrics = metrics(folder.path());
        assert_eq!(metrics.pids, Some(PidsStat { current: 3, limit: u64::MAX }));
        let cpu = metrics.cpu.unwrap();
        assert_eq!((cpu.usage_usec, cpu.nr_bursts), (10, 1));
        let pressure = cpu.psi.unwrap();
        assert_eq!((pressure.some.unwrap().avg10, pressure.some.unwrap().total), (1.5, 77));
        let memory = metrics.memory.unwrap();
        assert_eq!((memory.anon, memory.workingset_refault), (5, 3));
        assert_eq!((memory.usage, memory.usage_limit, memory.swap_limit), (4096, u64::MAX, 0));
        assert_eq!(metrics.memory_events.unwrap().oom_kill, 2);
        let io = metrics.io.unwrap().usage;
        assert_eq!((io.len(), io[0].wios, io[1].major), (2, 4, 8));
        assert_eq!(metrics.hugetlb.len(), 1);
        assert_eq!((metrics.hugetlb[0].failcnt, metrics.hugetlb[0].max), (9, u64::MAX));
        assert_eq!(metrics.rdma, None);
    }
}
