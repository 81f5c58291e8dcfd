//! GetContainerEvents with real containers: a hundred sandboxes at once, in order, each event with the statuses of its moment.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crisp::api::runtime::{
    ContainerEventResponse, ContainerEventType, ContainerState, GetEventsRequest, PodSandboxState, PodSandboxStatusRequest,
};
use crisp::cli::client::{Client, FOREVER};

use crate::daemon::patience;
use crate::harness::{handlers, Host};
use crate::objects::sandbox_config;

const CREATED: ContainerEventType = ContainerEventType::CONTAINER_CREATED_EVENT;
const STARTED: ContainerEventType = ContainerEventType::CONTAINER_STARTED_EVENT;
const STOPPED: ContainerEventType = ContainerEventType::CONTAINER_STOPPED_EVENT;
const DELETED: ContainerEventType = ContainerEventType::CONTAINER_DELETED_EVENT;

/// How long an event may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Everything heard so far; the thread behind it ends with the daemon.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<ContainerEventResponse>>>);

impl Heard {
    /// Subscribes, and makes sandboxes until it hears of one.
    fn start(host: &Host) -> Heard {
        let Ok(client) = Client::connect(&host.daemon.layout.socket()) else { panic!("connect to the daemon") };
        let heard = Heard::default();
        let theirs = heard.clone();
        std::thread::spawn(move || {
            let Ok(stream) = client.runtime().get_container_events(&GetEventsRequest::default(), FOREVER) else { return };
            stream.map_while(Result::ok).for_each(|event| theirs.0.lock().expect("no thread panics with it").push(event));
        });
        let begin = Instant::now();
        loop {
            let probe = host.run(sandbox_config(&host.daemon.layout, "probe", true), "");
            host.remove_sandbox(&probe.id);
            if heard.all().iter().any(|e| e.container_id == probe.id && kind(e) == DELETED) {
                return heard;
            }
            assert!(begin.elapsed() < patience(LIMIT), "no event comes");
        }
    }

    fn all(&self) -> Vec<ContainerEventResponse> {
        self.0.lock().expect("no thread panics with it").clone()
    }

    fn wait(&self, id: &str, wanted: ContainerEventType) {
        let begin = Instant::now();
        while !self.all().iter().any(|e| e.container_id == id && kind(e) == wanted) {
            assert!(begin.elapsed() < patience(LIMIT), "{wanted:?} of {id} does not come");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn of(&self, id: &str) -> Vec<ContainerEventType> {
        self.all().iter().filter(|e| e.container_id == id).map(kind).collect()
    }
}

fn kind(event: &ContainerEventResponse) -> ContainerEventType {
    event.container_event_type.enum_value().expect("a known kind")
}

fn state(event: &ContainerEventResponse, id: &str) -> Option<ContainerState> {
    event.containers_statuses.iter().find(|s| s.id == id).map(|s| s.state.enum_value_or_default())
}

#[test]
fn a_hundred_sandboxes_in_order() {
    const WORKERS: usize = 10;
    const EACH: usize = 10;
    let host = Host::start();
    let heard = Heard::start(&host);
    let work = |worker: usize| {
        let mut objects = Vec::new();
        for n in 0..EACH {
            let sandbox = host.sandbox(&format!("p{worker}-{n}"), "crun");
            let quick = host.launch(&sandbox, "quick", &["sh", "-c", "exit 7"]);
            assert_eq!(host.wait_exit(&quick).exit_code, 7);
            let slow = host.launch(&sandbox, "slow", &["sleep", "1000000"]);
            host.stop(&slow, 0);
            host.stop_sandbox(&sandbox.id);
            host.remove_sandbox(&sandbox.id);
            objects.push((sandbox.id, [quick.id, slow.id]));
        }
        objects
    };
    let mut objects = Vec::new();
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..WORKERS).map(|n| scope.spawn(move || work(n))).collect();
        threads.into_iter().for_each(|thread| objects.extend(thread.join().expect("a worker")));
    });
    assert_eq!(objects.len(), WORKERS * EACH);
    objects.iter().for_each(|(sandbox, _)| heard.wait(sandbox, DELETED));
    let events = heard.all();
    assert!(events.windows(2).all(|pair| pair[0].created_at < pair[1].created_at), "times rise");
    let mut by_id: BTreeMap<&str, Vec<&ContainerEventResponse>> = BTreeMap::new();
    events.iter().for_each(|event| by_id.entry(&event.container_id).or_default().push(event));
    for (sandbox, containers) in &objects {
        let of = &by_id[sandbox.as_str()];
        assert_eq!(of.iter().map(|e| kind(e)).collect::<Vec<_>>(), [CREATED, STARTED, STOPPED, DELETED]);
        assert!(!of[1].pod_sandbox_status.network.ip.is_empty(), "STARTED has the address");
        for id in containers {
            let of = &by_id[id.as_str()];
            assert_eq!(of.iter().map(|e| kind(e)).collect::<Vec<_>>(), [CREATED, STARTED, STOPPED, DELETED]);
            let states: Vec<_> = of.iter().map(|e| state(e, id)).collect();
            let (created, running, exited) =
                (ContainerState::CONTAINER_CREATED, ContainerState::CONTAINER_RUNNING, ContainerState::CONTAINER_EXITED);
            assert_eq!(states, [Some(created), Some(running), Some(exited), None]);
            assert!(of.iter().all(|e| e.pod_sandbox_status.id == *sandbox && !e.pod_sandbox_status.metadata.uid.is_empty()));
        }
    }
    host.finish();
}

#[test]
fn each_runtime_and_what_evented_kubelets_read() {
    let host = Host::start();
    let heard = Heard::start(&host);
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("evented-{handler}"), &handler);
        let app = host.launch(&sandbox, "app", &["sh", "-c", "sleep 1000000"]);
        let hog = host.create_with(&sandbox, "hog", &["sh", "-c", "tail /dev/zero"], |config| {
            config.linux.mut_or_insert_default().resources.mut_or_insert_default().memory_limit_in_bytes = 32 << 20;
        });
        host.start_container(&hog);
        heard.wait(&hog.id, STOPPED);
        for _ in 0..3 {
            assert_eq!(host.exec(&app, &["echo", "well"]).1, "well\n");
        }
        let before = crisp::store::now_ns();
        let answer = host.call(&PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), ..Default::default() });
        assert!(answer.timestamp >= before);
        let mut expected = [host.status(&app), host.status(&hog)];
        expected.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(answer.containers_statuses, expected);
        assert_eq!(host.status(&hog).reason, "OOMKilled");
        host.stop_sandbox(&sandbox.id);
        heard.wait(&app.id, STOPPED);
        let ended = heard.all().into_iter().rfind(|e| e.container_id == app.id).expect("an event");
        assert_eq!(ended.pod_sandbox_status.state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
        host.remove_sandbox(&sandbox.id);
        heard.wait(&sandbox.id, DELETED);
        // An exec is no event, and an end that came with a kill and a dead cgroup is one.
        assert_eq!(heard.of(&app.id), [CREATED, STARTED, STOPPED, DELETED]);
        assert_eq!(heard.of(&hog.id), [CREATED, STARTED, STOPPED, DELETED]);
    }
    host.finish();
}
