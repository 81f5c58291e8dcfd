//! The life of sandboxes and containers, with each OCI runtime: network, log, exit codes, OOM, stop.

use std::time::{Duration, Instant};

use crisp::api::runtime::{
    ContainerState, ContainerStatusRequest, ImageSpec, ImageStatusRequest, PodSandboxState, PodSandboxStatusRequest, PortMapping, Protocol,
    PullImageRequest, RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest, ReopenContainerLogRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use grpcio::RpcStatusCode;

use crate::daemon::{cgroup_dirs, find, Kind};
use crate::harness::{handlers, http_get, http_get_soon, kind, Host};
use crate::objects::{container_config, create_request, exec_request, run_request, sandbox_config};
use crate::registry::Registry;
use crate::snapshot::leases;

/// Ignores TERM, as a shell does that is pid 1 of its namespace.
const DEAF: [&str; 3] = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"];
const SLEEP: [&str; 2] = ["sleep", "1000000"];
/// How long a stop waits for what it has killed.
const KILL_WAIT: Duration = Duration::from_secs(30);

#[test]
fn an_address_answers_the_host_and_another_sandbox() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("web", &handler);
        assert!(leases(&host.daemon.layout).contains(&sandbox.ip), "{} is not leased", sandbox.ip);
        let web = host.launch(&sandbox, "httpd", &["httpd", "-f", "-p", "8080", "-h", "/www"]);
        assert_eq!(http_get_soon(&sandbox.ip, 8080, "/"), "hello from a sandbox\n");

        let other = host.sandbox("visitor", &handler);
        assert_ne!(other.ip, sandbox.ip);
        let url = format!("http://{}:8080/", sandbox.ip);
        let visitor = host.launch(&other, "wget", &["wget", "-q", "-O", "-", &url]);
        let status = host.wait_exit(&visitor);
        assert_eq!(status.exit_code, 0, "{status}\n{}", visitor.log.text("stderr"));
        visitor.log.wait_for("hello from a sandbox");

        // Containers of one sandbox share its loopback; the host's is another.
        let (code, text, error) = host.exec(&web, &["wget", "-q", "-O", "-", "http://127.0.0.1:8080/"]);
        assert_eq!((code, text.as_str()), (0, "hello from a sandbox\n"), "{error}");
        assert!(http_get("127.0.0.1", 8080, "/").is_err());
        assert_eq!(host.exec(&web, &["hostname"]).1, "web\n");

        host.stop_sandbox(&sandbox.id);
        let status = host.sandbox_status(&sandbox.id);
        assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
        assert!(!leases(&host.daemon.layout).contains(&sandbox.ip), "{} is still leased", sandbox.ip);
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_host_port_leads_to_the_container() {
    let host = Host::start();
    let mut config = sandbox_config(&host.daemon.layout, "mapped", false);
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("find a port").port();
    let mapping = |host_port: i32| PortMapping { protocol: Protocol::TCP.into(), container_port: 8080, host_port, ..Default::default() };
    // host_port 0 is dropped, not refused.
    config.port_mappings = vec![mapping(i32::from(port)), mapping(0)];
    let sandbox = host.run(config, "");
    host.launch(&sandbox, "httpd", &["httpd", "-f", "-p", "8080", "-h", "/www"]);
    http_get_soon(&sandbox.ip, 8080, "/");
    assert_eq!(http_get_soon("127.0.0.1", port, "/"), "hello from a sandbox\n");
    host.stop_sandbox(&sandbox.id);
    assert!(http_get("127.0.0.1", port, "/").is_err());
    host.finish();
}

#[test]
fn the_host_network_is_the_hosts() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.run(sandbox_config(&host.daemon.layout, "node", true), &handler);
        assert_eq!(sandbox.ip, "");
        let links = host.launch(&sandbox, "links", &["sh", "-c", "ls /sys/class/net; readlink /proc/self/ns/net"]);
        assert_eq!(host.wait_exit(&links).exit_code, 0);
        let own = std::fs::read_link("/proc/self/ns/net").expect("read our network namespace");
        links.log.wait_for(&own.display().to_string());
        host.remove_all();
    }
    host.finish();
}

#[test]
fn the_log_has_both_streams_long_lines_and_the_last_one() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("log", &handler);
        let script = "echo one; echo two >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf last";
        let container = host.launch(&sandbox, "talker", &["sh", "-c", script]);
        assert_eq!(host.wait_exit(&container).exit_code, 0);
        container.log.wait_for("last");
        let lines = container.log.lines();
        assert!(lines.iter().any(|line| line.stream == "stdout" && line.tag == "F" && line.text == "one"), "{lines:?}");
        assert!(lines.iter().any(|line| line.stream == "stderr" && line.tag == "F" && line.text == "two"), "{lines:?}");
        assert!(lines.iter().all(|line| line.text.len() <= 16 << 10), "a line is longer than 16 KiB");
        assert!(lines.iter().filter(|line| line.tag == "P").count() >= 2, "a long line is in parts");
        let text = container.log.text("stdout");
        assert!(text.starts_with(&format!("one\n{}\nlast", "x".repeat(40_000))), "{} bytes", text.len());
        assert!(lines.windows(2).all(|pair| pair[0].stream != pair[1].stream || pair[0].time <= pair[1].time), "times go backwards");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn a_reopened_log_loses_nothing() {
    let host = Host::start();
    let sandbox = host.sandbox("rotate", "");
    let container = host.launch(&sandbox, "counter", &["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; usleep 1000; done"]);
    container.log.wait_for("20");
    let mut old = container.log.clone();
    old.0.set_extension("1");
    std::fs::rename(&container.log.0, &old.0).expect("rotate the log");
    host.call(&ReopenContainerLogRequest { container_id: container.id.clone(), ..Default::default() });
    assert!(container.log.0.exists(), "the new file is there when the call returns");
    std::thread::sleep(Duration::from_millis(100));
    host.stop(&container, 0);
    let text = old.text("stdout") + &container.log.text("stdout");
    let numbers: Vec<u32> = text.lines().map(|line| line.parse().expect("a number")).collect();
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u32), "a gap: {numbers:?}");
    let again = ReopenContainerLogRequest { container_id: container.id, ..Default::default() };
    host.refused(&again);
    host.finish();
}

#[test]
fn exit_codes_and_reasons() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("exits", &handler);
        for (name, command, code, reason) in [
            ("zero", "exit 0", 0, "Completed"),
            ("seven", "exit 7", 7, "Error"),
            // A process cannot KILL itself as pid 1 of its namespace; a child of it can.
            ("killed", "sh -c 'kill -9 $$'; exit $?", 137, "Error"),
        ] {
            let container = host.launch(&sandbox, name, &["sh", "-c", command]);
            let status = host.wait_exit(&container);
            assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{name}: {status}");
            // containerd takes the time of the start when start has returned.
            let finished = if kind() == Kind::Crispd { status.finished_at } else { i64::MAX };
            assert!(0 < status.created_at && status.created_at <= status.started_at && status.started_at <= finished, "{status}");
        }
        host.remove_all();
    }
    host.finish();
}

#[test]
fn a_command_that_is_not_there_fails_the_start() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("absent", &handler);
        let container = host.create(&sandbox, "absent", &["/no/such/program"]);
        let (_, message) = host.refused(&StartContainerRequest { container_id: container.id.clone(), ..Default::default() });
        assert!(message.contains("/no/such/program") || message.contains("no such file"), "{message}");
        let status = host.status(&container);
        assert_eq!(status.state.enum_value(), Ok(ContainerState::CONTAINER_EXITED));
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{status}");
        assert!(status.finished_at > 0);
        host.remove_all();
    }
    host.finish();
}

#[test]
fn too_much_memory_is_an_oom_kill() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("oom", &handler);
        let container = host.create_with(&sandbox, "hog", &["sh", "-c", "exec tail /dev/zero"], |config| {
            config.linux.as_mut().expect("set").resources.as_mut().expect("set").memory_limit_in_bytes = 32 << 20;
        });
        host.start_container(&container);
        let status = host.wait_exit(&container);
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn stop_asks_first_and_kills_after_the_grace() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("stop", &handler);
        // The trap only notes: ash goes on after an `exit` in a trap that runs at certain moments.
        let script = "trap 'stop=1' TERM; echo up; while [ -z \"$stop\" ]; do sleep 0.1; done; echo bye; exit 5";
        let polite = host.launch(&sandbox, "polite", &["sh", "-c", script]);
        polite.log.wait_for("up");
        let begin = Instant::now();
        host.stop(&polite, 20);
        assert!(begin.elapsed() < Duration::from_secs(20), "it took {:?}", begin.elapsed());
        let status = host.status(&polite);
        assert_eq!((status.state.enum_value(), status.exit_code), (Ok(ContainerState::CONTAINER_EXITED), 5), "{status}");
        polite.log.wait_for("bye");
        // Again: success.
        host.stop(&polite, 0);

        host.remove(&polite);
        let (code, _) = host.refused(&ContainerStatusRequest { container_id: polite.id, ..Default::default() });
        assert_eq!(code, RpcStatusCode::NOT_FOUND);

        let deaf = host.launch(&sandbox, "deaf", &DEAF);
        deaf.log.wait_for("deaf");
        let begin = Instant::now();
        host.stop(&deaf, 1);
        assert!((Duration::from_millis(900)..KILL_WAIT).contains(&begin.elapsed()), "{:?}", begin.elapsed());
        assert_eq!(host.status(&deaf).exit_code, 137);

        let hasty = host.launch(&sandbox, "hasty", &DEAF);
        hasty.log.wait_for("deaf");
        let begin = Instant::now();
        host.stop(&hasty, 0);
        assert!(begin.elapsed() < KILL_WAIT, "{:?}", begin.elapsed());
        assert_eq!(host.status(&hasty).exit_code, 137);
        host.remove_all();
    }
    host.finish();
}

#[test]
fn exec_answers_code_and_streams_and_ends_in_time() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("exec", &handler);
        let container = host.launch(&sandbox, "main", &SLEEP);
        assert_eq!(host.exec(&container, &["sh", "-c", "echo out; echo err >&2; exit 9"]), (9, "out\n".into(), "err\n".into()));
        // containerd waits for the pipe that the child in the background holds.
        let script = if kind() == Kind::Crispd { "sleep 77 & sleep 78" } else { "exec sleep 78" };
        let begin = Instant::now();
        let (code, _) = host.refused(&exec_request(&container.id, &["sh", "-c", script], 1));
        assert_eq!(code, RpcStatusCode::DEADLINE_EXCEEDED);
        assert!(begin.elapsed() < Duration::from_secs(50), "{:?}", begin.elapsed());
        let (_, text, _) = host.exec(&container, &["ps"]);
        assert!(!text.contains("sleep 7"), "{text}");
        host.refused(&exec_request(&container.id, &["/no/such/program"], 5));
        host.stop(&container, 0);
        host.refused(&exec_request(&container.id, &["true"], 5));
        host.remove_all();
    }
    host.finish();
}

#[test]
fn limits_can_be_changed_while_it_runs() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("limits", &handler);
        let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
            config.linux.as_mut().expect("set").resources.as_mut().expect("set").memory_limit_in_bytes = 64 << 20;
        });
        host.start_container(&container);
        let mut update = UpdateContainerResourcesRequest { container_id: container.id.clone(), ..Default::default() };
        update.linux.mut_or_insert_default().memory_limit_in_bytes = 96 << 20;
        host.call(&update);
        let limits: Vec<u64> = cgroup_dirs(&host.daemon.layout.tag)
            .iter()
            .flat_map(|dir| [dir.join("memory.limit_in_bytes"), dir.join("memory.max")])
            .filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok())
            .collect();
        assert!(limits.contains(&(96 << 20)) && !limits.contains(&(64 << 20)), "{limits:?}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn a_pod_pid_namespace_is_shared() {
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "shared", false);
        let options = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()).and_then(|c| c.namespace_options.as_mut());
        options.expect("set").pid = crisp::api::runtime::NamespaceMode::POD.into();
        let sandbox = host.run(config, &handler);
        let sleeper = host.launch(&sandbox, "sleeper", &["sleep", "424242"]);
        let looker = host.launch(&sandbox, "looker", &SLEEP);
        let (_, text, _) = host.exec(&looker, &["ps"]);
        assert!(text.contains("sleep 424242"), "{text}");
        host.stop(&sleeper, 0);
        let (_, text, _) = host.exec(&looker, &["ps"]);
        assert!(!text.contains("sleep 424242"), "{text}");
        assert_eq!(host.status(&looker).state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING));
        host.remove_all();
    }
    host.finish();
}

#[test]
fn a_pulled_image_runs() {
    let registry = Registry::start();
    let host = Host::start_with(|options| options.plain_http = vec![registry.host.clone()]);
    let image = ImageSpec { image: registry.push("busybox"), ..Default::default() };
    let pulled = host.call(&PullImageRequest { image: Some(image.clone()).into(), ..Default::default() }).image_ref;
    let status = host.call(&ImageStatusRequest { image: Some(image.clone()).into(), ..Default::default() }).image;
    assert_eq!(status.id, pulled);
    let sandbox = host.sandbox("pulled", "");
    let container = host.create_with(&sandbox, "main", &["echo", "from the registry"], |config| config.image = Some(image.clone()).into());
    host.start_container(&container);
    let status = host.wait_exit(&container);
    assert_eq!((status.exit_code, status.image_ref.is_empty()), (0, false), "{status}");
    container.log.wait_for("from the registry");
    host.remove_all();
    host.call(&RemoveImageRequest { image: Some(image.clone()).into(), ..Default::default() });
    assert!(host.call(&ImageStatusRequest { image: Some(image).into(), ..Default::default() }).image.is_none());
    host.finish();
}

#[test]
fn what_is_not_there_is_not_found_or_already_gone() {
    let host = Host::start();
    let absent = || "0123456789abcdef".to_owned();
    let (code, _) = host.refused(&PodSandboxStatusRequest { pod_sandbox_id: absent(), ..Default::default() });
    assert_eq!(code, RpcStatusCode::NOT_FOUND);
    let (code, _) = host.refused(&ContainerStatusRequest { container_id: absent(), ..Default::default() });
    assert_eq!(code, RpcStatusCode::NOT_FOUND);
    if kind() == Kind::Crispd {
        // containerd 1.6 answers NOT_FOUND to some of these.
        host.call(&StopPodSandboxRequest { pod_sandbox_id: absent(), ..Default::default() });
        host.call(&StopContainerRequest { container_id: absent(), ..Default::default() });
        host.call(&RemoveContainerRequest { container_id: absent(), ..Default::default() });
    }
    host.call(&RemovePodSandboxRequest { pod_sandbox_id: absent(), ..Default::default() });
    let config = sandbox_config(&host.daemon.layout, "unknown", true);
    host.refused(&run_request(&config, "no-such-handler"));
    let sandbox = host.run(config, "");
    let mut config = container_config(&sandbox.config, "imageless", &SLEEP);
    config.image.as_mut().expect("set").image = "localhost/absent:latest".into();
    host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
    // A prefix of an id is enough.
    assert_eq!(host.sandbox_status(&sandbox.id[..12]).id, sandbox.id);
    host.finish();
}

/// A runtime that is missing, or breaks after the daemon has tried it, gives a clear error and leaves nothing. Of crispd alone.
#[test]
fn a_broken_runtime_leaves_nothing() {
    if kind() != Kind::Crispd {
        return;
    }
    let dir = tempfile::tempdir().expect("make a directory");
    let (program, broken) = (dir.path().join("fragile"), dir.path().join("broken"));
    let runc = find("runc").expect("runc is not installed: run scripts/install-deps");
    let script =
        format!("#!/bin/sh\n[ -e {} ] && {{ echo no luck today >&2; exit 1; }}\nexec {} \"$@\"\n", broken.display(), runc.display());
    std::fs::write(&program, script).expect("write the runtime");
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("make it a program");
    let host = Host::start_with(|options| {
        options.runtimes.push(("fragile".into(), program));
        options.runtimes.push(("missing".into(), "/no/such/runtime".into()));
    });
    let (code, message) = host.refused(&run_request(&sandbox_config(&host.daemon.layout, "missing", false), "missing"));
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{message}");
    assert!(message.contains("/no/such/runtime"), "{message}");
    host.assert_clean();

    let sandbox = host.sandbox("fragile", "fragile");
    std::fs::write(&broken, "").expect("break the runtime");
    let config = container_config(&sandbox.config, "main", &SLEEP);
    let message = match host.client.call(&create_request(&sandbox.id, &sandbox.config, &config)) {
        Err(e) => e.to_string(),
        // The runtime may be called in Start alone.
        Ok(answer) => host.refused(&StartContainerRequest { container_id: answer.container_id, ..Default::default() }).1,
    };
    assert!(message.contains("no luck today"), "{message}");
    host.remove_all();
    host.assert_clean();
    host.finish();
}

/// A plugin that fails half way through the chain leaves no lease, and is told by name. Of crispd alone.
#[test]
fn a_broken_plugin_leaves_nothing() {
    if kind() != Kind::Crispd {
        return;
    }
    let host = Host::start();
    // The chain breaks after bridge and its IPAM have given an address.
    let layout = &host.daemon.layout;
    let path = layout.path("cni/10-test.conflist");
    let good = std::fs::read_to_string(&path).expect("read the network's configuration");
    // Renamed into place, a file counts at once: the directory has changed.
    let put = |text: &str| {
        let new = layout.path("new.conflist");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).expect("write the network's configuration");
    };
    put(&good.replace("\"tuning\"", "\"tuning\", \"sysctl\": {\"net.no.such.key\": \"1\"}"));
    let config = sandbox_config(layout, "half", false);
    std::fs::create_dir_all(&config.log_directory).expect("make the log directory");
    let (_, message) = host.refused(&run_request(&config, ""));
    assert!(message.contains("tuning"), "{message}");
    assert_eq!(leases(layout), Vec::<String>::new());
    host.remove_all();
    host.assert_clean();
    put(&good);
    assert_ne!(host.sandbox("mended", "").ip, "");
    host.finish();
}
