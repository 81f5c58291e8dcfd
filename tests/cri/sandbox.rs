//! Sandboxes as clients know them: run, status, stop, remove, and what is idempotent.

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;
use serde_json::Value;

use crate::node::{refused, Node};

#[test]
fn from_run_to_remove() {
    let node = Node::start();
    let mut config = node.sandbox_config("web");
    config.hostname = "web-0".into();
    config.labels.insert("app".into(), "web".into());
    config.annotations.insert("note".into(), "line\nbreak".into());
    config.dns_config = MessageField::some(DNSConfig { servers: vec!["10.0.0.10".into()], ..Default::default() });
    config.port_mappings.push(PortMapping { container_port: 80, host_port: 8080, ..Default::default() });
    config.port_mappings.push(PortMapping { container_port: 81, ..Default::default() });
    let id = node.run(&config).expect("run");
    assert_eq!(id.len(), 64);

    let status = node.sandbox_status(&id).expect("status");
    assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_READY));
    assert_eq!((&status.metadata, &status.labels, &status.annotations), (&config.metadata, &config.labels, &config.annotations));
    assert_eq!(status.network.ip, "10.88.0.5");
    assert_eq!(status.network.additional_ips[0].ip, "fd00::5");
    assert!(status.created_at > 1_700_000_000_000_000_000, "{} is not in nanoseconds", status.created_at);
    let options = &status.linux.namespaces.options;
    assert_eq!(options.pid.enum_value(), Ok(NamespaceMode::CONTAINER));
    assert_eq!(options.userns_options.mode.enum_value(), Ok(NamespaceMode::NODE));

    let dir = node.path("run/sandboxes").join(&id);
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).expect(name);
    assert_eq!(read("resolv.conf"), "nameserver 10.0.0.10\n");
    assert_eq!(read("hostname"), "web-0\n");
    assert!(read("hosts").contains("10.88.0.5\tweb-0\n"), "{}", read("hosts"));

    assert_eq!(node.plugin_verbs(), ["first ADD", "second ADD", "third ADD"]);
    let line = &node.plugin_calls()[0];
    let netns = node.path("netns").join(format!("crisp-{id}"));
    assert!(line.starts_with(&format!("first ADD {id} eth0 {} ", netns.display())), "{line}");
    for argument in
        ["IgnoreUnknown=1", "K8S_POD_NAME=web", "K8S_POD_NAMESPACE=default", "K8S_POD_UID=uid-web", "K8S_POD_INFRA_CONTAINER_ID="]
    {
        assert!(line.contains(argument), "{argument} is not in {line}");
    }
    let ports = node.plugin_request("second.ADD")["runtimeConfig"]["portMappings"].clone();
    assert_eq!(ports, serde_json::json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]));
    assert!(node.runtime_calls().is_empty(), "a pinned sandbox needs no OCI runtime");

    node.stop_sandbox(&id).expect("stop");
    let status = node.sandbox_status(&id).expect("a stopped sandbox has a status");
    assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
    assert!(status.network.is_some());
    assert_eq!(node.plugin_verbs()[3..], ["third DEL", "second DEL", "first DEL"]);
    assert!(!netns.exists());
    node.stop_sandbox(&id).expect("stop again");
    assert_eq!(node.plugin_verbs().len(), 6, "the second stop finds no network");

    node.remove_sandbox(&id).expect("remove");
    refused(node.sandbox_status(&id), Code::NOT_FOUND, &id);
    node.remove_sandbox(&id).expect("remove again");
    node.stop_sandbox(&id).expect("stop one that is gone");
    assert_eq!(node.leftovers(), [""; 0]);
}

/// Its UTS namespace is the host's, whose name nobody changes.
#[test]
fn a_name_of_its_own_on_the_hosts_network() {
    let node = Node::start();
    let own = nix::unistd::gethostname().expect("a name").to_string_lossy().into_owned();
    for (asked, named) in [("web-0", "web-0"), ("", own.as_str())] {
        let mut config = node.sandbox_config(&format!("node{asked}"));
        config.hostname = asked.into();
        let options =
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
        options.network = NamespaceMode::NODE.into();
        let id = node.run(&config).expect("run");
        let text = std::fs::read_to_string(node.path("run/sandboxes").join(&id).join("hostname")).expect("hostname");
        assert_eq!(text.trim_end(), named);
        let container = node.container_config("app", "exec sleep 1000");
        let request = CreateContainerRequest {
            pod_sandbox_id: id,
            config: Some(container).into(),
            sandbox_config: Some(config).into(),
            ..Default::default()
        };
        let container = node.runtime().create_container(&request, SHORT).expect("create").container_id;
        let spec = node.spec(&container);
        let env = spec["process"]["env"].as_array().expect("a list").clone();
        assert!(env.contains(&Value::from(format!("HOSTNAME={named}"))) && spec["hostname"].is_null(), "{env:?}");
    }
    assert_eq!(nix::unistd::gethostname().expect("a name").to_string_lossy(), own);
}

#[test]
fn verbose_status_is_json() {
    let node = Node::start();
    let mut config = node.sandbox_config("web");
    config.annotations.insert("note".into(), "kept".into());
    let id = node.run(&config).expect("run");
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true, ..Default::default() };
    let answer = node.runtime().pod_sandbox_status(&request, SHORT).expect("status");
    let info: Value = serde_json::from_str(&answer.info["info"]).expect("info is JSON");
    assert_eq!(info["sandboxID"], id.as_str());
    let spec = &info["runtimeSpec"];
    let namespaces = spec["linux"]["namespaces"].as_array().expect("a list");
    let paths = ["network", "ipc", "uts"].map(|kind| namespaces.iter().find(|n| n["type"] == kind).expect(kind)["path"].clone());
    let pins = node.path("run/sandboxes").join(&id).join("ns");
    let expected = [node.path("netns").join(format!("crisp-{id}")), pins.join("ipc"), pins.join("uts")];
    assert_eq!(paths, expected.map(|path| Value::from(path.to_str().expect("text"))));
    assert!(namespaces.len() == 3, "{namespaces:?}");
    assert_eq!(spec["linux"]["cgroupsPath"], info["cgroupParent"]);
    assert_eq!(spec["annotations"]["io.kubernetes.cri.container-type"], "sandbox");
    assert_eq!((&spec["annotations"]["note"], &spec["annotations"]["io.kubernetes.cri.sandbox-id"]), (&"kept".into(), &id.as_str().into()));
    assert!(spec["hostname"].as_str().is_some_and(|name| !name.is_empty()) && spec["ociVersion"].is_string(), "{spec}");
    assert!(answer.containers_statuses.is_empty() && answer.timestamp > 0, "no containers, and a time at which that was so");
}

#[test]
fn removal_of_a_ready_sandbox_stops_it_with_its_containers() {
    let node = Node::start();
    let id = node.sandbox("web");
    let (one, two) = (node.launch(&id, "one", "exec sleep 1000"), node.launch_with_traps(&id, "two", "trap '' TERM"));
    node.stop_sandbox(&id).expect("stop");
    for container in [&one, &two] {
        assert_eq!(node.state(container), ContainerState::CONTAINER_EXITED);
    }
    node.remove_sandbox(&id).expect("remove");
    assert!(node.container_ids().is_empty());
    let other = node.sandbox("other");
    node.launch(&other, "three", "exec sleep 1000");
    node.remove_sandbox(&other).expect("remove without a stop");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn on_the_hosts_network_no_plugin_runs() {
    let node = Node::start();
    let mut config = node.sandbox_config("host");
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default().network =
        NamespaceMode::NODE.into();
    let id = node.run(&config).expect("run");
    assert_eq!(node.sandbox_status(&id).expect("status").network.ip, "");
    // A container says POD, because that is 0: it gets what the sandbox has.
    let container = node.launch(&id, "app", "exec sleep 1000");
    let namespaces = node.spec(&container)["linux"]["namespaces"].clone();
    assert!(!namespaces.to_string().contains("network"), "{namespaces}");
    node.remove_sandbox(&id).expect("remove");
    assert!(node.plugin_calls().is_empty());
}

#[test]
fn what_strictness_must_not_refuse() {
    let node = Node::start();
    let mut config = node.sandbox_config("ports");
    config.dns_config = MessageField::some(DNSConfig::default());
    let id = node.run(&config).expect("run");
    let resolv = node.path("run/sandboxes").join(&id).join("resolv.conf");
    assert_eq!(std::fs::read(resolv).expect("resolv.conf"), b"", "an empty dns_config counts");
    let mut container = node.container_config("bare", "exit 0");
    container.linux = MessageField::none();
    container.log_path.clear();
    let container = node.create(&id, &container).expect("create");
    node.start_container(&container).expect("start");
}

#[test]
fn the_handler_is_shown_as_it_was_asked_for() {
    let node = Node::start();
    let default = node.sandbox("default");
    assert_eq!(node.sandbox_status(&default).expect("status").runtime_handler, "");
    let named = node.run_with(&node.sandbox_config("named"), "second").expect("run");
    assert_eq!(node.sandbox_status(&named).expect("status").runtime_handler, "second");
    let container = node.launch(&named, "app", "exec sleep 1000");
    let calls = node.runtime_calls();
    let run = calls.iter().find(|c| c.verb == "run" && c.id == container).expect("the runtime ran it");
    assert!(run.args.contains(&node.path("run/runtime/second").display().to_string()), "{:?}", run.args);
}
