//! GetContainerEvents: order, statuses as of each event, slow and gone subscribers; and the evented fields of PodSandboxStatus.

use std::collections::BTreeMap;

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;

use crate::node::{refused, Node, Options};
use crate::subscriber::{kind, open, Subscriber, Unread, CREATED, DELETED, EVENTS, STARTED, STOPPED};

/// Ids with the kinds of their events in the order they came.
fn by_object(events: &[ContainerEventResponse]) -> BTreeMap<String, Vec<ContainerEventType>> {
    let mut objects: BTreeMap<String, Vec<ContainerEventType>> = BTreeMap::new();
    events.iter().for_each(|event| objects.entry(event.container_id.clone()).or_default().push(kind(event)));
    objects
}

/// Replays the events: what each says of all containers of its sandbox must be what the events up to it make of them.
fn assert_statuses_are_of_their_moment(events: &[ContainerEventResponse]) {
    let mut sandboxes: BTreeMap<String, BTreeMap<String, ContainerState>> = BTreeMap::new();
    for event in events {
        let status = event.pod_sandbox_status.as_ref().expect("a sandbox status");
        assert!(status.metadata.is_some());
        let containers = sandboxes.entry(status.id.clone()).or_default();
        let id = event.container_id.clone();
        if id == status.id {
            let ready = matches!(kind(event), CREATED | STARTED);
            let expected = if ready { PodSandboxState::SANDBOX_READY } else { PodSandboxState::SANDBOX_NOTREADY };
            assert_eq!(status.state.enum_value(), Ok(expected), "{:?}", kind(event));
        } else {
            match kind(event) {
                CREATED => drop(containers.insert(id, ContainerState::CONTAINER_CREATED)),
                STARTED => drop(containers.insert(id, ContainerState::CONTAINER_RUNNING)),
                STOPPED => drop(containers.insert(id, ContainerState::CONTAINER_EXITED)),
                DELETED => drop(containers.remove(&id)),
            }
        }
        let told = event.containers_statuses.iter().map(|s| (s.id.clone(), s.state.enum_value_or_default()));
        assert_eq!(told.collect::<BTreeMap<_, _>>(), *containers, "at {:?} of {}", kind(event), event.container_id);
    }
}

#[test]
fn many_objects_in_order_with_the_statuses_of_their_moment() {
    const SANDBOXES: usize = 6;
    const CONTAINERS: usize = 4;
    let node = Node::start();
    let (one, two) = (Subscriber::start(&node), Subscriber::start(&node));
    let mut ids = Vec::new();
    std::thread::scope(|scope| {
        let work = |n: usize| {
            let node = &node;
            move || {
                let sandbox = node.sandbox(&format!("many-{n}"));
                let containers: Vec<String> = std::thread::scope(|scope| {
                    let make = |c: usize| {
                        let sandbox = &sandbox;
                        // They end at once: their end may be known before their start has been answered.
                        scope.spawn(move || node.launch(sandbox, &format!("c{c}"), &format!("exit {c}")))
                    };
                    let threads: Vec<_> = (0..CONTAINERS).map(make).collect();
                    threads.into_iter().map(|thread| thread.join().expect("a container")).collect()
                });
                containers.iter().for_each(|id| drop(node.wait_exit(id)));
                node.stop_sandbox(&sandbox).expect("stop");
                node.remove_sandbox(&sandbox).expect("remove");
                (sandbox, containers)
            }
        };
        let threads: Vec<_> = (0..SANDBOXES).map(|n| scope.spawn(work(n))).collect();
        ids.extend(threads.into_iter().map(|thread| thread.join().expect("a sandbox")));
    });
    for (sandbox, _) in &ids {
        one.wait(sandbox, DELETED);
        two.wait(sandbox, DELETED);
    }
    let (one, two) = (one.leave(), two.leave());
    let objects = by_object(&one);
    for (sandbox, containers) in &ids {
        assert_eq!(objects[sandbox], [CREATED, STARTED, STOPPED, DELETED]);
        for (n, id) in containers.iter().enumerate() {
            assert_eq!(objects[id], [CREATED, STARTED, STOPPED, DELETED]);
            let stopped = one.iter().find(|e| e.container_id == *id && kind(e) == STOPPED).expect("it stopped");
            let status = stopped.containers_statuses.iter().find(|s| s.id == *id).expect("its own status");
            assert_eq!((status.exit_code, status.finished_at > 0), (n as i32, true));
        }
    }
    assert!(one.windows(2).all(|pair| pair[0].created_at < pair[1].created_at), "times rise");
    assert_statuses_are_of_their_moment(&one);
    // The second came a little later; what it has is what the first has.
    let first = one.iter().position(|e| e.created_at == two[0].created_at).expect("known to both");
    assert_eq!(one[first..], two[..]);
}

#[test]
fn a_sandbox_has_stopped_after_its_containers() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let ids = ["one", "two"].map(|name| node.launch(&sandbox, name, "exec sleep 1000"));
    let subscriber = Subscriber::start(&node);
    // A network that does not go holds back no word of it.
    node.plugin_switch("second.DEL", "fail 100 'the switch is away' ''");
    node.stop_sandbox(&sandbox).expect_err("the plugin fails");
    subscriber.wait(&sandbox, STOPPED);
    node.plugin_switch("second.DEL", "");
    node.stop_sandbox(&sandbox).expect("stop");
    node.stop_sandbox(&sandbox).expect("stop again");
    node.remove_sandbox(&sandbox).expect("remove");
    subscriber.wait(&sandbox, DELETED);
    let events = subscriber.leave();
    let place = |id: &String| events.iter().position(|e| e.container_id == *id && kind(e) == STOPPED).expect("it stopped");
    assert!(
        ids.iter().all(|id| place(id) < place(&sandbox)),
        "{:?}",
        events.iter().map(|e| (&e.container_id, kind(e))).collect::<Vec<_>>()
    );
    assert_eq!(by_object(&events)[&sandbox], [STOPPED, DELETED]);
    // Yet it takes no containers from the beginning of the stop on.
    let status = events[place(&ids[0])].pod_sandbox_status.as_ref().expect("a sandbox status");
    assert_eq!(status.state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY));
}

#[test]
fn ends_are_told_once_however_they_come() {
    let mut node = Node::start();
    let sandbox = node.sandbox("web");
    let subscriber = Subscriber::start(&node);
    node.switch("run", "fail no such luck");
    let failed = node.create(&sandbox, &node.container_config("failed", "true")).expect("create");
    node.start_container(&failed).expect_err("the runtime fails");
    node.switch("run", "");
    assert_eq!(subscriber.wait(&failed, STOPPED).containers_statuses[0].reason, "StartError");
    let killed = node.launch(&sandbox, "killed", "exec sleep 1000");
    node.stop(&killed, 0).expect("stop");
    node.stop(&killed, 0).expect("stop again");
    let orphan = node.launch(&sandbox, "orphan", "exec sleep 1000");
    let (shim, _) = node.processes().into_iter().find(|(_, args)| args.contains(&orphan)).expect("a shim");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).expect("kill the shim");
    subscriber.wait(&orphan, STOPPED);
    let survivor = node.launch(&sandbox, "survivor", "exec sleep 1000");
    subscriber.wait(&survivor, STARTED);
    // A daemon that stops does not wait for its subscribers.
    node.stop_daemon();
    let events = by_object(&subscriber.events());
    assert_eq!(events[&failed], [CREATED, STOPPED]);
    assert_eq!(events[&killed], [CREATED, STARTED, STOPPED]);
    assert_eq!(events[&orphan], [CREATED, STARTED, STOPPED]);
    // Not CANCELLED, as at the end of the time that a stop waits for calls.
    assert_eq!(subscriber.end().expect("an error").code, Code::UNAVAILABLE);
    node.start_daemon();
    let subscriber = Subscriber::start(&node);
    node.remove_sandbox(&sandbox).expect("remove");
    subscriber.wait(&sandbox, DELETED);
    let events = subscriber.leave();
    assert_statuses_are_of_this_daemon(&events, &sandbox);
    let objects = by_object(&events);
    assert_eq!(objects[&survivor], [STOPPED, DELETED]);
    assert_eq!(objects[&killed], [DELETED]);
    assert_eq!(objects[&sandbox], [STOPPED, DELETED]);
}

/// The last event of a sandbox is its own, without any container.
fn assert_statuses_are_of_this_daemon(events: &[ContainerEventResponse], sandbox: &str) {
    let last = events.iter().rfind(|e| e.pod_sandbox_status.id == sandbox).expect("an event");
    assert_eq!((last.container_id.as_str(), kind(last), last.containers_statuses.len()), (sandbox, DELETED, 0));
}

#[test]
fn a_slow_subscriber_loses_its_oldest_and_holds_up_nobody() {
    let node = Node::with(Options { limits: "event_queue = 16".into(), ..Default::default() });
    let quick = Subscriber::start(&node);
    let mut slow: Unread<ContainerEventResponse> = open(&node.config().socket, EVENTS, &GetEventsRequest::default());
    let probe = |name: String| node.remove_sandbox(&node.sandbox(&name)).expect("remove");
    let since = std::thread::scope(|scope| {
        let heard = scope.spawn(|| slow.read());
        (0..).take_while(|_| !heard.is_finished()).for_each(|n| probe(format!("slow-{n}")));
        heard.join().expect("an event").created_at
    });
    let dropped = node.metric("crisp_events_dropped_total");
    // Large events: the connection's own buffers are soon full.
    let mut config = node.sandbox_config("large");
    config.annotations.insert("large".into(), "x".repeat(200_000));
    let sandbox = node.run(&config).expect("run");
    let mut containers = Vec::new();
    for n in 0..40 {
        let id = node.create(&sandbox, &node.container_config(&format!("c{n}"), "true")).expect("create");
        node.remove(&id).expect("remove");
        quick.wait(&id, DELETED);
        containers.push(id);
    }
    let objects = by_object(&quick.events());
    assert!(containers.iter().all(|id| objects[id] == [CREATED, DELETED]), "the quick one has them all");
    let last = containers.last().expect("there are some");
    let mut seen = Vec::new();
    loop {
        let event = slow.read();
        let end = event.container_id == *last && kind(&event) == DELETED;
        seen.push((event.container_id.clone(), kind(&event), event.created_at));
        if end {
            break;
        }
    }
    assert!(seen.windows(2).all(|pair| pair[0].2 < pair[1].2), "times rise");
    let all = quick.events().iter().filter(|e| containers.contains(&e.container_id)).count();
    let ours = seen.iter().filter(|(id, ..)| containers.contains(id)).count();
    assert!((16..all).contains(&ours), "{ours} of {all}");
    assert_eq!(node.metric("crisp_event_subscribers"), 2);
    let missed = quick.events().iter().filter(|e| e.created_at > since).count() - seen.len();
    assert_eq!(node.metric("crisp_events_dropped_total") - dropped, missed, "what is lost is counted");
    // The newest sixteen are whole.
    let tail: Vec<_> = seen[seen.len() - 16..].iter().map(|(id, kind, _)| (id.clone(), *kind)).collect();
    let expected: Vec<_> = containers[32..].iter().flat_map(|id| [(id.clone(), CREATED), (id.clone(), DELETED)]).collect();
    assert_eq!(tail, expected);
}

#[test]
fn seats_are_few_and_given_back_at_once() {
    // An eighth of the workers: one.
    let node = Node::with(Options { limits: "slow_threads = 8".into(), ..Default::default() });
    let first = Subscriber::start(&node);
    let (events, error) = open::<_, ContainerEventResponse>(&node.config().socket, EVENTS, &GetEventsRequest::default()).read_all();
    let error = error.expect("there is no seat");
    assert_eq!((error.code, events.len()), (Code::RESOURCE_EXHAUSTED, 0), "{error}");
    // Nothing happens meanwhile: the seat is given back without an event to send.
    first.leave();
    node.wait_subscribers(0);
    Subscriber::start(&node).leave();
    node.wait_subscribers(0);
    // One that does not read, and then goes, while its event is stuck on the way.
    let stuck: Unread<ContainerEventResponse> = open(&node.config().socket, EVENTS, &GetEventsRequest::default());
    node.wait_subscribers(1);
    let mut config = node.sandbox_config("large");
    config.annotations.insert("large".into(), "x".repeat(250_000));
    for n in 0..10 {
        config.metadata.mut_or_insert_default().attempt = n;
        let id = node.run(&config).expect("run");
        node.remove_sandbox(&id).expect("remove");
    }
    drop(stuck);
    node.wait_subscribers(0);
    Subscriber::start(&node).leave();
}

#[test]
fn sandbox_status_has_what_evented_kubelets_read() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let other = node.sandbox("other");
    let ids = ["a", "b"].map(|name| node.launch(&sandbox, name, "exec sleep 1000"));
    node.launch(&other, "c", "exec sleep 1000");
    let ask = |id: &str| {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), ..Default::default() };
        node.runtime().pod_sandbox_status(&request, SHORT)
    };
    let before = crisp::store::now_ns();
    let answer = ask(&sandbox).expect("status");
    assert!((before..=crisp::store::now_ns()).contains(&answer.timestamp));
    let mut expected = ids.clone().map(|id| node.status(&id).expect("status"));
    expected.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!(answer.containers_statuses, expected);
    node.stop(&ids[0], 0).expect("stop");
    let answer = ask(&sandbox).expect("status");
    let states: Vec<_> = answer.containers_statuses.iter().map(|s| (s.id == ids[0], s.state.enum_value_or_default())).collect();
    assert!(states.contains(&(true, ContainerState::CONTAINER_EXITED)) && states.contains(&(false, ContainerState::CONTAINER_RUNNING)));
    let empty = ask(&node.sandbox("empty")).expect("status");
    assert!(empty.containers_statuses.is_empty() && empty.timestamp > 0, "neither is ever left out alone");
    refused(ask("nothing"), Code::NOT_FOUND, "nothing");
}
