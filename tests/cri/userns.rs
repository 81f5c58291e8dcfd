//! Sandboxes with a user namespace: what is pinned, what the OCI runtime is told, what comes back after a restart.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use crisp::snapshot::{Attributes, Kind, Mapping, Owners, Snapshotter};
use crisp::sys::idmap::{IdMap, IdMaps};
use crisp::sys::namespace::is_pinned;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;
use serde_json::json;

use crate::node::{refused, users, Node, Options};

const UID: u32 = 100_000;
const GID: u32 = 200_000;
const UIDS: &[(u32, u32, u32)] = &[(0, UID, 65536)];
const GIDS: &[(u32, u32, u32)] = &[(0, GID, 65536)];

fn options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default()
}

fn config(node: &Node, name: &str) -> PodSandboxConfig {
    let mut config = node.sandbox_config(name);
    options(&mut config).userns_options = MessageField::some(users(UIDS, GIDS));
    config
}

fn sandbox(node: &Node, name: &str) -> String {
    node.run(&config(node, name)).expect("run")
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (meta.uid(), meta.gid())
}

#[test]
fn a_sandbox_of_other_users() {
    let mut node = Node::start();
    let mut asked = config(&node, "web");
    asked.hostname = "web-0".into();
    asked.linux.mut_or_insert_default().sysctls.insert("kernel.shmmax".into(), "12345678".into());
    let id = node.run(&asked).expect("run");
    let dir = node.path("run/sandboxes").join(&id);
    for pin in ["ns/user", "ns/ipc", "ns/uts"] {
        assert!(is_pinned(&dir.join(pin)), "{pin}");
    }
    let status = node.sandbox_status(&id).expect("status");
    assert_eq!(status.linux.namespaces.options.userns_options, options(&mut asked).userns_options);
    for file in ["hosts", "hostname", "resolv.conf", "shm"] {
        assert_eq!(owner(&dir.join(file)), (UID, GID), "{file}");
    }
    // Made inside: the sysctl and the name are the sandbox's, and CNI has found its network.
    let ipc = dir.join("ns/ipc");
    let shmmax = crisp::sys::namespace::in_netns(&ipc, || Ok(fs::read_to_string("/proc/sys/kernel/shmmax").expect("read"))).expect("enter");
    assert_eq!(shmmax.trim(), "12345678");
    let uts = dir.join("ns/uts");
    let name = crisp::sys::namespace::in_netns(&uts, || Ok(nix::unistd::gethostname().expect("a name"))).expect("enter");
    assert_eq!(name, "web-0");
    assert_eq!(node.plugin_verbs(), ["first ADD", "second ADD", "third ADD"]);

    node.restart();
    assert_eq!(node.sandbox_status(&id).expect("status").state.enum_value(), Ok(PodSandboxState::SANDBOX_READY));
    node.stop_sandbox(&id).expect("stop");
    assert!(!dir.join("ns/user").exists());
    node.remove_sandbox(&id).expect("remove");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_container_joins_and_its_files_are_the_users() {
    let node = Node::start();
    let id = sandbox(&node, "web");
    let mut config = node.container_config("app", "exec sleep 1000");
    let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    context.namespace_options.mut_or_insert_default().userns_options = MessageField::some(users(UIDS, GIDS));
    let container = node.create(&id, &config).expect("create");
    let spec = node.spec(&container);
    let pin = node.path("run/sandboxes").join(&id).join("ns/user");
    // runc 1.1 needs the maps beside the path; the others take them when they are equal.
    assert!(spec["linux"]["namespaces"].as_array().expect("a list").contains(&json!({"type": "user", "path": pin})), "{spec}");
    assert_eq!(spec["linux"]["uidMappings"], json!([{"containerID": 0, "hostID": UID, "size": 65536}]));
    assert_eq!(spec["linux"]["gidMappings"], json!([{"containerID": 0, "hostID": GID, "size": 65536}]));

    let dir = node.path("run/containers").join(&container);
    assert_eq!((owner(&dir), fs::metadata(&dir).expect("stat").permissions().mode() & 0o777), ((0, GID), 0o710));
    assert_eq!(owner(&dir.join("rootfs")), (UID, GID));
    let mut seen = 0;
    for entry in fs::read_dir(dir.join("rootfs")).expect("list").flatten() {
        assert_eq!(owner(&entry.path()), (UID, GID), "{}", entry.path().display());
        seen += 1;
    }
    assert!(seen > 0, "the image has files");
    // Nothing said is the sandbox's.
    let mut silent = node.container_config("silent", "true");
    silent.linux = MessageField::none();
    let silent = node.create(&id, &silent).expect("create");
    assert_eq!(node.spec(&silent)["linux"]["uidMappings"][0]["hostID"], UID);
}

#[test]
fn a_container_must_say_what_its_sandbox_said() {
    let node = Node::start();
    let (mapped, plain) = (sandbox(&node, "mapped"), node.sandbox("plain"));
    let with = |users: UserNamespace| {
        let mut config = node.container_config("app", "true");
        let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().userns_options = MessageField::some(users);
        config
    };
    let node_mode = || UserNamespace { mode: NamespaceMode::NODE.into(), ..Default::default() };
    let field = "namespace_options.userns_options";
    refused(node.create(&mapped, &with(node_mode())), Code::INVALID_ARGUMENT, field);
    refused(node.create(&mapped, &with(users(&[(0, UID + 1, 65536)], GIDS))), Code::INVALID_ARGUMENT, field);
    refused(node.create(&plain, &with(users(UIDS, GIDS))), Code::INVALID_ARGUMENT, field);
    let wrong = UserNamespace { mode: NamespaceMode::TARGET.into(), ..Default::default() };
    refused(node.create(&plain, &with(wrong)), Code::INVALID_ARGUMENT, "userns_options.mode");
    node.create(&plain, &with(node_mode())).expect("the host's users, said");
}

#[test]
fn volumes_get_other_owners() {
    let mut node = Node::start();
    let (mapped, plain) = (sandbox(&node, "mapped"), node.sandbox("plain"));
    let volume = node.path("volume");
    fs::create_dir(&volume).expect("make the volume");
    fs::write(volume.join("file"), "kept").expect("write");
    std::os::unix::fs::chown(volume.join("file"), Some(7), Some(8)).expect("chown");
    let mapping = |host_id| vec![IDMapping { host_id, length: 65536, ..Default::default() }];
    let mount = |path: &str, host: &Path, uid: u32, gid: u32| Mount {
        container_path: path.into(),
        host_path: host.display().to_string(),
        uidMappings: mapping(uid),
        gidMappings: mapping(gid),
        ..Default::default()
    };
    for (sandbox, uid) in [(&mapped, UID), (&mapped, 300_000), (&plain, 400_000)] {
        let mut config = node.container_config(&format!("app{uid}"), "true");
        config.mounts = vec![
            mount("/data", &volume, uid, GID),
            mount("/file", &volume.join("file"), uid, GID),
            Mount { container_path: "/plain".into(), host_path: volume.display().to_string(), ..Default::default() },
        ];
        let container = node.create(sandbox, &config).expect("create");
        let spec = node.spec(&container);
        let source = |path: &str| {
            let mounts = spec["mounts"].as_array().expect("a list").clone();
            let found = mounts.into_iter().find(|m| m["destination"] == path).expect("the mount");
            found["source"].as_str().expect("a source").to_owned()
        };
        assert_eq!(owner(&Path::new(&source("/data")).join("file")), (uid + 7, GID + 8));
        assert_eq!(owner(Path::new(&source("/file"))), (uid + 7, GID + 8));
        assert_eq!(source("/plain"), volume.display().to_string());
        assert_eq!(node.status(&container).expect("status").mounts, config.mounts, "as they were asked for");
        // Who writes as the mapped root leaves files of root.
        let inside = Path::new(&source("/data")).join(format!("new{uid}"));
        fs::write(&inside, "").expect_err("host root has no id there");
        node.restart();
        node.remove(&container).expect("remove");
        assert!(!Path::new(&source("/data")).exists());
    }
    assert_eq!(fs::read_to_string(volume.join("file")).expect("the volume's files stay"), "kept");
}

#[test]
fn a_failed_create_takes_its_mounts_away() {
    let node = Node::start();
    let id = sandbox(&node, "web");
    let volume = node.path("volume");
    fs::create_dir(&volume).expect("make the volume");
    fs::write(volume.join("file"), "kept").expect("write");
    let mapped = |path: &str, host: &Path| Mount {
        container_path: path.into(),
        host_path: host.display().to_string(),
        uidMappings: vec![IDMapping { host_id: UID, length: 65536, ..Default::default() }],
        gidMappings: vec![IDMapping { host_id: GID, length: 65536, ..Default::default() }],
        ..Default::default()
    };
    let mut config = node.container_config("app", "true");
    // The second cannot be mapped; then the spec cannot be built.
    config.mounts = vec![mapped("/data", &volume), mapped("/bad", Path::new("/proc/sys"))];
    refused(node.create(&id, &config), Code::FAILED_PRECONDITION, "mount /bad");
    config.mounts.pop();
    config.envs = vec![KeyValue { key: "a=b".into(), ..Default::default() }];
    refused(node.create(&id, &config), Code::INVALID_ARGUMENT, "envs");
    let table = fs::read_to_string("/proc/self/mountinfo").expect("read");
    let containers = node.path("run/containers").display().to_string();
    assert!(!table.contains(&containers), "{table}");
    assert_eq!(fs::read_dir(node.path("run/containers")).expect("list").count(), 0);
    assert_eq!(fs::read_to_string(volume.join("file")).expect("the volume's files stay"), "kept");
}

#[test]
fn copies_get_other_owners() {
    for top in ["snapshotter = \"copy\"\n", "userns_rootfs = \"chown\"\n"] {
        let node = Node::with(Options { top: top.into(), ..Default::default() });
        let id = sandbox(&node, "web");
        let container = node.create(&id, &node.container_config("app", "true")).expect("create");
        let rootfs = node.path("run/containers").join(&container).join("rootfs");
        assert_eq!(owner(&rootfs), (UID, GID), "{top}");
        for entry in fs::read_dir(&rootfs).expect("list").flatten() {
            assert_eq!(owner(&entry.path()), (UID, GID), "{top}{}", entry.path().display());
        }
        node.remove(&container).expect("remove");
        assert_eq!(fs::read_dir(node.path("root/snapshots")).expect("list").count(), 0);
    }
}

/// ramfs cannot show its files with other owners.
#[test]
fn layers_that_cannot_be_mapped_are_copied_or_refused() {
    let map = |host| IdMap { container: 0, host, length: 65536 };
    let maps = IdMaps { uids: map(UID), gids: map(GID) };
    let shim = Path::new(env!("CARGO_BIN_EXE_crisp-shim"));
    let namespace = crisp::sys::pin::open_mapped(shim, &[maps.uids], &[maps.gids]).expect("make a user namespace");
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&namespace));
    let owners = Owners { maps, namespace: Path::new(&path) };
    let attributes = Attributes { owners: Some(&owners), ..Default::default() };

    let dir = tempfile::tempdir().expect("make a directory");
    let (layer, target) = (dir.path().join("layer"), dir.path().join("rootfs"));
    fs::create_dir(&layer).expect("make the layer");
    nix::mount::mount(Some("layer"), &layer, Some("ramfs"), nix::mount::MsFlags::empty(), None::<&str>).expect("mount");
    fs::write(layer.join("file"), "text").expect("write");
    let mut snapshots = Snapshotter::new(dir.path(), Kind::Overlay).expect("make the snapshotter");
    snapshots.set_mapping(Mapping::Idmap);
    let error = snapshots.prepare("c1", std::slice::from_ref(&layer), &target, attributes).expect_err("refused");
    assert!(error.code() == crisp::error::Code::FailedPrecondition && error.message().contains("userns_rootfs"), "{error}");
    assert!(snapshots.list().expect("list").is_empty());
    snapshots.set_mapping(Mapping::Auto);
    snapshots.prepare("c1", std::slice::from_ref(&layer), &target, attributes).expect("a copy");
    assert_eq!((owner(&target), owner(&target.join("file"))), ((UID, GID), (UID, GID)));
    assert_eq!(owner(&layer.join("file")), (0, 0));
    snapshots.remove("c1", &target).expect("remove");
    crisp::sys::mount::unmount(&layer).expect("unmount");
    assert!(crisp::sys::mount::below(dir.path()).expect("read the mount table").is_empty());
}

#[test]
fn a_namespace_that_cannot_be_made_leaves_nothing() {
    let node = Node::start();
    let mut bad = config(&node, "web");
    // Written inside, when the namespaces are there.
    bad.linux.mut_or_insert_default().sysctls.insert("net.ipv4.no_such_thing".into(), "1".into());
    refused(node.run(&bad), Code::INTERNAL, "no_such_thing");
    assert_eq!(node.leftovers(), [""; 0]);
    assert!(node.plugin_calls().is_empty());
    sandbox(&node, "web");
}

#[test]
fn a_lost_user_namespace_makes_a_sandbox_not_ready() {
    let mut node = Node::start();
    let id = sandbox(&node, "web");
    node.stop_daemon();
    crisp::sys::namespace::unpin(&node.path("run/sandboxes").join(&id).join("ns/user")).expect("unpin");
    node.start_daemon();
    assert_eq!(node.sandbox_status(&id).expect("status").state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
    node.remove_sandbox(&id).expect("remove");
}

#[test]
fn what_no_record_knows_is_swept() {
    let mut node = Node::start();
    let id = sandbox(&node, "web");
    let volume = node.path("volume");
    fs::create_dir(&volume).expect("make the volume");
    fs::write(volume.join("file"), "kept").expect("write");
    let mut config = node.container_config("app", "true");
    config.mounts = vec![Mount {
        container_path: "/data".into(),
        host_path: volume.display().to_string(),
        uidMappings: vec![IDMapping { host_id: UID, length: 65536, ..Default::default() }],
        gidMappings: vec![IDMapping { host_id: GID, length: 65536, ..Default::default() }],
        ..Default::default()
    }];
    let container = node.create(&id, &config).expect("create");
    node.stop_daemon();
    for (noun, id) in [("sandboxes", &id), ("containers", &container)] {
        for end in ["json", "pb"] {
            fs::remove_file(node.path("root").join(noun).join(format!("{id}.{end}"))).expect("remove the record");
        }
    }
    node.start_daemon();
    assert_eq!(node.leftovers(), [""; 0]);
    assert_eq!(fs::read_to_string(volume.join("file")).expect("the volume's files stay"), "kept");
}

#[test]
fn handlers_tell_and_are_believed() {
    let node = Node::start();
    let features = |node: &Node| {
        let answer = node.runtime().status(&StatusRequest::default(), SHORT).expect("status");
        assert!(answer.features.user_namespaces_host_network);
        answer.runtime_handlers.iter().map(|h| (h.name.clone(), h.features.user_namespaces)).collect::<Vec<_>>()
    };
    let all = |is: bool| ["", "fake", "second"].map(|name| (name.to_owned(), is));
    assert_eq!(features(&node), all(true));
    let mut node = node;
    node.stop_daemon();
    fs::write(node.path("oci/features"), r#"{"linux":{"namespaces":["pid"]}}"#).expect("write the features");
    node.start_daemon();
    assert_eq!(features(&node), all(false));
    refused(node.run(&config(&node, "web")), Code::FAILED_PRECONDITION, "fake has no user namespaces");
    assert!(node.plugin_calls().is_empty());
}

#[test]
fn on_the_hosts_network_sys_is_the_hosts() {
    let node = Node::start();
    let mut asked = config(&node, "node");
    options(&mut asked).network = NamespaceMode::NODE.into();
    options(&mut asked).ipc = NamespaceMode::NODE.into();
    let id = node.run(&asked).expect("run");
    assert!(is_pinned(&node.path("run/sandboxes").join(&id).join("ns/user")));
    assert!(node.plugin_calls().is_empty());
    let container = node.create(&id, &node.container_config("app", "true")).expect("create");
    let spec = node.spec(&container);
    let mounts = spec["mounts"].as_array().expect("a list").clone();
    let found = |path: &str| mounts.iter().find(|m| m["destination"] == path).map(|m| (m["type"].as_str(), m["source"].as_str()));
    assert_eq!(found("/sys"), Some((Some("bind"), Some("/sys"))));
    // Nothing is bound of a host that has nothing.
    let table = fs::read_to_string("/proc/self/mountinfo").expect("read");
    let there = table.contains(" /dev/mqueue ");
    assert_eq!(found("/dev/mqueue"), there.then_some((Some("bind"), Some("/dev/mqueue"))));
    assert!(spec["linux"]["readonlyPaths"].as_array().expect("a list").contains(&json!("/sys")), "{spec}");
}
