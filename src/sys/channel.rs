//! The messages of `sys::socket` on a socket that must not block: a poll loop reads and writes what is possible.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::socket::{receive_some, MESSAGE_LIMIT};
use crate::error::{Context, Error, Result};

/// Bytes that may wait for a peer that does not read.
const QUEUE_LIMIT: usize = 4 * MESSAGE_LIMIT;
/// Bytes in front of each message: its length, little-endian.
const HEAD: usize = 4;

/// What `receive` found.
#[derive(Debug)]
pub enum Received {
    Message(Vec<u8>, Vec<OwnedFd>),
    /// No whole message yet.
    Later,
    Closed,
}

/// One connection.
pub struct Channel {
    stream: UnixStream,
    input: Vec<u8>,
    fds: Vec<OwnedFd>,
    output: Vec<u8>,
    sent: usize,
}

impl Channel {
    pub fn new(stream: UnixStream) -> Result<Channel> {
        stream.set_nonblocking(true).context(|| "set O_NONBLOCK")?;
        Ok(Channel { stream, input: Vec::new(), fds: Vec::new(), output: Vec::new(), sent: 0 })
    }

    /// Reads until one message is whole or nothing is there. Never reads into the next message, so that descriptors stay
    /// with the message they came with.
    pub fn receive(&mut self) -> Result<Received> {
        let mut chunk = [0; 2048];
        loop {
            let whole = match self.input.first_chunk::<HEAD>() {
                None => HEAD,
                Some(head) => HEAD + u32::from_le_bytes(*head) as usize,
            };
            if whole > HEAD + MESSAGE_LIMIT {
                return Err(Error::internal(format!("receive message: {} bytes announced", whole - HEAD)));
            }
            if self.input.len() >= HEAD && self.input.len() == whole {
                let message = self.input.split_off(HEAD);
                self.input = Vec::new();
                return Ok(Received::Message(message, std::mem::take(&mut self.fds)));
            }
            let want = (whole - self.input.len()).min(chunk.len());
            match receive_some(&self.stream, &mut chunk[..want])? {
                None => return Ok(Received::Later),
                Some((0, _)) if self.input.is_empty() => return Ok(Received::Closed),
                Some((0, _)) => return Err(Error::internal("receive message: the peer hung up in the middle")),
                Some((n, mut fds)) => {
                    self.input.extend_from_slice(&chunk[..n]);
                    self.fds.append(&mut fds);
                    if self.fds.len() > 16 {
                        return Err(Error::internal("receive message: too many descriptors"));
                    }
                }
            }
        }
    }

    /// Appends a message to what is to be sent.
    pub fn queue(&mut self, message: &[u8]) -> Result<()> {
        let length = u32::try_from(message.len()).ok().filter(|n| *n as usize <= MESSAGE_LIMIT);
        let Some(length) = length.filter(|_| self.output.len() + message.len() <= QUEUE_LIMIT) else {
            return Err(Error::internal(format!("queue message of {} bytes: {} bytes wait", message.len(), self.output.len())));
        };
        self.output.extend_from_slice(&length.to_le_bytes());
        self.output.extend_from_slice(message);
        Ok(())
    }

    /// Sends what the peer takes now.
    pub fn flush(&mut self) -> Result<()> {
        use nix::sys::socket::{send, MsgFlags};
        use std::os::fd::AsRawFd;
        while self.sent < self.output.len() {
            match send(self.stream.as_raw_fd(), &self.output[self.sent..], MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => self.sent += n,
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(e) => return Err(e).context(|| "send message"),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        Ok(())
    }

    /// Whether something waits to be sent.
    pub fn is_pending(&self) -> bool {
        !self.output.is_empty()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket;
    use std::io::Write;

    #[test]
    fn pieces_become_messages() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(b).unwrap();
        assert!(matches!(channel.receive().unwrap(), Received::Later));
        (&a).write_all(&[3, 0]).unwrap();
        assert!(matches!(channel.receive().unwrap(), Received::Later));
        (&a).write_all(&[0, 0, b'a', b'b', b'c', 0, 0, 0, 0]).unwrap();
        assert!(matches!(channel.receive().unwrap(), Received::Message(m, _) if m == b"abc"));
        assert!(matches!(channel.receive().unwrap(), Received::Message(m, _) if m.is_empty()));
        drop(a);
        assert!(matches!(channel.receive().unwrap(), Received::Closed));
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        socket::send(&a, b"one", &[]).unwrap();
        socket::send(&a, b"two", &[file.as_fd()]).unwrap();
        let mut channel = Channel::new(b).unwrap();
        assert!(matches!(channel.receive().unwrap(), Received::Message(_, fds) if fds.is_empty()));
        assert!(matches!(channel.receive().unwrap(), Received::Message(_, fds) if fds.len() == 1));
    }

    #[test]
    fn a_peer_that_does_not_read_is_bounded() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(b).unwrap();
        let message = vec![b'x'; MESSAGE_LIMIT];
        let queued = (0..20).take_while(|_| channel.queue(&message).is_ok() && channel.flush().is_ok()).count();
        assert!((3..20).contains(&queued), "{queued}");
        assert!(channel.is_pending());
        drop(a);
        assert!(channel.flush().is_err());
    }

    #[test]
    fn rubbish_is_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(b"GET / HTTP/1.1\r\n").unwrap();
        assert!(Channel::new(b).unwrap().receive().is_err());
    }
}
