//! SPDY's bytes in the binary messages of a WebSocket: `SPDY/3.1+portforward.k8s.io`. Messages have no meaning of their own;
//! a close frame is the end of the byte stream.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use super::transport::Transport;
use super::websocket::{Arrived, Socket};
use crate::error::{Code, Error};

/// Unsent bytes from which `write` takes nothing.
const LIMIT: usize = 256 * 1024;

/// The byte stream inside a WebSocket.
pub struct Tunnel<T: Transport> {
    socket: Socket<T>,
    part: Option<Arrived>,
}

impl<T: Transport> Tunnel<T> {
    /// `answer` goes out first: the 101 that made it a WebSocket.
    pub fn new(transport: T, answer: Vec<u8>) -> Tunnel<T> {
        Tunnel { socket: Socket::new(transport, answer), part: None }
    }
}

impl<T: Transport> Read for Tunnel<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            if let Some(part) = &mut self.part {
                let bytes = self.socket.bytes(&part.at);
                let n = bytes.len().min(buffer.len());
                if n > 0 {
                    buffer[..n].copy_from_slice(&bytes[..n]);
                    part.at.start += n;
                    return Ok(n);
                }
                self.part = None;
            }
            self.part = self.socket.next().map_err(foreign)?;
            match &self.part {
                Some(part) if part.text => return Err(io::Error::new(ErrorKind::InvalidData, "a text message in a tunnel")),
                Some(_) => {}
                None if self.socket.is_gone() => return Ok(0),
                None => return Err(ErrorKind::WouldBlock.into()),
            }
        }
        Ok(0)
    }
}

impl<T: Transport> Write for Tunnel<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// All parts as one message, so that a head does not travel alone.
    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.socket.backlog() >= LIMIT {
            self.socket.flush().map_err(foreign)?;
        }
        let mut room = LIMIT.saturating_sub(self.socket.backlog());
        if room == 0 && parts.iter().any(|p| !p.is_empty()) {
            return Err(ErrorKind::WouldBlock.into());
        }
        let mut taken: Vec<&[u8]> = Vec::with_capacity(parts.len());
        for part in parts {
            let n = part.len().min(room);
            taken.push(&part[..n]);
            room -= n;
        }
        let bytes = taken.iter().map(|p| p.len()).sum();
        if bytes > 0 {
            self.socket.message(false, &taken).and_then(|()| self.socket.flush()).map_err(foreign)?;
        }
        Ok(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush().map_err(foreign)
    }
}

impl<T: Transport> AsFd for Tunnel<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<T: Transport> Transport for Tunnel<T> {
    fn wants_write(&self) -> bool {
        self.socket.wants_write()
    }

    fn has_ahead(&self) -> bool {
        self.part.as_ref().is_some_and(|p| !p.at.is_empty()) || self.socket.has_ahead()
    }

    fn shutdown(&mut self) {
        // The client's end of file.
        let _ = self.socket.goodbye();
    }
}

impl<T: Transport> Drop for Tunnel<T> {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn foreign(e: Error) -> io::Error {
    let kind = match e.code() {
        Code::Cancelled => ErrorKind::ConnectionReset,
        Code::InvalidArgument => ErrorKind::InvalidData,
        _ => ErrorKind::Other,
    };
    io::Error::new(kind, e.to_string())
}
