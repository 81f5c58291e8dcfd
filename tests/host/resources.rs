//! Limits as the kernel has them: read in the container's cgroup and by its processes, after a start, an update, an update that
//! failed half way, and a daemon that died in the middle of one. The same on cgroup v1 and v2.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crisp::api::runtime::{ContainerConfig, HugepageLimit, LinuxContainerResources, UpdateContainerResourcesRequest};
use grpcio::RpcStatusCode;
use nix::sys::signal::Signal;

use crate::daemon::{cgroup_dirs, patience, systemd};
use crate::harness::{handlers, Container, Host, Sandbox};

const SLEEP: [&str; 2] = ["sleep", "1000000"];
/// Holds some 20 MB that cannot be reclaimed. A shell becomes its last command, so that is none that lasts.
const HOLD: [&str; 3] = ["sh", "-c", "x=$(yes | head -c 20000000); echo held; sleep 1000000; true"];

fn v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Files that show every limit, by version.
fn files() -> &'static [&'static str] {
    match v2() {
        // What a cpuset comes to: one that was empty may be given what is above it when it is put back.
        true => &[
            "cpu.weight",
            "cpu.max",
            "cpuset.cpus.effective",
            "cpuset.mems.effective",
            "memory.max",
            "memory.swap.max",
            "hugetlb.2MB.max",
            "pids.max",
        ],
        false => &[
            "cpu.shares",
            "cpu.cfs_quota_us",
            "cpu.cfs_period_us",
            "cpuset.cpus",
            "cpuset.mems",
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "hugetlb.2MB.limit_in_bytes",
            "pids.max",
        ],
    }
}

/// Directories of the container's own cgroup, one per hierarchy.
fn cgroups(host: &Host, container: &Container) -> Vec<PathBuf> {
    let dirs = cgroup_dirs(&host.daemon.layout.tag).into_iter();
    dirs.filter(|dir| dir.file_name().is_some_and(|name| name.to_string_lossy().contains(&container.id))).collect()
}

fn value(dirs: &[PathBuf], name: &str) -> String {
    let texts = dirs.iter().filter_map(|dir| std::fs::read_to_string(dir.join(name)).ok());
    texts.map(|text| text.trim().to_owned()).next().unwrap_or_else(|| panic!("no {name} in {dirs:?}"))
}

fn limits(host: &Host, container: &Container) -> Vec<String> {
    let dirs = cgroups(host, container);
    files().iter().map(|name| plain(value(&dirs, name))).collect()
}

/// "No limit" of v1 is a number that pages of some size round down.
fn plain(value: String) -> String {
    match value.parse::<u64>() {
        Ok(bytes) if bytes > 1 << 60 => "none".to_owned(),
        _ => value,
    }
}

fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.mut_or_insert_default().resources.mut_or_insert_default()
}

fn hugepages(bytes: u64) -> Vec<HugepageLimit> {
    vec![HugepageLimit { page_size: "2MB".into(), limit: bytes, ..Default::default() }]
}

fn first() -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_shares: 512,
        cpu_quota: 25_000,
        cpu_period: 50_000,
        cpuset_cpus: "0".into(),
        cpuset_mems: "0".into(),
        memory_limit_in_bytes: 64 << 20,
        hugepage_limits: hugepages(4 << 20),
        oom_score_adj: 321,
        ..Default::default()
    }
}

fn first_limits() -> Vec<&'static str> {
    match v2() {
        true => vec!["20", "25000 50000", "0", "0", "67108864", "0", "4194304", "77"],
        false => vec!["512", "25000", "50000", "0", "0", "67108864", "67108864", "4194304", "77"],
    }
}

fn request(container: &Container, new: LinuxContainerResources) -> UpdateContainerResourcesRequest {
    UpdateContainerResourcesRequest { container_id: container.id.clone(), linux: Some(new).into(), ..Default::default() }
}

fn update(host: &Host, container: &Container, new: LinuxContainerResources) {
    host.call(&request(container, new));
}

fn start_host() -> Host {
    Host::start_with(|options| {
        options.tables = "[resources]\npids_limit = 77\nrlimits = { nofile = \"100:200\", core = \"0\" }\n".into();
    })
}

fn launch(host: &Host, sandbox: &Sandbox, name: &str, command: &[&str]) -> Container {
    let container = host.create_with(sandbox, name, command, |config| *resources(config) = first());
    host.start_container(&container);
    container
}

/// Of all processes of the container.
fn oom_score_adj(host: &Host, container: &Container) -> Vec<String> {
    let dirs = cgroups(host, container);
    let pids = value(&dirs, "cgroup.procs");
    let score = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("read a score").trim().to_owned();
    let mut all: Vec<String> = pids.lines().map(score).collect();
    all.sort();
    all.dedup();
    all
}

#[test]
fn limits_of_a_start_are_the_kernels() {
    let host = start_host();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("start-{handler}"), &handler);
        let script = "ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj; echo done; sleep 1000000";
        let container = launch(&host, &sandbox, "main", &["sh", "-c", script]);
        container.log.wait_for("done");
        assert_eq!(container.log.text("stdout"), "100\n200\n0\n321\ndone\n", "{handler}");
        assert_eq!(limits(&host, &container), first_limits(), "{handler}");
        // Of a process of exec too; the soft limit there is whatever runc 1.1 makes of it.
        assert_eq!(
            host.exec(&container, &["sh", "-c", "ulimit -Hn; sleep 0.5; cat /proc/self/oom_score_adj"]).1,
            "200\n321\n",
            "{handler}"
        );
        host.remove_all();
    }
    host.finish();
}

#[test]
fn an_update_changes_each_limit_and_outlives_the_daemon() {
    let mut host = start_host();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("update-{handler}"), &handler);
        let container = launch(&host, &sandbox, "main", &["sh", "-c", "sleep 1000000 & sleep 1000000"]);
        let created = host.create_with(&sandbox, "created", &SLEEP, |config| *resources(config) = first());
        let new = LinuxContainerResources {
            cpu_shares: 2,
            cpu_quota: 60_000,
            cpu_period: 100_000,
            cpuset_cpus: "0-1".into(),
            memory_limit_in_bytes: 96 << 20,
            hugepage_limits: hugepages(6 << 20),
            oom_score_adj: 400,
            ..Default::default()
        };
        let expected = match v2() {
            true => vec!["1", "60000 100000", "0-1", "0", "100663296", "0", "6291456", "77"],
            false => vec!["2", "60000", "100000", "0-1", "0", "100663296", "100663296", "6291456", "77"],
        };
        for container in [&container, &created] {
            update(&host, container, new.clone());
        }
        host.start_container(&created);
        for container in [&container, &created] {
            assert_eq!(limits(&host, container), expected, "{handler}");
            assert_eq!(oom_score_adj(&host, container), ["400"], "{handler}");
            // The shim sets it a moment after the start: runc gives the one of the creation, crun none.
            let script = "sleep 0.5; cat /proc/self/oom_score_adj";
            assert_eq!(host.exec(container, &["sh", "-c", script]).1, "400\n", "{handler}");
        }
        host.daemon.stop(Signal::SIGKILL);
        host.daemon.run();
        host.daemon.wait_ready();
        let status = host.status(&container).resources;
        let linux = &status.linux;
        assert_eq!((linux.cpu_shares, linux.memory_limit_in_bytes, linux.oom_score_adj), (2, 96 << 20, 400), "{handler}");
        assert_eq!((linux.cpuset_mems.as_str(), linux.hugepage_limits[0].limit), ("0", 6 << 20), "{handler}");
        // The next one keeps them: runtimes remember those of the creation.
        update(&host, &container, LinuxContainerResources { cpu_shares: 1024, ..Default::default() });
        let mut expected: Vec<_> = expected.into_iter().map(str::to_owned).collect();
        expected[0] = if v2() { "39" } else { "1024" }.into();
        assert_eq!(limits(&host, &container), expected, "{handler}");
        // Without hugepages in it, and back to no limit.
        update(&host, &container, LinuxContainerResources { cpu_quota: -1, memory_limit_in_bytes: -1, ..Default::default() });
        let dirs = cgroups(&host, &container);
        match v2() {
            true => assert_eq!((value(&dirs, "cpu.max"), value(&dirs, "memory.max")), ("max 100000".into(), "max".into()), "{handler}"),
            false => {
                assert_eq!(value(&dirs, "cpu.cfs_quota_us"), "-1", "{handler}");
                assert!(value(&dirs, "memory.limit_in_bytes").parse::<u64>().is_ok_and(|bytes| bytes > 1 << 60), "{handler}");
            }
        }
        host.remove_all();
    }
    host.finish();
}

#[test]
fn a_memory_limit_below_the_usage() {
    let host = start_host();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("small-{handler}"), &handler);
        let container = launch(&host, &sandbox, "main", &HOLD);
        container.log.wait_for("held");
        let new = LinuxContainerResources {
            cpu_shares: 300,
            cpu_quota: 30_000,
            cpuset_cpus: "0-1".into(),
            memory_limit_in_bytes: 8 << 20,
            hugepage_limits: hugepages(0),
            oom_score_adj: 400,
            ..Default::default()
        };
        if v2() {
            // The kernel takes it, reclaims, and kills what is left. That may be before the runtime has set the rest.
            match host.client.call(&request(&container, new)) {
                Err(grpcio::Error::RpcFailure(status)) => {
                    assert_eq!(status.code(), RpcStatusCode::FAILED_PRECONDITION, "{handler}: {status}");
                    assert!(status.message().contains("ended meanwhile"), "{handler}: {status}");
                }
                other => drop(other.unwrap_or_else(|e| panic!("{handler}: {e}"))),
            }
            let status = host.wait_exit(&container);
            assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{handler}: {status}");
            host.remove_all();
            continue;
        }
        let before = host.status(&container).resources;
        let (code, message) = host.refused(&request(&container, new));
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{handler}: {message}");
        assert!(message.contains("bytes in use"), "{handler}: {message}");
        assert_eq!(limits(&host, &container), first_limits(), "{handler}: it is all or nothing");
        assert_eq!(oom_score_adj(&host, &container), ["321"], "{handler}");
        assert_eq!(host.status(&container).resources, before);
        // The runtime has not kept the half of it either.
        update(&host, &container, LinuxContainerResources { cpu_quota: 26_000, ..Default::default() });
        let mut expected = first_limits();
        expected[1] = "26000";
        assert_eq!(limits(&host, &container), expected, "{handler}");
        host.remove_all();
    }
    host.finish();
}

/// Everything that a running container was given is taken back when its record cannot be written.
#[test]
fn an_update_whose_last_step_fails_is_taken_back() {
    let host = start_host();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("undo-{handler}"), &handler);
        let full = launch(&host, &sandbox, "full", &SLEEP);
        let bare = host.launch(&sandbox, "bare", &SLEEP);
        for container in [&full, &bare] {
            let before = limits(&host, container);
            let score = oom_score_adj(&host, container);
            let record = host.daemon.layout.path("root/containers").join(format!("{}.json", container.id));
            let aside = host.daemon.layout.path("aside.json");
            std::fs::rename(&record, &aside).expect("move the record");
            std::fs::create_dir(&record).expect("make a directory");
            std::fs::write(record.join("x"), "").expect("fill it");
            let new = LinuxContainerResources {
                cpu_shares: 300,
                cpu_quota: 30_000,
                cpu_period: 60_000,
                cpuset_cpus: "1".into(),
                memory_limit_in_bytes: 48 << 20,
                hugepage_limits: hugepages(2 << 20),
                oom_score_adj: 400,
                ..Default::default()
            };
            let (code, message) = host.refused(&request(container, new));
            assert_eq!(code, RpcStatusCode::INTERNAL, "{handler}: {message}");
            assert!(message.contains(&format!("{}.json", container.id)) && !message.contains("taken back"), "{handler}: {message}");
            assert_eq!(limits(&host, container), before, "{handler}");
            assert_eq!(oom_score_adj(&host, container), score, "{handler}");
            std::fs::remove_dir_all(&record).expect("remove the directory");
            std::fs::rename(&aside, &record).expect("bring the record back");
        }
        host.remove_all();
    }
    host.finish();
}

/// A daemon that dies in the middle of an update has made none, as far as its client knows.
#[test]
fn an_update_that_a_crash_cuts_short_is_taken_back() {
    let mut host = start_host();
    for (handler, step) in handlers().into_iter().cycle().zip(["update:1-intent", "update:2-applied", "update:3-spec", "update:4-recorded"])
    {
        host.daemon.stop(Signal::SIGTERM);
        host.daemon.options.environment = vec![("CRISP_CRASH_AT".into(), step.into())];
        host.daemon.run();
        host.daemon.wait_ready();
        let sandbox = host.sandbox(&format!("crash-{handler}"), &handler);
        let container = launch(&host, &sandbox, "main", &SLEEP);
        let new =
            LinuxContainerResources { memory_limit_in_bytes: 96 << 20, cpuset_cpus: "1".into(), oom_score_adj: 400, ..Default::default() };
        assert!(host.client.call(&request(&container, new)).is_err(), "{step}: it did not die");
        std::thread::sleep(Duration::from_millis(100));
        host.daemon.stop(Signal::SIGKILL);
        host.daemon.options.environment.clear();
        host.daemon.run();
        host.daemon.wait_ready();
        assert_eq!(limits(&host, &container), first_limits(), "{handler}: {step}");
        assert_eq!(oom_score_adj(&host, &container), ["321"], "{handler}: {step}");
        assert_eq!(host.status(&container).resources.linux.memory_limit_in_bytes, 64 << 20, "{handler}: {step}");
        update(&host, &container, LinuxContainerResources { cpu_shares: 2, ..Default::default() });
        let mut expected = first_limits();
        expected[0] = if v2() { "1" } else { "2" };
        assert_eq!(limits(&host, &container), expected, "{handler}: {step}");
        host.remove_all();
    }
    host.finish();
}

/// On v1 an exec has a cpuset of its own below the container's, which must not stand in the way.
#[test]
fn a_cpuset_changes_under_a_running_exec() {
    let host = start_host();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("exec-{handler}"), &handler);
        let container = launch(&host, &sandbox, "main", &SLEEP);
        update(&host, &container, LinuxContainerResources { cpuset_cpus: "0-1".into(), ..Default::default() });
        assert_eq!(host.exec(&container, &["sh", "-c", "sleep 1000000 & echo"]).0, 0);
        for cpus in ["0", "1", "0-1"] {
            update(&host, &container, LinuxContainerResources { cpuset_cpus: cpus.into(), ..Default::default() });
            assert_eq!(value(&cgroups(&host, &container), "cpuset.cpus"), cpus, "{handler}");
            let script = "grep -h Cpus_allowed_list /proc/[0-9]*/status | sort -u";
            let (_, text, _) = host.exec(&container, &["sh", "-c", script]);
            assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["Cpus_allowed_list:", cpus], "{handler}");
        }
        let (code, message) =
            host.refused(&request(&container, LinuxContainerResources { cpuset_cpus: "0-60000".into(), ..Default::default() }));
        assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{handler}: {message}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn updates_at_the_same_time_are_all_there() {
    let host = start_host();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("together-{handler}"), &handler);
        let container = launch(&host, &sandbox, "main", &SLEEP);
        let changes: [fn(&mut LinuxContainerResources); 5] = [
            |r| r.cpu_shares = 1024,
            |r| r.cpu_quota = 40_000,
            |r| r.memory_limit_in_bytes = 80 << 20,
            |r| r.cpuset_cpus = "1".into(),
            |r| r.hugepage_limits = hugepages(2 << 20),
        ];
        std::thread::scope(|scope| {
            for change in changes {
                let mut new = LinuxContainerResources::default();
                change(&mut new);
                let call = request(&container, new);
                let client = host.daemon.client();
                scope.spawn(move || client.call(&call).expect("update"));
            }
        });
        let expected = match v2() {
            true => vec!["39", "40000 50000", "1", "0", "83886080", "0", "2097152", "77"],
            false => vec!["1024", "40000", "50000", "1", "0", "83886080", "83886080", "2097152", "77"],
        };
        assert_eq!(limits(&host, &container), expected, "{handler}");
        host.remove_all();
    }
    host.finish();
}

/// A whole disk that this host has, as device and numbers.
fn disk() -> (String, String) {
    let names = std::fs::read_dir("/sys/block").expect("list disks").flatten().map(|entry| entry.file_name().into_string().expect("text"));
    let mut disks: Vec<String> = names.filter(|name| Path::new("/dev").join(name).exists()).collect();
    disks.sort_by_key(|name| (name.starts_with("zram"), name.clone()));
    let name = disks.first().expect("no disk here").clone();
    let numbers = std::fs::read_to_string(Path::new("/sys/block").join(&name).join("dev")).expect("read the numbers");
    (format!("/dev/{name}"), numbers.trim().to_owned())
}

#[test]
fn a_block_io_class_throttles() {
    let (device, numbers) = disk();
    let classes = tempfile::tempdir().expect("make a directory");
    let file = classes.path().join("classes.yaml");
    let text = format!("Classes:\n  slow:\n  - Devices: [{device}]\n    ThrottleReadBps: 1Mi\n    ThrottleWriteIOPS: 2k\n");
    std::fs::write(&file, text).expect("write the classes");
    let host = Host::start_with(|options| options.tables = format!("[resources]\nblockio_classes = \"{}\"\n", file.display()));
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("class-{handler}"), &handler);
        let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
            config.annotations.insert("io.kubernetes.cri.blockio-class".into(), "slow".into());
        });
        host.start_container(&container);
        // The class stays through updates.
        update(&host, &container, LinuxContainerResources { cpu_shares: 300, ..Default::default() });
        let dirs = cgroups(&host, &container);
        match v2() {
            true => {
                let text = value(&dirs, "io.max");
                assert!(text.starts_with(&format!("{numbers} rbps=1048576 wbps=max riops=max wiops=2000")), "{handler}: {text}");
            }
            false => {
                assert_eq!(value(&dirs, "blkio.throttle.read_bps_device"), format!("{numbers} 1048576"), "{handler}");
                assert_eq!(value(&dirs, "blkio.throttle.write_iops_device"), format!("{numbers} 2000"), "{handler}");
            }
        }
        host.remove_all();
    }
    host.finish();
}

/// Without a cgroup parent a sandbox has one of its own, which limits as well and goes with it.
#[test]
fn a_sandbox_without_a_parent() {
    let host = start_host();
    for handler in handlers() {
        let mut config = crate::objects::sandbox_config(&host.daemon.layout, "own", true);
        config.linux.mut_or_insert_default().cgroup_parent.clear();
        let sandbox = host.run(config, &handler);
        let container = launch(&host, &sandbox, "main", &SLEEP);
        update(&host, &container, LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() });
        let base = if v2() { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/memory" };
        let (own, name) = match systemd() {
            // A slice for all of them: systemd removes what is empty.
            true => ("crisp.slice".to_owned(), format!("crisp-{}.scope", container.id)),
            false => (format!("crisp-{}", sandbox.id), container.id.clone()),
        };
        let own = Path::new(base).join(own);
        let file = if v2() { "memory.max" } else { "memory.limit_in_bytes" };
        assert_eq!(value(&[own.join(&name)], file), (96 << 20).to_string(), "{handler}");
        host.remove_all();
        let gone = if systemd() { own.join(name) } else { own };
        let begin = std::time::Instant::now();
        while gone.exists() {
            assert!(begin.elapsed() < patience(Duration::from_secs(5)), "{} stays", gone.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    host.finish();
}
