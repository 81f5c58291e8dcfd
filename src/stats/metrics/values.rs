//! From what was read to CRI's metrics: pure functions.

use protobuf::MessageField;

use super::descriptors::{Id, ALL, BASE};
use super::devices::Devices;
use super::plan::Plan;
use super::tasks::Tasks;
use crate::api::runtime::{LinuxContainerResources, Metric, UInt64Value};
use crate::cgroup::stat::{pressure::Pressure, Detail, Sample};
use crate::stats::filesystem::Usage;

const SECOND: u64 = 1_000_000_000;
/// The kernel's own, where nothing was asked for.
const DEFAULT_PERIOD: u64 = 100_000;
const DEFAULT_SHARES: u64 = 1024;

/// Whose metrics they are: one value for each of `BASE`.
#[derive(Clone, Copy, Debug)]
pub struct Labels<'a> {
    pub id: &'a str,
    pub name: &'a str,
    pub image: &'a str,
    pub pod: &'a str,
    pub namespace: &'a str,
    pub container: &'a str,
}

/// The file system with the writable layers.
#[derive(Clone, Debug, Default)]
pub struct Space {
    /// Major and minor number.
    pub device: (u32, u32),
    pub bytes: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// Counters of one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic<'a> {
    pub interface: &'a str,
    pub rx: Direction,
    pub tx: Direction,
}

/// One direction of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

/// What is known of a container besides what the kernel says.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// Nanoseconds since the epoch.
    pub started_at: i64,
    pub resources: LinuxContainerResources,
}

/// Collects the wanted metrics of one object.
pub struct Sink<'a> {
    plan: &'a Plan,
    devices: &'a Devices,
    base: [&'a str; BASE.len()],
    taken_at: i64,
    metrics: Vec<Metric>,
}

impl<'a> Sink<'a> {
    /// `taken_at`: nanoseconds since the epoch, of all its metrics.
    pub fn new(plan: &'a Plan, devices: &'a Devices, labels: &Labels<'a>, taken_at: i64) -> Sink<'a> {
        let Labels { id, name, image, pod, namespace, container } = *labels;
        Sink { plan, devices, base: [id, name, image, pod, namespace, container], taken_at, metrics: Vec::with_capacity(ALL.len()) }
    }

    pub fn finish(self) -> Vec<Metric> {
        self.metrics
    }

    fn put(&mut self, id: Id, own: &[&str], value: u64) {
        if !self.plan.wants(id) {
            return;
        }
        let known = &ALL[id as usize];
        debug_assert_eq!(own.len(), known.labels.len(), "{}", known.name);
        let mut label_values = Vec::with_capacity(self.base.len() + own.len());
        label_values.extend(self.base.iter().chain(own).map(|value| (*value).to_owned()));
        self.metrics.push(Metric {
            name: known.name.to_owned(),
            timestamp: self.taken_at,
            metric_type: known.kind.into(),
            label_values,
            value: MessageField::some(UInt64Value { value, ..Default::default() }),
            ..Default::default()
        });
    }

    /// A value that the kernel may not have said; then there is none.
    fn put_some(&mut self, id: Id, value: Option<u64>) {
        if let Some(value) = value {
            self.put(id, &[], value);
        }
    }

    fn put_seconds(&mut self, id: Id, nanos: Option<u64>) {
        self.put_some(id, nanos.map(|n| n / SECOND));
    }

    /// When it was seen and started.
    pub fn life(&mut self, spec: &Spec) {
        self.put(Id::LastSeen, &[], self.taken_at.max(0) as u64 / SECOND);
        self.put(Id::StartTime, &[], spec.started_at.max(0) as u64 / SECOND);
    }

    /// What its cgroup says.
    pub fn cgroup(&mut self, sample: &Sample, detail: &Detail) {
        if let Some(nanos) = sample.cpu {
            self.put(Id::CpuUsage, &["total"], nanos / SECOND);
        }
        let times = &detail.times;
        self.put_seconds(Id::CpuUser, times.user);
        self.put_seconds(Id::CpuSystem, times.system);
        self.put_some(Id::CpuPeriods, times.periods);
        self.put_some(Id::CpuThrottledPeriods, times.throttled_periods);
        self.put_seconds(Id::CpuThrottled, times.throttled);
        self.memory(sample, detail);
        for (waiting, stalled, pressure) in [
            (Id::PressureCpuWaiting, Id::PressureCpuStalled, &sample.cpu_pressure),
            (Id::PressureMemoryWaiting, Id::PressureMemoryStalled, &sample.memory_pressure),
            (Id::PressureIoWaiting, Id::PressureIoStalled, &sample.io_pressure),
        ] {
            let Pressure { some, full } = pressure.unwrap_or_default();
            self.put_seconds(waiting, some.map(|s| s.total));
            self.put_seconds(stalled, full.map(|s| s.total));
        }
        for pages in &detail.hugetlb {
            let size = [pages.size.as_str()];
            self.put(Id::HugetlbUsage, &size, pages.usage.unwrap_or(0));
            self.put(Id::HugetlbMax, &size, pages.max_usage.unwrap_or(0));
            self.put(Id::HugetlbFailcnt, &size, pages.failures.unwrap_or(0));
        }
        self.put_some(Id::Threads, detail.pids.threads);
        self.put(Id::ThreadsMax, &[], detail.pids.limit.unwrap_or(0));
    }

    fn memory(&mut self, sample: &Sample, detail: &Detail) {
        let (memory, more) = (&sample.memory, &detail.memory);
        self.put_some(Id::MemoryUsage, memory.usage);
        self.put_some(Id::MemoryWorkingSet, memory.working_set());
        self.put_some(Id::MemoryRss, memory.rss);
        self.put_some(Id::MemoryCache, memory.cache);
        self.put_some(Id::MemoryMapped, memory.mapped_file);
        // A kernel without swap says nothing about it.
        self.put(Id::MemorySwap, &[], memory.swap.unwrap_or(0));
        self.put(Id::MemoryKernel, &[], more.kernel.or(memory.kernel).unwrap_or(0));
        self.put_some(Id::MemoryMax, more.max_usage);
        self.put(Id::MemoryFailcnt, &[], more.failures.unwrap_or(0));
        self.put_some(Id::MemoryActiveFile, memory.active_file);
        self.put_some(Id::MemoryInactiveFile, memory.inactive_file);
        self.put_some(Id::OomEvents, more.oom_kills);
        // Where the kernel does not tell a cgroup's own faults from those below, as v2 does not, both scopes say the same.
        let (own, own_major) = (memory.own_faults.or(memory.faults), memory.own_major_faults.or(memory.major_faults));
        for (kind, scope, value) in [
            ("pgfault", "container", own),
            ("pgmajfault", "container", own_major),
            ("pgfault", "hierarchy", memory.faults),
            ("pgmajfault", "hierarchy", memory.major_faults),
        ] {
            if let Some(value) = value {
                self.put(Id::MemoryFailures, &[kind, scope], value);
            }
        }
    }

    /// Block devices. A container that has used none is said to have used `space`'s for nothing.
    pub fn io(&mut self, detail: &Detail, space: &Space) {
        if !self.plan.wants_any(&[Id::BlkioUsage, Id::FsReads]) {
            return;
        }
        let idle = [crate::cgroup::stat::io::Device { major: space.device.0, minor: space.device.1, ..Default::default() }];
        let used = if detail.io.is_empty() { &idle[..] } else { &detail.io };
        for device in used {
            let name = self.devices.name(device.major, device.minor);
            let (major, minor) = (device.major.to_string(), device.minor.to_string());
            for (operation, bytes) in [("Read", device.read_bytes), ("Write", device.write_bytes), ("Discard", device.discard_bytes)] {
                self.put(Id::BlkioUsage, &[&name, &major, &minor, operation], bytes);
            }
            self.put(Id::FsReadBytes, &[&name], device.read_bytes);
            self.put(Id::FsReads, &[&name], device.reads);
            self.put(Id::FsWriteBytes, &[&name], device.write_bytes);
            self.put(Id::FsWrites, &[&name], device.writes);
        }
    }

    /// The writable layer and the file system it is on.
    pub fn filesystem(&mut self, usage: Option<Usage>, space: &Space) {
        if !self.plan.wants(Id::FsUsage) {
            return;
        }
        let name = self.devices.name(space.device.0, space.device.1);
        self.put(Id::FsLimit, &[&name], space.bytes);
        self.put(Id::FsInodesTotal, &[&name], space.inodes);
        self.put(Id::FsInodesFree, &[&name], space.inodes_free);
        if let Some(usage) = usage {
            // It has a time of its own, which is that of the look at the layer.
            let now = std::mem::replace(&mut self.taken_at, usage.taken_at);
            self.put(Id::FsUsage, &[&name], usage.bytes);
            self.taken_at = now;
        }
    }

    /// What /proc says.
    pub fn tasks(&mut self, processes: u64, tasks: &Tasks) {
        self.put(Id::Processes, &[], processes);
        self.put(Id::FileDescriptors, &[], tasks.descriptors);
        self.put(Id::Sockets, &[], tasks.sockets);
        if let Some(limit) = tasks.open_files {
            self.put(Id::UlimitsSoft, &["max_open_files"], limit);
        }
        let states = &tasks.states;
        for (state, count) in [
            ("running", states.running),
            ("sleeping", states.sleeping),
            ("stopped", states.stopped),
            ("uninterruptible", states.uninterruptible),
        ] {
            self.put(Id::TasksState, &[state], count);
        }
    }

    /// What was asked for.
    pub fn spec(&mut self, spec: &Spec) {
        let r = &spec.resources;
        // Unset is 0 in CRI; a negative limit is none.
        let positive = |value: i64| u64::try_from(value).unwrap_or(0);
        let or = |value: i64, default: u64| if value > 0 { value as u64 } else { default };
        self.put(Id::SpecCpuPeriod, &[], or(r.cpu_period, DEFAULT_PERIOD));
        self.put(Id::SpecCpuQuota, &[], positive(r.cpu_quota));
        self.put(Id::SpecCpuShares, &[], or(r.cpu_shares, DEFAULT_SHARES));
        self.put(Id::SpecMemoryLimit, &[], positive(r.memory_limit_in_bytes));
        let reserved = ["memory.low", "memory.min"].iter().find_map(|key| r.unified.get(*key)?.trim().parse().ok());
        self.put(Id::SpecMemoryReservation, &[], reserved.unwrap_or(0));
        self.put(Id::SpecMemorySwapLimit, &[], positive(r.memory_swap_limit_in_bytes));
    }

    /// A sandbox's interfaces.
    pub fn network(&mut self, interfaces: &[Traffic<'_>]) {
        for Traffic { interface, rx, tx } in interfaces {
            let label = [*interface];
            self.put(Id::ReceiveBytes, &label, rx.bytes);
            self.put(Id::ReceivePackets, &label, rx.packets);
            self.put(Id::ReceiveErrors, &label, rx.errors);
            self.put(Id::ReceiveDropped, &label, rx.dropped);
            self.put(Id::TransmitBytes, &label, tx.bytes);
            self.put(Id::TransmitPackets, &label, tx.packets);
            self.put(Id::TransmitErrors, &label, tx.errors);
            self.put(Id::TransmitDropped, &label, tx.dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::stat::{cpu, hugetlb, io, memory, pids, pressure};
    use crate::config::MetricsGroup;
    use crate::stats::metrics::plan::Facts;
    use std::collections::BTreeSet;
    use std::time::Instant;

    const LABELS: Labels = Labels { id: "c1", name: "main", image: "busybox", pod: "p", namespace: "n", container: "main" };

    fn all() -> Plan {
        let facts = Facts {
            pressure: true,
            cpu_full: true,
            cpu: true,
            memory: true,
            memory_peak: true,
            pids: true,
            io: true,
            hugetlb: vec!["2MB".into()],
            hugetlb_peak: true,
        };
        Plan::new(&MetricsGroup::ALL, facts)
    }

    fn sample() -> (Sample, Detail) {
        let stat = "total_cache 5\ntotal_rss 6\ntotal_mapped_file 7\ntotal_swap 0\ntotal_pgfault 8\ntotal_pgmajfault 9\n\
            total_inactive_file 1\ntotal_active_file 2\npgfault 3\npgmajfault 4\n";
        let psi = pressure::parse("some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0 avg60=0 avg300=0 total=0\n");
        let sample = Sample {
            taken_at: 77 * SECOND as i64 + 5,
            clock: Instant::now(),
            cpu: Some(3 * SECOND - 1),
            memory: memory::Memory::v1("1000\n", stat),
            cpu_pressure: psi,
            memory_pressure: psi,
            io_pressure: psi,
        };
        let detail = Detail {
            times: cpu::times_v1("user 250\nsystem 150\n", "nr_periods 10\nnr_throttled 2\nthrottled_time 5000000000\n", 100),
            memory: memory::more_v1("2000\n", "1\n", "300\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 6\n"),
            pids: pids::parse("4\n", "max\n"),
            processes: 2,
            process_ids: Vec::new(),
            io: Vec::new(),
            hugetlb: vec![hugetlb::v1("2MB", "0\n", "2097152\n", "0\n")],
        };
        (sample, detail)
    }

    /// Everything a container and a sandbox give.
    fn everything(plan: &Plan, detail_io: Vec<io::Device>) -> Vec<Metric> {
        let (sample, mut detail) = sample();
        detail.io = detail_io;
        let space = Space { device: (0, 12345), bytes: 100, inodes: 10, inodes_free: 3 };
        let spec = Spec { started_at: 70 * SECOND as i64, resources: LinuxContainerResources::default() };
        let devices = Devices::default();
        let mut sink = Sink::new(plan, &devices, &LABELS, sample.taken_at);
        sink.life(&spec);
        sink.cgroup(&sample, &detail);
        sink.io(&detail, &space);
        sink.filesystem(Some(Usage { bytes: 4096, inodes: 1, taken_at: 60 * SECOND as i64 }), &space);
        sink.tasks(2, &Tasks { open_files: Some(1024), ..Tasks::default() });
        sink.spec(&spec);
        sink.network(&[Traffic { interface: "eth0", rx: Direction { bytes: 9, ..Direction::default() }, tx: Direction::default() }]);
        sink.finish()
    }

    fn value(metrics: &[Metric], name: &str, own: &[&str]) -> u64 {
        let found: Vec<_> = metrics.iter().filter(|m| m.name == name && m.label_values[BASE.len()..] == *own).collect();
        assert_eq!(found.len(), 1, "{name} {own:?}");
        found[0].value.value
    }

    #[test]
    fn every_descriptor_has_values_with_as_many_labels_and_none_twice() {
        let plan = all();
        let metrics = everything(&plan, Vec::new());
        let descriptors = plan.descriptors();
        let mut seen = BTreeSet::new();
        for metric in &metrics {
            let descriptor = descriptors.iter().find(|d| d.name == metric.name).expect(&metric.name);
            assert_eq!(descriptor.label_keys.len(), metric.label_values.len(), "{}", metric.name);
            assert_eq!(metric.label_values[..6], ["c1", "main", "busybox", "p", "n", "main"]);
            assert!(seen.insert((&metric.name, &metric.label_values)), "{} twice", metric.name);
        }
        for descriptor in &descriptors {
            assert!(metrics.iter().any(|m| m.name == descriptor.name), "{} has no value", descriptor.name);
        }
    }

    #[test]
    fn numbers() {
        let used = io::v2("0:12345 rbytes=5 wbytes=6 rios=1 wios=2 dbytes=7 dios=3\n");
        let metrics = everything(&all(), used);
        let of = |name: &str| value(&metrics, name, &[]);
        assert_eq!(value(&metrics, "container_cpu_usage_seconds_total", &["total"]), 2, "whole seconds, not rounded up");
        assert_eq!((of("container_cpu_user_seconds_total"), of("container_cpu_cfs_throttled_seconds_total")), (2, 5));
        assert_eq!((of("container_memory_working_set_bytes"), of("container_memory_kernel_usage")), (999, 300));
        assert_eq!(value(&metrics, "container_memory_failures_total", &["pgfault", "container"]), 3);
        assert_eq!(value(&metrics, "container_memory_failures_total", &["pgmajfault", "hierarchy"]), 9);
        assert_eq!((of("container_pressure_cpu_waiting_seconds_total"), of("container_oom_events_total")), (2, 6));
        assert_eq!(value(&metrics, "container_hugetlb_max_usage_bytes", &["2MB"]), 2_097_152);
        assert_eq!(value(&metrics, "container_blkio_device_usage_total", &["0:12345", "0", "12345", "Write"]), 6);
        assert_eq!(value(&metrics, "container_fs_reads_total", &["0:12345"]), 1);
        assert_eq!((of("container_threads"), of("container_threads_max")), (4, 0));
        assert_eq!((of("container_last_seen"), of("container_start_time_seconds")), (77, 70));
        assert_eq!((of("container_spec_cpu_shares"), of("container_spec_cpu_quota")), (1024, 0));
        assert_eq!(value(&metrics, "container_network_receive_bytes_total", &["eth0"]), 9);
        let layer = metrics.iter().find(|m| m.name == "container_fs_usage_bytes").unwrap();
        assert_eq!((layer.value.value, layer.timestamp), (4096, 60 * SECOND as i64));
        assert_eq!(metrics[0].timestamp, 77 * SECOND as i64 + 5);
    }

    #[test]
    fn what_was_not_asked_for_is_not_given() {
        let plan = Plan::new(&[MetricsGroup::Memory], all().facts);
        let metrics = everything(&plan, Vec::new());
        assert!(metrics.iter().all(|m| m.name.starts_with("container_memory") || m.group_less()), "{metrics:?}");
    }

    trait GroupLess {
        fn group_less(&self) -> bool;
    }

    impl GroupLess for Metric {
        fn group_less(&self) -> bool {
            ALL.iter().any(|known| known.name == self.name && known.group.is_none())
        }
    }
}
