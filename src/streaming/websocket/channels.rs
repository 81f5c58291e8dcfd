//! The channels of a WebSocket as streams. What Go's servers do and clients rely on: a message begins with the number of its
//! channel (as a digit before base64); an empty message on the lowest channel that we write to says that the connection
//! works, because some clients begin only when the first message has come; port-forward writes the port, two bytes
//! little-endian, to both channels of a port; unknown channels are ignored; the end is a close frame after the last message.
//!
//! One message is read at a time, so a channel that nobody empties makes all others wait: the protocol has no windows.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use base64::engine::general_purpose::STANDARD;
use base64::Engine;
use nix::poll::PollFlags;

use super::handshake::{Protocol, Upgrade};
use super::socket::{Arrived, Socket, OUT_LIMIT};
use crate::error::{Error, Result};
use crate::streaming::transport::Transport;
use crate::streaming::wire::{Input, StreamId, Wire};

/// Bytes of the client's that are not consumed before it has to wait.
const UNREAD_LIMIT: usize = 256 * 1024;
/// Longest message that we send.
const MESSAGE: usize = 64 * 1024;
/// Channel of v5 whose messages end another channel.
const CLOSE: u8 = 255;

/// Most ports of one connection: their channels have one byte, and 255 is taken.
pub const PORTS: usize = 120;

/// Which channels there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channels {
    /// Exec and attach: 0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize; error always.
    Remote { stdin: bool, stdout: bool, stderr: bool, resize: bool },
    /// Port-forward: 2n data and 2n+1 error of the n-th port.
    Ports(Vec<u16>),
}

#[derive(Clone, Copy, Default)]
struct Channel {
    /// The client may write to it.
    reads: bool,
    /// We may write to it.
    writes: bool,
}

/// A message that is being read.
enum Message {
    /// Its first byte is to come.
    Unknown,
    To(u8),
    /// A channel to end (v5): its number, once it has come.
    Ends(Option<u8>),
    Ignored,
}

struct Session<T: Transport> {
    socket: Socket<T>,
    base64: bool,
    half_close: bool,
    channels: Vec<Channel>,
    inputs: VecDeque<Input>,
    message: Message,
    /// Base64 that does not make three bytes yet.
    rest: Vec<u8>,
    /// Given to the session and not consumed.
    unread: usize,
    ports: bool,
}

/// Answers the handshake and speaks the upgrade's protocol over `transport`. INVALID_ARGUMENT for too many ports.
pub fn open<T: Transport + 'static>(transport: T, upgrade: &Upgrade, channels: &Channels) -> Result<Box<dyn Wire>> {
    let Protocol::Channels { base64, half_close, .. } = upgrade.protocol else {
        return Err(Error::internal(format!("open channels over {}", upgrade.name)));
    };
    let mut session = Session {
        socket: Socket::new(transport, upgrade.answer.clone().into_bytes()),
        base64,
        half_close,
        channels: Vec::new(),
        inputs: VecDeque::new(),
        message: Message::Unknown,
        rest: Vec::new(),
        unread: 0,
        ports: matches!(channels, Channels::Ports(_)),
    };
    match channels {
        Channels::Remote { stdin, stdout, stderr, resize } => session.open_remote([*stdin, *stdout, *stderr, true, *resize])?,
        Channels::Ports(ports) if ports.len() > PORTS => return Err(Error::invalid(format!("{} ports: at most {PORTS}", ports.len()))),
        Channels::Ports(ports) => session.open_ports(ports)?,
    }
    session.socket.flush()?;
    Ok(Box::new(session))
}

impl<T: Transport> Session<T> {
    fn open_remote(&mut self, wanted: [bool; 5]) -> Result<()> {
        for (number, name) in ["stdin", "stdout", "stderr", "error", "resize"].into_iter().enumerate() {
            let writes = matches!(name, "stdout" | "stderr" | "error");
            self.channels.push(Channel { reads: !writes && wanted[number], writes: writes && wanted[number] });
            if wanted[number] {
                self.announce(number, vec![("streamType".into(), name.into())]);
            }
        }
        let lowest = self.channels.iter().position(|c| c.writes).unwrap_or(3);
        self.write(lowest as u8, &[])
    }

    fn open_ports(&mut self, ports: &[u16]) -> Result<()> {
        for (n, port) in ports.iter().enumerate() {
            for (at, kind) in [(0, "data"), (1, "error")] {
                let number = 2 * n + at;
                self.channels.push(Channel { reads: at == 0, writes: true });
                let headers = [("streamType", kind.to_owned()), ("port", port.to_string()), ("requestID", n.to_string())];
                self.announce(number, headers.map(|(k, v)| (k.to_owned(), v)).to_vec());
                self.write(number as u8, &port.to_le_bytes())?;
            }
        }
        Ok(())
    }

    fn announce(&mut self, number: usize, headers: Vec<(String, String)>) {
        self.inputs.push_back(Input::Opened { stream: number as StreamId, headers });
    }

    /// Queues one message.
    fn write(&mut self, number: u8, bytes: &[u8]) -> Result<()> {
        if !self.base64 {
            return self.socket.message(false, &[&[number], bytes]);
        }
        self.socket.message(true, &[&[b'0'.wrapping_add(number)], STANDARD.encode(bytes).as_bytes()])
    }

    fn channel(&self, stream: StreamId) -> Channel {
        self.channels.get(stream as usize).copied().unwrap_or_default()
    }

    /// Takes a part of a message.
    fn take(&mut self, part: &Arrived) -> Result<()> {
        let mut at = part.at.clone();
        if part.first {
            self.message = Message::Unknown;
            self.rest.clear();
        }
        if let (Message::Unknown, Some(&byte)) = (&self.message, self.socket.bytes(&at).first()) {
            at.start += 1;
            let number = if self.base64 { byte.wrapping_sub(b'0') } else { byte };
            self.message = match number {
                CLOSE if self.half_close => Message::Ends(None),
                n if self.channel(n.into()).reads => Message::To(n),
                _ => Message::Ignored,
            };
        }
        match self.message {
            Message::To(number) if self.base64 => self.take_base64(number, &Arrived { at, ..*part }),
            Message::To(number) => {
                let bytes = self.socket.bytes(&at).to_vec();
                self.deliver(number, bytes);
                Ok(())
            }
            Message::Ends(number) => {
                let target = match (number, self.socket.bytes(&at)) {
                    (number, []) => number,
                    (None, [number]) => Some(*number),
                    _ => return Err(Error::invalid("end a channel: more than one number")),
                };
                self.message = Message::Ends(target);
                match target {
                    _ if !part.last => Ok(()),
                    Some(number) if usize::from(number) < self.channels.len() => {
                        self.end(number);
                        Ok(())
                    }
                    _ => Err(Error::invalid("end a channel: there is no such channel")),
                }
            }
            Message::Unknown | Message::Ignored => Ok(()),
        }
    }

    /// Decodes by groups of four, because a message comes in parts that end anywhere.
    fn take_base64(&mut self, number: u8, part: &Arrived) -> Result<()> {
        self.rest.extend(self.socket.bytes(&part.at).iter().filter(|b| !matches!(b, b'\r' | b'\n')));
        let whole = if part.last { self.rest.len() } else { self.rest.len() / 4 * 4 };
        let bytes = STANDARD.decode(&self.rest[..whole]).map_err(|_| Error::invalid(format!("read channel {number}: expected base64")))?;
        self.rest.drain(..whole);
        self.deliver(number, bytes);
        Ok(())
    }

    fn deliver(&mut self, number: u8, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.unread += bytes.len();
            self.inputs.push_back(Input::Data { stream: number.into(), bytes });
        }
    }

    /// The client has ended a channel. Only those that it writes to are of interest.
    fn end(&mut self, number: u8) {
        if let Some(channel) = self.channels.get_mut(usize::from(number)).filter(|c| c.reads) {
            channel.reads = false;
            self.inputs.push_back(Input::Finished { stream: number.into() });
        }
    }

    fn may_read(&self) -> bool {
        self.unread < UNREAD_LIMIT
    }

    fn read(&mut self) -> Result<()> {
        while self.may_read() {
            let Some(part) = self.socket.next()? else { break };
            if let Err(e) = self.take(&part) {
                let _ = self.socket.close(1002);
                return Err(e);
            }
        }
        Ok(())
    }
}

impl<T: Transport> Wire for Session<T> {
    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.may_read() {
            flags |= PollFlags::POLLIN;
        }
        // A client that has said goodbye keeps its connection; what wakes the session is that it could write.
        if self.socket.wants_write() || self.socket.is_gone() {
            flags |= PollFlags::POLLOUT;
        }
        flags
    }

    fn ready(&mut self, flags: PollFlags) -> Result<()> {
        if self.socket.is_gone() && self.inputs.is_empty() {
            return Err(Error::cancelled("the client has gone"));
        }
        self.socket.flush()?;
        // Reported again and again, to a session that reads nothing now.
        if flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) && !self.may_read() {
            return Err(Error::cancelled("the client has hung up"));
        }
        self.read()
    }

    fn next(&mut self) -> Option<Input> {
        self.inputs.pop_front()
    }

    fn accept(&mut self, _stream: StreamId) -> Result<()> {
        Ok(())
    }

    fn room(&self, stream: StreamId) -> usize {
        if !self.channel(stream).writes {
            return 0;
        }
        let free = OUT_LIMIT.saturating_sub(self.socket.backlog());
        if self.base64 {
            free / 4 * 3
        } else {
            free
        }
    }

    fn send(&mut self, stream: StreamId, bytes: &[u8]) -> Result<()> {
        if !self.channel(stream).writes {
            return Ok(());
        }
        // A whole number of groups in each message but the last.
        for part in bytes.chunks(MESSAGE / 3 * 3) {
            self.write(stream as u8, part)?;
        }
        self.socket.flush()
    }

    fn consumed(&mut self, _stream: StreamId, bytes: usize) -> Result<()> {
        let waited = !self.may_read();
        self.unread = self.unread.saturating_sub(bytes);
        // What has been read from the socket already would never wake a poll.
        if waited && self.may_read() {
            self.read()?;
        }
        Ok(())
    }

    fn finish(&mut self, stream: StreamId) -> Result<()> {
        // The client learns it from the close frame: there is no message for it that clients know.
        if let Some(channel) = self.channels.get_mut(stream as usize) {
            channel.writes = false;
        }
        Ok(())
    }

    fn reset(&mut self, stream: StreamId) -> Result<()> {
        if let Some(channel) = self.channels.get_mut(stream as usize) {
            *channel = Channel::default();
        }
        Ok(())
    }

    fn goodbye(&mut self) -> Result<()> {
        self.socket.goodbye()
    }

    fn is_flushed(&self) -> bool {
        !self.socket.wants_write()
    }

    fn keep_alive(&mut self) -> Result<()> {
        self.socket.ping()
    }

    fn is_fixed(&self) -> bool {
        self.ports
    }
}
