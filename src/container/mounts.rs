//! The mounts of a request, made ready on the host; and directories that must be in the root filesystem.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::api::runtime::{Mount, MountPropagation};
use crate::error::{Context, Error, Result};
use crate::spec::{process, refuse, HostFacts, Propagation, ResolvedMount};
use crate::sys::mount::{holding, table, MountInfo};
use crate::sys::{file, inroot};

/// Checks all mounts, then resolves their host paths; a missing one becomes a directory (0755), as with containerd.
/// INVALID_ARGUMENT and others as [`refuse::mount`] has them; FAILED_PRECONDITION when the host path is not on a mount that
/// is shared as the propagation needs.
pub fn resolve(mounts: &[Mount], host: &HostFacts) -> Result<Vec<ResolvedMount>> {
    let mut seen = HashSet::new();
    let mut resolved = Vec::with_capacity(mounts.len());
    for mount in mounts {
        refuse::mount(mount, host)?;
        let checked = check(mount)?;
        if !seen.insert(checked.container_path.clone()) {
            return Err(Error::invalid(format!("mount {}: asked for twice", checked.container_path.display())));
        }
        resolved.push(checked);
    }
    let mut mount_table = None;
    for mount in &mut resolved {
        let what = format!("mount {}", mount.container_path.display());
        mount.host_path = existing(&mount.host_path).context(|| what.clone())?;
        if mount.propagation != Propagation::Private {
            let table = match mount_table.take() {
                Some(table) => table,
                None => table().context(|| what.clone())?,
            };
            check_propagation(mount, &table)?;
            mount_table = Some(table);
        }
    }
    Ok(resolved)
}

/// Creates the working directory in the root filesystem, and an empty directory for each volume the image declares.
/// Returns nothing: links inside the image may move them, which the runtime will follow the same way.
pub fn make_directories(rootfs: &Path, working_dir: &Path, volumes: &[String]) -> Result<()> {
    let root = inroot::Root::open(rootfs)?;
    let place = root.make_dirs(working_dir)?;
    if process::leads_out(&place) {
        return Err(Error::invalid(format!(
            "working_dir: {} leads to {}, a process's own view of the host",
            working_dir.display(),
            place.display()
        )));
    }
    for volume in volumes {
        root.make_dirs(&process::clean(Path::new(volume)))?;
    }
    Ok(())
}

/// The request's words without a look at the host.
pub(super) fn check(mount: &Mount) -> Result<ResolvedMount> {
    let invalid = |what: &str| Error::invalid(format!("mount {}: {what}", mount.container_path));
    if !mount.container_path.starts_with('/') {
        return Err(invalid("container_path is not absolute"));
    }
    if !mount.host_path.starts_with('/') {
        return Err(invalid("host_path is not absolute"));
    }
    if mount.container_path.contains('\0') || mount.host_path.contains('\0') {
        return Err(invalid("a NUL byte in a path"));
    }
    let container_path = process::clean(Path::new(&mount.container_path));
    if container_path == Path::new("/") {
        return Err(invalid("the root cannot be mounted over"));
    }
    let propagation = match mount.propagation.enum_value() {
        Ok(MountPropagation::PROPAGATION_PRIVATE) => Propagation::Private,
        Ok(MountPropagation::PROPAGATION_HOST_TO_CONTAINER) => Propagation::HostToContainer,
        Ok(MountPropagation::PROPAGATION_BIDIRECTIONAL) => Propagation::Bidirectional,
        Err(_) => return Err(invalid("unknown propagation")),
    };
    Ok(ResolvedMount { container_path, host_path: PathBuf::from(&mount.host_path), readonly: mount.readonly, propagation })
}

fn existing(path: &Path) -> Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            file::make_dir(path, 0o755)?;
            path.canonicalize().context(|| format!("resolve {}", path.display()))
        }
        result => result.context(|| format!("resolve {}", path.display())),
    }
}

fn check_propagation(mount: &ResolvedMount, table: &[MountInfo]) -> Result<()> {
    let (needed, prefixes): (_, &[&str]) = match mount.propagation {
        Propagation::Private => return Ok(()),
        Propagation::HostToContainer => ("shared or slave", &["shared:", "master:"]),
        Propagation::Bidirectional => ("shared", &["shared:"]),
    };
    let what = || format!("mount {}: {}", mount.container_path.display(), mount.host_path.display());
    let holder = holding(table, &mount.host_path).ok_or_else(|| Error::internal(format!("{}: on no mount", what())))?;
    match holder.tags.iter().any(|tag| prefixes.iter().any(|prefix| tag.starts_with(prefix))) {
        true => Ok(()),
        false => Err(Error::precondition(format!("{} is on {}, which is not a {needed} mount", what(), holder.target.display()))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::container::host;
    use crate::error::Code;

    fn mount(container_path: &str, host_path: &Path) -> Mount {
        Mount { container_path: container_path.into(), host_path: host_path.to_str().unwrap().into(), ..Default::default() }
    }

    fn resolved(mounts: &[Mount]) -> Result<Vec<ResolvedMount>> {
        resolve(mounts, &host::detect().unwrap())
    }

    #[test]
    fn host_paths_are_resolved_and_created() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::write(base.join("file"), "").unwrap();
        symlink("file", base.join("link")).unwrap();
        let list = resolved(&[mount("/a/./b/../c", &base.join("link")), mount("/d", &base.join("new/dir"))]).unwrap();
        assert_eq!((list[0].container_path.as_path(), list[0].host_path.as_path()), (Path::new("/a/c"), base.join("file").as_path()));
        assert!(base.join("new/dir").is_dir());
        assert_eq!(list[1].host_path, base.join("new/dir"));
    }

    #[test]
    fn wrong_paths_are_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        for bad in ["", "a", "/", "/..", "/a/..", "/a\0"] {
            assert_eq!(resolved(&[mount("/ok", &missing), mount(bad, &missing)]).unwrap_err().code(), Code::InvalidArgument, "{bad:?}");
        }
        for bad in ["", "a", "/a\0"] {
            let error = resolved(&[mount("/ok", &missing), mount("/x", Path::new(bad))]).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{bad:?}");
        }
        let twice = resolved(&[mount("/ok", &missing), mount("/x/../ok", &missing)]).unwrap_err();
        assert!(twice.message().contains("twice"), "{twice}");
        let mut rro = mount("/x", &missing);
        (rro.readonly, rro.recursive_read_only) = (true, true);
        assert!(resolved(&[mount("/ok", &missing), rro]).unwrap_err().message().starts_with("RROUnsupported"));
        assert!(!missing.exists());
    }

    #[test]
    fn dangling_links_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        symlink("nowhere", dir.path().join("link")).unwrap();
        assert!(resolved(&[mount("/x", &dir.path().join("link"))]).is_err());
    }

    #[test]
    fn propagation_needs_a_shared_mount() {
        let info = |target: &str, tags: &[&str]| MountInfo {
            root: "/".into(),
            target: target.into(),
            options: String::new(),
            tags: tags.iter().map(|tag| tag.to_string()).collect(),
            fstype: "tmpfs".into(),
            source: String::new(),
            super_options: String::new(),
        };
        let table = [info("/", &[]), info("/shared", &["shared:1"]), info("/slave", &["master:1"])];
        let check = |path: &str, propagation| {
            let mount = ResolvedMount { container_path: "/c".into(), host_path: path.into(), readonly: false, propagation };
            check_propagation(&mount, &table)
        };
        check("/x", Propagation::Private).unwrap();
        check("/shared/x", Propagation::Bidirectional).unwrap();
        check("/shared/x", Propagation::HostToContainer).unwrap();
        check("/slave/x", Propagation::HostToContainer).unwrap();
        for (path, propagation) in [("/slave/x", Propagation::Bidirectional), ("/x", Propagation::HostToContainer)] {
            assert_eq!(check(path, propagation).unwrap_err().code(), Code::FailedPrecondition);
        }
    }

    #[test]
    fn directories_are_made_in_the_rootfs() {
        let dir = tempfile::tempdir().unwrap();
        make_directories(dir.path(), Path::new("/work/dir"), &["/data".into(), "../../var/lib".into()]).unwrap();
        for made in ["work/dir", "data", "var/lib"] {
            assert!(dir.path().join(made).is_dir(), "{made}");
        }
    }

    #[test]
    fn working_dir_may_not_lead_out_by_a_link() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/proc/self/fd", dir.path().join("w")).unwrap();
        let error = make_directories(dir.path(), Path::new("/w/7"), &[]).unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains("/proc/self/fd/7"), "{error}");
    }
}
