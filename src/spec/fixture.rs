//! An ordinary container for the tests of this folder, to be changed by each.

use std::path::{Path, PathBuf};

use oci_spec::image::{Config, ImageConfiguration};
use oci_spec::runtime::Spec;
use protobuf::MessageField;

use super::security::BY_NUMBER;
use super::*;
use crate::api::runtime::{ContainerMetadata, ImageSpec, LinuxContainerConfig, LinuxContainerResources, PodSandboxMetadata};
use crate::error::Error;
use crate::sys::idmap::{IdMap, IdMaps};

pub(crate) struct Fixture {
    pub(crate) sandbox: PodSandboxConfig,
    pub(crate) config: ContainerConfig,
    pub(crate) image: Config,
    pub(crate) user: ResolvedUser,
    pub(crate) namespaces: NamespacePaths,
    pub(crate) mounts: Vec<ResolvedMount>,
    pub(crate) devices: Vec<ResolvedDevice>,
    pub(crate) classes: Classes,
    pub(crate) host: HostFacts,
    pub(crate) files: SandboxFiles,
    pub(crate) defaults: Defaults,
    pub(crate) confinement: super::Confinement,
    configuration: ImageConfiguration,
}

/// A machine with everything.
pub(crate) fn host() -> HostFacts {
    HostFacts {
        cgroup_v2: false,
        cgroup_controllers: Vec::new(),
        cgroup_mounts: vec!["cpu".into(), "memory".into()],
        host_mounts: Vec::new(),
        bounding: BY_NUMBER.into_iter().collect(),
        arch: "x86_64".into(),
        kernel: (6, 1),
        oom_score_adj_floor: -1000,
        hard_rlimits: Vec::new(),
        swap_accounting: true,
        hugepage_sizes: vec!["2MB".into(), "1GB".into()],
        hugetlb_controller: true,
        seccomp: true,
        apparmor: false,
        selinux: false,
        mount_setattr: true,
    }
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        let metadata = PodSandboxMetadata { name: "web".into(), uid: "u1".into(), namespace: "default".into(), ..Default::default() };
        let image = ImageSpec { image: "sha256:1".into(), user_specified_image: "busybox:latest".into(), ..Default::default() };
        let config = ContainerConfig {
            metadata: MessageField::some(ContainerMetadata { name: "app".into(), ..Default::default() }),
            image: MessageField::some(image),
            command: vec!["/bin/app".into()],
            linux: MessageField::some(LinuxContainerConfig {
                resources: MessageField::some(LinuxContainerResources::default()),
                security_context: MessageField::some(LinuxContainerSecurityContext::default()),
                ..Default::default()
            }),
            ..Default::default()
        };
        Fixture {
            sandbox: PodSandboxConfig { metadata: MessageField::some(metadata), ..Default::default() },
            config,
            image: Config::default(),
            user: ResolvedUser { home: "/root".into(), username: "root".into(), additional_gids: vec![0], ..Default::default() },
            namespaces: NamespacePaths::default(),
            mounts: Vec::new(),
            devices: Vec::new(),
            classes: Classes::default(),
            host: host(),
            files: SandboxFiles::default(),
            defaults: Defaults::default(),
            confinement: Default::default(),
            configuration: ImageConfiguration::default(),
        }
    }

    pub(crate) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            sandbox_id: "s1",
            sandbox: &self.sandbox,
            config: &self.config,
            image: &self.configuration,
            user: &self.user,
            namespaces: &self.namespaces,
            rootfs: Path::new("/run/c1/rootfs"),
            mounts: &self.mounts,
            devices: &self.devices,
            classes: &self.classes,
            cgroups_path: "/kubepods/c1",
            hostname: "web-host",
            host: &self.host,
            files: &self.files,
            defaults: &self.defaults,
            confinement: &self.confinement,
        }
    }

    pub(crate) fn try_build(&mut self) -> Result<(Spec, Vec<String>)> {
        self.configuration.set_config(Some(self.image.clone()));
        build(&self.inputs())
    }

    pub(crate) fn build(&mut self) -> (Spec, Vec<String>) {
        self.try_build().unwrap()
    }

    pub(crate) fn error(&mut self) -> Error {
        self.try_build().unwrap_err()
    }

    pub(crate) fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
    }

    pub(crate) fn resources(&mut self) -> &mut LinuxContainerResources {
        self.config.linux.mut_or_insert_default().resources.mut_or_insert_default()
    }

    /// Makes the machine one of cgroup v2.
    pub(crate) fn set_v2(&mut self) {
        self.host.cgroup_v2 = true;
        self.host.cgroup_controllers = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"].map(str::to_owned).to_vec();
    }

    pub(crate) fn set_user_namespace(&mut self) {
        let map = IdMap { container: 0, host: 100_000, length: 65536 };
        self.namespaces.user = Some(UserNamespace { path: "/run/ns/user".into(), maps: IdMaps { uids: map, gids: map } });
    }

    pub(crate) fn set_privileged(&mut self) {
        self.security().privileged = true;
        self.sandbox.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    }

    pub(crate) fn mount(&mut self, container_path: &str, host_path: &str) -> &mut ResolvedMount {
        self.mounts.push(ResolvedMount {
            container_path: PathBuf::from(container_path),
            host_path: PathBuf::from(host_path),
            ..Default::default()
        });
        self.mounts.last_mut().unwrap()
    }
}
