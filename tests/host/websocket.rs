//! WebSocket sessions with real containers: the channels of exec, port-forward by channels and by SPDY in a tunnel.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use base64::engine::general_purpose::STANDARD;
use base64::Engine;
use crisp::api::runtime::{ExecRequest, PortForwardRequest};
use crisp::streaming::spdy::frame::{self, Decoder, Encoder, Frame};
use sha2::Digest;
use tungstenite::client::IntoClientRequest;
use tungstenite::protocol::{Role, WebSocket};
use tungstenite::Message;

use crate::daemon::patience;
use crate::harness::{handlers, Container, Host, Sandbox, PATIENCE};
use crate::objects::sandbox_config;

/// `http://ADDRESS/verb/token`
fn address(url: &str) -> SocketAddr {
    let rest = url.strip_prefix("http://").expect("plain HTTP");
    rest.split('/').next().expect("an authority").parse().expect("an address")
}

fn dial(url: &str) -> TcpStream {
    let socket = TcpStream::connect(address(url)).expect("connect to the streaming server");
    socket.set_read_timeout(Some(patience(PATIENCE))).expect("set a timeout");
    socket.set_write_timeout(Some(patience(PATIENCE))).expect("set a timeout");
    socket
}

/// Upgrades to a WebSocket that speaks `protocol`.
fn upgrade(url: &str, protocol: &str) -> WebSocket<TcpStream> {
    let mut request = url.replacen("http", "ws", 1).into_client_request().expect("a URL");
    if !protocol.is_empty() {
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().expect("a header"));
    }
    let (client, answer) = tungstenite::client(request, dial(url)).unwrap_or_else(|e| panic!("{url} {protocol}: {e}"));
    let chosen = answer.headers().get("Sec-WebSocket-Protocol").map_or("", |v| v.to_str().expect("text"));
    assert_eq!(chosen, protocol.split(", ").next().unwrap_or_default());
    client
}

/// A client of channels.
struct Channels {
    client: WebSocket<TcpStream>,
    base64: bool,
}

impl Channels {
    fn exec(host: &Host, container: &Container, protocol: &str, tty: bool, cmd: &[&str]) -> Channels {
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: cmd.iter().map(|&word| word.to_owned()).collect(),
            stdin: true,
            stdout: true,
            stderr: !tty,
            tty,
            ..Default::default()
        };
        let mut channels = Channels::open(&host.call(&request).url, protocol);
        assert_eq!(channels.next(), Some((1, Vec::new())), "the greeting");
        channels
    }

    fn open(url: &str, protocol: &str) -> Channels {
        Channels { client: upgrade(url, protocol), base64: protocol.contains("base64") }
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = match self.base64 {
            true => Message::text(format!("{channel}{}", STANDARD.encode(bytes))),
            false => Message::binary([&[channel], bytes].concat()),
        };
        self.client.send(message).expect("send a message");
    }

    /// A second handle for a thread that writes.
    fn writer(&self) -> Channels {
        let socket = self.client.get_ref().try_clone().expect("copy a socket");
        Channels { client: WebSocket::from_raw_socket(socket, Role::Client, None), base64: self.base64 }
    }

    /// None: the server has said goodbye, with the code for a good end.
    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match self.client.read().expect("read a message") {
                Message::Binary(bytes) => return Some((bytes[0], bytes[1..].to_vec())),
                Message::Text(text) => {
                    let bytes = STANDARD.decode(&text.as_bytes()[1..]).expect("base64");
                    return Some((text.as_bytes()[0] - b'0', bytes));
                }
                Message::Close(close) => {
                    assert_eq!(close.map(|c| u16::from(c.code)), Some(1000));
                    return None;
                }
                _ => {}
            }
        }
    }

    /// What comes on stdout, stderr and error until the end.
    fn all(&mut self) -> [Vec<u8>; 3] {
        let mut all = [const { Vec::new() }; 3];
        while let Some((channel, bytes)) = self.next() {
            all[usize::from(channel) - 1].extend(bytes);
        }
        all
    }
}

fn code(status: &[u8]) -> Option<i32> {
    let status: serde_json::Value = serde_json::from_slice(status).expect("a Status in JSON");
    match status["status"].as_str() {
        Some("Success") => Some(0),
        _ => {
            assert_eq!(status["reason"], "NonZeroExitCode", "{status}");
            let cause = &status["details"]["causes"][0];
            assert_eq!(cause["reason"], "ExitCode");
            cause["message"].as_str()?.parse().ok()
        }
    }
}

#[test]
fn exec_over_every_websocket_protocol() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("ws-{handler}"), &handler);
        let container = host.launch(&sandbox, "main", &["sleep", "1000"]);
        let script = ["sh", "-c", "read a; echo got $a; echo to stderr >&2; exit $a"];
        for protocol in ["v5.channel.k8s.io, v4.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"] {
            for wanted in [0, 7, 137] {
                let mut exec = Channels::exec(&host, &container, protocol, false, &script);
                exec.send(0, format!("{wanted}\n").as_bytes());
                let [out, err, status] = exec.all();
                assert_eq!(String::from_utf8_lossy(&out), format!("got {wanted}\n"), "{protocol}");
                assert_eq!(err, b"to stderr\n");
                assert_eq!(code(&status), Some(wanted), "{protocol}");
            }
        }
        for protocol in ["channel.k8s.io", "base64.channel.k8s.io", ""] {
            let mut exec = Channels::exec(&host, &container, protocol, false, &script);
            exec.send(0, b"3\n");
            let [out, _, words] = exec.all();
            assert_eq!(out, b"got 3\n", "{protocol}");
            let words = String::from_utf8(words).expect("text");
            assert!(words.contains('3') && !words.starts_with('{'), "{protocol}: {words}");
        }
    }
    host.finish();
}

#[test]
fn v5_ends_stdin_alone() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("v5-{handler}"), &handler);
        let container = host.launch(&sandbox, "main", &["sleep", "1000"]);
        let mut exec = Channels::exec(&host, &container, "v5.channel.k8s.io", false, &["cat"]);
        let sent: Vec<u8> = (0..4_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let (mut writer, bytes) = (exec.writer(), sent.clone());
        let thread = std::thread::spawn(move || {
            bytes.chunks(33_333).for_each(|part| writer.send(0, part));
            writer.client.send(Message::binary(vec![255, 0])).expect("end stdin");
        });
        let [out, err, status] = exec.all();
        thread.join().expect("the writer");
        assert!(out == sent && err.is_empty(), "{} bytes came back", out.len());
        assert_eq!(code(&status), Some(0));
    }
    host.finish();
}

#[test]
fn a_terminal_takes_sizes() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("tty-{handler}"), &handler);
        let container = host.launch(&sandbox, "main", &["sleep", "1000"]);
        for protocol in ["v5.channel.k8s.io", "v4.base64.channel.k8s.io"] {
            let mut exec = Channels::exec(&host, &container, protocol, true, &["sh"]);
            exec.send(4, br#"{"Width":101,"Height":37}"#);
            let (mut text, begin) = (String::new(), Instant::now());
            exec.send(0, b"stty size\n");
            // The size may come to the terminal a moment after the question.
            while !text.contains("37 101") {
                assert!(begin.elapsed() < patience(PATIENCE), "{text}");
                let (channel, bytes) = exec.next().expect("the shell goes on");
                assert_eq!(channel, 1);
                text.push_str(&String::from_utf8_lossy(&bytes));
                if text.ends_with("# ") && !text.contains("37 101") {
                    exec.send(0, b"stty size\n");
                }
            }
            exec.send(0, b"exit 5\n");
            assert_eq!(code(&exec.all()[2]), Some(5), "{protocol}");
        }
    }
    host.finish();
}

/// Bytes of a connection, of TCP or of a tunnel.
enum Carrier {
    Plain(TcpStream),
    Tunnel(Box<WebSocket<TcpStream>>),
}

/// A SPDY client with one connection after the other.
struct Forward {
    carrier: Carrier,
    encoder: Encoder,
    decoder: Decoder,
    bytes: Vec<u8>,
    request: u32,
}

impl Forward {
    fn open(url: &str, tunnel: bool) -> Forward {
        let carrier = match tunnel {
            true => Carrier::Tunnel(Box::new(upgrade(url, "SPDY/3.1+portforward.k8s.io"))),
            false => {
                let mut socket = dial(url);
                let path = url.splitn(4, '/').nth(3).expect("a path");
                let head = format!(
                    "POST /{path} HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
                     X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
                );
                socket.write_all(head.as_bytes()).expect("send the head");
                let mut answer = Vec::new();
                while !answer.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    socket.read_exact(&mut byte).expect("read the answer");
                    answer.push(byte[0]);
                }
                assert!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
                Carrier::Plain(socket)
            }
        };
        Forward { carrier, encoder: Encoder::default(), decoder: Decoder::default(), bytes: Vec::new(), request: 0 }
    }

    fn write(&mut self, bytes: Vec<u8>) {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.write_all(&bytes).expect("write"),
            Carrier::Tunnel(client) => client.send(Message::binary(bytes)).expect("write a message"),
        }
    }

    fn next(&mut self) -> Frame {
        loop {
            let (used, frame) = self.decoder.decode(&self.bytes).expect("a frame");
            self.bytes.drain(..used);
            if let Some(frame) = frame {
                return frame;
            }
            match &mut self.carrier {
                Carrier::Plain(socket) => {
                    let mut buffer = vec![0; 65536];
                    let n = socket.read(&mut buffer).expect("read");
                    assert!(n > 0, "the server has closed the connection");
                    self.bytes.extend(&buffer[..n]);
                }
                Carrier::Tunnel(client) => match client.read().expect("read a message") {
                    Message::Binary(bytes) => self.bytes.extend(&bytes[..]),
                    Message::Close(_) => panic!("the server has closed the tunnel"),
                    _ => {}
                },
            }
        }
    }

    /// Drops what has come over a tunnel: a client that reads nothing is not read from in the end.
    fn drain(&mut self) {
        let Carrier::Tunnel(client) = &mut self.carrier else { return };
        client.get_ref().set_nonblocking(true).expect("change a socket");
        while let Ok(message) = client.read() {
            if let Message::Binary(bytes) = message {
                self.bytes.extend(&bytes[..]);
            }
        }
        client.get_ref().set_nonblocking(false).expect("change a socket");
        while !self.bytes.is_empty() {
            let (used, frame) = self.decoder.decode(&self.bytes).expect("a frame");
            assert!(!matches!(frame, Some(Frame::Data { .. } | Frame::Reset { .. })), "{frame:?}");
            self.bytes.drain(..used);
        }
    }

    /// Opens both streams; the data stream.
    fn connect(&mut self, port: u16) -> u32 {
        let (port, request) = (port.to_string(), self.request.to_string());
        let first = 4 * self.request + 1;
        self.request += 1;
        for (stream, kind) in [(first, "error"), (first + 2, "data")] {
            let headers = [("streamtype", kind), ("port", &*port), ("requestid", &*request)];
            let bytes = self.encoder.syn_stream(stream, kind == "error", &headers);
            self.write(bytes);
        }
        first + 2
    }

    fn send(&mut self, stream: u32, bytes: &[u8]) {
        self.write([&frame::data_head(stream, bytes.len(), false), bytes].concat());
    }

    fn finish(&mut self, stream: u32) {
        self.write(frame::data_head(stream, 0, true).to_vec());
    }

    /// The data and the words of a connection, until both streams are over.
    fn all(&mut self, data: u32) -> (Vec<u8>, String) {
        let (mut all, mut words, mut over) = (Vec::new(), Vec::new(), [false; 2]);
        while over != [true; 2] {
            match self.next() {
                Frame::Data { stream, bytes, fin } if stream == data => {
                    all.extend(bytes);
                    over[0] |= fin;
                }
                Frame::Data { stream, bytes, fin } if stream + 2 == data => {
                    words.extend(bytes);
                    over[1] |= fin;
                }
                Frame::Reset { stream, .. } if stream == data => over[0] = true,
                _ => {}
            }
        }
        (all, String::from_utf8(words).expect("text"))
    }
}

fn url(host: &Host, sandbox: &Sandbox, ports: &[u16]) -> String {
    let port = ports.iter().map(|p| i32::from(*p)).collect();
    host.call(&PortForwardRequest { pod_sandbox_id: sandbox.id.clone(), port, ..Default::default() }).url
}

/// A port that nobody listens on, here and now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("find a free port").port()
}

const GET: &[u8] = b"GET /index.html HTTP/1.0\r\n\r\n";

/// Until the server answers: it listens a moment after its start.
fn get(forward: &mut Forward, port: u16) -> String {
    let begin = Instant::now();
    loop {
        let data = forward.connect(port);
        forward.send(data, GET);
        let (answer, words) = forward.all(data);
        if words.is_empty() {
            return String::from_utf8(answer).expect("text");
        }
        assert!(begin.elapsed() < patience(PATIENCE) && words.contains("connection refused"), "{words}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ports_of_a_pod_and_of_the_host() {
    let host = Host::start();
    for handler in handlers() {
        for node in [false, true] {
            let config = sandbox_config(&host.daemon.layout, &format!("pf-{node}-{handler}"), node);
            let sandbox = host.run(config, &handler);
            let (v4, v6, refused) = (free_port(), free_port(), free_port());
            let serve = |address: String| {
                let script =
                    format!("mkdir -p /tmp/www; echo from {address} > /tmp/www/index.html; exec httpd -f -p {address} -h /tmp/www");
                host.launch(&sandbox, &address.replace([':', '.', '[', ']'], "-"), &["sh", "-c", &script]);
            };
            serve(format!("127.0.0.1:{v4}"));
            serve(format!("[::1]:{v6}"));
            for tunnel in [false, true] {
                let mut forward = Forward::open(&url(&host, &sandbox, &[]), tunnel);
                assert!(get(&mut forward, v4).contains(&format!("from 127.0.0.1:{v4}")), "node {node} tunnel {tunnel}");
                assert!(get(&mut forward, v6).contains(&format!("from [::1]:{v6}")));
                let data = forward.connect(refused);
                let (none, words) = forward.all(data);
                assert!(none.is_empty() && words.starts_with(&format!("error forwarding port {refused} to pod {}", sandbox.id)), "{words}");
                assert!(get(&mut forward, v4).contains("200 OK"), "the session goes on");
            }
            for protocol in ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""] {
                let mut channels = Channels::open(&url(&host, &sandbox, &[v4, refused]), protocol);
                let mut seen = [const { Vec::new() }; 4];
                channels.send(0, GET);
                while let Some((channel, bytes)) = channels.next() {
                    seen[usize::from(channel)].extend(bytes);
                }
                assert!(seen.iter().zip([v4, v4, refused, refused]).all(|(s, port)| s.starts_with(&port.to_le_bytes())), "{protocol}");
                let text = |n: usize| String::from_utf8_lossy(&seen[n][2..]).into_owned();
                assert!(text(0).contains(&format!("from 127.0.0.1:{v4}")), "{protocol}: {}", text(0));
                assert!(text(1).is_empty() && text(2).is_empty() && text(3).contains("connection refused"), "{protocol}");
            }
        }
    }
    host.finish();
}

#[test]
fn a_gigabyte_through_a_tunnel_in_flat_memory() {
    let host = Host::start();
    let handler = handlers().pop().expect("a handler");
    let sandbox = host.sandbox("pf-much", &handler);
    // With an end of its input nc would end its side of the connection.
    let sink = host.launch(&sandbox, "sink", &["sh", "-c", "sleep 1000 | nc -l -p 7000 | sha256sum"]);
    // Port 7000 in hexadecimal.
    let listens = "until grep -q ':1B58 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.05; done";
    assert_eq!(host.exec(&sink, &["sh", "-c", listens]).0, 0);
    let mut forward = Forward::open(&url(&host, &sandbox, &[]), true);
    let data = forward.connect(7000);
    let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let mut digest = sha2::Sha256::default();
    let peak = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", host.daemon.pid())).expect("read the daemon's status");
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).expect("a peak").to_owned();
        line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number")
    };
    let before = peak();
    for _ in 0..1024 {
        forward.send(data, &block);
        forward.drain();
        digest.update(&block);
    }
    forward.finish(data);
    assert_eq!(forward.all(data), (Vec::new(), String::new()));
    sink.log.wait_for("  -");
    let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert!(sink.log.text("stdout").starts_with(&hex), "{} instead of {hex}", sink.log.text("stdout"));
    assert!(peak() < before + 16 * 1024, "the daemon grew from {before} KiB to {} KiB", peak());
    host.finish();
}
