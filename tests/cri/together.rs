//! Many things at the same time, and things that get in each other's way.

use std::time::Duration;

use crisp::api::runtime::*;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;

use crate::node::{refused, Node};

#[test]
fn many_lives_at_once() {
    let node = Node::start();
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let node = &node;
            scope.spawn(move || {
                for turn in 0..3 {
                    let name = format!("w{worker}-{turn}");
                    let sandbox = node.sandbox(&name);
                    let container = node.launch(&sandbox, "app", "echo up; exec sleep 1000");
                    assert_eq!(node.exec(&container, "echo well", 20).expect("exec").stdout, b"well\n");
                    node.stop(&container, 10).expect("stop");
                    assert_eq!(node.status(&container).expect("status").exit_code, 143);
                    node.remove(&container).expect("remove");
                    node.stop_sandbox(&sandbox).expect("stop");
                    node.remove_sandbox(&sandbox).expect("remove");
                }
            });
        }
    });
    assert!(node.sandbox_ids().is_empty() && node.container_ids().is_empty());
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn creates_and_starts_against_a_stop() {
    let node = Node::start();
    for turn in 0..4 {
        let sandbox = node.sandbox(&format!("s{turn}"));
        std::thread::scope(|scope| {
            for worker in 0..6 {
                let (node, sandbox) = (&node, &sandbox);
                scope.spawn(move || {
                    let created = node.create(sandbox, &node.container_config(&format!("c{worker}"), "exec sleep 1000"));
                    match created.and_then(|id| node.start_container(&id)) {
                        Ok(()) => {}
                        // Refused, or gone already with the removal.
                        Err(e) => assert!([Code::FAILED_PRECONDITION, Code::NOT_FOUND].contains(&e.code), "{e}"),
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(10 + 40 * turn));
            node.stop_sandbox(&sandbox).expect("stop");
        });
        for id in node.container_ids() {
            assert_ne!(node.state(&id), ContainerState::CONTAINER_RUNNING, "it runs in a stopped sandbox");
        }
        node.remove_sandbox(&sandbox).expect("remove");
        assert!(node.container_ids().is_empty());
    }
}

#[test]
fn stops_and_removals_of_one_sandbox() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let container = node.launch(&sandbox, "app", "exec sleep 1000");
    std::thread::scope(|scope| {
        for n in 0..12 {
            let (node, sandbox, container) = (&node, &sandbox, &container);
            scope.spawn(move || match n % 4 {
                0 => node.stop_sandbox(sandbox).expect("stop the sandbox"),
                1 => node.remove_sandbox(sandbox).expect("remove the sandbox"),
                2 => node.stop(container, 0).expect("stop"),
                _ => node.remove(container).expect("remove"),
            });
        }
    });
    assert!(node.sandbox_ids().is_empty() && node.container_ids().is_empty());
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn privileged_in_a_privileged_sandbox() {
    let node = Node::start();
    let mut config = node.sandbox_config("web");
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    let sandbox = node.run(&config).expect("run");
    let mut config = node.container_config("app", "exec sleep 1000");
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    let container = node.create(&sandbox, &config).expect("create");
    let spec = node.spec(&container);
    assert!(spec["linux"]["seccomp"].is_null() && spec["linux"]["maskedPaths"].as_array().is_none_or(Vec::is_empty));
    assert!(spec["linux"]["devices"].as_array().is_some_and(|devices| devices.iter().any(|d| d["path"] == "/dev/full")));
}

#[test]
fn mounts_are_resolved_and_propagation_is_checked() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let (place, link) = (node.path("place"), node.path("link"));
    std::fs::create_dir(&place).expect("make a directory");
    std::os::unix::fs::symlink(&place, &link).expect("link");
    crisp::sys::mount::tmpfs(&place, 1 << 20, 0o755, (0, 0)).expect("mount");
    crisp::sys::mount::make_private(&place).expect("make private");
    let with = |name: &str, propagation: MountPropagation| {
        let mut config = node.container_config(name, "exec sleep 1000");
        let (container_path, host_path) = ("/data".to_owned(), link.display().to_string());
        config.mounts.push(Mount { container_path, host_path, readonly: true, propagation: propagation.into(), ..Default::default() });
        node.create(&sandbox, &config)
    };
    let id = with("private", MountPropagation::PROPAGATION_PRIVATE).expect("create");
    let mounts = node.spec(&id)["mounts"].clone();
    let mount = mounts.as_array().expect("a list").iter().find(|m| m["destination"] == "/data").expect("the mount").clone();
    assert_eq!(mount["source"], place.display().to_string().as_str());
    assert!(mount["options"].as_array().expect("options").contains(&"ro".into()), "{mount}");
    let shown = node.status(&id).expect("status").mounts;
    assert_eq!(shown[0].host_path, link.display().to_string(), "as it was asked for");
    refused(with("slave", MountPropagation::PROPAGATION_HOST_TO_CONTAINER), Code::FAILED_PRECONDITION, "shared");
    refused(with("shared", MountPropagation::PROPAGATION_BIDIRECTIONAL), Code::FAILED_PRECONDITION, "shared");
    crisp::sys::mount::unmount(&place).expect("unmount");
}

#[test]
fn a_cgroup_parent_of_the_clients() {
    let node = Node::start();
    let parent = format!("/crisp-test-{}", std::process::id());
    let mut config = node.sandbox_config("web");
    config.linux.mut_or_insert_default().cgroup_parent.clone_from(&parent);
    let sandbox = node.run(&config).expect("run");
    let container = node.launch(&sandbox, "app", "exec sleep 1000");
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", node.pid(&container))).expect("read");
    assert!(cgroup.contains(&format!("{parent}/{container}")), "{cgroup}");
    node.remove_sandbox(&sandbox).expect("remove");
    // It is the client's: ours is only what was in it.
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").expect("list").flatten() {
        let dir = hierarchy.path().join(&parent[1..]);
        assert!(!dir.join(&container).exists());
        if dir.exists() {
            std::fs::remove_dir(&dir).expect("it is empty");
        }
    }
}

#[test]
fn names_need_not_be_file_names() {
    let node = Node::start();
    let mut config = node.sandbox_config("web");
    let metadata = config.metadata.mut_or_insert_default();
    (metadata.name, metadata.uid) = ("../../etc/ü".into(), "a/b".into());
    let sandbox = node.run(&config).expect("run");
    let mut config = node.container_config("app", "exit 0");
    config.metadata = MessageField::some(ContainerMetadata { name: "../x".into(), ..Default::default() });
    let container = node.create(&sandbox, &config).expect("create");
    node.start_container(&container).expect("start");
    assert_eq!(node.wait_exit(&container).exit_code, 0);
}
