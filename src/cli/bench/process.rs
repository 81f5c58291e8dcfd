//! The processes behind a CRI socket: the server, its monitors and whatever it runs; their memory and CPU time.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::error::Result;
use crate::sys::{cputime, socket};

/// Monitors of containers, as the runtimes call them.
const MONITORS: [&str; 4] = ["crisp-shim", "containerd-shim", "conmon", "isulad-shim"];

/// A server and how to know what belongs to it.
#[derive(Clone, Debug)]
pub struct Server {
    pid: i32,
    /// Text of which a monitor's command line has some, if it is not a descendant.
    marks: Vec<String>,
    /// Names of monitors that belong to the server whatever their command line says.
    names: Vec<String>,
}

/// Processes of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub processes: u64,
    pub threads: u64,
    /// KiB; shared pages counted in full.
    pub rss: u64,
    /// KiB; shared pages divided by those who share them.
    pub pss: u64,
}

struct Process {
    pid: i32,
    parent: i32,
    name: String,
    threads: u64,
    /// Since boot, in ticks: tells a process from a later one of the same pid.
    started: u64,
    /// CPU time of children that have ended and been waited for.
    children: Duration,
}

impl Server {
    /// The process that listens on the socket at `path`. Its monitors are its descendants, processes called as monitors
    /// are with one of `dirs` or the socket in their command line, and processes called one of `names`.
    pub fn behind(path: &Path, dirs: &[String], names: &[String]) -> Result<Server> {
        let pid = socket::peer_pid(&socket::connect(path)?)?;
        let mut marks: Vec<String> = dirs.iter().filter(|dir| !dir.is_empty()).cloned().collect();
        marks.push(path.display().to_string());
        // /var/run and /run are one.
        if let Some(dir) = path.parent().filter(|dir| dir.components().count() > 2) {
            marks.push(dir.strip_prefix("/var").map_or(dir.to_owned(), |rest| Path::new("/").join(rest)).display().to_string());
        }
        Ok(Server { pid, marks, names: names.to_vec() })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Processes that are there now, the server first.
    fn processes(&self) -> Vec<Process> {
        let all: Vec<Process> = pids().filter_map(read).collect();
        let parents: HashMap<i32, i32> = all.iter().map(|process| (process.pid, process.parent)).collect();
        let descends = |mut pid: i32| {
            // A loop in a table that was read while it changed must not hold us.
            for _ in 0..64 {
                match parents.get(&pid) {
                    Some(&parent) if parent == self.pid => return true,
                    Some(&parent) if parent > 1 => pid = parent,
                    _ => return false,
                }
            }
            false
        };
        let own = namespace(self.pid);
        let belongs = |process: &Process| {
            process.pid == self.pid
                || ((descends(process.pid) || self.is_monitor(process)) && (own.is_none() || namespace(process.pid) == own))
        };
        let mut found: Vec<Process> = all.into_iter().filter(belongs).collect();
        found.sort_by_key(|process| process.pid != self.pid);
        found
    }

    fn is_monitor(&self, process: &Process) -> bool {
        if self.names.contains(&process.name) {
            return true;
        }
        // The kernel keeps 15 bytes of a name.
        if !MONITORS.iter().any(|name| process.name.starts_with(&name[..name.len().min(15)])) {
            return false;
        }
        let words = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        let program = fs::read_link(format!("/proc/{}/exe", process.pid)).unwrap_or_default();
        let text = format!("{} {}", String::from_utf8_lossy(&words), program.display());
        self.marks.iter().any(|mark| text.contains(mark))
    }

    /// Memory by name of process; payload of containers (in other pid namespaces) is not counted.
    pub fn memory(&self) -> BTreeMap<String, Memory> {
        let mut groups = BTreeMap::<String, Memory>::new();
        for process in self.processes() {
            let group = groups.entry(process.name).or_default();
            let (rss, pss) = rollup(process.pid);
            group.processes += 1;
            group.threads += process.threads;
            group.rss += rss;
            group.pss += pss;
        }
        groups
    }

    /// Memory of the server alone, and of all others together.
    pub fn halves(&self) -> (Memory, Memory) {
        let (mut server, mut others) = (Memory::default(), Memory::default());
        for process in self.processes() {
            let (rss, pss) = rollup(process.pid);
            let half = if process.pid == self.pid { &mut server } else { &mut others };
            half.processes += 1;
            half.threads += process.threads;
            half.rss += rss;
            half.pss += pss;
        }
        (server, others)
    }

    /// Resident memory of the server alone, KiB.
    pub fn rss(&self) -> u64 {
        rollup(self.pid).0
    }

    /// Starts counting CPU time.
    pub fn meter(&self) -> Meter {
        let mut meter = Meter { server: self.clone(), seen: HashMap::new() };
        meter.take();
        meter
    }
}

/// Counts the CPU time of a server and all that belongs to it.
pub struct Meter {
    server: Server,
    /// By pid: start, parent, own time, time of its children.
    seen: HashMap<i32, (u64, i32, Duration, Duration)>,
}

impl Meter {
    /// CPU time since the last take.
    pub fn take(&mut self) -> Duration {
        let (mut grown, mut now) = (Duration::ZERO, HashMap::new());
        for process in self.server.processes() {
            let own = cputime::of(process.pid).unwrap_or_default();
            now.insert(process.pid, (process.started, process.parent, own, process.children));
        }
        let same = |pid: &i32, started: u64| self.seen.get(pid).filter(|seen| seen.0 == started);
        for (pid, (started, _, own, children)) in &now {
            let (own_before, children_before) = same(pid, *started).map_or_else(Default::default, |seen| (seen.2, seen.3));
            grown += own.saturating_sub(own_before) + children.saturating_sub(children_before);
        }
        // A child that has ended since is in its parent's account with all it ever used, some of which is counted.
        for (pid, (started, parent, own, children)) in &self.seen {
            let ended = now.get(pid).is_none_or(|process| process.0 != *started);
            if ended && now.contains_key(parent) {
                grown = grown.saturating_sub(*own + *children);
            }
        }
        self.seen = now;
        grown
    }
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn read(pid: i32) -> Option<Process> {
    parse(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// A line of /proc/PID/stat, proc(5).
fn parse(pid: i32, line: &str) -> Option<Process> {
    // The name may hold anything, parentheses too.
    let (head, tail) = line.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = tail.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    // USER_HZ is 100 on every architecture of Linux that matters here.
    let children = Duration::from_millis((number(16)? + number(17)?) * 10);
    Some(Process { pid, parent: number(4)? as i32, name, threads: number(20)?, started: number(22)?, children })
}

fn namespace(pid: i32) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// Rss and Pss in KiB; zeros for a process that has just ended.
fn rollup(pid: i32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    };
    (field("Rss:"), field("Pss:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_do_not_shift_fields() {
        let line = "7 (a b) (c) S 3 7 7 0 -1 4194560 1 2 3 4 5 6 70 80 20 0 9 0 1234 5 6";
        let process = parse(7, line).unwrap();
        assert_eq!((process.parent, process.name.as_str(), process.threads, process.started), (3, "a b) (c", 9, 1234));
        assert_eq!(process.children, Duration::from_millis(1500));
        assert!(parse(7, "7 (x) S 3").is_none() && parse(7, "").is_none());
    }

    #[test]
    fn the_server_is_who_listens_and_its_work_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = Server::behind(&path, &[], &[]).unwrap();
        assert_eq!(server.pid(), std::process::id() as i32);
        let (memory, _) = server.halves();
        assert!(memory.processes == 1 && memory.pss > 0 && memory.rss >= memory.pss && memory.threads > 0, "{memory:?}");
        let mut meter = server.meter();
        let mut total = Duration::ZERO;
        let mut number = 1u64;
        while total < Duration::from_millis(2) {
            (0..100_000).for_each(|_| number = std::hint::black_box(number.wrapping_mul(3)));
            total += meter.take();
        }
    }
}
