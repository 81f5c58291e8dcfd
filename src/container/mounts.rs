//! The mounts of a request, made ready on the host; and the working directory, which must be in the root filesystem.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::api::runtime::{Mount, MountPropagation};
use crate::error::{Context, Error, Result};
use crate::spec::{process, refuse, HostFacts, Propagation, ResolvedMount};
use crate::sys::mount::{holding, table, MountInfo};
use crate::sys::{file, inroot};

/// Checks all mounts by their words alone; `recursive_read_only` says whether the OCI runtime can do that. Mounts of images have no
/// host path yet. Of two on the same path, which Kubernetes lets through, the later covers the other. INVALID_ARGUMENT and others as [`refuse::mount`] has them.
pub fn check_all(mounts: &[Mount], host: &HostFacts, recursive_read_only: bool) -> Result<Vec<ResolvedMount>> {
    let checked = |asked| refuse::mount(asked, host, recursive_read_only).and_then(|()| check(asked));
    mounts.iter().map(checked).collect()
}

/// Resolves the host paths of checked mounts; a missing one becomes a directory (0755), as with containerd. FAILED_PRECONDITION
/// when the host path is not on a mount that is shared as the propagation needs.
pub fn find(mounts: &mut [ResolvedMount]) -> Result<()> {
    let mut mount_table = None;
    for mount in mounts.iter_mut().filter(|mount| !mount.host_path.as_os_str().is_empty()) {
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
    Ok(())
}

/// Looks whether the image can be a root file system, and creates the working directory in it. Links inside the image may move
/// that, which the runtime will follow the same way. FAILED_PRECONDITION when a directory of the kernel's is none: runc 1.1 makes
/// links below `rootfs/dev`, and removes what is there, before it enters the root file system; over a link it would do so on the host.
/// `owner`: of directories that are made.
pub fn prepare_root(rootfs: &Path, working_dir: &Path, owner: Option<(u32, u32)>) -> Result<()> {
    let top = rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open {}", rootfs.display()))?;
    for name in ["proc", "sys", "dev"] {
        match rustix::fs::statat(&top, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).context(|| format!("look at /{name} of the image")),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {}
            Ok(_) => return Err(Error::precondition(format!("the image's /{name} is not a directory"))),
        }
    }
    let place = inroot::Root::open(rootfs)?.owned_by(owner).make_dirs(working_dir).context(|| "working_dir")?;
    match process::leads_out(&place) {
        true => Err(Error::invalid(format!(
            "working_dir: {} leads to {}, a process's own view of the host",
            working_dir.display(),
            place.display()
        ))),
        false => Ok(()),
    }
}

/// The request's words without a look at the host.
pub(super) fn check(mount: &Mount) -> Result<ResolvedMount> {
    let invalid = |what: &str| Error::invalid(format!("mount {}: {what}", mount.container_path));
    if !mount.container_path.starts_with('/') {
        return Err(invalid("container_path is not absolute"));
    }
    if !mount.host_path.starts_with('/') && mount.image.is_none() {
        return Err(invalid("host_path is not absolute"));
    }
    for (field, path) in
        [("container_path", &mount.container_path), ("host_path", &mount.host_path), ("image_sub_path", &mount.image_sub_path)]
    {
        if path.contains('\0') {
            return Err(invalid(&format!("a NUL byte in {field}")));
        }
        if path.len() >= process::PATH_MAX {
            return Err(Error::invalid(format!("mount: {field} is longer than {} bytes", process::PATH_MAX - 1)));
        }
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
    Ok(ResolvedMount {
        container_path,
        host_path: PathBuf::from(&mount.host_path),
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        propagation,
        options: mount.mount_options.clone(),
        comes_with: None,
    })
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
        let mut list = check_all(mounts, &host::detect().unwrap(), false)?;
        find(&mut list).map(|()| list)
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
        let long = format!("/{}", "a/".repeat(2048));
        for bad in ["", "a", "/a\0", &long] {
            let error = resolved(&[mount("/ok", &missing), mount("/x", Path::new(bad))]).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{bad:?}");
        }
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
        let checked = |path: &str, propagation| {
            let mount = ResolvedMount { container_path: "/c".into(), host_path: path.into(), propagation, ..Default::default() };
            check_propagation(&mount, &table)
        };
        checked("/x", Propagation::Private).unwrap();
        checked("/shared/x", Propagation::Bidirectional).unwrap();
        checked("/shared/x", Propagation::HostToContainer).unwrap();
        checked("/slave/x", Propagation::HostToContainer).unwrap();
        for (path, propagation) in [("/slave/x", Propagation::Bidirectional), ("/x", Propagation::HostToContainer)] {
            assert_eq!(checked(path, propagation).unwrap_err().code(), Code::FailedPrecondition);
        }
    }

    #[test]
    fn two_in_one_place_are_both_mounted() {
        let of = |container_path: &str, host_path: &str| Mount {
            container_path: container_path.into(),
            host_path: host_path.into(),
            ..Default::default()
        };
        let both = check_all(&[of("/data", "/a"), of("/data/./", "/b")], &crate::spec::fixture::host(), false).unwrap();
        let seen: Vec<_> = both.iter().map(|m| (m.container_path.to_str().unwrap(), m.host_path.to_str().unwrap())).collect();
        assert_eq!(seen, [("/data", "/a"), ("/data", "/b")]);
    }

    #[test]
    fn the_working_dir_is_made_in_the_rootfs() {
        let dir = tempfile::tempdir().unwrap();
        prepare_root(dir.path(), Path::new("/work/dir"), None).unwrap();
        assert!(dir.path().join("work/dir").is_dir());
        let deep = format!("/{}", "a/".repeat(3000));
        let error = prepare_root(dir.path(), Path::new(&deep), None).unwrap_err();
        assert!(error.message().starts_with("working_dir"), "{error}");
    }

    #[test]
    fn directories_of_the_kernel_are_none_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("proc")).unwrap();
        prepare_root(dir.path(), Path::new("/"), None).unwrap();
        symlink("/dev", dir.path().join("dev")).unwrap();
        assert_eq!(prepare_root(dir.path(), Path::new("/"), None).unwrap_err().code(), Code::FailedPrecondition);
        std::fs::remove_file(dir.path().join("dev")).unwrap();
        std::fs::write(dir.path().join("sys"), "").unwrap();
        assert!(prepare_root(dir.path(), Path::new("/"), None).unwrap_err().message().contains("/sys"));
    }

    #[test]
    fn working_dir_may_not_lead_out_by_a_link() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/proc/self/fd", dir.path().join("w")).unwrap();
        let error = prepare_root(dir.path(), Path::new("/w/7"), None).unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains("/proc/self/fd/7"), "{error}");
    }
}
