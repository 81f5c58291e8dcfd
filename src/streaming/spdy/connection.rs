//! A SPDY connection over any transport: streams, windows both ways, bounded buffers.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, IoSlice};
use std::os::fd::BorrowedFd;

use nix::poll::PollFlags;

use super::frame::{self, Decoder, Encoder, Frame};
use crate::error::{Code, Context, Error, Result};
use crate::streaming::transport::Transport;
use crate::streaming::wire::{Input, StreamId, Wire};

/// Window of a stream and of the session before anybody says otherwise (draft 2.6.8, SPDY/3.1).
const WINDOW: i64 = 64 << 10;
/// Used bytes are handed back to the client in steps of this.
const CREDIT: usize = 32 << 10;
/// Bytes of the client that may wait for `consumed` before the socket is no longer read.
const UNREAD_LIMIT: usize = 1 << 20;
/// The same where we are the client: for so many connections that are not read, each with a full window. They are our own program's.
const CLIENT_UNREAD_LIMIT: usize = 256 * WINDOW as usize;
/// Bytes that may wait for the socket.
const OUT_LIMIT: usize = 256 << 10;
/// Answers to control frames may wait beyond that; then the client has to take them before it is read again.
const OUT_SLACK: usize = 64 << 10;
/// Bytes of one read, and of one data frame to the client.
const READ: usize = 64 << 10;
const FRAME: usize = 32 << 10;
/// Streams at a time.
const STREAMS: usize = 1024;
const GO_AWAY_OK: u32 = 0;
const GO_AWAY_PROTOCOL_ERROR: u32 = 1;

/// One side of a connection, the server's unless said otherwise: what is called the client below is the peer. Memory: the limit of
/// what is unread + `OUT_LIMIT` + `OUT_SLACK` + one read, whatever the client does.
pub struct Spdy<T> {
    transport: T,
    decoder: Decoder,
    encoder: Encoder,
    streams: HashMap<StreamId, Stream>,
    last_stream: StreamId,
    inputs: VecDeque<Input>,
    read: Vec<u8>,
    read_at: usize,
    out: Vec<u8>,
    out_at: usize,
    /// Window of a new stream, by the client's SETTINGS.
    initial_window: i64,
    session_window: i64,
    /// Whether the client keeps windows at all: the Go clients do not, and would never open one again.
    stream_windows: bool,
    session_windows: bool,
    /// Handed out by `next`, not yet `consumed`.
    unread: usize,
    unread_limit: usize,
    session_credit: usize,
    ping: u32,
    /// We are the client: streams are ours to open.
    opens: bool,
    said_goodbye: bool,
    broken: Option<Error>,
}

struct Stream {
    window: i64,
    credit: usize,
    accepted: bool,
    finished: bool,
    client_finished: bool,
}

impl<T: Transport> Spdy<T> {
    /// `answer` goes out first: the 101 that made it SPDY. Nothing else does before the client's first frame: Go's clients read the answer
    /// with a buffer that they drop.
    pub fn new(transport: T, answer: Vec<u8>) -> Spdy<T> {
        Spdy {
            transport,
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            streams: HashMap::new(),
            last_stream: 0,
            inputs: VecDeque::new(),
            read: Vec::new(),
            read_at: 0,
            out: answer,
            out_at: 0,
            initial_window: WINDOW,
            session_window: WINDOW,
            stream_windows: false,
            session_windows: false,
            unread: 0,
            unread_limit: UNREAD_LIMIT,
            session_credit: 0,
            ping: 2,
            opens: false,
            said_goodbye: false,
            broken: None,
        }
    }

    /// The client's side, on a connection that was upgraded. It keeps windows, and says so: a stream that is not read then makes only itself wait.
    pub fn client(transport: T) -> Spdy<T> {
        let mut spdy = Spdy { ping: 1, opens: true, unread_limit: CLIENT_UNREAD_LIMIT, ..Spdy::new(transport, Vec::new()) };
        spdy.queue(&frame::settings(WINDOW as u32));
        spdy.queue(&frame::window_update(0, (CLIENT_UNREAD_LIMIT as i64 - WINDOW) as u32));
        spdy
    }

    /// Opens a stream; there is no room on it before the server has said yes.
    pub fn begin(&mut self, headers: &[(&str, &str)]) -> Result<StreamId> {
        let stream = if self.last_stream == 0 { 1 } else { self.last_stream + 2 };
        if !self.opens || stream > i32::MAX as u32 {
            return Err(Error::internal("open a stream: there are none left"));
        }
        self.last_stream = stream;
        let new = Stream { window: self.initial_window, credit: 0, accepted: false, finished: false, client_finished: false };
        self.streams.insert(stream, new);
        let syn = self.encoder.syn_stream(stream, false, headers);
        self.queue(&syn);
        self.flush()?;
        Ok(stream)
    }

    fn queued(&self) -> usize {
        self.out.len() - self.out_at
    }

    /// Whether the client has to wait until we have used or it has taken something.
    fn is_paused(&self) -> bool {
        self.unread >= self.unread_limit || self.queued() > OUT_LIMIT + OUT_SLACK
    }

    /// Sends what is queued, as far as the transport takes it.
    fn flush(&mut self) -> Result<()> {
        while self.out_at < self.out.len() {
            match self.transport.write(&self.out[self.out_at..]) {
                Ok(0) => return Err(self.gone("takes nothing")),
                Ok(n) => self.out_at += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(self.lost(e)),
            }
        }
        self.out.clear();
        self.out_at = 0;
        match self.transport.flush() {
            Err(e) if e.kind() != ErrorKind::WouldBlock => Err(self.lost(e)),
            _ => Ok(()),
        }
    }

    fn queue(&mut self, bytes: &[u8]) {
        // What has left is dropped before the buffer would grow.
        if self.out_at > 0 && self.out.len() + bytes.len() > self.out.capacity() {
            self.out.drain(..self.out_at);
            self.out_at = 0;
        }
        self.out.extend_from_slice(bytes);
    }

    /// Head and payload without a copy when nothing is queued before them.
    fn queue_data(&mut self, head: &[u8; 8], payload: &[u8]) -> Result<()> {
        let mut sent = 0;
        if self.queued() == 0 && !self.transport.wants_write() {
            sent = match self.transport.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)]) {
                Ok(n) => n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
                Err(e) => return Err(self.lost(e)),
            };
        }
        let from_head = sent.min(head.len());
        self.queue(&head[from_head..]);
        self.queue(&payload[sent - from_head..]);
        Ok(())
    }

    /// Reads once into the empty buffer. False: nothing there.
    fn fill(&mut self) -> Result<bool> {
        self.read.resize(READ, 0);
        self.read_at = 0;
        let got = loop {
            match self.transport.read(&mut self.read) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.read.truncate(*got.as_ref().unwrap_or(&0));
        match got {
            Ok(0) => Err(self.gone("has closed the connection")),
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(self.lost(e)),
        }
    }

    /// The next input from what was read; None: more has to be read, or the client has to wait.
    fn advance(&mut self) -> Result<Option<Input>> {
        loop {
            if let Some(input) = self.inputs.pop_front() {
                return Ok(Some(input));
            }
            if self.is_paused() {
                return Ok(None);
            }
            if self.read_at == self.read.len() && !(self.transport.has_ahead() && self.fill()?) {
                return Ok(None);
            }
            let (used, frame) = self.decoder.decode(&self.read[self.read_at..])?;
            self.read_at += used;
            if let Some(frame) = frame {
                self.take(frame)?;
            }
        }
    }

    fn take(&mut self, frame: Frame) -> Result<()> {
        match frame {
            Frame::SynStream { stream, .. } if self.opens => self.queue(&frame::reset(stream, frame::REFUSED_STREAM)),
            Frame::SynStream { stream, fin, headers } => self.open(stream, fin, headers),
            Frame::SynReply { stream, fin, .. } if self.opens => {
                if let Some(s) = self.streams.get_mut(&stream) {
                    s.accepted = true;
                }
                if fin {
                    self.client_finished(stream);
                }
            }
            Frame::GoAway { .. } if self.opens => return Err(self.gone("says goodbye")),
            Frame::Data { stream, bytes, fin } => self.data(stream, bytes, fin),
            Frame::Headers { stream, fin, .. } => {
                if fin {
                    self.client_finished(stream);
                }
            }
            Frame::Reset { stream, .. } => {
                if self.streams.remove(&stream).is_some() {
                    self.inputs.push_back(Input::Reset { stream });
                }
            }
            Frame::Settings { initial_window: Some(window) } => {
                let window = i64::from(window.min(i32::MAX as u32));
                let change = window - self.initial_window;
                self.initial_window = window;
                self.stream_windows = true;
                self.streams.values_mut().for_each(|s| s.window += change);
            }
            Frame::WindowUpdate { stream: 0, delta } => {
                self.session_windows = true;
                // A server that keeps windows says so before it says yes to a stream; Go's never do.
                self.stream_windows |= self.opens;
                self.session_window = (self.session_window + i64::from(delta)).min(i64::from(i32::MAX));
            }
            Frame::WindowUpdate { stream, delta } => {
                self.stream_windows = true;
                if let Some(s) = self.streams.get_mut(&stream) {
                    s.window = (s.window + i64::from(delta)).min(i64::from(i32::MAX));
                }
            }
            // Odd numbers are the client's pings, even ones the server's; others answer ours.
            Frame::Ping(id) if (id % 2 == 1) != self.opens => self.queue(&frame::ping(id)),
            // We open no streams, and its goodbye is followed by its end.
            Frame::Ping(_) | Frame::Settings { initial_window: None } | Frame::SynReply { .. } | Frame::GoAway { .. } => {}
        }
        Ok(())
    }

    fn open(&mut self, stream: StreamId, fin: bool, headers: Vec<(String, String)>) {
        if stream % 2 == 0 || stream <= self.last_stream {
            return self.queue(&frame::reset(stream, frame::PROTOCOL_ERROR));
        }
        if self.last_stream == 0 {
            // As far as may be unread: a stream whose bytes nobody uses would close the window of all others with its own.
            self.queue(&frame::window_update(0, (UNREAD_LIMIT as i64 - WINDOW) as u32));
        }
        self.last_stream = stream;
        if self.streams.len() >= STREAMS || self.said_goodbye {
            return self.queue(&frame::reset(stream, frame::REFUSED_STREAM));
        }
        let new = Stream { window: self.initial_window, credit: 0, accepted: false, finished: false, client_finished: fin };
        self.streams.insert(stream, new);
        self.inputs.push_back(Input::Opened { stream, headers });
        if fin {
            self.inputs.push_back(Input::Finished { stream });
        }
    }

    fn data(&mut self, stream: StreamId, bytes: Vec<u8>, fin: bool) {
        match self.streams.get(&stream) {
            Some(s) if !s.client_finished => {
                if !bytes.is_empty() {
                    self.unread += bytes.len();
                    self.inputs.push_back(Input::Data { stream, bytes });
                }
                if fin {
                    self.client_finished(stream);
                }
            }
            // What was under way to a stream that is over; the session's window counted it.
            _ => self.give_back(bytes.len()),
        }
    }

    fn client_finished(&mut self, stream: StreamId) {
        let Some(s) = self.streams.get_mut(&stream).filter(|s| !s.client_finished) else { return };
        s.client_finished = true;
        if s.finished {
            self.streams.remove(&stream);
        }
        self.inputs.push_back(Input::Finished { stream });
    }

    fn peer(&self) -> &'static str {
        if self.opens {
            "server"
        } else {
            "client"
        }
    }

    fn gone(&self, what: &str) -> Error {
        Error::cancelled(format!("the {} {what}", self.peer()))
    }

    fn lost(&self, e: std::io::Error) -> Error {
        // TLS that does not decrypt is a broken protocol; everything else is a connection that broke.
        let code = if e.kind() == ErrorKind::InvalidData { Code::InvalidArgument } else { Code::Cancelled };
        Err::<(), _>(e).context(|| format!("talk with the {}", self.peer())).unwrap_err().with_code(code)
    }

    fn give_back(&mut self, bytes: usize) {
        self.session_credit += bytes;
        if self.session_credit >= CREDIT {
            self.queue(&frame::window_update(0, self.session_credit as u32));
            self.session_credit = 0;
        }
    }
}

impl<T: Transport> Wire for Spdy<T> {
    fn socket(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }

    fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.broken.is_some() {
            // Always ready: so `ready` is called, which says what is wrong.
            return PollFlags::POLLOUT;
        }
        if !self.is_paused() {
            flags |= PollFlags::POLLIN;
        }
        if self.queued() > 0 || self.transport.wants_write() {
            flags |= PollFlags::POLLOUT;
        }
        flags
    }

    fn ready(&mut self, flags: PollFlags) -> Result<()> {
        if let Some(e) = self.broken.take() {
            self.queue(&frame::go_away(self.last_stream, GO_AWAY_PROTOCOL_ERROR));
            let _ = self.flush();
            return Err(e);
        }
        self.flush()?;
        if flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) && self.read_at == self.read.len() {
            self.fill()?;
        } else if flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            return Err(self.gone("has closed the connection"));
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Input> {
        if self.broken.is_some() {
            return None;
        }
        match self.advance() {
            Ok(input) => {
                // Answers to pings and refused streams leave before the session waits.
                if input.is_none() && self.queued() > 0 {
                    if let Err(e) = self.flush() {
                        self.broken = Some(e);
                    }
                }
                input
            }
            Err(e) => {
                self.broken = Some(e);
                None
            }
        }
    }

    fn accept(&mut self, stream: StreamId) -> Result<()> {
        let Some(s) = self.streams.get_mut(&stream).filter(|s| !s.accepted) else { return Ok(()) };
        s.accepted = true;
        let reply = self.encoder.syn_reply(stream, false, &[]);
        self.queue(&reply);
        self.flush()
    }

    fn room(&self, stream: StreamId) -> usize {
        let Some(s) = self.streams.get(&stream).filter(|s| s.accepted && !s.finished) else { return 0 };
        let mut room = OUT_LIMIT.saturating_sub(self.queued());
        if self.stream_windows {
            room = room.min(s.window.max(0) as usize);
        }
        if self.session_windows {
            room = room.min(self.session_window.max(0) as usize);
        }
        room
    }

    fn send(&mut self, stream: StreamId, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.room(stream) {
            return Err(Error::internal(format!("send {} bytes on stream {stream}: no room", bytes.len())));
        }
        for piece in bytes.chunks(FRAME) {
            self.queue_data(&frame::data_head(stream, piece.len(), false), piece)?;
        }
        if let Some(s) = self.streams.get_mut(&stream) {
            s.window -= bytes.len() as i64;
        }
        self.session_window -= bytes.len() as i64;
        self.flush()
    }

    fn consumed(&mut self, stream: StreamId, bytes: usize) -> Result<()> {
        self.unread = self.unread.saturating_sub(bytes);
        if let Some(s) = self.streams.get_mut(&stream).filter(|s| !s.client_finished) {
            s.credit += bytes;
            if s.credit >= CREDIT {
                let credit = std::mem::take(&mut s.credit);
                self.queue(&frame::window_update(stream, credit as u32));
            }
        }
        self.give_back(bytes);
        self.flush()
    }

    fn finish(&mut self, stream: StreamId) -> Result<()> {
        let Some(s) = self.streams.get_mut(&stream).filter(|s| !s.finished) else { return Ok(()) };
        s.finished = true;
        if s.client_finished {
            self.streams.remove(&stream);
        }
        self.queue(&frame::data_head(stream, 0, true));
        self.flush()
    }

    fn reset(&mut self, stream: StreamId) -> Result<()> {
        let Some(s) = self.streams.remove(&stream) else { return Ok(()) };
        self.queue(&frame::reset(stream, if s.accepted { frame::CANCEL } else { frame::REFUSED_STREAM }));
        self.flush()
    }

    fn goodbye(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.said_goodbye, true) {
            self.queue(&frame::go_away(self.last_stream, GO_AWAY_OK));
        }
        self.flush()
    }

    fn is_flushed(&self) -> bool {
        self.queued() == 0 && !self.transport.wants_write()
    }

    fn keep_alive(&mut self) -> Result<()> {
        // One that has not left is enough.
        if self.queued() == 0 {
            self.queue(&frame::ping(self.ping));
            self.ping = if self.ping > u32::MAX - 2 { 2 } else { self.ping + 2 };
        }
        self.flush()
    }
}
