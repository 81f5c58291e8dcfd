//! What is asked for in each golden spec. A field that reaches the spec has a case here and its name in src/spec/fields.md.

use protobuf::MessageField;

use super::Case;
use crate::api::runtime::security_profile::ProfileType;
use crate::api::runtime::{
    Capability, Device, HugepageLimit, IDMapping, Int64Value, KeyValue, Mount, MountPropagation, NamespaceMode, SELinuxOption,
    SecurityProfile, SupplementalGroupsPolicy, UserNamespace,
};
use crate::spec::fixture::Fixture;
use crate::spec::seccomp::Profile;
use crate::spec::{selinux, Pid, Rlimit};
use oci_spec::runtime::PosixRlimitType;

/// All of them.
pub(super) const CASES: &[&[Case]] = &[PROCESS, MOUNTS, DEVICES, RESOURCES, SECURITY, NAMESPACES, ANNOTATIONS];

const fn case(name: &'static str, change: fn(&mut Fixture)) -> Case {
    Case { name, change }
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

const PROCESS: &[Case] = &[
    case("command", |f| f.config.command = words("/bin/sh -c")),
    case("args", |f| f.config.args = words("one two")),
    case("args_of_image", |f| {
        f.config.command.clear();
        f.image.set_entrypoint(Some(words("/entry"))).set_cmd(Some(words("one two")));
    }),
    case("envs", |f| {
        f.image.set_env(Some(words("A=image B=image")));
        f.config.envs = vec![KeyValue { key: "A".into(), value: "one two".into(), ..Default::default() }];
    }),
    case("working_dir", |f| {
        f.image.set_working_dir(Some("/image".into()));
        f.config.working_dir = "/work/./x/../dir".into();
    }),
    case("tty", |f| f.config.tty = true),
    case("oom_score_adj", |f| f.resources().oom_score_adj = -500),
    case("rlimits", |f| f.defaults.rlimits = vec![Rlimit { kind: PosixRlimitType::RlimitNofile, soft: 1024, hard: 4096 }]),
    case("run_as_user", |f| f.security().run_as_user = int(1000)),
    case("run_as_group", |f| {
        f.security().run_as_user = int(1000);
        f.security().run_as_group = int(77);
    }),
    case("run_as_username", |f| f.security().run_as_username = "app".into()),
    case("user_of_image", |f| {
        f.image.set_user(Some("app:data".into()));
    }),
    case("supplemental_groups", |f| f.security().supplemental_groups = vec![5, 77]),
    case("supplemental_groups_policy", |f| {
        f.security().run_as_user = int(1000);
        f.security().supplemental_groups = vec![77];
        f.security().supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
    }),
];

fn int(value: i64) -> MessageField<Int64Value> {
    MessageField::some(Int64Value { value, ..Default::default() })
}

const MOUNTS: &[Case] = &[
    case("mounts", |f| f.config.mounts = vec![mount("/data", |_| {}), mount("/data/../etc/hosts", |_| {}), mount("/dev/shm", |_| {})]),
    case("mount_readonly", |f| f.config.mounts = vec![mount("/data", |m| m.readonly = true)]),
    case("mount_recursive_read_only", |f| {
        f.config.mounts = vec![mount("/data", |m| (m.readonly, m.recursive_read_only) = (true, true))];
    }),
    case("mount_options", |f| {
        f.config.mounts = vec![mount("/data", |m| m.mount_options = ["noexec", "nosuid", "noexec"].map(str::to_owned).to_vec())];
    }),
    case("mount_propagation", |f| {
        f.config.mounts = vec![
            mount("/slave", |m| m.propagation = MountPropagation::PROPAGATION_HOST_TO_CONTAINER.into()),
            mount("/shared", |m| m.propagation = MountPropagation::PROPAGATION_BIDIRECTIONAL.into()),
        ];
    }),
    case("sandbox_files", |f| {
        f.files.hosts = Some("/run/s1/hosts".into());
        f.files.hostname = Some("/run/s1/hostname".into());
        f.files.resolv_conf = Some("/run/s1/resolv.conf".into());
        f.files.shm = Some("/run/s1/shm".into());
    }),
];

fn mount(container_path: &str, change: fn(&mut Mount)) -> Mount {
    let mut mount = Mount { container_path: container_path.into(), host_path: "/srv/data".into(), ..Default::default() };
    change(&mut mount);
    mount
}

const DEVICES: &[Case] = &[case("devices", |f| {
    f.config.devices = vec![device("/dev/null", "/dev/nothing", "rw"), device("/dev/zero", "", "r")];
})];

fn device(host_path: &str, container_path: &str, permissions: &str) -> Device {
    Device { host_path: host_path.into(), container_path: container_path.into(), permissions: permissions.into(), ..Default::default() }
}

const RESOURCES: &[Case] = &[
    case("cpu", |f| {
        (f.resources().cpu_period, f.resources().cpu_quota, f.resources().cpu_shares) = (50_000, 25_000, 512);
    }),
    case("cpuset", |f| {
        f.resources().cpuset_cpus = "0-1,3".into();
        f.resources().cpuset_mems = "0".into();
    }),
    case("memory", |f| f.resources().memory_limit_in_bytes = 64 << 20),
    case("swap", |f| {
        (f.resources().memory_limit_in_bytes, f.resources().memory_swap_limit_in_bytes) = (64 << 20, 96 << 20);
    }),
    case("hugepages", |f| {
        let limit = |page_size: &str, limit| HugepageLimit { page_size: page_size.into(), limit, ..Default::default() };
        f.resources().hugepage_limits = vec![limit("2MB", 4 << 20), limit("64KB", 0)];
    }),
    case("unified", |f| {
        f.set_v2();
        f.host.cgroup_mounts.clear();
        f.resources().unified = [("memory.high".to_owned(), "1000000".to_owned())].into();
    }),
    case("pids_limit", |f| f.defaults.pids_limit = Some(100)),
];

const SECURITY: &[Case] = &[
    case("capabilities", |f| {
        f.security().capabilities = MessageField::some(Capability {
            add_capabilities: words("NET_ADMIN"),
            drop_capabilities: words("CAP_MKNOD kill"),
            add_ambient_capabilities: words("NET_BIND_SERVICE"),
            ..Default::default()
        });
    }),
    case("privileged", |f| f.set_privileged()),
    case("no_new_privs", |f| f.security().no_new_privs = true),
    case("readonly_rootfs", |f| f.security().readonly_rootfs = true),
    case("paths", |f| {
        f.security().masked_paths = words("/proc/kcore /proc/keys");
        f.security().readonly_paths = words("/proc/sys");
    }),
    case("seccomp", |f| f.security().seccomp = profile(ProfileType::RuntimeDefault)),
    case("seccomp_profile_path", |f| f.security().seccomp_profile_path = "runtime/default".into()),
    case("seccomp_file", |f| {
        f.security().seccomp = profile(ProfileType::Localhost);
        f.security().seccomp.mut_or_insert_default().localhost_ref = "/var/lib/kubelet/seccomp/p.json".into();
        let text =
            br#"{"defaultAction": "SCMP_ACT_LOG", "syscalls": [{"names": ["kcmp"], "action": "SCMP_ACT_ERRNO", "errno": "EACCES"}]}"#;
        f.confinement.seccomp = Some(Profile::parse(text).unwrap());
    }),
    case("apparmor", |f| {
        f.host.apparmor = true;
        f.security().apparmor = profile(ProfileType::Localhost);
        f.security().apparmor.mut_or_insert_default().localhost_ref = "localhost/web".into();
        f.confinement.apparmor = Some("web".into());
    }),
    case("apparmor_profile", |f| {
        f.host.apparmor = true;
        f.security().apparmor_profile = "runtime/default".into();
        f.confinement.apparmor = Some(crate::spec::apparmor::DEFAULT.into());
    }),
    case("selinux_options", |f| {
        let options =
            SELinuxOption { user: "u_u".into(), role: "r_r".into(), type_: "t_t".into(), level: "s0:c1,c2".into(), ..Default::default() };
        f.confinement.labels = Some(selinux::labels(&selinux::Policy::default(), &options, "s0:c8,c9", false));
        f.security().selinux_options = MessageField::some(options);
    }),
];

fn profile(kind: ProfileType) -> MessageField<SecurityProfile> {
    MessageField::some(SecurityProfile { profile_type: kind.into(), ..Default::default() })
}

fn user_namespace(f: &mut Fixture) {
    let mapping = || vec![IDMapping { container_id: 0, host_id: 100_000, length: 65536, ..Default::default() }];
    let options = || UserNamespace { mode: NamespaceMode::POD.into(), uids: mapping(), gids: mapping(), ..Default::default() };
    f.security().namespace_options.mut_or_insert_default().userns_options = MessageField::some(options());
    let sandbox = f.sandbox.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    sandbox.namespace_options.mut_or_insert_default().userns_options = MessageField::some(options());
    f.set_user_namespace();
}

const NAMESPACES: &[Case] = &[
    case("joined_namespaces", |f| {
        f.namespaces.net = Some("/run/ns/net".into());
        f.namespaces.ipc = Some("/run/ns/ipc".into());
        f.namespaces.uts = Some("/run/ns/uts".into());
        f.namespaces.pid = Pid::Path("/proc/7/ns/pid".into());
    }),
    // A node cannot be made there.
    case("user_namespace_with_devices", |f| {
        user_namespace(f);
        f.namespaces.net = Some("/run/ns/net".into());
        f.namespaces.ipc = Some("/run/ns/ipc".into());
        f.config.devices = vec![device("/dev/null", "/dev/nothing", "rw"), device("/dev/zero", "", "r")];
    }),
    case("host_pid", |f| f.namespaces.pid = Pid::Host),
    case("user_namespace", |f| {
        user_namespace(f);
        f.namespaces.net = Some("/run/ns/net".into());
        f.namespaces.ipc = Some("/run/ns/ipc".into());
    }),
    // What belongs to the host's namespaces cannot be mounted anew.
    case("user_namespace_with_the_hosts_others", |f| {
        user_namespace(f);
        f.namespaces.ipc = Some("/run/ns/ipc".into());
        f.namespaces.pid = Pid::Host;
    }),
    case("cgroup_v2", |f| {
        f.host.cgroup_v2 = true;
        f.host.cgroup_mounts.clear();
    }),
];

const ANNOTATIONS: &[Case] = &[
    case("annotations", |f| {
        f.config.annotations = [("example.com/a".to_owned(), "1".to_owned()), ("other".to_owned(), "2".to_owned())].into();
        f.defaults.annotations = vec!["example.com/*".into()];
    }),
    case("sandbox_annotations", |f| {
        f.sandbox.annotations = [("example.com/a".to_owned(), "1".to_owned()), ("other".to_owned(), "2".to_owned())].into();
        f.defaults.annotations = vec!["example.com/a".into()];
    }),
    case("container_name", |f| f.config.metadata.mut_or_insert_default().name = "other".into()),
    case("image_name", |f| f.config.image.mut_or_insert_default().user_specified_image = "example.com/app:1".into()),
    case("sandbox_metadata", |f| {
        let metadata = f.sandbox.metadata.mut_or_insert_default();
        (metadata.name, metadata.namespace, metadata.uid) = ("db".into(), "prod".into(), "u2".into());
    }),
];
