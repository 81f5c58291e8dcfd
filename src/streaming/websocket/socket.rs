//! A non-blocking connection that speaks frames as a server: pings are answered, a close is answered by a close.

use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

use super::frame::{head, Decoder, Found};
use crate::error::{Context, Error, Result};
use crate::streaming::transport::Transport;

/// Unsent bytes from which the session has to wait.
pub const OUT_LIMIT: usize = 256 * 1024;
/// A close that says all is well (RFC 6455, 7.4.1).
const NORMAL: u16 = 1000;
/// A close after a breach of the protocol.
const BROKEN: u16 = 1002;

/// A part of a message: bytes `at`, for `Socket::bytes`.
pub struct Arrived {
    pub text: bool,
    pub first: bool,
    pub last: bool,
    pub at: Range<usize>,
}

/// Frames over a transport.
pub struct Socket<T: Transport> {
    transport: T,
    decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    /// The newest unanswered ping, while too much is unsent: older ones need no answer (RFC 6455, 5.5.3).
    pong: Option<Vec<u8>>,
    said_close: bool,
    /// The close has left, and our side of the transport is shut.
    shut: bool,
    gone: bool,
}

impl<T: Transport> Socket<T> {
    /// `answer` goes out first: the 101 that made it a WebSocket.
    pub fn new(transport: T, answer: Vec<u8>) -> Socket<T> {
        Socket { transport, decoder: Decoder::new(), out: answer, sent: 0, pong: None, said_close: false, shut: false, gone: false }
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }

    /// Whether the client has closed or hung up. Nothing more will come.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Bytes that wait for the client to read.
    pub fn backlog(&self) -> usize {
        self.out.len() - self.sent
    }

    pub fn wants_write(&self) -> bool {
        self.backlog() > 0 || self.transport.wants_write()
    }

    /// Whether `next` has something without the socket having any.
    pub fn has_ahead(&self) -> bool {
        !self.gone && (self.decoder.has_ahead() || self.transport.has_ahead())
    }

    /// The next part of a message, read from the transport when needed; None: nothing now, or nothing any more.
    pub fn next(&mut self) -> Result<Option<Arrived>> {
        while !self.gone {
            let found = match self.decoder.next() {
                Ok(found) => found,
                Err(e) => {
                    self.gone = true;
                    let _ = self.close(BROKEN);
                    return Err(e);
                }
            };
            match found {
                Some(Found::Piece { text, first, last, at }) => return Ok(Some(Arrived { text, first, last, at })),
                Some(Found::Ping(payload)) => {
                    self.pong = Some(payload);
                    self.flush()?;
                }
                Some(Found::Pong) => {}
                Some(Found::Close(code)) => {
                    self.gone = true;
                    // The same code goes back; those below 1000 mean nothing.
                    let _ = self.close(code.filter(|c| *c >= NORMAL).unwrap_or(NORMAL));
                }
                None if !self.receive()? => return Ok(None),
                None => {}
            }
        }
        Ok(None)
    }

    pub fn bytes(&self, at: &Range<usize>) -> &[u8] {
        self.decoder.bytes(at)
    }

    /// Reads once. False: nothing there.
    fn receive(&mut self) -> Result<bool> {
        loop {
            match self.transport.read(self.decoder.space()) {
                Ok(0) => self.gone = true,
                Ok(n) => {
                    self.decoder.filled(n);
                    return Ok(true);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if is_hangup(e.kind()) => self.gone = true,
                Err(e) => return Err(e).context(|| "read from the client"),
            }
            return Ok(false);
        }
    }

    /// Queues one message of these parts.
    pub fn message(&mut self, text: bool, parts: &[&[u8]]) -> Result<()> {
        self.frame(OpCode::Data(if text { Data::Text } else { Data::Binary }), parts)
    }

    pub fn ping(&mut self) -> Result<()> {
        if self.backlog() == 0 && !self.said_close {
            self.frame(OpCode::Control(Control::Ping), &[])?;
        }
        self.flush()
    }

    /// Says goodbye, once; sends what the transport takes.
    pub fn close(&mut self, code: u16) -> Result<()> {
        if !self.said_close {
            self.frame(OpCode::Control(Control::Close), &[&code.to_be_bytes()])?;
            self.said_close = true;
        }
        self.flush()
    }

    /// Says that all is well and that this is the end.
    pub fn goodbye(&mut self) -> Result<()> {
        self.close(NORMAL)
    }

    fn frame(&mut self, opcode: OpCode, parts: &[&[u8]]) -> Result<()> {
        if self.said_close {
            return Ok(());
        }
        if self.sent > OUT_LIMIT / 2 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        head(opcode, parts.iter().map(|p| p.len()).sum(), &mut self.out)?;
        for part in parts {
            self.out.extend_from_slice(part);
        }
        Ok(())
    }

    /// Sends what the transport takes. CANCELLED when the client has gone.
    pub fn flush(&mut self) -> Result<()> {
        loop {
            if self.backlog() < OUT_LIMIT {
                if let Some(payload) = self.pong.take() {
                    self.frame(OpCode::Control(Control::Pong), &[&payload])?;
                }
            }
            if self.backlog() == 0 {
                break;
            }
            match self.transport.write(&self.out[self.sent..]) {
                Ok(0) => return Err(Error::cancelled("the client takes nothing any more")),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if is_hangup(e.kind()) => {
                    return Err(Error::cancelled("the client has hung up"));
                }
                Err(e) => return Err(e).context(|| "write to the client"),
            }
        }
        self.out.clear();
        self.sent = 0;
        match self.transport.flush() {
            Err(e) if is_hangup(e.kind()) => return Err(Error::cancelled("the client has hung up")),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
            Err(e) => return Err(e).context(|| "write to the client"),
            Ok(()) => {}
        }
        if self.said_close && !self.shut {
            self.shut = true;
            self.transport.shutdown();
        }
        Ok(())
    }
}

/// Ends of a connection that are no errors of ours.
fn is_hangup(kind: ErrorKind) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut | UnexpectedEof)
}
