//! The client's side of SPDY/3.1 exec and attach, as kubectl does it: blocking, over any stream of bytes.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crisp::streaming::spdy::frame::{self, Decoder, Encoder, Frame};
use serde_json::Value;

/// Versions that kubectl asks for.
pub const PROTOCOLS: &str = "v5.channel.k8s.io, v4.channel.k8s.io, v3.channel.k8s.io, v2.channel.k8s.io, channel.k8s.io";
const PATIENCE: Duration = Duration::from_secs(60);

/// Host with port, and path.
pub fn split(url: &str) -> (String, String) {
    let rest = url.split_once("://").expect("a URL").1;
    let (host, path) = rest.split_once('/').expect("a path");
    (host.to_owned(), format!("/{path}"))
}

pub fn connect(url: &str) -> TcpStream {
    let socket = TcpStream::connect(split(url).0).expect("connect");
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket.set_write_timeout(Some(PATIENCE)).expect("set a timeout");
    socket
}

/// Sends the head of a request; the answer's status and head, with the body where it is no upgrade.
pub fn request<S: Read + Write>(socket: &mut S, method: &str, path: &str, headers: &str) -> (u16, String) {
    socket.write_all(format!("{method} {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n").as_bytes()).expect("send the head");
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") {
        assert_eq!(socket.read(&mut byte).expect("read the answer"), 1, "{:?}", String::from_utf8_lossy(&answer));
        answer.push(byte[0]);
    }
    let status = String::from_utf8_lossy(&answer[9..12]).parse().expect("a status");
    if status != 101 {
        let _ = socket.read_to_end(&mut answer);
    }
    (status, String::from_utf8(answer).expect("an answer is text"))
}

/// Headers of an upgrade with these protocol versions.
pub fn upgrade(protocols: &str) -> String {
    let versions = if protocols.is_empty() { String::new() } else { format!("X-Stream-Protocol-Version: {protocols}\r\n") };
    format!("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n{versions}")
}

/// What came on one stream.
#[derive(Default)]
pub struct Side {
    pub kind: String,
    pub bytes: Vec<u8>,
    /// All that came, kept or not.
    pub count: usize,
    pub replied: bool,
    pub finished: bool,
}

/// A connection that was upgraded.
pub struct Client<S> {
    pub socket: S,
    decoder: Decoder,
    encoder: Encoder,
    pub streams: BTreeMap<u32, Side>,
    /// Bytes of a stream beyond this are counted and dropped.
    pub keep: usize,
    /// Windows that the server has opened, by stream.
    pub opened: BTreeMap<u32, usize>,
    pub said_goodbye: bool,
    /// When anything but a sign of life came last.
    heard: Instant,
    buffer: Vec<u8>,
}

impl<S: Read + Write> Client<S> {
    pub fn new(socket: S) -> Client<S> {
        Client {
            socket,
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            streams: BTreeMap::new(),
            keep: usize::MAX,
            opened: BTreeMap::new(),
            said_goodbye: false,
            heard: Instant::now(),
            buffer: vec![0; 65536],
        }
    }

    /// Opens a stream and waits for the reply.
    pub fn stream(&mut self, kind: &str) -> u32 {
        let id = self.streams.keys().last().map_or(1, |last| last + 2);
        let syn = self.encoder.syn_stream(id, false, &[("streamtype", kind)]);
        self.socket.write_all(&syn).expect("open a stream");
        self.streams.insert(id, Side { kind: kind.to_owned(), ..Side::default() });
        self.until("a reply", |c| c.streams[&id].replied);
        id
    }

    pub fn send(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        self.socket.write_all(&frame::data_head(stream, bytes.len(), fin)).expect("send a head");
        self.socket.write_all(bytes).expect("send data");
    }

    /// Reads once; false at the end of the connection.
    pub fn step(&mut self) -> bool {
        let mut buffer = std::mem::take(&mut self.buffer);
        let n = self.socket.read(&mut buffer).expect("read frames");
        let mut input = &buffer[..n];
        loop {
            let (used, frame) = self.decoder.decode(input).expect("good frames");
            input = &input[used..];
            match frame {
                Some(frame) => self.take(frame),
                None => break,
            }
        }
        self.buffer = buffer;
        n > 0
    }

    fn take(&mut self, frame: Frame) {
        if !matches!(frame, Frame::Ping(_)) {
            self.heard = Instant::now();
        }
        match frame {
            Frame::SynReply { stream, .. } => self.side(stream).replied = true,
            Frame::Data { stream, bytes, fin } => {
                let keep = self.keep;
                let side = self.side(stream);
                assert!(side.replied && !side.finished, "data on {}", side.kind);
                side.count += bytes.len();
                let room = keep.saturating_sub(side.bytes.len());
                side.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
                side.finished |= fin;
            }
            Frame::WindowUpdate { stream, delta } => *self.opened.entry(stream).or_default() += delta as usize,
            Frame::Ping(id) => self.socket.write_all(&frame::ping(id)).expect("answer a ping"),
            Frame::GoAway { .. } => self.said_goodbye = true,
            other => panic!("{other:?}"),
        }
    }

    fn side(&mut self, stream: u32) -> &mut Side {
        self.streams.get_mut(&stream).expect("a stream of ours")
    }

    pub fn until(&mut self, what: &str, done: impl Fn(&Client<S>) -> bool) {
        self.heard = Instant::now();
        while !done(self) {
            assert!(self.step(), "the server hung up before {what}");
            assert!(self.heard.elapsed() < PATIENCE, "nothing came in {PATIENCE:?} before {what}");
        }
    }
}

/// A session with the streams that were asked for; 0 is none.
pub struct Session<S> {
    pub client: Client<S>,
    pub error: u32,
    pub stdin: u32,
    pub stdout: u32,
    pub stderr: u32,
    pub resize: u32,
}

/// How a session ended.
#[derive(Debug)]
pub struct End {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// From the status: 0 for Success, None for a failure without an exit code.
    pub code: Option<i32>,
    pub status: Value,
}

/// Opens the streams whose letters are in `wanted`: i, o, e, and r for resizes.
pub fn open<S: Read + Write>(mut socket: S, path: &str, wanted: &str) -> Session<S> {
    let (status, head) = request(&mut socket, "POST", path, &upgrade(PROTOCOLS));
    assert_eq!(status, 101, "{head}");
    assert!(head.contains("X-Stream-Protocol-Version: v4.channel.k8s.io\r\n"), "{head}");
    let mut client = Client::new(socket);
    let error = client.stream("error");
    let mut one = |letter, kind| if wanted.contains(letter) { client.stream(kind) } else { 0 };
    let (stdin, stdout, stderr, resize) = (one('i', "stdin"), one('o', "stdout"), one('e', "stderr"), one('r', "resize"));
    Session { client, error, stdin, stdout, stderr, resize }
}

impl<S: Read + Write> Session<S> {
    /// Waits for the end of every stream that the server writes to, and for its goodbye.
    pub fn end(mut self) -> End {
        let outputs: Vec<u32> = [self.error, self.stdout, self.stderr].into_iter().filter(|s| *s > 0).collect();
        self.client.until("the end", |c| c.said_goodbye && outputs.iter().all(|s| c.streams[s].finished));
        let mut bytes = |stream: u32| self.client.streams.remove(&stream).map(|s| s.bytes).unwrap_or_default();
        let status: Value = serde_json::from_slice(&bytes(self.error)).expect("a status");
        let cause = &status["details"]["causes"][0];
        let code = match status["status"].as_str() {
            Some("Success") => Some(0),
            _ if cause["reason"] == "ExitCode" => cause["message"].as_str().and_then(|n| n.parse().ok()),
            _ => None,
        };
        End { stdout: bytes(self.stdout), stderr: bytes(self.stderr), code, status }
    }

    /// Text that has come on stdout.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.client.streams[&self.stdout].bytes).into_owned()
    }
}
