//! Sessions against a server made of the other half of tungstenite.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tungstenite::{Message, WebSocket};

use super::*;
use crate::cli::stream::connect::{Trust, V4, V5};
use crate::cli::stream::REMOTE;

type Server = WebSocket<std::net::TcpStream>;

/// A server that speaks `protocol` to one client and does `body`.
fn serve<T: Send + 'static>(protocol: &'static str, body: impl FnOnce(&mut Server) -> T + Send + 'static) -> (String, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/exec/token", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (tcp, _) = listener.accept().unwrap();
        #[allow(clippy::result_large_err, reason = "the type of the error is tungstenite's")]
        let choose = |request: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
            assert_eq!(request.uri().path(), "/exec/token");
            let wanted = request.headers()["Sec-WebSocket-Protocol"].to_str().unwrap();
            assert!(wanted.split(", ").any(|name| name == protocol), "{wanted}");
            response.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
            Ok(response)
        };
        let mut socket = tungstenite::accept_hdr(tcp, choose).unwrap();
        let result = body(&mut socket);
        let _ = socket.close(None);
        // Until the client's goodbye, so that nothing is lost by a reset.
        while socket.read().is_ok() {}
        result
    });
    (url, thread)
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    Message::Binary([&[channel], bytes].concat().into())
}

/// The channel and the bytes of the next message.
fn next(socket: &mut Server) -> (u8, Vec<u8>) {
    let bytes = socket.read().unwrap().into_data();
    (bytes[0], bytes[1..].to_vec())
}

fn pipe(content: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.into()
}

/// Runs a session; its outcome, stdout and stderr.
fn talk(url: &str, plan: &Plan, stdin: &OwnedFd, size: Option<Size>) -> (Outcome<End>, Vec<u8>, Vec<u8>) {
    let mut link = Link::open(url, &REMOTE, &Trust::default()).unwrap();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut io = Io { stdin: stdin.as_fd(), stdout: &mut stdout, stderr: &mut stderr, signals: None, size: &|| size };
    let end = run(&mut link, plan, &mut io);
    (end, stdout, stderr)
}

#[test]
fn streams_reach_where_they_belong() {
    let big: Vec<u8> = (0..3_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let expected = big.clone();
    let (url, server) = serve(V5, move |socket| {
        // As servers in Go begin.
        socket.send(message(0, b"")).unwrap();
        let mut got = Vec::new();
        loop {
            match next(socket) {
                (0, bytes) => got.extend(bytes),
                (255, bytes) => break assert_eq!(bytes, [0]),
                other => panic!("{other:?}"),
            }
        }
        socket.send(Message::Ping(vec![1].into())).unwrap();
        for part in got.chunks(50_000) {
            socket.send(message(1, part)).unwrap();
        }
        socket.send(message(2, b"\xff\x00error")).unwrap();
        // A status in two pieces.
        socket.send(message(3, br#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":"#)).unwrap();
        socket.send(message(3, br#"[{"reason":"ExitCode","message":"137"}]}}"#)).unwrap();
    });
    let (end, stdout, stderr) = talk(&url, &Plan { stdin: true, ..Plan::default() }, &pipe(&big), None);
    server.join().unwrap();
    let Ok(End::Status(status)) = end else { panic!("{end:?}") };
    assert_eq!(exit_code(&status), Ok(137));
    assert!(stdout == expected, "{} bytes", stdout.len());
    assert_eq!(stderr, b"\xff\x00error");
}

#[test]
fn an_older_server_is_not_told_the_end_of_stdin() {
    let (url, server) = serve(V4, |socket| {
        assert_eq!(next(socket), (0, b"all".to_vec()));
        socket.send(message(3, br#"{"status":"Success"}"#)).unwrap();
        socket.close(None).unwrap();
        // The goodbye is the next thing: no 255.
        matches!(socket.read(), Ok(Message::Close(_)) | Err(_))
    });
    let (end, ..) = talk(&url, &Plan { stdin: true, ..Plan::default() }, &pipe(b"all"), None);
    assert!(matches!(end, Ok(End::Status(status)) if exit_code(&status) == Ok(0)));
    assert!(server.join().unwrap());
}

#[test]
fn a_terminal_has_a_size_and_keys_to_leave() {
    let (url, server) = serve(V5, |socket| {
        let size = next(socket);
        let typed = next(socket);
        (size, typed, socket.read().unwrap().is_close())
    });
    let (reader, writer) = nix::unistd::pipe().unwrap();
    nix::unistd::write(&writer, b"ls\r").unwrap();
    let typing = std::thread::spawn(move || {
        // Each with a message of its own most likely; the sequence must be found either way.
        nix::unistd::write(&writer, b"\x10").unwrap();
        nix::unistd::write(&writer, b"\x11never").unwrap();
        writer
    });
    let plan = Plan { stdin: true, tty: true, keys: b"\x10\x11".to_vec() };
    let (end, ..) = talk(&url, &plan, &reader, Some(Size { width: 80, height: 24 }));
    assert!(matches!(end, Ok(End::Detached)), "{end:?}");
    typing.join().unwrap();
    let (size, typed, closed) = server.join().unwrap();
    assert_eq!(size, (4, br#"{"Height":24,"Width":80}"#.to_vec()));
    assert_eq!(typed, (0, b"ls\r".to_vec()));
    assert!(closed);
}

#[test]
fn a_server_that_dies_or_refuses_is_an_error() {
    let (url, server) = serve(V5, |socket| socket.get_ref().shutdown(std::net::Shutdown::Both).unwrap());
    let (end, ..) = talk(&url, &Plan::default(), &pipe(b""), None);
    assert!(matches!(end, Ok(End::Closed)), "{end:?}");
    server.join().unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut tcp, _) = listener.accept().unwrap();
        // Read first: closing with something unread would reset the answer.
        let _ = std::io::Read::read(&mut tcp, &mut [0; 4096]);
        tcp.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\nno such\ntoken\n").unwrap();
    });
    let Err(Failure::Failed(text)) = Link::open(&format!("http://{address}/exec/secret"), &REMOTE, &Trust::default()) else { panic!() };
    assert_eq!(text, format!("connect to 127.0.0.1:{}: the server answers 404 Not Found: no such token", address.port()));
    server.join().unwrap();
    for (url, expected) in [("ftp://x/secret", "of scheme \"ftp\""), ("/exec/secret", "of scheme \"\"")] {
        let Err(Failure::Failed(text)) = Link::open(url, &REMOTE, &Trust::default()) else { panic!() };
        assert!(text.contains(expected) && !text.contains("secret"), "{text}");
    }
}

#[test]
fn a_slow_server_keeps_stdin_unread() {
    let (sender, go) = std::sync::mpsc::channel::<()>();
    let (url, server) = serve(V5, move |socket| {
        go.recv().unwrap();
        let mut got = 0;
        while let (0, bytes) = next(socket) {
            got += bytes.len();
        }
        socket.send(message(3, br#"{"status":"Success"}"#)).unwrap();
        got
    });
    const ALL: usize = 64 << 20;
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let written = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = written.clone();
    let feed = std::thread::spawn(move || {
        let mut file = std::fs::File::from(writer);
        for _ in 0..ALL >> 16 {
            file.write_all(&[7; 1 << 16]).unwrap();
            count.fetch_add(1 << 16, std::sync::atomic::Ordering::SeqCst);
        }
    });
    let watch = std::thread::spawn(move || {
        // Until nothing has moved for a while: the pipe, the sockets' buffers and one chunk are full.
        let mut last = usize::MAX;
        loop {
            std::thread::sleep(std::time::Duration::from_millis(300));
            let now = written.load(std::sync::atomic::Ordering::SeqCst);
            if now == last && now > 0 {
                break;
            }
            last = now;
        }
        sender.send(()).unwrap();
        last
    });
    let (end, ..) = talk(&url, &Plan { stdin: true, ..Plan::default() }, &reader, None);
    assert!(matches!(end, Ok(End::Status(_))), "{end:?}");
    let stuck_at = watch.join().unwrap();
    assert!(stuck_at < ALL / 2, "{stuck_at}");
    feed.join().unwrap();
    assert_eq!(server.join().unwrap(), ALL);
}

#[test]
fn statuses() {
    for (status, expected) in [
        (r#"{"status":"Success"}"#, Ok(0)),
        (r#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#, Ok(3)),
        (r#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"300"}]}}"#, Ok(255)),
        (r#"{"status":"Failure","reason":"InternalError","message":"no such file"}"#, Err("no such file")),
        (r#"{"status":"Failure"}"#, Err(r#"{"status":"Failure"}"#)),
        ("words", Err("words")),
        ("[1]", Err("[1]")),
    ] {
        assert_eq!(exit_code(status.as_bytes()), expected.map_err(str::to_owned), "{status}");
    }
}
