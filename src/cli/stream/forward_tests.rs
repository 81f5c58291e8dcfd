//! Port-forward against a server made of the other half of tungstenite.

use std::net::TcpListener;

use tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tungstenite::Message;

use super::*;

type Server = tungstenite::WebSocket<TcpStream>;

/// A link to a server that does `body`, the local side of a connection that is pumped, and the outcome of the pump.
fn forward(body: impl FnOnce(&mut Server) + Send + 'static) -> (TcpStream, std::thread::JoinHandle<Outcome<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/portforward/token", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        #[allow(clippy::result_large_err, reason = "the type of the error is tungstenite's")]
        let choose = |_: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
            response.headers_mut().insert("Sec-WebSocket-Protocol", connect::V4.parse().unwrap());
            Ok(response)
        };
        let mut socket = tungstenite::accept_hdr(listener.accept().unwrap().0, choose).unwrap();
        for channel in [DATA, ERROR] {
            socket.send(message(channel, &80u16.to_le_bytes())).unwrap();
        }
        body(&mut socket);
        let _ = socket.close(None);
        while socket.read().is_ok() {}
    });
    let mut link = Link::open(&url, &[connect::V4], &Trust::default()).unwrap();
    let local = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(local.local_addr().unwrap()).unwrap();
    let (theirs, _) = local.accept().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, std::thread::spawn(move || pump(&mut link, &theirs)))
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    Message::Binary([&[channel], bytes].concat().into())
}

#[test]
fn bytes_go_both_ways_and_ports_do_not() {
    const ALL: usize = 8 << 20;
    let (mut ours, pumped) = forward(|socket| {
        let mut got = Vec::new();
        while got.len() < ALL {
            let bytes = socket.read().unwrap().into_data();
            assert_eq!(bytes[0], DATA);
            got.extend_from_slice(&bytes[1..]);
        }
        for part in got.chunks(60_000) {
            socket.send(message(DATA, part)).unwrap();
        }
    });
    let data: Vec<u8> = (0..ALL as u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    ours.write_all(&data).unwrap();
    // The end of ours is no reason to lose the answer.
    ours.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    ours.read_to_end(&mut back).unwrap();
    assert!(back == data, "{} bytes", back.len());
    pumped.join().unwrap().unwrap();
}

#[test]
fn an_error_is_told_and_ends_the_connection() {
    let (mut ours, pumped) = forward(|socket| socket.send(message(ERROR, b"connection refused")).unwrap());
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
    assert!(matches!(pumped.join().unwrap(), Err(Failure::Failed(text)) if text == "connection refused"));
}

#[test]
fn a_local_side_that_goes_ends_the_link() {
    let (sender, ended) = std::sync::mpsc::channel();
    let (ours, pumped) = forward(move |socket| {
        // Until a write fails or the goodbye comes: the local side is gone.
        while socket.send(message(DATA, &[0; 4096])).is_ok() {}
        sender.send(()).unwrap();
    });
    drop(ours);
    assert!(pumped.join().unwrap().is_ok());
    ended.recv().unwrap();
}
