//! Facts of the v1 controllers (Documentation/admin-guide/cgroup-v1).

use std::path::Path;

use super::{for_each_dir, parse, Cgroup};
use crate::error::{Context, Result};

/// Words of the super block options that are no controllers.
const FLAGS: [&str; 9] = ["rw", "ro", "xattr", "noprefix", "clone_children", "none", "cpuset_v2_mode", "favordynmods", "relatime"];

/// The controllers and the `name=` of a v1 hierarchy, from its super block options.
pub fn controllers(super_options: &str) -> Vec<String> {
    super_options
        .split(',')
        .filter(|o| !FLAGS.contains(o) && !o.starts_with("release_agent=") && !o.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Whether `names` (as in /proc/PID/cgroup) are these controllers, in any order.
pub fn same(controllers: &[String], names: &str) -> bool {
    names.split(',').count() == controllers.len() && names.split(',').all(|n| controllers.iter().any(|c| c == n))
}

/// OOM kills in `dir` and below. The counter is local to each cgroup. None where there is none.
pub fn oom_kills(dir: &Path) -> Option<u64> {
    let mut sum = None;
    for_each_dir(dir, &mut |path| {
        let text = std::fs::read_to_string(path.join("memory.oom_control")).unwrap_or_default();
        sum = [sum, parse::flat_keyed(&text, "oom_kill")].into_iter().flatten().reduce(|a, b| a + b);
    });
    sum
}

/// A new cpuset is empty, and a process cannot enter an empty one: fills it, and its parents, from above.
pub fn fill_cpuset(dir: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        fill_from_parent(dir, file)?;
    }
    Ok(())
}

fn fill_from_parent(dir: &Path, file: &str) -> Result<String> {
    let path = dir.join(file);
    let value = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    if !value.trim().is_empty() {
        return Ok(value);
    }
    let Some(parent) = dir.parent().filter(|p| p.join(file).exists()) else { return Ok(value) };
    let value = fill_from_parent(parent, file)?;
    std::fs::write(&path, value.trim()).context(|| format!("write {}", path.display()))?;
    Ok(value)
}

/// Lets frozen processes run, so that they can die.
pub fn thaw(cgroup: &Cgroup) {
    for dir in cgroup.dirs().iter().filter(|d| d.controllers.iter().any(|c| c == "freezer")) {
        let _ = std::fs::write(dir.path.join("freezer.state"), "THAWED");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_controllers() {
        assert_eq!(controllers("rw,cpu,cpuacct"), ["cpu", "cpuacct"]);
        assert_eq!(controllers("rw,xattr,release_agent=/lib/x,name=systemd"), ["name=systemd"]);
        assert!(same(&controllers("rw,cpu,cpuacct"), "cpuacct,cpu"));
        assert!(!same(&controllers("rw,cpu,cpuacct"), "cpu"));
    }

    #[test]
    fn cpusets_are_filled_from_above() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        for (place, cpus) in [(dir.path(), "0-1\n"), (&dir.path().join("a"), "\n"), (deep.as_path(), "\n")] {
            std::fs::write(place.join("cpuset.cpus"), cpus).unwrap();
            std::fs::write(place.join("cpuset.mems"), "0\n").unwrap();
        }
        fill_cpuset(&deep).unwrap();
        assert_eq!(std::fs::read_to_string(deep.join("cpuset.cpus")).unwrap(), "0-1");
    }

    #[test]
    fn oom_kills_of_all_levels() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("exec-1")).unwrap();
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n";
        std::fs::write(dir.path().join("memory.oom_control"), text).unwrap();
        std::fs::write(dir.path().join("exec-1/memory.oom_control"), text).unwrap();
        assert_eq!(oom_kills(dir.path()), Some(2));
        assert_eq!(oom_kills(Path::new("/nonexistent")), None);
    }
}
