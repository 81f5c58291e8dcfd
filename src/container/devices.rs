//! Devices of the host for a container: those of the request, all of them when it is privileged.

use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::api::runtime::{ContainerConfig, Device};
use crate::error::{Context, Error, Result};
use crate::spec::{process, userns, ResolvedDevice};

/// Directories of /dev that each container has its own of, or that are not the machine's.
const SKIPPED_DIRECTORIES: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];

/// Directories below a directory of devices, at most.
const MAX_DEPTH: usize = 8;

/// The devices of a container: the request's, and for a privileged container the host's beside them. INVALID_ARGUMENT for a device
/// that would be another one in a user namespace, where the OCI runtime binds some of the host's own.
pub fn collect(config: &ContainerConfig, in_user_namespace: bool) -> Result<Vec<ResolvedDevice>> {
    let mut devices = resolve(&config.devices)?;
    let replaced = |device: &&ResolvedDevice| in_user_namespace && !userns::may_be_bound(&device.path) && !is_hosts_own(device);
    if let Some(device) = devices.iter().find(replaced) {
        let (path, host_path) = (device.path.display(), device.host_path.display());
        return Err(Error::invalid(format!(
            "device {host_path}: container_path {path}: with a user namespace the OCI runtime puts the host's {path} there"
        )));
    }
    if config.linux.security_context.privileged {
        devices.extend(of_host(Path::new("/dev"))?);
    }
    let mut seen = HashSet::new();
    devices.retain(|device| seen.insert(device.path.clone()));
    Ok(devices)
}

/// The request's devices. A host path may be a link to a device, or a directory: then all devices below it.
/// INVALID_ARGUMENT for wrong words, FAILED_PRECONDITION for a path that is no device.
fn resolve(devices: &[Device]) -> Result<Vec<ResolvedDevice>> {
    let mut all = Vec::new();
    for device in devices {
        let what = || format!("device {}", device.host_path);
        let container_path = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
        if !device.host_path.starts_with('/') || !container_path.starts_with('/') {
            return Err(Error::invalid(format!("{}: paths must be absolute", what())));
        }
        for (field, path) in [("host_path", &device.host_path), ("container_path", &device.container_path)] {
            if path.contains('\0') {
                return Err(Error::invalid(format!("device {:?}: a NUL byte in {field}", device.host_path)));
            }
        }
        if device.permissions.is_empty() || !device.permissions.bytes().all(|b| b"rwm".contains(&b)) {
            return Err(Error::invalid(format!("{}: permissions {:?} are not of r, w and m", what(), device.permissions)));
        }
        let container_path = process::clean(Path::new(container_path));
        let host_path = Path::new(&device.host_path).canonicalize().context(what)?;
        let before = all.len();
        match host_path.is_dir() {
            true => walk(&host_path, &container_path, &device.permissions, &[], MAX_DEPTH, &mut all)?,
            false => all.extend(node(&host_path, container_path, &device.permissions)?),
        }
        if all.len() == before {
            return Err(Error::precondition(format!("{}: not a device", what())));
        }
    }
    Ok(all)
}

/// Whether it is what the host has at its path in the container.
fn is_hosts_own(device: &ResolvedDevice) -> bool {
    let numbers = |d: &ResolvedDevice| (d.block, d.major, d.minor);
    device
        .path
        .canonicalize()
        .ok()
        .and_then(|at| node(&at, at.clone(), "").ok().flatten())
        .is_some_and(|own| numbers(&own) == numbers(device))
}

/// Every device of the machine below `dev`.
fn of_host(dev: &Path) -> Result<Vec<ResolvedDevice>> {
    let mut all = Vec::new();
    walk(dev, Path::new("/dev"), "rwm", &SKIPPED_DIRECTORIES, MAX_DEPTH, &mut all)?;
    // The runtime makes it from the container's terminal.
    all.retain(|device| device.path != Path::new("/dev/console"));
    Ok(all)
}

fn walk(from: &Path, to: &Path, access: &str, skipped: &[&str], depth: usize, all: &mut Vec<ResolvedDevice>) -> Result<()> {
    let what = || format!("list devices in {}", from.display());
    for entry in std::fs::read_dir(from).context(what)? {
        let entry = entry.context(what)?;
        let (path, name) = (entry.path(), entry.file_name());
        let is_directory = entry.file_type().context(what)?.is_dir();
        if !is_directory {
            all.extend(node(&path, to.join(&name), access)?);
        } else if depth > 0 && !skipped.iter().any(|skipped| name == *skipped) {
            walk(&path, &to.join(&name), access, skipped, depth - 1, all)?;
        }
    }
    Ok(())
}

/// The device at `path`, links not followed; None for anything else and for what has just gone.
fn node(path: &Path, container_path: PathBuf, access: &str) -> Result<Option<ResolvedDevice>> {
    let meta = match path.symlink_metadata() {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(|| format!("look at device {}", path.display())),
    };
    let kind = meta.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return Ok(None);
    }
    Ok(Some(ResolvedDevice {
        path: container_path,
        host_path: path.to_owned(),
        block: kind.is_block_device(),
        major: rustix::fs::major(meta.rdev()).into(),
        minor: rustix::fs::minor(meta.rdev()).into(),
        mode: meta.permissions().mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        access: access.to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn device(host_path: &str, container_path: &str, permissions: &str) -> Device {
        Device { host_path: host_path.into(), container_path: container_path.into(), permissions: permissions.into(), ..Default::default() }
    }

    #[test]
    fn a_device_is_looked_at() {
        let found = resolve(&[device("/dev/null", "/dev/x/../nothing", "rw")]).unwrap();
        assert_eq!((found[0].path.to_str(), found[0].major, found[0].minor, found[0].block), (Some("/dev/nothing"), 1, 3, false));
        assert_eq!((found[0].access.as_str(), found[0].mode & 0o666), ("rw", 0o666));
        assert_eq!(resolve(&[device("/dev/zero", "", "r")]).unwrap()[0].path, Path::new("/dev/zero"));
    }

    #[test]
    fn a_runtimes_own_device_is_no_other_one_in_a_user_namespace() {
        let asked = |host: &str, path: &str| ContainerConfig { devices: vec![device(host, path, "rwm")], ..Default::default() };
        for (host, path) in [("/dev/null", "/dev/random"), ("/dev/zero", "/dev/x/../null")] {
            assert_eq!(collect(&asked(host, path), false).unwrap().len(), 1);
            let error = collect(&asked(host, path), true).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().contains("container_path /dev/"), "{error}");
        }
        for (host, path) in [("/dev/null", "/dev/null"), ("/dev/zero", ""), ("/dev/null", "/dev/other")] {
            assert_eq!(collect(&asked(host, path), true).unwrap().len(), 1, "{host} {path}");
        }
    }

    #[test]
    fn links_and_directories() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("z")).unwrap();
        let link = dir.path().join("z");
        assert_eq!(resolve(&[device(link.to_str().unwrap(), "/dev/z", "rwm")]).unwrap()[0].minor, 5);
        let empty = resolve(&[device(dir.path().to_str().unwrap(), "/dev/d", "rwm")]).unwrap_err();
        assert_eq!(empty.code(), Code::FailedPrecondition);
        let all = resolve(&[device("/dev", "/dev/host", "r")]).unwrap();
        assert!(all.iter().any(|d| d.path == Path::new("/dev/host/null")));
    }

    #[test]
    fn wrong_words() {
        for (host, container, permissions) in
            [("/dev/null", "/dev/null", ""), ("/dev/null", "/dev/null", "rx"), ("null", "/n", "r"), ("/dev/null", "n", "r")]
        {
            let error = resolve(&[device(host, container, permissions)]).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        }
        for (host, container, field) in [("/dev/nu\0ll", "/dev/null", "in host_path"), ("/dev/null", "/dev/nu\0ll", "in container_path")] {
            let error = resolve(&[device(host, container, "r")]).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().ends_with(field), "{error}");
        }
        assert_eq!(resolve(&[device("/etc/passwd", "/dev/p", "r")]).unwrap_err().code(), Code::FailedPrecondition);
        assert_eq!(resolve(&[device("/dev/no-such-device", "", "r")]).unwrap_err().code(), Code::Internal);
    }

    #[test]
    fn privileged_gets_the_hosts_without_its_terminals() {
        let mut config = ContainerConfig { devices: vec![device("/dev/zero", "/dev/null", "r")], ..Default::default() };
        assert_eq!(collect(&config, false).unwrap().len(), 1);
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        let all = collect(&config, false).unwrap();
        let at = |path: &str| all.iter().filter(|d| d.path == Path::new(path)).collect::<Vec<_>>();
        assert_eq!((at("/dev/null").len(), at("/dev/null")[0].minor), (1, 5), "the request's own wins");
        assert_eq!(at("/dev/full").len(), 1);
        assert!(all.iter().all(|d| !d.path.starts_with("/dev/pts") && d.path != Path::new("/dev/console")));
    }
}
