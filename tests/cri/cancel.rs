//! Clients that go away, deadlines, and calls that wait by the hundred.

use std::time::{Duration, Instant};

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;

use crate::node::{alive, eventually, exec_request, refused, Node, Options, PATIENCE};
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
    // Where the machine is busy the first deadline may be over before the command has begun.
    let began = [0.5, 2.0, 8.0].into_iter().any(|seconds| {
        let answer = node.runtime().exec_sync(&exec_request(&id, &script, 0), Some(Duration::from_secs_f64(seconds)));
        refused(answer, Code::DEADLINE_EXCEEDED, "");
        // With the number in it: the shell opens it first.
        std::fs::read_to_string(node.path("exec")).is_ok_and(|text| text.ends_with('\n'))
    });
    assert!(began, "the command did not begin in 8 s");
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
    node.wait_busy(0);
    // Nobody waits for an answer any more: the pull has not just lost its listener.
    eventually("the downloads are given up", || (registry.hung_up() == registry.count("/blobs/")).then_some(()));
    registry.release();
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
    // The one that leaves came second. That the first may leave too is a unit test of `image::flight`.
    let gone: Pending<PullImageResponse> = raw.begin(PULL, &pull_request(&registry.image()));
    node.wait_busy(2);
    gone.cancel();
    node.wait_busy(1);
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
    let call: Pending<StopContainerResponse> = raw.begin(STOP, &stop_request(&id, 600));
    node.wait_busy(1);
    call.cancel();
    node.wait_busy(0);
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
    node.wait_busy(102);
    let runtime = node.runtime();
    let mut longest = Duration::ZERO;
    // None of the others ends by itself: a call that waits for one of them waits for as long as it may.
    let mut timed = |call: &dyn Fn()| {
        let begin = Instant::now();
        call();
        longest = longest.max(begin.elapsed());
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
    assert!(longest < SHORT.expect("a limit") / 2, "{longest:?}");
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
    let pid = node.pid(&id);
    let raw = Raw::connect(&node.config().socket);
    let (tx, answers) = std::sync::mpsc::channel();
    let ask = || {
        let (stop, tx): (Pending<StopContainerResponse>, _) = (raw.begin(STOP, &stop_request(&id, 600)), tx.clone());
        std::thread::spawn(move || tx.send(stop.wait()));
    };
    // Four get a worker, sixteen wait; those for whom there is no place are answered at once.
    (0..40).for_each(|_| ask());
    // A burst may find the queue full before a worker has taken the first: then there is a place again.
    let mut asked = 40;
    eventually("every place is taken", || {
        let full = node.slow_calls() == (4, 16);
        if !full {
            asked += 1;
            ask();
        }
        full.then_some(())
    });
    for _ in 20..asked {
        let answer = answers.recv_timeout(PATIENCE).expect("those without a place are answered");
        refused(answer, Code::RESOURCE_EXHAUSTED, "slow");
    }
    assert_eq!(node.slow_calls(), (4, 16));
    refused(node.stop(&id, 0), Code::RESOURCE_EXHAUSTED, "slow");
    assert_eq!(node.container_ids(), [id.clone()]);
    assert_eq!(node.state(&id), ContainerState::CONTAINER_RUNNING);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("end the container");
    for _ in 0..20 {
        answers.recv().expect("an answer").expect("stopped");
    }
}
