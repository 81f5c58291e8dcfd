//! cgroup limits and device rules, and what an update of them changes.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{
    LinuxCpu, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType as Kind, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources, Spec,
};

use super::{process, HostFacts, Inputs};
use crate::api::runtime::LinuxContainerResources;
use crate::error::{Error, Result};

/// A device of the host, ready for a container (`container::devices`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedDevice {
    /// Where the container sees it.
    pub path: PathBuf,
    pub block: bool,
    pub major: i64,
    pub minor: i64,
    /// Permission bits of the node.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Some of r, w and m.
    pub access: String,
}

/// What an update changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// For `runtime update --resources -`: the whole new state of what changed or belongs to it, since runtimes fill in
    /// defaults for what is missing beside it.
    pub resources: LinuxResources,
    /// To be written to /proc/PID/oom_score_adj of the container's processes: runtimes do not.
    pub oom_score_adj: Option<i32>,
    pub warnings: Vec<String>,
}

/// Writing this file sets what `memory.swap` would.
const SWAP_FILE: &str = "memory.swap.max";

/// Present in each container, whatever was asked: null, zero, full, tty, random, urandom, console's slaves and ptmx.
const USUAL_DEVICES: [(i64, Option<i64>); 8] =
    [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(2)), (136, None)];

pub(super) fn resources(inputs: &Inputs, warnings: &mut Vec<String>) -> Result<LinuxResources> {
    let asked = &inputs.config.linux.resources;
    let mut all = LinuxResources::default();
    apply(&mut all, asked, inputs.host, warnings)?;
    all.set_hugepage_limits(hugepages(asked, inputs.host)?);
    all.set_devices(Some(device_rules(inputs)));
    if let Some(limit) = inputs.defaults.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        all.set_pids(Some(pids));
    }
    Ok(all)
}

/// Puts an update into the spec. 0 and "" mean unchanged. On an error the spec is as it was.
pub fn update_resources(spec: &mut Spec, new: &LinuxContainerResources, host: &HostFacts) -> Result<Update> {
    let mut warnings = Vec::new();
    let mut all = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let old = all.clone();
    apply(&mut all, new, host, &mut warnings)?;
    let limits = hugepages(new, host)?;
    let present = old.hugepage_limits().as_deref().unwrap_or_default();
    if let Some(changed) = limits.iter().flatten().find(|limit| !present.contains(limit)) {
        // runc leaves them out of updates without a word.
        return Err(Error::unimplemented(format!("hugepage_limits: {} cannot change after creation", changed.page_size())));
    }
    let oom_score_adj = match new.oom_score_adj {
        0 => None,
        asked => Some(process::oom_score_adj(asked, host, &mut warnings)?),
    };

    let mut changed = LinuxResources::default();
    changed.set_cpu(all.cpu().clone().filter(|_| all.cpu() != old.cpu()));
    changed.set_memory((*all.memory()).filter(|_| all.memory() != old.memory()));
    // A file of the cgroup may hold what cpu or memory write too: give both, the file last.
    let touched = changed.cpu().is_some() || changed.memory().is_some() || all.unified() != old.unified();
    changed.set_unified(all.unified().clone().filter(|_| touched));

    // Nothing fails from here on.
    if let Some(linux) = spec.linux_mut() {
        linux.set_resources(Some(all));
    }
    if let (Some(score), Some(process)) = (oom_score_adj, spec.process_mut()) {
        process.set_oom_score_adj(Some(score));
    }
    Ok(Update { resources: changed, oom_score_adj, warnings })
}

/// cpu, memory and unified of a request over what is there.
fn apply(all: &mut LinuxResources, asked: &LinuxContainerResources, host: &HostFacts, warnings: &mut Vec<String>) -> Result<()> {
    if let Some(unified) = unified(asked, host)? {
        all.unified_mut().get_or_insert_with(HashMap::new).extend(unified);
    }
    apply_cpu(all, asked)?;
    apply_memory(all, asked, host, warnings)
}

fn apply_cpu(all: &mut LinuxResources, asked: &LinuxContainerResources) -> Result<()> {
    let mut cpu = all.cpu().clone().unwrap_or_default();
    if let Some(period) = positive("cpu_period", asked.cpu_period)? {
        cpu.set_period(Some(period));
    }
    if let Some(shares) = positive("cpu_shares", asked.cpu_shares)? {
        cpu.set_shares(Some(shares));
    }
    if let Some(quota) = limit("cpu_quota", asked.cpu_quota)? {
        cpu.set_quota(Some(quota));
    }
    if let Some(cpus) = list("cpuset_cpus", &asked.cpuset_cpus)? {
        cpu.set_cpus(Some(cpus));
    }
    if let Some(mems) = list("cpuset_mems", &asked.cpuset_mems)? {
        cpu.set_mems(Some(mems));
    }
    all.set_cpu(Some(cpu).filter(|cpu| *cpu != LinuxCpu::default()));
    Ok(())
}

/// Without a swap limit of its own a memory limit is one of both together: no swap.
fn apply_memory(all: &mut LinuxResources, asked: &LinuxContainerResources, host: &HostFacts, warnings: &mut Vec<String>) -> Result<()> {
    let mut memory = all.memory().unwrap_or_default();
    let swap_equals_limit = memory.swap().is_none() || memory.swap() == memory.limit();
    let swap_file = all.unified().as_ref().is_some_and(|files| files.contains_key(SWAP_FILE));

    let asked_limit = limit("memory_limit_in_bytes", asked.memory_limit_in_bytes)?;
    if let Some(bytes) = asked_limit {
        memory.set_limit(Some(bytes));
    }
    match limit("memory_swap_limit_in_bytes", asked.memory_swap_limit_in_bytes)? {
        Some(_) if !host.swap_accounting => {
            warnings.push("memory_swap_limit_in_bytes not set: the kernel does not account swap".to_owned());
        }
        Some(bytes) => drop(memory.set_swap(Some(bytes))),
        None if asked_limit.is_some() && swap_equals_limit && host.swap_accounting && !swap_file => drop(memory.set_swap(asked_limit)),
        None => {}
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap > 0) {
        let limit = memory.limit().unwrap_or_default();
        if limit == 0 {
            return Err(Error::invalid("memory_swap_limit_in_bytes: needs a memory limit"));
        }
        if limit < 0 || swap < limit {
            return Err(Error::invalid(format!("memory_swap_limit_in_bytes: {swap} is below the memory limit {limit}")));
        }
    }
    all.set_memory(Some(memory).filter(|memory| *memory != LinuxMemory::default()));
    Ok(())
}

/// Files of the cgroup itself, on v2 alone.
fn unified(asked: &LinuxContainerResources, host: &HostFacts) -> Result<Option<HashMap<String, String>>> {
    if asked.unified.is_empty() {
        return Ok(None);
    }
    if !host.cgroup_v2 {
        return Err(Error::precondition("unified: this host has cgroup v1"));
    }
    let is_name = |key: &str| key.contains('.') && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    match asked.unified.keys().find(|key| !is_name(key) || key.starts_with('.')) {
        Some(key) => Err(Error::invalid(format!("unified: {key:?} is not a cgroup file"))),
        None => Ok(Some(asked.unified.iter().map(|(key, value)| (key.clone(), value.clone())).collect())),
    }
}

/// kubelet sends a limit for each size, mostly 0. A limit of 0 that cannot be set is left out: on a host without that size
/// there is nothing to limit, and without the controller containers always could take what is free.
fn hugepages(asked: &LinuxContainerResources, host: &HostFacts) -> Result<Option<Vec<LinuxHugepageLimit>>> {
    let mut limits = Vec::new();
    for wanted in &asked.hugepage_limits {
        let size = &wanted.page_size;
        let known = host.hugepage_sizes.contains(size);
        if !known || !host.hugetlb_controller {
            if wanted.limit == 0 {
                continue;
            }
            let why = if known { "there is no hugetlb cgroup controller" } else { "the host has no pages of this size" };
            return Err(Error::precondition(format!("hugepage_limits: {size}: {why}")));
        }
        let bytes = i64::try_from(wanted.limit).map_err(|_| Error::invalid(format!("hugepage_limits: {size}: limit too large")))?;
        let mut limit = LinuxHugepageLimit::default();
        limit.set_page_size(size.clone()).set_limit(bytes);
        limits.push(limit);
    }
    Ok(Some(limits).filter(|limits| !limits.is_empty()))
}

/// Nothing but the usual ones and those asked for; everything for a privileged container. Making nodes is the business of
/// CAP_MKNOD: a node without a rule cannot be opened.
fn device_rules(inputs: &Inputs) -> Vec<LinuxDeviceCgroup> {
    if inputs.privileged() {
        return vec![rule(true, None, None, None, "rwm")];
    }
    let mut rules = vec![rule(false, None, None, None, "rwm"), rule(true, Some(Kind::C), None, None, "m")];
    rules.push(rule(true, Some(Kind::B), None, None, "m"));
    rules.extend(USUAL_DEVICES.map(|(major, minor)| rule(true, Some(Kind::C), Some(major), minor, "rwm")));
    rules
        .extend(inputs.devices.iter().map(|device| rule(true, Some(kind(device)), Some(device.major), Some(device.minor), &device.access)));
    rules
}

fn rule(allow: bool, kind: Option<Kind>, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_typ(kind).set_major(major).set_minor(minor).set_access(Some(access.to_owned()));
    rule
}

/// The nodes to make in the container's /dev.
pub(super) fn device_nodes(devices: &[ResolvedDevice]) -> Vec<LinuxDevice> {
    let node = |device: &ResolvedDevice| {
        let mut node = LinuxDevice::default();
        node.set_path(device.path.clone())
            .set_typ(kind(device))
            .set_major(device.major)
            .set_minor(device.minor)
            .set_file_mode(Some(device.mode))
            .set_uid(Some(device.uid))
            .set_gid(Some(device.gid));
        node
    };
    devices.iter().map(node).collect()
}

fn kind(device: &ResolvedDevice) -> Kind {
    match device.block {
        true => Kind::B,
        false => Kind::C,
    }
}

/// None for 0, which means "not said".
fn positive(field: &str, value: i64) -> Result<Option<u64>> {
    match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Error::invalid(format!("{field}: {value} is negative"))),
    }
}

/// None for 0, which means "not said"; -1 is "no limit".
fn limit(field: &str, value: i64) -> Result<Option<i64>> {
    match value {
        0 => Ok(None),
        -1.. => Ok(Some(value)),
        _ => Err(Error::invalid(format!("{field}: {value} is not a limit"))),
    }
}

/// A list of numbers and ranges as the kernel takes it.
fn list(field: &str, value: &str) -> Result<Option<String>> {
    if value.is_empty() {
        return Ok(None);
    }
    let number = |text: &str| text.parse::<u16>().is_ok() && text.bytes().all(|b| b.is_ascii_digit());
    let range = |part: &str| match part.split_once('-') {
        Some((from, to)) => number(from) && number(to),
        None => number(part),
    };
    match value.split(',').all(range) {
        true => Ok(Some(value.to_owned())),
        false => Err(Error::invalid(format!("{field}: {value:?} is not a list"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{host, Fixture};
    use super::*;
    use crate::api::runtime::HugepageLimit;
    use crate::error::Code;

    fn resources_of(fixture: &mut Fixture) -> LinuxResources {
        fixture.build().0.linux().clone().unwrap().resources().clone().unwrap()
    }

    #[test]
    fn nothing_asked_sets_nothing_but_devices() {
        let resources = resources_of(&mut Fixture::new());
        assert!(resources.cpu().is_none() && resources.memory().is_none() && resources.pids().is_none());
        assert!(resources.unified().is_none() && resources.hugepage_limits().is_none());
    }

    #[test]
    fn limits_are_taken_over() {
        let mut fixture = Fixture::new();
        *fixture.resources() = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            cpuset_cpus: "0-1,3".into(),
            cpuset_mems: "0".into(),
            memory_limit_in_bytes: 1 << 26,
            ..Default::default()
        };
        fixture.defaults.pids_limit = Some(100);
        let resources = resources_of(&mut fixture);
        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!((cpu.period(), cpu.quota(), cpu.shares()), (Some(100_000), Some(50_000), Some(512)));
        assert_eq!((cpu.cpus().as_deref(), cpu.mems().as_deref()), (Some("0-1,3"), Some("0")));
        let memory = resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(1 << 26), Some(1 << 26)));
        assert_eq!(resources.pids().unwrap().limit(), 100);
    }

    #[test]
    fn wrong_numbers_are_refused_by_name() {
        type Change = fn(&mut LinuxContainerResources);
        let cases: [(&str, Change); 8] = [
            ("cpu_period", |r| r.cpu_period = -1),
            ("cpu_shares", |r| r.cpu_shares = -2),
            ("cpu_quota", |r| r.cpu_quota = -2),
            ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -2),
            ("cpuset_cpus", |r| r.cpuset_cpus = "0-".into()),
            ("cpuset_mems", |r| r.cpuset_mems = "../x".into()),
            ("memory_swap_limit_in_bytes", |r| r.memory_swap_limit_in_bytes = 5),
            ("memory_swap_limit_in_bytes", |r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (9, 5)),
        ];
        for (field, change) in cases {
            let mut fixture = Fixture::new();
            change(fixture.resources());
            let error = fixture.error();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
    }

    #[test]
    fn swap_follows_the_limit_only_where_it_is_accounted() {
        let mut fixture = Fixture::new();
        fixture.resources().memory_limit_in_bytes = 100;
        fixture.resources().memory_swap_limit_in_bytes = 150;
        assert_eq!(resources_of(&mut fixture).memory().unwrap().swap(), Some(150));
        fixture.host.swap_accounting = false;
        let (spec, warnings) = fixture.build();
        let memory = spec.linux().clone().unwrap().resources().clone().unwrap().memory().unwrap();
        assert_eq!((memory.limit(), memory.swap(), warnings.len()), (Some(100), None, 1));
        fixture.resources().memory_swap_limit_in_bytes = 0;
        assert!(fixture.build().1.is_empty());
    }

    #[test]
    fn swap_file_of_v2_wins_over_the_default() {
        let mut fixture = Fixture::new();
        fixture.host.cgroup_v2 = true;
        fixture.resources().memory_limit_in_bytes = 100;
        fixture.resources().unified.insert("memory.swap.max".into(), "7".into());
        let resources = resources_of(&mut fixture);
        assert_eq!(resources.memory().unwrap().swap(), None);
        assert_eq!(resources.unified().as_ref().unwrap()["memory.swap.max"], "7");
    }

    #[test]
    fn unified_needs_v2_and_file_names() {
        let mut fixture = Fixture::new();
        fixture.resources().unified.insert("memory.high".into(), "7".into());
        assert_eq!(fixture.error().code(), Code::FailedPrecondition);
        fixture.host.cgroup_v2 = true;
        fixture.build();
        for bad in ["../memory.high", "memory", "a/b.c", "..", ""] {
            fixture.resources().unified.insert(bad.into(), "7".into());
            assert_eq!(fixture.error().code(), Code::InvalidArgument, "{bad}");
            fixture.resources().unified.remove(bad);
        }
    }

    fn page_limit(size: &str, limit: u64) -> HugepageLimit {
        HugepageLimit { page_size: size.into(), limit, ..Default::default() }
    }

    #[test]
    fn hugepage_limits_of_the_hosts_sizes() {
        let mut fixture = Fixture::new();
        fixture.resources().hugepage_limits = vec![page_limit("2MB", 1 << 21), page_limit("1GB", 0), page_limit("64KB", 0)];
        let limits = resources_of(&mut fixture).hugepage_limits().clone().unwrap();
        assert_eq!(limits.iter().map(|l| (l.page_size().as_str(), l.limit())).collect::<Vec<_>>(), [("2MB", 1 << 21), ("1GB", 0)]);

        fixture.host.hugetlb_controller = false;
        let error = fixture.error();
        assert!(error.code() == Code::FailedPrecondition && error.message().contains("2MB"), "{error}");
        fixture.resources().hugepage_limits = vec![page_limit("2MB", 0)];
        assert!(resources_of(&mut fixture).hugepage_limits().is_none());
        fixture.resources().hugepage_limits = vec![page_limit("64KB", 1)];
        assert!(fixture.error().message().contains("64KB"));
    }

    fn device(path: &str) -> ResolvedDevice {
        ResolvedDevice { path: path.into(), block: true, major: 7, minor: 1, mode: 0o660, uid: 0, gid: 6, access: "r".into() }
    }

    #[test]
    fn devices_are_denied_but_for_the_usual_and_the_requested() {
        let mut fixture = Fixture::new();
        fixture.devices = vec![device("/dev/loop1")];
        let (spec, _) = fixture.build();
        let linux = spec.linux().clone().unwrap();
        let rules: Vec<_> = linux.resources().clone().unwrap().devices().clone().unwrap();
        let text: Vec<_> = rules.iter().map(|r| format!("{} {r}", r.allow())).collect();
        assert_eq!(text[0], "false a *:* rwm");
        assert!(text.contains(&"true c 1:3 rwm".to_string()) && text.contains(&"true c 136:* rwm".to_string()));
        assert_eq!(text.last().unwrap(), "true b 7:1 r");
        let node = &linux.devices().clone().unwrap()[0];
        assert_eq!((node.path().to_str(), node.typ(), node.file_mode(), node.gid()), (Some("/dev/loop1"), Kind::B, Some(0o660), Some(6)));
    }

    #[test]
    fn privileged_may_use_every_device() {
        let mut fixture = Fixture::new();
        fixture.set_privileged();
        let rules = resources_of(&mut fixture).devices().clone().unwrap();
        assert_eq!(rules.iter().map(|r| format!("{} {r}", r.allow())).collect::<Vec<_>>(), ["true a *:* rwm"]);
    }

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

    #[test]
    fn update_keeps_what_is_not_said() {
        let mut spec = limited();
        let new = LinuxContainerResources { cpu_quota: 20_000, hugepage_limits: vec![page_limit("2MB", 0)], ..Default::default() };
        let update = update_resources(&mut spec, &new, &host()).unwrap();
        let cpu = update.resources.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(20_000), Some(100_000)));
        assert!(update.resources.memory().is_none() && update.resources.devices().is_none());
        assert_eq!(update.oom_score_adj, None);
        let resources = spec.linux().clone().unwrap().resources().clone().unwrap();
        assert_eq!(resources.memory().unwrap().limit(), Some(100));
        assert_eq!(resources.cpu().clone().unwrap().quota(), Some(20_000));
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
    fn failed_update_changes_nothing() {
        let mut spec = limited();
        let before = spec.clone();
        let bad = [
            LinuxContainerResources { cpu_quota: 7, cpuset_cpus: "x".into(), ..Default::default() },
            LinuxContainerResources { cpu_quota: 7, oom_score_adj: 2000, ..Default::default() },
            LinuxContainerResources { cpu_quota: 7, hugepage_limits: vec![page_limit("2MB", 1 << 21)], ..Default::default() },
        ];
        for new in bad {
            update_resources(&mut spec, &new, &host()).unwrap_err();
            assert_eq!(spec, before);
        }
    }

    #[test]
    fn update_of_the_oom_score_is_handed_back() {
        let mut spec = limited();
        let new = LinuxContainerResources { oom_score_adj: -20, ..Default::default() };
        let floor = HostFacts { oom_score_adj_floor: 0, ..host() };
        let update = update_resources(&mut spec, &new, &floor).unwrap();
        assert_eq!((update.oom_score_adj, update.warnings.len()), (Some(0), 1));
        assert_eq!(update.resources, LinuxResources::default());
        assert_eq!(spec.process().clone().unwrap().oom_score_adj(), Some(0));
    }
}
