//! CPU and memory: numbers of a request over what is there, checked as the kernel will check them.

use std::ops::RangeInclusive;

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::super::HostFacts;
use crate::api::runtime::LinuxContainerResources;
use crate::error::{Error, Result};
use crate::sys::cpulist::CpuList;

/// Writing this file sets what `memory.swap` would.
const SWAP_FILE: &str = "memory.swap.max";
/// What cpu.shares may be; the kernel moves others to the nearest (sched.h, MIN_SHARES and MAX_SHARES), OCI runtimes refuse
/// them or compute nonsense for v2.
const CPU_SHARES: RangeInclusive<u64> = 2..=262_144;
/// Microseconds that a period may have, and the least quota (kernel/sched/core.c, max_cfs_quota_period and its minimum).
const CPU_PERIOD: RangeInclusive<u64> = 1_000..=1_000_000;
const LEAST_QUOTA: i64 = 1_000;

pub(super) fn apply_cpu(all: &mut LinuxResources, asked: &LinuxContainerResources) -> Result<()> {
    let mut cpu = all.cpu().clone().unwrap_or_default();
    if let Some(period) = positive("cpu_period", asked.cpu_period)? {
        if !CPU_PERIOD.contains(&period) {
            return Err(Error::invalid(format!("cpu_period: expected {} to {} us, found {period}", CPU_PERIOD.start(), CPU_PERIOD.end())));
        }
        cpu.set_period(Some(period));
    }
    if let Some(shares) = positive("cpu_shares", asked.cpu_shares)? {
        cpu.set_shares(Some(shares.clamp(*CPU_SHARES.start(), *CPU_SHARES.end())));
    }
    if let Some(quota) = limit("cpu_quota", asked.cpu_quota)? {
        if (0..LEAST_QUOTA).contains(&quota) {
            return Err(Error::invalid(format!("cpu_quota: expected at least {LEAST_QUOTA} us, or -1 for none, found {quota}")));
        }
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
pub(super) fn apply_memory(
    all: &mut LinuxResources,
    asked: &LinuxContainerResources,
    host: &HostFacts,
    warnings: &mut Vec<String>,
) -> Result<()> {
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

/// Numbers of memory that could be limits.
pub(super) fn check_memory(asked: &LinuxContainerResources) -> Result<()> {
    limit("memory_limit_in_bytes", asked.memory_limit_in_bytes)?;
    limit("memory_swap_limit_in_bytes", asked.memory_swap_limit_in_bytes).map(drop)
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
    match CpuList::parse(value) {
        _ if value.is_empty() => Ok(None),
        Some(list) if !list.is_empty() && !value.ends_with('\n') => Ok(Some(value.to_owned())),
        _ => Err(Error::invalid(format!("{field}: {value:?} is not a list"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::Fixture;
    use super::super::tests::resources_of;
    use super::*;
    use crate::error::Code;

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
        let cases: [(&str, Change); 16] = [
            ("cpu_period", |r| r.cpu_period = -1),
            ("cpu_period", |r| r.cpu_period = 999),
            ("cpu_period", |r| r.cpu_period = 1_000_001),
            ("cpu_shares", |r| r.cpu_shares = -2),
            ("cpu_quota", |r| r.cpu_quota = -2),
            ("cpu_quota", |r| r.cpu_quota = 999),
            ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -2),
            ("cpuset_cpus", |r| r.cpuset_cpus = "0-".into()),
            ("cpuset_cpus", |r| r.cpuset_cpus = "3-1".into()),
            ("cpuset_cpus", |r| r.cpuset_cpus = "0\n".into()),
            ("cpuset_cpus", |r| r.cpuset_cpus = "\n".into()),
            ("cpuset_mems", |r| r.cpuset_mems = "../x".into()),
            ("memory_swap_limit_in_bytes", |r| r.memory_swap_limit_in_bytes = 5),
            ("memory_swap_limit_in_bytes", |r| r.memory_swap_limit_in_bytes = -7),
            ("memory_swap_limit_in_bytes", |r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (9, 5)),
            ("memory_swap_limit_in_bytes", |r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (-1, 5)),
        ];
        for (field, change) in cases {
            let mut fixture = Fixture::new();
            change(fixture.resources());
            let error = fixture.error();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
    }

    #[test]
    fn shares_are_moved_to_what_the_kernel_has() {
        for (asked, given) in [(1, 2), (2, 2), (300_000, 262_144)] {
            let mut fixture = Fixture::new();
            fixture.resources().cpu_shares = asked;
            assert_eq!(resources_of(&mut fixture).cpu().as_ref().unwrap().shares(), Some(given));
        }
    }

    #[test]
    fn no_limit_is_minus_one() {
        let mut fixture = Fixture::new();
        (fixture.resources().cpu_quota, fixture.resources().memory_limit_in_bytes) = (-1, -1);
        let resources = resources_of(&mut fixture);
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), None, "a new cgroup has none");
        assert_eq!((resources.memory().unwrap().limit(), resources.memory().unwrap().swap()), (Some(-1), Some(-1)));
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
        fixture.set_v2();
        fixture.resources().memory_limit_in_bytes = 100;
        fixture.resources().unified.insert("memory.swap.max".into(), "7".into());
        let resources = resources_of(&mut fixture);
        assert_eq!(resources.memory().unwrap().swap(), None);
        assert_eq!(resources.unified().as_ref().unwrap()["memory.swap.max"], "7");
    }
}
