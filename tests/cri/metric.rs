//! What a daemon tells of itself, and waiting for it: whether a call has arrived, or its worker has left it, can be seen from nowhere
//! else.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};

use crate::node::{eventually, Node};

/// An address on loopback that no other daemon of a test has, in this process or beside it; its port is none that the kernel gives away.
pub fn address() -> SocketAddr {
    static NODES: AtomicU16 = AtomicU16::new(0);
    // Pids have 22 bits.
    let pid = std::process::id() | 1 << 22;
    let [_, a, b, c] = pid.to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, a, b, c), 10_000 + NODES.fetch_add(1, Ordering::Relaxed)))
}

impl Node {
    /// A value by its name with its labels.
    pub fn metric(&self, name: &str) -> usize {
        value(&self.scrape(), name)
    }

    fn scrape(&self) -> String {
        let address = self.config().metrics.address.expect("tests have metrics");
        let mut stream = TcpStream::connect(address).expect("connect to the metrics");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        text
    }

    /// Calls of the slow lane that have a worker, and those that wait for one.
    pub fn slow_calls(&self) -> (usize, usize) {
        let text = self.scrape();
        let ask = |gauge| value(&text, &format!("crisp_lane_{gauge}{{lane=\"slow\"}}"));
        (ask("busy_workers"), ask("queued_calls"))
    }

    /// Waits until exactly so many calls of the slow lane have a worker, and none waits for one.
    pub fn wait_busy(&self, calls: usize) {
        eventually(&format!("{calls} slow calls at work"), || (self.slow_calls() == (calls, 0)).then_some(()));
    }

    /// Waits until exactly so many clients hear events.
    pub fn wait_subscribers(&self, count: usize) {
        eventually(&format!("{count} subscribers"), || (self.metric("crisp_event_subscribers") == count).then_some(()));
    }
}

fn value(text: &str, name: &str) -> usize {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("{name} is not in:\n{text}"))
}
