//! ExecSync.

use std::time::{Duration, Instant};

use crisp::api::runtime::*;
use crisp::cli::client::SHORT;
use grpcio::RpcStatusCode as Code;

use crate::node::{alive, refused, Node, Options};

#[test]
fn output_and_exit_code() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let answer = node.exec(&id, "echo out; echo err >&2; exit 7", 10).expect("exec");
    assert_eq!((answer.stdout.as_slice(), answer.stderr.as_slice(), answer.exit_code), (&b"out\n"[..], &b"err\n"[..], 7));
    let killed = node.exec(&id, "kill -9 $$", 10).expect("exec");
    assert_eq!(killed.exit_code, 137);
    let environment = node.exec(&id, "echo $FROM_IMAGE $HOSTNAME", 10).expect("exec");
    assert!(environment.stdout.starts_with(b"yes "), "{:?}", String::from_utf8_lossy(&environment.stdout));
    // Nobody reads stdin.
    assert_eq!(node.exec(&id, "cat", 10).expect("exec").stdout, b"");
}

#[test]
fn states_and_empty_commands() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.create(&sandbox, &node.container_config("app", "exec sleep 1000")).expect("create");
    refused(node.exec(&id, "true", 1), Code::FAILED_PRECONDITION, "CREATED");
    node.start_container(&id).expect("start");
    let empty = ExecSyncRequest { container_id: id.clone(), ..Default::default() };
    refused(node.runtime().exec_sync(&empty, SHORT), Code::INVALID_ARGUMENT, "cmd");
    refused(node.exec(&id, "echo a\0b", 1), Code::INVALID_ARGUMENT, "cmd: a NUL byte");
    let streamed = ExecRequest { container_id: id.clone(), cmd: vec!["a\0b".into()], stdout: true, ..Default::default() };
    refused(node.runtime().exec(&streamed, SHORT), Code::INVALID_ARGUMENT, "cmd: a NUL byte");
    node.stop(&id, 0).expect("stop");
    refused(node.exec(&id, "true", 1), Code::FAILED_PRECONDITION, "EXITED");
}

#[test]
fn at_the_timeout_the_whole_tree_is_dead() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let script = format!("echo $$ > {0}/a; (setsid sh -c 'echo $$ > {0}/b; exec sleep 1000' &); sleep 1000", node.path("").display());
    let begin = Instant::now();
    refused(node.exec(&id, &script, 1), Code::DEADLINE_EXCEEDED, "timed out");
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    for name in ["a", "b"] {
        let pid: i32 = std::fs::read_to_string(node.path(name)).expect("a pid").trim().parse().expect("a pid");
        assert!(!alive(pid), "{name} lives");
    }
    assert_eq!(node.state(&id), ContainerState::CONTAINER_RUNNING);
}

#[test]
fn a_daemon_that_keeps_the_output_open_does_not_hang_it() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let begin = Instant::now();
    let answer = node.exec(&id, "setsid sleep 30 & echo started", 20).expect("exec");
    assert_eq!((answer.stdout.as_slice(), answer.exit_code), (&b"started\n"[..], 0));
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[test]
fn output_over_the_limit_is_dropped() {
    let node = Node::with(Options { limits: "exec_output_bytes = 1024".into(), ..Default::default() });
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let answer = node.exec(&id, "head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2; exit 4", 10).expect("exec");
    assert_eq!(answer.exit_code, 4);
    assert!(answer.stdout.len() + answer.stderr.len() <= 1024);
}

#[test]
fn the_largest_answer_fits_a_client() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    let answer = node.exec(&id, "head -c 12000000 /dev/zero; head -c 12000000 /dev/zero >&2", 20).expect("exec");
    assert!(answer.stdout.len() + answer.stderr.len() < 16 << 20);
    assert!(answer.stdout.len() >= 8 << 20);
}

#[test]
fn an_exec_ends_with_its_container() {
    let node = Node::start();
    let sandbox = node.sandbox("web");
    let id = node.launch(&sandbox, "app", "exec sleep 1000");
    std::thread::scope(|scope| {
        let exec = scope.spawn(|| node.exec(&id, "sleep 1000", 0));
        std::thread::sleep(Duration::from_millis(300));
        node.stop(&id, 0).expect("stop");
        let answer = exec.join().expect("no panic");
        assert!(answer.map_or(true, |a| a.exit_code == 137));
    });
}
