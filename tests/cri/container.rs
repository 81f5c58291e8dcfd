//! Containers as clients know them: create, start, stop, remove, status, log, update.

use std::time::{Duration, Instant};

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;
use protobuf::MessageField;

use crate::node::{alive, eventually, refused, Answer, Node, PATIENCE};

fn log(node: &Node, name: &str) -> String {
    std::fs::read_to_string(node.path("logs/web").join(format!("{name}.log"))).unwrap_or_default()
}

fn reopen(node: &Node, id: &str) -> Answer<ReopenContainerLogResponse> {
    let request = ReopenContainerLogRequest { container_id: id.into(), ..Default::default() };
    node.runtime().reopen_container_log(&request, SHORT)
}

fn update(node: &Node, id: &str, linux: LinuxContainerResources) -> Answer<UpdateContainerResourcesResponse> {
    let request = UpdateContainerResourcesRequest { container_id: id.into(), linux: MessageField::some(linux), ..Default::default() };
    node.runtime().update_container_resources(&request, SHORT)
}

#[test]
fn from_create_to_remove() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "echo hello; echo \"$FROM_IMAGE $MINE\"; echo oops >&2; exec sleep 1000");
    config.labels.insert("l".into(), "1".into());
    config.annotations.insert("a".into(), "x\ny".into());
    config.envs.push(KeyValue { key: "MINE".into(), value: b"two\nlines".to_vec(), ..Default::default() });
    config.mounts.push(Mount { container_path: "/data".into(), host_path: node.path("data").display().to_string(), ..Default::default() });
    let id = node.create(&sandbox, &config).expect("create");
    assert_eq!(id.len(), 64);
    let created = node.status(&id).expect("status");
    assert_eq!(created.state.enum_value(), Ok(ContainerState::CONTAINER_CREATED));
    assert_eq!((&created.metadata, &created.labels, &created.annotations), (&config.metadata, &config.labels, &config.annotations));
    assert_eq!((created.started_at, created.finished_at), (0, 0));
    assert_eq!((&created.image_id, &created.mounts), (&node.image, &config.mounts));
    assert_eq!(created.log_path, node.path("logs/web/app.log").display().to_string());
    assert!(!created.image.image.is_empty() && !created.image_ref.is_empty());
    assert!(node.path("data").is_dir(), "a missing host path is made");
    assert!(node.runtime_calls().is_empty());

    node.start_container(&id).expect("start");
    let running = node.status(&id).expect("status");
    assert_eq!(running.state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING));
    assert!(running.started_at >= created.created_at && running.created_at == created.created_at);
    let pid = node.pid(&id);
    assert!(alive(pid));
    eventually("the output is logged", || (log(&node, "app").lines().count() == 4).then_some(()));
    let text = log(&node, "app");
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_by_key(|line| line.contains(" stderr "));
    let ends = ["stdout F hello", "stdout F yes two", "stdout F lines", "stderr F oops"];
    for (line, end) in lines.iter().zip(ends) {
        let (stamp, rest) = line.split_once(' ').expect("a stamp");
        assert_eq!(rest, end);
        // 2026-01-02T03:04:05.000000006Z
        assert!(stamp.len() == 30 && stamp.ends_with('Z') && &stamp[10..11] == "T" && &stamp[19..20] == ".", "{stamp}");
    }

    refused(node.start_container(&id), Code::FAILED_PRECONDITION, "RUNNING");
    node.stop(&id, 10).expect("stop");
    let exited = node.status(&id).expect("status");
    assert_eq!(exited.state.enum_value(), Ok(ContainerState::CONTAINER_EXITED));
    assert_eq!((exited.exit_code, exited.reason.as_str(), exited.started_at), (143, "Error", running.started_at));
    assert!(exited.finished_at >= exited.started_at && !alive(pid));
    node.stop(&id, 10).expect("stop again");
    refused(node.start_container(&id), Code::FAILED_PRECONDITION, "EXITED");
    let verbs: Vec<_> = eventually("the runtime forgets it", || {
        Some(node.runtime_calls().into_iter().map(|c| c.verb).collect::<Vec<_>>()).filter(|v| v.len() == 2)
    });
    assert_eq!(verbs, ["run", "delete"]);
    node.remove(&id).expect("remove");
    refused(node.status(&id), Code::NOT_FOUND, &id);
    node.remove(&id).expect("remove again");
    assert!(node.container_ids().is_empty());
    assert!(!node.path("run/containers").join(&id).exists());
    assert!(!log(&node, "app").is_empty(), "logs are kubelet's to remove");
}

#[test]
fn exit_codes_and_reasons() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    for (name, script, code, reason) in [
        ("zero", "exit 0", 0, "Completed"),
        ("three", "exit 3", 3, "Error"),
        ("killed", "kill -9 $$", 137, "Error"),
        ("usr1", "kill -USR1 $$", 138, "Error"),
    ] {
        let id = node.launch(&sandbox, name, script);
        let status = node.wait_exit(&id);
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{name}");
        assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at && status.created_at > 0);
    }
}

#[test]
fn stop_with_and_without_grace() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let deaf = "trap '' TERM";
    let created = node.create(&sandbox, &node.container_config("created", "exec sleep 1000")).expect("create");
    node.stop(&created, 1).expect("nothing to stop");
    assert_eq!(node.state(&created), ContainerState::CONTAINER_CREATED);
    node.start_container(&created).expect("it can still be started");

    let id = node.launch_with_traps(&sandbox, "polite", "trap 'exit 5' TERM");
    node.stop(&id, 10).expect("stop");
    assert_eq!(node.status(&id).expect("status").exit_code, 5);

    let id = node.launch_with_traps(&sandbox, "deaf", deaf);
    let begin = Instant::now();
    node.stop(&id, 1).expect("stop");
    assert!((Duration::from_millis(950)..PATIENCE).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    assert_eq!(node.status(&id).expect("status").exit_code, 137);

    let id = node.launch_with_traps(&sandbox, "zero", deaf);
    let begin = Instant::now();
    node.stop(&id, 0).expect("stop");
    assert!(begin.elapsed() < PATIENCE);
    assert_eq!(node.status(&id).expect("status").exit_code, 137);

    let id = node.launch_with_traps(&sandbox, "twice", deaf);
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| node.stop(&id, 600));
        node.wait_busy(1);
        node.stop(&id, 0).expect("the shorter grace wins");
        patient.join().expect("no panic").expect("it has stopped");
    });
}

#[test]
fn stop_signals() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let script = "trap 'exit 1' TERM; trap 'exit 2' USR2; trap 'exit 3' INT; echo trapped; while :; do sleep 0.05; done";
    node.import("localhost/signal:1", "signal", serde_json::json!({"StopSignal": "SIGUSR2"}));
    let mut config = node.container_config("image", script);
    config.image.mut_or_insert_default().image = "localhost/signal:1".into();
    let by_image = node.create(&sandbox, &config).expect("create");
    config.metadata.mut_or_insert_default().name = "config".into();
    config.stop_signal = Signal::SIGNAL_SIGINT.into();
    let by_config = node.create(&sandbox, &config).expect("create");
    assert_eq!(node.status(&by_config).expect("status").stop_signal.enum_value(), Ok(Signal::SIGNAL_SIGINT));
    for (id, code) in [(by_image, 2), (by_config, 3)] {
        node.start_container(&id).expect("start");
        node.wait_trapped(&id);
        node.stop(&id, 10).expect("stop");
        assert_eq!(node.status(&id).expect("status").exit_code, code);
    }
}

#[test]
fn every_process_of_a_container_dies_with_it() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let script = format!("setsid sleep 1000 & echo $! > {}/child; exec sleep 1000", node.path("").display());
    let id = node.launch(&sandbox, "app", &script);
    let child: i32 = eventually("a child", || std::fs::read_to_string(node.path("child")).ok()?.trim().parse().ok());
    node.stop(&id, 5).expect("stop");
    eventually("the child is dead", || (!alive(child)).then_some(()));
}

#[test]
fn removal_kills_what_runs() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch_with_traps(&sandbox, "app", "trap '' TERM");
    let pid = node.pid(&id);
    node.remove(&id).expect("remove");
    assert!(!alive(pid));
    assert!(node.container_ids().is_empty());
}

#[test]
fn logs_split_keep_and_reopen() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "long", "head -c 40000 /dev/zero | tr '\\0' x; echo; printf end");
    node.wait_exit(&id);
    let text = eventually("the log is whole", || Some(log(&node, "long")).filter(|t| t.ends_with("end\n")));
    let tags: Vec<_> =
        text.lines().map(|l| (l.split(' ').nth(2).unwrap_or_default(), l.splitn(4, ' ').nth(3).unwrap_or_default().len())).collect();
    assert_eq!(tags, [("P", 16384), ("P", 16384), ("F", 40000 - 2 * 16384), ("P", 3)]);
    refused(reopen(&node, &id), Code::FAILED_PRECONDITION, "EXITED");

    let created = node.create(&sandbox, &node.container_config("later", "true")).expect("create");
    refused(reopen(&node, &created), Code::FAILED_PRECONDITION, "CREATED");
    assert!(!node.path("logs/web/later.log").exists());

    let script = format!("n=0; while [ ! -f {}/stop ]; do n=$((n+1)); echo $n; sleep 0.01; done; echo $((n+1))", node.path("").display());
    let id = node.launch(&sandbox, "many", &script);
    let file = node.path("logs/web/many.log");
    let mut parts = Vec::new();
    for n in 0..3 {
        std::thread::sleep(Duration::from_millis(100));
        let old = node.path("logs/web").join(format!("many.{n}"));
        std::fs::rename(&file, &old).expect("rotate");
        reopen(&node, &id).expect("reopen");
        assert!(file.exists(), "the new file is there when the call returns");
        parts.push(old);
    }
    std::fs::write(node.path("stop"), "").expect("write");
    node.wait_exit(&id);
    parts.push(file);
    let all: String = parts.iter().map(|p| std::fs::read_to_string(p).expect("read")).collect();
    let numbers: Vec<u32> = all.lines().map(|l| l.rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number")).collect();
    assert_eq!(numbers, (1..=numbers.len() as u32).collect::<Vec<_>>(), "nothing lost, nothing twice");
}

#[test]
fn without_a_log_path_there_is_no_log() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("quiet", "head -c 200000 /dev/zero; exit 4");
    config.log_path.clear();
    let id = node.create(&sandbox, &config).expect("create");
    node.start_container(&id).expect("start");
    assert_eq!(node.wait_exit(&id).exit_code, 4, "output without a reader does not block");
    assert_eq!(node.status(&id).expect("status").log_path, "");
}

#[test]
fn a_terminal() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("tty", "tty; echo $TERM");
    config.tty = true;
    let id = node.create(&sandbox, &config).expect("create");
    node.start_container(&id).expect("start");
    assert_eq!(node.wait_exit(&id).exit_code, 0);
    let text = log(&node, "tty");
    assert!(text.contains("stdout F /dev/pts/") && text.contains("stdout F xterm"), "{text}");
}

#[test]
fn users_groups_and_the_command() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "true");
    let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    security.run_as_username = "app".into();
    security.supplemental_groups = vec![3000];
    let merged = node.create(&sandbox, &config).expect("create");
    let user = node.status(&merged).expect("status").user;
    assert_eq!((user.linux.uid, user.linux.gid), (1000, 1001));
    assert_eq!(user.linux.supplemental_groups, [1001, 3000, 2000]);
    config.metadata.mut_or_insert_default().name = "strict".into();
    let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    security.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
    let strict = node.create(&sandbox, &config).expect("create");
    assert_eq!(node.status(&strict).expect("status").user.linux.supplemental_groups, [1001, 3000]);
    let spec = node.spec(&strict);
    assert_eq!(spec["process"]["user"]["uid"], 1000);
    // args replace cmd, command replaces the entrypoint.
    node.import("localhost/entry:1", "entry", serde_json::json!({"Entrypoint": ["/entry"], "Cmd": ["one", "two"]}));
    let with = |name: &str, command: &[&str], args: &[&str]| {
        let mut config = node.container_config(name, "");
        config.image.mut_or_insert_default().image = "localhost/entry:1".into();
        config.command = command.iter().map(|s| (*s).to_owned()).collect();
        config.args = args.iter().map(|s| (*s).to_owned()).collect();
        let id = node.create(&sandbox, &config).expect("create");
        node.spec(&id)["process"]["args"].clone()
    };
    assert_eq!(with("a", &[], &[]), serde_json::json!(["/entry", "one", "two"]));
    assert_eq!(with("b", &[], &["x"]), serde_json::json!(["/entry", "x"]));
    assert_eq!(with("c", &["/other"], &[]), serde_json::json!(["/other"]));
    assert_eq!(with("d", &["/other"], &["x"]), serde_json::json!(["/other", "x"]));
}

#[test]
fn resources_are_updated_and_reported() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut bare = node.container_config("bare", "exec sleep 1000");
    bare.linux.clear();
    let bare = node.create(&sandbox, &bare).expect("create");
    let told = node.status(&bare).expect("status").resources;
    assert!(told.linux.is_some() && *told.linux == LinuxContainerResources::default(), "nothing was asked for, and that is told");
    let mut config = node.container_config("app", "exec sleep 1000");
    let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
    (resources.cpu_shares, resources.memory_limit_in_bytes) = (100, 64 << 20);
    let id = node.create(&sandbox, &config).expect("create");
    update(&node, &id, LinuxContainerResources { cpu_shares: 200, ..Default::default() }).expect("before the start");
    assert!(node.runtime_calls().is_empty());
    assert_eq!(node.spec(&id)["linux"]["resources"]["cpu"]["shares"], 200);
    node.start_container(&id).expect("start");
    update(&node, &id, LinuxContainerResources { cpu_quota: 50_000, cpu_period: 100_000, ..Default::default() }).expect("update");
    let given: serde_json::Value =
        serde_json::from_slice(&std::fs::read(node.path("oci/updated")).expect("the runtime was told")).expect("JSON");
    assert_eq!(given["cpu"]["quota"], 50_000);
    let now = node.status(&id).expect("status").resources;
    assert_eq!((now.linux.cpu_shares, now.linux.cpu_quota, now.linux.memory_limit_in_bytes), (200, 50_000, 64 << 20));
    refused(update(&node, &id, LinuxContainerResources { cpu_shares: -1, ..Default::default() }), Code::INVALID_ARGUMENT, "cpu_shares");
    node.stop(&id, 0).expect("stop");
    refused(update(&node, &id, LinuxContainerResources { cpu_shares: 300, ..Default::default() }), Code::FAILED_PRECONDITION, "EXITED");
}

#[test]
fn the_image_may_go_and_the_container_stays() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let mut config = node.container_config("app", "exec sleep 1000");
    config.image.mut_or_insert_default().user_specified_image = "test".into();
    let id = node.create(&sandbox, &config).expect("create");
    let before = node.status(&id).expect("status");
    assert_eq!(before.image.image, "test");
    let request = RemoveImageRequest { image: config.image.clone(), ..Default::default() };
    node.images().remove_image(&request, SHORT).expect("remove the image");
    assert_eq!(node.status(&id).expect("status"), before);
    node.start_container(&id).expect("its layers are kept");
    refused(node.create(&sandbox, &node.container_config("late", "true")), Code::NOT_FOUND, "localhost/test:1");
}

#[test]
fn targets() {
    let node = Node::start();
    let (sandbox, other) = (node.sandbox("web"), node.sandbox("other"));
    let target = node.launch(&sandbox, "app", "exec sleep 1000");
    let aimed = |name: &str, id: &str| {
        let mut config = node.container_config(name, "exec sleep 1000");
        let options =
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
        options.pid = NamespaceMode::TARGET.into();
        options.target_id = id.into();
        config
    };
    refused(node.create(&other, &aimed("debug", &target)), Code::INVALID_ARGUMENT, "target_id");
    let id = node.create(&sandbox, &aimed("debug", &target)).expect("create");
    let namespaces = node.spec(&id)["linux"]["namespaces"].to_string();
    assert!(namespaces.contains(&format!("/proc/{}/ns/pid", node.pid(&target))), "{namespaces}");
    node.stop(&target, 0).expect("stop");
    refused(node.start_container(&id), Code::FAILED_PRECONDITION, "target");
    refused(node.create(&sandbox, &aimed("late", &target)), Code::FAILED_PRECONDITION, "not running");
}
