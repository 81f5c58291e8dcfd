//! What a session is about, and how its two sides understand one another.

use std::path::PathBuf;
use std::sync::Arc;

use crate::container::Container;

/// What an RPC has promised to whoever brings the token.
pub enum Request {
    Exec { container: Arc<Container>, cmd: Vec<String>, wanted: Wanted },
    Attach { container: Arc<Container>, wanted: Wanted },
    PortForward { sandbox: String, target: NetTarget, ports: Vec<u16> },
}

pub use crate::container::stream::Wanted;

/// Where the ports are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetTarget {
    /// In the network namespace pinned here.
    Netns(PathBuf),
    /// On the host's network.
    Host,
}

impl Request {
    /// The first element of the URL's path.
    pub fn verb(&self) -> &'static str {
        match self {
            Request::Exec { .. } => "exec",
            Request::Attach { .. } => "attach",
            Request::PortForward { .. } => "portforward",
        }
    }
}

/// Versions of the exec and attach protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// `channel.k8s.io`, or nothing at all.
    V1,
    V2,
    /// Has a stream for resizes.
    V3,
    /// The error stream carries a metav1.Status.
    V4,
    /// WebSocket only: channels can be closed one by one.
    V5,
}

impl Protocol {
    /// The name in headers; of SPDY and WebSocket both.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::V1 => "channel.k8s.io",
            Protocol::V2 => "v2.channel.k8s.io",
            Protocol::V3 => "v3.channel.k8s.io",
            Protocol::V4 => "v4.channel.k8s.io",
            Protocol::V5 => "v5.channel.k8s.io",
        }
    }

    pub fn has_resize(self) -> bool {
        self >= Protocol::V3
    }

    /// Whether the error stream carries a metav1.Status instead of text.
    pub fn has_status(self) -> bool {
        self >= Protocol::V4
    }
}

/// What SPDY's port forward is called in headers.
pub const PORT_FORWARD: &str = "portforward.k8s.io";
/// Versions over SPDY, ours first.
pub const SPDY_PROTOCOLS: [Protocol; 4] = [Protocol::V4, Protocol::V3, Protocol::V2, Protocol::V1];
