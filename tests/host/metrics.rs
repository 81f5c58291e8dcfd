//! cAdvisor's metrics of running containers, and the Prometheus endpoint of the daemon itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crisp::api::runtime::{
    ContainerStatusRequest, ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest, Metric, MetricType, PodSandboxMetrics,
};
use crisp::cgroup::{Cgroup, Layout};

use crate::daemon::patience;
use crate::exposition::{self, Exposition};
use crate::harness::{handlers, http_get, Container, Host, Sandbox};
use crate::objects::sandbox_config;

const SLEEP: [&str; 2] = ["sleep", "1000000"];
const SOON: Duration = Duration::from_secs(20);
/// Labels that every metric has, in this order.
const BASE: [&str; 6] = ["id", "name", "image", "pod", "namespace", "container"];

fn listed(host: &Host) -> Vec<PodSandboxMetrics> {
    host.call(&ListPodSandboxMetricsRequest::default()).pod_metrics
}

/// The metrics of one container, and of its sandbox.
fn metrics_of(host: &Host, sandbox: &Sandbox, container: &Container) -> (Vec<Metric>, Vec<Metric>) {
    let of_sandbox = listed(host).into_iter().find(|m| m.pod_sandbox_id == sandbox.id).expect("the sandbox is listed");
    let own = of_sandbox.container_metrics.into_iter().find(|m| m.container_id == container.id).expect("the container is listed");
    (own.metrics, of_sandbox.metrics)
}

/// The only value with that name and those labels behind the base ones.
fn value(metrics: &[Metric], name: &str, own: &[&str]) -> u64 {
    let found: Vec<_> = metrics.iter().filter(|m| m.name == name && m.label_values[BASE.len()..] == *own).collect();
    assert_eq!(found.len(), 1, "{name} {own:?}");
    found[0].value.value
}

/// Waits until `check` says yes.
fn until(what: &str, mut check: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !check() {
        assert!(begin.elapsed() < patience(SOON), "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn every_descriptor_has_a_value_right_after_start() {
    let host = Host::start();
    let descriptors = host.call(&ListMetricDescriptorsRequest::default()).descriptors;
    let names: BTreeSet<_> = descriptors.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names.len(), descriptors.len(), "a descriptor is there twice");
    for name in ["container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_network_receive_bytes_total"] {
        assert!(names.contains(name), "{name}");
    }
    for handler in handlers() {
        let sandbox = host.sandbox("metered", &handler);
        let container = host.launch(&sandbox, "sleeper", &SLEEP);
        let first = metrics_of(&host, &sandbox, &container);
        let all = || first.0.iter().chain(&first.1);
        for descriptor in &descriptors {
            assert!(all().any(|m| m.name == descriptor.name), "{handler}: {} has no value", descriptor.name);
            assert_eq!(descriptor.label_keys[..BASE.len()], BASE, "{}", descriptor.name);
        }
        let mut seen = BTreeSet::new();
        for metric in all() {
            let descriptor = descriptors.iter().find(|d| d.name == metric.name).expect("only what is on the list");
            assert_eq!(descriptor.label_keys.len(), metric.label_values.len(), "{}", metric.name);
            assert!(metric.timestamp > 0 && metric.value.is_some(), "{}", metric.name);
            assert!(seen.insert((&metric.name, &metric.label_values)), "{} {:?} twice", metric.name, metric.label_values);
        }
        let image = host.status(&container).image.user_specified_image.clone();
        assert_eq!(first.0[0].label_values[..BASE.len()], [&container.id, "sleeper", &image, "metered", "test", "sleeper"]);
        assert_eq!(first.1[0].label_values[..BASE.len()], [&sandbox.id, "POD", "", "metered", "test", "POD"]);

        // What counts never goes back.
        host.exec(&container, &["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; wget -q -O /dev/null http://127.0.0.1:1/"]);
        let second = metrics_of(&host, &sandbox, &container);
        let then: BTreeMap<_, _> = all().map(|m| ((&m.name, &m.label_values), m)).collect();
        for metric in second.0.iter().chain(&second.1) {
            let Some(before) = then.get(&(&metric.name, &metric.label_values)) else { continue };
            if metric.metric_type.enum_value() == Ok(MetricType::COUNTER) {
                assert!(metric.value.value >= before.value.value, "{handler}: {} went back", metric.name);
            }
            assert!(metric.timestamp >= before.timestamp, "{}", metric.name);
        }
        assert_eq!(value(&second.0, "container_processes", &[]), 1);
        assert_eq!(value(&second.0, "container_threads", &[]), 1);
        assert_eq!(value(&second.0, "container_tasks_state", &["sleeping"]), 1);
        assert_eq!(value(&second.0, "container_spec_cpu_shares", &[]), 102);
        let started = host.status(&container).started_at as u64 / 1_000_000_000;
        assert_eq!(value(&second.0, "container_start_time_seconds", &[]), started);
        assert!(value(&second.0, "container_ulimits_soft", &["max_open_files"]) >= 256);

        // Only what runs has metrics.
        host.stop(&container, 0);
        let stopped = listed(&host).into_iter().find(|m| m.pod_sandbox_id == sandbox.id).expect("the sandbox is listed");
        assert!(stopped.container_metrics.is_empty());
        assert!(!stopped.metrics.is_empty());
        host.remove_all();
        assert!(listed(&host).is_empty());
    }
    // The list is the same whatever runs.
    assert_eq!(host.call(&ListMetricDescriptorsRequest::default()).descriptors, descriptors);
    host.finish();
}

#[test]
fn seconds_and_bytes_are_the_kernels() {
    let host = Host::start_with(|options| options.tables = "[stats]\ndisk_interval_seconds = 1\n".to_owned());
    for handler in handlers() {
        let sandbox = host.sandbox("busy", &handler);
        let container = host.launch(&sandbox, "burner", &["sh", "-c", "while :; do :; done"]);
        let path = format!("{}/{}", host.daemon.layout.cgroup_parent(), container.id);
        let cgroup = Cgroup::at(Layout::host().expect("cgroups"), &path).expect("the container's cgroup");
        let used = || crisp::cgroup::stat::Reader::open(cgroup.clone()).and_then(|r| r.sample()).and_then(|s| s.cpu).expect("cpu time");
        until("two seconds of work", || used() > 2_200_000_000);
        let before = used() / 1_000_000_000;
        let (metrics, _) = metrics_of(&host, &sandbox, &container);
        let after = used() / 1_000_000_000;
        let told = value(&metrics, "container_cpu_usage_seconds_total", &["total"]);
        assert!((before..=after).contains(&told), "{handler}: {before} <= {told} <= {after}");
        assert!(value(&metrics, "container_cpu_user_seconds_total", &[]) >= 1, "a shell that loops");

        // The writable layer, some time after it was written.
        let usage =
            |metrics: &[Metric]| metrics.iter().find(|m| m.name == "container_fs_usage_bytes").map(|m| (m.value.value, m.timestamp));
        let wrote = host.exec(&container, &["dd", "if=/dev/urandom", "of=/grown", "bs=65536", "count=64"]);
        assert_eq!(wrote.0, 0, "{wrote:?}");
        until("the usage of the layer", || {
            let (bytes, taken_at) = usage(&metrics_of(&host, &sandbox, &container).0).expect("a layer has a usage");
            assert!(taken_at <= crisp::store::now_ns());
            ((4 << 20)..(5 << 20)).contains(&bytes)
        });

        // A sandbox on the host's network has no interfaces of its own.
        let mut config = sandbox_config(&host.daemon.layout, "hostnet", true);
        config.metadata.mut_or_insert_default().attempt = 1;
        let on_host = host.run(config, &handler);
        let sleeper = host.launch(&on_host, "sleeper", &SLEEP);
        let (metrics, own) = metrics_of(&host, &on_host, &sleeper);
        assert!(own.is_empty() && !metrics.is_empty());
        host.remove_all();
    }
    host.finish();
}

#[test]
fn groups_can_be_left_out() {
    let host = Host::start_with(|options| options.tables = "[stats]\nmetrics = [\"memory\"]\n".to_owned());
    let sandbox = host.sandbox("lean", "");
    let container = host.launch(&sandbox, "sleeper", &SLEEP);
    let (metrics, own) = metrics_of(&host, &sandbox, &container);
    assert!(own.is_empty());
    let others: Vec<_> = metrics.iter().map(|m| m.name.as_str()).filter(|n| !n.starts_with("container_memory_")).collect();
    assert_eq!(others, ["container_last_seen", "container_start_time_seconds"]);
    assert_eq!(host.call(&ListMetricDescriptorsRequest::default()).descriptors.len(), 2 + 12);
    host.finish();
}

/// Threads of the daemon.
fn threads(host: &Host) -> Vec<String> {
    let list = std::fs::read_dir(format!("/proc/{}/task", host.daemon.pid())).expect("list the daemon's threads");
    list.flatten().filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok()).map(|name| name.trim().to_owned()).collect()
}

/// The port of the endpoint, as the log says it.
fn port(host: &Host) -> u16 {
    let log = std::fs::read_to_string(host.daemon.log_path()).expect("read the log");
    let line = log.lines().rfind(|line| line.contains("metrics are served on")).expect("the endpoint is in the log");
    let address = line.split("http://").nth(1).and_then(|rest| rest.strip_suffix("/metrics")).expect("an address");
    address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port")
}

fn scrape(port: u16) -> Exposition {
    exposition::parse(&http_get("127.0.0.1", port, "/metrics").expect("scrape")).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn prometheus_sees_what_happened() {
    let host = Host::start_with(|options| options.tables = "[metrics]\naddress = \"127.0.0.1:0\"\n".to_owned());
    let port = port(&host);
    for handler in handlers() {
        let before = scrape(port);
        let sandbox = host.sandbox("scraped", &handler);
        let container = host.launch(&sandbox, "sleeper", &SLEEP);
        host.refused(&ContainerStatusRequest { container_id: "nothing".into(), ..Default::default() });
        let after = scrape(port);
        let grown = |name: &str, labels: &[(&str, &str)]| after.get(name, labels).unwrap_or(0.0) - before.get(name, labels).unwrap_or(0.0);
        assert_eq!(grown("crisp_calls_total", &[("method", "RunPodSandbox"), ("code", "OK")]), 1.0);
        assert_eq!(grown("crisp_calls_total", &[("method", "ContainerStatus"), ("code", "NOT_FOUND")]), 1.0);
        assert_eq!(grown("crisp_call_duration_seconds_count", &[("method", "StartContainer")]), 1.0);
        assert!(grown("crisp_call_duration_seconds_sum", &[("method", "StartContainer")]) > 0.001);
        let added = [("plugin", "bridge"), ("command", "ADD"), ("result", "ok")];
        assert_eq!(grown("crisp_cni_duration_seconds_count", &added), 1.0);
        assert_eq!(grown("crisp_shim_starts_total", &[("result", "ok")]), 1.0);
        let now = |name: &str, labels: &[(&str, &str)]| after.get(name, labels).unwrap_or_else(|| panic!("{name} {labels:?}"));
        assert_eq!((now("crisp_containers", &[("state", "running")]), now("crisp_sandboxes", &[("state", "ready")])), (1.0, 1.0));
        assert_eq!((now("crisp_shims", &[]), now("crisp_lane_queued_calls", &[("lane", "slow")])), (1.0, 0.0));
        let pages = std::fs::read_to_string(format!("/proc/{}/statm", host.daemon.pid())).expect("read statm");
        let resident: f64 = pages.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("pages");
        let told = now("crisp_process_resident_memory_bytes", &[]);
        assert!((told / (resident * 4096.0) - 1.0).abs() < 0.25, "{told} {resident}");
        assert!(now("crisp_process_threads", &[]) >= 5.0 && now("crisp_process_open_fds", &[]) >= 5.0);
        for family in after.families.keys() {
            assert!(family.starts_with("crisp_"), "{family}");
        }
        host.stop(&container, 0);
        host.remove_all();
        let end = scrape(port);
        assert_eq!(end.get("crisp_containers", &[("state", "running")]), Some(0.0));
        assert_eq!(end.get("crisp_shims", &[]), Some(0.0));
    }
    // Whoever connects and says nothing keeps neither scrapes nor the stop waiting.
    let mut silent: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(("127.0.0.1", port)).expect("connect")).collect();
    scrape(port);
    let begin = Instant::now();
    host.finish();
    assert!(begin.elapsed() < patience(Duration::from_secs(15)));
    let mut rest = Vec::new();
    for stream in &mut silent {
        stream.set_read_timeout(Some(patience(SOON))).expect("set a timeout");
        let _ = stream.read_to_end(&mut rest);
    }
    assert!(rest.is_empty());
}

#[test]
fn nothing_is_served_unless_asked_for() {
    let host = Host::start();
    assert!(!threads(&host).iter().any(|name| name == "metrics"));
    assert!(!std::fs::read_to_string(host.daemon.log_path()).expect("read the log").contains("metrics are served"));
    // And the walker is there, as the lowest of all.
    let walker = threads(&host).iter().filter(|name| *name == "disk-walk").count();
    assert_eq!(walker, 1);
    host.finish();
}
