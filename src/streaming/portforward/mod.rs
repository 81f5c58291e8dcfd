//! Port-forward: many connections of one client to servers in a sandbox, in one loop around one poll(2). Each connection has
//! what the client's window and one piece allow in memory; a slow one makes only its own stream wait.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;

use self::connection::{Connection, State};
use self::pairs::{Added, Pair, Pairs};
use super::request::NetTarget;
use super::wire::{Input, StreamId, Wire};

/// One TCP connection.
mod connection;
/// Streams that belong together.
mod pairs;

/// Connections of a session at a time; more are told so.
const CONNECTIONS: usize = 512;
/// Read at once from a server. Below the size from which malloc maps memory of its own.
const BUFFER: usize = 96 * 1024;
/// A session on which nothing moves says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// What a client may take to read the last bytes.
const LINGER: Duration = Duration::from_secs(2);

/// Serves the client until it goes. CANCELLED when `cancel` says so, DEADLINE_EXCEEDED after `idle` (zero: never) without a
/// byte, INVALID_ARGUMENT when the client breaks its protocol. The client is told goodbye before.
pub fn run(mut wire: Box<dyn Wire>, sandbox_id: &str, target: &NetTarget, idle: Duration, cancel: &Cancel) -> Result<()> {
    let mut session = Session {
        wire: &mut *wire,
        sandbox_id,
        netns: match target {
            NetTarget::Netns(pin) => Some(pin),
            NetTarget::Host => None,
        },
        pairs: Pairs::default(),
        connections: HashMap::new(),
        last_words: Vec::new(),
        moved: Instant::now(),
        alive: Instant::now(),
    };
    let result = session.serve(idle, cancel);
    drop(session);
    match result {
        Ok(End::ClientGone) => Ok(()),
        Ok(End::Done) => {
            linger(&mut *wire, LINGER);
            Ok(())
        }
        Err(e) => {
            linger(&mut *wire, LINGER / 4);
            Err(e)
        }
    }
}

/// Why a session ends well.
enum End {
    ClientGone,
    /// All ports of a connection with fixed channels are done.
    Done,
}

struct Session<'a> {
    wire: &'a mut dyn Wire,
    sandbox_id: &'a str,
    netns: Option<&'a Path>,
    pairs: Pairs,
    /// By data stream.
    connections: HashMap<StreamId, Connection>,
    /// Error streams with what has still to be said on them.
    last_words: Vec<(StreamId, Vec<u8>)>,
    /// When a byte was last moved.
    moved: Instant,
    /// When the client was last given a sign of life.
    alive: Instant,
}

impl Session<'_> {
    fn serve(&mut self, idle: Duration, cancel: &Cancel) -> Result<End> {
        let mut buffer = vec![0; BUFFER];
        match self.turns(idle, cancel, &mut buffer) {
            Err(e) if e.code() == Code::Cancelled && !cancel.is_cancelled() => Ok(End::ClientGone),
            other => other,
        }
    }

    fn turns(&mut self, idle: Duration, cancel: &Cancel, buffer: &mut [u8]) -> Result<End> {
        let mut ready: Vec<StreamId> = Vec::new();
        loop {
            while let Some(input) = self.wire.next() {
                self.input(input)?;
            }
            self.say_last_words()?;
            let now = Instant::now();
            self.expire(now, buffer)?;
            if self.wire.is_fixed() && self.connections.is_empty() && self.pairs.is_empty() && self.last_words.is_empty() {
                return Ok(End::Done);
            }
            if !idle.is_zero() && now >= self.moved + idle {
                return Err(Error::deadline(format!("port-forward: no byte in {} s", idle.as_secs())));
            }
            if now >= self.alive.max(self.moved) + KEEP_ALIVE {
                self.wire.keep_alive()?;
                self.alive = now;
            }
            let (mut fds, mut owners) = (vec![(self.wire.socket(), self.wire.interest())], Vec::new());
            for (stream, connection) in &self.connections {
                if let Some(interest) = connection.interest(self.wire.room(*stream)) {
                    fds.push(interest);
                    owners.push(*stream);
                }
            }
            let flags = cancel.poll(&fds, Some(self.patience(now, idle)))?;
            drop(fds);
            if !flags[0].is_empty() {
                self.wire.ready(flags[0])?;
            }
            ready.clear();
            ready.extend(owners.iter().zip(&flags[1..]).filter(|(_, f)| !f.is_empty()).map(|(s, _)| *s));
            for stream in &ready {
                self.work(*stream, buffer)?;
            }
        }
    }

    /// How long nothing has to be done unless something becomes ready.
    fn patience(&self, now: Instant, idle: Duration) -> Duration {
        let connects = self.connections.values().filter_map(Connection::deadline);
        let next = connects.chain(self.pairs.deadline()).min();
        let idle = (!idle.is_zero()).then(|| self.moved + idle);
        let alive = self.alive.max(self.moved) + KEEP_ALIVE;
        next.into_iter().chain(idle).fold(alive, Instant::min).saturating_duration_since(now)
    }

    fn input(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Opened { stream, headers } => match self.pairs.add(stream, &headers, Instant::now()) {
                Added::Half => self.wire.accept(stream),
                Added::Whole(pair) => {
                    self.wire.accept(stream)?;
                    self.begin(pair)
                }
                Added::Refused(why) => {
                    log::debug!("port-forward to sandbox {}: refuse stream {stream}: {why}", self.sandbox_id);
                    self.wire.reset(stream)
                }
            },
            Input::Data { stream, bytes } => {
                self.moved = Instant::now();
                if let Some(connection) = self.connections.get_mut(&stream) {
                    let state = connection.push(bytes, self.wire)?;
                    return self.settle(stream, state);
                }
                match self.pairs.early(stream) {
                    Some(early) => early.bytes.push(bytes),
                    // Of a connection that is over, or on an error stream.
                    None => self.wire.consumed(stream, bytes.len())?,
                }
                Ok(())
            }
            Input::Finished { stream } => {
                if let Some(connection) = self.connections.get_mut(&stream) {
                    let state = connection.client_finished(self.wire)?;
                    return self.settle(stream, state);
                }
                if let Some(early) = self.pairs.early(stream) {
                    early.finished = true;
                }
                Ok(())
            }
            Input::Reset { stream } => {
                self.last_words.retain(|w| w.0 != stream);
                if let Some(connection) = self.connections.get_mut(&stream) {
                    connection.discard(self.wire)?;
                    let error = connection.error;
                    self.connections.remove(&stream);
                    return self.wire.finish(error);
                }
                match self.pairs.remove(stream) {
                    Some(half) => self.forget(half),
                    None => Ok(()),
                }
            }
        }
    }

    /// Begins to connect.
    fn begin(&mut self, pair: Pair) -> Result<()> {
        if self.connections.len() >= CONNECTIONS {
            self.wire.consumed(pair.data, pair.early.bytes.iter().map(Vec::len).sum())?;
            return self.refuse(&pair, &format!("{CONNECTIONS} connections are open already"));
        }
        let (connection, state) = Connection::start(self.netns, pair.port, pair.data, pair.error);
        self.connections.insert(pair.data, connection);
        self.settle(pair.data, state)?;
        for bytes in pair.early.bytes {
            self.input(Input::Data { stream: pair.data, bytes })?;
        }
        if pair.early.finished {
            self.input(Input::Finished { stream: pair.data })?;
        }
        Ok(())
    }

    fn work(&mut self, stream: StreamId, buffer: &mut [u8]) -> Result<()> {
        // An earlier one's work may have ended it.
        let Some(connection) = self.connections.get_mut(&stream) else { return Ok(()) };
        let (state, moved) = connection.ready(self.netns, self.wire, buffer)?;
        if moved > 0 {
            self.moved = Instant::now();
        }
        self.settle(stream, state)
    }

    /// Acts on how a connection is.
    fn settle(&mut self, stream: StreamId, state: State) -> Result<()> {
        if state == State::Going {
            return Ok(());
        }
        let Some(mut connection) = self.connections.remove(&stream) else { return Ok(()) };
        connection.discard(self.wire)?;
        match state {
            State::Going | State::Over => Ok(()),
            State::Refused(why) => {
                let pair = Pair { data: stream, error: connection.error, port: connection.port(), early: Default::default() };
                self.refuse(&pair, &why)
            }
            // No words: clients take any for a reason to end the whole session.
            State::Broken => {
                self.wire.finish(connection.error)?;
                self.wire.reset(stream)
            }
        }
    }

    /// Tells the client on the error stream, in the form of Go's servers, and keeps the session.
    fn refuse(&mut self, pair: &Pair, why: &str) -> Result<()> {
        let words = format!("error forwarding port {} to pod {}, uid : unable to do port forwarding: {why}", pair.port, self.sandbox_id);
        log::info!("port-forward to sandbox {}: port {}: {why}", self.sandbox_id, pair.port);
        self.last_words.push((pair.error, words.into_bytes()));
        self.say_last_words()?;
        self.wire.reset(pair.data)
    }

    /// Sends what the error streams take, and ends those that have got all.
    fn say_last_words(&mut self) -> Result<()> {
        for (stream, words) in &mut self.last_words {
            let n = self.wire.room(*stream).min(words.len());
            if n > 0 {
                self.wire.send(*stream, &words[..n])?;
                words.drain(..n);
            }
            if words.is_empty() {
                self.wire.finish(*stream)?;
            }
        }
        self.last_words.retain(|w| !w.1.is_empty());
        Ok(())
    }

    fn expire(&mut self, now: Instant, buffer: &mut [u8]) -> Result<()> {
        for half in self.pairs.expired(now) {
            log::info!("port-forward to sandbox {}: a stream without its other half", self.sandbox_id);
            self.forget(half)?;
        }
        let late: Vec<StreamId> =
            self.connections.iter().filter(|(_, c)| c.deadline().is_some_and(|d| d <= now)).map(|(s, _)| *s).collect();
        for stream in late {
            self.work(stream, buffer)?;
        }
        Ok(())
    }

    fn forget(&mut self, (streams, unused): (Vec<StreamId>, usize)) -> Result<()> {
        if let Some(stream) = streams.first() {
            self.wire.consumed(*stream, unused)?;
        }
        for stream in streams {
            self.wire.reset(stream)?;
        }
        Ok(())
    }
}

/// Says goodbye and waits until the client has closed: closing first, with its bytes unread, would take from it what it has
/// not read yet.
fn linger(wire: &mut dyn Wire, limit: Duration) {
    let cancel = Cancel::never().within(limit);
    if wire.goodbye().is_err() {
        return;
    }
    loop {
        while let Some(input) = wire.next() {
            if let Input::Data { stream, bytes } = input {
                let _ = wire.consumed(stream, bytes.len());
            }
        }
        let Ok(flags) = cancel.poll(&[(wire.socket(), wire.interest())], None) else { return };
        if wire.ready(flags[0]).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
