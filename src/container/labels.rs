//! SELinux labels of what a container gets from outside: volumes, and the files of its sandbox.

use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::spec::SandboxFiles;
use crate::sys::label;

/// Directories that a relabelling would break the host by, with all that lies above a container's volumes. Below them one may.
const NEVER: [&str; 29] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/local",
    "/var",
    "/var/lib",
    "/var/log",
    "/var/run",
    "/var/tmp",
];
/// These not at all, whatever is below.
const NOT_BELOW: [&str; 4] = ["/boot", "/dev", "/proc", "/sys"];
const NEVER_FILES: [&str; 4] = ["/etc/passwd", "/etc/shadow", "/etc/group", "/etc/pki"];

/// Labels a volume for the containers of one sandbox (`selinux_relabel`). INVALID_ARGUMENT for a directory of the host itself.
/// The only walk of a disk in a call: kubelet asks for it, and the container could not read what has not got it.
pub fn relabel(host_path: &Path, attribute: &str, mount_label: &str) -> Result<()> {
    let is = |list: &[&str]| list.iter().any(|path| host_path == Path::new(path));
    let below = NOT_BELOW.iter().any(|path| host_path.starts_with(path));
    if is(&NEVER) || is(&NEVER_FILES) || below || !host_path.is_absolute() {
        return Err(Error::invalid(format!("selinux_relabel: {} is the host's own", host_path.display())));
    }
    label::set_tree(host_path, attribute, mount_label).context(|| "selinux_relabel")
}

/// Gives the files of a sandbox the label of a container's files: another one than the sandbox's only if the container asked for a level
/// of its own, which could not even resolve names otherwise. Whoever came last can read them, as with containerd. What is in /dev/shm
/// keeps its labels, and /dev/shm of the host is not ours.
pub fn sandbox_files(files: &SandboxFiles, attribute: &str, mount_label: &str) -> Result<()> {
    let shm = files.shm.as_deref().filter(|shm| *shm != Path::new("/dev/shm"));
    let files = [&files.hosts, &files.hostname, &files.resolv_conf].map(Option::as_deref);
    files.into_iter().chain([shm]).flatten().try_for_each(|path| label::set(path, attribute, mount_label).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn directories_of_the_host_are_refused() {
        for path in
            ["/", "/etc", "/usr", "/usr/lib", "/boot/efi", "/proc/1", "/dev/sda", "/home", "/var/lib", "/etc/shadow", "/tmp", "relative"]
        {
            let error = relabel(Path::new(path), label::SELINUX, "u:r:t:s0").unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().contains(path), "{path}: {error}");
        }
        let volume = tempfile::tempdir().unwrap();
        std::fs::write(volume.path().join("file"), "").unwrap();
        relabel(volume.path(), label::SELINUX, "u:object_r:t:s0:c1,c2").unwrap();
        let mut value = [0; 64];
        let n = rustix::fs::lgetxattr(volume.path().join("file"), label::SELINUX, &mut value).unwrap();
        assert_eq!(&value[..n], b"u:object_r:t:s0:c1,c2\0");
    }

    #[test]
    fn files_of_the_sandbox_follow_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("shm")).unwrap();
        for name in ["hosts", "resolv.conf", "shm/kept"] {
            std::fs::write(at(name), "").unwrap();
        }
        let of = |shm| SandboxFiles { hosts: Some(at("hosts")), resolv_conf: Some(at("resolv.conf")), hostname: None, shm: Some(shm) };
        let label = |name: &str| label::get(&at(name), label::SELINUX);
        sandbox_files(&of(at("shm")), label::SELINUX, "u:object_r:t:s0:c1").unwrap();
        for name in ["hosts", "resolv.conf", "shm"] {
            assert_eq!(label(name).as_deref(), Some("u:object_r:t:s0:c1"), "{name}");
        }
        assert_ne!(label("shm/kept"), label("shm"));
        let before = label::get(Path::new("/dev/shm"), label::SELINUX);
        sandbox_files(&of("/dev/shm".into()), label::SELINUX, "u:object_r:t:s0:c2").unwrap();
        assert_eq!(label("hosts").as_deref(), Some("u:object_r:t:s0:c2"));
        assert_eq!(label::get(Path::new("/dev/shm"), label::SELINUX), before);
    }
}
