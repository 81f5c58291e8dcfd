//! Exec, attach and port-forward for clients that bring SPDY/3.1 or WebSocket: an HTTP server on threads of its own, one
//! thread per session, each around one poll(2).

/// Connections until their head was read.
mod accept;
/// Heads of requests, and answers.
pub mod http;
/// Port-forward: the streams of a client to servers in a sandbox.
pub mod portforward;
/// Exec and attach sessions.
mod remote;
/// What a session is about.
pub mod request;
/// Sizes of terminals.
pub mod resize;
/// Tokens to URLs, connections to sessions.
mod server;
/// What becomes of a request.
mod session;
/// SPDY/3.1: frames, header blocks, flow control.
pub mod spdy;
/// The last word on the error stream.
pub mod status;
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

pub use server::Server;
