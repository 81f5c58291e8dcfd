//! Memory: v1 memory.usage_in_bytes and memory.stat, v2 memory.current, memory.stat and the limits.

use super::number::{number, pairs};

/// Bytes unless said otherwise, of the cgroup and all below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Everything charged, caches too.
    pub usage: Option<u64>,
    /// The lowest limit that holds; absent without one. v1 without a limit says a number near 2^63: see `limit_below`.
    pub limit: Option<u64>,
    /// Anonymous memory.
    pub rss: Option<u64>,
    pub cache: Option<u64>,
    pub mapped_file: Option<u64>,
    pub inactive_file: Option<u64>,
    pub active_file: Option<u64>,
    /// Memory of the kernel for this cgroup; v1 has it in a file of its own, not read here.
    pub kernel: Option<u64>,
    pub swap: Option<u64>,
    /// Swap alone, without memory; absent without a limit.
    pub swap_limit: Option<u64>,
    /// Counts.
    pub faults: Option<u64>,
    pub major_faults: Option<u64>,
    /// Counts without those of cgroups below: v1 alone knows them.
    pub own_faults: Option<u64>,
    pub own_major_faults: Option<u64>,
}

/// What costs more files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct More {
    /// Highest usage since the cgroup exists.
    pub max_usage: Option<u64>,
    /// How often the limit was hit.
    pub failures: Option<u64>,
    pub kernel: Option<u64>,
    /// Processes that the OOM killer took: v1 without cgroups below.
    pub oom_kills: Option<u64>,
}

/// Limits as set on this cgroup alone; absent without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub limit: Option<u64>,
    /// v1 soft limit, v2 memory.low.
    pub reservation: Option<u64>,
    /// Memory and swap together.
    pub memory_and_swap: Option<u64>,
}

/// v1 says "no limit" with 2^63 rounded down to pages; no machine has half of that.
const V1_UNLIMITED: u64 = 1 << 62;

/// A v1 limit.
fn limit_v1(value: u64) -> Option<u64> {
    (value < V1_UNLIMITED).then_some(value)
}

impl Memory {
    /// v1: memory.usage_in_bytes and memory.stat.
    pub fn v1(usage: &str, stat: &str) -> Memory {
        let mut m = Memory { usage: number(usage), ..Memory::default() };
        let (mut memory_and_swap, mut seen) = (None, false);
        for (key, value) in pairs(stat) {
            let slot = match key {
                "total_rss" => &mut m.rss,
                "total_cache" => &mut m.cache,
                "total_mapped_file" => &mut m.mapped_file,
                "total_inactive_file" => &mut m.inactive_file,
                "total_active_file" => &mut m.active_file,
                "total_swap" => &mut m.swap,
                "total_pgfault" => &mut m.faults,
                "total_pgmajfault" => &mut m.major_faults,
                "pgfault" => &mut m.own_faults,
                "pgmajfault" => &mut m.own_major_faults,
                "hierarchical_memory_limit" => {
                    m.limit = limit_v1(value);
                    continue;
                }
                "hierarchical_memsw_limit" => {
                    (memory_and_swap, seen) = (limit_v1(value), true);
                    continue;
                }
                _ => continue,
            };
            *slot = Some(value);
        }
        if seen {
            // Without a memory limit there is no telling how much of the sum is for swap.
            m.swap_limit = memory_and_swap.zip(m.limit).map(|(both, memory)| both.saturating_sub(memory));
        }
        m
    }

    /// v2: memory.current, memory.stat, memory.max, memory.swap.current, memory.swap.max. Empty texts are missing files.
    pub fn v2(current: &str, stat: &str, max: &str, swap_current: &str, swap_max: &str) -> Memory {
        let mut m = Memory {
            usage: number(current),
            limit: number(max),
            swap: number(swap_current),
            swap_limit: number(swap_max),
            ..Memory::default()
        };
        for (key, value) in pairs(stat) {
            let slot = match key {
                "anon" => &mut m.rss,
                "file" => &mut m.cache,
                "file_mapped" => &mut m.mapped_file,
                "inactive_file" => &mut m.inactive_file,
                "active_file" => &mut m.active_file,
                "kernel" => &mut m.kernel,
                "pgfault" => &mut m.faults,
                "pgmajfault" => &mut m.major_faults,
                _ => continue,
            };
            *slot = Some(value);
        }
        m
    }

    /// Usage less the inactive file cache, never negative: the two are read one after the other.
    pub fn working_set(&self) -> Option<u64> {
        Some(self.usage?.saturating_sub(self.inactive_file.unwrap_or(0)))
    }

    /// The limit, if it is below `host`, the memory there is.
    pub fn limit_below(&self, host: u64) -> Option<u64> {
        self.limit.filter(|limit| *limit < host)
    }

    /// What can still be used before the limit; absent without a limit below `host`.
    pub fn available(&self, host: u64) -> Option<u64> {
        Some(self.limit_below(host)?.saturating_sub(self.working_set()?))
    }

    /// Swap that can still be used; absent without a limit.
    pub fn swap_available(&self) -> Option<u64> {
        Some(self.swap_limit?.saturating_sub(self.swap?))
    }
}

/// v1: memory.max_usage_in_bytes, memory.failcnt, memory.kmem.usage_in_bytes, memory.oom_control.
pub fn more_v1(max_usage: &str, failcnt: &str, kernel: &str, oom_control: &str) -> More {
    More {
        max_usage: number(max_usage),
        failures: number(failcnt),
        kernel: number(kernel),
        oom_kills: pairs(oom_control).find(|(key, _)| *key == "oom_kill").map(|(_, n)| n),
    }
}

/// v2: memory.peak, memory.events, and the kernel's part of memory.stat.
pub fn more_v2(peak: &str, events: &str, stat: &str) -> More {
    let event = |name: &str| pairs(events).find(|(key, _)| *key == name).map(|(_, n)| n);
    let kernel = pairs(stat).find(|(key, _)| *key == "kernel").map(|(_, n)| n);
    More { max_usage: number(peak), failures: event("max"), kernel, oom_kills: event("oom_kill") }
}

/// v1: memory.limit_in_bytes, memory.soft_limit_in_bytes, memory.memsw.limit_in_bytes.
pub fn limits_v1(limit: &str, soft: &str, memsw: &str) -> Limits {
    let limit_of = |text: &str| number(text).and_then(limit_v1);
    Limits { limit: limit_of(limit), reservation: limit_of(soft), memory_and_swap: limit_of(memsw) }
}

/// v2: memory.max, memory.low (0: none), memory.swap.max.
pub fn limits_v2(max: &str, low: &str, swap_max: &str) -> Limits {
    let limit = number(max);
    let memory_and_swap = limit.zip(number(swap_max)).and_then(|(memory, swap)| memory.checked_add(swap));
    Limits { limit, reservation: number(low).filter(|n| *n > 0), memory_and_swap }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = 25_276_502_016;
    /// Linux 6.18, cut.
    const V1: &str = "cache 1\nrss 2\npgfault 10\npgmajfault 1\nhierarchical_memory_limit 104857600\nhierarchical_memsw_limit 157286400\n\
        total_cache 300\ntotal_rss 200\ntotal_mapped_file 30\ntotal_swap 5\ntotal_pgfault 40\ntotal_pgmajfault 4\ntotal_inactive_file 100\n";

    #[test]
    fn v1() {
        let m = Memory::v1("1000\n", V1);
        assert_eq!((m.usage, m.rss, m.cache, m.mapped_file, m.swap), (Some(1000), Some(200), Some(300), Some(30), Some(5)));
        assert_eq!((m.faults, m.major_faults, m.own_faults, m.own_major_faults), (Some(40), Some(4), Some(10), Some(1)));
        assert_eq!((m.working_set(), m.available(HOST)), (Some(900), Some(104_857_600 - 900)));
        assert_eq!((m.swap_limit, m.swap_available()), (Some(52_428_800), Some(52_428_795)));
        assert_eq!(m.available(1000), None);
        let free = Memory::v1("1000\n", "hierarchical_memory_limit 9223372036854771712\nhierarchical_memsw_limit 9223372036854771712\n");
        assert_eq!((free.limit, free.available(HOST), free.swap_limit), (None, None, None));
        assert_eq!(more_v1("9\n", "2\n", "8\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n").oom_kills, Some(3));
        assert_eq!(limits_v1("9223372036854771712", "5", "").reservation, Some(5));
    }

    #[test]
    fn v2() {
        let stat = "anon 200\nfile 300\nkernel 50\nfile_mapped 30\ninactive_file 2000\npgfault 40\npgmajfault 4\n";
        let m = Memory::v2("1000\n", stat, "max\n", "7\n", "10\n");
        assert_eq!((m.working_set(), m.available(HOST), m.rss, m.kernel), (Some(0), None, Some(200), Some(50)));
        assert_eq!((m.swap, m.swap_available(), m.own_faults), (Some(7), Some(3), None));
        assert_eq!(Memory::v2("1000", stat, "5000", "", "").available(HOST), Some(5000));
        let more = more_v2("77\n", "low 0\nhigh 0\nmax 30\noom 3\noom_kill 2\noom_group_kill 0\n", stat);
        assert_eq!(more, More { max_usage: Some(77), failures: Some(30), kernel: Some(50), oom_kills: Some(2) });
        assert_eq!(limits_v2("5", "0", "6"), Limits { limit: Some(5), reservation: None, memory_and_swap: Some(11) });
    }

    #[test]
    fn wrong_shapes_are_absent() {
        assert_eq!(Memory::v1("", ""), Memory::default());
        assert_eq!(Memory::v1("-1", "total_rss -1\ntotal_cache\ntotal_swap 99999999999999999999\n"), Memory::default());
        assert_eq!(Memory::default().working_set(), None);
        assert_eq!(Memory::v1("5", "total_inactive_fi").working_set(), Some(5));
    }

    proptest::proptest! {
        #[test]
        fn any_text(a in "\\PC*", b in "(total_[a-z_]{3,8} [0-9-]{0,22}\n|\\PC*){0,5}", host in proptest::num::u64::ANY) {
            for m in [Memory::v1(&a, &b), Memory::v2(&a, &b, &a, &a, &a)] {
                m.available(host);
                m.swap_available();
            }
            more_v1(&a, &b, &a, &b);
            more_v2(&a, &b, &b);
        }

        #[test]
        fn working_set_and_available_are_bounded(usage in proptest::num::u64::ANY, idle in proptest::num::u64::ANY, limit in proptest::num::u64::ANY, host in proptest::num::u64::ANY) {
            let m = Memory::v2(&usage.to_string(), &format!("inactive_file {idle}\n"), &limit.to_string(), "", "");
            proptest::prop_assert!(m.working_set().unwrap() <= usage);
            if let Some(available) = m.available(host) {
                proptest::prop_assert!(available <= limit && limit < host);
            }
        }
    }
}
