//! What an update changes, and what takes it back.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, Spec};

use super::super::{process, HostFacts};
use super::{apply, hugepages};
use crate::api::runtime::LinuxContainerResources;
use crate::error::Result;

/// A change of the limits of a container, for one that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// For `runtime update --resources`: the whole new state of what changed or belongs to it, since runtimes fill in
    /// defaults for what is missing beside it. Nothing in it: the runtime need not be asked.
    pub resources: LinuxResources,
    /// The same members as they were, for the runtime's own memory; what had not been set is what a new cgroup has, but for
    /// cpusets.
    pub before: LinuxResources,
    /// All limits of huge pages, when one changed or the runtime is asked: runtimes leave them out of updates, and runc writes those
    /// of the creation again.
    pub hugepages: Vec<LinuxHugepageLimit>,
    /// To be written to /proc/PID/oom_score_adj of the container's processes, which runtimes do not.
    pub oom_score_adj: Option<OomScoreAdj>,
    pub warnings: Vec<String>,
}

/// A change of oom_score_adj.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OomScoreAdj {
    pub from: i32,
    pub to: i32,
}

/// Puts an update into the spec. 0 and "" mean unchanged. On an error the spec is as it was.
pub fn update_resources(spec: &mut Spec, new: &LinuxContainerResources, host: &HostFacts) -> Result<Update> {
    let mut warnings = Vec::new();
    let mut all = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let old = all.clone();
    apply(&mut all, new, host, &mut warnings)?;
    let present = old.hugepage_limits().as_deref().unwrap_or_default();
    all.set_hugepage_limits(hugepages::merge(present, hugepages::limits(new, host)?));
    let from = spec.process().as_ref().and_then(|process| process.oom_score_adj()).unwrap_or_default();
    let oom_score_adj = match new.oom_score_adj {
        0 => None,
        asked => Some(OomScoreAdj { from, to: process::oom_score_adj(asked, host, &mut warnings)? }),
    };

    let (mut resources, mut before) = (LinuxResources::default(), LinuxResources::default());
    if all.cpu() != old.cpu() {
        resources.set_cpu(all.cpu().clone());
        before.set_cpu(Some(cpu_before(&old)));
    }
    if all.memory() != old.memory() {
        resources.set_memory(*all.memory());
        before.set_memory(Some(memory_before(&old, host)));
    }
    // A file of the cgroup may hold what cpu or memory write too: give both, the file last.
    if resources != LinuxResources::default() || all.unified() != old.unified() {
        resources.set_unified(all.unified().clone());
        before.set_unified(old.unified().clone());
    }
    let asks_runtime = resources != LinuxResources::default();
    let changed = all.hugepage_limits() != old.hugepage_limits();
    let hugepages = all.hugepage_limits().clone().filter(|_| changed || asks_runtime).unwrap_or_default();

    // Nothing fails from here on.
    if let Some(linux) = spec.linux_mut() {
        linux.set_resources(Some(all));
    }
    if let (Some(score), Some(process)) = (oom_score_adj, spec.process_mut()) {
        process.set_oom_score_adj(Some(score.to));
    }
    Ok(Update { resources, before, hugepages, oom_score_adj: oom_score_adj.filter(|score| score.from != score.to), warnings })
}

fn cpu_before(old: &LinuxResources) -> LinuxCpu {
    let mut cpu = old.cpu().clone().unwrap_or_default();
    let (shares, period, quota) = (cpu.shares().unwrap_or(1024), cpu.period().unwrap_or(100_000), cpu.quota().unwrap_or(-1));
    cpu.set_shares(Some(shares)).set_period(Some(period)).set_quota(Some(quota));
    cpu
}

fn memory_before(old: &LinuxResources, host: &HostFacts) -> LinuxMemory {
    let mut memory = old.memory().unwrap_or_default();
    let swap = memory.swap().or(host.swap_accounting.then_some(-1));
    let limit = memory.limit().unwrap_or(-1);
    memory.set_limit(Some(limit)).set_swap(swap);
    memory
}

/// What a container has been told in all: a request over what came before. 0 and "" mean unchanged.
pub fn merge(now: &mut LinuxContainerResources, new: &LinuxContainerResources) {
    macro_rules! numbers {
        ($($field:ident),*) => {$( if new.$field != 0 { now.$field = new.$field; } )*};
    }
    numbers!(cpu_period, cpu_quota, cpu_shares, memory_limit_in_bytes, memory_swap_limit_in_bytes, oom_score_adj);
    for (now, new) in [(&mut now.cpuset_cpus, &new.cpuset_cpus), (&mut now.cpuset_mems, &new.cpuset_mems)] {
        if !new.is_empty() {
            now.clone_from(new);
        }
    }
    for limit in &new.hugepage_limits {
        now.hugepage_limits.retain(|l| l.page_size != limit.page_size);
        now.hugepage_limits.push(limit.clone());
    }
    now.unified.extend(new.unified.clone());
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{host, Fixture};
    use super::super::tests::page_limit;
    use super::*;
    use crate::error::Code;

    fn limited() -> Spec {
        let mut fixture = Fixture::new();
        *fixture.resources() = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            memory_limit_in_bytes: 100,
            hugepage_limits: vec![page_limit("2MB", 0)],
            ..Default::default()
        };
        fixture.build().0
    }

    fn resources(spec: &Spec) -> LinuxResources {
        spec.linux().clone().unwrap().resources().clone().unwrap()
    }

    #[test]
    fn update_keeps_what_is_not_said() {
        let mut spec = limited();
        let new = LinuxContainerResources { cpu_quota: 20_000, hugepage_limits: vec![page_limit("2MB", 0)], ..Default::default() };
        let update = update_resources(&mut spec, &new, &host()).unwrap();
        let cpu = update.resources.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(20_000), Some(100_000)));
        assert!(update.resources.memory().is_none() && update.resources.devices().is_none());
        assert_eq!(update.oom_score_adj, None);
        assert_eq!(resources(&spec).memory().unwrap().limit(), Some(100));
        assert_eq!(resources(&spec).cpu().clone().unwrap().quota(), Some(20_000));
    }

    #[test]
    fn what_takes_an_update_back() {
        let mut spec = limited();
        let new = LinuxContainerResources { cpu_shares: 300, memory_limit_in_bytes: 200, ..Default::default() };
        let before = update_resources(&mut spec, &new, &host()).unwrap().before;
        let cpu = before.cpu().clone().unwrap();
        assert_eq!((cpu.shares(), cpu.quota(), cpu.period(), cpu.cpus()), (Some(1024), Some(50_000), Some(100_000), &None));
        assert_eq!((before.memory().unwrap().limit(), before.memory().unwrap().swap()), (Some(100), Some(100)));

        let mut spec = Fixture::new().build().0;
        let host = HostFacts { swap_accounting: false, ..host() };
        let memory = update_resources(&mut spec, &new, &host).unwrap().before.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(-1), None));
    }

    #[test]
    fn update_of_a_memory_limit_takes_an_equal_swap_limit_along() {
        let mut spec = limited();
        let limit =
            |bytes, swap| LinuxContainerResources { memory_limit_in_bytes: bytes, memory_swap_limit_in_bytes: swap, ..Default::default() };
        let memory = update_resources(&mut spec, &limit(300, 0), &host()).unwrap().resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(300), Some(300)));
        update_resources(&mut spec, &limit(0, 400), &host()).unwrap();
        let memory = update_resources(&mut spec, &limit(350, 0), &host()).unwrap().resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(350), Some(400)));
        assert_eq!(update_resources(&mut spec, &limit(500, 0), &host()).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn huge_pages_change_by_size() {
        let mut spec = limited();
        let new = LinuxContainerResources { hugepage_limits: vec![page_limit("1GB", 1 << 30)], ..Default::default() };
        let update = update_resources(&mut spec, &new, &host()).unwrap();
        assert_eq!(update.resources, LinuxResources::default(), "the runtime has no part in it");
        let all = |limits: &[LinuxHugepageLimit]| limits.iter().map(|l| (l.page_size().clone(), l.limit())).collect::<Vec<_>>();
        assert_eq!(all(&update.hugepages), [("2MB".into(), 0), ("1GB".into(), 1 << 30)]);
        assert_eq!(resources(&spec).hugepage_limits().as_ref().unwrap(), &update.hugepages);

        let new = LinuxContainerResources { hugepage_limits: vec![page_limit("2MB", 4 << 20)], ..Default::default() };
        assert_eq!(all(&update_resources(&mut spec, &new, &host()).unwrap().hugepages), [("1GB".into(), 1 << 30), ("2MB".into(), 4 << 20)]);
        assert!(update_resources(&mut spec, &new, &host()).unwrap().hugepages.is_empty(), "nothing changed");
        let cpu = LinuxContainerResources { cpu_shares: 7, ..Default::default() };
        assert_eq!(update_resources(&mut spec, &cpu, &host()).unwrap().hugepages.len(), 2, "runc would set them back");
        let unknown = LinuxContainerResources { hugepage_limits: vec![page_limit("64KB", 1)], ..Default::default() };
        assert_eq!(update_resources(&mut spec, &unknown, &host()).unwrap_err().code(), Code::FailedPrecondition);
    }

    #[test]
    fn failed_update_changes_nothing() {
        let mut spec = limited();
        let before = spec.clone();
        let bad = [
            LinuxContainerResources { cpu_quota: 7000, cpuset_cpus: "x".into(), ..Default::default() },
            LinuxContainerResources { cpu_quota: 7000, oom_score_adj: 2000, ..Default::default() },
            LinuxContainerResources { cpu_quota: 7000, hugepage_limits: vec![page_limit("64KB", 1 << 21)], ..Default::default() },
        ];
        for new in bad {
            update_resources(&mut spec, &new, &host()).unwrap_err();
            assert_eq!(spec, before);
        }
    }

    #[test]
    fn update_of_the_oom_score_is_handed_back() {
        let mut spec = limited();
        let new = LinuxContainerResources { oom_score_adj: 20, ..Default::default() };
        let update = update_resources(&mut spec, &new, &host()).unwrap();
        assert_eq!(update.oom_score_adj, Some(OomScoreAdj { from: 0, to: 20 }));
        let new = LinuxContainerResources { oom_score_adj: -20, ..Default::default() };
        let floor = HostFacts { oom_score_adj_floor: 5, ..host() };
        let update = update_resources(&mut spec, &new, &floor).unwrap();
        assert_eq!((update.oom_score_adj, update.warnings.len()), (Some(OomScoreAdj { from: 20, to: 5 }), 1));
        assert_eq!(update.resources, LinuxResources::default());
        assert_eq!(spec.process().clone().unwrap().oom_score_adj(), Some(5));
    }

    #[test]
    fn zero_and_empty_mean_unchanged() {
        let mut now = LinuxContainerResources { cpu_shares: 100, cpuset_cpus: "0".into(), memory_limit_in_bytes: 5, ..Default::default() };
        merge(&mut now, &LinuxContainerResources { cpu_shares: 200, cpuset_mems: "0".into(), ..Default::default() });
        assert_eq!((now.cpu_shares, now.memory_limit_in_bytes, now.cpuset_cpus.as_str(), now.cpuset_mems.as_str()), (200, 5, "0", "0"));
    }
}
