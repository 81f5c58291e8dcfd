//! Port-forward: a thread per local port that accepts, and one per connection with a link of its own, whose two channels
//! are the bytes and the words of an error. The server begins each with the port.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use tungstenite::Bytes;

use super::connect::{self, Input, Link, Trust};
use crate::api::runtime::PortForwardRequest;
use crate::cli::client::{Client, SHORT};
use crate::cli::failure::{warn, During, Failure, Outcome};
use crate::error::Context;

const DATA: u8 = 0;
const ERROR: u8 = 1;
/// Bytes of the local side per message.
const CHUNK: usize = 64 << 10;
/// Most connections at once.
const CONNECTIONS: usize = 256;
/// Messages between two looks at the local side.
const BURST: usize = 32;
/// Longest error that is kept, bytes.
const WORDS_LIMIT: usize = 4 << 10;

/// What connections need to reach the sandbox.
#[derive(Clone)]
pub struct Forwarder {
    client: Client,
    sandbox: String,
    trust: Trust,
    open: Arc<AtomicUsize>,
}

impl Forwarder {
    pub fn new(client: Client, sandbox: String, trust: Trust) -> Forwarder {
        Forwarder { client, sandbox, trust, open: Arc::default() }
    }

    /// Listens on `local` (0: any that is free) of `address` and forwards to `remote` in the sandbox; where it listens.
    pub fn listen(&self, address: &IpAddr, local: u16, remote: u16) -> Outcome<SocketAddr> {
        let wanted = SocketAddr::new(*address, local);
        let listener = TcpListener::bind(wanted).context(|| format!("listen on {wanted}"))?;
        let address = listener.local_addr().context(|| format!("listen on {wanted}"))?;
        let forwarder = self.clone();
        crate::sys::thread::spawn("listen", move || {
            for connection in listener.incoming() {
                match connection {
                    Ok(connection) => forwarder.begin(connection, remote),
                    Err(error) => {
                        warn(&format!("accept on {address}: {error}"));
                        // Out of descriptors, most likely: not at once again.
                        std::thread::sleep(std::time::Duration::from_millis(100));
                    }
                }
            }
        })?;
        Ok(address)
    }

    fn begin(&self, connection: TcpStream, remote: u16) {
        if self.open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            self.open.fetch_sub(1, Ordering::Relaxed);
            warn(&format!("port {remote}: more than {CONNECTIONS} connections: one is refused"));
            return;
        }
        let forwarder = self.clone();
        let started = crate::sys::thread::spawn("forward", move || {
            if let Err(Failure::Failed(message) | Failure::Usage(message)) = forwarder.serve(connection, remote) {
                warn(&format!("port {remote}: {message}"));
            }
            forwarder.open.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = started {
            self.open.fetch_sub(1, Ordering::Relaxed);
            warn(&error.to_string());
        }
    }

    fn serve(&self, connection: TcpStream, remote: u16) -> Outcome<()> {
        let mut link = self.open(remote)?;
        connection.set_nonblocking(true).and_then(|()| connection.set_nodelay(true)).context(|| "prepare connection")?;
        pump(&mut link, &connection)
    }

    /// A link to a port of the sandbox.
    pub fn open(&self, remote: u16) -> Outcome<Link> {
        let request = PortForwardRequest { pod_sandbox_id: self.sandbox.clone(), port: vec![remote.into()], ..Default::default() };
        let url = self.client.runtime().port_forward(&request, SHORT).during(|| format!("forward to sandbox {}", self.sandbox))?.url;
        Link::open(&url, &[connect::V4], &self.trust)
    }
}

/// Takes the port off the beginning of a channel.
#[derive(Default)]
struct Prefix(usize);

impl Prefix {
    fn strip(&mut self, bytes: &mut Bytes) {
        let taken = (2 - self.0).min(bytes.len());
        let _ = bytes.split_to(taken);
        self.0 += taken;
    }
}

/// Moves bytes both ways until the sandbox's side ends. The end of the local side cannot be told in these channels
/// without ending both: it is waited for the other's.
pub fn pump(link: &mut Link, connection: &TcpStream) -> Outcome<()> {
    let mut prefixes = [Prefix::default(), Prefix::default()];
    let (mut reading, mut closed) = (true, false);
    let mut waiting = Bytes::new();
    let mut words = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let mut local = connection;
    loop {
        let mut more = true;
        for _ in 0..BURST {
            if !waiting.is_empty() {
                match local.write(&waiting) {
                    Ok(length) => drop(waiting.split_to(length)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        more = false;
                        break;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // The local side wants no more: nobody is left to read what comes.
                    Err(_) => {
                        link.close();
                        return Ok(());
                    }
                }
                continue;
            }
            if closed {
                let _ = connection.shutdown(Shutdown::Both);
                return match words.is_empty() {
                    true => Ok(()),
                    false => Err(Failure::failed(String::from_utf8_lossy(&words).into_owned())),
                };
            }
            match link.receive()? {
                Input::Nothing => {
                    more = false;
                    break;
                }
                Input::Closed => closed = true,
                Input::Data(DATA, mut bytes) => {
                    prefixes[0].strip(&mut bytes);
                    waiting = bytes;
                }
                Input::Data(ERROR, mut bytes) => {
                    prefixes[1].strip(&mut bytes);
                    words.extend_from_slice(&bytes[..bytes.len().min(WORDS_LIMIT - words.len())]);
                }
                Input::Data(..) => {}
            }
        }
        let wants = PollFlags::empty()
            | if reading && link.has_room() { PollFlags::POLLIN } else { PollFlags::empty() }
            | if waiting.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        let from_link = link.unsent() | if waiting.is_empty() { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut set = [PollFd::new(link.fd(), from_link), PollFd::new(connection.as_fd(), wants)];
        // A local side that has hung up would end every poll at once.
        let used = if wants.is_empty() { 1 } else { 2 };
        match nix::poll::poll(&mut set[..used], if more { PollTimeout::ZERO } else { PollTimeout::NONE }) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context(|| "poll").map_err(Failure::from),
        }
        if !link.has_room() {
            link.flush()?;
        }
        if reading && link.has_room() {
            match local.read(&mut buffer) {
                Ok(0) => reading = false,
                Ok(length) => link.send(DATA, &buffer[..length])?,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => {
                    link.close();
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
