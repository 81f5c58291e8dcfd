//! Whose namespaces a container is in, as it sees them itself: network, IPC and UTS are the sandbox's whatever it says, and it chooses its
//! PID mode.

use std::fs;
use std::path::Path;

use crisp::api::runtime::{ContainerConfig, NamespaceMode, NamespaceOption, PodSandboxConfig};

use crate::harness::{handlers, Container, Host, Sandbox};
use crate::objects::sandbox_config;
use crate::shim::eventually;

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn asked(config: &mut ContainerConfig) -> &mut NamespaceOption {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default()
}

fn options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default()
}

fn launch(host: &Host, sandbox: &Sandbox, name: &str, change: impl FnOnce(&mut ContainerConfig)) -> Container {
    let container = host.create_with(sandbox, name, &SLEEP, change);
    host.start_container(&container);
    container
}

/// `net:[4026531840]` of a container, in its own eyes.
fn namespace(host: &Host, container: &Container, name: &str) -> String {
    let (code, out, error) = host.exec(container, &["readlink", &format!("/proc/self/ns/{name}")]);
    assert_eq!(code, 0, "{error}");
    out.trim().to_owned()
}

fn own(name: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{name}")).expect("read our namespace").display().to_string()
}

#[test]
fn network_ipc_and_uts_are_the_sandboxs() {
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "own", false);
        config.linux.mut_or_insert_default().sysctls.insert("kernel.shmmax".into(), "7654321".into());
        let sandbox = host.run(config, &handler);
        let one = host.launch(&sandbox, "one", &SLEEP);
        // One that wants the host's is overruled, not refused.
        let two = launch(&host, &sandbox, "two", |config| {
            (asked(config).network, asked(config).ipc) = (NamespaceMode::NODE.into(), NamespaceMode::NODE.into());
        });
        for name in ["net", "ipc", "uts"] {
            let first = namespace(&host, &one, name);
            assert_eq!(first, namespace(&host, &two, name), "{handler}: {name}");
            assert_ne!(first, own(name), "{handler}: {name}");
        }
        // What the sandbox was given is not rewritten by those who join.
        for container in [&one, &two] {
            assert_eq!(host.exec(container, &["hostname"]).1, "own\n", "{handler}");
            assert_eq!(host.exec(container, &["cat", "/proc/sys/kernel/shmmax"]).1, "7654321\n", "{handler}");
        }
        let mut config = sandbox_config(&host.daemon.layout, "node", true);
        options(&mut config).ipc = NamespaceMode::NODE.into();
        let sandbox = host.run(config, &handler);
        let container = launch(&host, &sandbox, "app", |config| {
            (asked(config).network, asked(config).ipc) = (NamespaceMode::POD.into(), NamespaceMode::POD.into());
        });
        for name in ["net", "ipc", "uts"] {
            assert_eq!(namespace(&host, &container, name), own(name), "{handler}: {name}");
        }
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_container_chooses_its_pid_namespace() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("pids", &handler);
        let target = host.launch(&sandbox, "target", &["sleep", "424243"]);
        let other = host.launch(&sandbox, "other", &SLEEP);
        assert_ne!(namespace(&host, &target, "pid"), namespace(&host, &other, "pid"), "{handler}");
        let debug = launch(&host, &sandbox, "debug", |config| {
            (asked(config).pid, asked(config).target_id) = (NamespaceMode::TARGET.into(), target.id.clone());
        });
        assert_eq!(namespace(&host, &debug, "pid"), namespace(&host, &target, "pid"), "{handler}");
        assert!(host.exec(&debug, &["cat", "/proc/1/cmdline"]).1.contains("424243"), "{handler}");
        let node = launch(&host, &sandbox, "node", |config| asked(config).pid = NamespaceMode::NODE.into());
        assert_eq!(namespace(&host, &node, "pid"), own("pid"), "{handler}");
        let shared = ["one", "two"].map(|name| launch(&host, &sandbox, name, |config| asked(config).pid = NamespaceMode::POD.into()));
        assert_eq!(namespace(&host, &shared[0], "pid"), namespace(&host, &shared[1], "pid"), "{handler}");
        assert_ne!(namespace(&host, &shared[0], "pid"), namespace(&host, &other, "pid"), "{handler}");
        // Its init reaps whom others leave behind.
        host.exec(&shared[0], &["sh", "-c", "(sleep 0.1 & exec true)"]);
        eventually("it has ended and was reaped", || {
            let (_, text, _) = host.exec(&shared[0], &["ps", "-o", "stat,args"]);
            !text.lines().any(|line| line.trim_start().starts_with('Z') || line.ends_with("sleep 0.1"))
        });
        // A debugger goes without its target.
        host.stop(&debug, 0);
        host.stop(&shared[0], 0);
        assert_eq!(host.exec(&target, &["true"]).0, 0, "{handler}");
        assert_eq!(host.exec(&shared[1], &["true"]).0, 0, "{handler}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn cgroups_have_a_namespace_where_there_is_one_tree() {
    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "cgroups", false);
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        let sandbox = host.run(config, &handler);
        let plain = host.launch(&sandbox, "plain", &SLEEP);
        assert_eq!(namespace(&host, &plain, "cgroup") == own("cgroup"), !v2, "{handler}");
        if v2 {
            assert_eq!(host.exec(&plain, &["cat", "/proc/1/cgroup"]).1, "0::/\n", "{handler}");
            assert_eq!(host.exec(&plain, &["ls", "/sys/fs/cgroup/cgroup.procs"]).0, 0, "{handler}");
        }
        let strong = launch(&host, &sandbox, "strong", |config| {
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        });
        assert_eq!(namespace(&host, &strong, "cgroup"), own("cgroup"), "{handler}");
        host.remove_all();
    }
    host.finish();
}
