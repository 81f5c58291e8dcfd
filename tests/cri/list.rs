//! ListPodSandbox and ListContainers: every filter, and all of them at once.

use std::collections::BTreeMap;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::{EnumOrUnknown, MessageField};

use crate::node::{refused, Answer, Node};

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort();
    ids
}

fn sandboxes(node: &Node, filter: PodSandboxFilter) -> Answer<Vec<String>> {
    let request = ListPodSandboxRequest { filter: MessageField::some(filter), ..Default::default() };
    node.runtime().list_pod_sandbox(&request, SHORT).map(|l| sorted(l.items.into_iter().map(|s| s.id).collect()))
}

fn containers(node: &Node, filter: ContainerFilter) -> Answer<Vec<String>> {
    let request = ListContainersRequest { filter: MessageField::some(filter), ..Default::default() };
    node.runtime().list_containers(&request, SHORT).map(|l| sorted(l.containers.into_iter().map(|c| c.id).collect()))
}

#[test]
fn sandboxes_by_id_state_and_labels() {
    let node = Node::start();
    let labelled = |name: &str, pairs: &[(&str, &str)]| {
        let mut config = node.sandbox_config(name);
        config.labels = labels(pairs);
        node.run(&config).expect("run")
    };
    let (a, b, c) = (labelled("a", &[("app", "x"), ("tier", "1")]), labelled("b", &[("app", "x")]), labelled("c", &[("app", "y")]));
    node.stop_sandbox(&b).expect("stop");
    let state = |state: PodSandboxState| MessageField::some(PodSandboxStateValue { state: state.into(), ..Default::default() });
    let (ready, not_ready) = (PodSandboxState::SANDBOX_READY, PodSandboxState::SANDBOX_NOTREADY);
    let list = |filter| sandboxes(&node, filter).expect("list");
    let all = sorted(vec![a.clone(), b.clone(), c.clone()]);
    assert_eq!(sorted(node.sandbox_ids()), all);
    assert_eq!(list(PodSandboxFilter::default()), all);
    assert_eq!(list(PodSandboxFilter { id: a.clone(), ..Default::default() }), [a.clone()]);
    assert_eq!(list(PodSandboxFilter { id: a[..40].to_owned(), ..Default::default() }), [a.clone()]);
    assert_eq!(list(PodSandboxFilter { id: "nothing".into(), ..Default::default() }), [""; 0]);
    assert_eq!(list(PodSandboxFilter { state: state(not_ready), ..Default::default() }), [b.clone()]);
    assert_eq!(list(PodSandboxFilter { state: state(ready), ..Default::default() }), sorted(vec![a.clone(), c]));
    assert_eq!(
        list(PodSandboxFilter { label_selector: labels(&[("app", "x")]), ..Default::default() }),
        sorted(vec![a.clone(), b.clone()])
    );
    assert_eq!(list(PodSandboxFilter { label_selector: labels(&[("app", "x"), ("tier", "1")]), ..Default::default() }), [a.clone()]);
    assert_eq!(list(PodSandboxFilter { label_selector: labels(&[("app", "")]), ..Default::default() }), [""; 0]);
    let every = |id: &str, wanted| PodSandboxFilter {
        id: id.to_owned(),
        state: state(wanted),
        label_selector: labels(&[("app", "x")]),
        ..Default::default()
    };
    assert_eq!(list(every(&b, not_ready)), [b.clone()]);
    assert_eq!(list(every(&b, ready)), [""; 0]);
    let strange = PodSandboxStateValue { state: EnumOrUnknown::from_i32(7), ..Default::default() };
    refused(sandboxes(&node, PodSandboxFilter { state: MessageField::some(strange), ..Default::default() }), Code::INVALID_ARGUMENT, "7");
}

#[test]
fn containers_by_id_sandbox_state_and_labels() {
    let node = Node::start();
    let (one, two) = (node.sandbox("one"), node.sandbox("two"));
    let labelled = |sandbox: &str, name: &str, value: &str| {
        let mut config = node.container_config(name, "exec sleep 1000");
        config.labels = labels(&[("app", value)]);
        node.create(sandbox, &config).expect("create")
    };
    let (created, running, other) = (labelled(&one, "a", "x"), labelled(&one, "b", "x"), labelled(&two, "c", "x"));
    node.start_container(&running).expect("start");
    node.start_container(&other).expect("start");
    node.stop(&other, 0).expect("stop");
    let state = |state: ContainerState| MessageField::some(ContainerStateValue { state: state.into(), ..Default::default() });
    let list = |filter| containers(&node, filter).expect("list");
    let all = sorted(vec![created.clone(), running.clone(), other.clone()]);
    assert_eq!(list(ContainerFilter::default()), all);
    assert_eq!(list(ContainerFilter { label_selector: labels(&[("app", "x")]), ..Default::default() }), all);
    assert_eq!(list(ContainerFilter { id: created[..40].to_owned(), ..Default::default() }), [created.clone()]);
    assert_eq!(list(ContainerFilter { pod_sandbox_id: two[..40].to_owned(), ..Default::default() }), [other.clone()]);
    assert_eq!(list(ContainerFilter { pod_sandbox_id: "nothing".into(), ..Default::default() }), [""; 0]);
    for (wanted, id) in [
        (ContainerState::CONTAINER_CREATED, &created),
        (ContainerState::CONTAINER_RUNNING, &running),
        (ContainerState::CONTAINER_EXITED, &other),
    ] {
        assert_eq!(list(ContainerFilter { state: state(wanted), ..Default::default() }), [id.clone()]);
    }
    assert_eq!(list(ContainerFilter { state: state(ContainerState::CONTAINER_UNKNOWN), ..Default::default() }), [""; 0]);
    let every = |sandbox: &str| ContainerFilter {
        id: running.clone(),
        pod_sandbox_id: sandbox.to_owned(),
        state: state(ContainerState::CONTAINER_RUNNING),
        label_selector: labels(&[("app", "x")]),
        ..Default::default()
    };
    assert_eq!(list(every(&one)), [running.clone()]);
    assert_eq!(list(every(&two)), [""; 0]);
    let answer = node.runtime().list_containers(&ListContainersRequest::default(), SHORT).expect("list");
    for container in &answer.containers {
        assert_eq!((&container.image_id, &container.image_ref), (&node.image, &node.image));
        assert!(!container.image.image.is_empty() && container.metadata.is_some() && container.created_at > 0);
    }
}
