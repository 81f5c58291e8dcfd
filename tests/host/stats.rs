//! Stats of real containers: numbers of the kernel, rates, network, what a stop leaves.

#![allow(clippy::cloned_ref_to_slice_refs)] // lists of ids are compared with lists of ids

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crisp::api::runtime::{
    ContainerConfig, ContainerStats, ContainerStatsFilter, ContainerStatsRequest, LinuxContainerResources, ListContainerStatsRequest,
    ListContainersRequest, ListPodSandboxStatsRequest, PodSandboxStats, PodSandboxStatsRequest,
};
use crisp::cgroup::{Cgroup, Layout};
use protobuf::MessageField;
use serde_json::Value;

use crate::daemon::{find, patience, tool, Daemon, PAUSE};
use crate::harness::{handlers, http_get_soon, Container, Host};
use crate::objects::sandbox_config;

const SLEEP: [&str; 2] = ["sleep", "1000000"];
/// A block of 64 MiB in memory, kept: nobody reads the pipe.
const HOLD_64_MIB: [&str; 3] = ["sh", "-c", "dd if=/dev/zero bs=64M count=2 2>/dev/null | sleep 1000000"];
const MIB: u64 = 1 << 20;

fn stats(host: &Host, id: &str) -> ContainerStats {
    let request = ContainerStatsRequest { container_id: id.into(), ..Default::default() };
    host.call(&request).stats.unwrap_or_default()
}

fn sandbox_stats(host: &Host, id: &str) -> PodSandboxStats {
    let request = PodSandboxStatsRequest { pod_sandbox_id: id.into(), ..Default::default() };
    host.call(&request).stats.unwrap_or_default()
}

fn listed(host: &Host, filter: Option<ContainerStatsFilter>) -> Vec<ContainerStats> {
    host.call(&ListContainerStatsRequest { filter: filter.into(), ..Default::default() }).stats
}

fn ids(stats: &[ContainerStats]) -> Vec<String> {
    stats.iter().map(|s| s.attributes.id.clone()).collect()
}

fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.mut_or_insert_default().resources.mut_or_insert_default()
}

fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(begin.elapsed() < patience(Duration::from_secs(20)), "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The cgroup at `path`, read by this test alone.
struct Kernel(Cgroup);

impl Kernel {
    fn of(path: &str) -> Kernel {
        Kernel(Cgroup::at(Layout::host().expect("cgroups"), path).expect("a path"))
    }

    fn container(host: &Host, container: &Container) -> Kernel {
        Kernel::of(&format!("{}/{}", host.daemon.layout.cgroup_parent(), container.id))
    }

    fn file(&self, controller: &str, v1: &str, v2: &str) -> String {
        let dir = self.0.dir(controller).expect("a hierarchy");
        let name = if dir.join("cgroup.controllers").exists() { v2 } else { v1 };
        fs::read_to_string(dir.join(name)).unwrap_or_else(|e| panic!("{}/{name}: {e}", dir.display()))
    }

    fn keyed(text: &str, key: &str) -> u64 {
        let line = text.lines().find(|l| l.split(' ').next() == Some(key)).unwrap_or_else(|| panic!("no {key} in {text}"));
        line.split(' ').nth(1).expect("a value").parse().expect("a number")
    }

    /// Nanoseconds.
    fn cpu(&self) -> u64 {
        let text = self.file("cpuacct", "cpuacct.usage", "cpu.stat");
        text.trim().parse().unwrap_or_else(|_| Kernel::keyed(&text, "usage_usec") * 1000)
    }

    fn memory(&self) -> u64 {
        self.file("memory", "memory.usage_in_bytes", "memory.current").trim().parse().expect("a number")
    }

    fn of_memory(&self, v1: &str, v2: &str) -> u64 {
        let text = self.file("memory", "memory.stat", "memory.stat");
        Kernel::keyed(&text, if text.contains("total_rss ") { v1 } else { v2 })
    }

    /// Stalls of kind `some` in nanoseconds.
    fn pressure(&self, file: &str) -> Option<u64> {
        let dir = self.0.dirs().iter().find(|d| d.unified)?;
        let text = fs::read_to_string(dir.path.join(file)).ok()?;
        let total = text.lines().next()?.rsplit('=').next()?;
        total.parse::<u64>().ok().map(|us| us * 1000)
    }
}

/// A rate of CPU time, with the kernel's counter right before and right after the call that gave it.
#[derive(Debug)]
struct Reading {
    before: (Instant, u64),
    after: (Instant, u64),
    rate: Option<u64>,
}

impl Reading {
    fn take(host: &Host, container: &Container, kernel: &Kernel) -> Reading {
        let before = (Instant::now(), kernel.cpu());
        let rate = stats(host, &container.id).cpu.usage_nano_cores.as_ref().map(|rate| rate.value);
        // The time last: ours is around the daemon's on both sides.
        let used = kernel.cpu();
        Reading { before, after: (Instant::now(), used), rate }
    }

    /// Whether its rate may be that since an earlier reading.
    fn is_since(&self, earlier: &Reading) -> bool {
        let (least, most) = (self.before.1.saturating_sub(earlier.after.1), self.after.1 - earlier.before.1);
        let (shortest, longest) = (self.before.0.saturating_duration_since(earlier.after.0), self.after.0 - earlier.before.0);
        let per_second = |used: u64, time: Duration| (u128::from(used) * 1_000_000_000 / time.as_nanos().max(1)) as u64;
        let bounds = per_second(least, longest)..=per_second(most, shortest);
        longest >= Duration::from_millis(100) && self.rate.is_some_and(|rate| bounds.contains(&rate))
    }
}

fn near(a: u64, b: u64, slack: u64) -> bool {
    a.abs_diff(b) <= slack
}

#[test]
fn numbers_are_the_kernels() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("numbers", &handler);
        let container = host.create_with(&sandbox, "main", &HOLD_64_MIB, |c| resources(c).memory_limit_in_bytes = 256 * MIB as i64);
        host.start_container(&container);
        let kernel = Kernel::container(&host, &container);
        eventually("64 MiB in memory", || (kernel.of_memory("total_rss", "anon") >= 64 * MIB).then_some(()));
        let before = (kernel.cpu(), kernel.pressure("cpu.pressure"));
        let now = |at: i64| (crisp::store::now_ns() - at).abs() < 5_000_000_000;
        let found = stats(&host, &container.id);
        let after = (kernel.cpu(), kernel.pressure("cpu.pressure"));
        assert!(now(found.cpu.timestamp) && now(found.memory.timestamp) && now(found.io.timestamp));
        let cpu = found.cpu.usage_core_nano_seconds.value;
        assert!((before.0..=after.0).contains(&cpu), "{handler}: {} <= {cpu} <= {}", before.0, after.0);
        if let (Some(low), Some(high)) = (before.1, after.1) {
            let total = found.cpu.psi.Some.Total;
            assert!((low..=high).contains(&total), "{handler}: {low} <= {total} <= {high}");
            assert!(found.memory.psi.Some.is_some() && found.io.psi.Full.is_some());
        }
        let m = &found.memory;
        let (usage, set, rss) = (m.usage_bytes.value, m.working_set_bytes.value, m.rss_bytes.value);
        assert!(near(usage, kernel.memory(), MIB), "{handler}: usage {usage}");
        assert!(near(rss, kernel.of_memory("total_rss", "anon"), MIB), "{handler}: rss {rss}");
        let inactive = kernel.of_memory("total_inactive_file", "inactive_file");
        assert!(near(set, kernel.memory() - inactive, MIB), "{handler}: working set {set}");
        assert!((64 * MIB..80 * MIB).contains(&set), "{handler}: working set {set}");
        assert_eq!(m.available_bytes.value, 256 * MIB - set, "{handler}");
        assert!(near(m.page_faults.value, kernel.of_memory("total_pgfault", "pgfault"), 50), "{handler}: {}", m.page_faults.value);
        assert!(m.major_page_faults.is_some() && found.swap.is_some());
        if handler == "runc" {
            matches_runc(&host.daemon, &container, &found);
        }
        let layer = eventually("the writable layer", || stats(&host, &container.id).writable_layer.into_option());
        assert!(Path::new(&layer.fs_id.mountpoint).is_dir() && layer.inodes_used.value >= 1 && layer.timestamp > 0);

        // No limit, no number of what is left of it.
        let free = host.launch(&sandbox, "free", &SLEEP);
        assert!(stats(&host, &free.id).memory.available_bytes.is_none());
        host.remove_all();
    }
    host.finish();
}

/// `runc events --stats` reads the same files.
fn matches_runc(daemon: &Daemon, container: &Container, ours: &ContainerStats) {
    let root = eventually("runc's state", || {
        let state = container.id.as_str();
        let places = [daemon.layout.path("run"), PathBuf::from("/run")];
        places.iter().find_map(|place| find_dir(place, state, 4)).and_then(|dir| dir.parent().map(Path::to_owned))
    });
    let runc = find("runc").expect("runc").display().to_string();
    let text = tool(&runc, &["--root", &root.display().to_string(), "events", "--stats", &container.id]);
    let theirs: Value = serde_json::from_str(&text).expect("runc's answer is JSON");
    let number = |pointer: &str| theirs.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {pointer} in {theirs}"));
    let later = number("/data/cpu/usage/total");
    let cpu = ours.cpu.usage_core_nano_seconds.value;
    assert!(cpu <= later && later - cpu < 2_000_000_000, "runc: {later}, ours: {cpu}");
    assert!(near(ours.memory.usage_bytes.value, number("/data/memory/usage/usage"), MIB), "{theirs}");
}

/// The directory `name` with a state.json below `place`.
fn find_dir(place: &Path, name: &str, depth: u32) -> Option<PathBuf> {
    let own = place.join(name);
    if own.join("state.json").exists() {
        return Some(own);
    }
    if depth == 0 {
        return None;
    }
    let dirs = fs::read_dir(place).ok()?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    dirs.into_iter().find_map(|e| find_dir(&e.path(), name, depth - 1))
}

#[test]
fn half_a_core_for_two_seconds() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("burn", &handler);
        let container = host.create_with(&sandbox, "main", &["sh", "-c", "while :; do :; done"], |config| {
            let resources = resources(config);
            (resources.cpu_quota, resources.cpu_period) = (10_000, 20_000);
        });
        host.start_container(&container);
        let kernel = Kernel::container(&host, &container);
        let mut readings = vec![Reading::take(&host, &container, &kernel)];
        assert!(readings[0].rate.is_none(), "a rate needs two samples");
        // Too early for a rate: no sample is 100 ms old.
        let early = Reading::take(&host, &container, &kernel);
        assert!(early.rate.is_none() || early.is_since(&readings[0]), "{handler}: {early:?} after {readings:?}");
        readings.push(early);
        std::thread::sleep(Duration::from_secs(2));
        // The rest right after it: no rubbish.
        for _ in 0..6 {
            let next = Reading::take(&host, &container, &kernel);
            assert!(readings.iter().any(|earlier| next.is_since(earlier)), "{handler}: {next:?} after {readings:?}");
            readings.push(next);
        }
        // A busy machine may give less than the quota, never more.
        let rate = readings[2].rate.expect("a rate");
        assert!(rate < 550_000_000, "{handler}: {rate}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn containers_that_exit_during_the_call() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("exits", &handler);
        let steady = host.launch(&sandbox, "steady", &SLEEP);
        let done = AtomicBool::new(false);
        let calls = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let mut calls = 0;
                while !done.load(Ordering::SeqCst) {
                    assert!(ids(&listed(&host, None)).contains(&steady.id));
                    let pods = host.call(&ListPodSandboxStatsRequest::default()).stats;
                    assert_eq!(pods.len(), 1);
                    calls += 1;
                }
                calls
            });
            for n in 0..8 {
                let short = host.launch(&sandbox, &format!("short{n}"), &["true"]);
                host.wait_exit(&short);
                assert!(stats(&host, &short.id).cpu.is_none(), "it has ended");
            }
            done.store(true, Ordering::SeqCst);
            asking.join().expect("every list succeeds")
        });
        assert!(calls > 8, "{calls} calls");
        assert_eq!(ids(&listed(&host, None)), [steady.id.clone()]);
        host.remove_all();
    }
    host.finish();
}

#[test]
fn filters() {
    let host = Host::start();
    let (a, b) = (host.sandbox("a", ""), host.sandbox("b", ""));
    let label = |config: &mut ContainerConfig, value: &str| drop(config.labels.insert("app".into(), value.into()));
    let (a1, a2, b1) = (
        host.create_with(&a, "one", &SLEEP, |c| label(c, "x")),
        host.create_with(&a, "two", &SLEEP, |c| label(c, "y")),
        host.create_with(&b, "one", &SLEEP, |c| label(c, "x")),
    );
    [&a1, &a2, &b1].into_iter().for_each(|c| host.start_container(c));
    let select = |id: &str, sandbox: &str, app: &str| {
        let mut filter = ContainerStatsFilter { id: id.into(), pod_sandbox_id: sandbox.into(), ..Default::default() };
        if !app.is_empty() {
            filter.label_selector.insert("app".into(), app.into());
        }
        let mut found = ids(&listed(&host, Some(filter)));
        found.sort();
        found
    };
    let sorted = |mut ids: Vec<String>| {
        ids.sort();
        ids
    };
    assert_eq!(select(&a1.id, "", ""), [a1.id.clone()]);
    assert_eq!(select("", &a.id, ""), sorted(vec![a1.id.clone(), a2.id.clone()]));
    assert_eq!(select("", "", "x"), sorted(vec![a1.id.clone(), b1.id.clone()]));
    assert_eq!(select("", &b.id, "x"), [b1.id.clone()]);
    assert_eq!(select(&a2.id, &b.id, ""), [""; 0]);
    host.stop(&a2, 0);
    assert_eq!(select("", &a.id, ""), [a1.id.clone()]);
    host.finish();
}

fn sockets(daemon: &Daemon) -> usize {
    let dir = format!("/proc/{}/fd", daemon.pid());
    let links = fs::read_dir(dir).expect("list the daemon's descriptors").flatten();
    links.filter(|e| fs::read_link(e.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))).count()
}

/// Descriptors of files of cgroups.
fn cgroup_files(daemon: &Daemon) -> usize {
    let dir = format!("/proc/{}/fd", daemon.pid());
    let links = fs::read_dir(dir).expect("list the daemon's descriptors").flatten();
    links.filter(|e| fs::read_link(e.path()).is_ok_and(|to| to.starts_with("/sys/fs/cgroup"))).count()
}

#[test]
fn traffic_of_a_sandbox_and_nothing_left_after_its_stop() {
    let host = Host::start();
    let sandbox = host.sandbox("traffic", "");
    let script = "mkdir /w && head -c 3000000 /dev/zero > /w/big && exec httpd -f -p 8080 -h /w";
    host.launch(&sandbox, "web", &["sh", "-c", script]);
    http_get_soon(&sandbox.ip, 8080, "/big");
    let open = sockets(&host.daemon);
    let usage = || {
        let network = sandbox_stats(&host, &sandbox.id).linux.network.clone().unwrap_or_default();
        assert!(network.timestamp > 0 && network.interfaces.is_empty(), "{network}");
        let interface = network.default_interface.clone().unwrap_or_default();
        assert_eq!(interface.name, "eth0");
        assert!(interface.rx_errors.is_some() && interface.tx_errors.is_some());
        (interface.rx_bytes.value, interface.tx_bytes.value)
    };
    let before = usage();
    http_get_soon(&sandbox.ip, 8080, "/big");
    let after = usage();
    let (received, sent) = (after.0 - before.0, after.1 - before.1);
    assert!((3_000_000..3_500_000).contains(&sent), "{sent} bytes sent");
    assert!((100..500_000).contains(&received), "{received} bytes received");
    // One socket in its namespace, however often it was asked.
    assert_eq!(sockets(&host.daemon), open + 1);
    assert!(cgroup_files(&host.daemon) > 0);

    let on_host = host.run(sandbox_config(&host.daemon.layout, "onhost", true), "");
    assert!(sandbox_stats(&host, &on_host.id).linux.network.is_none());

    host.stop_sandbox(&sandbox.id);
    let stopped = sandbox_stats(&host, &sandbox.id);
    assert!(stopped.linux.is_none() && stopped.attributes.id == sandbox.id);
    eventually("the end of the socket", || (sockets(&host.daemon) < open + 1).then_some(()));
    eventually("the end of the cgroup files", || (cgroup_files(&host.daemon) == 0).then_some(()));
    host.finish();
}

#[test]
fn sandboxes_with_and_without_a_cgroup_of_their_own() {
    let host = Host::start();
    for handler in handlers() {
        // The parent is shared: the sandbox is the sum of its containers.
        let shared = host.sandbox("shared", &handler);
        let (one, two) = (host.launch(&shared, "one", &SLEEP), host.launch(&shared, "two", &HOLD_64_MIB));
        let kernel = Kernel::container(&host, &two);
        eventually("64 MiB in memory", || (kernel.of_memory("total_rss", "anon") >= 64 * MIB).then_some(()));
        let found = sandbox_stats(&host, &shared.id).linux.unwrap_or_default();
        assert_eq!(found.containers.len(), 2);
        let sum: u64 = found.containers.iter().map(|c| c.memory.usage_bytes.value).sum();
        assert_eq!((found.memory.usage_bytes.value, found.memory.psi.is_none()), (sum, true), "{handler}");
        // sleep; sh, dd, sleep.
        assert_eq!(found.process.process_count.value, 4, "{handler}");
        let count = || sandbox_stats(&host, &shared.id).linux.process.process_count.value;
        std::thread::scope(|scope| {
            // Whether in a cgroup below or not.
            scope.spawn(|| host.exec(&one, &["sleep", "2"]));
            eventually("the exec in the count", || (count() == 5).then_some(()));
        });
        eventually("its end in the count", || (count() == 4).then_some(()));
        host.remove_all();

        // As kubelet makes it: a cgroup of the pod, named after its uid.
        let mut config = sandbox_config(&host.daemon.layout, "own", false);
        config.metadata.mut_or_insert_default().uid = "3f2a-11".into();
        let parent = format!("{}/pod3f2a-11", host.daemon.layout.cgroup_parent());
        config.linux.mut_or_insert_default().cgroup_parent.clone_from(&parent);
        let own = host.run(config, &handler);
        let container = host.launch(&own, "main", &HOLD_64_MIB);
        let kernel = Kernel::of(&parent);
        eventually("64 MiB in memory", || (kernel.of_memory("total_rss", "anon") >= 64 * MIB).then_some(()));
        let before = kernel.cpu();
        let found = sandbox_stats(&host, &own.id).linux.unwrap_or_default();
        let cpu = found.cpu.usage_core_nano_seconds.value;
        assert!((before..=kernel.cpu()).contains(&cpu), "{handler}: {cpu}");
        assert!(near(found.memory.usage_bytes.value, kernel.memory(), MIB), "{handler}: {}", found.memory.usage_bytes.value);
        // What the cgroup has seen, the containers alone have not: it outlives them.
        assert!(cpu >= found.containers[0].cpu.usage_core_nano_seconds.value);
        assert_eq!(found.cpu.psi.is_some(), kernel.pressure("cpu.pressure").is_some());
        let rate = eventually("a rate", || sandbox_stats(&host, &own.id).linux.cpu.usage_nano_cores.as_ref().map(|v| v.value));
        assert!(rate < 4_000_000_000, "{rate}");
        host.remove(&container);
        host.remove_all();
        Kernel::of(&parent).0.remove(patience(Duration::from_secs(5))).expect("remove the pod's cgroup");
    }
    host.finish();
}

#[test]
fn two_hundred_running_containers() {
    // An emulated machine takes a second for each.
    let part = if patience(Duration::from_secs(1)) > Duration::from_secs(1) { 10 } else { 50 };
    let host = Host::start();
    let sandbox = host.run(sandbox_config(&host.daemon.layout, "many", true), "");
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (host, sandbox) = (&host, &sandbox);
            scope.spawn(move || {
                for n in 0..part {
                    let container = host.create_with(sandbox, &format!("c{client}-{n}"), &[], |config| {
                        config.image = MessageField::some(Default::default());
                        config.image.mut_or_insert_default().image = PAUSE.into();
                    });
                    host.start_container(&container);
                }
            });
        }
    });
    let order: Vec<String> = host.call(&ListContainersRequest::default()).containers.into_iter().map(|c| c.id).collect();
    assert_eq!(order.len(), 4 * part);
    let mut times = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        let found = listed(&host, None);
        times.push(begin.elapsed());
        assert_eq!(ids(&found), order);
        assert!(found.iter().all(|s| s.cpu.usage_core_nano_seconds.value > 0 && s.memory.working_set_bytes.value > 0));
    }
    times.sort();
    println!("{} containers: p50 {:?}, p95 {:?}", 4 * part, times[10], times[18]);
    let pods = host.call(&ListPodSandboxStatsRequest::default()).stats;
    assert_eq!((pods.len(), ids(&pods[0].linux.containers)), (1, order));
    assert_eq!(pods[0].linux.process.process_count.value, 4 * part as u64);
    host.finish();
}
