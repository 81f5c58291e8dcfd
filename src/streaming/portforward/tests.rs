//! Sessions over each kind of connection, to real servers in a network namespace of the test's own (as root; else on the host).

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tungstenite::protocol::{Role, WebSocket};
use tungstenite::Message;

use super::run;
use crate::error::{Code, Result};
use crate::streaming::request::NetTarget;
use crate::streaming::spdy::frame::{self, Decoder, Encoder, Frame};
use crate::streaming::spdy::Spdy;
use crate::streaming::transport::{prepare, Plain};
use crate::streaming::tunnel::Tunnel;
use crate::streaming::websocket::{self, Channels, Protocol, Upgrade};
use crate::streaming::wire::Wire;
use crate::sys::cancel::Cancel;
use crate::sys::namespace::{create, in_netns, unpin, NewNamespaces};

const PATIENCE: Duration = Duration::from_secs(20);

/// A network namespace with servers in it.
struct Net {
    pin: Option<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Net {
    fn new() -> Net {
        let dir = tempfile::tempdir().unwrap();
        let pin = rustix::process::geteuid().is_root().then(|| dir.path().join("net"));
        if let Some(pin) = &pin {
            create(NewNamespaces { net: Some(pin.clone()), ..NewNamespaces::default() }).unwrap();
        }
        Net { pin, _dir: dir }
    }

    fn target(&self) -> NetTarget {
        self.pin.clone().map_or(NetTarget::Host, NetTarget::Netns)
    }

    fn listen(&self, address: &'static str) -> TcpListener {
        match &self.pin {
            Some(pin) => in_netns(pin, move || Ok(TcpListener::bind(address).unwrap())).unwrap(),
            None => TcpListener::bind(address).unwrap(),
        }
    }

    /// Serves one connection after the other, each on a thread. Gives the port.
    fn serve(&self, address: &'static str, body: impl Fn(TcpStream) + Send + Clone + 'static) -> u16 {
        let listener = self.listen(address);
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let (socket, body) = (socket.unwrap(), body.clone());
                std::thread::spawn(move || body(socket));
            }
        });
        port
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Some(pin) = &self.pin {
            let _ = unpin(pin);
        }
    }
}

fn echo(mut socket: TcpStream) {
    let _ = std::io::copy(&mut socket.try_clone().unwrap(), &mut socket);
    let _ = socket.shutdown(Shutdown::Write);
}

/// What the client sees of its n-th connection.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Data(usize, Vec<u8>),
    End(usize),
    Words(usize, String),
    WordsEnd(usize),
    Reset(usize),
    /// A window of the n-th connection, or of the session (None), has opened by so much.
    Window(Option<usize>, usize),
    Closed,
    /// Nothing, for as long as the socket waits.
    Quiet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Spdy,
    Tunnel,
    Channels,
    Base64,
}

/// Writes what a client writes. Streams of the n-th connection: SPDY 4n+1 (error) and 4n+3, channels 2n and 2n+1 (error).
struct Sender {
    encoder: Encoder,
    kind: Kind,
    socket: TcpStream,
    websocket: Option<WebSocket<TcpStream>>,
    opened: usize,
}

impl Sender {
    fn raw(&mut self, bytes: Vec<u8>) {
        match &mut self.websocket {
            Some(websocket) => websocket.send(Message::binary(bytes)).unwrap(),
            None => self.socket.write_all(&bytes).unwrap(),
        }
    }

    fn open(&mut self, port: u16) -> usize {
        let n = self.opened;
        self.opened += 1;
        let (port, request) = (port.to_string(), n.to_string());
        for (stream, kind) in [(4 * n + 1, "error"), (4 * n + 3, "data")] {
            let headers = [("streamtype", kind), ("port", &*port), ("requestid", &*request)];
            let bytes = self.encoder.syn_stream(stream as u32, kind == "error", &headers);
            self.raw(bytes);
        }
        n
    }

    fn send(&mut self, n: usize, bytes: &[u8]) {
        for part in bytes.chunks(100_000) {
            let message = match self.kind {
                Kind::Channels => [&[2 * n as u8], part].concat(),
                Kind::Base64 => {
                    use base64::Engine;
                    let text = base64::engine::general_purpose::STANDARD.encode(part);
                    let message = Message::text(format!("{}{text}", 2 * n));
                    self.websocket.as_mut().unwrap().send(message).unwrap();
                    continue;
                }
                _ => [&frame::data_head(4 * n as u32 + 3, part.len(), false), part].concat(),
            };
            self.raw(message);
        }
    }

    fn finish(&mut self, n: usize) {
        self.raw(frame::data_head(4 * n as u32 + 3, 0, true).to_vec());
    }
}

/// Reads what a client reads.
struct Receiver {
    decoder: Decoder,
    kind: Kind,
    socket: TcpStream,
    websocket: Option<WebSocket<TcpStream>>,
    bytes: Vec<u8>,
    seen: VecDeque<Seen>,
    /// Channels whose port has come.
    greeted: HashMap<usize, u16>,
}

impl Receiver {
    fn next(&mut self) -> Seen {
        loop {
            if let Some(seen) = self.seen.pop_front() {
                return seen;
            }
            self.more();
        }
    }

    fn more(&mut self) {
        let message = match &mut self.websocket {
            Some(websocket) => match websocket.read() {
                Ok(Message::Binary(bytes)) => bytes.to_vec(),
                Ok(Message::Text(text)) => {
                    use base64::Engine;
                    let bytes = base64::engine::general_purpose::STANDARD.decode(&text.as_bytes()[1..]).unwrap();
                    [&[text.as_bytes()[0] - b'0'], &bytes[..]].concat()
                }
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => return,
                Ok(Message::Close(close)) => {
                    assert_eq!(u16::from(close.unwrap().code), 1000);
                    let _ = websocket.flush();
                    return self.seen.push_back(Seen::Closed);
                }
                Err(tungstenite::Error::Io(e)) if e.kind() == ErrorKind::WouldBlock => return self.seen.push_back(Seen::Quiet),
                Err(e) => panic!("{e}"),
            },
            None => {
                let mut buffer = vec![0; 65536];
                match self.socket.read(&mut buffer) {
                    Ok(0) => return self.seen.push_back(Seen::Closed),
                    Ok(n) => buffer[..n].to_vec(),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => return self.seen.push_back(Seen::Quiet),
                    Err(e) => panic!("{e}"),
                }
            }
        };
        match self.kind {
            Kind::Spdy | Kind::Tunnel => {
                self.bytes.extend(message);
                self.frames();
            }
            Kind::Channels | Kind::Base64 => self.channel(&message),
        }
    }

    fn channel(&mut self, message: &[u8]) {
        let (channel, payload) = (usize::from(message[0]), &message[1..]);
        if let std::collections::hash_map::Entry::Vacant(e) = self.greeted.entry(channel) {
            e.insert(u16::from_le_bytes(payload.try_into().expect("the port comes first")));
            return;
        }
        self.seen.push_back(match channel % 2 {
            0 => Seen::Data(channel / 2, payload.to_vec()),
            _ => Seen::Words(channel / 2, String::from_utf8(payload.to_vec()).unwrap()),
        });
    }

    fn frames(&mut self) {
        let mut at = 0;
        while at < self.bytes.len() {
            let (used, frame) = self.decoder.decode(&self.bytes[at..]).unwrap();
            at += used;
            let Some(frame) = frame else { continue };
            let place = |stream: u32| (stream as usize / 4, stream % 4 == 3);
            match frame {
                Frame::Data { stream, bytes, fin } => {
                    let (n, is_data) = place(stream);
                    match is_data {
                        _ if bytes.is_empty() => {}
                        true => self.seen.push_back(Seen::Data(n, bytes)),
                        false => self.seen.push_back(Seen::Words(n, String::from_utf8(bytes).unwrap())),
                    }
                    if fin {
                        self.seen.push_back(if is_data { Seen::End(n) } else { Seen::WordsEnd(n) });
                    }
                }
                Frame::Reset { stream, .. } => self.seen.push_back(Seen::Reset(place(stream).0)),
                Frame::WindowUpdate { stream, delta } => {
                    self.seen.push_back(Seen::Window((stream != 0).then(|| place(stream).0), delta as usize));
                }
                Frame::GoAway { .. } => self.seen.push_back(Seen::Closed),
                _ => {}
            }
        }
        self.bytes.clear();
    }

    /// The next but for windows.
    fn plain(&mut self) -> Seen {
        loop {
            match self.next() {
                Seen::Window(..) => {}
                seen => return seen,
            }
        }
    }

    /// All data of one connection until its end, and the words.
    fn all(&mut self, n: usize) -> (Vec<u8>, String) {
        let (mut data, mut words, mut ends) = (Vec::new(), String::new(), 0);
        while ends < 2 {
            match self.next() {
                Seen::Data(m, bytes) if m == n => data.extend(bytes),
                Seen::Words(m, text) if m == n => words.push_str(&text),
                Seen::End(m) | Seen::WordsEnd(m) | Seen::Reset(m) if m == n => ends += 1,
                Seen::Closed => ends = 2,
                Seen::Quiet => panic!("no end of connection {n} after {} bytes", data.len()),
                _ => {}
            }
        }
        (data, words)
    }
}

struct Session {
    sender: Sender,
    receiver: Receiver,
    cancel: Cancel,
    thread: JoinHandle<Result<()>>,
}

fn start(kind: Kind, net: &Net, ports: &[u16], idle: Duration) -> Session {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    let server = listener.accept().unwrap().0;
    prepare(&server).unwrap();
    let channels = |base64| Upgrade {
        protocol: Protocol::Channels { base64, half_close: false, status: true },
        name: "v4.channel.k8s.io",
        answer: String::new(),
    };
    let server = Plain::new(server);
    let wire: Box<dyn Wire> = match kind {
        Kind::Spdy => Box::new(Spdy::new(server, Vec::new())),
        Kind::Tunnel => Box::new(Spdy::new(Tunnel::new(server, Vec::new()), Vec::new())),
        Kind::Channels => websocket::open(server, &channels(false), &Channels::Ports(ports.to_vec())).unwrap(),
        Kind::Base64 => websocket::open(server, &channels(true), &Channels::Ports(ports.to_vec())).unwrap(),
    };
    let cancel = Cancel::never();
    let (target, ours) = (net.target(), cancel.clone());
    let thread = std::thread::spawn(move || run(wire, "5a4db0", &target, idle, &ours));
    let websocket =
        |socket: &TcpStream| (kind != Kind::Spdy).then(|| WebSocket::from_raw_socket(socket.try_clone().unwrap(), Role::Client, None));
    let socket = client.try_clone().unwrap();
    let sender = Sender { encoder: Encoder::default(), kind, websocket: websocket(&client), socket, opened: 0 };
    let (websocket, socket) = (websocket(&client), client);
    let receiver = Receiver {
        decoder: Decoder::default(),
        kind,
        websocket,
        socket,
        bytes: Vec::new(),
        seen: VecDeque::new(),
        greeted: HashMap::new(),
    };
    Session { sender, receiver, cancel, thread }
}

impl Session {
    fn stop(self) {
        drop(self.sender);
        self.receiver.socket.shutdown(Shutdown::Both).unwrap();
        self.thread.join().unwrap().unwrap();
    }
}

const SPDY: [Kind; 2] = [Kind::Spdy, Kind::Tunnel];
const CHANNELS: [Kind; 2] = [Kind::Channels, Kind::Base64];

/// Bytes that differ from place to place and from `seed` to `seed`.
fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(31) ^ (i >> 9) ^ seed.wrapping_mul(97)) as u8).collect()
}

#[test]
fn half_close_both_ways() {
    let net = Net::new();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let after = net.serve(address, |mut socket| {
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            all.reverse();
            socket.write_all(&all).unwrap();
        });
        let (told, heard) = std::sync::mpsc::channel();
        let before = net.serve(address, move |mut socket| {
            socket.write_all(b"first").unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            told.send(all).unwrap();
        });
        for kind in SPDY {
            let mut s = start(kind, &net, &[], PATIENCE);
            let n = s.sender.open(after);
            let sent = pattern(1, 300_000);
            s.sender.send(n, &sent);
            s.sender.finish(n);
            let (mut got, words) = s.receiver.all(n);
            got.reverse();
            assert!(got == sent && words.is_empty(), "{kind:?} {address}: {} bytes, {words}", got.len());

            let n = s.sender.open(before);
            assert_eq!(s.receiver.all(n), (b"first".to_vec(), String::new()));
            s.sender.send(n, b"and then");
            s.sender.finish(n);
            assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), b"and then");
            s.stop();
        }
    }
}

#[test]
fn refused_ports_are_told_and_the_session_is_kept() {
    let net = Net::new();
    let refused = net.listen("127.0.0.1:0").local_addr().unwrap().port();
    let port = net.serve("127.0.0.1:0", echo);
    for kind in SPDY {
        let mut s = start(kind, &net, &[], PATIENCE);
        for _ in 0..3 {
            let n = s.sender.open(refused);
            let Seen::Words(m, words) = s.receiver.plain() else { panic!("{kind:?}: no words") };
            assert_eq!(m, n);
            let start = format!(
                "error forwarding port {refused} to pod 5a4db0, uid : unable to do port forwarding: connect to localhost:{refused}"
            );
            assert!(words.starts_with(&start), "{words}");
            assert!(words.ends_with("127.0.0.1: connection refused, ::1: connection refused"), "{words}");
            assert_eq!((s.receiver.plain(), s.receiver.plain()), (Seen::WordsEnd(n), Seen::Reset(n)));
            let n = s.sender.open(port);
            s.sender.send(n, b"still there?");
            s.sender.finish(n);
            assert_eq!(s.receiver.all(n), (b"still there?".to_vec(), String::new()));
        }
        s.stop();
    }
    for kind in CHANNELS {
        let mut s = start(kind, &net, &[port, refused], PATIENCE);
        s.sender.send(0, b"hello");
        let mut seen = [s.receiver.plain(), s.receiver.plain()];
        seen.sort_by_key(|s| matches!(s, Seen::Words(..)));
        assert_eq!(seen[0], Seen::Data(0, b"hello".to_vec()), "{kind:?}");
        assert!(matches!(&seen[1], Seen::Words(1, words) if words.contains("connection refused")), "{kind:?}");
        assert_eq!(s.receiver.greeted, HashMap::from([(0, port), (1, port), (2, refused), (3, refused)]));
        s.stop();
    }
}

#[test]
fn channels_end_with_their_servers() {
    let net = Net::new();
    let port = net.serve("[::1]:0", |mut socket| {
        let mut head = [0; 4];
        socket.read_exact(&mut head).unwrap();
        socket.write_all(&pattern(2, 400_000)).unwrap();
    });
    for kind in CHANNELS {
        let mut s = start(kind, &net, &[port, port], PATIENCE);
        for n in [0, 1] {
            s.sender.send(n, b"GET ");
            let mut got = 0;
            while got < 400_000 {
                let Seen::Data(m, bytes) = s.receiver.next() else { panic!("no data") };
                assert_eq!(m, n);
                got += bytes.len();
            }
            assert_eq!(got, 400_000);
        }
        assert_eq!(s.receiver.next(), Seen::Closed);
        s.stop();
    }
}

#[test]
fn fifty_connections_at_once() {
    let net = Net::new();
    let port = net.serve("127.0.0.1:0", echo);
    for kind in SPDY {
        let s = start(kind, &net, &[], PATIENCE);
        let (mut sender, mut receiver) = (s.sender, s.receiver);
        let writer = std::thread::spawn(move || {
            let all: Vec<usize> = (0..50).map(|_| sender.open(port)).collect();
            for step in 0..4 {
                for n in &all {
                    sender.send(*n, &pattern(*n, 40_000)[step * 10_000..][..10_000]);
                }
            }
            all.iter().for_each(|n| sender.finish(*n));
            sender
        });
        let mut got: HashMap<usize, Vec<u8>> = HashMap::new();
        let mut ends = 0;
        while ends < 50 {
            match receiver.next() {
                Seen::Data(n, bytes) => got.entry(n).or_default().extend(bytes),
                Seen::End(_) => ends += 1,
                Seen::WordsEnd(_) | Seen::Window(..) => {}
                other => panic!("{kind:?}: {other:?}"),
            }
        }
        let sender = writer.join().unwrap();
        for n in 0..50 {
            assert!(got[&n] == pattern(n, 40_000), "{kind:?}: connection {n} differs");
        }
        Session { sender, receiver, ..s }.stop();
    }
}

#[test]
fn a_stalled_server_does_not_block_others() {
    let net = Net::new();
    let (keep, kept) = std::sync::mpsc::channel();
    let stalled = net.serve("127.0.0.1:0", move |socket| keep.send(socket).unwrap());
    let port = net.serve("127.0.0.1:0", echo);
    for kind in SPDY {
        let mut s = start(kind, &net, &[], PATIENCE);
        let slow = s.sender.open(stalled);
        let _socket = kept.recv_timeout(PATIENCE).unwrap();
        // A client that keeps windows: it sends what they allow until nothing opens them any more.
        let (mut window, mut session, mut sent) = (64 << 10, 64 << 10, 0);
        s.receiver.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut quiet = false;
        while !quiet {
            let n: usize = window.min(session).min(30_000);
            s.sender.send(slow, &vec![1; n]);
            (window, session, sent) = (window - n, session - n, sent + n);
            let has_room = window > 0 && session > 0;
            match s.receiver.next() {
                Seen::Window(Some(_), more) => window += more,
                Seen::Window(None, more) => session += more,
                Seen::Quiet => quiet = !has_room,
                other => panic!("{other:?}"),
            }
        }
        assert!(sent < 64 << 20, "{kind:?}: a server that reads nothing was sent {sent} bytes");
        s.receiver.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(session >= 1000, "{kind:?}: one stream holds the window of the whole session");
        let n = s.sender.open(port);
        s.sender.send(n, &pattern(3, 1000));
        s.sender.finish(n);
        assert!(s.receiver.all(n).0 == pattern(3, 1000), "{kind:?}");
        s.stop();
    }
}

#[test]
fn many_bytes_come_whole() {
    let net = Net::new();
    let port = net.serve("127.0.0.1:0", echo);
    let total = 48 << 20;
    for kind in [Kind::Spdy, Kind::Tunnel, Kind::Channels] {
        let s = start(kind, &net, &[port], PATIENCE);
        let (mut sender, mut receiver) = (s.sender, s.receiver);
        let block = pattern(4, 1 << 20);
        let expected = block.clone();
        let writer = std::thread::spawn(move || {
            let n = if kind == Kind::Channels { 0 } else { sender.open(port) };
            (0..total / block.len()).for_each(|_| sender.send(n, &block));
            sender
        });
        let mut got = 0;
        while got < total {
            match receiver.next() {
                Seen::Data(_, bytes) => {
                    for part in bytes.chunks(1 << 16) {
                        let at = got % expected.len();
                        let first = part.len().min(expected.len() - at);
                        assert!(part[..first] == expected[at..at + first] && part[first..] == expected[..part.len() - first]);
                        got += part.len();
                    }
                }
                Seen::Window(..) => {}
                other => panic!("{kind:?}: {other:?}"),
            }
        }
        let sender = writer.join().unwrap();
        Session { sender, receiver, ..s }.stop();
    }
}

#[test]
fn ends_of_a_session() {
    let net = Net::new();
    let port = net.serve("127.0.0.1:0", echo);
    let s = start(Kind::Spdy, &net, &[], Duration::from_millis(300));
    assert_eq!(s.thread.join().unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    let mut s = start(Kind::Tunnel, &net, &[], Duration::from_secs(60));
    let n = s.sender.open(port);
    s.sender.send(n, b"x");
    assert_eq!(s.receiver.plain(), Seen::Data(n, b"x".to_vec()));
    let begin = Instant::now();
    s.cancel.set();
    assert_eq!(s.thread.join().unwrap().unwrap_err().code(), Code::Cancelled);
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert_eq!(s.receiver.plain(), Seen::Closed);
}

#[test]
fn strange_streams_are_reset() {
    let net = Net::new();
    let port = net.serve("127.0.0.1:0", echo);
    let mut s = start(Kind::Spdy, &net, &[], PATIENCE);
    for headers in [&[("streamtype", "data"), ("port", "0"), ("requestid", "9")][..], &[("streamtype", "stdin"), ("port", "1")], &[]] {
        let stream = 4 * s.sender.opened as u32 + 1;
        s.sender.opened += 1;
        let bytes = s.sender.encoder.syn_stream(stream, false, headers);
        s.sender.raw(bytes);
        assert_eq!(s.receiver.plain(), Seen::Reset(stream as usize / 4));
    }
    // The client's own reset ends the connection to the server, and the error stream.
    let n = s.sender.open(port);
    s.sender.send(n, b"x");
    assert_eq!(s.receiver.plain(), Seen::Data(n, b"x".to_vec()));
    s.sender.raw(frame::reset(4 * n as u32 + 3, frame::CANCEL));
    assert_eq!(s.receiver.plain(), Seen::WordsEnd(n));
    s.stop();
}
