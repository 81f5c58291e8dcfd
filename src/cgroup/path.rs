//! Cgroup paths of the OCI spec: `/a/b` for the cgroupfs driver, `slice:prefix:name` for systemd's.

use std::path::{Component, PathBuf};

use crate::error::{Error, Result};

/// The path below a hierarchy's mount point that `cgroups_path` stands for. The root and `..` are errors.
pub fn resolve(cgroups_path: &str) -> Result<PathBuf> {
    let wrong = |why: &str| Error::invalid(format!("cgroup path {cgroups_path:?}: {why}"));
    let text = match cgroups_path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] if !cgroups_path.starts_with('/') => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            if prefix.contains('/') || name.is_empty() || name.contains('/') {
                return Err(wrong("not a systemd unit"));
            }
            let parent = expand_slice(slice).ok_or_else(|| wrong("not a systemd slice"))?;
            format!("{parent}/{}", unit(prefix, name))
        }
        _ => cgroups_path.to_owned(),
    };
    let mut path = PathBuf::new();
    for part in PathBuf::from(text).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(wrong("it has ..")),
        }
    }
    if path.as_os_str().is_empty() {
        return Err(wrong("it is the root"));
    }
    Ok(path)
}

/// Whether a cgroup parent is a slice of systemd, wherever it says that the slice is.
pub fn is_slice(parent: &str) -> bool {
    parent.trim_end_matches('/').ends_with(".slice")
}

/// The cgroup path of `name` below a sandbox's cgroup parent, in the form of the cgroup driver: a parent that ends in `.slice` is
/// systemd's, of which its last element counts.
pub fn below(parent: &str, name: &str) -> String {
    match parent.trim_end_matches('/').rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:crisp:{name}"),
        _ => format!("/{}/{name}", parent.trim_matches('/')).replace("//", "/"),
    }
}

/// The cgroup that a cgroup parent is, as `resolve` takes it: a parent that ends in `.slice` is systemd's, wherever it says
/// that the slice is.
pub fn parent(parent: &str) -> Result<String> {
    match parent.trim_end_matches('/').rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => {
            expand_slice(slice).ok_or_else(|| Error::invalid(format!("cgroup parent {parent:?}: not a systemd slice")))
        }
        _ => Ok(parent.to_owned()),
    }
}

/// Whether `parent` is the cgroup that kubelet made for the pod of that uid alone: `…/podUID`, or `…-podUID.slice` with
/// underscores in the uid.
pub fn is_of_pod(parent: &str, uid: &str) -> bool {
    let name = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let pod = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit('-').next().unwrap_or_default(),
        None => name,
    };
    let named = pod.strip_prefix("pod").filter(|_| !uid.is_empty());
    named.is_some_and(|found| found == uid || found == uid.replace('-', "_"))
}

/// `a-b.slice` is the directory `a.slice/a-b.slice` (systemd.slice(5)); `-.slice` is the root.
pub fn expand_slice(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(String::new());
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return None;
    }
    let mut path = String::new();
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push('/');
        path.push_str(&name[..end]);
        path.push_str(".slice");
    }
    Some(path)
}

/// The unit's name as the OCI runtimes make it.
fn unit(prefix: &str, name: &str) -> String {
    if name.ends_with(".slice") {
        return name.to_owned();
    }
    if prefix.is_empty() {
        return format!("{name}.scope");
    }
    format!("{prefix}-{name}.scope")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_in_both_forms() {
        assert_eq!(below("/kubepods/pod1", "a"), "/kubepods/pod1/a");
        assert_eq!(below("/", "a"), "/a");
        assert_eq!(below("kubepods", "a"), "/kubepods/a");
        assert_eq!(below("/kubepods.slice/kubepods-pod1.slice", "a"), "kubepods-pod1.slice:crisp:a");
        // As `is_slice` and `parent` take it.
        assert_eq!(below("kubepods.slice/", "a"), "kubepods.slice:crisp:a");
        assert_eq!(below("/kubepods/pod1//", "a"), "/kubepods/pod1/a");
    }
    use std::path::Path;

    #[test]
    fn parents_in_both_forms() {
        assert_eq!(parent("/kubepods/pod1").unwrap(), "/kubepods/pod1");
        let slice = "/kubepods.slice/kubepods-pod1.slice";
        assert_eq!((parent(slice).unwrap().as_str(), parent("kubepods-pod1.slice").unwrap().as_str()), (slice, slice));
        assert!(parent("a--b.slice").is_err());
    }

    #[test]
    fn cgroups_that_kubelet_makes_for_a_pod() {
        let uid = "3f2a-11";
        for yes in [
            "/kubepods/pod3f2a-11",
            "/kubepods/burstable/pod3f2a-11/",
            "kubepods-burstable-pod3f2a_11.slice",
            "/k.slice/k-pod3f2a_11.slice",
        ] {
            assert!(is_of_pod(yes, uid), "{yes}");
        }
        for no in ["/kubepods", "/kubepods/pod3f2a-1", "/pod", "/3f2a-11", "kubepods-pod3f2a.slice", "crisp.slice", ""] {
            assert!(!is_of_pod(no, uid), "{no}");
        }
        assert!(!is_of_pod("/kubepods/pod", ""));
    }

    #[test]
    fn both_forms() {
        assert_eq!(resolve("/kubepods/pod1/c1").unwrap(), Path::new("kubepods/pod1/c1"));
        assert_eq!(
            resolve("kubepods-burstable-pod1.slice:crisp:c1").unwrap(),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/crisp-c1.scope")
        );
        assert_eq!(resolve("-.slice:crisp:c1").unwrap(), Path::new("crisp-c1.scope"));
        assert_eq!(resolve(":crisp:c1").unwrap(), Path::new("system.slice/crisp-c1.scope"));
    }

    #[test]
    fn the_root_and_what_climbs_are_refused() {
        for path in ["", "/", "//", "/.", "/a/../..", "../a", "-.slice:a:../..", "a--b.slice:x:y", "nope:x:y"] {
            assert!(resolve(path).is_err(), "{path}");
        }
    }
}
