//! What a session's bytes travel on: TCP, TLS over TCP, or (for SPDY) a WebSocket. Nothing here blocks.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::net::sockopt;

use crate::error::{Context, Result};

/// A connection of bytes that does not block. `read` gives `WouldBlock` when nothing is there and 0 at the end; `write`
/// gives `WouldBlock` when nothing fits; `flush` pushes out what `write` has taken, and gives `WouldBlock` when some stays.
pub trait Transport: Read + Write + AsFd + Send {
    /// Whether something that `write` has taken has not left yet: poll for POLLOUT and call `flush`.
    fn wants_write(&self) -> bool;

    /// Whether `read` has bytes although the socket is silent: they were read with earlier ones.
    fn has_ahead(&self) -> bool;

    /// Nothing more will be written; the peer sees the end after what was.
    fn shutdown(&mut self);
}

impl Transport for Box<dyn Transport> {
    fn wants_write(&self) -> bool {
        (**self).wants_write()
    }

    fn has_ahead(&self) -> bool {
        (**self).has_ahead()
    }

    fn shutdown(&mut self) {
        (**self).shutdown();
    }
}

/// Makes a socket non-blocking, its small frames leave at once, and the kernel finds out about a dead idle peer within about
/// a minute and a half. No TCP_USER_TIMEOUT: a peer that is alive may stop reading for as long as it likes.
pub fn prepare(socket: &TcpStream) -> Result<()> {
    let what = || "set up a streaming connection";
    socket.set_nonblocking(true).context(what)?;
    socket.set_nodelay(true).context(what)?;
    sockopt::set_socket_keepalive(socket, true).context(what)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(30)).context(what)?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10)).context(what)?;
    sockopt::set_tcp_keepcnt(socket, 6).context(what)?;
    Ok(())
}

/// Plain TCP.
pub struct Plain {
    socket: TcpStream,
}

impl Plain {
    /// Takes a socket that was `prepare`d.
    pub fn new(socket: TcpStream) -> Plain {
        Plain { socket }
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.socket.read(buffer)
    }
}

impl Write for Plain {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.socket.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[std::io::IoSlice<'_>]) -> std::io::Result<usize> {
        self.socket.write_vectored(parts)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl AsFd for Plain {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Transport for Plain {
    fn wants_write(&self) -> bool {
        false
    }

    fn has_ahead(&self) -> bool {
        false
    }

    fn shutdown(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// TLS over TCP. The handshake happens within the first reads.
pub struct Tls {
    socket: TcpStream,
    session: rustls::Connection,
    /// Decrypted bytes that wait for `read`.
    ahead: usize,
    ended: bool,
}

impl Tls {
    /// Takes a socket that was `prepare`d.
    pub fn new(socket: TcpStream, session: impl Into<rustls::Connection>) -> Tls {
        Tls { socket, session: session.into(), ahead: 0, ended: false }
    }

    fn push(&mut self) -> std::io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

impl Read for Tls {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.session.reader().read(buffer) {
                // An end without a goodbye is an end too: what is above has its own way to finish.
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Ok(n) => {
                    self.ahead = self.ahead.saturating_sub(n);
                    return Ok(n);
                }
                Err(e) => return Err(e),
            }
            if self.ended {
                return Ok(0);
            }
            let got = match self.session.read_tls(&mut self.socket) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other,
            };
            if let Ok(n) = got {
                self.ended = n == 0;
                match self.session.process_new_packets() {
                    Ok(state) => self.ahead = state.plaintext_bytes_to_read(),
                    Err(e) => {
                        // The alert that says why.
                        let _ = self.push();
                        return Err(std::io::Error::new(ErrorKind::InvalidData, e));
                    }
                }
            }
            match self.push() {
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
                _ => {}
            }
            got?;
        }
    }
}

impl Write for Tls {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Records of a former write that have not left: taking more would only grow the buffer.
        self.push()?;
        let taken = self.session.writer().write(bytes)?;
        match self.push() {
            Err(e) if e.kind() != ErrorKind::WouldBlock => Err(e),
            _ if taken == 0 && !bytes.is_empty() => Err(ErrorKind::WouldBlock.into()),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.push()
    }
}

impl AsFd for Tls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Transport for Tls {
    fn wants_write(&self) -> bool {
        self.session.wants_write()
    }

    fn has_ahead(&self) -> bool {
        self.ahead > 0
    }

    fn shutdown(&mut self) {
        self.session.send_close_notify();
        let _ = self.push();
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// A transport with bytes in front: what came in the same packet as the head of the request.
pub struct Ahead<T> {
    bytes: Vec<u8>,
    used: usize,
    inner: T,
}

impl<T> Ahead<T> {
    pub fn new(bytes: Vec<u8>, inner: T) -> Ahead<T> {
        Ahead { bytes, used: 0, inner }
    }
}

impl<T: Read> Read for Ahead<T> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.used == self.bytes.len() {
            return self.inner.read(buffer);
        }
        let n = buffer.len().min(self.bytes.len() - self.used);
        buffer[..n].copy_from_slice(&self.bytes[self.used..self.used + n]);
        self.used += n;
        if self.used == self.bytes.len() {
            self.bytes = Vec::new();
            self.used = 0;
        }
        Ok(n)
    }
}

impl<T: Write> Write for Ahead<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.inner.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[std::io::IoSlice<'_>]) -> std::io::Result<usize> {
        self.inner.write_vectored(parts)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl<T: AsFd> AsFd for Ahead<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl<T: Transport> Transport for Ahead<T> {
    fn wants_write(&self) -> bool {
        self.inner.wants_write()
    }

    fn has_ahead(&self) -> bool {
        self.used < self.bytes.len() || self.inner.has_ahead()
    }

    fn shutdown(&mut self) {
        self.inner.shutdown();
    }
}
