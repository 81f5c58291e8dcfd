//! Many sandboxes at once: time up and down with four clients, memory at some counts, lists when all are there.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crisp::api::runtime::{
    ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest, RemovePodSandboxRequest, StartContainerRequest,
    StopPodSandboxRequest, VersionRequest,
};

use crate::client::Client;
use crate::daemon::{Daemon, Layout};
use crate::life::call;
use crate::memory::{self, Memory};
use crate::objects::{container_config, create_request, run_request, sandbox_config};
use crate::samples::{timed, Samples};

const CLIENTS: usize = 4;
const FEW: usize = 10;
const LISTS: usize = 200;
pub const QUERIES: [&str; 4] = ["ListContainers", "ListPodSandbox", "ContainerStatus", "Version"];

pub struct Density {
    pub pods: usize,
    pub up: Duration,
    pub down: Duration,
    /// At 0, [`FEW`] and `pods` sandboxes of one container.
    pub memory: [(usize, Memory); 3],
    /// As [`QUERIES`], with all sandboxes there.
    pub queries: [Samples; 4],
}

struct Pair {
    sandbox: String,
    container: String,
}

pub fn measure(daemon: &Daemon, handler: &str, pods: usize, progress: fn(&str)) -> Density {
    let settle = || std::thread::sleep(Duration::from_secs(1));
    let client = daemon.client();
    settle();
    let empty = memory::measure(daemon);
    progress(&format!("{FEW} pods"));
    let (few, _) = up(daemon, handler, FEW, 0);
    settle();
    let with_few = memory::measure(daemon);
    down(daemon, few);
    progress(&format!("{pods} pods by {CLIENTS} clients"));
    let (all, up_time) = up(daemon, handler, pods, FEW);
    settle();
    let with_all = memory::measure(daemon);
    let mut queries: [Samples; 4] = Default::default();
    let id = all[0].container.clone();
    for _ in 0..LISTS {
        let (answer, time) = timed(|| call(&client, &ListContainersRequest::default()));
        assert_eq!(answer.containers.len(), pods);
        queries[0].add(time);
        queries[1].add(timed(|| call(&client, &ListPodSandboxRequest::default())).1);
        queries[2].add(timed(|| call(&client, &ContainerStatusRequest { container_id: id.clone(), ..Default::default() })).1);
        queries[3].add(timed(|| call(&client, &VersionRequest::default())).1);
    }
    progress("and down again");
    let down_time = down(daemon, all);
    Density { pods, up: up_time, down: down_time, memory: [(0, empty), (FEW, with_few), (pods, with_all)], queries }
}

/// Hands numbers below `count` to [`CLIENTS`] threads with a channel each; what they made, and the time for all.
fn spread<T: Send>(daemon: &Daemon, count: usize, work: impl Fn(&Client, usize) -> T + Sync) -> (Vec<T>, Duration) {
    let next = AtomicUsize::new(0);
    let clients: Vec<_> = (0..CLIENTS).map(|_| daemon.client()).collect();
    // Connected before the clock starts.
    clients.iter().for_each(|client| drop(call(client, &VersionRequest::default())));
    let begin = Instant::now();
    let made = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter()
            .map(|client| {
                scope.spawn(|| {
                    let mut made = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            return made;
                        }
                        made.push(work(client, number));
                    }
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a client failed")).collect()
    });
    (made, begin.elapsed())
}

fn up(daemon: &Daemon, handler: &str, count: usize, first: usize) -> (Vec<Pair>, Duration) {
    spread(daemon, count, |client, number| one_up(client, &daemon.layout, handler, first + number))
}

fn one_up(client: &Client, layout: &Layout, handler: &str, number: usize) -> Pair {
    let config = sandbox_config(layout, &format!("dense{number}"), false);
    std::fs::create_dir_all(&config.log_directory).expect("make the log directory");
    let sandbox = call(client, &run_request(&config, handler)).pod_sandbox_id;
    let request = create_request(&sandbox, &config, &container_config(&config, "main", &["sleep", "1000000"]));
    let container = call(client, &request).container_id;
    call(client, &StartContainerRequest { container_id: container.clone(), ..Default::default() });
    Pair { sandbox, container }
}

/// As kubelet does it: StopPodSandbox stops the containers, RemovePodSandbox removes them.
fn down(daemon: &Daemon, pairs: Vec<Pair>) -> Duration {
    let remove = |client: &Client, number: usize| {
        let pod_sandbox_id = pairs[number].sandbox.clone();
        call(client, &StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone(), ..Default::default() });
        call(client, &RemovePodSandboxRequest { pod_sandbox_id, ..Default::default() });
    };
    spread(daemon, pairs.len(), remove).1
}
