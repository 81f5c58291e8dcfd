//! Equal calls that meet, and calls whose client has gone. kubelet repeats what it got no answer to.

use std::fs;

use crisp::api::runtime::*;
use grpcio::RpcStatusCode as Code;

use crate::node::{create_request, eventually, refused, run_request, Node};
use crate::raw::{Pending, Raw};

const RUN: &str = "/runtime.v1.RuntimeService/RunPodSandbox";
const CREATE: &str = "/runtime.v1.RuntimeService/CreateContainer";

/// The plugin waits for as long as the file `gate` is there.
const GATE: &str = "while [ -f \"$above/gate\" ]; do sleep 0.02; done";

fn begin(node: &Node, raw: &Raw, config: &PodSandboxConfig) -> Pending<RunPodSandboxResponse> {
    let before = node.plugin_calls().len();
    let call = raw.begin(RUN, &run_request(config, ""));
    eventually("the plugin is called", || (node.plugin_calls().len() > before).then_some(()));
    call
}

fn gated() -> Node {
    let node = Node::start();
    fs::write(node.path("cni/gate"), "").expect("close the gate");
    node.plugin_switch("first.ADD", GATE);
    node
}

fn open_gate(node: &Node) {
    fs::remove_file(node.path("cni/gate")).expect("open the gate");
}

#[test]
fn an_equal_run_joins_the_one_under_way() {
    let node = gated();
    let raw = Raw::connect(&node.config().socket);
    let config = node.sandbox_config("web");
    let first = begin(&node, &raw, &config);
    let second: Pending<RunPodSandboxResponse> = raw.begin(RUN, &run_request(&config, ""));
    node.wait_busy(2);
    // While it is made it is nowhere to be seen: kubelet would take it for a broken one.
    assert_eq!(node.sandbox_ids(), [""; 0]);
    let id = node.plugin_calls()[0].split(' ').nth(2).expect("an id").to_owned();
    refused(node.sandbox_status(&id), Code::NOT_FOUND, &id);
    let mut different = config.clone();
    different.labels.insert("a".into(), "b".into());
    refused(node.run(&different), Code::ALREADY_EXISTS, &id);
    let mut next = config.clone();
    next.metadata.mut_or_insert_default().attempt = 1;
    open_gate(&node);
    assert_eq!(first.wait().expect("run").pod_sandbox_id, id);
    assert_eq!(second.wait().expect("the joined run").pod_sandbox_id, id);
    assert_eq!(node.sandbox_ids(), [id.clone()]);
    // The answer was taken: a third one is a conflict, and says with whom.
    refused(node.run(&config), Code::ALREADY_EXISTS, &id);
    let other = node.run(&next).expect("another attempt is another sandbox");
    assert_ne!(other, id);
    node.remove_sandbox(&id).expect("remove");
    node.run(&config).expect("the name is free again");
}

#[test]
fn a_run_whose_client_has_gone_is_finished_and_handed_over() {
    let node = gated();
    let raw = Raw::connect(&node.config().socket);
    let config = node.sandbox_config("web");
    raw.abandon(begin(&node, &raw, &config));
    assert_eq!(node.sandbox_ids(), [""; 0]);
    open_gate(&node);
    let id = eventually("the abandoned sandbox is finished", || node.sandbox_ids().pop());
    assert_eq!(node.run(&config).expect("the retry"), id);
    assert_eq!(node.plugin_verbs(), ["first ADD", "second ADD", "third ADD"]);
    let mut different = config.clone();
    different.hostname = "other".into();
    refused(node.run(&different), Code::ALREADY_EXISTS, &id);
}

#[test]
fn a_retry_joins_a_run_whose_client_has_gone() {
    let node = gated();
    let raw = Raw::connect(&node.config().socket);
    let config = node.sandbox_config("web");
    raw.abandon(begin(&node, &raw, &config));
    let retry: Pending<RunPodSandboxResponse> = raw.begin(RUN, &run_request(&config, ""));
    node.wait_busy(2);
    open_gate(&node);
    let id = retry.wait().expect("the retry").pod_sandbox_id;
    assert_eq!(node.sandbox_ids(), [id]);
    assert_eq!(node.plugin_verbs(), ["first ADD", "second ADD", "third ADD"]);
}

#[test]
fn a_joined_run_gets_the_error_of_the_first() {
    let node = gated();
    let raw = Raw::connect(&node.config().socket);
    let config = node.sandbox_config("web");
    node.plugin_switch("second.ADD", "fail 7 'no address left' ''");
    let first = begin(&node, &raw, &config);
    let second: Pending<RunPodSandboxResponse> = raw.begin(RUN, &run_request(&config, ""));
    node.wait_busy(2);
    open_gate(&node);
    for call in [first, second] {
        refused(call.wait(), Code::INTERNAL, "no address left");
    }
    node.plugin_switch("second.ADD", "");
    node.run(&config).expect("the name is free again");
}

#[test]
fn many_equal_creates_make_one_container() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let raw = Raw::connect(&node.config().socket);
    let config = node.container_config("app", "exec sleep 1000");
    let calls: Vec<Pending<CreateContainerResponse>> = (0..20).map(|_| raw.begin(CREATE, &create_request(&sandbox, &config))).collect();
    let answers: Vec<_> = calls.into_iter().map(Pending::wait).collect();
    let ids = node.container_ids();
    let [id] = ids.as_slice() else { panic!("{ids:?}") };
    assert!(answers.iter().any(Result::is_ok));
    for answer in answers {
        match answer {
            Ok(created) => assert_eq!(&created.container_id, id),
            Err(error) => assert!(error.code == Code::ALREADY_EXISTS && error.message.contains(id.as_str()), "{error}"),
        }
    }
    refused(node.create(&sandbox, &config), Code::ALREADY_EXISTS, id);
    let mut next = config.clone();
    next.metadata.mut_or_insert_default().attempt = 1;
    node.create(&sandbox, &next).expect("another attempt is another container");
    node.remove(id).expect("remove");
    node.create(&sandbox, &config).expect("the name is free again");
}

#[test]
fn after_a_restart_nobody_knows_who_has_the_answer() {
    let mut node = Node::start();
    let sandbox_config = node.sandbox_config("web");
    let sandbox = node.run(&sandbox_config).expect("run");
    let config = node.container_config("app", "exec sleep 1000");
    let container = node.create(&sandbox, &config).expect("create");
    node.restart();
    assert_eq!(node.run(&sandbox_config).expect("handed over"), sandbox);
    assert_eq!(node.create(&sandbox, &config).expect("handed over"), container);
    node.start_container(&container).expect("start");
    // Not fresh any more.
    refused(node.create(&sandbox, &config), Code::ALREADY_EXISTS, &container);
    node.stop_sandbox(&sandbox).expect("stop");
    refused(node.run(&sandbox_config), Code::ALREADY_EXISTS, &sandbox);
}
