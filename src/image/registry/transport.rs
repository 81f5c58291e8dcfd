//! Connections for ureq that end at once when the pull is cancelled: each wait (name, connect, read, write) is one poll of
//! the socket and of the cancellation.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::event::EventfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectProxyConnector, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Agent, Error, Proxy};

use super::tls::TlsConnector;
use super::url::split_port;
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};
use crate::sys::thread;

/// Bytes of an answer's head at most.
const HEAD_LIMIT: usize = 64 << 10;
/// Addresses of one name that are tried.
const ADDRESSES: usize = 8;
/// Of one address before the next (RFC 8305 recommends a quarter of a second).
const HEAD_START: Duration = Duration::from_millis(250);

/// How one host is reached.
pub struct Link<'a> {
    pub tls: Arc<rustls::ClientConfig>,
    pub proxy: Option<Proxy>,
    /// For a name, a connection and its TLS together, each.
    pub connect: Duration,
    /// For a read or a write, and for the head of an answer.
    pub stall: Duration,
    pub cancel: &'a Cancel,
}

/// An agent for one host. It follows no redirect and takes no status for an error.
pub fn agent(link: Link) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("crisp/", env!("CARGO_PKG_VERSION")))
        .accept("")
        .proxy(link.proxy)
        .max_response_header_size(HEAD_LIMIT)
        .timeout_resolve(Some(link.connect))
        .timeout_connect(Some(link.connect))
        .timeout_recv_response(Some(link.stall))
        .timeout_per_read(Some(link.stall))
        .timeout_per_write(Some(link.stall))
        .build();
    let connector =
        ().chain(ConnectProxyConnector::default())
            .chain(TcpConnector { cancel: link.cancel.clone() })
            .chain(TlsConnector { config: link.tls });
    Agent::with_parts(config, connector, Names { cancel: link.cancel.clone() })
}

/// What is left of a timeout; None: for ever.
pub fn limit(timeout: NextTimeout) -> Result<Option<Duration>, Error> {
    if timeout.after.is_not_happening() {
        return Ok(None);
    }
    let left = *timeout.after;
    if left.is_zero() {
        return Err(Error::Timeout(timeout.reason));
    }
    Ok(Some(left))
}

/// Waits for a descriptor. A cancelled pull is an I/O error here; whoever asked looks at the cancellation first.
fn wait(cancel: &Cancel, fd: impl AsFd, flags: PollFlags, timeout: NextTimeout) -> Result<(), Error> {
    let ready = cancel.poll(&[(fd.as_fd(), flags)], limit(timeout)?).map_err(|e| Error::Io(std::io::Error::other(e.to_string())))?;
    if ready.iter().all(|flags| flags.is_empty()) {
        return Err(Error::Timeout(timeout.reason));
    }
    Ok(())
}

struct TcpConnector {
    cancel: Cancel,
}

impl fmt::Debug for TcpConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TcpConnector")
    }
}

impl<In: Transport> Connector<In> for TcpConnector {
    type Out = Either<In, Tcp>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        if let Some(chained) = chained {
            return Ok(Some(Either::A(chained)));
        }
        let addresses: Vec<SocketAddr> = details.addrs.iter().copied().collect();
        let stream = self.race(&in_turn(&addresses), details.timeout)?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Either::B(Tcp { stream, buffers, cancel: self.cancel.clone() })))
    }
}

/// Both families in turn, each in its own order: one that leads nowhere costs little.
fn in_turn(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let first = addresses.first().is_some_and(SocketAddr::is_ipv4);
    let (one, other): (Vec<SocketAddr>, Vec<SocketAddr>) = addresses.iter().partition(|a| a.is_ipv4() == first);
    let longest = one.len().max(other.len());
    (0..longest).flat_map(|i| [one.get(i), other.get(i)]).flatten().copied().collect()
}

impl TcpConnector {
    /// The first connection that comes about. Each address gets a head start before the next one is tried beside it.
    fn race(&self, addresses: &[SocketAddr], timeout: NextTimeout) -> Result<TcpStream, Error> {
        let begin = Instant::now();
        let all = limit(timeout)?;
        let mut failed = Error::HostNotFound;
        let mut waiting: Vec<OwnedFd> = Vec::new();
        let mut rest = addresses.iter();
        loop {
            match rest.next().map(|address| start(*address)) {
                Some(Ok((socket, true))) => return stream(socket),
                Some(Ok((socket, false))) => waiting.push(socket),
                Some(Err(e)) => {
                    failed = e;
                    continue;
                }
                None if waiting.is_empty() => return Err(failed),
                None => {}
            }
            let left = all.map(|all| all.saturating_sub(begin.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Error::Timeout(timeout.reason));
            }
            let more = rest.len() > 0;
            let pause = if more { Some(left.map_or(HEAD_START, |left| left.min(HEAD_START))) } else { left };
            let fds: Vec<_> = waiting.iter().map(|socket| (socket.as_fd(), PollFlags::POLLOUT)).collect();
            let ready = self.cancel.poll(&fds, pause).map_err(|e| Error::Io(std::io::Error::other(e.to_string())))?;
            let mut still = Vec::new();
            for (socket, flags) in waiting.into_iter().zip(ready) {
                if flags.is_empty() {
                    still.push(socket);
                    continue;
                }
                match rustix::net::sockopt::socket_error(&socket) {
                    Ok(Ok(())) => return stream(socket),
                    Ok(Err(e)) | Err(e) => failed = Error::Io(e.into()),
                }
            }
            waiting = still;
        }
    }
}

/// Begins to connect; true when it has been done already.
fn start(address: SocketAddr) -> Result<(OwnedFd, bool), Error> {
    let io = |e: rustix::io::Errno| Error::Io(e.into());
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).map_err(io)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => Ok((socket, true)),
        Err(rustix::io::Errno::INPROGRESS) => Ok((socket, false)),
        Err(e) => Err(io(e)),
    }
}

fn stream(socket: OwnedFd) -> Result<TcpStream, Error> {
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A socket that does not block, and its buffers.
struct Tcp {
    stream: TcpStream,
    buffers: LazyBuffers,
    cancel: Cancel,
}

impl fmt::Debug for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tcp").field(&self.stream.peer_addr().ok()).finish()
    }
}

impl Transport for Tcp {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        let mut sent = 0;
        while sent < amount {
            match (&self.stream).write(&self.buffers.output()[sent..amount]) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => wait(&self.cancel, &self.stream, PollFlags::POLLOUT, timeout)?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        loop {
            if self.cancel.is_cancelled() {
                return Err(Error::Io(std::io::Error::other("cancelled")));
            }
            match (&self.stream).read(self.buffers.input_append_buf()) {
                Ok(n) => {
                    self.buffers.input_appended(n);
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => wait(&self.cancel, &self.stream, PollFlags::POLLIN, timeout)?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Bytes that nobody asked for, or the end, make an idle connection useless.
    fn is_open(&mut self) -> bool {
        matches!((&self.stream).read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock)
    }
}

/// Names by the C library, on a thread that is left behind when the pull is cancelled: it cannot be interrupted.
struct Names {
    cancel: Cancel,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

impl Resolver for Names {
    fn resolve(&self, uri: &Uri, _config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let authority = uri.authority().ok_or_else(|| Error::BadUri(uri.to_string()))?;
        let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        // Without a user name, which the address of a proxy may have.
        let (name, port) = (split_port(authority.host()).0, authority.port_u16().unwrap_or(default));
        let found = match name.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => self.look_up(name.to_owned(), port, timeout)?,
        };
        let mut result = self.empty();
        found.into_iter().take(ADDRESSES).for_each(|address| result.push(address));
        if result.is_empty() {
            return Err(Error::HostNotFound);
        }
        Ok(result)
    }
}

impl Names {
    fn look_up(&self, name: String, port: u16, timeout: NextTimeout) -> Result<Vec<SocketAddr>, Error> {
        let failed = |e: crate::error::Error| Error::Io(std::io::Error::other(e.to_string()));
        let done = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| Error::Io(e.into()))?);
        let slot = Arc::new(Lock::new(Rank::Leaf, None));
        let (theirs, signal) = (slot.clone(), done.clone());
        thread::spawn("resolve", move || {
            let result = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            *theirs.lock() = Some(result);
            let _ = rustix::io::write(&*signal, &1u64.to_ne_bytes());
        })
        .map_err(failed)?;
        wait(&self.cancel, &*done, PollFlags::POLLIN, timeout)?;
        let result = slot.lock().take();
        result.unwrap_or_else(|| Err(ErrorKind::NotFound.into())).map_err(Error::Io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn link(cancel: &Cancel, stall: Duration) -> Agent {
        let tls = crate::image::registry::tls::Trust::default().config(&Default::default()).unwrap();
        agent(Link { tls, proxy: None, connect: stall, stall, cancel })
    }

    #[test]
    fn a_silent_server_does_not_hold_a_cancelled_call() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let cancel = Cancel::never();
        let agent = link(&cancel, Duration::from_secs(60));
        let call = std::thread::spawn(move || agent.get(format!("http://localhost:{}/", address.port())).call().map(drop));
        let (_held, _) = listener.accept().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let begin = Instant::now();
        cancel.set();
        assert!(call.join().unwrap().is_err());
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn an_address_that_leads_nowhere_costs_little() {
        // A queue of one that is full: the kernel drops whoever else wants in.
        let full = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&full, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let nowhere: SocketAddr = TcpListener::from(full.try_clone().unwrap()).local_addr().unwrap();
        let _queued: Vec<_> = (0..4).map(|_| start(nowhere).unwrap().0).collect();
        std::thread::sleep(Duration::from_millis(50));
        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = { TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
        let connector = TcpConnector { cancel: Cancel::never() };
        let within = |after: Duration| NextTimeout { after: after.into(), reason: ureq::Timeout::Connect, ..NextTimeout::default() };
        let stream = connector.race(&[refused, nowhere, good.local_addr().unwrap()], within(Duration::from_secs(60))).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good.local_addr().unwrap());
        let e = connector.race(&[nowhere, refused], within(Duration::from_millis(500))).unwrap_err();
        assert!(matches!(e, Error::Timeout(ureq::Timeout::Connect)), "{e}");
        let e = connector.race(&[refused], within(Duration::from_secs(60))).unwrap_err();
        assert!(matches!(&e, Error::Io(e) if e.kind() == ErrorKind::ConnectionRefused), "{e}");
    }

    #[test]
    fn families_take_turns() {
        let parse = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let turns = in_turn(&parse(&["[fd00::1]:1", "[fd00::2]:1", "[fd00::3]:1", "10.0.0.1:1", "10.0.0.2:1"]));
        assert_eq!(turns, parse(&["[fd00::1]:1", "10.0.0.1:1", "[fd00::2]:1", "10.0.0.2:1", "[fd00::3]:1"]));
        assert!(in_turn(&[]).is_empty());
    }

    #[test]
    fn a_head_that_trickles_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for byte in b"HTTP/1.1 200 OK\r\nX-Long: ".iter().chain(std::iter::repeat(&b'a')) {
                std::thread::sleep(Duration::from_millis(20));
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
            }
        });
        let begin = Instant::now();
        let e = link(&Cancel::never(), Duration::from_millis(300)).get(format!("http://{address}/")).call().unwrap_err();
        assert!(matches!(e, Error::Timeout(_)), "{e}");
        // It trickles for ever.
        assert!(begin.elapsed() < Duration::from_secs(30));
    }
}
