//! What is mounted below a volume. A bind mount of the spec is recursive, but crun (seen with 1.8.1) clones the source alone for a
//! container with a user namespace: its processes would see, and write to, what the mounts below cover. So each is a mount of its own.

use std::path::Path;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::spec::ResolvedMount;
use crate::sys::mount::MountInfo;

/// How many in all. crun holds a descriptor for each, and most have a soft limit of 1024.
const MOST: usize = 512;

/// Puts those of `table` (in the kernel's order) after the mounts whose sources they are below of, but for what is ours (below `run`)
/// and pinned namespaces. FAILED_PRECONDITION for too many.
pub fn list(mounts: &mut Vec<ResolvedMount>, table: &[MountInfo], run: &Path) -> Result<()> {
    let mut all = Vec::with_capacity(mounts.len());
    for (number, mount) in mounts.iter().enumerate() {
        // Over what another mount of the container covers nothing comes again.
        let covers = |other: &ResolvedMount, later: bool, path: &Path| {
            let inside = other.container_path.starts_with(&mount.container_path);
            inside && (later || other.container_path != mount.container_path) && path.starts_with(&other.container_path)
        };
        let is_covered = |path: &Path| mounts.iter().enumerate().any(|(n, other)| n != number && covers(other, n > number, path));
        let is_others = |entry: &&MountInfo| entry.fstype != "nsfs" && (!entry.target.starts_with(run) || mount.host_path.starts_with(run));
        all.push(mount.clone());
        all.extend(below(mount, table.iter().filter(is_others)).into_iter().filter(|one| !is_covered(&one.container_path)));
        if all.len() - number > MOST {
            let at = mount.container_path.display();
            return Err(Error::precondition(format!(
                "mount {at}: what is mounted below its host path takes the container to more than {MOST} mounts, and this OCI runtime takes \
                 each by itself into a user namespace"
            )));
        }
    }
    *mounts = all;
    Ok(())
}

/// Read-only only where that was asked for recursively: that, and other options, are else the volume's own.
fn below<'a>(mount: &ResolvedMount, table: impl Iterator<Item = &'a MountInfo>) -> Vec<ResolvedMount> {
    let mut found: Vec<ResolvedMount> = Vec::new();
    if !mount.host_path.is_dir() {
        return found;
    }
    for entry in table.filter(|entry| entry.target != mount.host_path) {
        let Ok(rest) = entry.target.strip_prefix(&mount.host_path) else { continue };
        let container_path = mount.container_path.join(rest);
        // One that another covers has no path, or the other's; one that may not be bound is left out of a recursive bind too.
        let is_new = !found.iter().any(|other| other.container_path == container_path);
        if is_new && !entry.tags.iter().any(|tag| tag == "unbindable") && is_there(&entry.target) {
            found.push(ResolvedMount {
                container_path,
                host_path: entry.target.clone(),
                readonly: mount.recursive_read_only,
                options: Vec::new(),
                comes_with: Some(mount.container_path.clone()),
                ..mount.clone()
            });
        }
    }
    found
}

/// Nothing is mounted for it, and no server asked: one that is dead would hold us.
fn is_there(path: &Path) -> bool {
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW;
    !matches!(rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::TYPE), Err(Errno::NOENT | Errno::NOTDIR))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::error::Code;
    use crate::spec::Propagation;

    fn entry(target: PathBuf, tags: &[&str]) -> MountInfo {
        let tags = tags.iter().map(|tag| tag.to_string()).collect();
        MountInfo {
            root: "/".into(),
            target,
            options: "rw".into(),
            tags,
            fstype: "tmpfs".into(),
            source: "t".into(),
            super_options: "rw".into(),
        }
    }

    fn volume(host_path: &Path, container_path: &str) -> ResolvedMount {
        ResolvedMount {
            host_path: host_path.to_owned(),
            container_path: container_path.into(),
            propagation: Propagation::HostToContainer,
            ..Default::default()
        }
    }

    fn paths(mounts: &[ResolvedMount]) -> Vec<&str> {
        mounts.iter().map(|mount| mount.container_path.to_str().unwrap()).collect()
    }

    #[test]
    fn what_is_seen_below_is_listed_after_its_volume() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path();
        std::fs::create_dir_all(host.join("a/b")).unwrap();
        std::fs::create_dir_all(host.join("c")).unwrap();
        let beside = PathBuf::from(format!("{}x", host.display()));
        let mut table = vec![entry("/".into(), &[]), entry(host.into(), &[]), entry(beside, &[])];
        table.extend(["a", "a/b", "a", "gone", "a/gone"].map(|name| entry(host.join(name), &["shared:1"])));
        table.push(entry(host.join("c"), &["unbindable"]));
        let mut mounts = vec![volume(host, "/v"), volume(&host.join("c"), "/w")];
        (mounts[0].readonly, mounts[0].options) = (true, vec!["noexec".into()]);
        list(&mut mounts, &table, Path::new("/run/crisp")).unwrap();
        assert_eq!(paths(&mounts), ["/v", "/v/a", "/v/a/b", "/w"]);
        let sub = &mounts[1];
        assert_eq!((sub.host_path.as_path(), sub.propagation), (host.join("a").as_path(), Propagation::HostToContainer));
        assert!(!sub.readonly && sub.options.is_empty() && mounts[0].readonly && mounts[0].options.len() == 1);

        let mut mounts = vec![ResolvedMount { readonly: true, recursive_read_only: true, ..volume(host, "/v") }];
        list(&mut mounts, &table, Path::new("/run/crisp")).unwrap();
        assert!(mounts.iter().all(|mount| mount.readonly && mount.recursive_read_only));
    }

    #[test]
    fn what_another_volume_covers_stays_covered() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path();
        std::fs::create_dir_all(host.join("a/b")).unwrap();
        std::fs::create_dir_all(host.join("c")).unwrap();
        let table = ["a", "a/b", "c"].map(|name| entry(host.join(name), &[]));
        let other = tempfile::tempdir().unwrap();
        let mut mounts = vec![volume(other.path(), "/v/a"), volume(host, "/v"), volume(host, "/w"), volume(other.path(), "/w")];
        list(&mut mounts, &table, Path::new("/run/crisp")).unwrap();
        assert_eq!(paths(&mounts), ["/v/a", "/v", "/v/c", "/w", "/w"]);
    }

    #[test]
    fn files_have_nothing_below_and_there_is_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, b"").unwrap();
        let mut mounts = vec![volume(&file, "/f"), volume(Path::new(""), "/image")];
        list(&mut mounts, &[entry(file.clone(), &[]), entry("/".into(), &[])], Path::new("/run/crisp")).unwrap();
        assert_eq!(paths(&mounts), ["/f", "/image"]);

        let many: Vec<MountInfo> = (0..MOST).map(|n| dir.path().join(format!("m{n}"))).map(|path| entry(path, &[])).collect();
        many.iter().for_each(|entry| std::fs::create_dir(&entry.target).unwrap());
        let error = list(&mut vec![volume(dir.path(), "/many")], &many, Path::new("/run/crisp")).unwrap_err();
        assert!(error.code() == Code::FailedPrecondition && error.message().starts_with("mount /many: "), "{error}");
        list(&mut vec![volume(dir.path(), "/many")], &many[1..], Path::new("/run/crisp")).unwrap();
    }

    #[test]
    fn our_own_mounts_and_namespaces_stay_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir_all(run.join("rootfs")).unwrap();
        std::fs::write(dir.path().join("ns"), b"").unwrap();
        let ns = MountInfo { fstype: "nsfs".into(), ..entry(dir.path().join("ns"), &[]) };
        let table = [entry(run.join("rootfs"), &[]), ns, entry(run.clone(), &[])];
        let mut mounts = vec![volume(dir.path(), "/v")];
        list(&mut mounts, &table, &run).unwrap();
        assert_eq!(paths(&mounts), ["/v"]);
        // A mapped copy of a volume is ours, and what is below it is the volume's.
        let mut mounts = vec![volume(&run, "/v")];
        list(&mut mounts, &table, &run).unwrap();
        assert_eq!(paths(&mounts), ["/v", "/v/rootfs"]);
    }
}
