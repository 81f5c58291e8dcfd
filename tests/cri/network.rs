//! Plugins that fail, hang and talk rubbish; configurations that change under a sandbox.

use std::fs;

use crisp::api::runtime::PodSandboxState;
use grpcio::RpcStatusCode as Code;

use crate::node::{alive, eventually, refused, Node, Options};

fn state(node: &Node, id: &str) -> PodSandboxState {
    node.sandbox_status(id).expect("status").state.enum_value().expect("a known state")
}

#[test]
fn an_add_that_fails_half_way_is_undone_in_reverse() {
    let node = Node::start();
    node.plugin_switch("second.ADD", "fail 11 'try again later' 'the pool is empty'");
    let message = refused(node.run(&node.sandbox_config("web")), Code::UNAVAILABLE, "try again later");
    for words in ["second", "the pool is empty", "test-net"] {
        assert!(message.contains(words), "{words} is not in {message}");
    }
    assert_eq!(node.plugin_verbs(), ["first ADD", "second ADD", "third DEL", "second DEL", "first DEL"]);
    assert!(node.sandbox_ids().is_empty());
    assert_eq!(node.leftovers(), [""; 0]);
    node.plugin_switch("second.ADD", "");
    node.sandbox("web");
}

#[test]
fn rubbish_silence_and_death_of_a_plugin_are_errors_with_words() {
    let node = Node::start();
    for (script, words) in [
        ("echo 'not JSON'; exit 0", "not JSON"),
        ("exit 0", "third"),
        ("echo 'out of luck' >&2; exit 3", "out of luck"),
        ("kill -9 $$", "signal 9"),
        ("echo '{\"cniVersion\": \"1.0.0\", \"ips\": []}'; exit 0", "no IP"),
    ] {
        node.plugin_switch("third.ADD", script);
        refused(node.run(&node.sandbox_config("web")), Code::INTERNAL, words);
        assert!(node.sandbox_ids().is_empty());
        assert_eq!(node.leftovers(), [""; 0], "{script}");
    }
}

#[test]
fn a_plugin_that_hangs_is_killed_with_its_children() {
    let node = Node::with(Options { cni: "plugin_timeout_seconds = 5".into(), ..Default::default() });
    node.plugin_switch("second.ADD", "sleep 1000 & echo $! > $above/child; wait");
    // By its name: a client that has waited in vain knows of no plugin.
    refused(node.run(&node.sandbox_config("web")), Code::DEADLINE_EXCEEDED, "second");
    let child: i32 = fs::read_to_string(node.path("cni/child")).expect("the child's pid").trim().parse().expect("a pid");
    // Killed with the group; a busy machine lets it die a moment later.
    eventually("the child is dead", || (!alive(child)).then_some(()));
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_del_that_fails_is_reported_and_tried_again() {
    let node = Node::start();
    let id = node.sandbox("web");
    let container = node.launch(&id, "app", "exec sleep 1000");
    node.plugin_switch("second.DEL", "fail 100 'the switch is away' ''");
    refused(node.stop_sandbox(&id), Code::INTERNAL, "the switch is away");
    // Everything else was done all the same.
    assert_eq!(state(&node, &id), PodSandboxState::SANDBOX_NOTREADY);
    assert_eq!(node.plugin_verbs()[3..], ["third DEL", "second DEL", "first DEL"]);
    assert_eq!(node.state(&container), crisp::api::runtime::ContainerState::CONTAINER_EXITED);
    refused(node.remove_sandbox(&id), Code::INTERNAL, "the switch is away");
    assert_eq!(node.sandbox_ids(), [id.clone()]);
    node.plugin_switch("second.DEL", "");
    node.stop_sandbox(&id).expect("stop");
    node.remove_sandbox(&id).expect("remove");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn an_undo_that_fails_leaves_a_sandbox_to_stop() {
    let node = Node::start();
    node.plugin_switch("second.ADD", "fail 7 'no address' ''");
    node.plugin_switch("first.DEL", "fail 100 'no way back' ''");
    let config = node.sandbox_config("web");
    refused(node.run(&config), Code::INTERNAL, "no address");
    let ids = node.sandbox_ids();
    let [id] = ids.as_slice() else { panic!("{ids:?}") };
    assert_eq!(state(&node, id), PodSandboxState::SANDBOX_NOTREADY);
    // It has the name.
    refused(node.run(&config), Code::ALREADY_EXISTS, id);
    refused(node.stop_sandbox(id), Code::INTERNAL, "no way back");
    node.plugin_switch("first.DEL", "");
    node.plugin_switch("second.ADD", "");
    node.stop_sandbox(id).expect("stop");
    node.remove_sandbox(id).expect("remove");
    assert_eq!(node.leftovers(), [""; 0]);
    node.run(&config).expect("the name is free");
}

#[test]
fn a_del_uses_what_the_add_used() {
    let node = Node::start();
    let id = node.sandbox("web");
    node.write_network(&["third"]);
    node.stop_sandbox(&id).expect("stop");
    assert_eq!(node.plugin_verbs()[3..], ["third DEL", "second DEL", "first DEL"]);
    assert_eq!(node.plugin_request("first.DEL")["prevResult"]["ips"][0]["address"], "10.88.0.5/24");
    let line = node.plugin_calls().last().expect("a call").clone();
    assert!(line.contains("K8S_POD_NAME=web"), "{line}");
    // And without any configuration.
    let other = node.sandbox("other");
    fs::remove_file(node.path("cni/conf/10-test.conflist")).expect("remove the network");
    node.remove_sandbox(&other).expect("remove");
}

#[test]
fn a_namespace_that_is_gone_is_told_to_the_plugins() {
    let node = Node::start();
    let id = node.sandbox("web");
    let netns = node.path("netns").join(format!("crisp-{id}"));
    crisp::sys::namespace::unpin(&netns).expect("unpin");
    node.stop_sandbox(&id).expect("stop");
    for line in &node.plugin_calls()[3..] {
        assert_eq!(line.split(' ').nth(4), Some("-"), "{line}");
    }
}

#[test]
fn bandwidth_annotations_reach_the_plugins() {
    let node = Node::start();
    let mut config = node.sandbox_config("web");
    config.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "10M".into());
    node.run(&config).expect("run");
    assert_eq!(node.plugin_request("first.ADD")["runtimeConfig"]["bandwidth"]["ingressRate"], 10_000_000);
    let mut config = node.sandbox_config("bad");
    config.annotations.insert("kubernetes.io/egress-bandwidth".into(), "fast".into());
    refused(node.run(&config), Code::INVALID_ARGUMENT, "egress-bandwidth");
}

#[test]
fn extra_networks_come_with_the_default_address_first() {
    let node = Node::with(Options { cni: "extra_networks = true".into(), ..Default::default() });
    let more = r#"{"cniVersion": "1.0.0", "name": "more", "plugins": [{"type": "third"}]}"#;
    fs::write(node.path("cni/conf/20-more.conflist"), more).expect("write a network");
    let mut config = node.sandbox_config("web");
    config.annotations.insert("crisp.dev/networks".into(), "more".into());
    let id = node.run(&config).expect("run");
    assert_eq!(node.plugin_verbs(), ["third ADD", "first ADD", "second ADD", "third ADD"]);
    assert_eq!(node.plugin_calls()[0].split(' ').nth(3), Some("net1"));
    assert_eq!(node.sandbox_status(&id).expect("status").network.ip, "10.88.0.5");
    node.remove_sandbox(&id).expect("remove");
    let mut config = node.sandbox_config("bad");
    config.annotations.insert("crisp.dev/networks".into(), "nowhere".into());
    refused(node.run(&config), Code::INVALID_ARGUMENT, "nowhere");
}
