//! The streaming server: makes URLs, takes connections, starts sessions. Heads are read by the one thread `streaming`, so that slow
//! ones cost a buffer each and nothing else; a session gets its thread when its token was good.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::accept;
use super::request::Request;
use super::tls::Identity;
use super::token::{self, Tokens};
use crate::config::Streaming;
use crate::container::Containers;
use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};
use crate::sys::thread;

/// A server that listens.
pub struct Server {
    shared: Arc<Shared>,
    base: String,
    address: SocketAddr,
    thread: Lock<Option<JoinHandle<()>>>,
}

/// What the accepting thread and the sessions know.
pub(super) struct Shared {
    pub tokens: Tokens<Request>,
    pub identity: Option<Identity>,
    pub containers: Arc<Containers>,
    /// A session on which nothing moves for so long ends; zero: never.
    pub idle: Duration,
    /// Set when the daemon stops.
    pub stop: Cancel,
    /// The next session's number.
    pub number: AtomicU64,
    limit: usize,
    active: Lock<usize>,
    ended: Condvar,
}

/// The right to have one session; given back when dropped.
pub(super) struct Slot {
    shared: Arc<Shared>,
}

impl Server {
    /// Listens, and starts the thread `streaming`. The certificate, if there is one, must be good.
    pub fn start(config: &Streaming, containers: Arc<Containers>) -> Result<Server> {
        let identity = config.tls.as_ref().map(Identity::load).transpose()?;
        let what = || format!("listen for streaming on {}", config.address);
        let listener = TcpListener::bind(config.address).context(what)?;
        listener.set_nonblocking(true).context(what)?;
        let address = listener.local_addr().context(what)?;
        let scheme = if identity.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{}", SocketAddr::new(reachable(address.ip()), address.port()));
        let shared = Arc::new(Shared {
            tokens: Tokens::new(token::LIFE),
            identity,
            containers,
            idle: config.idle_timeout,
            stop: Cancel::never(),
            number: AtomicU64::new(1),
            limit: config.sessions,
            active: Lock::new(Rank::Leaf, 0),
            ended: Condvar::new(),
        });
        let ours = shared.clone();
        let thread = thread::spawn("streaming", move || accept::run(&listener, &ours))?;
        log::info!("streaming: {base}");
        Ok(Server { shared, base, address, thread: Lock::new(Rank::Leaf, Some(thread)) })
    }

    /// Promises a session: the URL is good once, for a minute.
    pub fn url(&self, request: Request) -> Result<String> {
        let verb = request.verb();
        let token = self.shared.tokens.insert(request)?;
        Ok(format!("{}/{verb}/{token}", self.base))
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What all URLs begin with.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sessions that run.
    pub fn sessions(&self) -> usize {
        *self.shared.active.lock()
    }

    /// Tells the sessions to end, and waits for nothing.
    pub fn begin_stop(&self) {
        self.shared.stop.set();
    }

    /// Takes no more connections and ends the sessions: their clients hear of it. Returns after `grace` at the latest.
    pub fn stop(&self, grace: Duration) {
        self.begin_stop();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
        let end = Instant::now() + grace;
        let mut active = self.shared.active.lock();
        while *active > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !active.wait_for(&self.shared.ended, left) {
                break;
            }
        }
        if *active > 0 {
            log::warn!("streaming: {} sessions did not end in time", *active);
        }
    }
}

impl Shared {
    /// None: there are as many sessions as may be.
    pub fn slot(self: &Arc<Shared>) -> Option<Slot> {
        let mut active = self.active.lock();
        if *active >= self.limit {
            return None;
        }
        *active += 1;
        Some(Slot { shared: self.clone() })
    }

    pub fn next_number(&self) -> u64 {
        self.number.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.shared.active.lock() -= 1;
        self.shared.ended.notify_all();
    }
}

/// A host for URLs. Of a server on all addresses it is the one from which this host would talk to others (connecting a
/// datagram socket looks up the route and sends nothing), or loopback without a route.
fn reachable(ip: IpAddr) -> IpAddr {
    if !ip.is_unspecified() {
        return ip;
    }
    let (any, other, loopback) = match ip {
        IpAddr::V4(_) => ("0.0.0.0:0", "192.0.2.1:9", IpAddr::V4(Ipv4Addr::LOCALHOST)),
        IpAddr::V6(_) => ("[::]:0", "[2001:db8::1]:9", IpAddr::V6(Ipv6Addr::LOCALHOST)),
    };
    let ours = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(other)?;
        socket.local_addr()
    });
    ours.map(|a| a.ip()).ok().filter(|ip| !ip.is_unspecified()).unwrap_or(loopback)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_a_host_that_can_be_reached() {
        let given: IpAddr = "127.0.0.9".parse().unwrap();
        assert_eq!(reachable(given), given);
        for any in ["0.0.0.0", "::"] {
            let ip = reachable(any.parse().unwrap());
            assert!(!ip.is_unspecified());
            // It is ours: we can listen there.
            assert!(TcpListener::bind((ip, 0)).is_ok(), "{ip}");
        }
    }
}
