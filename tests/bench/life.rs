//! One sandbox with one container from Run to Remove, each call timed.

use std::time::Duration;

use crisp::api::runtime::{
    RemoveContainerRequest, RemovePodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};

use crate::client::{Call, Client};
use crate::daemon::Layout;
use crate::objects::{container_config, create_request, exec_request, run_request, sandbox_config};
use crate::samples::{timed, Samples};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Network {
    Host,
    Bridge,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    Hot,
    Idle,
}

impl Network {
    pub fn name(self) -> &'static str {
        match self {
            Network::Host => "host network",
            Network::Bridge => "CNI (bridge, portmap, tuning)",
        }
    }
}

impl Pace {
    pub fn name(self) -> &'static str {
        match self {
            Pace::Hot => "back to back",
            Pace::Idle => "200 ms pauses",
        }
    }
}

/// The calls in their order, then sums of some.
pub const STEPS: [&str; 10] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "ExecSync true",
    "StopContainer(0)",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
    "pod up (run+create+start)",
    "pod down (the last four)",
];

/// Samples per step.
pub type Life = [Samples; STEPS.len()];

pub fn add(life: &mut Life, times: [Duration; STEPS.len()]) {
    life.iter_mut().zip(times).for_each(|(samples, time)| samples.add(time));
}

pub fn call<Q: Call>(client: &Client, request: &Q) -> Q::Response {
    client.call(request).unwrap_or_else(|e| panic!("{}: {e}", Q::NAME))
}

pub fn round(client: &Client, layout: &Layout, handler: &str, network: Network, number: usize) -> [Duration; STEPS.len()] {
    let config = sandbox_config(layout, &format!("life{number}"), network == Network::Host);
    std::fs::create_dir_all(&config.log_directory).expect("make the log directory");
    let container = container_config(&config, "main", &["sleep", "1000000"]);

    let (answer, run) = timed(|| call(client, &run_request(&config, handler)));
    let sandbox = answer.pod_sandbox_id;
    let (answer, create) = timed(|| call(client, &create_request(&sandbox, &config, &container)));
    let container_id = answer.container_id;
    let (_, start) = timed(|| call(client, &StartContainerRequest { container_id: container_id.clone(), ..Default::default() }));
    let (answer, exec) = timed(|| call(client, &exec_request(&container_id, &["true"], 10)));
    assert_eq!(answer.exit_code, 0, "exec of true");
    let (_, stop) = timed(|| call(client, &StopContainerRequest { container_id: container_id.clone(), ..Default::default() }));
    let (_, remove) = timed(|| call(client, &RemoveContainerRequest { container_id, ..Default::default() }));
    let pod_sandbox_id = sandbox;
    let (_, stop_sandbox) = timed(|| call(client, &StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone(), ..Default::default() }));
    let (_, remove_sandbox) = timed(|| call(client, &RemovePodSandboxRequest { pod_sandbox_id, ..Default::default() }));
    let (up, down) = (run + create + start, stop + remove + stop_sandbox + remove_sandbox);
    [run, create, start, exec, stop, remove, stop_sandbox, remove_sandbox, up, down]
}
