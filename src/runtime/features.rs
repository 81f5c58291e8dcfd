//! What an OCI runtime can do: its own words (`features`, the features document of the OCI runtime spec, features.md), and for
//! one without that verb what it did when it was tried. Found out once, at start.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::error::{Context, Result};

/// What a runtime can do. A member that the document leaves out says nothing, which counts as no.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Whether the runtime has told it itself.
    pub documented: bool,
    /// The highest version of the runtime spec it takes: `1.0.2-dev`.
    pub oci_version_max: Option<String>,
    /// Mount options it knows by name: `rro`, `idmap`. What it does not know it takes for data of the file system.
    pub mount_options: BTreeSet<String>,
    /// Namespace types it can make or join: `user`, `cgroup`.
    pub namespaces: BTreeSet<String>,
    /// Hooks it runs: `createRuntime`.
    pub hooks: BTreeSet<String>,
    /// Whether it honours `mounts[].uidMappings`; one that does not ignores them in silence.
    pub idmap_mounts: bool,
    pub seccomp: bool,
    pub apparmor: bool,
    pub selinux: bool,
    /// Whether it honours `linux.intelRdt`.
    pub rdt: bool,
    /// Its own facts: `org.opencontainers.runc.version`.
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl Features {
    /// Whether a read-only mount can be made so with all that is mounted below it.
    pub fn recursive_read_only(&self) -> bool {
        self.mount_options.contains("rro")
    }

    /// Whether containers can join a user namespace. Id-mapped mounts are not asked for: those are made for it.
    pub fn user_namespaces(&self) -> bool {
        self.namespaces.contains("user")
    }

    /// Reads a features document.
    pub fn parse(document: &[u8]) -> Result<Features> {
        let document: Document = serde_json::from_slice(document).context(|| "read its features")?;
        let linux = document.linux;
        Ok(Features {
            documented: true,
            oci_version_max: document.oci_version_max,
            mount_options: document.mount_options,
            namespaces: linux.namespaces,
            hooks: document.hooks,
            idmap_mounts: linux.mount_extensions.idmap.is_enabled(),
            seccomp: linux.seccomp.is_enabled(),
            apparmor: linux.apparmor.is_enabled(),
            selinux: linux.selinux.is_enabled(),
            rdt: linux.intel_rdt.is_enabled(),
            annotations: document.annotations,
        })
    }
}

/// The members of the document that matter here; everything may be missing, and runtimes write null for lists that they do not know.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Document {
    oci_version_max: Option<String>,
    #[serde(deserialize_with = "or_default")]
    hooks: BTreeSet<String>,
    #[serde(deserialize_with = "or_default")]
    mount_options: BTreeSet<String>,
    #[serde(deserialize_with = "or_default")]
    linux: Linux,
    #[serde(deserialize_with = "or_default")]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    #[serde(deserialize_with = "or_default")]
    namespaces: BTreeSet<String>,
    #[serde(deserialize_with = "or_default")]
    seccomp: Switch,
    #[serde(deserialize_with = "or_default")]
    apparmor: Switch,
    #[serde(deserialize_with = "or_default")]
    selinux: Switch,
    #[serde(deserialize_with = "or_default")]
    intel_rdt: Switch,
    #[serde(deserialize_with = "or_default")]
    mount_extensions: MountExtensions,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct MountExtensions {
    #[serde(deserialize_with = "or_default")]
    idmap: Switch,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Switch {
    enabled: Option<bool>,
}

impl Switch {
    fn is_enabled(&self) -> bool {
        self.enabled == Some(true)
    }
}

fn or_default<'de, T: Deserialize<'de> + Default, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `runc features` of runc 1.1.5, the lists shortened.
    const RUNC: &str = r#"{"ociVersionMin":"1.0.0","ociVersionMax":"1.0.2-dev","hooks":["prestart","createRuntime","poststop"],
        "mountOptions":["acl","bind","ro","rprivate","rro","rslave"],
        "linux":{"namespaces":["cgroup","ipc","mount","network","pid","user","uts"],"capabilities":["CAP_CHOWN"],
        "cgroup":{"v1":true,"v2":true,"systemd":true,"systemdUser":true},
        "seccomp":{"enabled":true,"actions":["SCMP_ACT_ALLOW"]},"apparmor":{"enabled":true},"selinux":{"enabled":true}},
        "annotations":{"org.opencontainers.runc.version":"1.1.5+ds1"}}"#;

    #[test]
    fn a_document_of_runc() {
        let features = Features::parse(RUNC.as_bytes()).unwrap();
        assert!(features.documented && features.user_namespaces() && features.recursive_read_only());
        assert!(features.seccomp && features.apparmor && features.selinux);
        assert!(!features.idmap_mounts && !features.rdt, "it does not say so");
        assert_eq!(features.oci_version_max.as_deref(), Some("1.0.2-dev"));
        assert_eq!(features.annotations["org.opencontainers.runc.version"], "1.1.5+ds1");
    }

    #[test]
    fn what_is_not_said_is_not_there() {
        for silent in ["{}", r#"{"linux":null,"mountOptions":null}"#, r#"{"linux":{"namespaces":null,"seccomp":{"enabled":null}},"new":1}"#]
        {
            let features = Features::parse(silent.as_bytes()).unwrap();
            assert_eq!(features, Features { documented: true, ..Default::default() }, "{silent}");
        }
        let newer = r#"{"linux":{"mountExtensions":{"idmap":{"enabled":true}},"intelRdt":{"enabled":true},"selinux":{"enabled":false}}}"#;
        let features = Features::parse(newer.as_bytes()).unwrap();
        assert!(features.idmap_mounts && features.rdt && !features.selinux && !features.user_namespaces());
        assert!(Features::parse(b"unknown command features").is_err());
        assert!(Features::parse(br#"{"mountOptions":7}"#).is_err());
    }
}
