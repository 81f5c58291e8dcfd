//! SELinux: what the host's policy has for containers, and the labels of volumes.

use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::spec::selinux::Policy;
use crate::sys::{file, label};

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

/// The parts of a host with SELinux.
#[derive(Clone, Debug)]
pub struct SeLinux {
    pub policy: Policy,
    /// Where the kernel says whether a label means something: selinuxfs' `context`.
    context: PathBuf,
}

impl SeLinux {
    /// What the host has; None without SELinux. `selinuxfs` is /sys/fs/selinux, `etc` is /etc/selinux.
    pub fn detect(selinuxfs: &Path, etc: &Path) -> Option<SeLinux> {
        if !selinuxfs.join("enforce").exists() {
            return None;
        }
        let text = |path: &Path| file::read(path, 1 << 20).map(|data| String::from_utf8_lossy(&data).into_owned()).unwrap_or_default();
        let config = text(&etc.join("config"));
        let kind = config.lines().find_map(|line| line.trim().strip_prefix("SELINUXTYPE=")).map_or("targeted", str::trim);
        let contexts = match kind.contains('/') {
            true => String::new(),
            false => text(&etc.join(kind).join("contexts/lxc_contexts")),
        };
        Some(SeLinux { policy: Policy::parse(&contexts), context: selinuxfs.join("context") })
    }

    /// Asks the loaded policy whether it knows a label. INVALID_ARGUMENT when not.
    pub fn check(&self, label: &str) -> Result<()> {
        match std::fs::OpenOptions::new().write(true).open(&self.context) {
            Ok(mut file) => std::io::Write::write_all(&mut file, label.as_bytes())
                .map_err(|e| Error::invalid(format!("selinux_options: the policy of this host has no label {label}: {e}"))),
            Err(e) => Err(e).context(|| format!("open {}", self.context.display())),
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    fn detect(dir: &tempfile::TempDir) -> Option<SeLinux> {
        SeLinux::detect(&dir.path().join("fs"), &dir.path().join("etc"))
    }

    #[test]
    fn a_host_without_selinux_has_none() {
        assert!(detect(&host(&[("etc/config", "SELINUXTYPE=targeted\n")])).is_none());
    }

    #[test]
    fn policy_of_the_host() {
        let contexts = "process = \"a_u:a_r:a_t:s0\"\nfile = \"a_u:object_r:a_file_t:s0\"\n";
        let files = [
            ("fs/enforce", "1"),
            ("etc/config", "# SELINUXTYPE=x\nSELINUX=enforcing\nSELINUXTYPE=mls\n"),
            ("etc/mls/contexts/lxc_contexts", contexts),
        ];
        assert_eq!(detect(&host(&files)).unwrap().policy.process.to_string(), "a_u:a_r:a_t:s0");
        assert_eq!(detect(&host(&files[..1])).unwrap().policy, Policy::default());
        let elsewhere = [("fs/enforce", "0"), ("etc/config", "SELINUXTYPE=../mls\n"), ("etc/mls/contexts/lxc_contexts", contexts)];
        assert_eq!(detect(&host(&elsewhere)).unwrap().policy, Policy::default());
    }

    #[test]
    fn labels_go_before_the_policy() {
        let dir = host(&[("fs/enforce", "1"), ("fs/context", "")]);
        let selinux = detect(&dir).unwrap();
        selinux.check("u:r:t:s0").unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("fs/context")).unwrap(), "u:r:t:s0");
        std::fs::remove_file(dir.path().join("fs/context")).unwrap();
        assert!(selinux.check("u:r:t:s0").unwrap_err().message().contains("fs/context"));
        // What the kernel refuses is the caller's mistake.
        std::os::unix::fs::symlink("/dev/full", dir.path().join("fs/context")).unwrap();
        let error = selinux.check("u:r:nope_t:s0").unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains("nope_t"), "{error}");
    }

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
}
