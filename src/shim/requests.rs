//! Connections of the shim's clients, and what they ask. Rubbish is answered by an error and ends its connection alone.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;

use super::protocol::{Envelope, Event, Fault, Phase, Request, State, VERSION};
use super::server::{Ending, Shim};
use super::task::{Purpose, Task};
use crate::error::{Context, Error, Result};
use crate::runtime::oci;
use crate::sys::channel::{Channel, Received};
use crate::sys::{file, monitor};

/// Most connections at a time.
const PEERS: usize = 128;

/// One connection.
pub struct Peer {
    pub number: u32,
    pub channel: Channel,
    asked: bool,
    watches: bool,
    /// Closed once all is sent.
    last: bool,
}

impl Peer {
    pub fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::POLLIN;
        if self.channel.is_pending() {
            flags |= PollFlags::POLLOUT;
        }
        flags
    }
}

impl Shim {
    pub fn add_peer(&mut self, stream: UnixStream) {
        let Ok(channel) = Channel::new(stream) else { return };
        self.peer_number += 1;
        let number = self.peer_number;
        self.peers.push(Peer { number, channel, asked: false, watches: false, last: false });
        if self.peers.len() > PEERS {
            self.answer_result(number, Err(Error::new(crate::error::Code::ResourceExhausted, format!("{PEERS} connections are open"))));
        }
    }

    /// Reads and writes what a connection is ready for.
    pub fn peer_ready(&mut self, number: u32, flags: PollFlags) {
        let Some(index) = self.peers.iter().position(|p| p.number == number) else { return };
        let peer = &mut self.peers[index];
        if flags.contains(PollFlags::POLLOUT) && (peer.channel.flush().is_err() || (peer.last && !peer.channel.is_pending())) {
            return self.drop_peer(number);
        }
        if !flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return;
        }
        match peer.channel.receive() {
            Ok(Received::Later) => {}
            Ok(Received::Closed) => self.drop_peer(number),
            Ok(Received::Message(message, _)) if self.attachers.has(number) => self.attacher_said(number, &message),
            Ok(Received::Message(_, _)) if peer.asked => {
                self.answer_result(number, Err(Error::invalid("one request per connection")));
            }
            Ok(Received::Message(message, fds)) => {
                peer.asked = true;
                if let Err(error) = self.request(number, &message, fds) {
                    self.answer_result(number, Err(error));
                }
            }
            Err(error) => {
                self.answer_result(number, Err(error));
                self.drop_peer(number);
            }
        }
    }

    fn drop_peer(&mut self, number: u32) {
        self.peers.retain(|p| p.number != number);
        self.exec_abandoned(number);
        self.detach(number);
    }

    /// Ends the connections that would hear of events.
    pub fn drop_watchers(&mut self) {
        self.peers.retain(|p| !p.watches);
    }

    fn request(&mut self, number: u32, message: &[u8], fds: Vec<OwnedFd>) -> Result<()> {
        match read(message)? {
            Request::State => {
                let state = Event::State(self.state());
                self.answer(number, &state, true);
                Ok(())
            }
            Request::Kill { signal, all } => {
                self.kill(signal, all)?;
                self.answer(number, &Event::Done, true);
                Ok(())
            }
            Request::ReopenLog { path } => {
                if !matches!(self.phase, Phase::Running | Phase::Ending) {
                    return Err(Error::precondition("reopen log: the container is not running"));
                }
                self.log.reopen(&path)?;
                self.answer(number, &Event::Done, true);
                Ok(())
            }
            Request::Watch => {
                if let Some(peer) = self.peers.iter_mut().find(|p| p.number == number) {
                    peer.watches = true;
                }
                let state = Event::State(self.state());
                self.answer(number, &state, false);
                // Told before this one watched; the OCI runtime's delete may take long. To the daemon a shim that only delivers is gone.
                let gone = matches!(self.ending, Some(Ending::Delivering));
                if let Some(record) = self.ended.clone() {
                    self.answer(number, &Event::Exit(record), gone);
                }
                Ok(())
            }
            Request::Exec(request) | Request::ExecStream(request) => self.exec(number, request, fds),
            Request::Attach { stdin, stdout, stderr } => self.attach(number, [stdin, stdout, stderr], fds),
            Request::Resize { .. } => Err(Error::invalid("resize: not attached")),
            Request::ExecKill { id } => self.exec_kill(number, &id),
            Request::Update { resources } => self.update(number, &resources),
        }
    }

    /// What follows on the connection of an attacher.
    fn attacher_said(&mut self, number: u32, message: &[u8]) {
        match read(message) {
            Ok(Request::Resize { width, height }) => self.resize(number, width, height),
            Ok(_) => self.answer_result(number, Err(Error::invalid("attached: no other request on this connection"))),
            Err(error) => self.answer_result(number, Err(error)),
        }
    }

    fn state(&mut self) -> State {
        State {
            phase: self.phase,
            pid: self.pid,
            start_time: self.start_time,
            started_at: self.started_at,
            oom_kills: self.oom_kills(),
            execs: self.execs.len(),
        }
    }

    fn kill(&mut self, signal: i32, all: bool) -> Result<()> {
        if !(0..=64).contains(&signal) {
            return Err(Error::invalid(format!("send signal {signal}: no such signal")));
        }
        match self.phase {
            Phase::Starting => {
                self.abort_run(Error::cancelled("killed while starting"));
                Ok(())
            }
            Phase::Running => {
                // Ours and not reaped: the number cannot mean another process. It comes first: a shell that sees its child
                // killed would go on with the next command.
                monitor::kill(self.pid, signal)?;
                let rest = if all { self.cgroup.procs() } else { Vec::new() };
                rest.into_iter().filter(|p| *p != self.pid).try_for_each(|pid| monitor::kill(pid, signal))
            }
            // What is left is being killed, or nothing is.
            Phase::Ending | Phase::Exited => Ok(()),
        }
    }

    fn update(&mut self, peer: u32, resources: &serde_json::Value) -> Result<()> {
        if self.phase != Phase::Running {
            return Err(Error::precondition("update: the container is not running"));
        }
        let path = |what: &str| self.dir.join(format!("update-{peer}.{what}"));
        let (input, log) = (path("json"), path("log"));
        let text = serde_json::to_vec(resources).context(|| "update: write the resources")?;
        file::write(&input, &text, 0o600, file::Durability::Atomic)?;
        let handler = &self.config.handler;
        let program = oci::program(handler, oci::update(handler, &log, &input, &self.config.id), &self.dir);
        let task = Task::start(program, &handler.path, Purpose::Update(peer), log, vec![input], self.limit())?;
        self.tasks.push(task);
        Ok(())
    }

    /// Says something to one connection; with `last` it is closed once that is sent.
    pub fn answer(&mut self, number: u32, event: &Event, last: bool) {
        let Some(peer) = self.peers.iter_mut().find(|p| p.number == number) else { return };
        peer.last |= last;
        let sent = serde_json::to_vec(event)
            .context(|| "write answer")
            .and_then(|text| peer.channel.queue(&text))
            .and_then(|()| peer.channel.flush());
        if sent.is_err() || (peer.last && !peer.channel.is_pending()) {
            self.peers.retain(|p| p.number != number);
            if sent.is_err() {
                self.exec_abandoned(number);
                self.detach(number);
            }
        }
    }

    pub fn answer_result(&mut self, number: u32, result: Result<()>) {
        let event = match &result {
            Ok(()) => Event::Done,
            Err(error) => Event::Error(Fault::from(error)),
        };
        self.answer(number, &event, true);
    }

    pub fn tell_watchers(&mut self, event: &Event) {
        let watchers: Vec<u32> = self.peers.iter().filter(|p| p.watches).map(|p| p.number).collect();
        for number in watchers {
            self.answer(number, event, false);
        }
    }

    /// Tells those who watched already while the container was starting.
    pub fn tell_state(&mut self) {
        let state = Event::State(self.state());
        self.tell_watchers(&state);
    }
}

/// A request of our version.
fn read(message: &[u8]) -> Result<Request> {
    let envelope: Envelope<serde_json::Value> = serde_json::from_slice(message).context(|| "read request")?;
    if envelope.version != VERSION {
        return Err(Error::unimplemented(format!("protocol version {}: this shim speaks {VERSION}", envelope.version)));
    }
    let request = serde_json::from_value(envelope.body).context(|| "read request");
    request.map_err(|e| e.with_code(crate::error::Code::InvalidArgument))
}
