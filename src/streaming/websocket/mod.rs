//! WebSocket (RFC 6455) as Kubernetes uses it: the channels of exec, attach and port-forward by a number in front of each
//! message, or the bytes of SPDY. Messages are passed on as they arrive, in pieces, and never collected: a frame of a gigabyte
//! costs no memory, so that no bound on the length of a message is needed, and a reader that is slow makes the client wait.

/// The channels of a connection as its streams.
mod channels;
/// Frames from bytes.
pub(crate) mod frame;
/// The answer to an upgrade.
mod handshake;
/// A non-blocking connection that speaks frames.
mod socket;

pub use channels::{open, Channels, PORTS};
pub use handshake::{upgrade, Protocol, Refusal, Upgrade, Verb};
pub(super) use socket::{Arrived, Socket};

#[cfg(test)]
mod tests;
