//! Clients that go away, deadlines, and calls that wait by the hundred.

use std::time::{Duration, Instant};

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;

use crate::node::{alive, eventually, exec_request, refused, Node, Options};
use crate::raw::{Pending, Raw};
use crate::registry::Registry;

const EXEC: &str = "/runtime.v1.RuntimeService/ExecSync";
const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
const PULL: &str = "/runtime.v1.ImageService/PullImage";

/// A container that does not listen to TERM.
fn stubborn(node: &Node, sandbox: &str) -> String {
    node.launch_with_traps(sandbox, "stubborn", "trap '' TERM")
}

fn stop_request(id: &str, timeout: i64) -> StopContainerRequest {
    StopContainerRequest { container_id: id.into(), timeout, ..Default::default() }
}

fn pull_request(image: &str) -> PullImageRequest {
    PullImageRequest { image: MessageField::some(ImageSpec { image: image.into(), ..Default::default() }), ..Default::default() }
}

/// The pid that a command wrote into a file of the node.
fn written_pid(node: &Node, name: &str) -> i32 {
    eventually("a pid is written", || std::fs::read_to_string(node.path(name)).ok()?.trim().parse().ok())
}

#[test]
fn an_abandoned_exec_is_killed_with_all_it_started() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let raw = Raw::connect(&node.config().socket);
    let script = format!("(setsid sleep 1000 & echo $! > {0}/child); echo $$ > {0}/exec; sleep 1000", node.path("").display());
    let call: Pending<ExecSyncResponse> = raw.begin(EXEC, &exec_request(&id, &script, 0));
    let pids = [written_pid(&node, "exec"), written_pid(&node, "child")];
    assert!(pids.iter().all(|pid| alive(*pid)));
    call.cancel();
    eventually("the abandoned processes are dead", || pids.iter().all(|pid| !alive(*pid)).then_some(()));
    assert_eq!(node.state(&id), ContainerState::CONTAINER_RUNNING);
    assert_eq!(node.exec(&id, "echo well", 0).expect("exec").stdout, b"well\n");
}

#[test]
fn the_deadline_of_the_client_ends_an_exec() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let script = format!("echo $$ > {}/exec; exec sleep 1000", node.path("").display());
    let answer = node.runtime().exec_sync(&exec_request(&id, &script, 0), Some(Duration::from_millis(500)));
    refused(answer, Code::DEADLINE_EXCEEDED, "");
    let pid = written_pid(&node, "exec");
    eventually("the process is dead", || (!alive(pid)).then_some(()));
}

#[test]
fn an_abandoned_pull_stops() {
    let node = Node::start();
    let registry = Registry::start();
    registry.hold();
    let raw = Raw::connect(&node.config().socket);
    let call: Pending<PullImageResponse> = raw.begin(PULL, &pull_request(&registry.image()));
    eventually("a blob is asked for", || (registry.count("/blobs/") > 0).then_some(()));
    call.cancel();
    std::thread::sleep(Duration::from_millis(300));
    registry.release();
    std::thread::sleep(Duration::from_millis(500));
    let images = node.images().list_images(&ListImagesRequest::default(), SHORT).expect("list").images;
    assert_eq!(images.len(), 1, "the abandoned pull went on: {images:?}");
    let answer = node.images().pull_image(&pull_request(&registry.image()), SHORT).expect("pull");
    assert_eq!(answer.image_ref, registry.id);
}

#[test]
fn a_pull_goes_on_for_those_who_stay() {
    let node = Node::start();
    let registry = Registry::start();
    registry.hold();
    let raw = Raw::connect(&node.config().socket);
    let stays: Pending<PullImageResponse> = raw.begin(PULL, &pull_request(&registry.image()));
    eventually("a blob is asked for", || (registry.count("/blobs/") > 0).then_some(()));
    // The one that leaves came second: whether it has joined by the time it is cancelled cannot be seen from here, and must not
    // matter. That the first may leave too is a unit test of `image::flight`.
    let gone: Pending<PullImageResponse> = raw.begin(PULL, &pull_request(&registry.image()));
    std::thread::sleep(Duration::from_millis(100));
    gone.cancel();
    std::thread::sleep(Duration::from_millis(100));
    registry.release();
    assert_eq!(stays.wait().expect("pull").image_ref, registry.id);
    assert_eq!(registry.count("/manifests/"), 1, "both share one pull");
}

#[test]
fn an_abandoned_stop_does_not_kill() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = stubborn(&node, &sandbox);
    let raw = Raw::connect(&node.config().socket);
    let call: Pending<StopContainerResponse> = raw.begin(STOP, &stop_request(&id, 1));
    std::thread::sleep(Duration::from_millis(200));
    call.cancel();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(node.state(&id), ContainerState::CONTAINER_RUNNING);
    node.stop(&id, 0).expect("stop");
}

#[test]
fn a_hundred_waiting_calls_delay_nobody() {
    let node = Node::start();
    let registry = Registry::start();
    registry.hold();
    let sandbox = node.sandbox("web");
    let id = stubborn(&node, &sandbox);
    let raw = Raw::connect(&node.config().socket);
    let pull: Pending<PullImageResponse> = raw.begin(PULL, &pull_request(&registry.image()));
    let exec: Pending<ExecSyncResponse> = raw.begin(EXEC, &exec_request(&id, "sleep 1000", 0));
    let stops: Vec<Pending<StopContainerResponse>> = (0..100).map(|_| raw.begin(STOP, &stop_request(&id, 600))).collect();
    std::thread::sleep(Duration::from_millis(300));
    let runtime = node.runtime();
    let mut times = Vec::new();
    let mut timed = |call: &dyn Fn()| {
        let begin = Instant::now();
        call();
        times.push(begin.elapsed());
    };
    for _ in 0..20 {
        timed(&|| drop(runtime.list_containers(&ListContainersRequest::default(), SHORT).expect("list")));
        timed(&|| drop(runtime.list_pod_sandbox(&ListPodSandboxRequest::default(), SHORT).expect("list")));
        timed(&|| drop(runtime.version(&VersionRequest::default(), SHORT).expect("version")));
        timed(&|| drop(runtime.status(&StatusRequest::default(), SHORT).expect("status")));
        timed(&|| drop(node.status(&id).expect("status")));
    }
    // Slow calls that need not wait do not either.
    timed(&|| drop(node.exec(&id, "true", 0).expect("exec")));
    let slow_call = times.pop().expect("timed");
    assert!(slow_call < Duration::from_secs(5), "{slow_call:?}");
    times.sort();
    // The machine may be busy with other tests; a lane that is blocked shows in every call.
    assert!(times[times.len() * 9 / 10] < Duration::from_millis(50), "{times:?}");
    node.stop(&id, 0).expect("a stop without grace");
    for stop in stops {
        stop.wait().expect("the container has stopped");
    }
    assert!(exec.wait().map_or(true, |answer| answer.exit_code != 0), "the exec ends with its container");
    registry.release();
    pull.wait().expect("pull");
}

#[test]
fn a_full_queue_refuses_and_lists_go_on() {
    let node = Node::with(Options { limits: "slow_threads = 4\nqueue = 16".into(), ..Default::default() });
    let sandbox = node.sandbox("web");
    let id = stubborn(&node, &sandbox);
    let raw = Raw::connect(&node.config().socket);
    let (tx, answers) = std::sync::mpsc::channel();
    let ask = || {
        let (stop, tx): (Pending<StopContainerResponse>, _) = (raw.begin(STOP, &stop_request(&id, 8)), tx.clone());
        std::thread::spawn(move || tx.send(stop.wait()));
    };
    // Four get a worker, sixteen wait; those for whom there is no place are answered at once.
    (0..40).for_each(|_| ask());
    let soon = || answers.recv_timeout(Duration::from_millis(500)).ok();
    let mut refusals: Vec<_> = std::iter::from_fn(soon).collect();
    assert!((20..=24).contains(&refusals.len()), "{}", refusals.len());
    // A burst may find the queue full before a worker has taken the first: then there is a place again.
    let mut asked = 40;
    refusals.push(loop {
        asked += 1;
        ask();
        if let Some(answer) = soon() {
            break answer;
        }
    });
    let refused_calls = refusals.len();
    for answer in refusals {
        refused(answer, Code::RESOURCE_EXHAUSTED, "slow");
    }
    assert_eq!(asked - refused_calls, 20);
    refused(node.stop(&id, 0), Code::RESOURCE_EXHAUSTED, "slow");
    assert_eq!(node.container_ids(), [id.clone()]);
    assert_eq!(node.state(&id), ContainerState::CONTAINER_RUNNING);
    for _ in 0..20 {
        answers.recv().expect("an answer").expect("stopped");
    }
}
