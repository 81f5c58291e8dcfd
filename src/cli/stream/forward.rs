//! Port-forward: one thread, in one loop around poll(2), accepts on the local ports and moves bytes between the connections and
//! the pairs of SPDY streams that they have in one session. The session is opened by the first connection, and again after it was lost.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::cli::failure::{one_line, warn, Failure, Outcome};
use crate::error::{Context, Result};
use crate::streaming::spdy::Spdy;
use crate::streaming::transport::Transport;
use crate::streaming::wire::{Input, StreamId, Wire};

/// Most connections at once.
const CONNECTIONS: usize = 256;
/// Bytes of one read from a local side.
const CHUNK: usize = 64 << 10;
/// Longest error that is kept, bytes.
const WORDS_LIMIT: usize = 4 << 10;

/// The connection to the sandbox's ports.
pub type Link = Spdy<Box<dyn Transport>>;

/// Local ports, and how to reach the sandbox.
pub struct Forwarder {
    open: Box<dyn Fn() -> Outcome<Link> + Send>,
    /// With the port in the sandbox.
    listeners: Vec<(TcpListener, u16)>,
    session: Option<Session>,
}

impl Forwarder {
    pub fn new(open: impl Fn() -> Outcome<Link> + Send + 'static) -> Forwarder {
        Forwarder { open: Box::new(open), listeners: Vec::new(), session: None }
    }

    /// Listens on `local` (0: any that is free) of `address` for `remote` in the sandbox; where it listens.
    pub fn listen(&mut self, address: &IpAddr, local: u16, remote: u16) -> Outcome<SocketAddr> {
        let wanted = SocketAddr::new(*address, local);
        let what = || format!("listen on {wanted}");
        let listener = TcpListener::bind(wanted).context(what)?;
        listener.set_nonblocking(true).context(what)?;
        let address = listener.local_addr().context(what)?;
        self.listeners.push((listener, remote));
        Ok(address)
    }

    /// Forwards from now on, on a thread that does not end.
    pub fn start(mut self) -> Outcome<()> {
        crate::sys::thread::spawn("forward", move || {
            let mut buffer = vec![0; CHUNK];
            loop {
                if let Err(error) = self.turn(&mut buffer) {
                    let lost = self.session.take().map_or(0, |session| session.abandon());
                    // A session may end as it likes while nobody uses it.
                    if lost > 0 {
                        warn(&format!("the session is lost, and {lost} connections with it: {error}"));
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Waits for something to do, and does it. An error is one of the session.
    fn turn(&mut self, buffer: &mut [u8]) -> Result<()> {
        if let Some(session) = &mut self.session {
            session.take_inputs()?;
        }
        let mut set: Vec<PollFd> = self.listeners.iter().map(|(l, _)| PollFd::new(l.as_fd(), PollFlags::POLLIN)).collect();
        let mut streams = Vec::new();
        if let Some(session) = &self.session {
            set.push(PollFd::new(session.link.socket(), session.link.interest()));
            for (stream, connection) in &session.connections {
                let wanted = connection.interest(session.link.room(*stream));
                // One that has hung up would end every poll at once.
                if !wanted.is_empty() {
                    set.push(PollFd::new(connection.socket.as_fd(), wanted));
                    streams.push(*stream);
                }
            }
        }
        // Only EINTR: nothing is ready then.
        let _ = nix::poll::poll(&mut set, PollTimeout::NONE);
        let flags: Vec<PollFlags> = set.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        drop(set);
        let (listening, rest) = flags.split_at(self.listeners.len());
        if let (Some(session), Some((socket, connections))) = (&mut self.session, rest.split_first()) {
            if !socket.is_empty() {
                session.link.ready(*socket)?;
            }
            for (stream, flags) in streams.into_iter().zip(connections) {
                session.work(stream, *flags, buffer)?;
            }
        }
        for n in (0..listening.len()).filter(|n| !listening[*n].is_empty()) {
            self.accept(n)?;
        }
        Ok(())
    }

    fn accept(&mut self, n: usize) -> Result<()> {
        let (listener, port) = &self.listeners[n];
        let port = *port;
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted) {
                    warn(&format!("accept for port {port}: {error}"));
                    // Out of descriptors, most likely: not at once again.
                    std::thread::sleep(Duration::from_millis(100));
                }
                return Ok(());
            }
        };
        if let Err(error) = socket.set_nonblocking(true).and_then(|()| socket.set_nodelay(true)) {
            warn(&format!("port {port}: prepare connection: {error}"));
            return Ok(());
        }
        if self.session.is_none() {
            match (self.open)() {
                Ok(link) => self.session = Some(Session::new(link)),
                Err(Failure::Failed(message) | Failure::Usage(message)) => warn(&format!("port {port}: {message}")),
                Err(Failure::Silent(_)) => {}
            }
        }
        match &mut self.session {
            Some(session) if session.connections.len() >= CONNECTIONS => {
                warn(&format!("port {port}: more than {CONNECTIONS} connections: one is refused"));
                break_off(&socket);
                Ok(())
            }
            Some(session) => session.begin(socket, port),
            None => {
                break_off(&socket);
                Ok(())
            }
        }
    }
}

/// The local side hears that this was no end: its connection is reset.
fn break_off(socket: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// One connection to the daemon.
struct Session {
    link: Link,
    requests: u64,
    /// By data stream.
    connections: HashMap<StreamId, Connection>,
    /// By error stream: the port, and what was said.
    errors: HashMap<StreamId, (u16, Vec<u8>)>,
}

/// A local connection with its data stream.
struct Connection {
    socket: TcpStream,
    /// For the local side, oldest first; `written` bytes of the first piece have gone.
    waiting: VecDeque<Vec<u8>>,
    written: usize,
    /// The local side writes no more, which the sandbox's knows.
    finished: bool,
    /// The sandbox's side writes no more, and what it wrote is `waiting` or written.
    ended: bool,
}

impl Connection {
    fn interest(&self, room: usize) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, !self.finished && room > 0);
        flags.set(PollFlags::POLLOUT, !self.waiting.is_empty());
        flags
    }

    /// Writes what the local side takes; the bytes that went.
    fn write(&mut self) -> std::io::Result<usize> {
        let mut sent = 0;
        while let Some(piece) = self.waiting.front() {
            match self.socket.write(&piece[self.written..]) {
                Ok(n) => {
                    sent += n;
                    self.written += n;
                    if self.written == piece.len() {
                        self.waiting.pop_front();
                        self.written = 0;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(sent),
                Err(error) => return Err(error),
            }
        }
        if self.ended {
            // Already closed by the other side, or now.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        Ok(sent)
    }

    fn unwritten(&self) -> usize {
        self.waiting.iter().map(Vec::len).sum::<usize>() - self.written
    }
}

impl Session {
    fn new(link: Link) -> Session {
        Session { link, requests: 0, connections: HashMap::new(), errors: HashMap::new() }
    }

    /// Asks for a connection to `port`: an error stream on which we have nothing to say, and one for data.
    fn begin(&mut self, socket: TcpStream, port: u16) -> Result<()> {
        let (number, port_text) = (self.requests.to_string(), port.to_string());
        self.requests += 1;
        let headers = |kind| [("streamtype", kind), ("port", port_text.as_str()), ("requestid", number.as_str())];
        let error = self.link.begin(&headers("error"))?;
        self.link.finish(error)?;
        self.errors.insert(error, (port, Vec::new()));
        let data = self.link.begin(&headers("data"))?;
        let connection = Connection { socket, waiting: VecDeque::new(), written: 0, finished: false, ended: false };
        self.connections.insert(data, connection);
        Ok(())
    }

    fn take_inputs(&mut self) -> Result<()> {
        while let Some(input) = self.link.next() {
            match input {
                Input::Data { stream, bytes } => match self.connections.get_mut(&stream) {
                    Some(connection) => {
                        connection.waiting.push_back(bytes);
                        self.write(stream)?;
                    }
                    None => {
                        if let Some((_, words)) = self.errors.get_mut(&stream) {
                            words.extend_from_slice(&bytes[..bytes.len().min(WORDS_LIMIT - words.len())]);
                        }
                        self.link.consumed(stream, bytes.len())?;
                    }
                },
                Input::Finished { stream } => match self.connections.get_mut(&stream) {
                    Some(connection) => {
                        connection.ended = true;
                        self.write(stream)?;
                    }
                    None => self.tell(stream),
                },
                Input::Reset { stream } => match self.connections.remove(&stream) {
                    Some(connection) => {
                        break_off(&connection.socket);
                        self.link.consumed(stream, connection.unwritten())?;
                    }
                    None => self.tell(stream),
                },
                // Servers open none.
                Input::Opened { stream, .. } => self.link.reset(stream)?,
            }
        }
        Ok(())
    }

    /// The last word on an error stream.
    fn tell(&mut self, stream: StreamId) {
        match self.errors.remove(&stream) {
            Some((port, words)) if !words.is_empty() => warn(&format!("port {port}: {}", one_line(&String::from_utf8_lossy(&words)))),
            _ => {}
        }
    }

    /// Does what a local side is ready for.
    fn work(&mut self, stream: StreamId, flags: PollFlags, buffer: &mut [u8]) -> Result<()> {
        if flags.is_empty() {
            return Ok(());
        }
        self.write(stream)?;
        let room = self.link.room(stream).min(buffer.len());
        let Some(connection) = self.connections.get_mut(&stream) else { return Ok(()) };
        if connection.finished || room == 0 {
            return Ok(());
        }
        match connection.socket.read(&mut buffer[..room]) {
            Ok(0) => {
                connection.finished = true;
                self.link.finish(stream)?;
                self.settle(stream);
                Ok(())
            }
            Ok(length) => self.link.send(stream, &buffer[..length]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(_) => self.give_up(stream),
        }
    }

    /// Writes what waits for a local side.
    fn write(&mut self, stream: StreamId) -> Result<()> {
        let Some(connection) = self.connections.get_mut(&stream) else { return Ok(()) };
        match connection.write() {
            Ok(sent) => {
                self.link.consumed(stream, sent)?;
                self.settle(stream);
                Ok(())
            }
            Err(_) => self.give_up(stream),
        }
    }

    /// The local side has gone: nobody is left to read what comes, or to say an end.
    fn give_up(&mut self, stream: StreamId) -> Result<()> {
        if let Some(connection) = self.connections.remove(&stream) {
            self.link.consumed(stream, connection.unwritten())?;
        }
        self.link.reset(stream)
    }

    /// Lets go of a connection both sides of which have ended.
    fn settle(&mut self, stream: StreamId) {
        if self.connections.get(&stream).is_some_and(|c| c.finished && c.ended && c.waiting.is_empty()) {
            self.connections.remove(&stream);
        }
    }

    /// Breaks off all connections; how many there were.
    fn abandon(self) -> usize {
        self.connections.values().for_each(|connection| break_off(&connection.socket));
        self.connections.len()
    }
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
