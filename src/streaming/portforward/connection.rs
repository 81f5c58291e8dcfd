//! One connection to a server in a sandbox: 127.0.0.1, then ::1, both without blocking; two directions that end apart.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;

use crate::error::Result;
use crate::streaming::wire::{StreamId, Wire};
use crate::sys::tcp;

/// What a server may take to answer a connect, for each address: loopback answers at once, but a full backlog does not.
const CONNECT: Duration = Duration::from_secs(10);
/// Reads of one server in a row, so that it cannot keep the others waiting.
const TURNS: usize = 4;
/// Where a server in a sandbox listens, in the order of Go's runtimes.
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// How a connection is after some work on it.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    Going,
    /// Both directions have ended well.
    Over,
    /// No server: the words for the client.
    Refused(String),
    /// The server has broken the connection.
    Broken,
}

/// A connection of a client's pair of streams.
pub struct Connection {
    pub data: StreamId,
    pub error: StreamId,
    port: u16,
    socket: Option<TcpStream>,
    /// While it connects: which address, and until when.
    connecting: Option<(usize, Instant)>,
    /// Why earlier addresses failed.
    failures: Vec<String>,
    /// From the client, not yet written; `used` bytes of the first are.
    outbox: VecDeque<Vec<u8>>,
    used: usize,
    /// The client sends no more.
    client_done: bool,
    /// The server has been told so, or does not read any more.
    told: bool,
    /// The server takes nothing any more: what the client sends is dropped.
    deaf: bool,
    /// The server sends no more.
    server_done: bool,
}

impl Connection {
    /// Begins to connect to `port`.
    pub fn start(netns: Option<&Path>, port: u16, data: StreamId, error: StreamId) -> (Connection, State) {
        let mut connection = Connection {
            data,
            error,
            port,
            socket: None,
            connecting: None,
            failures: Vec::new(),
            outbox: VecDeque::new(),
            used: 0,
            client_done: false,
            told: false,
            deaf: false,
            server_done: false,
        };
        let state = connection.try_from(netns, 0);
        (connection, state)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Begins with the `n`-th address or one after it.
    fn try_from(&mut self, netns: Option<&Path>, n: usize) -> State {
        for (n, ip) in ADDRESSES.iter().enumerate().skip(n) {
            let address = SocketAddr::new(*ip, self.port);
            let socket = match tcp::socket(netns, address) {
                Ok(socket) => socket,
                Err(e) => {
                    self.failures.push(format!("{ip}: {e}"));
                    continue;
                }
            };
            match tcp::connect(&socket, address) {
                Ok(done) => {
                    self.socket = Some(socket);
                    self.connecting = (!done).then(|| (n, Instant::now() + CONNECT));
                    return State::Going;
                }
                Err(e) => self.failed(n, &e),
            }
        }
        self.socket = None;
        self.connecting = None;
        State::Refused(format!("connect to localhost:{} in the network namespace of the pod: {}", self.port, self.failures.join(", ")))
    }

    fn failed(&mut self, n: usize, e: &std::io::Error) {
        // The kernel's words without the number.
        let words = e.raw_os_error().map_or_else(|| e.to_string(), |raw| Errno::from_raw(raw).desc().to_lowercase());
        self.failures.push(format!("{}: {words}", ADDRESSES[n]));
    }

    /// What to poll, and for what; None: only the client can move this connection.
    pub fn interest(&self, room: usize) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::empty();
        if self.connecting.is_some() || (!self.outbox.is_empty() && !self.deaf) {
            flags |= PollFlags::POLLOUT;
        }
        if self.connecting.is_none() && !self.server_done && room > 0 {
            flags |= PollFlags::POLLIN;
        }
        // A hang-up is reported even to those that do not ask for anything, again and again.
        let socket = self.socket.as_ref().filter(|_| !flags.is_empty())?;
        Some((socket.as_fd(), flags))
    }

    /// When something has to be done even if nothing becomes ready.
    pub fn deadline(&self) -> Option<Instant> {
        self.connecting.map(|c| c.1)
    }

    /// Something from the client: written now as far as the server takes it.
    pub fn push(&mut self, bytes: Vec<u8>, wire: &mut dyn Wire) -> Result<State> {
        self.outbox.push_back(bytes);
        self.write(wire)?;
        Ok(self.state(wire))
    }

    /// The client sends no more: the server learns it after the last byte.
    pub fn client_finished(&mut self, wire: &mut dyn Wire) -> Result<State> {
        self.client_done = true;
        self.write(wire)?;
        Ok(self.state(wire))
    }

    /// Moves what can be moved. `buffer` is lent for reads; the number is the bytes moved from the server.
    pub fn ready(&mut self, netns: Option<&Path>, wire: &mut dyn Wire, buffer: &mut [u8]) -> Result<(State, usize)> {
        if let (Some((n, until)), Some(socket)) = (self.connecting, &self.socket) {
            match tcp::connect(socket, SocketAddr::new(ADDRESSES[n], self.port)) {
                Ok(true) => self.connecting = None,
                Ok(false) if Instant::now() < until => return Ok((State::Going, 0)),
                Ok(false) => {
                    self.failed(n, &std::io::Error::from_raw_os_error(Errno::ETIMEDOUT as i32));
                    return Ok((self.try_from(netns, n + 1), 0));
                }
                Err(e) => {
                    self.failed(n, &e);
                    return Ok((self.try_from(netns, n + 1), 0));
                }
            }
        }
        self.write(wire)?;
        let Some(moved) = self.read(wire, buffer)? else { return Ok((State::Broken, 0)) };
        Ok((self.state(wire), moved))
    }

    /// Server to client. None: the connection is broken.
    fn read(&mut self, wire: &mut dyn Wire, buffer: &mut [u8]) -> Result<Option<usize>> {
        let mut moved = 0;
        let Some(socket) = self.socket.as_mut().filter(|_| self.connecting.is_none()) else { return Ok(Some(0)) };
        for _ in 0..TURNS {
            let room = wire.room(self.data).min(buffer.len());
            if self.server_done || room == 0 {
                break;
            }
            match socket.read(&mut buffer[..room]) {
                Ok(0) => {
                    self.server_done = true;
                    wire.finish(self.data)?;
                    // Clients wait for the end of both streams before they let the connection go, their own direction included.
                    wire.finish(self.error)?;
                }
                Ok(n) => {
                    moved += n;
                    wire.send(self.data, &buffer[..n])?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(moved))
    }

    /// Client to server.
    fn write(&mut self, wire: &mut dyn Wire) -> Result<()> {
        let Some(socket) = self.socket.as_mut().filter(|_| self.connecting.is_none()) else { return Ok(()) };
        while let Some(first) = self.outbox.front().filter(|_| !self.deaf) {
            match socket.write(&first[self.used..]) {
                Ok(n) => {
                    self.used += n;
                    let done = self.used == first.len();
                    wire.consumed(self.data, n)?;
                    if done {
                        self.outbox.pop_front();
                        self.used = 0;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => self.deaf = true,
            }
        }
        if self.deaf {
            self.told = true;
            self.discard(wire)?;
        } else if self.client_done && !self.told {
            self.told = true;
            // Not connected any more: the read that follows sees it.
            let _ = socket.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Drops what waits for the server, so that it does not count against the client.
    pub fn discard(&mut self, wire: &mut dyn Wire) -> Result<()> {
        let waiting: usize = self.outbox.iter().map(Vec::len).sum::<usize>() - self.used;
        self.outbox.clear();
        self.used = 0;
        wire.consumed(self.data, waiting)
    }

    fn state(&self, wire: &dyn Wire) -> State {
        // A client that cannot say that it is done is done with the server.
        let client_over = self.told || (wire.is_fixed() && self.outbox.is_empty());
        if self.server_done && client_over {
            return State::Over;
        }
        State::Going
    }
}
