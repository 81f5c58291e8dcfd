//! The thread `streaming`: connections until their head has been read and answered.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::http::{self, Head};
use super::server::Shared;
use super::session::{self, Answer};
use super::transport::{prepare, Ahead, Plain, Tls, Transport};
use crate::error::{Error, Result};

/// Connections without a session at a time: for one more the oldest goes.
const PENDING: usize = 256;
/// What a client may take for TLS and its head.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// What it may take to read a refusal: a connection that closes with something unread cuts the answer.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// A connection without a session.
struct Pending {
    transport: Box<dyn Transport>,
    head: Vec<u8>,
    refused: bool,
    end: Instant,
}

/// Until the daemon stops.
pub(super) fn run(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut pending: Vec<Pending> = Vec::new();
    loop {
        let mut fds = vec![(listener.as_fd(), PollFlags::POLLIN)];
        for p in &pending {
            let out = if p.transport.wants_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
            fds.push((p.transport.as_fd(), PollFlags::POLLIN | out));
        }
        let limit = pending.iter().map(|p| p.end).min().map(|end| end.saturating_duration_since(Instant::now()));
        let ready = match shared.stop.poll(&fds, limit) {
            Ok(ready) => ready,
            Err(_) if shared.stop.is_cancelled() => return,
            Err(e) => {
                log::error!("streaming: {e}");
                if shared.stop.sleep(Duration::from_millis(100)).is_err() {
                    return;
                }
                continue;
            }
        };
        let now = Instant::now();
        let with_flags = std::mem::take(&mut pending).into_iter().zip(&ready[1..]);
        pending.extend(with_flags.filter_map(|(p, flags)| {
            let mut p = if flags.is_empty() { p } else { p.advance(shared)? };
            if p.end <= now && !p.refused && !p.head.is_empty() {
                p.refuse(&http::answer(408, &[], "the head of the request took too long"));
            }
            (p.end > now).then_some(p)
        }));
        if !ready[0].is_empty() {
            accept(listener, shared, &mut pending);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, pending: &mut Vec<Pending>) {
    loop {
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return,
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
            Err(e) => {
                // No descriptors, most likely: the oldest connection gives one back.
                log::error!("streaming: accept: {e}");
                if pending.is_empty() {
                    let _ = shared.stop.sleep(Duration::from_millis(100));
                } else {
                    pending.remove(0);
                }
                return;
            }
        };
        match open(socket, shared) {
            Ok(transport) => {
                let new = Pending { transport, head: Vec::new(), refused: false, end: Instant::now() + HEAD_TIME };
                // Most heads are there already.
                if let Some(new) = new.advance(shared) {
                    if pending.len() >= PENDING {
                        pending.remove(0);
                    }
                    pending.push(new);
                }
            }
            Err(e) => log::debug!("streaming: {e}"),
        }
    }
}

fn open(socket: TcpStream, shared: &Shared) -> Result<Box<dyn Transport>> {
    prepare(&socket)?;
    match &shared.identity {
        None => Ok(Box::new(Plain::new(socket))),
        Some(identity) => {
            let tls = rustls::ServerConnection::new(identity.config()).map_err(|e| Error::internal(format!("start TLS: {e}")))?;
            Ok(Box::new(Tls::new(socket, tls)))
        }
    }
}

impl Pending {
    /// Reads what is there; None when the connection has gone or became a session.
    fn advance(mut self, shared: &Arc<Shared>) -> Option<Pending> {
        let mut chunk = [0; 4096];
        loop {
            match self.transport.read(&mut chunk) {
                Ok(0) => return None,
                // The rest of a refused request.
                Ok(_) if self.refused => {}
                Ok(n) => {
                    self.head.extend_from_slice(&chunk[..n]);
                    match http::parse(&self.head) {
                        Ok(None) => {}
                        Ok(Some((head, length))) => return self.decide(shared, &head, length),
                        Err(e) => {
                            let status = if self.head.len() >= http::HEAD_LIMIT { 431 } else { 400 };
                            self.refuse(&http::answer(status, &[], e.message()));
                        }
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return None,
            }
        }
        match self.transport.flush() {
            Err(e) if e.kind() != ErrorKind::WouldBlock => None,
            _ => Some(self),
        }
    }

    /// A session takes the connection over, or the client hears why not.
    fn decide(mut self, shared: &Arc<Shared>, head: &Head, length: usize) -> Option<Pending> {
        match session::answer(shared, head) {
            Answer::Refuse(bytes) => {
                self.refuse(&bytes);
                Some(self)
            }
            Answer::Serve(session) => {
                let ahead = self.head.split_off(length);
                if let Err(e) = session.start(Box::new(Ahead::new(ahead, self.transport))) {
                    log::error!("streaming: {e}");
                }
                None
            }
        }
    }

    fn refuse(&mut self, answer: &[u8]) {
        // A fresh connection takes it whole.
        let _ = self.transport.write(answer);
        self.transport.shutdown();
        self.refused = true;
        self.head = Vec::new();
        self.end = Instant::now() + CLOSE_TIME;
    }
}
