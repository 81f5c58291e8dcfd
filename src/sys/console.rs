//! The daemon's end of a console socket: where an OCI runtime sends the terminal that it has made.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::pty::OpenptFlags;

use super::{file, process, socket};
use crate::error::{Context, Result};

/// The other end of a terminal, wherever its devpts is mounted (TIOCGPTPEER, Linux 4.13); it does not become this process's own.
pub fn peer(master: impl AsFd) -> Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    rustix::pty::ioctl_tiocgptpeer(master, flags).context(|| "open the other end of the terminal")
}

/// A socket at a path, for one terminal. The path goes with this value.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    listener: UnixListener,
    /// The OCI runtime connects long before it sends.
    runtime: Option<UnixStream>,
}

impl Console {
    pub fn listen(path: PathBuf) -> Result<Console> {
        let listener = socket::listen(&path, 0o600)?;
        listener.set_nonblocking(true).context(|| "set O_NONBLOCK")?;
        Ok(Console { path, listener, runtime: None })
    }

    /// Takes the next step: the connection, then the terminal, which does not block. None: nothing yet, or not all.
    pub fn take(&mut self) -> Result<Option<OwnedFd>> {
        if self.runtime.is_none() {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e).context(|| "accept the OCI runtime on the console socket"),
            };
            socket::check_peer(&stream)?;
            stream.set_nonblocking(true).context(|| "set O_NONBLOCK")?;
            self.runtime = Some(stream);
        }
        let Some(stream) = &self.runtime else { return Ok(None) };
        match socket::receive_descriptor(stream) {
            Ok(Some(master)) => {
                process::set_nonblocking(&master)?;
                Ok(Some(master))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                // Else its end would be ready for ever.
                self.runtime = None;
                Err(error)
            }
        }
    }
}

impl AsFd for Console {
    /// Readable when `take` has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.runtime.as_ref().map_or(self.listener.as_fd(), AsFd::as_fd)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = file::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_descriptor_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut console = Console::listen(path.clone()).unwrap();
        assert!(console.take().unwrap().is_none());
        let runtime = socket::connect(&path).unwrap();
        assert!(console.take().unwrap().is_none());
        let file = tempfile::tempfile().unwrap();
        socket::send(&runtime, b"terminal", &[file.as_fd()]).unwrap();
        assert!(console.take().unwrap().is_some());
        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn one_that_hangs_up_is_an_error_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::listen(dir.path().join("console")).unwrap();
        drop(socket::connect(&dir.path().join("console")).unwrap());
        assert!(console.take().is_err());
        assert!(console.take().unwrap().is_none());
    }
}
