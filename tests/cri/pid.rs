//! Sandboxes whose containers share a PID namespace: the init, and what its death means.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use protobuf::MessageField;
use serde_json::Value;

use crate::node::{alive, eventually, Node, Options};

/// The static shim: an init has an empty root, where no other program could start. CRISP_SHIM, else it is built now.
fn static_shim() -> PathBuf {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        if let Some(path) = std::env::var_os("CRISP_SHIM") {
            return PathBuf::from(path);
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let built = Command::new(root.join("scripts/build-shim")).status().expect("run scripts/build-shim");
        assert!(built.success(), "scripts/build-shim: {built}");
        root.join("target/crisp-shim")
    };
    SHIM.get_or_init(build).clone()
}

fn start() -> Node {
    Node::with(Options { shim: Some(static_shim()), ..Default::default() })
}

fn shared(mut config: PodSandboxConfig) -> PodSandboxConfig {
    let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
    config
}

fn shared_container(node: &Node, name: &str, script: &str) -> ContainerConfig {
    let mut config = node.container_config(name, script);
    let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
    config
}

/// The sandbox's init; 0 when it has none.
fn init(node: &Node, sandbox: &str) -> i32 {
    let request = PodSandboxStatusRequest { pod_sandbox_id: sandbox.into(), verbose: true, ..Default::default() };
    let answer = node.runtime().pod_sandbox_status(&request, SHORT).expect("status");
    let info: Value = serde_json::from_str(&answer.info["info"]).expect("info is JSON");
    info["pid"].as_i64().expect("a pid") as i32
}

fn state(node: &Node, sandbox: &str) -> PodSandboxState {
    node.sandbox_status(sandbox).expect("status").state.enum_value_or_default()
}

/// Where the container's spec says its PID namespace is.
fn pid_namespace(node: &Node, container: &str) -> Option<String> {
    let namespaces = node.spec(container)["linux"]["namespaces"].clone();
    let found = namespaces.as_array().expect("a list").iter().find(|n| n["type"] == "pid").cloned();
    found.and_then(|n| n["path"].as_str().map(str::to_owned))
}

#[test]
fn containers_join_the_init() {
    let mut node = start();
    let sandbox = node.run(&shared(node.sandbox_config("web"))).expect("run");
    let pid = init(&node, &sandbox);
    assert!(alive(pid));
    let join = node.create(&sandbox, &shared_container(&node, "app", "exec sleep 1000")).expect("create");
    assert_eq!(pid_namespace(&node, &join), Some(format!("/proc/{pid}/ns/pid")));
    let own = node.create(&sandbox, &node.container_config("own", "exec sleep 1000")).expect("create");
    assert_eq!(pid_namespace(&node, &own), None);
    node.start_container(&join).expect("start");
    node.restart();
    assert_eq!((init(&node, &sandbox), state(&node, &sandbox)), (pid, PodSandboxState::SANDBOX_READY));
    node.stop_sandbox(&sandbox).expect("stop");
    assert!(!alive(pid));
    assert_eq!(state(&node, &sandbox), PodSandboxState::SANDBOX_NOTREADY);
}

#[test]
fn the_pid_namespace_of_a_sandbox_may_be_the_hosts() {
    let node = start();
    let mut config = node.sandbox_config("web");
    let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().pid = NamespaceMode::NODE.into();
    let sandbox = node.run(&config).expect("run");
    let container = node.create(&sandbox, &shared_container(&node, "app", "exec sleep 1000")).expect("create");
    let namespaces = node.spec(&container)["linux"]["namespaces"].clone();
    let types: Vec<_> = namespaces.as_array().expect("a list").iter().map(|n| n["type"].as_str().expect("a type")).collect();
    assert!(!types.contains(&"pid") && types.contains(&"mount"), "{types:?}");
    assert_eq!(init(&node, &sandbox), 0, "and nothing is started for it");
}

#[test]
fn an_init_is_started_when_it_is_needed() {
    let node = start();
    let sandbox = node.sandbox("web");
    assert_eq!(init(&node, &sandbox), 0);
    let one = node.create(&sandbox, &shared_container(&node, "one", "exec sleep 1000")).expect("create");
    let pid = init(&node, &sandbox);
    assert!(alive(pid));
    let two = node.create(&sandbox, &shared_container(&node, "two", "exec sleep 1000")).expect("create");
    assert_eq!((pid_namespace(&node, &one), init(&node, &sandbox)), (pid_namespace(&node, &two), pid));
    node.remove_sandbox(&sandbox).expect("remove");
    assert!(!alive(pid));
}

#[test]
fn an_init_that_no_record_knows_is_ended() {
    let mut node = start();
    let sandbox = node.run(&shared(node.sandbox_config("web"))).expect("run");
    let pid = init(&node, &sandbox);
    node.stop_daemon();
    let path = node.path("root/sandboxes").join(format!("{sandbox}.json"));
    std::fs::write(&path, "{").expect("tear the record");
    assert!(alive(pid));
    node.start_daemon();
    assert!(node.sandbox_ids().is_empty());
    eventually("its init ends", || (!alive(pid)).then_some(()));
    // Both daemons are this process, whose child it stays; a dead daemon's goes to PID 1, which reaps.
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).expect("reap it");
}

#[test]
fn without_its_init_a_sandbox_is_not_ready() {
    let mut node = start();
    let sandbox = node.run(&shared(node.sandbox_config("web"))).expect("run");
    let kill = |pid| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill the init");
    kill(init(&node, &sandbox));
    eventually("the death is noticed", || (state(&node, &sandbox) == PodSandboxState::SANDBOX_NOTREADY).then_some(()));
    let other = node.run(&shared(node.sandbox_config("other"))).expect("run");
    let pid = init(&node, &other);
    node.stop_daemon();
    kill(pid);
    // The test's process is its parent, as no daemon would be.
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
    node.start_daemon();
    assert_eq!(state(&node, &other), PodSandboxState::SANDBOX_NOTREADY);
}

#[test]
fn nothing_said_means_a_shared_namespace() {
    let node = start();
    let mut config = node.sandbox_config("plain");
    config.linux = MessageField::none();
    config.log_directory.clear();
    let sandbox = node.run(&config).expect("run");
    assert!(alive(init(&node, &sandbox)));
    let mut container = node.container_config("bare", "exit 3");
    container.linux = MessageField::none();
    container.log_path.clear();
    let container = node.create(&sandbox, &container).expect("create");
    assert!(pid_namespace(&node, &container).is_some(), "what the sandbox was made for");
    node.start_container(&container).expect("start");
    assert_eq!(node.wait_exit(&container).exit_code, 3);
}
