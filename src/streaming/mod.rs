//! Exec, attach and port-forward for clients that bring SPDY/3.1 or WebSocket: an HTTP server on threads of its own, one
//! thread per session, each around one poll(2).

/// Port-forward: the streams of a client to servers in a sandbox.
pub mod portforward;
/// SPDY/3.1: frames, header blocks, flow control.
pub mod spdy;
/// What carries the bytes of a connection.
pub mod transport;
/// SPDY's bytes in the messages of a WebSocket.
pub mod tunnel;
/// WebSocket: handshake, frames, channels.
pub mod websocket;
/// A client's connection with several streams on it.
pub mod wire;
