//! cAdvisor's metrics: which there are on this host, and their values for one container or sandbox.

/// The metrics there are.
pub mod descriptors;
/// Names of block devices.
pub mod devices;
/// Which of them this host and configuration give.
pub mod plan;
/// What /proc tells of processes.
pub mod tasks;
/// From what was read to CRI's metrics.
pub mod values;

use std::path::PathBuf;
use std::sync::Arc;

use crate::api::runtime::{Metric, MetricDescriptor};
use crate::cgroup::stat::{Reader, Sample};
use crate::cgroup::Layout;
use crate::config::MetricsGroup;
use crate::stats::filesystem::Disk;
use crate::store::now_ns;
use descriptors::Id;
use devices::Devices;
use plan::{Facts, Plan};
use tasks::Kept;
use values::{Labels, Sink, Space, Spec, Traffic};

/// Everything that metrics need beside samples of cgroups.
pub struct Metrics {
    plan: Plan,
    devices: Devices,
    tasks: Kept,
    disk: Arc<Disk>,
    /// The directory of the writable layers.
    layers: PathBuf,
}

/// A container that runs, as far as metrics care.
pub struct Subject<'a> {
    pub labels: Labels<'a>,
    pub spec: Spec,
    /// Its first process.
    pub pid: i32,
}

impl Metrics {
    /// Finds out what this host gives.
    pub fn new(groups: &[MetricsGroup], layout: &Layout, layers: PathBuf, disk: Arc<Disk>) -> Metrics {
        let plan = Plan::new(groups, Facts::detect(layout));
        Metrics { plan, devices: Devices::default(), tasks: Kept::default(), disk, layers }
    }

    /// The same for the life of the daemon.
    pub fn descriptors(&self) -> Vec<MetricDescriptor> {
        self.plan.descriptors()
    }

    /// What all containers of one call share.
    pub fn space(&self) -> Space {
        self.tasks.clean();
        if !self.plan.wants_any(&[Id::FsUsage, Id::FsReads, Id::BlkioUsage]) {
            return Space::default();
        }
        let Ok(fs) = rustix::fs::statvfs(&self.layers) else { return Space::default() };
        Space { device: devices::of(&self.layers), bytes: fs.f_blocks * fs.f_frsize, inodes: fs.f_files, inodes_free: fs.f_ffree }
    }

    /// The metrics of a container, all of one look at it.
    pub fn container(&self, subject: &Subject<'_>, reader: &Reader, sample: &Sample, space: &Space) -> Vec<Metric> {
        let mut sink = Sink::new(&self.plan, &self.devices, &subject.labels, sample.taken_at);
        let detail = reader.detail(&self.plan.facts.hugetlb);
        sink.life(&subject.spec);
        sink.cgroup(sample, &detail);
        sink.filesystem(self.disk.usage(subject.labels.id), space);
        sink.io(&detail, space);
        if self.plan.wants_group(MetricsGroup::Processes) {
            let ask = || tasks::ask(&detail.process_ids, subject.pid);
            sink.tasks(detail.processes, &self.tasks.get(subject.labels.id, ask));
        }
        sink.spec(&subject.spec);
        sink.finish()
    }

    /// The metrics of a sandbox itself: its network.
    pub fn network(&self, labels: &Labels<'_>, interfaces: &[Traffic<'_>]) -> Vec<Metric> {
        if !self.plan.wants(Id::ReceiveBytes) {
            return Vec::new();
        }
        let mut sink = Sink::new(&self.plan, &self.devices, labels, now_ns());
        sink.network(interfaces);
        sink.finish()
    }

    /// Whether interfaces have to be asked at all.
    pub fn wants_network(&self) -> bool {
        self.plan.wants(Id::ReceiveBytes)
    }
}
