//! The lists in pieces: the same objects as the lists, each once, in small messages, then the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::{EnumOrUnknown, Message, MessageField};

use crate::node::{eventually, refused, Answer, Node, Options};
use crate::stats::Dirs;
use crate::subscriber::{open, Unread};

const SANDBOXES: &str = "/runtime.v1.RuntimeService/StreamPodSandboxes";
const CONTAINERS: &str = "/runtime.v1.RuntimeService/StreamContainers";
const IMAGES: &str = "/runtime.v1.ImageService/StreamImages";
const MANY: usize = 10_000;

fn sandboxes(node: &Node, filter: &PodSandboxFilter) -> Answer<Vec<PodSandbox>> {
    let request = StreamPodSandboxesRequest { filter: MessageField::some(filter.clone()), ..Default::default() };
    let messages: Answer<Vec<_>> = node.runtime().stream_pod_sandboxes(&request, SHORT)?.collect();
    Ok(messages?.into_iter().flat_map(|m| m.pod_sandboxes).collect())
}

fn containers(node: &Node, filter: &ContainerFilter) -> Answer<Vec<Container>> {
    let request = StreamContainersRequest { filter: MessageField::some(filter.clone()), ..Default::default() };
    let messages: Answer<Vec<_>> = node.runtime().stream_containers(&request, SHORT)?.collect();
    Ok(messages?.into_iter().flat_map(|m| m.containers).collect())
}

#[test]
fn they_are_the_lists() {
    let node = Node::start();
    assert!(sandboxes(&node, &PodSandboxFilter::default()).expect("stream").is_empty());
    assert!(containers(&node, &ContainerFilter::default()).expect("stream").is_empty());
    let labels = BTreeMap::from([("app".to_owned(), "x".to_owned())]);
    let mut config = node.sandbox_config("labelled");
    config.labels = labels.clone();
    let (a, b) = (node.run(&config).expect("run"), node.sandbox("other"));
    node.stop_sandbox(&b).expect("stop");
    let id = node.launch(&a, "app", "exec sleep 1000");
    let mut config = node.container_config("labelled", "true");
    config.labels = labels.clone();
    node.create(&a, &config).expect("create");
    let ready = PodSandboxStateValue { state: PodSandboxState::SANDBOX_READY.into(), ..Default::default() };
    for (filter, count) in [
        (PodSandboxFilter::default(), 2),
        (PodSandboxFilter { id: b[..12].into(), ..Default::default() }, 1),
        (PodSandboxFilter { state: MessageField::some(ready), ..Default::default() }, 1),
        (PodSandboxFilter { label_selector: labels.clone(), ..Default::default() }, 1),
        (PodSandboxFilter { id: b.clone(), label_selector: labels.clone(), ..Default::default() }, 0),
    ] {
        let request = ListPodSandboxRequest { filter: MessageField::some(filter.clone()), ..Default::default() };
        let list = node.runtime().list_pod_sandbox(&request, SHORT).expect("list").items;
        assert_eq!((list.len(), sandboxes(&node, &filter).expect("stream")), (count, list));
    }
    let running = ContainerStateValue { state: ContainerState::CONTAINER_RUNNING.into(), ..Default::default() };
    for (filter, count) in [
        (ContainerFilter::default(), 2),
        (ContainerFilter { pod_sandbox_id: a.clone(), ..Default::default() }, 2),
        (ContainerFilter { pod_sandbox_id: b.clone(), ..Default::default() }, 0),
        (ContainerFilter { id: id.clone(), pod_sandbox_id: a.clone(), ..Default::default() }, 1),
        (ContainerFilter { id: id.clone(), pod_sandbox_id: b.clone(), ..Default::default() }, 0),
        (ContainerFilter { id: id.clone(), pod_sandbox_id: "nothing".into(), ..Default::default() }, 0),
        (ContainerFilter { state: MessageField::some(running), ..Default::default() }, 1),
        (ContainerFilter { label_selector: labels.clone(), ..Default::default() }, 1),
    ] {
        let request = ListContainersRequest { filter: MessageField::some(filter.clone()), ..Default::default() };
        let list = node.runtime().list_containers(&request, SHORT).expect("list").containers;
        assert_eq!((list.len(), containers(&node, &filter).expect("stream")), (count, list));
    }
    let strange = PodSandboxStateValue { state: EnumOrUnknown::from_i32(77), ..Default::default() };
    refused(
        sandboxes(&node, &PodSandboxFilter { state: MessageField::some(strange), ..Default::default() }),
        Code::INVALID_ARGUMENT,
        "filter.state",
    );
    node.import("localhost/second:1", "two", serde_json::json!({}));
    let images = |image: &str| -> Vec<Image> {
        let spec = ImageSpec { image: image.into(), ..Default::default() };
        let filter = ImageFilter { image: MessageField::some(spec), ..Default::default() };
        let list = ListImagesRequest { filter: MessageField::some(filter.clone()), ..Default::default() };
        let list = node.images().list_images(&list, SHORT).expect("list").images;
        let (messages, error) = open::<_, StreamImagesResponse>(
            &node.config().socket,
            IMAGES,
            &StreamImagesRequest { filter: MessageField::some(filter), ..Default::default() },
        )
        .read_all();
        assert!(error.is_none());
        assert_eq!(messages.into_iter().flat_map(|m| m.images).collect::<Vec<_>>(), list);
        list
    };
    assert_eq!([images("").len(), images("localhost/second:1").len(), images("localhost/third:1").len()], [2, 1, 0]);
}

#[test]
fn stats_and_metrics_too() {
    let node = Node::start();
    let (a, b) = (node.sandbox("a"), node.sandbox("b"));
    let mut ids: Vec<String> = (0..4).map(|n| node.launch(&a, &format!("c{n}"), "exec sleep 1000")).collect();
    ids.push(node.launch(&b, "c", "exec sleep 1000"));
    node.wait_exit(&node.launch(&b, "ended", "exit 0"));
    let dirs: Vec<Dirs> = ids.iter().map(|id| Dirs::make(if ids[4] == *id { &b } else { &a }, id)).collect();
    ids.sort();
    let socket = &node.config().socket;
    for (filter, count) in [
        (ContainerStatsFilter::default(), 5),
        (ContainerStatsFilter { pod_sandbox_id: a.clone(), ..Default::default() }, 4),
        (ContainerStatsFilter { id: ids[0].clone(), ..Default::default() }, 1),
        (ContainerStatsFilter { id: "nothing".into(), ..Default::default() }, 0),
    ] {
        let request = ListContainerStatsRequest { filter: MessageField::some(filter.clone()), ..Default::default() };
        let listed = node.runtime().list_container_stats(&request, SHORT).expect("list").stats;
        let request = StreamContainerStatsRequest { filter: MessageField::some(filter), ..Default::default() };
        let (messages, error) =
            open::<_, StreamContainerStatsResponse>(socket, "/runtime.v1.RuntimeService/StreamContainerStats", &request).read_all();
        assert!(error.is_none());
        let streamed: Vec<ContainerStats> = messages.into_iter().flat_map(|m| m.container_stats).collect();
        let attributes = |stats: &[ContainerStats]| stats.iter().map(|s| s.attributes.clone()).collect::<Vec<_>>();
        assert_eq!((attributes(&streamed), streamed.len()), (attributes(&listed), count));
        assert!(streamed.iter().all(|s| s.cpu.timestamp > 0 && s.memory.is_some()));
    }
    for (filter, count) in [
        (PodSandboxStatsFilter::default(), 2),
        (PodSandboxStatsFilter { id: b.clone(), ..Default::default() }, 1),
        (PodSandboxStatsFilter { id: "nothing".into(), ..Default::default() }, 0),
    ] {
        let request = StreamPodSandboxStatsRequest { filter: MessageField::some(filter), ..Default::default() };
        let (messages, error) =
            open::<_, StreamPodSandboxStatsResponse>(socket, "/runtime.v1.RuntimeService/StreamPodSandboxStats", &request).read_all();
        assert!(error.is_none());
        let streamed: Vec<PodSandboxStats> = messages.into_iter().flat_map(|m| m.pod_sandbox_stats).collect();
        assert_eq!(streamed.len(), count);
        assert!(streamed.iter().filter(|s| s.attributes.id == a).all(|s| s.linux.containers.len() == 4));
    }
    let (messages, error) = open::<_, StreamPodSandboxMetricsResponse>(
        socket,
        "/runtime.v1.RuntimeService/StreamPodSandboxMetrics",
        &StreamPodSandboxMetricsRequest::default(),
    )
    .read_all();
    assert!(error.is_none());
    let streamed: Vec<PodSandboxMetrics> = messages.into_iter().flat_map(|m| m.pod_sandbox_metrics).collect();
    let mut containers: Vec<String> = streamed.iter().flat_map(|s| &s.container_metrics).map(|c| c.container_id.clone()).collect();
    containers.sort();
    assert_eq!((streamed.len(), containers), (2, ids));
    node.remove_sandbox(&a).expect("remove");
    node.remove_sandbox(&b).expect("remove");
    drop(dirs);
}

/// An id like no other.
fn seeded_id(n: usize) -> String {
    format!("feed{n:060x}")
}

/// Copies the records of a stopped sandbox and of an exited container, as the next daemon will find them; each sandbox holds one.
fn seed(node: &Node, sandbox: &str, container: &str) {
    let root = node.path("root");
    let read = |noun: &str, id: &str, end: &str| fs::read(root.join(noun).join(format!("{id}.{end}"))).expect("read a record");
    let json = |noun: &str, id: &str| String::from_utf8(read(noun, id, "json")).expect("JSON");
    let (sandbox_json, container_json) = (json("sandboxes", sandbox), json("containers", container));
    let mut sandbox_config = PodSandboxConfig::parse_from_bytes(&read("sandboxes", sandbox, "pb")).expect("a config");
    let container_config = read("containers", container, "pb");
    let write = |noun: &str, id: &str, json: String, config: &[u8]| {
        fs::write(root.join(noun).join(format!("{id}.json")), json).expect("write a record");
        fs::write(root.join(noun).join(format!("{id}.pb")), config).expect("write a config");
    };
    for n in 0..MANY {
        let (sandbox_id, container_id) = (seeded_id(n), seeded_id(MANY + n));
        sandbox_config.metadata.mut_or_insert_default().name = format!("seed-{n}");
        sandbox_config.annotations.insert("filling".into(), "x".repeat(300));
        let text = sandbox_json.replace(sandbox, &sandbox_id).replace("seed_default", &format!("seed-{n}_default"));
        write("sandboxes", &sandbox_id, text, &sandbox_config.write_to_bytes().expect("encode"));
        let text = container_json.replace(container, &container_id).replace(sandbox, &sandbox_id);
        write("containers", &container_id, text, &container_config);
    }
}

fn remove_seeds(node: &Node) {
    for n in 0..2 * MANY {
        for (noun, end) in [("sandboxes", "json"), ("sandboxes", "pb"), ("containers", "json"), ("containers", "pb")] {
            // Those that were removed by calls are gone.
            let _ = fs::remove_file(node.path("root").join(noun).join(format!("{}.{end}", seeded_id(n))));
        }
    }
}

/// All ids, each once, and no message beyond its limit.
fn checked<R: Message>(messages: Vec<R>, ids: impl Fn(R) -> Vec<String>) -> BTreeSet<String> {
    assert!(messages.len() > 3, "{} messages", messages.len());
    let largest = messages.iter().map(|m| m.compute_size()).max().unwrap_or_default();
    assert!(largest < 1 << 20, "{largest} bytes in a message");
    let mut seen = BTreeSet::new();
    for id in messages.into_iter().flat_map(ids) {
        assert!(seen.insert(id.clone()), "{id} came twice");
    }
    seen
}

#[test]
fn ten_thousand_while_some_are_removed() {
    let mut node = Node::with(Options { limits: "slow_threads = 8".into(), ..Default::default() });
    let sandbox = node.sandbox("seed");
    let container = node.launch(&sandbox, "app", "exit 0");
    node.wait_exit(&container);
    node.stop_sandbox(&sandbox).expect("stop");
    node.stop_daemon();
    seed(&node, &sandbox, &container);
    node.start_daemon();
    let socket = node.config().socket.clone();

    // The first message is there, and the rest waits for us while the world goes on.
    let mut stream: Unread<StreamPodSandboxesResponse> = open(&socket, SANDBOXES, &StreamPodSandboxesRequest::default());
    let first = stream.read();
    // An eighth of the workers may be held by slow readers: one.
    let (_, error) = open::<_, StreamContainersResponse>(&socket, CONTAINERS, &StreamContainersRequest::default()).read_all();
    assert_eq!(error.map(|e| e.code), Some(Code::RESOURCE_EXHAUSTED));
    let removed: BTreeSet<String> = (0..MANY).step_by(200).map(seeded_id).collect();
    removed.iter().for_each(|id| node.remove_sandbox(id).expect("remove"));
    let (mut messages, error) = stream.read_all();
    assert!(error.is_none());
    messages.insert(0, first);
    let seen = checked(messages, |m| m.pod_sandboxes.into_iter().map(|s| s.id).collect());
    assert_eq!(seen.len(), MANY + 1, "all of the moment at which it was asked for");
    assert!(seen.contains(&sandbox) && (0..MANY).all(|n| seen.contains(&seeded_id(n))));

    let mut stream: Unread<StreamContainersResponse> = open(&socket, CONTAINERS, &StreamContainersRequest::default());
    let first = stream.read();
    let kept = (0..MANY).filter(|n| !removed.contains(&seeded_id(*n)));
    let kept: BTreeSet<String> = kept.map(|n| seeded_id(MANY + n)).collect();
    let (some, rest): (Vec<_>, Vec<_>) = kept.iter().partition(|id| id.ends_with("11"));
    some.iter().for_each(|id| node.remove(id).expect("remove"));
    let (mut messages, error) = stream.read_all();
    assert!(error.is_none());
    messages.insert(0, first);
    let seen = checked(messages, |m| m.containers.into_iter().map(|c| c.id).collect());
    assert!(rest.iter().all(|id| seen.contains(*id)), "nothing that stayed is left out");
    assert!(removed.len() + seen.len() >= MANY && seen.contains(&container));

    // A client that goes in the middle gives its seat back.
    let mut stream: Unread<StreamPodSandboxesResponse> = open(&socket, SANDBOXES, &StreamPodSandboxesRequest::default());
    stream.read();
    drop(stream);
    eventually("the seat is free", || sandboxes(&node, &PodSandboxFilter::default()).ok());

    node.stop_daemon();
    remove_seeds(&node);
    node.start_daemon();
}
