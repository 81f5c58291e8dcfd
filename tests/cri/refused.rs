//! What is refused, with which code and by which name; and that nothing is left of it.

use crisp::api::runtime::security_profile::ProfileType;
use crisp::api::runtime::*;
use grpcio::RpcStatusCode as Code;
use protobuf::{EnumOrUnknown, MessageField};

use crate::node::{self, refused, Node};

fn sandbox_options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default()
}

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

fn sysctl(config: &mut PodSandboxConfig, key: &str) {
    config.linux.mut_or_insert_default().sysctls.insert(key.into(), "1".into());
}

type SandboxCase = (&'static str, Code, &'static str, fn(&mut PodSandboxConfig));

fn users(config: &mut PodSandboxConfig, uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)]) {
    sandbox_options(config).userns_options = MessageField::some(node::users(uids, gids));
}

const SANDBOXES: &[SandboxCase] = &[
    ("no metadata", Code::INVALID_ARGUMENT, "metadata", |c| c.metadata = MessageField::none()),
    ("no name", Code::INVALID_ARGUMENT, "name", |c| c.metadata.mut_or_insert_default().name.clear()),
    ("no namespace", Code::INVALID_ARGUMENT, "namespace", |c| c.metadata.mut_or_insert_default().namespace.clear()),
    ("no uid", Code::INVALID_ARGUMENT, "uid", |c| c.metadata.mut_or_insert_default().uid.clear()),
    ("a name that adds CNI arguments", Code::INVALID_ARGUMENT, "name", |c| {
        c.metadata.mut_or_insert_default().name = "a;K8S_POD_UID=b".into();
    }),
    ("network of a container", Code::INVALID_ARGUMENT, "network", |c| sandbox_options(c).network = NamespaceMode::CONTAINER.into()),
    ("ipc of a container", Code::INVALID_ARGUMENT, "ipc", |c| sandbox_options(c).ipc = NamespaceMode::CONTAINER.into()),
    ("ipc of a target", Code::INVALID_ARGUMENT, "ipc", |c| sandbox_options(c).ipc = NamespaceMode::TARGET.into()),
    ("pid of a target", Code::INVALID_ARGUMENT, "pid", |c| sandbox_options(c).pid = NamespaceMode::TARGET.into()),
    ("a mode that is none", Code::INVALID_ARGUMENT, "pid", |c| sandbox_options(c).pid = EnumOrUnknown::from_i32(9)),
    ("users without maps", Code::INVALID_ARGUMENT, "userns_options.uids", |c| users(c, &[], &[(0, 100_000, 9)])),
    ("users with two maps", Code::INVALID_ARGUMENT, "userns_options.gids", |c| users(c, &[(0, 1, 9)], &[(0, 1, 5), (5, 9, 4)])),
    ("users of two lengths", Code::INVALID_ARGUMENT, "userns_options.gids", |c| users(c, &[(0, 100_000, 9)], &[(0, 100_000, 8)])),
    ("users without root", Code::INVALID_ARGUMENT, "userns_options.uids", |c| users(c, &[(1, 100_000, 9)], &[(0, 100_000, 9)])),
    ("more users than there are", Code::INVALID_ARGUMENT, "userns_options.uids", |c| users(c, &[(0, u32::MAX - 3, 9)], &[(0, 100_000, 9)])),
    ("user namespace of a container", Code::INVALID_ARGUMENT, "userns_options.mode", |c| {
        users(c, &[(0, 100_000, 9)], &[(0, 100_000, 9)]);
        sandbox_options(c).userns_options.mut_or_insert_default().mode = NamespaceMode::CONTAINER.into();
    }),
    ("user namespace of a target", Code::INVALID_ARGUMENT, "userns_options.mode", |c| {
        users(c, &[(0, 100_000, 9)], &[(0, 100_000, 9)]);
        sandbox_options(c).userns_options.mut_or_insert_default().mode = NamespaceMode::TARGET.into();
    }),
    ("a sysctl of the host", Code::INVALID_ARGUMENT, "kernel.panic", |c| sysctl(c, "kernel.panic")),
    ("a sysctl with a plus", Code::INVALID_ARGUMENT, "net.ipv4.+", |c| sysctl(c, "net.ipv4.+")),
    ("a sysctl that climbs", Code::INVALID_ARGUMENT, "net/../kernel/panic", |c| sysctl(c, "net/../kernel/panic")),
    ("a net sysctl on the host's network", Code::INVALID_ARGUMENT, "net.ipv4.ip_forward", |c| {
        sysctl(c, "net.ipv4.ip_forward");
        sandbox_options(c).network = NamespaceMode::NODE.into();
    }),
    ("an ipc sysctl in the host's ipc", Code::INVALID_ARGUMENT, "kernel.shmmax", |c| {
        sysctl(c, "kernel.shmmax");
        sandbox_options(c).ipc = NamespaceMode::NODE.into();
    }),
    ("a sysctl that is not there", Code::INTERNAL, "no_such_thing", |c| sysctl(c, "net.ipv4.no_such_thing")),
    ("an SELinux level that is none", Code::INVALID_ARGUMENT, "selinux_options", |c| {
        let context = c.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.selinux_options.mut_or_insert_default().level = "high".into();
    }),
    ("a hostname with a slash", Code::INVALID_ARGUMENT, "hostname", |c| c.hostname = "a/b".into()),
    ("a long hostname", Code::INVALID_ARGUMENT, "hostname", |c| c.hostname = "a".repeat(65)),
    ("a DNS server of two lines", Code::INVALID_ARGUMENT, "dns_config.servers", |c| {
        c.dns_config.mut_or_insert_default().servers.push("1.1.1.1\nnameserver 6.6.6.6".into());
    }),
    ("33 DNS searches", Code::INVALID_ARGUMENT, "dns_config.searches", |c| {
        c.dns_config.mut_or_insert_default().searches = vec!["a".into(); 33];
    }),
    ("a port beyond all ports", Code::INVALID_ARGUMENT, "port_mappings[0]", |c| {
        c.port_mappings.push(PortMapping { container_port: 80, host_port: 70000, ..Default::default() });
    }),
    ("a port on no address", Code::INVALID_ARGUMENT, "port_mappings[0].host_ip", |c| {
        c.port_mappings.push(PortMapping { container_port: 80, host_port: 80, host_ip: "here".into(), ..Default::default() });
    }),
    ("a protocol that is none", Code::INVALID_ARGUMENT, "port_mappings[0].protocol", |c| {
        c.port_mappings.push(PortMapping { protocol: EnumOrUnknown::from_i32(9), container_port: 80, host_port: 80, ..Default::default() });
    }),
    ("a slice of systemd as cgroup parent", Code::INVALID_ARGUMENT, "cgroup_parent", |c| {
        c.linux.mut_or_insert_default().cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".into();
    }),
    ("a cgroup parent that climbs", Code::INVALID_ARGUMENT, "cgroup_parent", |c| {
        c.linux.mut_or_insert_default().cgroup_parent = "/a/../..".into();
    }),
];

#[test]
fn sandboxes() {
    let node = Node::start();
    for (what, code, words, change) in SANDBOXES {
        let mut config = node.sandbox_config("web");
        change(&mut config);
        let error = node.run(&config).expect_err(what);
        assert!(error.code == *code && error.message.contains(words), "{what}: {error}");
        assert!(node.sandbox_ids().is_empty(), "{what}");
        assert_eq!(node.leftovers(), [""; 0], "{what}");
    }
    assert!(node.plugin_calls().is_empty(), "refused before any plugin ran");
    node.sandbox("web");
}

fn localhost_seccomp(config: &mut ContainerConfig, localhost_ref: &str) {
    security(config).seccomp = MessageField::some(SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: localhost_ref.into(),
        ..Default::default()
    });
}

type ContainerCase = (&'static str, Code, &'static str, fn(&mut ContainerConfig));

fn image_mount(config: &mut ContainerConfig, image: &str, sub_path: &str) {
    mount(config, |m| {
        (m.readonly, m.image_sub_path) = (true, sub_path.into());
        m.host_path.clear();
        m.image = MessageField::some(ImageSpec { image: image.into(), ..Default::default() });
    });
}

fn mount(config: &mut ContainerConfig, change: impl FnOnce(&mut Mount)) {
    let mut mount = Mount { container_path: "/data".into(), host_path: "/tmp".into(), ..Default::default() };
    change(&mut mount);
    config.mounts.push(mount);
}

const CONTAINERS: &[ContainerCase] = &[
    ("no metadata", Code::INVALID_ARGUMENT, "metadata", |c| c.metadata = MessageField::none()),
    ("no name", Code::INVALID_ARGUMENT, "name", |c| c.metadata.mut_or_insert_default().name.clear()),
    ("no image", Code::INVALID_ARGUMENT, "image", |c| c.image = MessageField::none()),
    ("an image that is absent", Code::NOT_FOUND, "localhost/absent:1", |c| {
        c.image.mut_or_insert_default().image = "localhost/absent:1".into()
    }),
    ("an image of a handler", Code::INVALID_ARGUMENT, "runtime_handler", |c| {
        c.image.mut_or_insert_default().runtime_handler = "kata".into()
    }),
    ("a log above its directory", Code::INVALID_ARGUMENT, "log_path", |c| c.log_path = "../out.log".into()),
    ("a log anywhere", Code::INVALID_ARGUMENT, "log_path", |c| c.log_path = "/tmp/crisp-out.log".into()),
    ("a log that climbs later", Code::INVALID_ARGUMENT, "log_path", |c| c.log_path = "a/../../out.log".into()),
    ("privileged", Code::INVALID_ARGUMENT, "privileged", |c| security(c).privileged = true),
    ("users of its own", Code::INVALID_ARGUMENT, "userns_options", |c| {
        security(c).namespace_options.mut_or_insert_default().userns_options =
            MessageField::some(node::users(&[(0, 100_000, 9)], &[(0, 100_000, 9)]));
    }),
    ("a mount with half of the mappings", Code::INVALID_ARGUMENT, "uidMappings", |c| {
        mount(c, |m| m.gidMappings.push(IDMapping { length: 1, ..Default::default() }));
    }),
    ("a mount of no users", Code::INVALID_ARGUMENT, "mount /data: uidMappings", |c| {
        mount(c, |m| {
            m.uidMappings.push(IDMapping::default());
            m.gidMappings.push(IDMapping::default());
        });
    }),
    ("mapped owners in /proc", Code::FAILED_PRECONDITION, "mount /data", |c| {
        mount(c, |m| {
            m.host_path = "/proc/sys".into();
            m.uidMappings.push(IDMapping { host_id: 100_000, length: 9, ..Default::default() });
            m.gidMappings.push(IDMapping { host_id: 100_000, length: 9, ..Default::default() });
        });
    }),
    ("a PID mode that is none", Code::INVALID_ARGUMENT, "pid", |c| {
        security(c).namespace_options.mut_or_insert_default().pid = EnumOrUnknown::from_i32(9);
    }),
    ("a target that is none", Code::INVALID_ARGUMENT, "target", |c| {
        let options = security(c).namespace_options.mut_or_insert_default();
        options.pid = NamespaceMode::TARGET.into();
        options.target_id = "0123456789".into();
    }),
    ("a CDI device that is none", Code::INVALID_ARGUMENT, "CDI_devices", |c| {
        c.CDI_devices.push(CDIDevice { name: "gpu0".into(), ..Default::default() })
    }),
    ("a CDI device that is unknown", Code::FAILED_PRECONDITION, "a/b=c", |c| {
        c.CDI_devices.push(CDIDevice { name: "a/b=c".into(), ..Default::default() })
    }),
    ("CDI by annotation", Code::INVALID_ARGUMENT, "cdi.k8s.io/x", |c| drop(c.annotations.insert("cdi.k8s.io/x".into(), "a/b".into()))),
    ("a seccomp file by a relative path", Code::INVALID_ARGUMENT, "seccomp.localhost_ref", |c| localhost_seccomp(c, "profile.json")),
    ("a seccomp file that is not there", Code::FAILED_PRECONDITION, "/nonexistent/a.json", |c| localhost_seccomp(c, "/nonexistent/a.json")),
    ("the same the old way", Code::FAILED_PRECONDITION, "/nonexistent/a.json", |c| {
        security(c).seccomp_profile_path = "localhost//nonexistent/a.json".into();
    }),
    ("a seccomp file that is a device", Code::FAILED_PRECONDITION, "/dev/null", |c| localhost_seccomp(c, "/dev/null")),
    ("a seccomp file that is none", Code::INVALID_ARGUMENT, "/etc/passwd", |c| localhost_seccomp(c, "/etc/passwd")),
    ("a seccomp profile that is none", Code::INVALID_ARGUMENT, "seccomp", |c| security(c).seccomp_profile_path = "strict".into()),
    ("windows", Code::INVALID_ARGUMENT, "windows", |c| c.windows = MessageField::some(WindowsContainerConfig::default())),
    ("a mount of an image to write to", Code::INVALID_ARGUMENT, "readonly", |c| {
        mount(c, |m| {
            m.host_path.clear();
            m.image = MessageField::some(ImageSpec { image: "localhost/test:1".into(), ..Default::default() });
        });
    }),
    ("a mount of an image that is not here", Code::UNKNOWN, "ImageVolumeMountFailed", |c| image_mount(c, "localhost/none:1", "")),
    ("a mount of what an image has not", Code::UNKNOWN, "ImageVolumeMountFailed", |c| image_mount(c, "localhost/test:1", "not/there")),
    ("a mount of an image for a handler", Code::INVALID_ARGUMENT, "runtime_handler", |c| {
        image_mount(c, "localhost/test:1", "");
        c.mounts[0].image.mut_or_insert_default().runtime_handler = "wasm".into();
    }),
    ("a mount of a path and of an image", Code::INVALID_ARGUMENT, "exclude", |c| {
        mount(c, |m| m.image = MessageField::some(ImageSpec { image: "localhost/test:1".into(), ..Default::default() }));
    }),
    ("a recursive read-only mount that is writable", Code::INVALID_ARGUMENT, "recursive_read_only", |c| {
        mount(c, |m| m.recursive_read_only = true)
    }),
    ("mount options", Code::INVALID_ARGUMENT, "mount_options: \"suid\"", |c| mount(c, |m| m.mount_options.push("suid".into()))),
    ("a mount to nowhere", Code::INVALID_ARGUMENT, "container_path", |c| mount(c, |m| m.container_path = "data".into())),
    ("a mount over the root", Code::INVALID_ARGUMENT, "root", |c| mount(c, |m| m.container_path = "/a/..".into())),
    ("a propagation that is none", Code::INVALID_ARGUMENT, "propagation", |c| mount(c, |m| m.propagation = EnumOrUnknown::from_i32(9))),
    ("a group without a user", Code::INVALID_ARGUMENT, "run_as_group", |c| {
        security(c).run_as_group = MessageField::some(Int64Value { value: 5, ..Default::default() });
    }),
    ("a user that is unknown", Code::FAILED_PRECONDITION, "nobody-here", |c| security(c).run_as_username = "nobody-here".into()),
    ("a user below zero", Code::INVALID_ARGUMENT, "run_as_user", |c| {
        security(c).run_as_user = MessageField::some(Int64Value { value: -1, ..Default::default() });
    }),
    ("a user of 32 bits", Code::INVALID_ARGUMENT, "run_as_user", |c| {
        security(c).run_as_user = MessageField::some(Int64Value { value: 1 << 31, ..Default::default() });
    }),
    ("a user twice", Code::INVALID_ARGUMENT, "run_as_user", |c| {
        security(c).run_as_user = MessageField::some(Int64Value { value: 1, ..Default::default() });
        security(c).run_as_username = "app".into();
    }),
    ("a capability that is none", Code::INVALID_ARGUMENT, "CAP_MAGIC", |c| {
        security(c).capabilities.mut_or_insert_default().add_capabilities.push("CAP_MAGIC".into());
    }),
    ("a masked path that is relative", Code::INVALID_ARGUMENT, "masked_paths", |c| security(c).masked_paths.push("proc".into())),
    ("a working directory in /proc/self/fd", Code::INVALID_ARGUMENT, "working_dir", |c| c.working_dir = "/proc/self/fd/7".into()),
    ("a working directory that is relative", Code::INVALID_ARGUMENT, "working_dir", |c| c.working_dir = "a".into()),
    ("a variable without a name", Code::INVALID_ARGUMENT, "envs", |c| c.envs.push(KeyValue::default())),
    ("a device that is none", Code::FAILED_PRECONDITION, "/etc/passwd", |c| {
        c.devices.push(Device { host_path: "/etc/passwd".into(), permissions: "r".into(), ..Default::default() });
    }),
    ("device permissions that are none", Code::INVALID_ARGUMENT, "permissions", |c| {
        c.devices.push(Device { host_path: "/dev/null".into(), permissions: "rx".into(), ..Default::default() });
    }),
    ("a log path with a NUL byte", Code::INVALID_ARGUMENT, "config.log_path", |c| c.log_path = "app\0.log".into()),
    ("a device with a NUL byte", Code::INVALID_ARGUMENT, "container_path", |c| {
        let device =
            Device { host_path: "/dev/null".into(), container_path: "/dev/a\0b".into(), permissions: "r".into(), ..Default::default() };
        c.devices.push(device);
    }),
    ("a stop signal that is none", Code::INVALID_ARGUMENT, "stop_signal", |c| c.stop_signal = EnumOrUnknown::from_i32(999)),
    ("swap below memory", Code::INVALID_ARGUMENT, "memory_swap_limit_in_bytes", |c| {
        let resources = c.linux.mut_or_insert_default().resources.mut_or_insert_default();
        (resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes) = (64 << 20, 32 << 20);
    }),
    ("an SELinux level that is none", Code::INVALID_ARGUMENT, "selinux_options", |c| {
        security(c).selinux_options = MessageField::some(SELinuxOption { level: "high".into(), ..Default::default() });
    }),
];

#[test]
fn containers() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    for (what, code, words, change) in CONTAINERS {
        let mut config = node.container_config("app", "exec sleep 1000");
        change(&mut config);
        let error = node.create(&sandbox, &config).expect_err(what);
        assert!(error.code == *code && error.message.contains(words), "{what}: {error}");
        assert!(node.container_ids().is_empty(), "{what}");
        for dir in ["run/containers", "root/containers", "root/snapshots"] {
            let left = std::fs::read_dir(node.path(dir)).into_iter().flatten().flatten().map(|e| e.path()).next();
            assert_eq!(left, None, "{what}");
        }
    }
    node.create(&sandbox, &node.container_config("app", "exec sleep 1000")).expect("the name is free");
}

#[test]
fn kubelet_knows_it_by_its_first_word() {
    let mut node = Node::start();
    let mut config = node.container_config("app", "true");
    mount(&mut config, |m| (m.readonly, m.recursive_read_only) = (true, true));
    let sandbox = node.sandbox("able");
    let id = node.create(&sandbox, &config).expect("the runtime says that it can");
    let spec = node.spec(&id);
    let asked = spec["mounts"].as_array().expect("a list").iter().find(|m| m["destination"] == "/data").expect("it is there");
    assert_eq!(asked["options"], serde_json::json!(["rbind", "rprivate", "ro", "rro"]));
    node.stop_daemon();
    std::fs::write(node.path("oci/features"), r#"{"linux":{"namespaces":["pid"]}}"#).expect("write the features");
    node.start_daemon();
    let sandbox = node.sandbox("web");
    let message = refused(node.create(&sandbox, &config), Code::UNKNOWN, "/data");
    assert!(message.starts_with("RROUnsupported"), "{message}");
}

#[test]
fn log_links_are_not_followed() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let logs = node.path("logs/web");
    std::fs::create_dir_all(&logs).expect("make the log directory");
    std::os::unix::fs::symlink(node.path("cni"), logs.join("out")).expect("link");
    std::os::unix::fs::symlink(node.path("cni/calls"), logs.join("link.log")).expect("link");
    for path in ["out/app.log", "link.log"] {
        let mut config = node.container_config("app", "true");
        config.log_path = path.into();
        refused(node.create(&sandbox, &config), Code::INVALID_ARGUMENT, "log_path");
    }
}

#[test]
fn apparmor_where_there_is_none() {
    if std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y')) {
        return;
    }
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "true");
    security(&mut config).apparmor_profile = "localhost/mine".into();
    refused(node.create(&sandbox, &config), Code::FAILED_PRECONDITION, "apparmor");
}

#[test]
fn no_containers_in_a_stopped_sandbox() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let created = node.create(&sandbox, &node.container_config("early", "true")).expect("create");
    node.stop_sandbox(&sandbox).expect("stop");
    refused(node.create(&sandbox, &node.container_config("late", "true")), Code::FAILED_PRECONDITION, "not ready");
    refused(node.start_container(&created), Code::FAILED_PRECONDITION, "not ready");
}
