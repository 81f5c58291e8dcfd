//! Memory of processes as the kernel counts it, in KiB.

use std::fs;

use crate::daemon::Daemon;

#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub daemon_rss: u64,
    pub daemon_pss: u64,
    /// All monitors (shims) together.
    pub monitors_pss: u64,
    pub monitors: u64,
    /// Threads of all monitors.
    pub threads: u64,
}

pub fn measure(daemon: &Daemon) -> Memory {
    let own = daemon.pid();
    let mut memory = Memory { daemon_rss: rollup(own, "Rss:"), daemon_pss: rollup(own, "Pss:"), ..Default::default() };
    for pid in daemon.monitors() {
        memory.monitors += 1;
        memory.monitors_pss += rollup(pid, "Pss:");
        memory.threads += fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |tasks| tasks.count() as u64);
    }
    memory
}

/// A field of smaps_rollup; 0 for a process that has just ended.
fn rollup(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
