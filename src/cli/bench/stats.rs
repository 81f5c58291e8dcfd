//! What a stats call costs: its time at the client, the server's CPU time, how callers scale, what stays behind in memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::process::Server;
use super::samples::{timed, Samples};
use super::workload::{known, Workload};
use crate::api::runtime::{ListContainerStatsRequest, ListPodSandboxMetricsRequest, ListPodSandboxStatsRequest};
use crate::cli::client::{Client, LONG};
use crate::cli::failure::{CallError, During, Failure, Outcome};
use crate::sys::cancel::Cancel;

/// A call that reads statistics of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    ContainerStats,
    SandboxStats,
    SandboxMetrics,
}

/// All of them.
pub const QUERIES: [Query; 3] = [Query::ContainerStats, Query::SandboxStats, Query::SandboxMetrics];

impl Query {
    pub fn name(self) -> &'static str {
        match self {
            Query::ContainerStats => "ListContainerStats",
            Query::SandboxStats => "ListPodSandboxStats",
            Query::SandboxMetrics => "ListPodSandboxMetrics",
        }
    }

    /// Asks once; the number of items.
    pub fn ask(self, client: &Client) -> Result<usize, CallError> {
        let runtime = client.runtime();
        Ok(match self {
            Query::ContainerStats => runtime.list_container_stats(&ListContainerStatsRequest::new(), LONG)?.stats.len(),
            Query::SandboxStats => runtime.list_pod_sandbox_stats(&ListPodSandboxStatsRequest::new(), LONG)?.stats.len(),
            Query::SandboxMetrics => runtime.list_pod_sandbox_metrics(&ListPodSandboxMetricsRequest::new(), LONG)?.pod_metrics.len(),
        })
    }
}

/// How long one thing is measured: until `calls` or, after a few, until `time` is over.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub calls: usize,
    pub time: Duration,
}

/// Fewest calls whatever they take.
const FEW: usize = 3;

impl Effort {
    fn is_enough(&self, calls: usize, begin: Instant) -> bool {
        calls >= self.calls || (calls >= FEW && begin.elapsed() >= self.time)
    }
}

/// Calls one after another.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    pub times: Samples,
    /// CPU time of server and helpers per call.
    pub cpu: Duration,
    /// Items of the last answer.
    pub items: usize,
}

/// Asks again and again; None if the server does not know the call. The first, which fills caches, does not count.
pub fn cost(query: Query, client: &Client, server: &Server, effort: Effort, cancel: &Cancel) -> Outcome<Option<Cost>> {
    if known(query.ask(client)).during(|| query.name())?.is_none() {
        return Ok(None);
    }
    let mut cost = Cost::default();
    let mut meter = server.meter();
    let begin = Instant::now();
    while !effort.is_enough(cost.times.count(), begin) {
        cancel.check()?;
        let (answer, time) = timed(|| query.ask(client));
        cost.items = answer.during(|| query.name())?;
        cost.times.add(time);
    }
    cost.cpu = meter.take() / u32::try_from(cost.times.count()).unwrap_or(u32::MAX).max(1);
    Ok(Some(cost))
}

/// Calls per second of `callers` with a connection each, all at once for `time`.
pub fn rate(query: Query, workload: &Workload, callers: usize, time: Duration, cancel: &Cancel) -> Outcome<f64> {
    let clients = (0..callers).map(|_| workload.client()).collect::<Outcome<Vec<_>>>()?;
    for client in &clients {
        query.ask(client).during(|| query.name())?;
    }
    let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let begin = Instant::now();
    let mut threads = Vec::new();
    for client in clients {
        let (done, stop) = (done.clone(), stop.clone());
        threads.push(crate::sys::thread::spawn("caller", move || -> Result<(), CallError> {
            while !stop.load(Ordering::Relaxed) {
                query.ask(&client)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?);
    }
    let slept = cancel.sleep(time);
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| Failure::failed("a caller panicked"))?.during(|| query.name())?;
    }
    slept?;
    // With the calls that were under way at the end, and the time they took.
    Ok(done.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64())
}

/// Growth of the server's resident memory over many calls.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    pub calls: usize,
    /// KiB; negative if memory was given back.
    pub rss: i64,
}

/// Measures [`Growth`]; the first tenth of the calls is not counted: allocators grow to their working size.
pub fn growth(query: Query, client: &Client, server: &Server, effort: Effort, cancel: &Cancel) -> Outcome<Growth> {
    let ask = |effort: Effort| -> Outcome<usize> {
        let (begin, mut calls) = (Instant::now(), 0);
        while !effort.is_enough(calls, begin) {
            cancel.check()?;
            query.ask(client).during(|| query.name())?;
            calls += 1;
        }
        Ok(calls)
    };
    ask(Effort { calls: effort.calls / 10, time: effort.time / 10 })?;
    let before = server.rss();
    let calls = ask(effort)?;
    Ok(Growth { calls, rss: server.rss() as i64 - before as i64 })
}
