//! Stats: who is in a list, what is asked for by id, cgroups that are not there. The fake runtime uses one hierarchy; the
//! directories of the others are made and removed here.

use std::path::PathBuf;
use std::time::Duration;

use crisp::api::runtime::*;
use crisp::cgroup::{Cgroup, Layout, Mode};
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;

use crate::node::{eventually, refused, Answer, Node};

const FOREVER: &str = "while :; do sleep 1000; done";

/// The container's cgroup in the hierarchies that stats come from.
pub struct Dirs(Vec<PathBuf>);

impl Dirs {
    pub fn make(sandbox: &str, container: &str) -> Dirs {
        let layout = Layout::host().expect("this host has cgroups");
        let cgroup = Cgroup::at(layout, &format!("/crisp-{sandbox}/{container}")).expect("a path");
        let dirs = ["cpuacct", "memory"].map(|c| cgroup.dir(c).expect("a hierarchy").to_owned());
        dirs.iter().for_each(|dir| std::fs::create_dir_all(dir).expect("make a cgroup"));
        Dirs(dirs.to_vec())
    }
}

impl Drop for Dirs {
    fn drop(&mut self) {
        for dir in &self.0 {
            let _ = std::fs::remove_dir(dir);
            let _ = dir.parent().map(std::fs::remove_dir);
        }
    }
}

/// Whether those directories can be removed: with v2 alone the container's processes are in them.
fn removable() -> bool {
    Layout::host().expect("this host has cgroups").mode != Mode::V2
}

fn list(node: &Node, filter: Option<ContainerStatsFilter>) -> Vec<String> {
    let request = ListContainerStatsRequest { filter: filter.into(), ..Default::default() };
    let stats = node.runtime().list_container_stats(&request, SHORT).expect("list").stats;
    stats.into_iter().map(|s| s.attributes.id.clone()).collect()
}

fn stats(node: &Node, id: &str) -> Answer<ContainerStats> {
    let request = ContainerStatsRequest { container_id: id.into(), ..Default::default() };
    node.runtime().container_stats(&request, SHORT).map(|answer| answer.stats.unwrap_or_default())
}

fn sandbox_stats(node: &Node, id: &str) -> Answer<PodSandboxStats> {
    let request = PodSandboxStatsRequest { pod_sandbox_id: id.into(), ..Default::default() };
    node.runtime().pod_sandbox_stats(&request, SHORT).map(|answer| answer.stats.unwrap_or_default())
}

#[test]
fn by_id() {
    let node = Node::start();
    refused(stats(&node, "nothing"), Code::NOT_FOUND, "nothing");
    refused(stats(&node, ""), Code::INVALID_ARGUMENT, "empty");
    refused(sandbox_stats(&node, "nothing"), Code::NOT_FOUND, "nothing");
    let sandbox = node.sandbox("a");
    let mut config = node.container_config("main", FOREVER);
    config.labels.insert("app".into(), "x".into());
    let container = node.create(&sandbox, &config).expect("create");
    // Neither runs nor ran: its attributes alone, no zeros that look like numbers.
    let created = stats(&node, &container[..20]).expect("stats");
    assert_eq!((created.attributes.id.as_str(), created.attributes.metadata.name.as_str()), (container.as_str(), "main"));
    assert_eq!(created.attributes.labels["app"], "x");
    assert!(created.cpu.is_none() && created.memory.is_none());
    node.start_container(&container).expect("start");
    let dirs = Dirs::make(&sandbox, &container);
    let running = stats(&node, &container).expect("stats");
    assert!(running.cpu.usage_core_nano_seconds.is_some() && running.memory.working_set_bytes.is_some());
    // From two samples: not before there are two that are 100 ms apart.
    assert!(running.cpu.usage_nano_cores.is_none());
    let rate = eventually("a rate", || stats(&node, &container).expect("stats").cpu.usage_nano_cores.as_ref().map(|v| v.value));
    assert_eq!(rate, 0);
    drop(dirs);
    assert_eq!(stats(&node, &container).expect("stats").cpu.is_none(), removable());
    node.stop(&container, 0).expect("stop");
    assert!(stats(&node, &container).expect("stats").memory.is_none());
}

#[test]
fn lists_have_what_runs_in_the_order_of_list_containers() {
    let node = Node::start();
    let (a, b) = (node.sandbox("a"), node.sandbox("b"));
    let ids: Vec<String> = (0..6).map(|n| node.launch(if n % 2 == 0 { &a } else { &b }, &format!("c{n}"), FOREVER)).collect();
    let of = |n: usize| if n % 2 == 0 { &a } else { &b };
    let mut dirs: Vec<Dirs> = ids.iter().enumerate().map(|(n, id)| Dirs::make(of(n), id)).collect();
    node.create(&a, &node.container_config("idle", FOREVER)).expect("create");
    let running: Vec<String> = node.container_ids().into_iter().filter(|id| ids.contains(id)).collect();
    assert_eq!(list(&node, None), running);
    assert_eq!(list(&node, Some(ContainerStatsFilter::default())), running);
    let by = |id: &str, sandbox: &str| Some(ContainerStatsFilter { id: id.into(), pod_sandbox_id: sandbox.into(), ..Default::default() });
    assert_eq!(list(&node, by(&ids[0], "")), [ids[0].clone()]);
    assert_eq!(list(&node, by(&ids[0][..30], &a[..30])), [ids[0].clone()]);
    assert_eq!(list(&node, by(&ids[0], &b)), [""; 0]);
    assert_eq!(list(&node, by("nothing", "")), [""; 0]);
    assert_eq!(list(&node, by("", "nothing")), [""; 0]);
    assert_eq!(list(&node, by("", &b)).len(), 3);
    let labelled = ContainerStatsFilter { label_selector: [("no".to_owned(), "such".to_owned())].into(), ..Default::default() };
    assert_eq!(list(&node, Some(labelled)), [""; 0]);
    // Running by its record, but its cgroup is gone: left out, and the others are there.
    dirs.remove(2);
    let left = |id: &&String| !removable() || **id != ids[2];
    assert_eq!(list(&node, None), running.iter().filter(left).cloned().collect::<Vec<_>>());
    node.stop(&ids[3], 0).expect("stop");
    assert_eq!(list(&node, None).len(), if removable() { 4 } else { 5 });
}

#[test]
fn sandboxes() {
    let node = Node::start();
    let (a, b) = (node.sandbox("a"), node.sandbox("b"));
    let main = node.launch(&a, "main", FOREVER);
    let dirs = Dirs::make(&a, &main);
    let list = |filter: Option<PodSandboxStatsFilter>| -> Vec<String> {
        let request = ListPodSandboxStatsRequest { filter: filter.into(), ..Default::default() };
        let stats = node.runtime().list_pod_sandbox_stats(&request, SHORT).expect("list").stats;
        stats.into_iter().map(|s| s.attributes.id.clone()).collect()
    };
    assert_eq!(list(None), node.sandbox_ids());
    let by = |id: &str, labels: &[(&str, &str)]| {
        let label_selector = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Some(PodSandboxStatsFilter { id: id.into(), label_selector, ..Default::default() })
    };
    assert_eq!(list(by(&a[..20], &[])), [a.clone()]);
    assert_eq!(list(by("nothing", &[])), [""; 0]);
    assert_eq!(list(by("", &[("no", "such")])), [""; 0]);

    let stats = sandbox_stats(&node, &a).expect("stats");
    assert_eq!((stats.attributes.metadata.name.as_str(), stats.linux.containers.len()), ("a", 1));
    assert_eq!(stats.linux.containers[0].attributes.id, main);
    assert!(stats.linux.cpu.usage_core_nano_seconds.is_some() && stats.linux.memory.usage_bytes.is_some());
    // The plugins are fakes: there is loopback alone, which is no interface of a pod.
    assert!(stats.linux.is_some() && stats.linux.network.is_none(), "no interface: {stats}");
    // Without containers nothing is used.
    let empty = sandbox_stats(&node, &b).expect("stats");
    assert_eq!((empty.linux.process.process_count.value, empty.linux.containers.len()), (0, 0));
    drop(dirs);
    node.stop_sandbox(&a).expect("stop");
    assert_eq!(list(None), [b]);
    let stopped = sandbox_stats(&node, &a).expect("stats");
    assert!(stopped.linux.is_none() && stopped.attributes.id == a);
}

#[test]
fn many_callers_at_once_get_rates_that_make_sense() {
    let node = Node::start();
    let sandbox = node.sandbox("a");
    let id = node.launch(&sandbox, "main", FOREVER);
    let _dirs = Dirs::make(&sandbox, &id);
    let end = std::time::Instant::now() + Duration::from_millis(400);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while std::time::Instant::now() < end {
                    let stats = stats(&node, &id).expect("stats");
                    // Nothing is in that cgroup: any rate but 0 is rubbish.
                    assert_eq!(stats.cpu.usage_nano_cores.as_ref().map_or(0, |v| v.value), 0);
                }
            });
        }
    });
    eventually("a rate", || stats(&node, &id).expect("stats").cpu.usage_nano_cores.as_ref().map(drop));
}

#[test]
fn nothing_is_left_of_a_stopped_sandbox() {
    let node = Node::start();
    let sandbox = node.sandbox("a");
    let id = node.launch(&sandbox, "main", FOREVER);
    let dirs = Dirs::make(&sandbox, &id);
    let open = || {
        let links = std::fs::read_dir("/proc/self/fd").expect("list descriptors").flatten();
        let of_container = |path: PathBuf| path.starts_with("/sys/fs/cgroup") && path.to_string_lossy().contains(&id);
        links.filter(|e| std::fs::read_link(e.path()).is_ok_and(of_container)).count()
    };
    assert!(stats(&node, &id).expect("stats").cpu.is_some());
    assert!(open() > 0);
    drop(dirs);
    node.stop_sandbox(&sandbox).expect("stop");
    assert!(sandbox_stats(&node, &sandbox).expect("stats").linux.is_none());
    eventually("all files closed", || (open() == 0).then_some(()));
}
