//! Many sandboxes at once, up and down again. With as many callers as sandboxes and the time until a list shows all
//! containers running, this is the published method of the peers, who start one client per pair in the background.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::samples::Samples;
use super::workload::{Pair, Workload, LABEL};
use crate::api::runtime::{ContainerState, ListContainersRequest, VersionRequest};
use crate::cli::client::{Client, SHORT};
use crate::cli::failure::{During, Failure, Outcome};
use crate::sys::cancel::Cancel;

/// Most connections; callers beyond share them, which costs nothing: gRPC multiplexes.
const CONNECTIONS: usize = 16;
/// How long containers may take to run once every start has been answered.
const PATIENCE: Duration = Duration::from_secs(60);

/// Pods that came up.
#[derive(Debug, Default)]
pub struct Up {
    pub pairs: Vec<Pair>,
    /// From the first call until a list showed all of them running.
    pub time: Duration,
    pub run: Samples,
    pub create: Samples,
    pub start: Samples,
    /// The three together.
    pub pod: Samples,
}

/// Pods that went.
#[derive(Debug, Default)]
pub struct Down {
    pub time: Duration,
    pub stop: Samples,
    pub remove: Samples,
}

/// Hands numbers below `count` to `callers` threads; what they made, and the time for all. The first error ends it.
pub fn spread<T: Send + 'static>(
    workload: &Workload,
    callers: usize,
    count: usize,
    cancel: &Cancel,
    work: impl Fn(&Client, usize) -> Outcome<T> + Send + Sync + 'static,
) -> Outcome<(Vec<T>, Duration)> {
    let clients = (0..callers.min(CONNECTIONS)).map(|_| workload.client()).collect::<Outcome<Vec<_>>>()?;
    // Connected before the clock starts.
    for client in &clients {
        client.runtime().version(&VersionRequest::default(), SHORT).during(|| "read version")?;
    }
    let (next, work) = (Arc::new(AtomicUsize::new(0)), Arc::new(work));
    let begin = Instant::now();
    let mut threads = Vec::new();
    for number in 0..callers {
        let (client, next, work, cancel) = (clients[number % clients.len()].clone(), next.clone(), work.clone(), cancel.clone());
        threads.push(crate::sys::thread::spawn("caller", move || {
            let mut made = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count || cancel.is_cancelled() {
                    return Ok(made);
                }
                match work(&client, number) {
                    Ok(one) => made.push(one),
                    Err(failure) => {
                        next.store(count, Ordering::Relaxed);
                        return Err(failure);
                    }
                }
            }
        })?);
    }
    let mut made = Vec::new();
    let mut failed = None;
    for thread in threads {
        match thread.join() {
            Ok(Ok(more)) => made.extend(more),
            Ok(Err(failure)) => failed = failed.or(Some(failure)),
            Err(_) => failed = failed.or_else(|| Some(Failure::failed("a caller panicked"))),
        }
    }
    let time = begin.elapsed();
    cancel.check()?;
    failed.map_or(Ok((made, time)), Err)
}

/// Runs `count` pods called `NAME` and a number by `callers`.
pub fn up(workload: &Workload, name: &str, count: usize, callers: usize, cancel: &Cancel) -> Outcome<Up> {
    let begin = Instant::now();
    let (own, name) = (workload.clone(), name.to_owned());
    let (made, _) = spread(workload, callers, count, cancel, move |client, number| own.up(client, &format!("{name}{number}")))?;
    let mut up = Up::default();
    for (pair, times) in made {
        up.pairs.push(pair);
        up.run.add(times.run);
        up.create.add(times.create);
        up.start.add(times.start);
        up.pod.add(times.run + times.create + times.start);
    }
    let client = workload.client()?;
    let answered = Instant::now();
    while running(workload, &client)? < count {
        if answered.elapsed() > PATIENCE {
            return Err(Failure::failed(format!("not all of {count} containers run {} s after their start", PATIENCE.as_secs())));
        }
        cancel.sleep(Duration::from_millis(20))?;
    }
    up.time = begin.elapsed();
    Ok(up)
}

/// Containers of this run that run.
fn running(workload: &Workload, client: &Client) -> Outcome<usize> {
    let mut request = ListContainersRequest::new();
    let filter = request.filter.mut_or_insert_default();
    filter.state.mut_or_insert_default().state = ContainerState::CONTAINER_RUNNING.into();
    filter.label_selector.insert(LABEL.to_owned(), workload.token.clone());
    Ok(client.runtime().list_containers(&request, SHORT).during(|| "list containers")?.containers.len())
}

/// As kubelet does it: StopPodSandbox stops the containers, RemovePodSandbox removes them.
pub fn down(workload: &Workload, pairs: Vec<Pair>, callers: usize, cancel: &Cancel) -> Outcome<Down> {
    let (own, count) = (workload.clone(), pairs.len());
    let (times, time) = spread(workload, callers, count, cancel, move |client, number| own.down(client, &pairs[number].sandbox))?;
    let mut down = Down { time, ..Down::default() };
    for (stop, remove) in times {
        down.stop.add(stop);
        down.remove.add(remove);
    }
    Ok(down)
}
