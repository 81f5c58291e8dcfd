//! Exec, attach and port-forward for clients that bring SPDY/3.1 or WebSocket: an HTTP server on threads of its own, one
//! thread per session, each around one poll(2).

/// A client's connection with several streams on it.
pub mod wire;
