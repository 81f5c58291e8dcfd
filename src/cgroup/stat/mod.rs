//! What a cgroup uses, from kernel files of both versions. The parsers are pure; `Reader` keeps the few files open that a stats
//! call needs, and opens the others that metrics need each time.

/// CPU time.
pub mod cpu;
/// The files that metrics need.
mod detail;
/// Huge pages.
pub mod hugetlb;
/// Block I/O.
pub mod io;
/// Memory and swap.
pub mod memory;
/// A cgroup's reader, and its CPU rate from sample to sample.
pub mod meter;
/// Numbers, strictly.
pub mod number;
/// Tasks and processes.
pub mod pids;
/// Pressure stall information.
pub mod pressure;
/// The files of one cgroup.
pub mod reader;
#[cfg(test)]
mod tests_fixtures;

use std::time::Instant;

pub use meter::Meter;
pub use reader::Reader;

/// What a stats call answers: six files on v1 with the v2 tree beside it, nine on v2. What the kernel does not say is absent.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When the files were read: nanoseconds since the epoch, and the clock for rates.
    pub taken_at: i64,
    pub clock: Instant,
    /// Nanoseconds on all cores since the cgroup exists.
    pub cpu: Option<u64>,
    pub memory: memory::Memory,
    pub cpu_pressure: Option<pressure::Pressure>,
    pub memory_pressure: Option<pressure::Pressure>,
    pub io_pressure: Option<pressure::Pressure>,
}

/// What metrics need beyond a sample.
#[derive(Clone, Debug, Default)]
pub struct Detail {
    pub times: cpu::Times,
    pub memory: memory::More,
    pub pids: pids::Pids,
    /// Processes in it and below.
    pub processes: u64,
    /// Their ids, but for those of another PID namespace.
    pub process_ids: Vec<i32>,
    /// Devices that were used; empty without the controller.
    pub io: Vec<io::Device>,
    /// One for each size of the host; empty without the controller.
    pub hugetlb: Vec<hugetlb::Pages>,
}

/// What a cgroup is limited to, as set on itself.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub cpu: cpu::Limits,
    pub memory: memory::Limits,
    pub pids: Option<u64>,
}
