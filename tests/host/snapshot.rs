//! What a host looks like, to compare before and after: nothing of ours may be left.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemon::{cgroup_dirs, cgroup_processes, find, patience, tool, Daemon, Kind, Layout};

/// The last traces of a process or a device go a moment after the call that removed them has answered.
const SETTLE: Duration = Duration::from_secs(5);

/// One line per thing, each with its kind in front.
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    pub fn take(daemon: &Daemon) -> Snapshot {
        let layout = &daemon.layout;
        let mut lines = BTreeSet::new();
        let mut add = |kind: &str, name: &str| {
            lines.insert(format!("{kind} {name}"));
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mount table");
        // hugetlb: scripts/with-hugetlb of somebody else may come and go.
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| *point != "/sys/fs/cgroup/hugetlb");
        points.for_each(|point| add("mount", point));
        names("/run/netns").for_each(|name| add("netns", &name));
        // The bridge is the network's; the plugin keeps it by design.
        names("/sys/class/net").filter(|name| *name != layout.bridge()).for_each(|name| add("link", &name));
        let parents = format!("/{}", layout.cgroup_parent().trim_start_matches('/'));
        for dir in cgroup_dirs(&layout.tag) {
            // The parent itself is the client's.
            if !dir.to_string_lossy().ends_with(&parents) {
                add("cgroup", &dir.display().to_string());
            }
        }
        for pid in daemon.monitors().into_iter().chain(cgroup_processes(&layout.tag)) {
            add("process", &describe_process(pid));
        }
        leases(layout).iter().for_each(|lease| add("lease", lease));
        names(layout.path("cache/results")).for_each(|name| add("cni result", &name));
        if daemon.kind == Kind::Crispd {
            // Layers are deeper than the directories of objects; the first level may be made when it is needed.
            for part in ["root", "run"] {
                names(layout.path(part)).for_each(|name| list(&layout.path(part).join(name), 2, &mut |path| add("file", &path)));
            }
        }
        if find("iptables-save").is_some() {
            // Chains of one sandbox; the plugin keeps its top-level ones.
            let rules = tool("iptables-save", &["-t", "nat"]);
            rules.lines().filter(|line| line.contains("CNI-DN-") && line.contains(&layout.tag)).for_each(|line| add("rule", line));
        }
        Snapshot(lines)
    }

    /// Fails unless the host looks as it did, or does so in a moment.
    pub fn assert_same(&self, daemon: &Daemon) {
        let begin = Instant::now();
        loop {
            let now = Snapshot::take(daemon);
            let left: Vec<_> = now.0.difference(&self.0).collect();
            if left.is_empty() {
                return;
            }
            if begin.elapsed() > patience(SETTLE) {
                panic!("left behind: {left:#?}\nthe daemon's log:\n{}", daemon.log_tail());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The addresses the network's IPAM plugin holds.
pub fn leases(layout: &Layout) -> Vec<String> {
    names(layout.path("leases").join(&layout.tag)).filter(|name| name.parse::<Ipv4Addr>().is_ok()).collect()
}

fn names(dir: impl AsRef<Path>) -> impl Iterator<Item = String> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn list(dir: &Path, depth: u32, add: &mut impl FnMut(String)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        add(entry.path().display().to_string());
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), depth - 1, add);
        }
    }
}

fn describe_process(pid: i32) -> String {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    format!("{pid} {} {}", String::from_utf8_lossy(&arguments).replace('\0', " "), state.split(' ').nth(2).unwrap_or_default())
}
