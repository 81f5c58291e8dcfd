//! Limits as clients set, change and read them, of containers and of sandboxes; the classes that annotations ask for.

use std::fs;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;
use serde_json::{json, Value};

use crate::node::{refused, Answer, Node, Options};

fn update(node: &Node, id: &str, linux: LinuxContainerResources) -> Answer<UpdateContainerResourcesResponse> {
    let request = UpdateContainerResourcesRequest { container_id: id.into(), linux: MessageField::some(linux), ..Default::default() };
    node.runtime().update_container_resources(&request, SHORT)
}

fn update_sandbox(node: &Node, id: &str, overhead: Option<LinuxContainerResources>, sum: Option<LinuxContainerResources>) -> Answer<()> {
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.into(),
        overhead: overhead.into(),
        resources: sum.into(),
        ..Default::default()
    };
    node.runtime().update_pod_sandbox_resources(&request, SHORT).map(drop)
}

fn with_tables(tables: &str) -> Node {
    Node::with(Options { tables: tables.into(), ..Default::default() })
}

/// What the OCI runtime was told last.
fn told(node: &Node) -> Value {
    serde_json::from_slice(&fs::read(node.path("oci/updated")).expect("the runtime was told")).expect("JSON")
}

#[test]
fn an_update_whose_last_step_fails_is_taken_back() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "exec sleep 1000");
    *config.linux.mut_or_insert_default().resources.mut_or_insert_default() =
        LinuxContainerResources { cpu_shares: 100, memory_limit_in_bytes: 64 << 20, oom_score_adj: 500, ..Default::default() };
    let id = node.create(&sandbox, &config).expect("create");
    let created = node.create(&sandbox, &node.container_config("created", "true")).expect("create");
    node.start_container(&id).expect("start");
    let adj = || fs::read_to_string(format!("/proc/{}/oom_score_adj", node.pid(&id))).expect("read the score").trim().to_owned();
    // The fake does not set it.
    fs::write(format!("/proc/{}/oom_score_adj", node.pid(&id)), "500").expect("set the score");
    let new = LinuxContainerResources { cpu_shares: 300, memory_limit_in_bytes: 96 << 20, oom_score_adj: 700, ..Default::default() };
    // Sets in the rest of it have no order.
    let limits = |id: &str| (node.spec(id)["linux"]["resources"].clone(), node.spec(id)["process"]["oomScoreAdj"].clone());
    for id in [&id, &created] {
        let (status, spec) = (node.status(id).expect("status").resources, limits(id));
        // Records are renamed into their place, which fails when a directory is there.
        let record = node.path("root/containers").join(format!("{id}.json"));
        let aside = node.path("aside.json");
        fs::rename(&record, &aside).expect("move the record");
        fs::create_dir(&record).expect("make a directory");
        fs::write(record.join("x"), "").expect("fill it");
        refused(update(&node, id, new.clone()), Code::INTERNAL, &format!("{id}.json"));
        assert_eq!((node.status(id).expect("status").resources, limits(id)), (status, spec));
        fs::remove_dir_all(&record).expect("remove the directory");
        fs::rename(&aside, &record).expect("bring the record back");
    }
    assert_eq!(adj(), "500", "the runtime and the processes had it already");
    assert_eq!(told(&node)["cpu"]["shares"], 100);
    assert_eq!(told(&node)["memory"]["limit"], 64 << 20);
    assert_eq!(node.runtime_calls().iter().filter(|call| call.verb == "update").count(), 2, "done and undone");
    update(&node, &id, new).expect("now it works");
    assert_eq!((adj().as_str(), told(&node)["cpu"]["shares"].clone()), ("700", json!(300)));
    assert!(!node.path("run/containers").join(&id).join("update.json").exists());
}

#[test]
fn an_undo_that_fails_is_made_up_for_by_the_next_update() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let spec = node.spec(&id);
    // The spec cannot be replaced: neither by the new one nor by the old.
    let path = node.path("run/containers").join(&id).join("config.json");
    fs::remove_file(&path).expect("remove the spec");
    fs::create_dir(&path).expect("make a directory");
    fs::write(path.join("x"), "").expect("fill it");
    refused(update(&node, &id, LinuxContainerResources { cpu_shares: 300, ..Default::default() }), Code::INTERNAL, "config.json");
    fs::remove_dir_all(&path).expect("remove the directory");
    fs::write(&path, spec.to_string()).expect("bring the spec back");

    // As if it had failed after its first half: what takes it back is in the bundle, whatever comes next, a restart too.
    let journal = path.with_file_name("update.json");
    let undo = json!({"spec": spec, "resources": [], "runtime": {"cpu": {"shares": 77}}, "limits": {"files": []}, "oom_score_adj": null});
    fs::write(&journal, undo.to_string()).expect("write the note");
    update(&node, &id, LinuxContainerResources { cpu_quota: 50_000, ..Default::default() }).expect("update");
    assert!(!journal.exists());
    assert_eq!(node.spec(&id)["linux"]["resources"]["cpu"], json!({"quota": 50_000}));

    let mut changed = node.spec(&id);
    changed["linux"]["resources"]["cpu"]["quota"] = json!(60_000);
    let undo =
        json!({"spec": changed, "resources": [], "runtime": {"cpu": {"quota": 60_000}}, "limits": {"files": []}, "oom_score_adj": null});
    fs::write(&journal, undo.to_string()).expect("write the note");
    node.restart();
    assert!(!journal.exists(), "a restart takes it back");
    assert_eq!(node.spec(&id)["linux"]["resources"]["cpu"]["quota"], 60_000);
    assert_eq!(told(&node)["cpu"]["quota"], 60_000);
}

#[test]
fn what_the_kernel_would_refuse_is_invalid() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let created = node.create(&sandbox, &node.container_config("created", "true")).expect("create");
    type Change = fn(&mut LinuxContainerResources);
    let cases: [(&str, Change); 8] = [
        ("cpuset_cpus", |r| r.cpuset_cpus = "0,60000".into()),
        ("cpuset_cpus", |r| r.cpuset_cpus = "x".into()),
        ("cpuset_mems", |r| r.cpuset_mems = "900".into()),
        ("cpu_period", |r| r.cpu_period = 5),
        ("cpu_quota", |r| r.cpu_quota = 5),
        ("oom_score_adj", |r| r.oom_score_adj = 1001),
        ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -5),
        ("memory_swap_limit_in_bytes", |r| (r.memory_limit_in_bytes, r.memory_swap_limit_in_bytes) = (9, 5)),
    ];
    for (number, (field, change)) in cases.into_iter().enumerate() {
        let mut bad = LinuxContainerResources { cpu_shares: 300, ..Default::default() };
        change(&mut bad);
        for id in [&id, &created] {
            refused(update(&node, id, bad.clone()), Code::INVALID_ARGUMENT, field);
        }
        let mut config = node.container_config(&format!("bad{number}"), "true");
        config.linux.mut_or_insert_default().resources = MessageField::some(bad);
        refused(node.create(&sandbox, &config), Code::INVALID_ARGUMENT, field);
    }
    assert_eq!(node.status(&id).expect("status").resources.linux.cpu_shares, 0);
    assert!(node.runtime_calls().iter().all(|call| call.verb != "update"));

    let mut request = UpdateContainerResourcesRequest { container_id: id.clone(), ..Default::default() };
    request.windows = MessageField::some(WindowsContainerResources::default());
    refused(node.runtime().update_container_resources(&request, SHORT), Code::INVALID_ARGUMENT, "windows");
    request.windows = MessageField::none();
    request.annotations.insert("io.kubernetes.cri.blockio-class".into(), "slow".into());
    refused(node.runtime().update_container_resources(&request, SHORT), Code::INVALID_ARGUMENT, "blockio-class");
    request.annotations = [("example.com/a".to_owned(), "1".to_owned())].into();
    node.runtime().update_container_resources(&request, SHORT).expect("others are nobody's here");
}

#[test]
fn updates_at_the_same_time_all_count() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let changes: [fn(&mut LinuxContainerResources); 6] = [
        |r| r.cpu_shares = 300,
        |r| r.cpu_quota = 40_000,
        |r| r.cpu_period = 50_000,
        |r| r.memory_limit_in_bytes = 64 << 20,
        |r| r.cpuset_cpus = "0".into(),
        |r| r.oom_score_adj = 500,
    ];
    std::thread::scope(|scope| {
        for change in changes {
            let (node, id) = (&node, &id);
            scope.spawn(move || {
                let mut new = LinuxContainerResources::default();
                change(&mut new);
                update(node, id, new).expect("update");
            });
        }
    });
    let mut all = LinuxContainerResources::default();
    changes.iter().for_each(|change| change(&mut all));
    assert_eq!(*node.status(&id).expect("status").resources.linux, all);
    let resources = &node.spec(&id)["linux"]["resources"];
    assert_eq!(resources["cpu"], json!({"shares": 300, "quota": 40_000, "period": 50_000, "cpus": "0"}));
    assert_eq!(resources["memory"]["limit"], 64 << 20);
    assert_eq!(node.spec(&id)["process"]["oomScoreAdj"], 500);
}

#[test]
fn updates_outlive_the_daemon() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let running = node.launch(&sandbox, "app", "exec sleep 1000");
    let mut config = node.container_config("bare", "exec sleep 1000");
    config.linux.mut_or_insert_default().resources = MessageField::none();
    let created = node.create(&sandbox, &config).expect("create");
    assert_eq!(*node.status(&created).expect("status").resources.linux, LinuxContainerResources::default());
    for id in [&running, &created] {
        update(&node, id, LinuxContainerResources { cpu_shares: 300, ..Default::default() }).expect("update");
    }
    node.restart();
    for id in [&running, &created] {
        assert_eq!(node.status(id).expect("status").resources.linux.cpu_shares, 300);
        assert_eq!(node.spec(id)["linux"]["resources"]["cpu"]["shares"], 300);
    }
    node.start_container(&created).expect("start");
}

#[test]
fn every_container_gets_what_the_configuration_says() {
    let node = with_tables("[resources]\npids_limit = 77\nrlimits = { nofile = \"64:128\", core = \"0\" }\n");
    let sandbox = node.sandbox("web");
    let id = node.create(&sandbox, &node.container_config("app", "true")).expect("create");
    let spec = node.spec(&id);
    assert_eq!(spec["linux"]["resources"]["pids"], json!({"limit": 77}));
    let limit = |kind: &str, soft: u64, hard: u64| json!({"type": kind, "soft": soft, "hard": hard});
    assert_eq!(spec["process"]["rlimits"], json!([limit("RLIMIT_CORE", 0, 0), limit("RLIMIT_NOFILE", 64, 128)]));
}

#[test]
fn block_io_classes() {
    let dir = tempfile::tempdir().expect("make a directory");
    let file = dir.path().join("classes.yaml");
    fs::write(&file, "Classes:\n  slow:\n    - Weight: 80\n  slower:\n    - Weight: \"40\"\n").expect("write the classes");
    let node = with_tables(&format!("[resources]\nblockio_classes = \"{}\"\n", file.display()));
    let mut sandbox = node.sandbox_config("web");
    sandbox.annotations.insert("blockio.resources.beta.kubernetes.io/pod".into(), "slow".into());
    let id = node.run(&sandbox).expect("run");
    let weight = |name: &str, class: Option<&str>| {
        let mut config = node.container_config(name, "true");
        config.annotations.extend(class.map(|class| ("io.kubernetes.cri.blockio-class".to_owned(), class.to_owned())));
        node.create(&id, &config).map(|id| node.spec(&id)["linux"]["resources"]["blockIO"]["weight"].clone())
    };
    assert_eq!(weight("a", None).expect("create"), 80);
    assert_eq!(weight("b", Some("slower")).expect("create"), 40);
    assert_eq!(weight("c", Some("")).expect("create"), Value::Null);
    refused(weight("d", Some("gold")), Code::INVALID_ARGUMENT, "no block I/O class \"gold\"");
}

#[test]
fn classes_where_none_are_configured() {
    let asking = |node: &Node, name: &str, key: &str| {
        let mut config = node.container_config(name, "true");
        config.annotations.insert(key.into(), "gold".into());
        config
    };
    let keys = ["io.kubernetes.cri.blockio-class", "io.kubernetes.cri.rdt-class"];
    let node = Node::start();
    let sandbox = node.sandbox("web");
    for key in keys {
        refused(node.create(&sandbox, &asking(&node, "app", key)), Code::FAILED_PRECONDITION, "\"gold\"");
    }
    drop(node);
    let node = with_tables("[resources]\nignore_unconfigured_classes = true\n");
    let sandbox = node.sandbox("web");
    for (name, key) in ["a", "b"].into_iter().zip(keys) {
        let id = node.create(&sandbox, &asking(&node, name, key)).expect("create");
        assert_eq!((&node.spec(&id)["linux"]["intelRdt"], &node.spec(&id)["linux"]["resources"]["blockIO"]), (&Value::Null, &Value::Null));
    }
    drop(node);
    // The machines that test this have no resctrl.
    if !std::path::Path::new("/sys/fs/resctrl/schemata").exists() {
        let node = with_tables("[resources]\nrdt_classes = true\n");
        let sandbox = node.sandbox("web");
        refused(node.create(&sandbox, &asking(&node, "app", keys[1])), Code::FAILED_PRECONDITION, "resctrl is not mounted");
    }
}

#[test]
fn what_is_said_of_a_sandbox_is_kept_and_shown() {
    let mut node = Node::start();
    let mut config = node.sandbox_config("web");
    let linux = config.linux.mut_or_insert_default();
    linux.overhead = MessageField::some(LinuxContainerResources { memory_limit_in_bytes: 1 << 20, ..Default::default() });
    let id = node.run(&config).expect("run");
    let said = |node: &Node| {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true, ..Default::default() };
        let answer = node.runtime().pod_sandbox_status(&request, SHORT).expect("status");
        let info: Value = serde_json::from_str(&answer.info["info"]).expect("info is JSON");
        [("overhead", "memory_limit_in_bytes"), ("resources", "cpu_quota")].map(|(what, field)| info[what][field].clone())
    };
    assert_eq!(said(&node), [json!(1 << 20), Value::Null]);
    let sum = LinuxContainerResources { cpu_quota: 50_000, cpu_period: 100_000, ..Default::default() };
    update_sandbox(&node, &id, None, Some(sum)).expect("update");
    assert_eq!(said(&node), [json!(1 << 20), json!(50_000)], "what is not said stays");
    node.restart();
    assert_eq!(said(&node), [json!(1 << 20), json!(50_000)]);
    let overhead = LinuxContainerResources { memory_limit_in_bytes: 2 << 20, ..Default::default() };
    update_sandbox(&node, &id[..12], Some(overhead), None).expect("a prefix will do");
    assert_eq!(said(&node), [json!(2 << 20), json!(50_000)]);

    let bad = LinuxContainerResources { cpu_shares: -1, ..Default::default() };
    refused(update_sandbox(&node, &id, None, Some(bad.clone())), Code::INVALID_ARGUMENT, "resources: cpu_shares");
    let valid = LinuxContainerResources { memory_limit_in_bytes: 3 << 20, ..Default::default() };
    refused(update_sandbox(&node, &id, Some(valid), Some(bad.clone())), Code::INVALID_ARGUMENT, "resources: cpu_shares");
    assert_eq!(said(&node), [json!(2 << 20), json!(50_000)], "nothing of a refused one is kept");
    refused(update_sandbox(&node, "0123456789ab", None, None), Code::NOT_FOUND, "0123456789ab");
    node.stop_sandbox(&id).expect("stop");
    refused(update_sandbox(&node, &id, None, None), Code::FAILED_PRECONDITION, "not ready");
    assert_eq!(said(&node), [json!(2 << 20), json!(50_000)]);

    let mut config = node.sandbox_config("bad");
    config.linux.mut_or_insert_default().overhead = MessageField::some(bad);
    refused(node.run(&config), Code::INVALID_ARGUMENT, "linux: overhead: cpu_shares");
}
