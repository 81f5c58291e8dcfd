//! Against a client of tungstenite's, and against bytes that no client would send.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use proptest::prelude::*;
use tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame, FrameHeader};
use tungstenite::protocol::{Role, WebSocket};
use tungstenite::Message;

use super::frame::{Decoder, Found};
use super::handshake::{Protocol, Upgrade};
use super::{open, Channels};
use crate::error::{Code, Error};
use crate::streaming::transport::{prepare, Plain};
use crate::streaming::wire::{Input, Wire};
use crate::sys::cancel::Cancel;

const STDIN: u32 = 0;
const STDOUT: u32 = 1;

fn pair() -> (Plain, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (server, _) = listener.accept().unwrap();
    prepare(&server).unwrap();
    (Plain::new(server), client)
}

fn protocol(base64: bool, half_close: bool) -> Upgrade {
    Upgrade { protocol: Protocol::Channels { base64, half_close, status: true }, name: "test", answer: String::new() }
}

const ALL: Channels = Channels::Remote { stdin: true, stdout: true, stderr: true, resize: true };

fn start(base64: bool, half_close: bool, channels: &Channels) -> (Box<dyn Wire>, WebSocket<TcpStream>) {
    let (server, client) = pair();
    let wire = open(server, &protocol(base64, half_close), channels).unwrap();
    (wire, WebSocket::from_raw_socket(client, Role::Client, None))
}

/// Polls until `done` says so or the wire fails.
fn pump(wire: &mut dyn Wire, mut done: impl FnMut(&mut dyn Wire, Input) -> bool) -> Result<(), Error> {
    let cancel = Cancel::never().within(Duration::from_secs(20));
    loop {
        while let Some(input) = wire.next() {
            if done(wire, input) {
                return Ok(());
            }
        }
        let flags = cancel.poll(&[(wire.socket(), wire.interest())], None)?;
        wire.ready(flags[0])?;
    }
}

/// All that came until the wire failed.
fn everything(wire: &mut dyn Wire) -> (Vec<Input>, Error) {
    let mut inputs = Vec::new();
    let end = pump(wire, |_, input| {
        inputs.push(input);
        false
    });
    (inputs, end.unwrap_err())
}

fn data(stream: u32, bytes: &[u8]) -> Input {
    Input::Data { stream, bytes: bytes.to_vec() }
}

fn without_opened(inputs: Vec<Input>) -> Vec<Input> {
    inputs.into_iter().filter(|i| !matches!(i, Input::Opened { .. })).collect()
}

#[test]
fn announces_channels_and_greets() {
    for (channels, opened, greeting) in [
        (ALL, &["stdin", "stdout", "stderr", "error", "resize"][..], 1),
        (Channels::Remote { stdin: true, stdout: false, stderr: true, resize: false }, &["stdin", "stderr", "error"], 2),
        (Channels::Remote { stdin: true, stdout: false, stderr: false, resize: false }, &["stdin", "error"], 3),
    ] {
        let (mut wire, mut client) = start(false, false, &channels);
        assert_eq!(client.read().unwrap(), Message::binary(vec![greeting]));
        let mut names = Vec::new();
        while let Some(Input::Opened { headers, .. }) = wire.next() {
            assert_eq!(headers[0].0, "streamType");
            names.push(headers[0].1.clone());
        }
        assert_eq!(names, opened);
    }
}

#[test]
fn ports_are_written_to_both_channels() {
    let (mut wire, mut client) = start(true, false, &Channels::Ports(vec![8080, 443]));
    let frames: Vec<Message> = (0..4).map(|_| client.read().unwrap()).collect();
    assert_eq!(frames, ["0kB8=", "1kB8=", "2uwE=", "3uwE="].map(Message::text));
    let Some(Input::Opened { stream, headers }) = std::iter::from_fn(|| wire.next()).last() else { panic!("no stream") };
    let headers: Vec<(&str, &str)> = headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!((stream, &headers[..]), (3, &[("streamType", "error"), ("port", "443"), ("requestID", "1")][..]));
    assert!(wire.is_fixed());
}

#[test]
fn bytes_both_ways_and_goodbye() {
    let (mut wire, mut client) = start(false, false, &ALL);
    client.send(Message::binary(vec![0, 1, 2, 3])).unwrap();
    client.send(Message::text("\u{0}text")).unwrap();
    client.send(Message::binary(vec![9, 1])).unwrap();
    client.send(Message::binary(vec![1, 1])).unwrap();
    client.send(Message::binary(vec![])).unwrap();
    client.send(Message::binary(b"\x04{}".to_vec())).unwrap();
    let mut seen = Vec::new();
    pump(&mut *wire, |_, input| {
        seen.push(input.clone());
        input == data(4, b"{}")
    })
    .unwrap();
    assert_eq!(without_opened(seen), [data(STDIN, &[1, 2, 3]), data(STDIN, b"text"), data(4, b"{}")]);
    wire.send(STDOUT, b"out").unwrap();
    wire.send(STDIN, b"no such direction").unwrap();
    wire.goodbye().unwrap();
    assert_eq!(client.read().unwrap(), Message::binary(vec![1]));
    assert_eq!(client.read().unwrap(), Message::binary(b"\x01out".to_vec()));
    assert_eq!(client.read().unwrap(), Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() })));
    let _ = client.flush();
    assert_eq!(everything(&mut *wire).1.code(), Code::Cancelled);
}

#[test]
fn base64_both_ways_whatever_the_frames() {
    let (mut wire, mut client) = start(true, false, &ALL);
    let frame = |text: &str, code, last| Message::Frame(Frame::message(text.as_bytes().to_vec(), OpCode::Data(code), last));
    for message in [
        frame("0aGV", Data::Text, false),
        frame("", Data::Continue, false),
        frame("sb", Data::Continue, false),
        frame("G8=", Data::Continue, true),
        Message::text("4e30="),
        Message::text("7e30="),
    ] {
        client.send(message).unwrap();
    }
    client.close(None).unwrap();
    let (inputs, end) = everything(&mut *wire);
    let stdin: Vec<u8> = inputs
        .iter()
        .filter_map(|i| if let Input::Data { stream: STDIN, bytes } = i { Some(bytes.clone()) } else { None })
        .flatten()
        .collect();
    assert_eq!(stdin, b"hello");
    assert_eq!(inputs.last(), Some(&data(4, b"{}")));
    assert_eq!(end.code(), Code::Cancelled);

    let (mut wire, mut client) = start(true, false, &ALL);
    wire.send(STDOUT, b"Zm9v").unwrap();
    assert_eq!((client.read().unwrap(), client.read().unwrap()), (Message::text("1"), Message::text("1Wm05dg==")));
    client.send(Message::text("0aGV***")).unwrap();
    assert_eq!(everything(&mut *wire).1.code(), Code::InvalidArgument);
    let Message::Close(Some(close)) = client.read().unwrap() else { panic!("no close") };
    assert_eq!(close.code, CloseCode::Protocol);
}

#[test]
fn v5_ends_channels() {
    let (mut wire, mut client) = start(false, true, &ALL);
    client.send(Message::binary(vec![0, 1])).unwrap();
    client.send(Message::binary(vec![255, 1])).unwrap();
    client.send(Message::Frame(Frame::message(vec![255], OpCode::Data(Data::Binary), false))).unwrap();
    client.send(Message::Frame(Frame::message(vec![0], OpCode::Data(Data::Continue), true))).unwrap();
    client.send(Message::binary(vec![255, 0])).unwrap();
    client.send(Message::binary(vec![0, 2])).unwrap();
    client.close(None).unwrap();
    assert_eq!(without_opened(everything(&mut *wire).0), [data(STDIN, &[1]), Input::Finished { stream: STDIN }]);
    for bad in [vec![255], vec![255, 0, 0], vec![255, 5]] {
        let (mut wire, mut client) = start(false, true, &ALL);
        client.send(Message::binary(bad.clone())).unwrap();
        assert_eq!(everything(&mut *wire).1.code(), Code::InvalidArgument, "{bad:?}");
    }
    // Before v5 it is a channel that does not exist.
    let (mut wire, mut client) = start(false, false, &ALL);
    client.send(Message::binary(vec![255, 0])).unwrap();
    client.close(None).unwrap();
    assert_eq!(without_opened(everything(&mut *wire).0), []);
}

#[test]
fn pings_are_answered_inside_a_message() {
    let (mut wire, mut client) = start(false, false, &ALL);
    client.send(Message::Frame(Frame::message(vec![0, 1], OpCode::Data(Data::Binary), false))).unwrap();
    client.send(Message::Ping(vec![7; 125].into())).unwrap();
    client.send(Message::Frame(Frame::message(vec![2], OpCode::Data(Data::Continue), true))).unwrap();
    pump(&mut *wire, |_, input| input == data(STDIN, &[2])).unwrap();
    assert_eq!((client.read().unwrap(), client.read().unwrap()), (Message::binary(vec![1]), Message::Pong(vec![7; 125].into())));
    wire.keep_alive().unwrap();
    assert_eq!(client.read().unwrap(), Message::Ping(vec![].into()));
}

#[test]
fn a_client_that_hangs_up_loses_nothing_it_has_sent() {
    let (mut wire, mut client) = start(false, false, &ALL);
    client.send(Message::binary(vec![0; 1000])).unwrap();
    client.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    let (inputs, end) = everything(&mut *wire);
    assert_eq!(without_opened(inputs), [data(STDIN, &[0; 999])]);
    assert_eq!(end.code(), Code::Cancelled);
}

/// A client that sends `total` bytes in messages of `size`, counted modulo 251.
fn sender(mut client: WebSocket<TcpStream>, total: usize, size: usize) -> JoinHandle<WebSocket<TcpStream>> {
    std::thread::spawn(move || {
        for start in (0..total).step_by(size) {
            let mut message = vec![0];
            message.extend((start..total.min(start + size)).map(|n| (n % 251) as u8));
            client.send(Message::binary(message)).unwrap();
        }
        client
    })
}

#[test]
fn a_slow_session_makes_the_client_wait() {
    for size in [1000, 20 << 20] {
        let (mut wire, client) = start(false, false, &ALL);
        let total = 20 << 20;
        let client = sender(client, total, size);
        // Nothing is consumed until no more comes.
        let (mut held, mut got) = (0, 0);
        loop {
            while let Some(input) = wire.next() {
                if let Input::Data { bytes, .. } = input {
                    assert!(bytes.iter().enumerate().all(|(i, b)| *b == ((got + i) % 251) as u8));
                    (held, got) = (held + bytes.len(), got + bytes.len());
                }
            }
            assert!(held < 512 * 1024, "{held} bytes were not consumed");
            if got == total {
                break;
            }
            if !wire.interest().is_empty() {
                let flags = Cancel::never().within(Duration::from_secs(20)).poll(&[(wire.socket(), wire.interest())], None).unwrap();
                wire.ready(flags[0]).unwrap();
            } else {
                wire.consumed(STDIN, std::mem::take(&mut held)).unwrap();
            }
        }
        client.join().unwrap();
    }
}

#[test]
fn a_slow_client_makes_the_session_wait() {
    let (mut wire, mut client) = start(false, false, &ALL);
    let mut sent = 0;
    while wire.room(STDOUT) > 0 {
        let n = wire.room(STDOUT).min(50_000);
        wire.send(STDOUT, &vec![7; n]).unwrap();
        sent += n;
        assert!(sent < 64 << 20, "there is no bound");
    }
    assert!(!wire.is_flushed());
    let reader = std::thread::spawn(move || {
        let mut got = 0;
        while got < sent {
            got += client.read().unwrap().len() - 1;
        }
        got
    });
    let cancel = Cancel::never().within(Duration::from_secs(20));
    while !wire.is_flushed() {
        let flags = cancel.poll(&[(wire.socket(), wire.interest())], None).unwrap();
        wire.ready(flags[0]).unwrap();
    }
    assert_eq!(reader.join().unwrap(), sent);
    assert!(wire.room(STDOUT) > 0);
}

/// A masked frame in bytes.
fn raw(head: FrameHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    head.format(payload.len() as u64, &mut bytes).unwrap();
    let mask = head.mask.unwrap_or_default();
    bytes.extend(payload.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]));
    bytes
}

fn head(opcode: OpCode, is_final: bool) -> FrameHeader {
    FrameHeader { is_final, opcode, mask: Some([1, 2, 3, 4]), ..FrameHeader::default() }
}

#[test]
fn hostile_frames() {
    let binary = OpCode::Data(Data::Binary);
    let part = raw(head(binary, false), b"\0a");
    let cases = [
        ("unmasked", raw(FrameHeader { mask: None, ..head(binary, true) }, b"\0a")),
        ("reserved bit", raw(FrameHeader { rsv1: true, ..head(binary, true) }, b"\0a")),
        ("reserved opcode", vec![0x83, 0x81, 0, 0, 0, 0, 0]),
        ("reserved control", vec![0x8b, 0x80, 0, 0, 0, 0]),
        ("long ping", raw(head(OpCode::Control(Control::Ping), true), &[0; 126])),
        ("ping in parts", raw(head(OpCode::Control(Control::Ping), false), &[0; 5])),
        ("continuation of nothing", raw(head(OpCode::Data(Data::Continue), true), b"\0a")),
        ("message in a message", [part.clone(), part].concat()),
        ("half a close code", raw(head(OpCode::Control(Control::Close), true), &[3])),
        ("length out of range", [vec![0x82, 0xff], vec![0xff; 8], vec![0; 4]].concat()),
    ];
    for (name, bytes) in cases {
        let (server, mut client) = pair();
        let mut wire = open(server, &protocol(false, true), &ALL).unwrap();
        client.write_all(&bytes).unwrap();
        assert_eq!(everything(&mut *wire).1.code(), Code::InvalidArgument, "{name}");
        drop(wire);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        // The greeting, then a close with 1002.
        assert_eq!(answer, [0x82, 1, 1, 0x88, 2, 3, 0xea], "{name}");
    }
}

#[test]
fn a_frame_of_any_length_is_taken_as_it_comes() {
    let (server, mut client) = pair();
    let mut wire = open(server, &protocol(false, false), &ALL).unwrap();
    let mut bytes = Vec::new();
    head(OpCode::Data(Data::Binary), true).format(1 << 40, &mut bytes).unwrap();
    bytes.extend([1, 2, 3, 4].map(|m: u8| m ^ if m == 1 { 0 } else { 9 }));
    client.write_all(&bytes).unwrap();
    pump(&mut *wire, |_, input| input == data(STDIN, &[9, 9, 9])).unwrap();
}

/// Messages as the decoder gives them, fed in slices of the sizes given.
fn decode(bytes: &[u8], cuts: &[usize]) -> Result<(Vec<Vec<u8>>, usize), Error> {
    let (mut decoder, mut messages, mut pings, mut open) = (Decoder::new(), Vec::<Vec<u8>>::new(), 0, false);
    let (mut rest, mut cuts) = (bytes, cuts.iter().cycle());
    loop {
        match decoder.next()? {
            Some(Found::Piece { first, last, at, .. }) => {
                assert_ne!(first, open, "first and open differ");
                if first {
                    messages.push(Vec::new());
                }
                messages.last_mut().unwrap().extend_from_slice(decoder.bytes(&at));
                open = !last;
            }
            Some(Found::Ping(_)) => pings += 1,
            Some(_) => {}
            None if rest.is_empty() => return Ok((messages, pings)),
            None => {
                let space = decoder.space();
                assert!(!space.is_empty());
                let n = rest.len().min(space.len()).min(*cuts.next().unwrap());
                space[..n].copy_from_slice(&rest[..n]);
                decoder.filled(n);
                rest = &rest[n..];
            }
        }
    }
}

proptest! {
    #[test]
    fn messages_survive_any_cuts(
        messages in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4), 0..8),
        mask: [u8; 4], cuts in prop::collection::vec(1usize..200, 1..20),
    ) {
        let mut bytes = Vec::new();
        for parts in &messages {
            for (n, part) in parts.iter().enumerate() {
                let code = if n == 0 { Data::Binary } else { Data::Continue };
                let head = FrameHeader { mask: Some(mask), ..head(OpCode::Data(code), n + 1 == parts.len()) };
                bytes.extend(raw(head, part));
                bytes.extend(raw(super::tests::head(OpCode::Control(Control::Ping), true), b"?"));
            }
        }
        let (got, pings) = decode(&bytes, &cuts).unwrap();
        prop_assert_eq!(pings, messages.iter().map(Vec::len).sum::<usize>());
        prop_assert_eq!(got, messages.iter().map(|m| m.concat()).collect::<Vec<_>>());
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000), cuts in prop::collection::vec(1usize..99, 1..9)) {
        let _ = decode(&bytes, &cuts);
    }

    #[test]
    fn heads_with_any_flags(first: u8, second: u8, rest in prop::collection::vec(any::<u8>(), 0..40)) {
        let _ = decode(&[vec![first, second | 0x80], rest].concat(), &[3]);
    }
}
