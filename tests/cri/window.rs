//! Clients of the gRPC socket that open no window for answers, or only stay: frames of HTTP/2 by hand, for no library does that.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crisp::api::runtime::VersionRequest;
use crisp::cli::client::SHORT;

use crate::node::Node;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const INITIAL_WINDOW_SIZE: u16 = 4;

/// What came on one stream.
#[derive(Default)]
struct Answer {
    begun: bool,
    bytes: usize,
    ended: bool,
}

struct Connection {
    socket: UnixStream,
    answers: BTreeMap<u32, Answer>,
}

impl Connection {
    /// A client whose streams begin with this window.
    fn open(node: &Node, window: u32) -> Connection {
        let socket = UnixStream::connect(&node.config().socket).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
        let mut connection = Connection { socket, answers: BTreeMap::new() };
        connection.socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("send the preface");
        connection.set_window(window);
        connection
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = (payload.len() as u32).to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        self.socket.write_all(&frame).expect("send a frame");
    }

    fn set_window(&mut self, window: u32) {
        let mut setting = INITIAL_WINDOW_SIZE.to_be_bytes().to_vec();
        setting.extend_from_slice(&window.to_be_bytes());
        self.send(SETTINGS, 0, 0, &setting);
    }

    /// Calls Version.
    fn call(&mut self, stream: u32) {
        let headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/runtime.v1.RuntimeService/Version"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        // Literals that enter no table (RFC 7541, 6.2.2).
        let mut block = Vec::new();
        for (name, value) in headers {
            block.push(0);
            for text in [name, value] {
                block.push(text.len() as u8);
                block.extend_from_slice(text.as_bytes());
            }
        }
        self.send(HEADERS, END_HEADERS, stream, &block);
        // An empty message.
        self.send(DATA, END_STREAM, stream, &[0; 5]);
        self.answers.insert(stream, Answer::default());
    }

    /// Reads frames until all answers are as wanted.
    fn until(&mut self, what: &str, done: impl Fn(&Answer) -> bool) {
        while !self.answers.values().all(&done) {
            let mut head = [0; 9];
            self.socket.read_exact(&mut head).unwrap_or_else(|e| panic!("{what}: {e}"));
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.socket.read_exact(&mut payload).unwrap_or_else(|e| panic!("{what}: {e}"));
            let (kind, flags) = (head[3], head[4]);
            if kind == SETTINGS && flags & ACK == 0 {
                self.send(SETTINGS, ACK, 0, &[]);
            }
            let Some(answer) = self.answers.get_mut(&u32::from_be_bytes([head[5], head[6], head[7], head[8]])) else { continue };
            answer.begun |= kind == HEADERS;
            answer.bytes += if kind == DATA { payload.len() } else { 0 };
            answer.ended |= flags & END_STREAM != 0 && matches!(kind, HEADERS | DATA);
        }
    }
}

#[test]
fn a_client_that_takes_no_answer_keeps_no_worker() {
    let node = Node::start();
    let mut stuck = Connection::open(&node, 0);
    // More than there are workers.
    (0..12).for_each(|n| stuck.call(1 + 2 * n));
    stuck.until("the heads of all answers", |answer| answer.begun);
    assert!(stuck.answers.values().all(|answer| answer.bytes == 0 && !answer.ended), "there was a window");
    node.runtime().version(&VersionRequest::default(), SHORT).expect("others have their answers");
    // They were not lost.
    stuck.set_window(65535);
    stuck.until("all answers", |answer| answer.ended);
    assert!(stuck.answers.values().all(|answer| answer.bytes > 5));
}

#[test]
fn a_stop_waits_for_no_client() {
    let mut node = Node::start();
    let mut idle = Connection::open(&node, 65535);
    idle.call(1);
    idle.until("an answer", |answer| answer.ended);
    let mut stuck = Connection::open(&node, 0);
    stuck.call(1);
    stuck.until("the head of an answer", |answer| answer.begun);
    let begin = Instant::now();
    node.stop_daemon();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    node.start_daemon();
}
