//! Port-forward against the daemon's own sessions, to servers on the host's network.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::*;
use crate::cli::stream::connect::{self, Trust};
use crate::streaming::portforward;
use crate::streaming::request::NetTarget;
use crate::streaming::transport::{prepare, Plain};
use crate::sys::cancel::Cancel;

/// A daemon whose sessions end with `cancel`, and how many it has begun; the URL of any number of them.
fn daemon(cancel: &Cancel) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/portforward/token", listener.local_addr().unwrap());
    let begun = Arc::new(AtomicUsize::new(0));
    let (cancel, count) = (cancel.clone(), begun.clone());
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let (mut socket, cancel) = (socket.unwrap(), cancel.clone());
            count.fetch_add(1, Ordering::SeqCst);
            std::thread::spawn(move || {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") {
                    socket.read_exact(&mut byte).unwrap();
                    head.push(byte[0]);
                }
                let head = String::from_utf8(head).unwrap();
                assert!(head.starts_with("POST /portforward/token HTTP/1.1\r\n") && head.contains("Upgrade: SPDY/3.1\r\n"), "{head}");
                prepare(&socket).unwrap();
                let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n".to_vec();
                let _ =
                    portforward::run(Box::new(Spdy::new(Plain::new(socket), answer)), "test", &NetTarget::Host, Duration::ZERO, &cancel);
            });
        }
    });
    (url, begun)
}

/// Serves connections, each on a thread; the port.
fn serve(body: impl Fn(TcpStream) + Send + Clone + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let (socket, body) = (socket.unwrap(), body.clone());
            std::thread::spawn(move || body(socket));
        }
    });
    port
}

/// Forwards to `ports` through a daemon: how to connect to each, and how many sessions there were.
fn forward<const N: usize>(cancel: &Cancel, ports: [u16; N]) -> ([SocketAddr; N], Arc<AtomicUsize>) {
    let (url, begun) = daemon(cancel);
    let mut forwarder = Forwarder::new(move || connect::spdy(&url, &Trust::default()));
    let local = ports.map(|port| forwarder.listen(&IpAddr::from([127, 0, 0, 1]), 0, port).unwrap());
    forwarder.start().unwrap();
    (local, begun)
}

fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn noise(length: usize) -> Vec<u8> {
    (0..length as u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

/// A server that answers at the end of the request.
fn answers_at_the_end(mut socket: TcpStream) {
    let mut request = Vec::new();
    if socket.read_to_end(&mut request).is_ok() {
        let _ = socket.write_all(&request);
    }
}

#[test]
fn each_side_may_end_first() {
    let (at_the_end, greets) = (
        serve(answers_at_the_end),
        serve(|mut socket| {
            socket.write_all(b"hello").unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            let mut request = Vec::new();
            socket.read_to_end(&mut request).unwrap();
            assert_eq!(request, b"after the end");
        }),
    );
    let ([at_the_end, greets], begun) = forward(&Cancel::never(), [at_the_end, greets]);
    let all = noise(8 << 20);
    let (mut socket, data) = (connect(at_the_end), all.clone());
    let mut back = Vec::new();
    socket.write_all(&data).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    socket.read_to_end(&mut back).unwrap();
    assert!(back == all, "{} bytes", back.len());
    let mut socket = connect(greets);
    back.clear();
    socket.read_to_end(&mut back).unwrap();
    assert_eq!(back, b"hello");
    socket.write_all(b"after the end").unwrap();
    drop(socket);
    assert_eq!(begun.load(Ordering::SeqCst), 1, "one session for all");
}

#[test]
fn clients_that_close_first_leave_nothing() {
    let open = Arc::new(AtomicUsize::new(0));
    let count = open.clone();
    let port = serve(move |mut socket| {
        count.fetch_add(1, Ordering::SeqCst);
        // Until the other side closes.
        let _ = std::io::copy(&mut socket, &mut std::io::sink());
        count.fetch_sub(1, Ordering::SeqCst);
    });
    let ([local], begun) = forward(&Cancel::never(), [port]);
    let clients: Vec<TcpStream> = (0..30).map(|_| connect(local)).collect();
    clients.iter().for_each(|mut client| client.write_all(b"x").unwrap());
    eventually("all are connected", || open.load(Ordering::SeqCst) == 30);
    drop(clients);
    eventually("none is left", || open.load(Ordering::SeqCst) == 0);
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}

/// Neither a local side that does not read nor a server that does not keeps the others from what is theirs.
#[test]
fn slow_ones_wait_alone() {
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let stuck = gate.clone();
    let deaf = serve(move |mut socket| {
        let _ = stuck.recv();
        answers_at_the_end(socket.try_clone().unwrap());
        let _ = socket.flush();
    });
    let talks = serve(|mut socket| {
        let _ = socket.write_all(&noise(16 << 20));
    });
    let ([deaf, talks, echo], _) = forward(&Cancel::never(), [deaf, talks, serve(answers_at_the_end)]);
    // So many that their windows are more than the server's side would let wait.
    let unread: Vec<TcpStream> = (0..24).map(|_| connect(talks)).collect();
    let writers: Vec<JoinHandle<usize>> = (0..3)
        .map(|_| {
            std::thread::spawn(move || {
                let (mut socket, mut back) = (connect(deaf), Vec::new());
                socket.write_all(&noise(16 << 20)).unwrap();
                socket.shutdown(Shutdown::Write).unwrap();
                socket.read_to_end(&mut back).unwrap();
                back.len()
            })
        })
        .collect();
    for _ in 0..20 {
        let (mut socket, mut back) = (connect(echo), Vec::new());
        socket.write_all(&noise(300_000)).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        socket.read_to_end(&mut back).unwrap();
        assert_eq!(back.len(), 300_000);
        std::thread::sleep(Duration::from_millis(10));
    }
    drop((release, gate));
    for writer in writers {
        assert_eq!(writer.join().unwrap(), 16 << 20);
    }
    let (mut first, mut all) = (&unread[0], Vec::new());
    first.read_to_end(&mut all).unwrap();
    assert!(all == noise(16 << 20), "{} bytes", all.len());
}

#[test]
fn what_is_refused_or_lost_is_broken_off() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let cancel = Cancel::never();
    let echo = serve(answers_at_the_end);
    let ([nobody, local], begun) = forward(&cancel, [nobody, echo]);
    let error = connect(nobody).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let mut socket = connect(local);
    socket.write_all(b"x").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    cancel.set();
    assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // The next one asks for another session.
    drop(connect(local));
    eventually("another session", || begun.load(Ordering::SeqCst) > 1);
}
