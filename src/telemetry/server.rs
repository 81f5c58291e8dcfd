//! The endpoint: GET /metrics over HTTP/1.x and nothing else. One thread serves all connections without ever waiting for one of
//! them; there are few at a time, each with a deadline, and a new one takes the place of the oldest.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::{render, Gauges};
use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::thread;

/// Connections at a time.
const CONNECTIONS: usize = 16;
/// For the whole of a connection.
const LIFE: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
const HEAD: usize = 8 << 10;
const HEADERS: usize = 64;
/// Bytes behind the head that are thrown away, so that the answer is not lost in a reset connection.
const DRAIN: usize = 64 << 10;

/// A listening endpoint.
pub struct Endpoint {
    address: SocketAddr,
    cancel: Cancel,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Listens on `address`; port 0: any. `observe` is called for each scrape, on the endpoint's thread.
    pub fn start(address: SocketAddr, observe: impl Fn(&mut Gauges) + Send + 'static) -> Result<Endpoint> {
        let what = || format!("listen on {address} for metrics");
        let listener = TcpListener::bind(address).context(what)?;
        listener.set_nonblocking(true).context(what)?;
        let address = listener.local_addr().context(what)?;
        let cancel = Cancel::never();
        let stop = cancel.clone();
        let thread = thread::spawn("metrics", move || serve(&listener, &observe, &stop))?;
        Ok(Endpoint { address, cancel, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.cancel.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Connection {
    stream: TcpStream,
    end: Instant,
    state: State,
}

enum State {
    /// The head, as far as it came.
    Reading(Vec<u8>),
    /// The answer, and how much of it went.
    Writing(Vec<u8>, usize),
    /// Everything is sent; bytes thrown away since.
    Draining(usize),
}

fn serve(listener: &TcpListener, observe: &dyn Fn(&mut Gauges), cancel: &Cancel) {
    let mut connections: VecDeque<Connection> = VecDeque::new();
    loop {
        let mut fds = vec![(listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(connections.iter().map(|c| (c.stream.as_fd(), c.wants())));
        let end = connections.iter().map(|c| c.end).min();
        let Ok(ready) = cancel.poll(&fds, end.map(|e| e.saturating_duration_since(Instant::now()))) else { return };
        let now = Instant::now();
        let mut flags = ready[1..].iter();
        connections.retain_mut(|c| {
            let ready = flags.next().is_some_and(|f| !f.is_empty());
            (!ready || c.advance(observe)) && c.end > now
        });
        if !ready[0].is_empty() && !accept(listener, &mut connections) {
            // Out of descriptors, or worse: not to be tried again at once.
            if cancel.sleep(Duration::from_millis(100)).is_err() {
                return;
            }
        }
    }
}

/// Takes what waits; false when it cannot be taken.
fn accept(listener: &TcpListener, connections: &mut VecDeque<Connection>) -> bool {
    // Only so many, so that those we have get their turn.
    for _ in 0..CONNECTIONS {
        match listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_err() {
                    continue;
                }
                if connections.len() >= CONNECTIONS {
                    connections.pop_front();
                }
                connections.push_back(Connection { stream, end: Instant::now() + LIFE, state: State::Reading(Vec::new()) });
            }
            Err(e) => return matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted),
        }
    }
    true
}

impl Connection {
    fn wants(&self) -> PollFlags {
        match self.state {
            State::Writing(..) => PollFlags::POLLOUT,
            _ => PollFlags::POLLIN,
        }
    }

    /// Goes on as far as it can without waiting; false when the connection is done.
    fn advance(&mut self, observe: &dyn Fn(&mut Gauges)) -> bool {
        loop {
            let went = match &mut self.state {
                State::Reading(head) => match read(&mut self.stream, head) {
                    Some(Came::Some) => match answer(head, observe) {
                        Some(answer) => {
                            self.state = State::Writing(answer, 0);
                            true
                        }
                        None => true,
                    },
                    Some(Came::Later) => return true,
                    Some(Came::End) | None => return false,
                },
                State::Writing(data, at) => match self.stream.write(&data[*at..]) {
                    Ok(n) => {
                        *at += n;
                        if *at == data.len() {
                            if self.stream.shutdown(Shutdown::Write).is_err() {
                                return false;
                            }
                            self.state = State::Draining(0);
                        }
                        true
                    }
                    Err(e) if e.kind() == ErrorKind::Interrupted => true,
                    Err(e) => return e.kind() == ErrorKind::WouldBlock,
                },
                State::Draining(thrown) => {
                    let mut rest = Vec::new();
                    match read(&mut self.stream, &mut rest) {
                        Some(Came::Some) => {
                            *thrown += rest.len();
                            *thrown < DRAIN
                        }
                        Some(Came::Later) => return true,
                        Some(Came::End) | None => false,
                    }
                }
            };
            if !went {
                return false;
            }
        }
    }
}

enum Came {
    Some,
    Later,
    End,
}

/// One read; None: the connection is broken.
fn read(stream: &mut TcpStream, into: &mut Vec<u8>) -> Option<Came> {
    let mut chunk = [0; 2048];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Some(Came::End),
            Ok(n) => {
                into.extend_from_slice(&chunk[..n]);
                return Some(Came::Some);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Some(Came::Later),
            Err(_) => return None,
        }
    }
}

/// The answer to a head; None while it is not complete.
fn answer(head: &[u8], observe: &dyn Fn(&mut Gauges)) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let parsed = request.parse(&head[..head.len().min(HEAD)]);
    let path = request.path.map(|p| p.split('?').next().unwrap_or(p));
    Some(match (parsed, request.method, path) {
        (Ok(httparse::Status::Partial), ..) if head.len() < HEAD => return None,
        (Ok(httparse::Status::Partial), ..) | (Err(httparse::Error::TooManyHeaders), ..) => {
            page("431 Request Header Fields Too Large", "", "the request is too long\n")
        }
        (Err(_), ..) => page("400 Bad Request", "", "not an HTTP request\n"),
        (_, Some("GET"), Some("/metrics")) => match render(observe) {
            Ok(text) => page("200 OK", "", &text),
            Err(e) => {
                log::error!("{e}");
                page("500 Internal Server Error", "", "the metrics could not be written\n")
            }
        },
        (_, _, Some("/metrics")) => page("405 Method Not Allowed", "Allow: GET\r\n", "GET only\n"),
        _ => page("404 Not Found", "", "only /metrics is here\n"),
    })
}

fn page(status: &str, more: &str, body: &str) -> Vec<u8> {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n{body}", body.len())
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        let observe = |gauges: &mut Gauges| gauges.set("crisp_test", "A \"test\".", &[("name", "a\"b\\c\nd")], 1.5);
        Endpoint::start("127.0.0.1:0".parse().unwrap(), observe).unwrap()
    }

    fn connect(endpoint: &Endpoint) -> TcpStream {
        let stream = TcpStream::connect(endpoint.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn ask(endpoint: &Endpoint, request: &[u8]) -> String {
        let mut stream = connect(endpoint);
        stream.write_all(request).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn only_get_metrics() {
        let endpoint = endpoint();
        let text = ask(&endpoint, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.contains("crisp_test{name=\"a\\\"b\\\\c\\nd\"} 1.5\n"), "{text}");
        assert!(text.contains("\ncrisp_process_resident_memory_bytes "), "{text}");
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        for (request, status) in [
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", "200"),
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", "404"),
            ("GET //metrics HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405"),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", "405"),
            ("get /metrics HTTP/1.1\r\n\r\n", "405"),
            ("\0\x01\x02\r\n\r\n", "400"),
            ("GET /metrics\r\n\r\n", "400"),
        ] {
            assert!(ask(&endpoint, request.as_bytes()).starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}");
        }
    }

    #[test]
    fn heads_are_bounded() {
        let endpoint = endpoint();
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(3 * HEAD));
        assert!(ask(&endpoint, long.as_bytes()).starts_with("HTTP/1.1 431 "));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert!(ask(&endpoint, many.as_bytes()).starts_with("HTTP/1.1 431 "));
        // In small pieces.
        let mut stream = connect(&endpoint);
        for byte in b"GET /metrics HTTP/1.1\r\n\r\n" {
            stream.write_all(&[*byte]).unwrap();
        }
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
    }

    #[test]
    fn slow_clients_do_not_keep_others_waiting() {
        let endpoint = endpoint();
        let mut slow: Vec<TcpStream> = (0..CONNECTIONS * 3).map(|_| connect(&endpoint)).collect();
        for stream in &mut slow {
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nX: ");
        }
        let begin = Instant::now();
        assert!(ask(&endpoint, b"GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 "));
        assert!(begin.elapsed() < LIFE / 2, "{:?}", begin.elapsed());
        // The oldest had to go, at the latest when its time was up.
        let mut rest = Vec::new();
        let _ = slow[0].read_to_end(&mut rest);
        assert!(rest.is_empty());
        assert!(begin.elapsed() < LIFE / 2, "{:?}", begin.elapsed());
    }

    #[test]
    fn nobody_listens_after_the_end() {
        let endpoint = endpoint();
        let address = endpoint.address();
        let _open = connect(&endpoint);
        drop(endpoint);
        assert!(TcpStream::connect(address).is_err());
        assert!(Endpoint::start("192.0.2.1:1".parse().unwrap(), |_| {}).is_err());
    }
}
