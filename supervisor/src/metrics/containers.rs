//! What containers use, from what their shims say of their cgroups.
//!
//! The names, the helps and that all of them are gauges are containerd's (`core/metrics/cgroups/{v1,v2}`). Its units are
//! not always what is measured: page faults are no bytes. But dashboards know the names.

use davit_model::Any;
use davit_proto::io::containerd::cgroups::{v1, v2};
use prost::Message;

use super::page::Page;

/// Where the counters of one container go.
pub(super) struct Container<'a> {
    /// The page.
    pub(super) page: &'a mut Page,
    /// The container.
    pub(super) id: &'a str,
    /// Its namespace.
    pub(super) namespace: &'a str,
    /// Its runtime, such as `io.containerd.runc.v2`.
    pub(super) runtime: &'a str,
}

impl Container<'_> {
    /// Adds what a shim said. Of what it does not say there is no line.
    pub(super) fn add(&mut self, data: &Any) {
        match data.type_url.rsplit('/').next() {
            Some("io.containerd.cgroups.v1.Metrics") => {
                if let Ok(metrics) = v1::Metrics::decode(data.value.as_slice()) {
                    self.first(metrics);
                }
            }
            Some("io.containerd.cgroups.v2.Metrics") => {
                if let Ok(metrics) = v2::Metrics::decode(data.value.as_slice()) {
                    self.second(metrics);
                }
            }
            _ => {}
        }
    }

    fn gauge(&mut self, name: &str, help: &str, more: &[(&str, &str)], value: u64) {
        let mut labels =
            vec![("container_id", self.id), ("namespace", self.namespace), ("runtime", self.runtime)];
        labels.extend(more);
        labels.sort();
        self.page.add(&format!("container_{name}"), "gauge", help, &labels, value as f64);
    }

    fn plain<const COUNT: usize>(&mut self, values: [(&str, &str, u64); COUNT]) {
        for (name, help, value) in values {
            self.gauge(name, help, &[], value);
        }
    }

    fn first(&mut self, metrics: v1::Metrics) {
        let v1::Metrics { hugetlb, pids, cpu, memory, blkio, .. } = metrics;
        if let Some(v1::PidsStat { current, limit }) = pids {
            self.plain([
                ("pids_limit", "The limit to the number of pids allowed", limit),
                ("pids_current", "The current number of pids", current),
            ]);
        }
        if let Some(cpu) = cpu {
            self.first_cpu(cpu);
        }
        if let Some(memory) = memory {
            self.first_memory(memory);
        }
        for pages in hugetlb {
            let page = [("page", pages.pagesize.as_str())];
            self.gauge("hugetlb_usage_bytes", "The hugetlb usage", &page, pages.usage);
            self.gauge("hugetlb_failcnt_total", "The hugetlb failcnt", &page, pages.failcnt);
            self.gauge("hugetlb_max_bytes", "The hugetlb maximum usage", &page, pages.max);
        }
        if let Some(blkio) = blkio {
            self.first_blkio(blkio);
        }
    }

    fn first_cpu(&mut self, cpu: v1::CpuStat) {
        if let Some(usage) = cpu.usage {
            self.plain([
                ("cpu_total_nanoseconds", "The total cpu time", usage.total),
                ("cpu_kernel_nanoseconds", "The total kernel cpu time", usage.kernel),
                ("cpu_user_nanoseconds", "The total user cpu time", usage.user),
            ]);
            for (at, nanoseconds) in usage.per_cpu.into_iter().enumerate() {
                let cpu = [("cpu", at.to_string())];
                let cpu = cpu.each_ref().map(|(name, at)| (*name, at.as_str()));
                self.gauge("per_cpu_nanoseconds", "The total cpu time per cpu", &cpu, nanoseconds);
            }
        }
        if let Some(throttling) = cpu.throttling {
            self.plain([
                ("cpu_throttle_periods_total", "The total cpu throttle periods", throttling.periods),
                (
                    "cpu_throttled_periods_total",
                    "The total cpu throttled periods",
                    throttling.throttled_periods,
                ),
                ("cpu_throttled_time_nanoseconds", "The total cpu throttled time", throttling.throttled_time),
            ]);
        }
    }

    fn first_memory(&mut self, memory: v1::MemoryStat) {
        self.plain([
            ("memory_cache_bytes", "The cache amount used", memory.cache),
            ("memory_rss_bytes", "The rss amount used", memory.rss),
            ("memory_rss_huge_bytes", "The rss_huge amount used", memory.rss_huge),
            ("memory_mapped_file_bytes", "The mapped_file amount used", memory.mapped_file),
            ("memory_dirty_bytes", "The dirty amount", memory.dirty),
            ("memory_writeback_bytes", "The writeback amount", memory.writeback),
            ("memory_pgpgin_bytes", "The pgpgin amount", memory.pg_pg_in),
            ("memory_pgpgout_bytes", "The pgpgout amount", memory.pg_pg_out),
            ("memory_pgfault_bytes", "The pgfault amount", memory.pg_fault),
            ("memory_pgmajfault_bytes", "The pgmajfault amount", memory.pg_maj_fault),
            ("memory_inactive_anon_bytes", "The inactive_anon amount", memory.inactive_anon),
            ("memory_active_anon_bytes", "The active_anon amount", memory.active_anon),
            ("memory_inactive_file_bytes", "The inactive_file amount", memory.inactive_file),
            ("memory_active_file_bytes", "The active_file amount", memory.active_file),
            ("memory_unevictable_bytes", "The unevictable amount", memory.unevictable),
            (
                "memory_hierarchical_memory_limit_bytes",
                "The hierarchical_memory_limit amount",
                memory.hierarchical_memory_limit,
            ),
            (
                "memory_hierarchical_memsw_limit_bytes",
                "The hierarchical_memsw_limit amount",
                memory.hierarchical_swap_limit,
            ),
            ("memory_total_cache_bytes", "The total_cache amount used", memory.total_cache),
            ("memory_total_rss_bytes", "The total_rss amount used", memory.total_rss),
            ("memory_total_rss_huge_bytes", "The total_rss_huge amount used", memory.total_rss_huge),
            ("memory_total_mapped_file_bytes", "The total_mapped_file amount used", memory.total_mapped_file),
            ("memory_total_dirty_bytes", "The total_dirty amount", memory.total_dirty),
            ("memory_total_writeback_bytes", "The total_writeback amount", memory.total_writeback),
            ("memory_total_pgpgin_bytes", "The total_pgpgin amount", memory.total_pg_pg_in),
            ("memory_total_pgpgout_bytes", "The total_pgpgout amount", memory.total_pg_pg_out),
            ("memory_total_pgfault_bytes", "The total_pgfault amount", memory.total_pg_fault),
            ("memory_total_pgmajfault_bytes", "The total_pgmajfault amount", memory.total_pg_maj_fault),
            (
                "memory_total_inactive_anon_bytes",
                "The total_inactive_anon amount",
                memory.total_inactive_anon,
            ),
            ("memory_total_active_anon_bytes", "The total_active_anon amount", memory.total_active_anon),
            (
                "memory_total_inactive_file_bytes",
                "The total_inactive_file amount",
                memory.total_inactive_file,
            ),
            ("memory_total_active_file_bytes", "The total_active_file amount", memory.total_active_file),
            ("memory_total_unevictable_bytes", "The total_unevictable amount", memory.total_unevictable),
        ]);
        let entries = [
            ("usage", "memory", memory.usage),
            ("swap", "swap", memory.swap),
            ("kernel", "kernel", memory.kernel),
            ("kerneltcp", "kerneltcp", memory.kernel_tcp),
        ];
        for (name, shown, entry) in entries {
            let Some(v1::MemoryEntry { limit, usage, max, failcnt }) = entry else { continue };
            // The help of the first of these alone is named after the key.
            let failed = if name == "usage" { "usage" } else { shown };
            for (key, help, value) in [
                ("failcnt_total", format!("The {failed} failcnt"), failcnt),
                ("limit_bytes", format!("The {shown} limit"), limit),
                ("max_bytes", format!("The {shown} maximum usage"), max),
                ("usage_bytes", format!("The {shown} usage"), usage),
            ] {
                self.gauge(&format!("memory_{name}_{key}"), &help, &[], value);
            }
        }
    }

    fn first_blkio(&mut self, blkio: v1::BlkIoStat) {
        let v1::BlkIoStat {
            io_service_bytes_recursive,
            io_serviced_recursive,
            io_queued_recursive,
            io_service_time_recursive,
            io_merged_recursive,
            io_time_recursive,
            sectors_recursive,
            // containerd does not tell this one.
            io_wait_time_recursive: _,
        } = blkio;
        for (name, unit, entries) in [
            ("io_merged", "total", io_merged_recursive),
            ("io_queued", "total", io_queued_recursive),
            ("io_service_bytes", "bytes", io_service_bytes_recursive),
            ("io_service_time", "total", io_service_time_recursive),
            ("io_serviced", "total", io_serviced_recursive),
            ("io_time", "total", io_time_recursive),
            ("sectors", "total", sectors_recursive),
        ] {
            let help = format!("The blkio {} recursive", name.replace('_', " "));
            let name = format!("blkio_{name}_recursive_{unit}");
            for v1::BlkIoEntry { op, device, major, minor, value } in entries {
                let (major, minor) = (major.to_string(), minor.to_string());
                let labels = [("op", &op), ("device", &device), ("major", &major), ("minor", &minor)];
                self.gauge(&name, &help, &labels.map(|(name, text)| (name, text.as_str())), value);
            }
        }
    }

    fn second(&mut self, metrics: v2::Metrics) {
        let v2::Metrics { pids, cpu, memory, io, memory_events, .. } = metrics;
        if let Some(v2::PidsStat { current, limit }) = pids {
            self.plain([
                ("pids_limit", "The limit to the number of pids allowed (cgroup v2)", limit),
                ("pids_current", "The current number of pids (cgroup v2)", current),
            ]);
        }
        if let Some(cpu) = cpu {
            self.plain([
                ("cpu_usage_usec_microseconds", "Total cpu usage (cgroup v2)", cpu.usage_usec),
                ("cpu_user_usec_microseconds", "Current cpu usage in user space (cgroup v2)", cpu.user_usec),
                (
                    "cpu_system_usec_microseconds",
                    "Current cpu usage in kernel space (cgroup v2)",
                    cpu.system_usec,
                ),
                (
                    "cpu_nr_periods_total",
                    "Current cpu number of periods (only if controller is enabled)",
                    cpu.nr_periods,
                ),
                (
                    "cpu_nr_throttled_total",
                    "Total number of times tasks have been throttled (only if controller is enabled)",
                    cpu.nr_throttled,
                ),
                (
                    "cpu_throttled_usec_microseconds",
                    "Total time duration for which tasks have been throttled. (only if controller is enabled)",
                    cpu.throttled_usec,
                ),
            ]);
        }
        if let Some(memory) = memory {
            self.second_memory(memory);
        }
        if let Some(events) = memory_events {
            let help = "The number of times a container has received an oom event";
            self.gauge("memory_oom_total", help, &[], events.oom);
        }
        for v2::IoEntry { major, minor, rbytes, wbytes, rios, wios } in io.into_iter().flat_map(|io| io.usage)
        {
            let (major, minor) = (major.to_string(), minor.to_string());
            let device = [("major", major.as_str()), ("minor", minor.as_str())];
            self.gauge("io_rbytes_bytes", "IO bytes read", &device, rbytes);
            self.gauge("io_wbytes_bytes", "IO bytes written", &device, wbytes);
            self.gauge("io_rios_total", "Number of read IOs", &device, rios);
            self.gauge("io_wios_total", "Number of write IOs", &device, wios);
        }
    }

    fn second_memory(&mut self, memory: v2::MemoryStat) {
        self.plain([
            ("memory_usage_bytes", "Current memory usage (cgroup v2)", memory.usage),
            ("memory_usage_limit_bytes", "Current memory usage limit (cgroup v2)", memory.usage_limit),
            ("memory_swap_usage_bytes", "Current swap usage (cgroup v2)", memory.swap_usage),
            ("memory_swap_limit_bytes", "Current swap usage limit (cgroup v2)", memory.swap_limit),
            ("memory_file_mapped_bytes", "The file_mapped amount", memory.file_mapped),
            ("memory_file_dirty_bytes", "The file_dirty amount", memory.file_dirty),
            ("memory_file_writeback_bytes", "The file_writeback amount", memory.file_writeback),
            ("memory_pgactivate_bytes", "The pgactivate amount", memory.pgactivate),
            ("memory_pgdeactivate_bytes", "The pgdeactivate amount", memory.pgdeactivate),
            ("memory_pgfault_bytes", "The pgfault amount", memory.pgfault),
            ("memory_pgmajfault_bytes", "The pgmajfault amount", memory.pgmajfault),
            ("memory_pglazyfree_bytes", "The pglazyfree amount", memory.pglazyfree),
            ("memory_pgrefill_bytes", "The pgrefill amount", memory.pgrefill),
            ("memory_pglazyfreed_bytes", "The pglazyfreed amount", memory.pglazyfreed),
            ("memory_pgscan_bytes", "The pgscan amount", memory.pgscan),
            ("memory_pgsteal_bytes", "The pgsteal amount", memory.pgsteal),
            ("memory_inactive_anon_bytes", "The inactive_anon amount", memory.inactive_anon),
            ("memory_active_anon_bytes", "The active_anon amount", memory.active_anon),
            ("memory_inactive_file_bytes", "The inactive_file amount", memory.inactive_file),
            ("memory_active_file_bytes", "The active_file amount", memory.active_file),
            ("memory_unevictable_bytes", "The unevictable amount", memory.unevictable),
            ("memory_anon_bytes", "The anon amount", memory.anon),
            ("memory_file_bytes", "The file amount", memory.file),
            ("memory_kernel_stack_bytes", "The kernel_stack amount", memory.kernel_stack),
            ("memory_slab_bytes", "The slab amount", memory.slab),
            ("memory_sock_bytes", "The sock amount", memory.sock),
            ("memory_shmem_bytes", "The shmem amount", memory.shmem),
            ("memory_anon_thp_bytes", "The anon_thp amount", memory.anon_thp),
            ("memory_slab_reclaimable_bytes", "The slab_reclaimable amount", memory.slab_reclaimable),
            ("memory_slab_unreclaimable_bytes", "The slab_unreclaimable amount", memory.slab_unreclaimable),
            ("memory_workingset_refault_bytes", "The workingset_refault amount", memory.workingset_refault),
            (
                "memory_workingset_activate_bytes",
                "The workingset_activate amount",
                memory.workingset_activate,
            ),
            (
                "memory_workingset_nodereclaim_bytes",
                "The workingset_nodereclaim amount",
                memory.workingset_nodereclaim,
            ),
            ("memory_thp_fault_alloc_bytes", "The thp_fault_alloc amount", memory.thp_fault_alloc),
            ("memory_thp_collapse_alloc_bytes", "The thp_collapse_alloc amount", memory.thp_collapse_alloc),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(message: &impl Message, kind: &str) -> String {
        let mut page = Page::default();
        let data = Any { type_url: kind.to_owned(), value: message.encode_to_vec() };
        Container { page: &mut page, id: "c", namespace: "n", runtime: "r" }.add(&data);
        page.finish()
    }

    #[test]
    fn the_first_generation_is_told_as_containerd_tells_it() {
        let entry =
            v1::BlkIoEntry { op: "Read".into(), device: "/dev/vda".into(), major: 254, minor: 1, value: 7 };
        let metrics = v1::Metrics {
            hugetlb: vec![v1::HugetlbStat { usage: 1, max: 2, failcnt: 3, pagesize: "2MB".into() }],
            cpu: Some(v1::CpuStat {
                usage: Some(v1::CpuUsage { per_cpu: vec![4, 5], ..Default::default() }),
                throttling: None,
            }),
            memory: Some(v1::MemoryStat {
                kernel_tcp: Some(v1::MemoryEntry { failcnt: 6, ..Default::default() }),
                ..Default::default()
            }),
            blkio: Some(v1::BlkIoStat { io_service_bytes_recursive: vec![entry], ..Default::default() }),
            ..Default::default()
        };
        let page = told(&metrics, "io.containerd.cgroups.v1.Metrics");
        let labels = "container_id=\"c\",namespace=\"n\",";
        for line in [
            format!("container_hugetlb_failcnt_total{{{labels}page=\"2MB\",runtime=\"r\"}} 3"),
            "container_per_cpu_nanoseconds{container_id=\"c\",cpu=\"1\",namespace=\"n\",runtime=\"r\"} 5".into(),
            format!("container_memory_kerneltcp_failcnt_total{{{labels}runtime=\"r\"}} 6"),
            "container_blkio_io_service_bytes_recursive_bytes{container_id=\"c\",device=\"/dev/vda\",major=\"254\",\
             minor=\"1\",namespace=\"n\",op=\"Read\",runtime=\"r\"} 7"
                .into(),
            "# HELP container_memory_kerneltcp_max_bytes The kerneltcp maximum usage".into(),
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
        assert!(!page.contains("pids"), "what the shim does not say is not there:\n{page}");
    }

    #[test]
    fn the_second_generation_is_told_as_containerd_tells_it() {
        let usage = vec![v2::IoEntry { major: 8, minor: 0, rbytes: 9, ..Default::default() }];
        let metrics = v2::Metrics {
            memory: Some(v2::MemoryStat { thp_collapse_alloc: 3, ..Default::default() }),
            memory_events: Some(v2::MemoryEvents { oom: 2, ..Default::default() }),
            io: Some(v2::IoStat { usage, psi: None }),
            ..Default::default()
        };
        let page = told(&metrics, "types.containerd.io/io.containerd.cgroups.v2.Metrics");
        let labels = "container_id=\"c\",";
        for line in [
            format!(
                "container_io_rbytes_bytes{{{labels}major=\"8\",minor=\"0\",namespace=\"n\",runtime=\"r\"}} 9"
            ),
            format!("container_memory_oom_total{{{labels}namespace=\"n\",runtime=\"r\"}} 2"),
            format!("container_memory_thp_collapse_alloc_bytes{{{labels}namespace=\"n\",runtime=\"r\"}} 3"),
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }

    #[test]
    fn what_is_not_understood_is_not_told() {
        assert_eq!(told(&v1::Metrics::default(), "x.Metrics"), "");
        let mut page = Page::default();
        let data = Any { type_url: "io.containerd.cgroups.v1.Metrics".into(), value: vec![0xff] };
        Container { page: &mut page, id: "c", namespace: "n", runtime: "r" }.add(&data);
        assert_eq!(page.finish(), "");
    }
}
