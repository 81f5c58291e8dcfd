//! The OCI runtime spec of a container, computed from the CRI messages, the image's configuration and facts gathered
//! before. Pure: nothing here touches the disk or the kernel.
//!
//! No field of a request is ignored in silence: the table of fields below says of each what becomes of it, and tests hold it to that.
//! Of the image's configuration: User, Env, Entrypoint, Cmd and WorkingDir are in the spec, StopSignal is what stop sends, Volumes are
//! directories of the container's own (`container::image_volumes`), ExposedPorts and Labels do not apply. hostname and sysctls are left out of the spec on purpose:
//! the namespaces are joined, and a runtime would rewrite the sandbox's.
#![doc = include_str!("fields.md")]

pub mod apparmor;
pub mod fields;
pub mod mounts;
pub mod namespaces;
pub mod process;
pub mod refuse;
pub mod resources;
pub mod seccomp;
pub mod security;
pub mod selinux;
pub mod userns;

#[cfg(test)]
pub(crate) mod fixture;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{Capabilities, Linux, PosixRlimitType, Root, Spec};

use crate::api::runtime::{ContainerConfig, LinuxContainerSecurityContext, PodSandboxConfig};
use crate::error::Result;

pub use mounts::{Propagation, ResolvedMount};
pub use namespaces::{NamespacePaths, Pid};
pub use process::exec_process;
pub use resources::update::{update_resources, OomScoreAdj, Update};
pub use resources::{Classes, ResolvedDevice};
pub use userns::UserNamespace;

/// crun 1.8.1 refuses 1.2.0; nothing here needs more.
pub const OCI_VERSION: &str = "1.0.2";

/// What the names of our annotations begin with.
const ANNOTATIONS: &str = "io.kubernetes.cri";

/// All a spec is made of.
pub struct Inputs<'a> {
    pub sandbox_id: &'a str,
    pub sandbox: &'a PodSandboxConfig,
    pub config: &'a ContainerConfig,
    pub image: &'a ImageConfiguration,
    pub user: &'a ResolvedUser,
    pub namespaces: &'a NamespacePaths,
    /// Absolute path of the root filesystem.
    pub rootfs: &'a Path,
    pub mounts: &'a [ResolvedMount],
    /// Those of the request; those of the whole host for a privileged container.
    pub devices: &'a [ResolvedDevice],
    /// What the request's classes mean here.
    pub classes: &'a Classes,
    /// In the syntax of the cgroup driver; see the OCI spec, linux.cgroupsPath.
    pub cgroups_path: &'a str,
    /// For the variable HOSTNAME; the UTS namespace has it already.
    pub hostname: &'a str,
    pub host: &'a HostFacts,
    pub files: &'a SandboxFiles,
    pub defaults: &'a Defaults,
    pub confinement: &'a Confinement,
}

impl Inputs<'_> {
    fn security(&self) -> &LinuxContainerSecurityContext {
        &self.config.linux.security_context
    }

    fn privileged(&self) -> bool {
        self.security().privileged
    }
}

/// The user of a container's processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvedUser {
    pub uid: u32,
    pub gid: u32,
    /// The primary group among them.
    pub additional_gids: Vec<u32>,
    /// The home directory of /etc/passwd, "/" without one.
    pub home: String,
    /// Empty for an id that /etc/passwd does not know.
    pub username: String,
}

/// Files of the sandbox that its containers see; None: the image's own.
#[derive(Clone, Debug, Default)]
pub struct SandboxFiles {
    pub resolv_conf: Option<PathBuf>,
    pub hosts: Option<PathBuf>,
    pub hostname: Option<PathBuf>,
    /// The directory for /dev/shm: the sandbox's tmpfs, or the host's /dev/shm with the host's IPC namespace. None: a
    /// private tmpfs of 64 MiB.
    pub shm: Option<PathBuf>,
}

/// What the configuration sets for every container.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// pids.max of a container; kubelet limits the sandbox as a whole.
    pub pids_limit: Option<i64>,
    /// None of a kind: what the daemon has.
    pub rlimits: Vec<Rlimit>,
    /// Annotations of sandbox and container that reach the OCI runtime: names, or prefixes with a `*` at their end.
    pub annotations: Vec<String>,
}

/// What was read, loaded and chosen for a container's confinement (`container::confine`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// The file of a Localhost seccomp profile.
    pub seccomp: Option<seccomp::Profile>,
    /// Name of a loaded AppArmor profile; None: none.
    pub apparmor: Option<String>,
    /// None: no SELinux.
    pub labels: Option<selinux::Labels>,
}

/// A resource limit, in the unit of setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rlimit {
    pub kind: PosixRlimitType,
    pub soft: u64,
    pub hard: u64,
}

/// What the host can do, found out once (`container::host::detect`).
#[derive(Clone, Debug)]
pub struct HostFacts {
    pub cgroup_v2: bool,
    /// Controllers of the v2 hierarchy; none on v1.
    pub cgroup_controllers: Vec<String>,
    /// What an OCI runtime may mount below a container's /sys/fs/cgroup, by name; nothing on v2. Names that it does not mount do
    /// no harm.
    pub cgroup_mounts: Vec<String>,
    /// What is mounted on the host's /dev/mqueue and below its /sys.
    pub host_mounts: Vec<PathBuf>,
    /// The daemon's bounding set: no container can have more.
    pub bounding: Capabilities,
    /// A name of `std::env::consts::ARCH`.
    pub arch: String,
    /// Version of the kernel: (6, 1).
    pub kernel: (u32, u32),
    /// The lowest oom_score_adj that the daemon may give: -1000 with CAP_SYS_RESOURCE, else its own.
    pub oom_score_adj_floor: i32,
    /// The highest hard limits the daemon may give; a kind that is not listed has none.
    pub hard_rlimits: Vec<(PosixRlimitType, u64)>,
    pub swap_accounting: bool,
    /// The hugepage sizes of the machine, as CRI names them: "2MB".
    pub hugepage_sizes: Vec<String>,
    /// Whether hugepages can be limited.
    pub hugetlb_controller: bool,
    pub seccomp: bool,
    /// AppArmor is enabled, and its files can be seen.
    pub apparmor: bool,
    /// SELinux is enabled, and switched on in the configuration.
    pub selinux: bool,
    /// Whether mounts can be changed with all below them (mount_setattr(2), Linux 5.12).
    pub mount_setattr: bool,
}

/// Builds the spec. The second value has a line for each thing that was given less than asked; the caller logs them once.
/// INVALID_ARGUMENT, FAILED_PRECONDITION or UNIMPLEMENTED name the field that cannot be honoured.
pub fn build(inputs: &Inputs) -> Result<(Spec, Vec<String>)> {
    refuse::container(inputs.config, inputs.sandbox, inputs.host)?;
    let mut warnings = Vec::new();

    let mut root = Root::default();
    root.set_path(inputs.rootfs.to_path_buf()).set_readonly(Some(inputs.security().readonly_rootfs));

    let process = process::process(inputs, &mut warnings)?;
    let bounding = process.capabilities().as_ref().and_then(|sets| sets.bounding().clone()).unwrap_or_default();

    let mut linux = Linux::default();
    linux
        .set_resources(Some(resources::resources(inputs, &mut warnings)?))
        .set_cgroups_path(Some(PathBuf::from(inputs.cgroups_path)))
        .set_namespaces(Some(namespaces::namespaces(inputs)))
        .set_devices(Some(resources::device_nodes(inputs)))
        .set_intel_rdt(resources::rdt(inputs.classes))
        .set_seccomp(seccomp::filter(inputs, &bounding, &mut warnings)?)
        .set_mount_label(inputs.confinement.labels.as_ref().map(|labels| labels.mount.clone()))
        .set_rootfs_propagation(mounts::rootfs_propagation(inputs.mounts))
        .set_masked_paths(security::masked_paths(inputs.security())?)
        .set_readonly_paths(security::readonly_paths(inputs)?);
    if let Some([uids, gids]) = userns::mappings(inputs)? {
        linux.set_uid_mappings(Some(uids)).set_gid_mappings(Some(gids));
    }

    // Every member is set: the defaults of the type are somebody's taste.
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts::mounts(inputs)))
        .set_process(Some(process))
        .set_hostname(None)
        .set_annotations(Some(annotations(inputs)))
        .set_linux(Some(linux));
    Ok((spec, warnings))
}

/// Ours, under the names that tools around Kubernetes look for, and those the configuration lets through.
fn annotations(inputs: &Inputs) -> HashMap<String, String> {
    let (sandbox, config) = (inputs.sandbox, inputs.config);
    let allowed = |key: &str| {
        inputs.defaults.annotations.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => key.starts_with(prefix),
            None => key == pattern,
        })
    };
    let given = sandbox.annotations.iter().chain(&config.annotations).filter(|(key, _)| allowed(key));
    let mut all: HashMap<String, String> = given.map(|(key, value)| (key.clone(), value.clone())).collect();

    let image = match config.image.user_specified_image.as_str() {
        "" => &config.image.image,
        reference => reference,
    };
    let ours = [("container-type", "container"), ("container-name", &config.metadata.name), ("image-name", image)];
    all.extend(sandbox_annotations(inputs.sandbox_id, sandbox));
    all.extend(ours.map(|(key, value)| (format!("{ANNOTATIONS}.{key}"), value.to_owned())));
    if !inputs.cgroups_path.starts_with('/') {
        // Below systemd's scope crun would make a cgroup of its own, where nobody looks for limits and processes.
        all.insert("run.oci.systemd.subgroup".to_owned(), String::new());
    }
    all
}

/// Of our annotations those that name the sandbox.
pub fn sandbox_annotations(id: &str, sandbox: &PodSandboxConfig) -> HashMap<String, String> {
    let ours = [
        ("container-type", "sandbox"),
        ("sandbox-id", id),
        ("sandbox-name", &sandbox.metadata.name),
        ("sandbox-namespace", &sandbox.metadata.namespace),
        ("sandbox-uid", &sandbox.metadata.uid),
    ];
    ours.map(|(key, value)| (format!("{ANNOTATIONS}.{key}"), value.to_owned())).into()
}

#[cfg(test)]
mod tests {
    use super::fixture::Fixture;

    #[test]
    fn spec_has_no_hostname_and_no_sysctls() {
        let spec = Fixture::new().build().0;
        assert_eq!(spec.version(), "1.0.2");
        assert!(spec.hostname().is_none() && spec.domainname().is_none() && spec.hooks().is_none());
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.sysctl().is_none() && linux.uid_mappings().is_none());
        assert_eq!(linux.masked_paths(), &None, "an empty list means no masks");
        assert_eq!(linux.cgroups_path().as_ref().unwrap().to_str(), Some("/kubepods/c1"));
    }

    #[test]
    fn readonly_rootfs() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.build().0.root().as_ref().unwrap().readonly(), Some(false));
        fixture.security().readonly_rootfs = true;
        assert_eq!(fixture.build().0.root().as_ref().unwrap().readonly(), Some(true));
    }

    #[test]
    fn annotations_are_ours_and_the_allowed_ones() {
        let mut fixture = Fixture::new();
        fixture.config.annotations.insert("run.oci.handler".into(), "krun".into());
        fixture.config.annotations.insert("io.kubernetes.cri.sandbox-id".into(), "forged".into());
        fixture.sandbox.annotations.insert("example.com/a".into(), "1".into());
        let annotations = fixture.build().0.annotations().clone().unwrap();
        assert_eq!(annotations.len(), 7);
        assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], "s1");
        assert_eq!(annotations["io.kubernetes.cri.image-name"], "busybox:latest");

        fixture.defaults.annotations = vec!["example.com/*".into(), "io.kubernetes.cri.sandbox-id".into()];
        let annotations = fixture.build().0.annotations().clone().unwrap();
        assert_eq!((annotations.len(), annotations["example.com/a"].as_str()), (8, "1"));
        assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], "s1");
    }

    #[test]
    fn a_scope_of_systemd_is_the_containers_own() {
        let fixture = Fixture::new();
        let inputs = super::Inputs { cgroups_path: "kubepods.slice:crisp:c1", ..fixture.inputs() };
        let spec = super::build(&inputs).unwrap().0;
        assert_eq!(spec.linux().as_ref().unwrap().cgroups_path().as_ref().unwrap().to_str(), Some("kubepods.slice:crisp:c1"));
        assert_eq!(spec.annotations().as_ref().unwrap()["run.oci.systemd.subgroup"], "");
    }

    #[test]
    fn spec_survives_json() {
        let spec = Fixture::new().build().0;
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<oci_spec::runtime::Spec>(&text).unwrap(), spec);
    }
}
