//! The files of one cgroup: kept open for samples, so that one costs a pread(2) for each and no path walk; opened each time
//! for the rest, and beyond the bound of kept descriptors. Every content is looked at by a parser that treats a wrong shape
//! as absent; the one thing that matters besides is a cgroup that is gone.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use super::detail::Files;
use super::memory::Memory;
use super::{cpu, memory, pressure, Detail, Limits, Sample};
use crate::cgroup::Cgroup;

/// Longest content looked at of a kept file: memory.stat has 2 KiB.
const KEPT_BYTES: usize = 8 << 10;
/// The same of the others: io.stat and cgroup.procs grow.
const BYTES: usize = 1 << 20;

/// Descriptors that readers hold in this process.
static KEPT: AtomicUsize = AtomicUsize::new(0);

/// Most descriptors kept: half of what the process may open, the rest is for calls.
fn bound() -> usize {
    static BOUND: OnceLock<usize> = OnceLock::new();
    *BOUND.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        (limit.unwrap_or(u64::MAX) / 2).min(1 << 19) as usize
    })
}

/// Descriptors kept now, for telemetry and tests.
pub fn kept() -> usize {
    KEPT.load(Ordering::Relaxed)
}

/// Whether so many more descriptors may be kept.
pub(super) fn may_keep(more: usize) -> bool {
    kept() + more <= bound()
}

/// A file that the kernel may not have.
pub(super) enum Slot {
    /// This host or this cgroup does not have it.
    None,
    Open(File),
    /// Over the bound: opened for each reading.
    Path(PathBuf),
}

impl Slot {
    pub(super) fn new(dir: Option<&Path>, name: &str, keep: bool) -> Slot {
        let Some(path) = dir.map(|d| d.join(name)) else { return Slot::None };
        match File::open(&path) {
            Ok(_) if !keep => Slot::Path(path),
            Ok(file) => {
                KEPT.fetch_add(1, Ordering::Relaxed);
                Slot::Open(file)
            }
            Err(_) => Slot::None,
        }
    }

    fn is_none(&self) -> bool {
        matches!(self, Slot::None)
    }

    /// The content in `buffer`; "" for whatever cannot be read. `gone` is set when the cgroup is not there any more.
    pub(super) fn read<'b>(&self, buffer: &'b mut [u8], gone: &mut bool) -> &'b str {
        let read = match self {
            Slot::None => return "",
            Slot::Open(file) => pread(file, buffer),
            Slot::Path(path) => match File::open(path) {
                Ok(file) => pread(&file, buffer),
                Err(e) => Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
            },
        };
        match read {
            Ok(n) => text(&buffer[..n]),
            Err(e) => {
                *gone |= matches!(e, Errno::NODEV | Errno::NOENT);
                ""
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if matches!(self, Slot::Open(_)) {
            KEPT.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The kernel gives these files whole in one call.
fn pread(file: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut *buffer, 0))
}

/// Up to the last whole line: a longer content ends in the middle of one.
fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    std::str::from_utf8(&bytes[..end]).unwrap_or_default()
}

/// A file that is opened each time; "" when it is not there.
fn read(dir: Option<&Path>, name: &str) -> String {
    use std::io::Read;
    let Some(path) = dir.map(|d| d.join(name)) else { return String::new() };
    let mut bytes = Vec::with_capacity(512);
    match File::open(path).and_then(|file| file.take(BYTES as u64).read_to_end(&mut bytes)) {
        Ok(_) => text(&bytes).to_owned(),
        Err(_) => String::new(),
    }
}

/// Where one controller's files are.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) dir: Option<&'a Path>,
    pub(super) unified: bool,
}

impl Place<'_> {
    /// The content of the file that v1 or v2 calls so.
    fn read(&self, v1: &str, v2: &str) -> String {
        read(self.dir, if self.unified { v2 } else { v1 })
    }
}

/// The files of one cgroup. Nothing in it changes after `open`: readers need no lock.
pub struct Reader {
    cgroup: Cgroup,
    cpu: Slot,
    cpu_unified: bool,
    memory_unified: bool,
    usage: Slot,
    stat: Slot,
    /// v2 alone: v1 has them in memory.stat.
    max: Slot,
    swap: Slot,
    swap_max: Slot,
    cpu_pressure: Slot,
    memory_pressure: Slot,
    io_pressure: Slot,
    files: OnceLock<Files>,
}

impl Reader {
    /// Opens the files of samples; None when the cgroup is not there.
    pub fn open(cgroup: Cgroup) -> Option<Reader> {
        const MOST: usize = 9;
        let keep = may_keep(MOST);
        let (cpu, memory) = (place(&cgroup, "cpuacct"), place(&cgroup, "memory"));
        let names = |v1, v2, unified: bool| if unified { v2 } else { v1 };
        let v2_memory = memory.dir.filter(|_| memory.unified);
        let unified = cgroup.dirs().iter().find(|d| d.unified).map(|d| d.path.as_path());
        let reader = Reader {
            cpu: Slot::new(cpu.dir, names("cpuacct.usage", "cpu.stat", cpu.unified), keep),
            usage: Slot::new(memory.dir, names("memory.usage_in_bytes", "memory.current", memory.unified), keep),
            stat: Slot::new(memory.dir, "memory.stat", keep),
            max: Slot::new(v2_memory, "memory.max", keep),
            swap: Slot::new(v2_memory, "memory.swap.current", keep),
            swap_max: Slot::new(v2_memory, "memory.swap.max", keep),
            cpu_pressure: Slot::new(unified, "cpu.pressure", keep),
            memory_pressure: Slot::new(unified, "memory.pressure", keep),
            io_pressure: Slot::new(unified, "io.pressure", keep),
            files: OnceLock::new(),
            cpu_unified: cpu.unified,
            memory_unified: memory.unified,
            cgroup,
        };
        let there = !(reader.cpu.is_none() && reader.usage.is_none());
        there.then_some(reader)
    }

    /// Reads what stats need; None when the cgroup is gone.
    pub fn sample(&self) -> Option<Sample> {
        let mut buffer = [0; KEPT_BYTES];
        let mut gone = false;
        let taken_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64);
        let clock = Instant::now();
        let usage = self.cpu.read(&mut buffer, &mut gone);
        let cpu = if self.cpu_unified { cpu::usage_v2(usage) } else { cpu::usage_v1(usage) };
        if gone {
            return None;
        }
        let memory = self.memory(&mut buffer, &mut gone);
        let mut pressure_of = |slot: &Slot| pressure::parse(slot.read(&mut buffer, &mut gone));
        let (cpu_pressure, memory_pressure, io_pressure) =
            (pressure_of(&self.cpu_pressure), pressure_of(&self.memory_pressure), pressure_of(&self.io_pressure));
        (!gone).then_some(Sample { taken_at, clock, cpu, memory, cpu_pressure, memory_pressure, io_pressure })
    }

    fn memory(&self, buffer: &mut [u8; KEPT_BYTES], gone: &mut bool) -> Memory {
        let (few, buffer) = buffer.split_at_mut(256);
        let (usage, few) = few.split_at_mut(64);
        let usage = self.usage.read(usage, gone);
        if !self.memory_unified {
            return Memory::v1(usage, self.stat.read(buffer, gone));
        }
        let (max, few) = few.split_at_mut(64);
        let (swap, swap_max) = few.split_at_mut(64);
        let max = self.max.read(max, gone);
        let (swap, swap_max) = (self.swap.read(swap, gone), self.swap_max.read(swap_max, gone));
        Memory::v2(usage, self.stat.read(buffer, gone), max, swap, swap_max)
    }

    /// Reads what metrics need beside a sample. `sizes`: huge pages of the host, the same each time.
    pub fn detail(&self, sizes: &[String]) -> Detail {
        self.files.get_or_init(|| Files::open(&self.cgroup, sizes)).read(&self.cgroup)
    }

    /// Processes in it and below.
    pub fn processes(&self) -> u64 {
        self.cgroup.process_count()
    }

    /// What is set on this cgroup.
    pub fn limits(&self) -> Limits {
        let (cpu, memory) = (self.place("cpu"), self.place("memory"));
        Limits {
            cpu: match cpu.unified {
                true => cpu::limits_v2(&read(cpu.dir, "cpu.weight"), &read(cpu.dir, "cpu.max")),
                false => {
                    cpu::limits_v1(&read(cpu.dir, "cpu.shares"), &read(cpu.dir, "cpu.cfs_quota_us"), &read(cpu.dir, "cpu.cfs_period_us"))
                }
            },
            memory: match memory.unified {
                true => memory::limits_v2(
                    &read(memory.dir, "memory.max"),
                    &read(memory.dir, "memory.low"),
                    &read(memory.dir, "memory.swap.max"),
                ),
                false => memory::limits_v1(
                    &read(memory.dir, "memory.limit_in_bytes"),
                    &read(memory.dir, "memory.soft_limit_in_bytes"),
                    &read(memory.dir, "memory.memsw.limit_in_bytes"),
                ),
            },
            pids: super::number::number(&self.place("pids").read("pids.max", "pids.max")),
        }
    }

    fn place(&self, controller: &str) -> Place<'_> {
        place(&self.cgroup, controller)
    }
}

/// The v1 hierarchy of the controller, else the v2 one.
pub(super) fn place<'a>(cgroup: &'a Cgroup, controller: &str) -> Place<'a> {
    let v1 = cgroup.dirs().iter().find(|d| d.controllers.iter().any(|c| c == controller));
    let dir = v1.or_else(|| cgroup.dirs().iter().find(|d| d.unified));
    Place { dir: dir.map(|d| d.path.as_path()), unified: dir.is_some_and(|d| d.unified) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{Hierarchy, Layout, Mode};

    fn layout(dir: &Path, controllers: &[&str]) -> Layout {
        let mut hierarchies: Vec<_> = controllers
            .iter()
            .map(|c| Hierarchy { controllers: vec![c.to_string()], mount: dir.join(c), root: "/".into(), unified: false })
            .collect();
        hierarchies.push(Hierarchy { controllers: vec![], mount: dir.join("unified"), root: "/".into(), unified: true });
        Layout { mode: Mode::Hybrid, hierarchies }
    }

    fn write(cgroup: &Cgroup, controller: &str, name: &str, text: &str) {
        std::fs::write(cgroup.dir(controller).unwrap().join(name), text).unwrap();
    }

    #[test]
    fn a_mixed_host() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(&layout(dir.path(), &["cpuacct", "memory"]), "/a").unwrap();
        assert!(Reader::open(cgroup.clone()).is_none());
        cgroup.create().unwrap();
        write(&cgroup, "cpuacct", "cpuacct.usage", "5000\n");
        write(&cgroup, "memory", "memory.usage_in_bytes", "900\n");
        write(&cgroup, "memory", "memory.stat", "total_rss 10\ntotal_inactive_file 100\ntotal_pgfau");
        write(&cgroup, "io", "io.pressure", "some avg10=1.00 avg60=0.00 avg300=0.00 total=2\n");
        let reader = Reader::open(cgroup.clone()).unwrap();
        let sample = reader.sample().unwrap();
        assert_eq!((sample.cpu, sample.memory.working_set(), sample.memory.rss), (Some(5000), Some(800), Some(10)));
        assert_eq!((sample.memory.faults, sample.cpu_pressure), (None, None));
        assert_eq!(sample.io_pressure.unwrap().some.unwrap().total, 2000);
        // The same descriptors see what is written later.
        write(&cgroup, "cpuacct", "cpuacct.usage", "6000\n");
        write(&cgroup, "memory", "memory.usage_in_bytes", "garbage\n");
        let sample = reader.sample().unwrap();
        assert_eq!((sample.cpu, sample.memory.usage, sample.memory.working_set()), (Some(6000), None, None));
        write(&cgroup, "io", "io.stat", "8:0 rbytes=7 wbytes=0\n");
        write(&cgroup, "io", "cgroup.procs", "1\n2\n");
        std::fs::create_dir(cgroup.dir("io").unwrap().join("below")).unwrap();
        std::fs::write(cgroup.dir("io").unwrap().join("below/cgroup.procs"), "3\n").unwrap();
        let detail = reader.detail(&["2MB".to_owned()]);
        assert_eq!((detail.io[0].read_bytes, detail.processes, detail.hugetlb.len()), (7, 3, 0));
    }

    #[test]
    fn beyond_the_bound_files_are_opened_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "1\n").unwrap();
        let (slot, mut buffer, mut gone) = (Slot::new(Some(dir.path()), "f", false), [0; 64], false);
        assert_eq!((slot.read(&mut buffer, &mut gone), gone), ("1\n", false));
        std::fs::remove_file(&path).unwrap();
        assert_eq!((slot.read(&mut buffer, &mut gone), gone), ("", true));
        assert!(Slot::new(Some(dir.path()), "f", true).is_none());
    }

    #[test]
    fn a_cut_content_ends_at_its_last_line() {
        assert_eq!(text(b"a 1\nb 2"), "a 1\n");
        assert_eq!((text(b""), text(b"12"), text(b"\xff\n")), ("", "", ""));
    }
}
