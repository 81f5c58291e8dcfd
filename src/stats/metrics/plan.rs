//! Which metrics this host and this configuration give: found out once, at the daemon's start, and the same from then on.

use std::path::{Path, PathBuf};

use super::descriptors::{Id, Needs, ALL};
use crate::api::runtime::MetricDescriptor;
use crate::cgroup::stat::{hugetlb, pressure};
use crate::cgroup::{Layout, Mode};
use crate::config::MetricsGroup;

/// What this host gives.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub pressure: bool,
    pub cpu_full: bool,
    pub cpu: bool,
    pub memory: bool,
    pub memory_peak: bool,
    pub pids: bool,
    pub io: bool,
    /// Sizes of huge pages; empty: the controller is missing.
    pub hugetlb: Vec<String>,
    pub hugetlb_peak: bool,
}

impl Facts {
    /// Looks at the hierarchies of `layout`.
    pub fn detect(layout: &Layout) -> Facts {
        let v2 = layout.v2().map(|h| h.mount.as_path());
        let there = |controller: &str| has(layout, controller);
        // cgroups have these files even where the system's own are switched off by a boot parameter; they are not readable then.
        let pressure = |name: &str| v2.and_then(|dir| pressure_of(&dir.join(format!("{name}.pressure")), name));
        let (cpu, memory, io) = (pressure("cpu"), pressure("memory"), pressure("io"));
        let sizes = if there("hugetlb") { hugetlb::sizes(Path::new("/sys/kernel/mm/hugepages")) } else { Vec::new() };
        Facts {
            pressure: cpu.is_some() && memory.is_some() && io.is_some(),
            cpu_full: cpu.is_some_and(|p| p.full.is_some()),
            cpu: there("cpu"),
            memory: there("memory"),
            memory_peak: layout.v1("memory").is_some() || (there("memory") && kernel_is_at_least(5, 19)),
            pids: there("pids"),
            io: there("blkio"),
            hugetlb_peak: !sizes.is_empty() && layout.v1("hugetlb").is_some(),
            hugetlb: sizes,
        }
    }
}

/// Whether cgroups have the files of a v1 controller, or of the v2 one that took its place.
fn has(layout: &Layout, controller: &str) -> bool {
    if layout.v1(controller).is_some() {
        return true;
    }
    let name = if controller == "blkio" { "io" } else { controller };
    let Some(v2) = layout.v2() else { return false };
    let controllers = std::fs::read_to_string(v2.mount.join("cgroup.controllers")).unwrap_or_default();
    // Beside v1 nobody passes v2's controllers down to containers.
    layout.mode == Mode::V2 && controllers.split_ascii_whitespace().any(|c| c == name)
}

/// The root cgroup's file, or the system's, which says the same where the root has none.
fn pressure_of(path: &Path, name: &str) -> Option<pressure::Pressure> {
    let read = |path: &Path| std::fs::read_to_string(path).ok().and_then(|text| pressure::parse(&text));
    read(path).or_else(|| read(&PathBuf::from("/proc/pressure").join(name)))
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let name = rustix::system::uname();
    let text = name.release().to_string_lossy();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

/// The metrics to give.
pub struct Plan {
    on: Vec<bool>,
    pub facts: Facts,
}

impl Plan {
    pub fn new(groups: &[MetricsGroup], facts: Facts) -> Plan {
        let given = |needs: Needs| match needs {
            Needs::Nothing => true,
            Needs::Pressure => facts.pressure,
            Needs::CpuFull => facts.pressure && facts.cpu_full,
            Needs::Cpu => facts.cpu,
            Needs::Memory => facts.memory,
            Needs::MemoryPeak => facts.memory_peak,
            Needs::Pids => facts.pids,
            Needs::Io => facts.io,
            Needs::Hugetlb => !facts.hugetlb.is_empty(),
            Needs::HugetlbPeak => facts.hugetlb_peak,
        };
        let on = ALL.iter().map(|m| given(m.needs) && m.group.is_none_or(|g| groups.contains(&g))).collect();
        Plan { on, facts }
    }

    pub fn wants(&self, id: Id) -> bool {
        self.on[id as usize]
    }

    /// Whether any of them is wanted.
    pub fn wants_any(&self, ids: &[Id]) -> bool {
        ids.iter().any(|id| self.wants(*id))
    }

    /// Whether any metric of a group is wanted.
    pub fn wants_group(&self, group: MetricsGroup) -> bool {
        ALL.iter().zip(&self.on).any(|(m, on)| *on && m.group == Some(group))
    }

    /// The answer to ListMetricDescriptors.
    pub fn descriptors(&self) -> Vec<MetricDescriptor> {
        ALL.iter().zip(&self.on).filter(|(_, on)| **on).map(|(m, _)| m.descriptor()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(groups: &[MetricsGroup], facts: Facts) -> Vec<String> {
        Plan::new(groups, facts).descriptors().into_iter().map(|d| d.name).collect()
    }

    #[test]
    fn what_the_host_lacks_and_what_was_not_asked_for_is_not_on_the_list() {
        assert_eq!(names(&[], Facts::default()), ["container_last_seen", "container_start_time_seconds"]);
        let bare = names(&MetricsGroup::ALL, Facts::default());
        assert!(bare.iter().any(|n| n == "container_cpu_usage_seconds_total"));
        assert!(!bare.iter().any(|n| n.contains("pressure") || n.contains("hugetlb") || n.contains("blkio") || n.contains("cfs")));
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
        assert_eq!(names(&MetricsGroup::ALL, facts.clone()).len(), ALL.len());
        let network = names(&[MetricsGroup::Network], facts);
        assert_eq!(network.len(), 2 + 8, "{network:?}");
    }

    #[test]
    fn this_host_has_some() {
        let facts = Facts::detect(Layout::host().unwrap());
        assert!(facts.memory && facts.cpu && facts.pids, "{facts:?}");
    }
}
