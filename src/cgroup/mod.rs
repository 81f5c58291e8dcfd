//! Control groups: where the hierarchies are, the path of a container in each, its processes, OOM counter, kill, removal.
//! One description serves v1, v2 and the hybrid of both: a cgroup is a list of directories, one per mounted hierarchy.

/// Limits as files: kept before an update, written back after one that failed.
#[cfg(feature = "engine")]
pub mod limits;
/// Formats of kernel files (cgroup-v2.rst, "Interface File Formats").
pub mod parse;
/// Paths as the OCI spec writes them, and systemd's slices.
pub mod path;
/// What a cgroup uses: readers of both versions.
#[cfg(feature = "engine")]
pub mod stat;
/// Facts of the v1 controllers.
pub mod v1;
/// Facts of the unified hierarchy.
pub mod v2;
/// Makes the first move of a process into a cgroup cheap.
pub mod warm;

/// What the names of execs' own cgroups, below their container's, begin with.
pub const EXEC: &str = "crisp-exec-";

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::mount::MountInfo;

pub use warm::warm;

/// Which hierarchies a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    V1,
    V2,
    /// v1 controllers, and a v2 tree beside them.
    Hybrid,
}

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// v1: controllers and `name=…`. v2: empty.
    pub controllers: Vec<String>,
    pub mount: PathBuf,
    /// The cgroup that is mounted there: `/` but inside a container.
    pub root: PathBuf,
    pub unified: bool,
}

/// The cgroup hierarchies of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub mode: Mode,
    pub hierarchies: Vec<Hierarchy>,
}

impl Layout {
    /// The hierarchies in this process's mount table.
    pub fn detect() -> Result<Layout> {
        Layout::from_table(&crate::sys::mount::table_of(&["cgroup", "cgroup2"])?)
    }

    /// The hierarchies as they were when this process first asked: they do not change under a running daemon.
    pub fn host() -> Result<&'static Layout> {
        static HOST: std::sync::OnceLock<Layout> = std::sync::OnceLock::new();
        if let Some(layout) = HOST.get() {
            return Ok(layout);
        }
        let found = Layout::detect()?;
        Ok(HOST.get_or_init(|| found))
    }

    /// The hierarchies of a mount table. A hierarchy mounted twice counts where it was mounted first.
    pub fn from_table(table: &[MountInfo]) -> Result<Layout> {
        let mut found: Vec<Hierarchy> = Vec::new();
        for mount in table {
            let (unified, controllers) = match mount.fstype.as_str() {
                "cgroup2" => (true, Vec::new()),
                "cgroup" => (false, v1::controllers(&mount.super_options)),
                _ => continue,
            };
            if !found.iter().any(|h| h.unified == unified && h.controllers == controllers) {
                found.push(Hierarchy { controllers, mount: mount.target.clone(), root: mount.root.clone(), unified });
            }
        }
        let mode = match (found.iter().any(|h| !h.unified), found.iter().any(|h| h.unified)) {
            (true, true) => Mode::Hybrid,
            (true, false) => Mode::V1,
            (false, true) => Mode::V2,
            (false, false) => return Err(Error::precondition("find cgroups: no cgroup filesystem is mounted")),
        };
        Ok(Layout { mode, hierarchies: found })
    }

    /// The v1 hierarchy of `controller`.
    pub fn v1(&self, controller: &str) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|h| h.controllers.iter().any(|c| c == controller))
    }

    /// The v2 hierarchy.
    pub fn v2(&self) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|h| h.unified)
    }
}

/// A cgroup's directory in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dir {
    pub path: PathBuf,
    pub controllers: Vec<String>,
    pub unified: bool,
}

/// One cgroup, in every hierarchy of the host. Never the root: nothing here can kill or remove that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    dirs: Vec<Dir>,
}

impl Cgroup {
    /// The cgroup that `linux.cgroupsPath` of an OCI spec names: `/a/b`, or systemd's `slice:prefix:name`.
    pub fn at(layout: &Layout, cgroups_path: &str) -> Result<Cgroup> {
        let relative = path::resolve(cgroups_path)?;
        let dirs = layout.hierarchies.iter().map(|h| Dir {
            path: h.mount.join(&relative),
            controllers: h.controllers.clone(),
            unified: h.unified,
        });
        Ok(Cgroup { dirs: dirs.collect() })
    }

    /// The cgroups of a living process; hierarchies in which it is in the root are left out. A zombie of v1 is in the root
    /// of all of them, whatever it was in before.
    pub fn of_pid(layout: &Layout, pid: i32) -> Result<Cgroup> {
        let file = format!("/proc/{pid}/cgroup");
        let text = std::fs::read_to_string(&file).context(|| format!("read {file}"))?;
        Ok(Cgroup::from_proc(layout, &text))
    }

    fn from_proc(layout: &Layout, text: &str) -> Cgroup {
        let mut dirs = Vec::new();
        for (names, place) in parse::proc_cgroup(text) {
            let found = layout.hierarchies.iter().find(|h| if names.is_empty() { h.unified } else { v1::same(&h.controllers, names) });
            let Some(hierarchy) = found else { continue };
            let place = Path::new(place);
            let place = place.strip_prefix(&hierarchy.root).or_else(|_| place.strip_prefix("/")).unwrap_or(place);
            if place.as_os_str().is_empty() || place.components().any(|c| matches!(c, std::path::Component::ParentDir)) {
                continue;
            }
            let dir = Dir { path: hierarchy.mount.join(place), controllers: hierarchy.controllers.clone(), unified: hierarchy.unified };
            dirs.push(dir);
        }
        Cgroup { dirs }
    }

    /// Its directories, whether they exist or not.
    pub fn dirs(&self) -> &[Dir] {
        &self.dirs
    }

    /// Its directory in the v1 hierarchy of `controller`, else in v2.
    pub fn dir(&self, controller: &str) -> Option<&Path> {
        self.v1_dir(controller).or_else(|| self.unified_dir())
    }

    /// The directory in the v1 hierarchy of `controller`, if it is in one.
    pub fn v1_dir(&self, controller: &str) -> Option<&Path> {
        self.dirs.iter().find(|d| d.controllers.iter().any(|c| c == controller)).map(|d| d.path.as_path())
    }

    /// The directory in the unified hierarchy.
    pub fn unified_dir(&self) -> Option<&Path> {
        self.dirs.iter().find(|d| d.unified).map(|d| d.path.as_path())
    }

    /// The cgroup `name` below this one, in the hierarchies for which `keep` is true.
    pub fn child(&self, name: &str, keep: impl Fn(&Dir) -> bool) -> Cgroup {
        let dirs = self.dirs.iter().filter(|d| keep(d)).map(|d| Dir { path: d.path.join(name), ..d.clone() });
        Cgroup { dirs: dirs.collect() }
    }

    /// Whether any of its directories is there.
    pub fn exists(&self) -> bool {
        self.dirs.iter().any(|d| d.path.is_dir())
    }

    /// Makes the directories, and missing parents. v1 cpusets are filled from the parent, without which nothing can enter
    /// them. On v2 the OCI runtimes turn controllers on in all parents when they make a container's cgroup, and not before.
    pub fn create(&self) -> Result<()> {
        for dir in &self.dirs {
            std::fs::create_dir_all(&dir.path).context(|| format!("create cgroup {}", dir.path.display()))?;
            if dir.controllers.iter().any(|c| c == "cpuset") {
                v1::fill_cpuset(&dir.path)?;
            }
        }
        Ok(())
    }

    /// Moves a process into it, in every hierarchy in which it was created.
    pub fn enter(&self, pid: i32) -> Result<()> {
        for dir in self.dirs.iter().filter(|d| d.path.is_dir()) {
            let file = dir.path.join("cgroup.procs");
            std::fs::write(&file, pid.to_string()).context(|| format!("write {pid} to {}", file.display()))?;
        }
        Ok(())
    }

    /// Processes in it and below, each once. Those this process cannot name (other PID namespaces above) are left out.
    pub fn procs(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for dir in &self.dirs {
            for_each_dir(&dir.path, &mut |path| {
                if let Ok(text) = std::fs::read_to_string(path.join("cgroup.procs")) {
                    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0));
                }
            });
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// How many processes there are in it and below, by one hierarchy that OCI runtimes and execs use whole: a cgroup without
    /// children costs one file.
    #[cfg(feature = "engine")]
    pub fn process_count(&self) -> u64 {
        let mut count = 0;
        self.for_each_procs(&mut |text| count += stat::pids::processes(text));
        count
    }

    /// The same count, and the ids of those that are not of another PID namespace.
    #[cfg(feature = "engine")]
    pub fn process_list(&self) -> (u64, Vec<i32>) {
        let (mut count, mut pids) = (0, Vec::new());
        self.for_each_procs(&mut |text| {
            count += stat::pids::processes(text);
            pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
        });
        (count, pids)
    }

    #[cfg(feature = "engine")]
    fn for_each_procs(&self, found: &mut dyn FnMut(&str)) {
        use std::os::unix::fs::MetadataExt;
        let Some(dir) = self.dir("pids") else { return };
        let mut add = |path: &Path| found(&std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default());
        // A directory of cgroupfs has a link from each child.
        match std::fs::symlink_metadata(dir) {
            Ok(meta) if meta.nlink() == 2 => add(dir),
            Ok(_) => for_each_dir(dir, &mut add),
            Err(_) => {}
        }
    }

    /// Sends SIGKILL to all processes once; gives how many there were. Repeat until 0: a process may fork meanwhile.
    pub fn kill_once(&self) -> usize {
        for dir in self.dirs.iter().filter(|d| d.unified) {
            // Takes forks in flight too (Linux 5.14). Without it the loop below does.
            let _ = std::fs::write(dir.path.join("cgroup.kill"), "1");
        }
        let pids = self.procs();
        let me = std::process::id() as i32;
        for pid in pids.iter().filter(|p| **p != me) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
        }
        pids.len()
    }

    /// Kills until nothing is left; DEADLINE_EXCEEDED when something still lives after `limit`.
    pub fn kill_all(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut pause = Duration::from_millis(1);
        loop {
            let left = self.kill_once();
            if left == 0 {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(Error::deadline(format!("kill cgroup {self}: {left} processes are left")));
            }
            // A frozen v1 cgroup (a paused container) does not even die.
            v1::thaw(self);
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Processes that the OOM killer has taken in it and below, since it was made. None where nothing counts them: it is gone.
    pub fn oom_kills(&self) -> Option<u64> {
        match self.v1_dir("memory") {
            Some(dir) => v1::oom_kills(dir),
            None => self.unified_dir().and_then(v2::oom_kills),
        }
    }

    /// Removes it and all below, deepest first, in every hierarchy. What is busy is tried again for `limit`: the kernel
    /// lets go of a dead process some time after its end.
    pub fn remove(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut errors = ErrorList::default();
        for dir in &self.dirs {
            let mut all = Vec::new();
            for_each_dir(&dir.path, &mut |path| all.push(path.to_owned()));
            for path in all.iter().rev() {
                errors.keep(remove_one(path, end));
            }
        }
        errors.finish()
    }
}

impl std::fmt::Display for Cgroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.dirs.first() {
            Some(dir) => write!(f, "{}", dir.path.display()),
            None => f.write_str("(none)"),
        }
    }
}

fn remove_one(path: &Path, end: Instant) -> Result<()> {
    loop {
        match std::fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => return Err(e).context(|| format!("remove cgroup {}", path.display())),
        }
    }
}

/// Calls `visit` for `dir` and all directories below it, parents first. One that is not there is passed over.
fn for_each_dir(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    visit(dir);
    for entry in entries.flatten() {
        // File types come with the listing: no stat of the hundred files of a cgroup.
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            for_each_dir(&entry.path(), visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fstype: &str, target: &str, super_options: &str) -> MountInfo {
        MountInfo {
            root: "/".into(),
            target: target.into(),
            options: "rw".into(),
            tags: vec![],
            fstype: fstype.into(),
            source: "cgroup".into(),
            super_options: super_options.into(),
        }
    }

    fn hybrid() -> Layout {
        Layout::from_table(&[
            mount("tmpfs", "/sys/fs/cgroup", "rw,mode=755"),
            mount("cgroup", "/sys/fs/cgroup/cpu,cpuacct", "rw,cpu,cpuacct"),
            mount("cgroup", "/sys/fs/cgroup/memory", "rw,memory"),
            mount("cgroup", "/elsewhere", "rw,memory"),
            mount("cgroup", "/sys/fs/cgroup/systemd", "rw,xattr,name=systemd"),
            mount("cgroup2", "/sys/fs/cgroup/unified", "rw"),
        ])
        .unwrap()
    }

    #[test]
    fn modes() {
        assert_eq!(hybrid().mode, Mode::Hybrid);
        assert_eq!(hybrid().v1("memory").unwrap().mount, Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(Layout::from_table(&[mount("cgroup2", "/sys/fs/cgroup", "rw")]).unwrap().mode, Mode::V2);
        assert_eq!(Layout::from_table(&[mount("cgroup", "/c/pids", "rw,pids")]).unwrap().mode, Mode::V1);
        assert!(Layout::from_table(&[]).is_err());
    }

    #[test]
    fn a_path_in_each_hierarchy() {
        let cgroup = Cgroup::at(&hybrid(), "/kubepods/c1").unwrap();
        assert_eq!(cgroup.dirs().len(), 4);
        assert_eq!(cgroup.dir("memory"), Some(Path::new("/sys/fs/cgroup/memory/kubepods/c1")));
        assert_eq!(cgroup.dir("hugetlb"), Some(Path::new("/sys/fs/cgroup/unified/kubepods/c1")));
        assert!(Cgroup::at(&hybrid(), "/").is_err());
    }

    #[test]
    fn a_process_of_a_container_and_a_zombie() {
        let text = "9:name=systemd:/p/c1\n4:memory:/p/c1\n1:cpu,cpuacct:/\n0::/p/c1\n";
        let cgroup = Cgroup::from_proc(&hybrid(), text);
        assert_eq!(cgroup.dirs().len(), 3);
        assert!(Cgroup::from_proc(&hybrid(), "4:memory:/\n0::/\n").dirs().is_empty());
    }

    #[test]
    fn tree_of_directories() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout {
            mode: Mode::V2,
            hierarchies: vec![Hierarchy { controllers: vec![], mount: dir.path().into(), root: "/".into(), unified: true }],
        };
        let cgroup = Cgroup::at(&layout, "/a/b").unwrap();
        assert!(!cgroup.exists());
        cgroup.create().unwrap();
        let child = cgroup.child("exec-1", |_| true);
        child.create().unwrap();
        assert_eq!((cgroup.procs(), cgroup.oom_kills()), (vec![], None));
        cgroup.remove(Duration::ZERO).unwrap();
        cgroup.remove(Duration::ZERO).unwrap();
        assert!(!child.exists() && dir.path().join("a").exists());
    }
}
