//! What only cgroup v2 has, or has in another way: `unified` files, groups that the OOM killer takes whole, devices by eBPF,
//! containers that nest cgroups. On v1 hosts the same requests must be refused or mean the same; `make test-vm` brings v2.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crisp::api::runtime::{ContainerConfig, ContainerState, LinuxContainerResources, UpdateContainerResourcesRequest};
use grpcio::RpcStatusCode;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::daemon::{cgroup_dirs, patience, systemd};
use crate::harness::{handlers, Container, Host};
use crate::objects::{container_config, create_request};
use crate::shim::eventually;
use crate::trouble::shim_of;

const SLEEP: [&str; 2] = ["sleep", "1000000"];

fn v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.mut_or_insert_default().resources.mut_or_insert_default()
}

/// The container's cgroup, in each hierarchy.
fn cgroups_of(host: &Host, container: &Container) -> Vec<PathBuf> {
    let dirs = cgroup_dirs(&host.daemon.layout.tag);
    let ours = |dir: &&PathBuf| dir.file_name().is_some_and(|name| name.to_string_lossy().contains(&container.id));
    let own: Vec<PathBuf> = dirs.iter().filter(ours).cloned().collect();
    assert!(!own.is_empty(), "no cgroup of {} in {dirs:?}", container.id);
    own
}

/// The container's cgroup (v2).
fn cgroup(host: &Host, container: &Container) -> PathBuf {
    cgroups_of(host, container).swap_remove(0)
}

fn values(dir: &Path, names: &[&str]) -> Vec<String> {
    let value = |name: &&str| std::fs::read_to_string(dir.join(name)).unwrap_or_else(|e| panic!("{}/{name}: {e}", dir.display()));
    names.iter().map(|name| value(name).trim().to_owned()).collect()
}

#[test]
fn unified_values_reach_the_cgroup_and_can_be_changed() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("unified", &handler);
        let adjust = |config: &mut ContainerConfig| {
            let resources = resources(config);
            resources.memory_limit_in_bytes = 64 << 20;
            resources.cpu_shares = 512;
            (resources.cpu_quota, resources.cpu_period) = (25_000, 50_000);
            for (file, value) in [("memory.high", "50331648"), ("memory.oom.group", "1"), ("pids.max", "77")] {
                resources.unified.insert(file.into(), value.into());
            }
        };
        if !v2() {
            let mut config = container_config(&sandbox.config, "main", &SLEEP);
            adjust(&mut config);
            let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
            assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{message}");
            host.remove_all();
            continue;
        }
        let container = host.create_with(&sandbox, "main", &SLEEP, adjust);
        host.start_container(&container);
        let dir = cgroup(&host, &container);
        let files = ["memory.max", "memory.swap.max", "memory.high", "memory.oom.group", "pids.max", "cpu.weight", "cpu.max"];
        // 512 shares of 2..262144 as a weight of 1..10000; a memory limit without one of swap allows none.
        assert_eq!(values(&dir, &files), ["67108864", "0", "50331648", "1", "77", "20", "25000 50000"], "{handler}");
        // The sandbox's cgroup accounts too.
        let parent = dir.parent().expect("below the parent");
        for file in ["cpu.stat", "memory.current", "pids.current", "io.stat"] {
            assert!(parent.join(file).exists(), "{handler}: {} has no {file}", parent.display());
        }

        let mut update = UpdateContainerResourcesRequest { container_id: container.id.clone(), ..Default::default() };
        let linux = update.linux.mut_or_insert_default();
        linux.memory_limit_in_bytes = 96 << 20;
        linux.cpu_shares = 2;
        linux.unified.insert("memory.high".into(), "83886080".into());
        host.call(&update);
        assert_eq!(values(&dir, &files), ["100663296", "0", "83886080", "1", "77", "1", "25000 50000"], "{handler}");
        let status = host.status(&container);
        assert_eq!(status.resources.linux.unified["memory.high"], "83886080", "{status}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn an_out_of_memory_group_dies_whole() {
    if !v2() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("group", &handler);
        // Without the group the shell would live on and say so.
        let script = "sleep 1000000 & sleep 0.5; tail /dev/zero; echo survived; sleep 1000000";
        for (name, group, code) in [("whole", "1", 137), ("one", "0", 0)] {
            let container = host.create_with(&sandbox, name, &["sh", "-c", script], |config| {
                resources(config).memory_limit_in_bytes = 32 << 20;
                resources(config).unified.insert("memory.oom.group".into(), group.into());
            });
            host.start_container(&container);
            if code == 0 {
                container.log.wait_for("survived");
                assert_eq!(host.status(&container).state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING));
                host.stop(&container, 0);
                continue;
            }
            let status = host.wait_exit(&container);
            assert_eq!((status.exit_code, status.reason.as_str()), (code, "OOMKilled"), "{handler}: {status}");
            assert!(!container.log.text("stdout").contains("survived"));
        }
        host.remove_all();
    }
    host.finish();
}

/// systemd removes a scope once it is empty, read or not; the shim is held back here until then.
#[test]
fn why_a_container_ended_is_known_after_its_cgroup_is_gone() {
    if systemd() && !v2() {
        // A lone notice may be that of the removal there.
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("late", &handler);
        let script = "until [ -e /go ]; do sleep 0.05; done; exec tail /dev/zero";
        let hog = host.create_with(&sandbox, "hog", &["sh", "-c", script], |config| {
            resources(config).memory_limit_in_bytes = 32 << 20;
        });
        host.start_container(&hog);
        let sibling = host.launch(&sandbox, "sibling", &SLEEP);
        let late = |container: &Container, end: &dyn Fn(Pid)| {
            let shim = Pid::from_raw(shim_of(&container.id).expect("a shim"));
            let dirs = cgroups_of(&host, container);
            let text = std::fs::read_to_string(dirs[0].join("cgroup.procs")).expect("read its processes");
            let first = Pid::from_raw(text.lines().next().and_then(|l| l.parse().ok()).expect("a process"));
            kill(shim, Signal::SIGSTOP).expect("hold the shim");
            end(first);
            eventually("it has ended", || match systemd() {
                true => !dirs[0].exists(),
                false => std::fs::read_to_string(dirs[0].join("cgroup.procs")).is_ok_and(|text| text.is_empty()),
            });
            kill(shim, Signal::SIGCONT).expect("let the shim go on");
            let status = host.wait_exit(container);
            (status.exit_code, status.reason)
        };
        let end = late(&hog, &|first| {
            std::fs::write(format!("/proc/{first}/root/go"), b"").expect("let it go");
        });
        assert_eq!(end, (137, "OOMKilled".into()), "{handler}");
        // Its shim has had the notice of the kill beside it by the time that it answers.
        assert_eq!(host.exec(&sibling, &["true"]).0, 0, "{handler}");
        let end = late(&sibling, &|first| kill(first, Signal::SIGKILL).expect("kill it"));
        assert_eq!(end, (137, "Error".into()), "{handler}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn devices_outside_the_list_are_denied() {
    let host = Host::start();
    // A node of the memory device /dev/mem (1:1), which root may make but not open, and of /dev/zero (1:5), which it may.
    let script = "mknod /tmp/mem c 1 1 && mknod /tmp/zero c 1 5; head -c 1 /tmp/zero | wc -c; head -c 1 /tmp/mem; cat /dev/null";
    for handler in handlers() {
        let sandbox = host.sandbox("devices", &handler);
        let container = host.launch(&sandbox, "plain", &SLEEP);
        let (_, text, error) = host.exec(&container, &["sh", "-c", script]);
        assert_eq!(text.trim(), "1", "{handler}: {error}");
        assert!(error.contains("/tmp/mem: Operation not permitted"), "{handler}: {error}");
        // The same after an update, which runtimes write the rules with again.
        let mut update = UpdateContainerResourcesRequest { container_id: container.id.clone(), ..Default::default() };
        update.linux.mut_or_insert_default().cpu_shares = 200;
        host.call(&update);
        let (_, text, error) = host.exec(&container, &["sh", "-c", "head -c 1 /tmp/zero | wc -c; head -c 1 /tmp/mem"]);
        assert_eq!(text.trim(), "1", "{handler}: {error}");
        assert!(error.contains("/tmp/mem: Operation not permitted"), "{handler}: {error}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn a_container_sees_its_own_cgroup_as_the_root() {
    if !v2() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("view", &handler);
        let script =
            "cat /proc/self/cgroup; cat /sys/fs/cgroup/pids.max; mkdir /sys/fs/cgroup/x 2>/dev/null || echo readonly; sleep 1000000";
        let container = host.create_with(&sandbox, "main", &["sh", "-c", script], |config| {
            resources(config).unified.insert("pids.max".into(), "55".into());
        });
        host.start_container(&container);
        container.log.wait_for("readonly");
        assert_eq!(container.log.text("stdout"), "0::/\n55\nreadonly\n", "{handler}");
        // An exec has a cgroup of its own below, which goes with it, or with the last that it leaves behind. A few are kept.
        let (_, text, _) = host.exec(&container, &["cat", "/proc/self/cgroup"]);
        assert!(text.starts_with("0::/crisp-exec-"), "{handler}: {text}");
        for _ in 0..4 {
            assert_eq!(host.exec(&container, &["sh", "-c", "sleep 3 & exit 3"]).0, 3);
        }
        let dir = cgroup(&host, &container);
        let begin = Instant::now();
        loop {
            let children = std::fs::read_dir(&dir).expect("list the cgroup").flatten().filter(|e| e.path().is_dir()).count();
            if children <= 2 {
                break;
            }
            // Execs sweep what earlier ones have left.
            assert_eq!(host.exec(&container, &["true"]).0, 0);
            assert!(begin.elapsed() < patience(Duration::from_secs(10)), "{children} cgroups are left in {}", dir.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        host.remove_all();
    }
    host.finish();
}

/// As systemd or a nested runtime does in a privileged container: no process may then be in the container's own cgroup.
#[test]
fn a_container_may_nest_cgroups() {
    if !v2() {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let mut config = crate::objects::sandbox_config(&host.daemon.layout, "nest", false);
        config.linux.as_mut().and_then(|l| l.security_context.as_mut()).expect("set").privileged = true;
        let sandbox = host.run(config, &handler);
        let script = "d=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); mkdir -p $d/inner/deep && echo $$ >$d/inner/cgroup.procs &&
             echo '+memory +pids' >$d/cgroup.subtree_control && echo $((8 << 20)) >$d/inner/memory.max && echo nested;
             sh -c 'tail /dev/zero'; echo hog ended; sleep 1000000";
        let container = host.create_with(&sandbox, "main", &["sh", "-c", script], |config| {
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
            resources(config).memory_limit_in_bytes = 64 << 20;
        });
        host.start_container(&container);
        container.log.wait_for("hog ended");
        assert!(container.log.text("stdout").starts_with("nested\n"), "{handler}: {:?}", container.log.lines());
        let (code, text, error) = host.exec(&container, &["sh", "-c", "echo in; exit 6"]);
        assert_eq!((code, text.as_str()), (6, "in\n"), "{handler}: {error}");
        let mut update = UpdateContainerResourcesRequest { container_id: container.id.clone(), ..Default::default() };
        update.linux.mut_or_insert_default().memory_limit_in_bytes = 72 << 20;
        host.call(&update);
        assert_eq!(values(&cgroup(&host, &container), &["memory.max"]), [(72 << 20).to_string()], "{handler}");
        host.stop(&container, 0);
        let status = host.status(&container);
        assert_eq!(status.exit_code, 137, "{handler}: {status}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}
