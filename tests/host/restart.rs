//! crispd may be killed at any time: containers live on, their logs have no gap, what happened meanwhile is told, and
//! half-made objects go.

use std::time::{Duration, Instant};

use crisp::api::runtime::{ContainerState, ListContainersRequest, ListPodSandboxRequest, PodSandboxState};
use nix::sys::signal::Signal;

use crate::client::Call;
use crate::daemon::{crispd, patience, tool, Kind};
use crate::harness::{handlers, http_get_soon, kind, Container, Host, Sandbox};
use crate::objects::{container_config, create_request, exec_request, run_request, sandbox_config};
use crate::shim::eventually;
use crate::volumes::{image_mount, import_declaring};

const COUNT: [&str; 3] = ["sh", "-c", "trap 'stop=1' TERM; i=0; while [ -z \"$stop\" ]; do i=$((i+1)); echo $i; usleep 10000; done"];

/// What lived before the first crash and must live after the last.
struct Witness {
    sandbox: Sandbox,
    counter: Container,
}

impl Witness {
    fn new(host: &Host, handler: &str) -> Witness {
        let sandbox = host.sandbox(&format!("witness{handler}"), handler);
        let counter = host.launch(&sandbox, "counter", &COUNT);
        host.launch(&sandbox, "httpd", &["httpd", "-f", "-p", "8080", "-h", "/www"]);
        Witness { sandbox, counter }
    }

    fn assert_well(&self, host: &Host) {
        let status = host.sandbox_status(&self.sandbox.id);
        assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_READY), "{status}");
        assert_eq!(status.network.ip, self.sandbox.ip);
        let status = host.status(&self.counter);
        assert_eq!(status.state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING), "{status}");
        assert_eq!(http_get_soon(&self.sandbox.ip, 8080, "/"), "hello from a sandbox\n");
        assert_eq!(host.exec(&self.counter, &["echo", "yes"]), (0, "yes\n".into(), String::new()));
        let text = self.counter.log.text("stdout");
        let numbers: Vec<u32> = text.lines().map(|line| line.parse().expect("a number")).collect();
        assert!(!numbers.is_empty() && numbers.iter().copied().eq(1..=numbers.len() as u32), "the log has a gap: {numbers:?}");
        let newest = (numbers.len() + 10).to_string();
        self.counter.log.wait_for(&newest);
    }
}

fn restart(host: &mut Host) {
    host.daemon.run();
    host.daemon.wait_ready();
}

#[test]
fn containers_outlive_a_killed_daemon() {
    let mut host = Host::start();
    let witnesses: Vec<_> = handlers().iter().map(|handler| Witness::new(&host, handler)).collect();
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
        host.daemon.stop(signal);
        std::thread::sleep(Duration::from_millis(300));
        restart(&mut host);
        witnesses.iter().for_each(|witness| witness.assert_well(&host));
    }
    host.finish();
}

#[test]
fn what_ended_meanwhile_is_told_truly() {
    let mut host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("meanwhile", &handler);
        let seven = host.launch(&sandbox, "seven", &["sh", "-c", "sleep 0.5; echo last words; exit 7"]);
        let hog = host.create_with(&sandbox, "hog", &["sh", "-c", "sleep 0.5; exec tail /dev/zero"], |config| {
            config.linux.as_mut().expect("set").resources.as_mut().expect("set").memory_limit_in_bytes = 32 << 20;
        });
        host.start_container(&hog);
        let created = host.create(&sandbox, "created", &COUNT);
        host.daemon.stop(Signal::SIGKILL);
        match kind() {
            Kind::Crispd => {
                let run = host.daemon.layout.path("run/containers");
                let records = [&seven, &hog].map(|container| run.join(&container.id).join("exit"));
                eventually("both have ended, and their shims say so", || records.iter().all(|record| record.exists()));
            }
            Kind::Containerd => std::thread::sleep(Duration::from_secs(3)),
        }
        let restarted = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as i64;
        restart(&mut host);
        let status = host.status(&seven);
        assert_eq!((status.state.enum_value(), status.exit_code), (Ok(ContainerState::CONTAINER_EXITED), 7), "{status}");
        assert!(status.finished_at < restarted, "it ended while no daemon looked: {status}");
        if kind() == Kind::Crispd {
            // containerd itself writes the log.
            seven.log.wait_for("last words");
        }
        let status = host.status(&hog);
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status}");
        let status = host.status(&created);
        assert_eq!(status.state.enum_value(), Ok(ContainerState::CONTAINER_CREATED), "{status}");
        host.start_container(&created);
        created.log.wait_for("3");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

/// The whole life of a sandbox with a container, as far as the daemon lives. An error is a crash, or fails the test.
fn live(host: &Host, name: &str, handler: &str, image: &str, mapped: bool) -> Result<(), grpcio::Error> {
    use crisp::api::runtime::{
        LinuxContainerResources, RemoveContainerRequest, RemovePodSandboxRequest, StartContainerRequest, StopContainerRequest,
        StopPodSandboxRequest, UpdateContainerResourcesRequest,
    };
    fn step<Q: Call>(host: &Host, request: &Q) -> Result<Q::Response, grpcio::Error> {
        host.client.call(request)
    }
    let mut config = sandbox_config(&host.daemon.layout, name, false);
    if mapped {
        let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().userns_options = Some(crate::userns::users()).into();
    }
    std::fs::create_dir_all(&config.log_directory).expect("make the log directory");
    let sandbox = step(host, &run_request(&config, handler))?.pod_sandbox_id;
    // With an image mounted, and of one that declares volumes.
    let mut main = container_config(&config, "main", &COUNT);
    main.mounts = vec![
        image_mount("/img", crate::daemon::BUSYBOX, "www"),
        crate::userns::mount("/mapped", &crate::userns::volume(host, "volume"), mapped),
        image_mount("/other", crate::daemon::BUSYBOX, ""),
    ];
    main.image.mut_or_insert_default().image = image.into();
    let request = create_request(&sandbox, &config, &main);
    let container = step(host, &request)?.container_id;
    step(host, &StartContainerRequest { container_id: container.clone(), ..Default::default() })?;
    step(host, &exec_request(&container, &["true"], 5))?;
    let linux = LinuxContainerResources { cpu_shares: 300, ..Default::default() };
    step(host, &UpdateContainerResourcesRequest { container_id: container.clone(), linux: Some(linux).into(), ..Default::default() })?;
    step(host, &StopContainerRequest { container_id: container.clone(), timeout: 5, ..Default::default() })?;
    step(host, &RemoveContainerRequest { container_id: container, ..Default::default() })?;
    // One that still runs is left to the sandbox's stop.
    let request = create_request(&sandbox, &config, &container_config(&config, "second", &COUNT));
    let container = step(host, &request)?.container_id;
    step(host, &StartContainerRequest { container_id: container, ..Default::default() })?;
    step(host, &StopPodSandboxRequest { pod_sandbox_id: sandbox.clone(), ..Default::default() })?;
    step(host, &RemovePodSandboxRequest { pod_sandbox_id: sandbox, ..Default::default() })?;
    Ok(())
}

/// Every how many steps the daemon is crashed: CRISP_TEST_STEPS, or at each.
fn stride() -> usize {
    let stride = std::env::var("CRISP_TEST_STEPS").map_or(1, |text| text.parse().expect("CRISP_TEST_STEPS is a whole number"));
    assert!((1..=5).contains(&stride), "CRISP_TEST_STEPS={stride}: 1 to 5");
    stride
}

/// The daemon aborts itself at each step it names (`CRISP_CRASH_AT`, only in builds with debug assertions).
#[test]
fn a_crash_at_each_step_leaves_nothing() {
    if kind() != Kind::Crispd {
        return;
    }
    let steps = tool(&crispd().display().to_string(), &["debug", "steps"]);
    // Those of a pull have a test of their own (pulls.rs).
    let steps: Vec<_> = steps.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("pull:")).collect();
    assert!(steps.len() >= 10, "{steps:?}");
    let handlers = handlers();
    let mut host = Host::start();
    let witness = Witness::new(&host, "");
    let declaring = import_declaring(&host);
    let mut missed = Vec::new();
    for (number, step) in steps.iter().enumerate().step_by(stride()) {
        // Each step with one of the runtimes, in turns.
        let handler = &handlers[number % handlers.len()];
        host.daemon.stop(Signal::SIGTERM);
        host.daemon.options.environment = vec![("CRISP_CRASH_AT".into(), (*step).into())];
        host.daemon.run();
        // A step of the restore itself ends it before it answers.
        let begin = Instant::now();
        let mut outcome = Ok(());
        while host.daemon.ended().is_none() && begin.elapsed() < patience(Duration::from_secs(30)) {
            if host.client.call(&ListPodSandboxRequest::default()).is_ok() {
                // Some steps are of user namespaces alone; the others are gone through with and without in turns.
                let mapped = number % 3 == 0 || ["user", "mapped", "volumes"].iter().any(|word| step.contains(word));
                outcome = live(&host, &format!("life{number}"), handler, &declaring, mapped);
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // The process is gone a moment after its connection, and some steps are gone through behind an answer.
        while host.daemon.ended().is_none() && begin.elapsed() < patience(Duration::from_secs(30)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let end = host.daemon.ended();
        match (&outcome, end) {
            (_, Some(_)) => {}
            (Ok(()), None) => missed.push(*step),
            (Err(e), None) => panic!("{step}: no crash, but {e}\n{}", host.daemon.log_tail()),
        }
        host.daemon.stop(Signal::SIGKILL);
        host.daemon.options.environment.clear();
        restart(&mut host);
        witness.assert_well(&host);
        // What is left is whole: it can be listed, looked at, stopped and removed.
        for sandbox in host.call(&ListPodSandboxRequest::default()).items {
            if sandbox.id != witness.sandbox.id {
                host.sandbox_status(&sandbox.id);
                host.stop_sandbox(&sandbox.id);
                host.remove_sandbox(&sandbox.id);
            }
        }
        let containers = host.call(&ListContainersRequest::default()).containers;
        assert!(containers.iter().all(|container| container.pod_sandbox_id == witness.sandbox.id), "{step}: {containers:?}");
        // The same names can be used again.
        live(&host, &format!("life{number}"), handler, &declaring, number % 2 == 0)
            .unwrap_or_else(|e| panic!("after a crash at {step}: {e}"));
        let leased = crate::snapshot::leases(&host.daemon.layout);
        assert_eq!(leased, std::slice::from_ref(&witness.sandbox.ip), "after a crash at {step}");
        let volumes = std::fs::read_dir(host.daemon.layout.path("root/volumes")).map_or(0, |entries| entries.count());
        assert_eq!(volumes, 0, "after a crash at {step}");
    }
    crate::volumes::remove_image(&host, &declaring);
    assert!(missed.is_empty(), "the life of a sandbox never came to: {missed:?}");
    host.finish();
}
