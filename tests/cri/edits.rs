//! CDI devices and hooks reach the spec; what is wrong with them is said, and nothing is left of it.

use std::fs;

use crisp::api::runtime::CDIDevice;
use grpcio::RpcStatusCode as Code;
use serde_json::json;

use crate::node::{refused, Node};

fn write(node: &Node, name: &str, text: &str) {
    let path = node.path(name);
    fs::create_dir_all(path.parent().expect("in a directory")).expect("make a directory");
    fs::write(path, text).expect("write a file");
}

#[test]
fn devices_by_field_and_by_annotation() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    write(&node, "cdi/broken.json", "{");
    let device = |name: &str| json!({"name": name, "containerEdits": {"env": [format!("{name}=given")]}});
    let all = json!({"additionalGids": [4242]});
    let spec = json!({"cdiVersion": "0.7.0", "kind": "v.com/c", "containerEdits": all, "devices": [device("A"), device("B")]});
    write(&node, "cdi/good.json", &spec.to_string());
    let mut config = node.container_config("app", "true");
    config.CDI_devices = vec![CDIDevice { name: "v.com/c=A".into(), ..Default::default() }];
    config.annotations.insert("cdi.k8s.io/plugin".into(), "v.com/c=B,v.com/c=A".into());
    let id = node.create(&sandbox, &config).expect("create");
    let spec = node.spec(&id);
    let env: Vec<_> = spec["process"]["env"].as_array().expect("a list").iter().filter_map(|v| v.as_str()).collect();
    assert_eq!(env.iter().filter(|v| v.ends_with("=given")).collect::<Vec<_>>(), [&"A=given", &"B=given"]);
    let status = node.status(&id).expect("status");
    assert_eq!(status.annotations, config.annotations);
    let groups = &status.user.linux.supplemental_groups;
    assert_eq!(json!(groups), spec["process"]["user"]["additionalGids"]);
    assert!(groups.contains(&4242) && status.user.linux.uid == 0, "the device's group is the process's: {groups:?}");

    config.metadata.mut_or_insert_default().name = "other".into();
    config.CDI_devices[0].name = "v.com/c=absent".into();
    let message = refused(node.create(&sandbox, &config), Code::FAILED_PRECONDITION, "v.com/c=absent");
    assert!(message.contains("broken.json"), "{message}");
    assert_eq!(node.container_ids(), [id]);
}

#[test]
fn hooks_are_chosen_by_annotations_of_both_and_by_mounts() {
    let node = Node::start();
    let hook = |when| json!({"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": when, "stages": ["prestart"]}).to_string();
    write(&node, "hooks/annotated.json", &hook(json!({"annotations": {"^a$": "^sandbox$"}})));
    write(&node, "hooks/mounted.json", &hook(json!({"hasBindMounts": true})));
    let mut config = node.sandbox_config("web");
    config.annotations.insert("a".into(), "sandbox".into());
    let sandbox = node.run(&config).expect("run");
    let hooks = |name: &str, mounts: bool| {
        let mut config = node.container_config(name, "true");
        // The sandbox's value counts.
        config.annotations.insert("a".into(), "container".into());
        if mounts {
            let mount = crisp::api::runtime::Mount { container_path: "/data".into(), host_path: "/tmp".into(), ..Default::default() };
            config.mounts.push(mount);
        }
        let id = node.create(&sandbox, &config).expect("create");
        node.spec(&id)["hooks"]["prestart"].as_array().map_or(0, Vec::len)
    };
    assert_eq!((hooks("plain", false), hooks("mounts", true)), (1, 2));
    write(&node, "hooks/bad.json", "[]");
    refused(node.create(&sandbox, &node.container_config("late", "true")), Code::FAILED_PRECONDITION, "hooks/bad.json");
    let plain = node.sandbox("plain");
    fs::remove_file(node.path("hooks/bad.json")).expect("remove");
    let id = node.create(&plain, &node.container_config("app", "true")).expect("create");
    assert!(node.spec(&id)["hooks"].is_null());
}
