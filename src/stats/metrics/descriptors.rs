//! The metrics there are: cAdvisor's names, types, units and own labels, since dashboards ask for those. CRI's values are whole
//! numbers, so seconds are whole seconds.

use crate::api::runtime::{MetricDescriptor, MetricType};
use crate::config::MetricsGroup;

/// Labels that every metric has, before its own.
pub const BASE: [&str; 6] = ["id", "name", "image", "pod", "namespace", "container"];

/// What of a host a metric needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// Pressure stall information of cgroups.
    Pressure,
    /// The same, with the `full` line for CPU (Linux 5.13).
    CpuFull,
    /// A cgroup controller.
    Memory,
    /// The highest memory usage: v1, or v2 since Linux 5.19.
    MemoryPeak,
    Pids,
    Io,
    Hugetlb,
    /// The highest usage of huge pages: v1 alone.
    HugetlbPeak,
    /// Throttling: the cpu controller.
    Cpu,
}

/// One metric.
#[derive(Debug)]
pub struct Known {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: MetricType,
    /// None: not to be left out.
    pub group: Option<MetricsGroup>,
    pub labels: &'static [&'static str],
    pub needs: Needs,
}

impl Known {
    pub fn descriptor(&self) -> MetricDescriptor {
        MetricDescriptor {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            label_keys: BASE.iter().chain(self.labels).map(|key| (*key).to_owned()).collect(),
            ..Default::default()
        }
    }
}

macro_rules! metrics {
    ($($group:tt { $($id:ident $name:literal $kind:ident $labels:tt $needs:ident $help:literal)* })*) => {
        /// A metric, as its place in `ALL`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Id { $($($id,)*)* }

        /// All metrics, in the order of the descriptor list.
        pub const ALL: &[Known] = &[$($(Known {
            name: $name,
            help: $help,
            kind: MetricType::$kind,
            group: metrics!(@group $group),
            labels: &$labels,
            needs: Needs::$needs,
        },)*)*];
    };
    (@group _) => { None };
    (@group $group:ident) => { Some(MetricsGroup::$group) };
}

metrics! {
    _ {
        LastSeen "container_last_seen" GAUGE [] Nothing "When the container was last seen, seconds since the epoch."
        StartTime "container_start_time_seconds" GAUGE [] Nothing "When the container was started, seconds since the epoch."
    }
    Cpu {
        CpuUsage "container_cpu_usage_seconds_total" COUNTER ["cpu"] Nothing "CPU time used, in seconds."
        CpuUser "container_cpu_user_seconds_total" COUNTER [] Nothing "CPU time used in user mode, in seconds."
        CpuSystem "container_cpu_system_seconds_total" COUNTER [] Nothing "CPU time used in the kernel, in seconds."
        CpuPeriods "container_cpu_cfs_periods_total" COUNTER [] Cpu "Enforcement periods that have passed."
        CpuThrottledPeriods "container_cpu_cfs_throttled_periods_total" COUNTER [] Cpu "Enforcement periods in which it was throttled."
        CpuThrottled "container_cpu_cfs_throttled_seconds_total" COUNTER [] Cpu "Time for which it was throttled, in seconds."
    }
    Memory {
        MemoryUsage "container_memory_usage_bytes" GAUGE [] Memory "Memory in use, caches included."
        MemoryWorkingSet "container_memory_working_set_bytes" GAUGE [] Memory "Memory in use without the inactive file cache."
        MemoryRss "container_memory_rss" GAUGE [] Memory "Anonymous memory, in bytes."
        MemoryCache "container_memory_cache" GAUGE [] Memory "Page cache, in bytes."
        MemoryMapped "container_memory_mapped_file" GAUGE [] Memory "Mapped files, in bytes."
        MemorySwap "container_memory_swap" GAUGE [] Memory "Swap in use, in bytes."
        MemoryKernel "container_memory_kernel_usage" GAUGE [] Memory "Memory of the kernel for the container, in bytes."
        MemoryMax "container_memory_max_usage_bytes" GAUGE [] MemoryPeak "Highest memory usage."
        MemoryFailcnt "container_memory_failcnt" COUNTER [] Memory "How often the memory limit was hit."
        MemoryFailures "container_memory_failures_total" COUNTER ["failure_type", "scope"] Memory "Page faults."
        MemoryActiveFile "container_memory_total_active_file_bytes" GAUGE [] Memory "Active page cache."
        MemoryInactiveFile "container_memory_total_inactive_file_bytes" GAUGE [] Memory "Inactive page cache."
    }
    Network {
        ReceiveBytes "container_network_receive_bytes_total" COUNTER ["interface"] Nothing "Bytes received."
        ReceivePackets "container_network_receive_packets_total" COUNTER ["interface"] Nothing "Packets received."
        ReceiveErrors "container_network_receive_errors_total" COUNTER ["interface"] Nothing "Errors while receiving."
        ReceiveDropped "container_network_receive_packets_dropped_total" COUNTER ["interface"] Nothing "Packets dropped while receiving."
        TransmitBytes "container_network_transmit_bytes_total" COUNTER ["interface"] Nothing "Bytes sent."
        TransmitPackets "container_network_transmit_packets_total" COUNTER ["interface"] Nothing "Packets sent."
        TransmitErrors "container_network_transmit_errors_total" COUNTER ["interface"] Nothing "Errors while sending."
        TransmitDropped "container_network_transmit_packets_dropped_total" COUNTER ["interface"] Nothing "Packets dropped while sending."
    }
    Filesystem {
        FsUsage "container_fs_usage_bytes" GAUGE ["device"] Nothing "What the writable layer takes."
        FsLimit "container_fs_limit_bytes" GAUGE ["device"] Nothing "Size of the file system with the writable layer."
        FsInodesFree "container_fs_inodes_free" GAUGE ["device"] Nothing "Free inodes of the file system with the writable layer."
        FsInodesTotal "container_fs_inodes_total" GAUGE ["device"] Nothing "Inodes of the file system with the writable layer."
        FsReadBytes "container_fs_reads_bytes_total" COUNTER ["device"] Io "Bytes read from the device."
        FsReads "container_fs_reads_total" COUNTER ["device"] Io "Reads from the device."
        FsWriteBytes "container_fs_writes_bytes_total" COUNTER ["device"] Io "Bytes written to the device."
        FsWrites "container_fs_writes_total" COUNTER ["device"] Io "Writes to the device."
    }
    Processes {
        Processes "container_processes" GAUGE [] Nothing "Processes in the container."
        Threads "container_threads" GAUGE [] Pids "Threads in the container."
        ThreadsMax "container_threads_max" GAUGE [] Pids "Threads that the container may have; 0: no limit."
        FileDescriptors "container_file_descriptors" GAUGE [] Nothing "File descriptors that the container's processes have open."
        Sockets "container_sockets" GAUGE [] Nothing "Sockets that the container's processes have open."
        UlimitsSoft "container_ulimits_soft" GAUGE ["ulimit"] Nothing "Soft limits of the container's first process."
        TasksState "container_tasks_state" GAUGE ["state"] Nothing "Threads in the container, by state."
    }
    Pressure {
        PressureCpuWaiting "container_pressure_cpu_waiting_seconds_total" COUNTER [] Pressure "Time in which a task waited for a CPU, in seconds."
        PressureCpuStalled "container_pressure_cpu_stalled_seconds_total" COUNTER [] CpuFull "Time in which all tasks waited for a CPU, in seconds."
        PressureMemoryWaiting "container_pressure_memory_waiting_seconds_total" COUNTER [] Pressure "Time in which a task waited for memory, in seconds."
        PressureMemoryStalled "container_pressure_memory_stalled_seconds_total" COUNTER [] Pressure "Time in which all tasks waited for memory, in seconds."
        PressureIoWaiting "container_pressure_io_waiting_seconds_total" COUNTER [] Pressure "Time in which a task waited for I/O, in seconds."
        PressureIoStalled "container_pressure_io_stalled_seconds_total" COUNTER [] Pressure "Time in which all tasks waited for I/O, in seconds."
    }
    Hugetlb {
        HugetlbUsage "container_hugetlb_usage_bytes" GAUGE ["pagesize"] Hugetlb "Huge pages in use."
        HugetlbMax "container_hugetlb_max_usage_bytes" GAUGE ["pagesize"] HugetlbPeak "Most huge pages that were in use."
        HugetlbFailcnt "container_hugetlb_failcnt" COUNTER ["pagesize"] Hugetlb "How often the limit of huge pages was hit."
    }
    Blkio {
        BlkioUsage "container_blkio_device_usage_total" COUNTER ["device", "major", "minor", "operation"] Io "Bytes moved to and from block devices."
    }
    Oom {
        OomEvents "container_oom_events_total" COUNTER [] Memory "Processes that were killed because memory ran out."
    }
    Spec {
        SpecCpuPeriod "container_spec_cpu_period" GAUGE [] Nothing "CPU period, in microseconds."
        SpecCpuQuota "container_spec_cpu_quota" GAUGE [] Nothing "CPU quota for a period, in microseconds; 0: none."
        SpecCpuShares "container_spec_cpu_shares" GAUGE [] Nothing "CPU shares."
        SpecMemoryLimit "container_spec_memory_limit_bytes" GAUGE [] Nothing "Memory limit; 0: none."
        SpecMemoryReservation "container_spec_memory_reservation_limit_bytes" GAUGE [] Nothing "Memory that is kept for the container; 0: none."
        SpecMemorySwapLimit "container_spec_memory_swap_limit_bytes" GAUGE [] Nothing "Limit of memory and swap together; 0: none."
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_labels() {
        let names: BTreeSet<_> = ALL.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name is there twice");
        for metric in ALL {
            assert!(metric.name.starts_with("container_") && !metric.help.is_empty(), "{}", metric.name);
            // cAdvisor's name of this one says something else than its type.
            let gauge = metric.kind == MetricType::GAUGE && metric.name != "container_fs_inodes_total";
            assert!(!(gauge && metric.name.ends_with("_total")), "{}", metric.name);
            let keys = metric.descriptor().label_keys;
            assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), keys.len(), "{}", metric.name);
        }
        assert_eq!(ALL[Id::SpecMemorySwapLimit as usize].name, "container_spec_memory_swap_limit_bytes");
        assert_eq!(ALL.len(), Id::SpecMemorySwapLimit as usize + 1);
    }

    #[test]
    fn every_group_has_metrics_and_the_order_is_the_groups() {
        let groups: Vec<_> = ALL.iter().filter_map(|m| m.group).collect();
        assert!(groups.is_sorted());
        for group in MetricsGroup::ALL {
            assert!(groups.contains(&group), "{group:?}");
        }
    }
}
