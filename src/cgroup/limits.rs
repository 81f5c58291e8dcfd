//! Limits of a cgroup as files. An update keeps what they say before it changes the first one; when it fails, they are written
//! back. Also what OCI runtimes leave out of updates: huge pages, and v1 cpusets with children.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Cgroup, Dir, EXEC};
use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::cpulist::CpuList;

/// Files that an OCI runtime, or systemd for it, may write in an update, by v1 controller.
const V1: [(&str, &[&str]); 4] = [
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"]),
    ("cpuset", &["cpuset.cpus", "cpuset.mems"]),
    ("memory", &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
    ("pids", &["pids.max"]),
];
const V2: [&str; 7] = ["cpu.weight", "cpu.max", "cpuset.cpus", "cpuset.mems", "memory.max", "memory.swap.max", "pids.max"];

/// More bytes than any limit of v1 means.
const UNLIMITED: u64 = 1 << 62;

/// Writes are repeated in this many rounds: one limit may stand in the way of another (memory and memory+swap, quota and
/// period) until that is back.
const ROUNDS: usize = 3;

/// What files of a cgroup said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    files: Vec<Saved>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    path: PathBuf,
    text: String,
}

impl Limits {
    /// Reads the limits that runtimes set, those of huge pages of these sizes (`2MB`), and on v2 the files named in
    /// `unified`. Files that are not there have nothing to be restored.
    pub fn read<'a>(cgroup: &Cgroup, hugepages: impl Iterator<Item = &'a str>, unified: impl Iterator<Item = &'a str>) -> Limits {
        let hugepages: Vec<&str> = hugepages.collect();
        let unified: Vec<&str> = unified.collect();
        let mut limits = Limits::default();
        for dir in &cgroup.dirs {
            if dir.unified {
                let all = V2.iter().chain(&unified).map(|name| dir.path.join(name));
                all.for_each(|path| limits.keep(path));
            }
            for (_, names) in V1.iter().filter(|(controller, _)| dir.has(controller)) {
                names.iter().for_each(|name| limits.keep(dir.path.join(name)));
            }
            for size in &hugepages {
                hugepage_files(dir, size).into_iter().for_each(|path| limits.keep(path));
            }
        }
        limits
    }

    fn keep(&mut self, path: PathBuf) {
        let known = self.files.iter().any(|saved| saved.path == path);
        if let (false, Ok(text)) = (known, std::fs::read_to_string(&path)) {
            self.files.push(Saved { path, text });
        }
    }

    /// What the file of this name said, without its newline; the first of several.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.files.iter().find(|saved| saved.path.file_name().is_some_and(|file| file == name));
        found.map(|saved| saved.text.trim())
    }

    /// Writes everything back that says something else by now. A cgroup that has gone has nothing to be put right.
    pub fn restore(&self) -> Result<()> {
        self.restore_but(&[])
    }

    /// The same for all files but those of these names.
    pub fn restore_but(&self, names: &[&str]) -> Result<()> {
        let others = || self.files.iter().filter(|saved| !names.iter().any(|name| saved.path.ends_with(name)));
        for round in 1..=ROUNDS {
            let mut errors = ErrorList::default();
            for saved in others() {
                errors.keep(saved.restore());
            }
            if errors.is_empty() || round == ROUNDS {
                return errors.finish();
            }
        }
        Ok(())
    }
}

impl Saved {
    fn restore(&self) -> Result<()> {
        let Ok(now) = std::fs::read_to_string(&self.path) else { return Ok(()) };
        if now == self.text {
            return Ok(());
        }
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        match (&*name, self.path.parent()) {
            ("cpuset.cpus" | "cpuset.mems", Some(dir)) => set_cpuset(dir, &name, self.text.trim()),
            ("io.max", _) => self.write(lines_to_restore(&now, &self.text, "rbps=max wbps=max riops=max wiops=max")),
            ("io.weight" | "io.bfq.weight", _) => self.write(lines_to_restore(&now, &self.text, "default")),
            // "No limit" of v1 reads as a number, which hugetlb rounds to another one when it is written.
            (name, _) if name.ends_with("limit_in_bytes") && self.text.trim().parse().is_ok_and(|bytes: u64| bytes > UNLIMITED) => {
                self.write(vec!["-1".to_owned()])
            }
            _ => self.write(self.text.lines().map(str::to_owned).collect()),
        }
    }

    /// The kernel takes one line a write.
    fn write(&self, lines: Vec<String>) -> Result<()> {
        lines.into_iter().try_for_each(|line| write(&self.path, &line))
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    // An empty write(2) does nothing.
    let text = if text.is_empty() { "\n" } else { text };
    std::fs::write(path, text).context(|| format!("write {:?} to {}", text.trim(), path.display()))
}

/// The old lines of a file with one line per device, and one that takes away each device that is only there now.
fn lines_to_restore(now: &str, old: &str, none: &str) -> Vec<String> {
    let key = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let gone = now.lines().map(key).filter(|device| !old.lines().any(|line| key(line) == *device));
    gone.map(|device| format!("{device} {none}")).chain(old.lines().map(str::to_owned)).collect()
}

impl Dir {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|c| c == controller)
    }
}

/// The files that limit huge pages of one size: what is used, and what is reserved (Linux 5.7).
fn hugepage_files(dir: &Dir, size: &str) -> Vec<PathBuf> {
    let names = match (dir.unified, dir.has("hugetlb")) {
        (true, _) => [format!("hugetlb.{size}.max"), format!("hugetlb.{size}.rsvd.max")],
        (false, true) => [format!("hugetlb.{size}.limit_in_bytes"), format!("hugetlb.{size}.rsvd.limit_in_bytes")],
        (false, false) => return Vec::new(),
    };
    names.into_iter().map(|name| dir.path.join(name)).filter(|path| path.exists()).collect()
}

/// Limits huge pages: size (`2MB`) and bytes. OCI runtimes leave that out of updates, and runc writes the limits of the
/// container's creation again with each.
pub fn set_hugepages(cgroup: &Cgroup, size: &str, bytes: u64) -> Result<()> {
    let mut found = false;
    for dir in &cgroup.dirs {
        for path in hugepage_files(dir, size) {
            found = true;
            let written = std::fs::write(&path, bytes.to_string());
            written.context(|| format!("write {bytes} to {}", path.display()))?;
        }
    }
    match found {
        true => Ok(()),
        false => Err(Error::precondition(format!("cgroup {cgroup} has no limits of huge pages of {size}"))),
    }
}

/// Takes the quota of CPU time away in a v1 cgroup; false on v2, where this is another file.
pub fn lift_quota(cgroup: &Cgroup) -> Result<bool> {
    match cgroup.dirs.iter().find(|dir| dir.has("cpu")) {
        Some(dir) => write(&dir.path.join("cpu.cfs_quota_us"), "-1").map(|()| true),
        None => Ok(false),
    }
}

/// Prepares a v1 cpuset for a change by the OCI runtime: no child may have more than its parent, and execs' own cgroups are
/// children. `None` or "" is no change.
pub fn admit_cpuset(cgroup: &Cgroup, cpus: Option<&str>, mems: Option<&str>) -> Result<()> {
    let Some(dir) = cgroup.dirs.iter().find(|dir| dir.has("cpuset") && dir.path.is_dir()) else { return Ok(()) };
    for (name, wanted) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
        if let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty() && !exec_children(&dir.path).is_empty()) {
            set_cpuset(&dir.path, name, wanted)?;
        }
    }
    Ok(())
}

/// Writes a v1 or v2 cpuset file, those of execs' cgroups below first on v1: between two sets that do not overlap, by way of
/// both together.
fn set_cpuset(dir: &Path, name: &str, wanted: &str) -> Result<()> {
    let path = dir.join(name);
    let children: Vec<PathBuf> = exec_children(dir).into_iter().filter(|child| child.join(name).exists()).collect();
    // A v2 cpuset never stands in the way of its parent's.
    if !children.is_empty() && !dir.join("cgroup.controllers").exists() {
        let now = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        let both = CpuList::parse(&now).zip(CpuList::parse(wanted)).map(|(now, wanted)| now.union(&wanted).to_string());
        write(&path, both.as_deref().unwrap_or(wanted))?;
        for child in children {
            // An exec that ended meanwhile takes its cgroup with it.
            match write(&child.join(name), wanted) {
                Err(e) if child.exists() => return Err(e),
                _ => {}
            }
        }
    }
    if wanted.is_empty() {
        // Linux before 6.6 does not let go of a list while processes run, on v2 neither. What is above is the same set.
        let above = dir.parent().map(|parent| parent.join(format!("{name}.effective"))).and_then(|path| std::fs::read_to_string(path).ok());
        return write(&path, wanted).or_else(|error| above.map_or(Err(error), |list| write(&path, list.trim())));
    }
    write(&path, wanted)
}

fn exec_children(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(EXEC));
    ours.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// What a v1 cgroup may be given of CPUs (or memory nodes): what the nearest parent that exists has. None on hosts without
/// v1 cpusets: on v2 any number that the machine could have is taken.
pub fn cpuset_bounds(cgroup: &Cgroup, name: &str) -> Option<CpuList> {
    let dir = cgroup.dirs.iter().find(|dir| dir.has("cpuset"))?;
    // One that nothing has entered yet is empty, and will be filled from above.
    let of = |parent: &Path| std::fs::read_to_string(parent.join(name)).ok().filter(|text| !text.trim().is_empty());
    let text = dir.path.ancestors().skip(1).find_map(of);
    CpuList::parse(&text?)
}

/// Bytes of memory in use; None where they are not counted.
pub fn memory_usage(cgroup: &Cgroup) -> Option<u64> {
    let dir = cgroup.dir("memory")?;
    let text = ["memory.usage_in_bytes", "memory.current"].iter().find_map(|name| std::fs::read_to_string(dir.join(name)).ok());
    text?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree {
        dir: tempfile::TempDir,
    }

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Tree {
            let tree = Tree { dir: tempfile::tempdir().unwrap() };
            files.iter().for_each(|(path, text)| tree.write(path, text));
            tree
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn read(&self, path: &str) -> String {
            std::fs::read_to_string(self.dir.path().join(path)).unwrap().trim().to_owned()
        }

        fn cgroup(&self, controllers: &[&str], unified: bool) -> Cgroup {
            let controllers = controllers.iter().map(|c| (*c).to_owned()).collect();
            Cgroup { dirs: vec![Dir { path: self.dir.path().to_owned(), controllers, unified }] }
        }
    }

    #[test]
    fn v1_files_come_back() {
        let tree =
            Tree::new(&[("cpu.shares", "100\n"), ("cpu.cfs_quota_us", "-1\n"), ("hugetlb.2MB.limit_in_bytes", "5\n"), ("cpu.stat", "x\n")]);
        let limits = Limits::read(&tree.cgroup(&["cpu", "hugetlb"], false), ["2MB", "1GB"].into_iter(), ["cpu.stat"].into_iter());
        assert_eq!((limits.get("cpu.shares"), limits.get("cpu.stat")), (Some("100"), None));
        tree.write("cpu.shares", "7\n");
        tree.write("hugetlb.2MB.limit_in_bytes", "0\n");
        limits.restore().unwrap();
        assert_eq!((tree.read("cpu.shares"), tree.read("hugetlb.2MB.limit_in_bytes")), ("100".into(), "5".into()));
        let kept: Limits = serde_json::from_str(&serde_json::to_string(&limits).unwrap()).unwrap();
        assert_eq!(kept, limits);
        drop(tree);
        kept.restore().expect("what has gone needs nothing");
    }

    #[test]
    fn no_limit_of_v1_is_written_as_such() {
        let tree = Tree::new(&[("hugetlb.2MB.limit_in_bytes", "9223372036854771712\n")]);
        let limits = Limits::read(&tree.cgroup(&["hugetlb"], false), ["2MB"].into_iter(), [].into_iter());
        tree.write("hugetlb.2MB.limit_in_bytes", "5\n");
        limits.restore().unwrap();
        assert_eq!(tree.read("hugetlb.2MB.limit_in_bytes"), "-1");
    }

    #[test]
    fn v2_files_and_devices_come_back() {
        let tree = Tree::new(&[("memory.max", "max\n"), ("memory.high", "9\n"), ("io.max", "8:0 rbps=1 wbps=max riops=max wiops=max\n")]);
        let limits = Limits::read(&tree.cgroup(&[], true), [].into_iter(), ["memory.high", "io.max"].into_iter());
        tree.write("memory.max", "10\n");
        tree.write("memory.high", "8\n");
        limits.restore().unwrap();
        assert_eq!((tree.read("memory.max"), tree.read("memory.high")), ("max".into(), "9".into()));
        let now = "8:0 rbps=2 wbps=max riops=max wiops=max\n8:16 rbps=3 wbps=max riops=max wiops=max\n";
        assert_eq!(
            lines_to_restore(now, limits.get("io.max").unwrap(), "rbps=max wbps=max riops=max wiops=max"),
            ["8:16 rbps=max wbps=max riops=max wiops=max", "8:0 rbps=1 wbps=max riops=max wiops=max"]
        );
        assert_eq!(lines_to_restore("default 50\n8:0 10\n", "default 100\n", "default"), ["8:0 default", "default 100"]);
    }

    #[test]
    fn a_limit_that_does_not_come_back_is_an_error() {
        // Can be read, and not be written by root either.
        let limits = Limits { files: vec![Saved { path: "/proc/version".into(), text: "1\n".into() }] };
        let error = limits.restore().unwrap_err();
        assert!(error.message().contains("/proc/version"), "{error}");
    }

    #[test]
    fn hugepage_limits_of_both_versions() {
        let tree =
            Tree::new(&[("hugetlb.2MB.limit_in_bytes", "0\n"), ("hugetlb.2MB.rsvd.limit_in_bytes", "0\n"), ("hugetlb.1GB.max", "max\n")]);
        set_hugepages(&tree.cgroup(&["hugetlb"], false), "2MB", 4096).unwrap();
        assert_eq!((tree.read("hugetlb.2MB.limit_in_bytes"), tree.read("hugetlb.2MB.rsvd.limit_in_bytes")), ("4096".into(), "4096".into()));
        set_hugepages(&tree.cgroup(&[], true), "1GB", 0).unwrap();
        assert_eq!(tree.read("hugetlb.1GB.max"), "0");
        let error = set_hugepages(&tree.cgroup(&["hugetlb"], false), "64KB", 1).unwrap_err();
        assert!(error.message().contains("64KB"), "{error}");
        assert!(set_hugepages(&tree.cgroup(&["cpu"], false), "2MB", 1).is_err());
    }

    #[test]
    fn a_quota_is_lifted_on_v1_alone() {
        let tree = Tree::new(&[("cpu.cfs_quota_us", "5000\n")]);
        assert!(lift_quota(&tree.cgroup(&["cpu"], false)).unwrap());
        assert_eq!(tree.read("cpu.cfs_quota_us"), "-1");
        assert!(!lift_quota(&tree.cgroup(&[], true)).unwrap());
    }

    #[test]
    fn cpusets_of_execs_follow_their_parents() {
        let tree = Tree::new(&[
            ("cpuset.cpus", "0\n"),
            ("crisp-exec-1/cpuset.cpus", "0\n"),
            ("other/cpuset.cpus", "0\n"),
            ("crisp-exec-2/tasks", ""),
        ]);
        let cgroup = tree.cgroup(&["cpuset"], false);
        admit_cpuset(&cgroup, Some("1"), None).unwrap();
        assert_eq!((tree.read("cpuset.cpus"), tree.read("crisp-exec-1/cpuset.cpus")), ("1".into(), "1".into()));
        assert_eq!(tree.read("other/cpuset.cpus"), "0", "a container's own children are its own");
        admit_cpuset(&cgroup, None, Some("")).unwrap();
        admit_cpuset(&tree.cgroup(&["cpu"], false), Some("3"), None).unwrap();
        assert_eq!(tree.read("cpuset.cpus"), "1");
    }
}
