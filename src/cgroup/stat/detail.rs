//! The files that metrics need beside those of a sample: opened at the first reading of them, and kept as the others are.

use super::reader::{may_keep, place, Place, Slot};
use super::{cpu, hugetlb, io, memory, pids, Detail};
use crate::cgroup::Cgroup;

/// What a content that grows with the host is given at first: io.stat has a line for each device.
const SOME: usize = 4 << 10;
/// And at most.
const MOST: usize = 1 << 20;

/// Names of both versions; the fields are in the order in which the parsers take the contents.
pub struct Files {
    times: [Slot; 2],
    times_unified: bool,
    memory: [Slot; 4],
    memory_unified: bool,
    pids: [Slot; 2],
    /// v1: of the throttling policy and of the BFQ scheduler. v2: io.stat.
    io: [Slot; 4],
    io_unified: bool,
    hugetlb: Vec<(String, [Slot; 3])>,
    hugetlb_unified: bool,
}

impl Files {
    /// `sizes`: huge pages of the host.
    pub fn open(cgroup: &Cgroup, sizes: &[String]) -> Files {
        let keep = may_keep(12 + 3 * sizes.len());
        let slot = |place: Place<'_>, name: &str| if name.is_empty() { Slot::None } else { Slot::new(place.dir, name, keep) };
        let (cpuacct, cpu) = (place(cgroup, "cpuacct"), place(cgroup, "cpu"));
        let (memory, pids) = (place(cgroup, "memory"), place(cgroup, "pids"));
        let (blkio, huge) = (place(cgroup, "blkio"), place(cgroup, "hugetlb"));
        let memory_names = match memory.unified {
            true => ["memory.peak", "memory.events", "memory.stat", ""],
            false => ["memory.max_usage_in_bytes", "memory.failcnt", "memory.kmem.usage_in_bytes", "memory.oom_control"],
        };
        let io_names = match blkio.unified {
            true => ["io.stat", "", "", ""],
            false => [
                "blkio.throttle.io_service_bytes_recursive",
                "blkio.throttle.io_serviced_recursive",
                "blkio.bfq.io_service_bytes_recursive",
                "blkio.bfq.io_serviced_recursive",
            ],
        };
        let huge_names = if huge.unified { ["current", "events", ""] } else { ["usage_in_bytes", "max_usage_in_bytes", "failcnt"] };
        let huge_slot = |size: &str, what: &str| if what.is_empty() { Slot::None } else { slot(huge, &format!("hugetlb.{size}.{what}")) };
        Files {
            times: [if cpu.unified { Slot::None } else { slot(cpuacct, "cpuacct.stat") }, slot(cpu, "cpu.stat")],
            times_unified: cpu.unified,
            memory: memory_names.map(|name| slot(memory, name)),
            memory_unified: memory.unified,
            pids: [slot(pids, "pids.current"), slot(pids, "pids.max")],
            io: io_names.map(|name| slot(blkio, name)),
            io_unified: blkio.unified,
            hugetlb: sizes.iter().map(|size| (size.clone(), huge_names.map(|what| huge_slot(size, what)))).collect(),
            hugetlb_unified: huge.unified,
        }
    }

    /// Reads them; the processes of `cgroup` besides.
    pub fn read(&self, cgroup: &Cgroup) -> Detail {
        let [acct, stat] = self.times.each_ref().map(read);
        let [a, b, c, d] = self.memory.each_ref().map(read);
        let [current, max] = self.pids.each_ref().map(read);
        let (processes, process_ids) = cgroup.process_list();
        Detail {
            times: match self.times_unified {
                true => cpu::times_v2(&stat),
                false => cpu::times_v1(&acct, &stat, rustix::param::clock_ticks_per_second()),
            },
            memory: match self.memory_unified {
                true => memory::more_v2(&a, &b, &c),
                false => memory::more_v1(&a, &b, &c, &d),
            },
            pids: pids::parse(&current, &max),
            processes,
            process_ids,
            io: self.io(),
            hugetlb: self.hugetlb(),
        }
    }

    fn io(&self) -> Vec<io::Device> {
        let [bytes, operations, bfq_bytes, bfq_operations] = &self.io;
        if self.io_unified {
            return io::v2(&read(bytes));
        }
        // Since Linux 6.10 the throttling policy counts only where something is throttled; the BFQ scheduler always does.
        match io::v1(&read(bytes), &read(operations)) {
            devices if devices.is_empty() => io::v1(&read(bfq_bytes), &read(bfq_operations)),
            devices => devices,
        }
    }

    fn hugetlb(&self) -> Vec<hugetlb::Pages> {
        let all = self.hugetlb.iter().map(|(size, slots)| {
            let [usage, second, third] = slots.each_ref().map(read);
            match self.hugetlb_unified {
                true => hugetlb::v2(size, &usage, &second),
                false => hugetlb::v1(size, &usage, &second, &third),
            }
        });
        all.filter(|pages| pages.usage.is_some()).collect()
    }
}

/// The whole content, in a buffer that grows for it.
fn read(slot: &Slot) -> String {
    if matches!(slot, Slot::None) {
        return String::new();
    }
    let mut few = [0; SOME];
    let text = slot.read(&mut few, &mut false);
    // What has filled the buffer may go on.
    if text.len() + 512 < SOME {
        return text.to_owned();
    }
    let mut much = vec![0; MOST];
    slot.read(&mut much, &mut false).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_longer_than_the_first_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let line = "8:0 rbytes=1 wbytes=2\n";
        let text = line.repeat(3 * SOME / line.len());
        std::fs::write(dir.path().join("io.stat"), &text).unwrap();
        assert_eq!(read(&Slot::new(Some(dir.path()), "io.stat", true)), text);
        assert_eq!(read(&Slot::new(Some(dir.path()), "gone", true)), "");
    }
}
