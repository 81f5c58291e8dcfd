//! Version, Status, RuntimeConfig, UpdateRuntimeConfig.

use std::fs;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;
use serde_json::Value;

use crate::node::{eventually, refused, Node, Options};

fn status(node: &Node) -> StatusResponse {
    node.runtime().status(&StatusRequest { verbose: true, ..Default::default() }, SHORT).expect("status")
}

fn condition(node: &Node, kind: &str) -> RuntimeCondition {
    let answer = status(node);
    answer.status.conditions.iter().find(|c| c.type_ == kind).expect("the condition is there").clone()
}

fn set_cidr(node: &Node, cidr: &str) -> crate::node::Answer<UpdateRuntimeConfigResponse> {
    let network = NetworkConfig { pod_cidr: cidr.into(), ..Default::default() };
    let config = RuntimeConfig { network_config: MessageField::some(network), ..Default::default() };
    let request = UpdateRuntimeConfigRequest { runtime_config: MessageField::some(config), ..Default::default() };
    node.runtime().update_runtime_config(&request, SHORT)
}

#[test]
fn version_has_all_fields() {
    let node = Node::start();
    let version = node.runtime().version(&VersionRequest { version: "0.1.0".into(), ..Default::default() }, SHORT).expect("version");
    assert_eq!((version.version.as_str(), version.runtime_name.as_str()), ("0.1.0", "crisp"));
    assert!(!version.runtime_version.is_empty() && !version.runtime_api_version.is_empty());
}

#[test]
fn a_healthy_daemon() {
    let node = Node::start();
    let answer = status(&node);
    for condition in &answer.status.conditions {
        assert!(condition.status, "{condition}");
    }
    let handlers: Vec<_> = answer.runtime_handlers.iter().map(|h| h.name.as_str()).collect();
    // crun and runc are not where the configuration says.
    assert_eq!(handlers, ["", "fake", "second"]);
    assert!(answer.runtime_handlers.iter().all(|h| h.features.is_some()));
    assert!(answer.features.supplemental_groups_policy);
    let config: Value = serde_json::from_str(&answer.info["config"]).expect("config is JSON");
    assert_eq!(config["stateDir"], node.path("run").display().to_string().as_str());
    let quiet = node.runtime().status(&StatusRequest::default(), SHORT).expect("status");
    assert!(quiet.info.is_empty());
    let driver = node.runtime().runtime_config(&RuntimeConfigRequest::default(), SHORT).expect("runtime config");
    assert_eq!(driver.linux.cgroup_driver.enum_value(), Ok(CgroupDriver::CGROUPFS));
}

#[test]
fn an_emptied_conf_dir_is_told_at_once() {
    let node = Node::start();
    let file = node.path("cni/conf/10-test.conflist");
    for _ in 0..3 {
        let text = fs::read(&file).expect("the network");
        fs::remove_file(&file).expect("remove the network");
        let network = condition(&node, "NetworkReady");
        assert!(!network.status && !network.reason.is_empty() && !network.message.is_empty(), "{network}");
        assert!(condition(&node, "RuntimeReady").status);
        refused(node.run(&node.sandbox_config("web")), Code::UNAVAILABLE, "CNI");
        fs::write(&file, text).expect("write the network");
        eventually("NetworkReady", || condition(&node, "NetworkReady").status.then_some(()));
    }
    node.sandbox("web");
}

#[test]
fn a_missing_plugin_and_a_broken_file_are_told() {
    let node = Node::start();
    fs::remove_file(node.path("cni/bin/second")).expect("remove a plugin");
    let network = condition(&node, "NetworkReady");
    assert!(!network.status && network.message.contains("second"), "{network}");
    fs::write(node.path("cni/conf/10-test.conflist"), "{").expect("write rubbish");
    let network = eventually("the rubbish is read", || Some(condition(&node, "NetworkReady")).filter(|c| c.message.contains("10-test")));
    assert!(!network.status);
}

#[test]
fn a_default_runtime_that_does_not_work_is_told() {
    let mut node = Node::start();
    node.stop_daemon();
    node.switch("run", "fail no cgroups today");
    node.start_daemon();
    let runtime = condition(&node, "RuntimeReady");
    assert!(!runtime.status && runtime.message.contains("no cgroups today"), "{runtime}");
    refused(node.run(&node.sandbox_config("web")), Code::FAILED_PRECONDITION, "no cgroups today");
    node.switch("run", "");
    node.restart();
    assert!(condition(&node, "RuntimeReady").status);
}

#[test]
fn the_pod_cidr_fills_the_template() {
    let dir = tempfile::tempdir().expect("a directory");
    let template = dir.path().join("template");
    let text = r#"{"cniVersion": "1.0.0", "name": "rendered", "plugins": [{"type": "first", "subnet": "{{.PodCIDR}}"}]}"#;
    fs::write(&template, text).expect("write the template");
    let node = Node::with(Options { cni: format!("conf_template = {:?}", template.display().to_string()), ..Default::default() });
    fs::remove_file(node.path("cni/conf/10-test.conflist")).expect("remove the network");
    assert!(!condition(&node, "NetworkReady").status);
    set_cidr(&node, "").expect("no news");
    assert!(!condition(&node, "NetworkReady").status);
    refused(set_cidr(&node, "10.1.0.0"), Code::INVALID_ARGUMENT, "10.1.0.0");
    set_cidr(&node, "10.1.0.0/16").expect("a CIDR");
    assert!(condition(&node, "NetworkReady").status);
    let rendered = || fs::read_dir(node.path("cni/conf")).expect("list").flatten().map(|e| e.path()).next().expect("a file");
    assert!(fs::read_to_string(rendered()).expect("read").contains("\"10.1.0.0/16\""));
    let written = fs::metadata(rendered()).expect("stat").modified().expect("a time");
    set_cidr(&node, "10.1.0.0/16").expect("the same again");
    assert_eq!(fs::metadata(rendered()).expect("stat").modified().expect("a time"), written, "the same CIDR writes nothing");
    node.sandbox("web");
    assert_eq!(node.plugin_request("first.ADD")["subnet"], "10.1.0.0/16");
}

#[test]
fn without_a_template_the_pod_cidr_is_accepted() {
    let node = Node::start();
    set_cidr(&node, "10.1.0.0/16,fd00:1::/64").expect("a CIDR");
    assert_eq!(fs::read_dir(node.path("cni/conf")).expect("list").count(), 1);
}
