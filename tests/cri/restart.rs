//! A daemon that ends, and the next one on the same directories. (Being killed in the middle of a step is tested in tests/host.)

use std::fs;
use std::os::unix::net::UnixListener;

use crisp::api::runtime::*;
use crisp::config::Config;
use grpcio::RpcStatusCode as Code;

use crate::node::{self, alive, eventually, refused, Node};

/// Changes the status in a record, as a daemon that was killed could have left it.
fn edit_record(node: &Node, noun: &str, id: &str, key: &str, value: serde_json::Value) {
    let path = node.path("root").join(noun).join(format!("{id}.json"));
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).expect("read the record")).expect("JSON");
    assert!(record["record"]["status"].get(key).is_some(), "{record}");
    record["record"]["status"][key] = value;
    fs::write(&path, record.to_string()).expect("write the record");
}

#[test]
fn everything_comes_back() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let running = node.launch(&sandbox, "running", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done");
    let exited = node.launch(&sandbox, "exited", "exit 6");
    let created = node.create(&sandbox, &node.container_config("created", "exec sleep 1000")).expect("create");
    node.wait_exit(&exited);
    let (pid, before) = (node.pid(&running), [&running, &exited, &created].map(|id| node.status(id).expect("status")));
    let sandbox_before = node.sandbox_status(&sandbox).expect("status");
    node.restart();
    assert_eq!(node.sandbox_status(&sandbox).expect("status"), sandbox_before);
    assert_eq!([&running, &exited, &created].map(|id| node.status(id).expect("status")), before);
    assert_eq!(node.pid(&running), pid);
    assert!(alive(pid));
    assert_eq!(node.plugin_calls().len(), 3, "no network was touched");
    assert_eq!(node.exec(&running, "echo well", 20).expect("exec").stdout, b"well\n");
    node.start_container(&created).expect("start");
    node.stop(&running, 0).expect("stop");
    let log = fs::read_to_string(node.path("logs/web/running.log")).expect("the log");
    let numbers: Vec<u32> = log.lines().map(|l| l.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number")).collect();
    assert_eq!(numbers, (1..=numbers.len() as u32).collect::<Vec<_>>(), "the log has a gap");
    node.remove_sandbox(&sandbox).expect("remove");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn exits_meanwhile_are_told_with_their_time() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let script = format!("while [ ! -f {}/go ]; do sleep 0.02; done; exit 9", node.path("").display());
    let id = node.launch(&sandbox, "app", &script);
    let pid = node.pid(&id);
    node.stop_daemon();
    fs::write(node.path("go"), "").expect("write");
    eventually("it ends", || (!alive(pid)).then_some(()));
    let record = node.path("run/containers").join(&id).join("exit");
    eventually("the shim has written it down", || record.exists().then_some(()));
    let ended = crisp::store::now_ns();
    node.start_daemon();
    let status = node.wait_exit(&id);
    assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
    assert!(status.finished_at <= ended, "its own time, not that of the daemon's start");
}

/// The shim has told the end before anybody watched; the OCI runtime's delete, with hooks in it, may take long.
#[test]
fn an_end_before_the_watch_is_told_at_once() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let script = format!("while [ ! -f {}/go ]; do sleep 0.02; done; exit 9", node.path("").display());
    let mut config = node.container_config("app", &script);
    let gate = node.path("gate");
    fs::write(&gate, "").expect("close the gate");
    config.envs.push(KeyValue { key: "FAKE_DELETE".into(), value: format!("gate {}", gate.display()).into(), ..Default::default() });
    let id = node.create(&sandbox, &config).expect("create");
    node.start_container(&id).expect("start");
    let dir = node.path("run/containers").join(&id);
    node.stop_daemon();
    fs::write(node.path("go"), "").expect("write");
    eventually("it ends", || dir.join("exit").exists().then_some(()));
    node.start_daemon();
    let status = node.wait_exit(&id);
    assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
    assert!(dir.join("shim.sock").exists(), "told only by the end of the shim");
    fs::remove_file(&gate).expect("open the gate");
    node.remove(&id).expect("remove, once the shim is done");
}

#[test]
fn a_shim_that_died_meanwhile() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let pid = node.pid(&id);
    node.stop_daemon();
    let (shim, _) =
        node.processes().into_iter().find(|(_, args)| args.contains("crisp-shim") || args.contains(" container ")).expect("a shim");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).expect("kill the shim");
    node.start_daemon();
    let status = node.wait_exit(&id);
    assert_ne!(status.exit_code, 0);
    assert!(!status.reason.is_empty());
    eventually("the container is killed", || (!alive(pid)).then_some(()));
}

#[test]
fn a_shim_that_dies_takes_its_container_along() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let pid = node.pid(&id);
    let (shim, _) = node.processes().into_iter().find(|(_, args)| args.contains(" container ")).expect("a shim");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).expect("kill the shim");
    let status = node.wait_exit(&id);
    assert!(status.exit_code != 0 && !status.message.is_empty(), "{status}");
    assert!(!alive(pid));
    node.remove(&id).expect("remove");
}

/// A shim that could not write its exit record has told the end all the same: nothing about it changes when the shim goes.
#[test]
fn an_end_that_was_told_stays_without_a_record() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let script = format!("while [ ! -f {}/go ]; do sleep 0.02; done", node.path("").display());
    let id = node.launch(&sandbox, "app", &script);
    // Nothing can be renamed over it.
    fs::create_dir(node.path("run/containers").join(&id).join("exit")).expect("make a directory");
    fs::write(node.path("go"), "").expect("write");
    let told = node.wait_exit(&id);
    assert_eq!((told.exit_code, told.reason.as_str()), (0, "Completed"));
    // Its shim has deleted it, and then the daemon, which found no record.
    let deletes = || node.runtime_calls().iter().filter(|call| call.id == id && call.verb == "delete").count();
    eventually("the daemon cleans up", || (deletes() == 2).then_some(()));
    // The removal waits for whoever cleans up.
    let watched = std::thread::scope(|scope| {
        let removal = scope.spawn(|| node.remove(&id));
        let mut seen = Vec::new();
        while let Ok(status) = node.status(&id) {
            seen.push(status);
        }
        removal.join().expect("no panic").expect("remove");
        seen
    });
    let changed = watched.iter().find(|status| **status != told);
    assert_eq!(changed, None, "of {} looks", watched.len());
}

/// A stop finds the shim gone while the exits thread has found that too: one of them cleans up, and nobody tells of a container that is removed.
#[test]
fn a_shim_that_died_is_buried_once() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let deletes = || node.runtime_calls().iter().filter(|call| call.id == id && call.verb == "delete").count();
    node.switch("delete", "slow 2");
    let (shim, _) = node.processes().into_iter().find(|(_, args)| args.contains(" container ")).expect("a shim");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).expect("kill the shim");
    eventually("the daemon cleans up", || (deletes() == 1).then_some(()));
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| node.stop(&id, 0));
        let status = node.wait_exit(&id);
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "ShimDied"));
        node.remove(&id).expect("remove");
        stop.join().expect("no panic").expect("stop");
    });
    assert_eq!(deletes(), 1);
    assert_eq!(fs::read_dir(node.path("root/containers")).expect("list").count(), 0, "a record came back");
}

#[test]
fn what_was_half_made_is_undone() {
    let mut node = Node::start();
    let (kept, half) = (node.sandbox("kept"), node.sandbox("half"));
    let container = node.create(&kept, &node.container_config("app", "true")).expect("create");
    node.stop_daemon();
    edit_record(&node, "sandboxes", &half, "phase", "making".into());
    edit_record(&node, "containers", &container, "state", "making".into());
    node.start_daemon();
    assert_eq!(node.sandbox_ids(), [kept.clone()]);
    assert!(node.container_ids().is_empty());
    let dels: Vec<_> = node.plugin_calls().into_iter().filter(|c| c.contains(" DEL ")).collect();
    assert!(dels.len() == 3 && dels.iter().all(|line| line.contains(&half)), "{dels:?}");
    // Their names are free.
    node.create(&kept, &node.container_config("app", "true")).expect("create");
    node.sandbox("half");
}

#[test]
fn what_no_record_knows_is_swept() {
    let mut node = Node::start();
    let id = node.sandbox("web");
    let container = node.create(&id, &node.container_config("app", "true")).expect("create");
    node.stop_daemon();
    for (noun, id) in [("sandboxes", &id), ("containers", &container)] {
        for end in ["json", "pb"] {
            fs::remove_file(node.path("root").join(noun).join(format!("{id}.{end}"))).expect("remove the record");
        }
    }
    node.start_daemon();
    assert!(node.sandbox_ids().is_empty() && node.container_ids().is_empty());
    assert_eq!(node.plugin_verbs()[3..], ["third DEL", "second DEL", "first DEL"]);
    assert_eq!(node.leftovers(), [""; 0]);
}

/// What cannot be removed keeps no daemon from starting: the plugin that is missing may be one that a sandbox is to install.
#[test]
fn leftovers_that_stay_are_tried_again_by_the_next_daemon() {
    let mut node = Node::start();
    let (lost, kept) = (node.sandbox("lost"), node.sandbox("kept"));
    node.stop_daemon();
    for end in ["json", "pb"] {
        fs::remove_file(node.path("root/sandboxes").join(format!("{lost}.{end}"))).expect("remove the record");
    }
    node.plugin_switch("first.DEL", "fail 100 'not now' ''");
    node.start_daemon();
    assert_eq!(node.sandbox_ids(), [kept.clone()]);
    let before = node.plugin_calls().len();
    node.plugin_switch("first.DEL", "");
    node.restart();
    assert_eq!(node.sandbox_ids(), [kept]);
    let again = node.plugin_calls()[before..].to_vec();
    assert!(again.iter().any(|call| call.starts_with("first DEL") && call.contains(&lost)), "{again:?}");
}

#[test]
fn a_torn_record_is_set_aside() {
    let mut node = Node::start();
    let (torn, kept) = (node.sandbox("torn"), node.sandbox("kept"));
    node.stop_daemon();
    let path = node.path("root/sandboxes").join(format!("{torn}.json"));
    let text = fs::read(&path).expect("read");
    fs::write(&path, &text[..text.len() / 2]).expect("tear");
    node.start_daemon();
    assert_eq!(node.sandbox_ids(), [kept]);
    let aside: Vec<_> = fs::read_dir(node.path("root/quarantine")).expect("list").flatten().map(|e| e.file_name()).collect();
    assert!(aside.iter().any(|name| name.to_string_lossy().contains(&torn)), "{aside:?}");
    // What it had is gone, and its name is free.
    assert!(!node.path("netns").join(format!("crisp-{torn}")).exists());
    node.sandbox("torn");
}

#[test]
fn a_lost_namespace_makes_a_sandbox_not_ready() {
    let mut node = Node::start();
    let id = node.sandbox("web");
    node.stop_daemon();
    crisp::sys::namespace::unpin(&node.path("netns").join(format!("crisp-{id}"))).expect("unpin");
    node.start_daemon();
    let status = node.sandbox_status(&id).expect("status");
    assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
    refused(node.create(&id, &node.container_config("app", "true")), Code::FAILED_PRECONDITION, "network namespace");
    node.remove_sandbox(&id).expect("remove");
}

#[test]
fn a_teardown_that_failed_is_tried_again_after_a_restart() {
    let mut node = Node::start();
    let id = node.sandbox("web");
    node.plugin_switch("first.DEL", "fail 100 'not now' ''");
    refused(node.stop_sandbox(&id), Code::INTERNAL, "not now");
    node.restart();
    assert_eq!(node.sandbox_status(&id).expect("status").state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
    node.plugin_switch("first.DEL", "");
    node.remove_sandbox(&id).expect("remove");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn one_daemon_per_directory_and_per_socket() {
    let mut node = Node::start();
    let again = crisp::daemon::Daemon::start(node.config()).err().expect("a second daemon");
    assert!(again.message().contains("another"), "{again}");
    let mut other = Config { root: node.path("root2"), run: node.path("run2"), ..node.config().clone() };
    other.cni.cache_dir = node.path("cache2");
    let again = crisp::daemon::Daemon::start(&other).err().expect("a second daemon on the socket");
    assert!(again.message().contains("another daemon lives on it"), "{again}");
    node.sandbox("web");
    node.stop_daemon();
    // A socket that nobody listens on is replaced.
    let socket = node.config().socket.clone();
    drop(UnixListener::bind(&socket).expect("bind"));
    assert!(socket.exists());
    node.start_daemon();
    assert_eq!(node.sandbox_ids().len(), 1);
    node.stop_daemon();
    fs::write(&socket, "something else").expect("write");
    let error = node::start(node.config()).err().expect("not a socket");
    assert!(error.message().contains("not a socket"), "{error}");
    assert_eq!(fs::read(&socket).expect("it is still there"), b"something else");
    fs::remove_file(&socket).expect("remove");
    node.start_daemon();
}

#[test]
fn the_socket_is_roots_alone() {
    use std::os::unix::fs::PermissionsExt;
    let node = Node::start();
    let mode = |path: &std::path::Path| fs::metadata(path).expect("stat").permissions().mode() & 0o777;
    assert_eq!(mode(&node.config().socket), 0o600);
    assert_eq!(mode(&node.path("run")) & 0o066, 0);
    assert_eq!(mode(&node.path("root")) & 0o066, 0);
}
