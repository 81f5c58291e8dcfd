//! Exec, attach and port-forward for clients that bring SPDY/3.1 or WebSocket: an HTTP server on threads of its own, one
//! thread per session, each around one poll(2).

/// Heads of requests, and answers.
pub mod http;
/// Port-forward: the streams of a client to servers in a sandbox.
pub mod portforward;
/// What a session is about.
pub mod request;
/// SPDY/3.1: frames, header blocks, flow control.
pub mod spdy;
/// Certificate and key, read again when they change.
mod tls;
/// Single-use keys to sessions.
pub mod token;
/// What bytes travel on: TCP, TLS.
pub mod transport;
/// SPDY's bytes in the messages of a WebSocket.
pub mod tunnel;
/// WebSocket: handshake, frames, channels.
pub mod websocket;
/// A client's connection with several streams on it.
pub mod wire;
