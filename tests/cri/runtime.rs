//! OCI runtimes that fail, hang, die or are not there.

use std::fs;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;

use crate::node::{eventually, refused, Node, Options};

/// A container whose start has failed, as kubelet wants to see it.
fn assert_start_error(node: &Node, id: &str, words: &str) {
    let status = node.status(id).expect("status");
    assert_eq!(status.state.enum_value(), Ok(ContainerState::CONTAINER_EXITED));
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    assert!(status.message.contains(words), "{words:?} is not in {:?}", status.message);
    assert!(status.finished_at > status.created_at);
    refused(node.start_container(id), Code::FAILED_PRECONDITION, "EXITED");
}

fn runtime_state(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(node.path("run/runtime/fake")).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_run_that_fails_says_the_runtimes_words() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    for (n, (how, words)) in [
        ("fail cannot set memory limit", "cannot set memory limit"),
        ("stderr segmentation fault, core dumped", "segmentation fault, core dumped"),
        ("die", "signal"),
        ("nopid", "pid"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = node.create(&sandbox, &node.container_config(&format!("c{n}"), "exec sleep 1000")).expect("create");
        node.switch("run", how);
        refused(node.start_container(&id), Code::INTERNAL, words);
        node.switch("run", "");
        assert_start_error(&node, &id, words);
        assert_eq!(runtime_state(&node), [""; 0]);
        node.remove(&id).expect("remove");
    }
    let id = node.launch(&sandbox, "good", "exec sleep 1000");
    assert_eq!(node.state(&id), ContainerState::CONTAINER_RUNNING);
}

#[test]
fn a_program_that_is_not_there() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "");
    config.command = vec!["/no/such/program".into()];
    let id = node.create(&sandbox, &config).expect("create");
    refused(node.start_container(&id), Code::INTERNAL, "/no/such/program");
    assert_start_error(&node, &id, "/no/such/program");
}

#[test]
fn a_run_that_hangs_is_killed() {
    let node = Node::with(Options { limits: "runtime_timeout_seconds = 5".into(), ..Default::default() });
    let sandbox = node.sandbox("web");
    let id = node.create(&sandbox, &node.container_config("app", "exec sleep 1000")).expect("create");
    node.switch("run", "hang");
    // The words are the daemon's: a client that has waited in vain would say others.
    refused(node.start_container(&id), Code::DEADLINE_EXCEEDED, "timed out");
    assert_start_error(&node, &id, "timed out");
    eventually("the runtime is dead", || node.processes().is_empty().then_some(()));
}

#[test]
fn a_runtime_that_has_gone() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.create(&sandbox, &node.container_config("app", "exec sleep 1000")).expect("create");
    let (here, away) = (node.path("oci/runtime"), node.path("oci/away"));
    fs::rename(&here, &away).expect("take the runtime away");
    refused(node.start_container(&id), Code::INTERNAL, "runtime");
    assert_start_error(&node, &id, "runtime");
    fs::rename(&away, &here).expect("bring it back");
}

#[test]
fn handlers_that_cannot_be_used() {
    let node = Node::start();
    refused(node.run_with(&node.sandbox_config("web"), "kata"), Code::INVALID_ARGUMENT, "kata");
    refused(node.run_with(&node.sandbox_config("web"), "crun"), Code::FAILED_PRECONDITION, "crun");
    assert!(node.plugin_calls().is_empty());
}

#[test]
fn an_exec_that_fails() {
    let node = Node::with(Options { limits: "runtime_timeout_seconds = 5".into(), ..Default::default() });
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    node.switch("exec", "fail no more processes");
    refused(node.exec(&id, "true", 0), Code::INTERNAL, "no more processes");
    node.switch("exec", "hang");
    refused(node.exec(&id, "true", 0), Code::DEADLINE_EXCEEDED, "");
    node.switch("exec", "");
    assert_eq!(node.exec(&id, "exit 3", 0).expect("exec").exit_code, 3);
    let request = ExecSyncRequest { container_id: id.clone(), cmd: vec!["/no/such/program".into()], ..Default::default() };
    refused(node.runtime().exec_sync(&request, SHORT), Code::INTERNAL, "/no/such/program");
}

#[test]
fn an_update_that_fails_changes_nothing() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let before = node.status(&id).expect("status").resources;
    node.switch("update", "fail device or resource busy");
    let linux = LinuxContainerResources { cpu_shares: 512, ..Default::default() };
    let request =
        UpdateContainerResourcesRequest { container_id: id.clone(), linux: protobuf::MessageField::some(linux), ..Default::default() };
    refused(node.runtime().update_container_resources(&request, SHORT), Code::INTERNAL, "device or resource busy");
    assert_eq!(node.status(&id).expect("status").resources, before);
    assert_ne!(node.spec(&id)["linux"]["resources"]["cpu"]["shares"], 512);
}

#[test]
fn a_delete_that_failed_is_made_up_for() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exit 0");
    node.wait_exit(&id);
    let other = node.launch(&sandbox, "other", "exec sleep 1000");
    node.switch("delete", "fail the disk is full");
    node.stop(&other, 0).expect("stop");
    assert_eq!(node.state(&other), ContainerState::CONTAINER_EXITED);
    eventually("the runtime was asked", || node.runtime_calls().iter().any(|c| c.verb == "delete" && c.id == other).then_some(()));
    node.switch("delete", "");
    node.remove(&other).expect("remove");
    assert_eq!(runtime_state(&node), [""; 0], "the runtime's own state stays for ever");
}
