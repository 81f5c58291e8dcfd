//! One sandbox with one container from Run to Remove, each call timed.

use std::time::Duration;

use super::process::Meter;
use super::samples::{timed, Samples};
use super::workload::Workload;
use crate::api::runtime::{
    ExecSyncRequest, RemoveContainerRequest, RemovePodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use crate::cli::client::{Client, LONG};
use crate::cli::failure::{During, Failure, Outcome};

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
/// Those that are calls.
const CALLS: usize = 8;
/// Those that make a pod, and those that take it away.
const UP: std::ops::Range<usize> = 0..3;
const DOWN: std::ops::Range<usize> = 4..8;

/// As [`STEPS`].
pub type Times = [Duration; STEPS.len()];

/// Samples per step.
#[derive(Clone, Debug, Default)]
pub struct Life {
    pub times: [Samples; STEPS.len()],
    /// CPU time of the server and its helpers, all rounds together; zeros without a meter.
    pub cpu: Times,
    pub rounds: u32,
}

impl Life {
    pub fn add(&mut self, (times, cpu): (Times, Times)) {
        self.times.iter_mut().zip(times).for_each(|(samples, time)| samples.add(time));
        self.cpu.iter_mut().zip(cpu).for_each(|(sum, cpu)| *sum += cpu);
        self.rounds += 1;
    }
}

/// Takes the times of the calls of one round.
struct Clock<'a> {
    times: Times,
    cpu: Times,
    at: usize,
    meter: Option<&'a mut Meter>,
}

impl Clock<'_> {
    fn call<T>(&mut self, call: impl FnOnce() -> Result<T, crate::cli::failure::CallError>) -> Outcome<T> {
        if let Some(meter) = &mut self.meter {
            meter.take();
        }
        let (answer, time) = timed(call);
        if let Some(meter) = &mut self.meter {
            self.cpu[self.at] = meter.take();
        }
        self.times[self.at] = time;
        self.at += 1;
        answer.during(|| STEPS[self.at - 1])
    }
}

/// One round: time and CPU time of each step. `ExecSync` of an image without `true` is an error.
pub fn round(workload: &Workload, client: &Client, number: usize, meter: Option<&mut Meter>) -> Outcome<(Times, Times)> {
    let runtime = client.runtime();
    let config = workload.sandbox(&format!("life{number}"))?;
    let mut clock = Clock { times: Times::default(), cpu: Times::default(), at: 0, meter };
    let pod_sandbox_id = clock.call(|| runtime.run_pod_sandbox(&workload.run_request(&config), LONG))?.pod_sandbox_id;
    let request = workload.container(&pod_sandbox_id, &config);
    let container_id = clock.call(|| runtime.create_container(&request, LONG))?.container_id;
    let request = StartContainerRequest { container_id: container_id.clone(), ..Default::default() };
    clock.call(|| runtime.start_container(&request, LONG))?;
    let cmd = vec!["true".to_owned()];
    let request = ExecSyncRequest { container_id: container_id.clone(), cmd, timeout: 10, ..Default::default() };
    let answer = clock.call(|| runtime.exec_sync(&request, LONG))?;
    if answer.exit_code != 0 {
        return Err(Failure::failed(format!("exec of true in {container_id}: exit code {}", answer.exit_code)));
    }
    let request = StopContainerRequest { container_id: container_id.clone(), ..Default::default() };
    clock.call(|| runtime.stop_container(&request, LONG))?;
    let request = RemoveContainerRequest { container_id, ..Default::default() };
    clock.call(|| runtime.remove_container(&request, LONG))?;
    let request = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone(), ..Default::default() };
    clock.call(|| runtime.stop_pod_sandbox(&request, LONG))?;
    let request = RemovePodSandboxRequest { pod_sandbox_id, ..Default::default() };
    clock.call(|| runtime.remove_pod_sandbox(&request, LONG))?;
    let Clock { mut times, mut cpu, .. } = clock;
    for table in [&mut times, &mut cpu] {
        table[CALLS] = table[UP].iter().sum();
        table[CALLS + 1] = table[DOWN].iter().sum();
    }
    Ok((times, cpu))
}
