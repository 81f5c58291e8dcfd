//! SPDY/3.1, the server's side, as the Go clients of Kubernetes speak it (draft-mbelshe-httpbis-spdy-00 with the session
//! window of SPDY/3.1). `frame` and `header` are pure: bytes in, frames out.
//!
//! What those clients do, which the draft does not say: they never send SETTINGS or WINDOW_UPDATE and ignore ours, so a window
//! holds only for a client that has sent one of the two; they drop data that arrives before the SYN_REPLY of its
//! stream; and at the end of the connection they may drop what they have read already, so we never close first.

mod connection;
/// The zlib dictionary of header blocks.
mod dictionary;
/// Frames to bytes and back.
pub mod frame;
/// Header blocks to pairs and back.
pub mod header;

pub use connection::Spdy;
