//! The SELinux of this host: whether there is one, what its policy has for containers, and which labels it knows.

use std::path::{Path, PathBuf};

use crate::api::runtime::SELinuxOption;
use crate::error::{Context, Error, Result};
use crate::spec::selinux::{self, Labels, Policy};
use crate::sys::{file, label};

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

    /// The labels that options ask for, if the loaded policy knows them; INVALID_ARGUMENT when not. See [`selinux::labels`].
    pub fn labels(&self, options: &SELinuxOption, sandbox_level: &str, privileged: bool) -> Result<Labels> {
        let labels = selinux::labels(&self.policy, options, sandbox_level, privileged);
        labels.process.iter().chain([&labels.mount]).try_for_each(|label| self.check(label))?;
        Ok(labels)
    }

    /// Labels the directory of the layers for all containers to read, with all that is in it if it has another label; what is made in it
    /// inherits that. A container sees its overlay's label instead, but not everywhere: what is mapped is the layer's own file, whose label
    /// the kernel asks for when the mapping is changed (mprotect), which every dynamically linked program does at its start.
    pub fn label_layers(&self, layers: &Path) -> Result<()> {
        let wanted = self.policy.readonly_file.to_string();
        if let Err(e) = self.check(&wanted) {
            log::warn!("selinux: layers keep their label, which containers may be refused: {e}");
            return Ok(());
        }
        if label::get(layers, label::SELINUX).as_deref() == Some(&wanted) {
            return Ok(());
        }
        let what = || format!("label {}", layers.display());
        log::info!("selinux: {} becomes {wanted}, with all that is in it", layers.display());
        for entry in std::fs::read_dir(layers).context(what)? {
            label::set_tree(&entry.context(what)?.path(), label::SELINUX, &wanted)?;
        }
        // Last: it says that all others are.
        label::set(layers, label::SELINUX, &wanted).map(drop)
    }

    fn check(&self, label: &str) -> Result<()> {
        match std::fs::OpenOptions::new().write(true).open(&self.context) {
            Ok(mut file) => std::io::Write::write_all(&mut file, label.as_bytes())
                .map_err(|e| Error::invalid(format!("selinux_options: the policy of this host has no label {label}: {e}"))),
            Err(e) => Err(e).context(|| format!("open {}", self.context.display())),
        }
    }
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
    fn layers_are_for_all_to_read() {
        let dir = host(&[("fs/enforce", "1"), ("fs/context", ""), ("layers/one/bin/sh", ""), ("layers/two", "")]);
        let (selinux, layers) = (detect(&dir).unwrap(), dir.path().join("layers"));
        let label = |name: &str| label::get(&layers.join(name), label::SELINUX);
        selinux.label_layers(&layers).unwrap();
        for name in ["", "one", "one/bin", "one/bin/sh", "two"] {
            assert_eq!(label(name).as_deref(), Some("system_u:object_r:container_ro_file_t:s0"), "{name}");
        }
        // Once: what comes later inherits it.
        std::fs::write(layers.join("three"), "").unwrap();
        let unlabelled = label("three");
        selinux.label_layers(&layers).unwrap();
        assert_eq!(label("three"), unlabelled);
        // A policy without the type is no reason not to start.
        let other = host(&[("fs/enforce", "1"), ("layers/one", "")]);
        std::os::unix::fs::symlink("/dev/full", other.path().join("fs/context")).unwrap();
        detect(&other).unwrap().label_layers(&other.path().join("layers")).unwrap();
        assert_ne!(label::get(&other.path().join("layers/one"), label::SELINUX), label(""));
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
}
