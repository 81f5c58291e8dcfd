//! A client's connection with several streams on it. A session polls the socket and its own descriptors, and moves bytes
//! between the two; nothing here blocks. Implementations: SPDY/3.1, SPDY in a WebSocket, WebSocket channels.

use std::os::fd::BorrowedFd;

use nix::poll::PollFlags;

use crate::error::Result;

/// A stream of the connection: SPDY's stream id, or WebSocket's channel.
pub type StreamId = u32;

/// What the client did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A new stream. The channels of a WebSocket are announced with made-up headers before anything else, so that sessions see one kind of connection.
    Opened { stream: StreamId, headers: Vec<(String, String)> },
    /// Hand `bytes.len()` back by `consumed` once they are written: that is what opens the client's window again.
    Data { stream: StreamId, bytes: Vec<u8> },
    /// The client writes no more to this stream.
    Finished { stream: StreamId },
    /// The client wants neither side of this stream any more.
    Reset { stream: StreamId },
}

/// A connection that does not block.
pub trait Wire: Send {
    /// What to poll.
    fn socket(&self) -> BorrowedFd<'_>;

    /// For what to poll it: POLLIN unless so much is unread that the client has to wait, POLLOUT while something is unsent.
    fn interest(&self) -> PollFlags;

    /// Reads and writes what the socket is ready for. CANCELLED when the client has gone, INVALID_ARGUMENT when it breaks the protocol.
    fn ready(&mut self, flags: PollFlags) -> Result<()>;

    /// What has arrived, oldest first; None: nothing more for now. Ask until None before polling again.
    fn next(&mut self) -> Option<Input>;

    /// Says yes to an opened stream. Nothing on connections that need no answer.
    fn accept(&mut self, stream: StreamId) -> Result<()>;

    /// Bytes that `send` would take for this stream now: what the client's window and our bounded buffer allow. 0 also for unknown streams.
    fn room(&self, stream: StreamId) -> usize;

    /// Queues at most `room` bytes and sends what the socket takes.
    fn send(&mut self, stream: StreamId, bytes: &[u8]) -> Result<()>;

    /// Says that these bytes of the client's have been used.
    fn consumed(&mut self, stream: StreamId, bytes: usize) -> Result<()>;

    /// Nothing more will be sent on this stream; the client may still write to it.
    fn finish(&mut self, stream: StreamId) -> Result<()>;

    /// Refuses or breaks a stream, both sides.
    fn reset(&mut self, stream: StreamId) -> Result<()>;

    /// Says goodbye: SPDY's GOAWAY, WebSocket's close frame. Sent after all that is queued.
    fn goodbye(&mut self) -> Result<()>;

    /// Whether everything queued has left.
    fn is_flushed(&self) -> bool;

    /// A sign of life for an idle connection, if it has one (ping).
    fn keep_alive(&mut self) -> Result<()>;

    /// Whether the client can neither open streams nor end one alone: the channels of a WebSocket. The connection ends with its streams then.
    fn is_fixed(&self) -> bool {
        false
    }
}
