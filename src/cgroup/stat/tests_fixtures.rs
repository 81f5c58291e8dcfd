//! The readers on cgroups that kernels wrote (tests/fixtures/cgroup), and on the same with files spoiled.

use std::path::{Path, PathBuf};

use super::io::Device;
use super::{Detail, Limits, Reader, Sample};
use crate::cgroup::{Cgroup, Hierarchy, Layout, Mode};

const V1: [&str; 6] = ["cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb"];
const HOST: u64 = 25_276_502_016;
const MIB: u64 = 1 << 20;

fn fixtures(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cgroup").join(version)
}

fn v1(dir: &Path) -> Layout {
    let mount = |c: &str, unified| Hierarchy {
        controllers: if unified { vec![] } else { vec![c.to_owned()] },
        mount: dir.join(c),
        root: "/".into(),
        unified,
    };
    let mut hierarchies: Vec<_> = V1.map(|c| mount(c, false)).to_vec();
    hierarchies.push(mount("unified", true));
    Layout { mode: Mode::Hybrid, hierarchies }
}

fn v2(dir: &Path) -> Layout {
    Layout { mode: Mode::V2, hierarchies: vec![Hierarchy { controllers: vec![], mount: dir.to_owned(), root: "/".into(), unified: true }] }
}

fn read(layout: &Layout, path: &str) -> (Sample, Detail, Limits) {
    let reader = Reader::open(Cgroup::at(layout, path).unwrap()).unwrap();
    (reader.sample().unwrap(), reader.detail(&["2MB".into(), "1GB".into()]), reader.limits())
}

#[test]
fn v1_limited() {
    let (s, d, l) = read(&v1(&fixtures("v1")), "/limited");
    assert_eq!(
        (s.cpu, s.memory.usage, s.memory.working_set(), s.memory.rss),
        (Some(2_748_871_443), Some(26_234_880), Some(26_234_880), Some(25_608_192))
    );
    assert_eq!((s.memory.available(HOST), s.memory.cache, s.memory.mapped_file), (Some(64 * MIB - 26_234_880), Some(4096), Some(4096)));
    assert_eq!((s.memory.faults, s.memory.major_faults, s.memory.own_faults), (Some(23_985), Some(1), Some(23_985)));
    assert_eq!((s.memory.swap, s.memory.swap_available()), (Some(0), Some(0)));
    let stall = s.cpu_pressure.unwrap().some.unwrap();
    assert_eq!((stall.total, stall.avg10, stall.avg60, stall.avg300), (6_779_901_000, 39.29, 9.19, 2.01));
    assert_eq!((s.memory_pressure.unwrap().full.unwrap().total, s.io_pressure.unwrap().full.unwrap().total), (1_168_000, 18_059_000));
    assert_eq!((d.times.user, d.times.system), (Some(2_670_000_000), Some(70_000_000)));
    assert_eq!((d.times.periods, d.times.throttled_periods, d.times.throttled), (Some(92), Some(88), Some(3_818_396_052)));
    assert_eq!(
        (d.memory.max_usage, d.memory.failures, d.memory.kernel, d.memory.oom_kills),
        (Some(64 * MIB), Some(0), Some(454_656), Some(1))
    );
    assert_eq!((d.pids.threads, d.pids.limit, d.processes), (Some(4), Some(50), 4));
    let disk = Device { major: 254, read_bytes: 33_558_528, write_bytes: 16 * MIB, reads: 24, writes: 16, ..Device::default() };
    assert_eq!(d.io, [disk]);
    assert_eq!(
        d.hugetlb.iter().map(|p| (p.size.as_str(), p.usage, p.max_usage, p.failures)).collect::<Vec<_>>(),
        [("2MB", Some(0), Some(0), Some(0)), ("1GB", Some(0), Some(0), Some(0))]
    );
    assert_eq!((l.cpu.shares, l.cpu.quota, l.cpu.period, l.pids), (Some(512), Some(30_000), Some(100_000), Some(50)));
    assert_eq!((l.memory.limit, l.memory.reservation, l.memory.memory_and_swap), (Some(64 * MIB), Some(32 * MIB), Some(64 * MIB)));
}

#[test]
fn v1_without_limits() {
    let (s, d, l) = read(&v1(&fixtures("v1")), "/free");
    assert_eq!((s.cpu, s.memory.usage, s.memory.limit, s.memory.available(HOST)), (Some(1_445_519), Some(258_048), None, None));
    assert_eq!((s.memory.swap_available(), d.pids.limit, d.processes, d.io.len()), (None, None, 1, 0));
    assert_eq!((l.cpu.quota, l.memory.limit, l.memory.reservation, l.memory.memory_and_swap, l.pids), (None, None, None, None, None));
}

#[test]
fn v2_limited() {
    let (s, d, l) = read(&v2(&fixtures("v2")), "/limited");
    assert_eq!((s.cpu, s.memory.usage, s.memory.working_set()), (Some(4_023_302_000), Some(42_745_856), Some(42_745_856 - 16 * MIB)));
    assert_eq!(
        (s.memory.rss, s.memory.cache, s.memory.kernel, s.memory.faults),
        (Some(25_432_064), Some(16 * MIB), Some(536_576), Some(1001))
    );
    assert_eq!(s.memory.available(HOST), Some(64 * MIB - (42_745_856 - 16 * MIB)));
    assert_eq!((s.memory.swap, s.memory.swap_available()), (Some(0), Some(64 * MIB)));
    assert_eq!(s.cpu_pressure.unwrap().some.unwrap().total, 8_751_805_000);
    assert_eq!((d.times.user, d.times.system, d.times.throttled), (Some(2_856_677_000), Some(1_166_624_000), Some(11_833_323_000)));
    assert_eq!((d.memory.max_usage, d.memory.failures, d.memory.oom_kills), (Some(43_008_000), Some(0), Some(0)));
    assert_eq!((d.pids.threads, d.pids.limit, d.processes), (Some(5), Some(64), 5));
    let disk = Device { major: 254, read_bytes: 16 * MIB, write_bytes: 16_801_792, reads: 128, writes: 24, ..Device::default() };
    assert_eq!(d.io, [disk]);
    assert_eq!((d.hugetlb.len(), d.hugetlb[0].usage, d.hugetlb[0].failures), (2, Some(0), Some(0)));
    // 20 of a weight of 1 to 10000.
    assert_eq!((l.cpu.shares, l.cpu.quota, l.cpu.period, l.pids), (Some(500), Some(30_000), Some(100_000), Some(64)));
    assert_eq!((l.memory.limit, l.memory.reservation, l.memory.memory_and_swap), (Some(64 * MIB), Some(32 * MIB), Some(128 * MIB)));
}

#[test]
fn v2_others() {
    let layout = v2(&fixtures("v2"));
    let (_, d, _) = read(&layout, "/killed");
    assert_eq!((d.memory.oom_kills, d.memory.failures), (Some(1), Some(18)));
    let (s, d, l) = read(&layout, "/free");
    assert_eq!((s.memory.limit, s.memory.available(HOST), s.memory.swap_available()), (None, None, None));
    assert_eq!((d.pids.limit, l.cpu.quota, l.memory.limit, l.pids), (None, None, None, None));
    // The root has no usage of memory: what there is counts.
    let (s, _, _) = read(&layout, "/root");
    assert!(s.cpu.is_some() && s.memory.usage.is_none() && s.memory.working_set().is_none());
}

/// What a file may say instead.
const SPOILED: [&str; 8] =
    ["", "\n", "max\n", "-1\n", "99999999999999999999999\n", "usage_usec\n", "total_rss -5\nanon x\n8:0 rbytes=\n", "\u{fffd}\0\n"];

#[test]
fn spoiled_files_are_absent_numbers() {
    for (version, layout, path) in [("v1", v1 as fn(&Path) -> Layout, "/limited"), ("v2", v2, "/limited")] {
        for text in SPOILED {
            let dir = tempfile::tempdir().unwrap();
            let cgroup = Cgroup::at(&layout(dir.path()), path).unwrap();
            cgroup.create().unwrap();
            for (from, to) in Cgroup::at(&layout(&fixtures(version)), path).unwrap().dirs().iter().zip(cgroup.dirs()) {
                for entry in std::fs::read_dir(&from.path).unwrap().flatten() {
                    std::fs::write(to.path.join(entry.file_name()), text).unwrap();
                }
            }
            let reader = Reader::open(cgroup).unwrap();
            let sample = reader.sample().unwrap();
            assert_eq!(
                (sample.cpu, sample.memory.usage, sample.memory.rss, sample.cpu_pressure),
                (None, None, None, None),
                "{version} {text:?}"
            );
            let detail = reader.detail(&["2MB".into()]);
            assert_eq!((detail.times.user, detail.memory.oom_kills, detail.pids.threads), (None, None, None), "{version} {text:?}");
            assert!(detail.io.is_empty() && detail.hugetlb.is_empty());
            reader.limits();
        }
    }
}

#[test]
fn cut_files_give_what_is_whole() {
    let whole = std::fs::read_to_string(fixtures("v1/memory/limited/memory.stat")).unwrap();
    let all = super::memory::Memory::v1("1\n", &whole);
    for end in 0..whole.len() {
        let some = super::memory::Memory::v1("1\n", &whole[..end]);
        // A number cut short is another number: the reader stops at the last whole line.
        if whole[..end].ends_with('\n') {
            assert!(some.rss.is_none() || some.rss == all.rss);
            assert!(some.faults.is_none() || some.faults == all.faults);
        }
    }
}
