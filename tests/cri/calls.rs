//! Every method under every name: an empty request is answered by the code it must have, and what is not built says so.

use crisp::api::{self, runtime::*};
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;

use crate::node::{refused, run_request, Node};
use crate::raw::Raw;
use crate::subscriber::open;

/// Methods of this version that answer UNIMPLEMENTED with their name.
const NOT_BUILT: [&str; 3] = ["CheckpointContainer", "CheckpointPod", "RestorePod"];

/// The method whose answer has no end: events.rs has it.
const LASTS: [&str; 1] = ["GetContainerEvents"];

/// Methods for which an empty request is a question like any other.
const EMPTY_IS_FINE: [&str; 13] = [
    "Version",
    "Status",
    "RuntimeConfig",
    "UpdateRuntimeConfig",
    "ListPodSandbox",
    "ListContainers",
    "ListContainerStats",
    "ListPodSandboxStats",
    "ListImages",
    "ImageFsInfo",
    "StreamImages",
    "ListMetricDescriptors",
    "ListPodSandboxMetrics",
];

/// Methods for which an empty request is answered by an empty stream.
const NOTHING: [&str; 5] =
    ["StreamPodSandboxes", "StreamContainers", "StreamContainerStats", "StreamPodSandboxStats", "StreamPodSandboxMetrics"];

#[test]
fn empty_requests_of_every_method_under_both_names() {
    let node = Node::start();
    let raw = Raw::connect(&node.config().socket);
    for rpc in api::RPCS.iter().filter(|rpc| rpc.service != "Admin") {
        assert_eq!(rpc.paths.len(), 2);
        for path in rpc.paths {
            // Messages without fields of their own: whatever comes is an unknown field.
            if LASTS.contains(&rpc.method) {
                continue;
            }
            if NOTHING.contains(&rpc.method) {
                // A unary call could not take no message.
                let (messages, error) =
                    open::<_, StopPodSandboxResponse>(&node.config().socket, path, &VersionRequest::default()).read_all();
                assert!(messages.is_empty() && error.is_none(), "{path}");
                continue;
            }
            let answer = raw.call::<_, StopPodSandboxResponse>(path, &VersionRequest::default());
            if EMPTY_IS_FINE.contains(&rpc.method) {
                answer.unwrap_or_else(|e| panic!("{path}: {e}"));
                continue;
            }
            let error = answer.expect_err(path);
            if NOT_BUILT.contains(&rpc.method) {
                assert_eq!(error.code, Code::UNIMPLEMENTED, "{path}: {error}");
                assert!(error.message.contains(rpc.method), "{path}: {error}");
            } else {
                assert_eq!(error.code, Code::INVALID_ARGUMENT, "{path}: {error}");
            }
        }
    }
    let strange = raw.call::<_, StopPodSandboxResponse>("/runtime.v1.RuntimeService/NoSuchMethod", &VersionRequest::default());
    refused(strange, Code::UNIMPLEMENTED, "");
}

#[test]
fn a_kubelet_of_v1alpha2_runs_a_sandbox() {
    let node = Node::start();
    let raw = Raw::connect(&node.config().socket);
    let version: VersionResponse = raw.call("/runtime.v1alpha2.RuntimeService/Version", &VersionRequest::default()).expect("version");
    assert_eq!(version.version, "0.1.0");
    let config = node.sandbox_config("old");
    let ran: RunPodSandboxResponse = raw.call("/runtime.v1alpha2.RuntimeService/RunPodSandbox", &run_request(&config, "")).expect("run");
    assert_eq!(node.sandbox_ids(), [ran.pod_sandbox_id.clone()]);
    let request = StopPodSandboxRequest { pod_sandbox_id: ran.pod_sandbox_id, ..Default::default() };
    let _: StopPodSandboxResponse = raw.call("/runtime.v1alpha2.RuntimeService/StopPodSandbox", &request).expect("stop");
}

#[test]
fn unknown_ids() {
    let node = Node::start();
    let id = "0123456789abcdef";
    let runtime = node.runtime();
    node.stop_sandbox(id).expect("gone is stopped");
    node.remove_sandbox(id).expect("gone is removed");
    node.stop(id, 1).expect("gone is stopped");
    node.remove(id).expect("gone is removed");
    refused(node.sandbox_status(id), Code::NOT_FOUND, id);
    refused(node.status(id), Code::NOT_FOUND, id);
    refused(node.start_container(id), Code::NOT_FOUND, id);
    refused(node.exec(id, "true", 1), Code::NOT_FOUND, id);
    refused(node.create(id, &node.container_config("a", "true")), Code::NOT_FOUND, id);
    let update = UpdateContainerResourcesRequest { container_id: id.into(), ..Default::default() };
    refused(runtime.update_container_resources(&update, SHORT), Code::NOT_FOUND, id);
    let reopen = ReopenContainerLogRequest { container_id: id.into(), ..Default::default() };
    refused(runtime.reopen_container_log(&reopen, SHORT), Code::NOT_FOUND, id);
}

#[test]
fn ids_by_prefix() {
    let node = Node::start();
    // Seventeen ids: two of them begin alike.
    let ids: Vec<String> = (0..17).map(|n| node.sandbox(&format!("s{n}"))).collect();
    let twice = ids.iter().find(|a| ids.iter().any(|b| a != &b && a[..1] == b[..1])).expect("16 hex digits");
    refused(node.sandbox_status(&twice[..1]), Code::INVALID_ARGUMENT, "ambiguous");
    refused(node.stop_sandbox(&twice[..1]), Code::INVALID_ARGUMENT, "ambiguous");
    assert_eq!(node.sandbox_status(&ids[0][..32]).expect("a unique prefix").id, ids[0]);
    let container = node.launch(&ids[0], "app", "exec sleep 1000");
    assert_eq!(node.status(&container[..32]).expect("a unique prefix").id, container);
    refused(node.status("app"), Code::NOT_FOUND, "app");
    refused(node.sandbox_status("s0"), Code::NOT_FOUND, "s0");
    node.stop(&container[..32], 0).expect("stop by prefix");
    node.remove_sandbox(&ids[0][..32]).expect("remove by prefix");
    refused(node.sandbox_status(&ids[0]), Code::NOT_FOUND, "");
}

#[test]
fn requests_of_more_than_the_usual_four_mebibytes() {
    let node = Node::start();
    let mut config = node.sandbox_config("large");
    config.annotations.insert("big".into(), "x".repeat(20 << 20));
    let id = node.run(&config).expect("run");
    assert_eq!(node.sandbox_status(&id).expect("status").annotations, config.annotations);
}
