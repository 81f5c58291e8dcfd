//! TCP sockets in a network namespace, connected without blocking.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use nix::errno::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::namespace;
use crate::error::{Context, Result};

/// A non-blocking socket for `address` that belongs to the pinned network namespace (None: ours). A socket stays in the
/// namespace it was made in, so only this needs a thread there.
pub fn socket(netns: Option<&Path>, address: SocketAddr) -> Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let make = move || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None).context(|| "create a TCP socket")?;
        Ok(TcpStream::from(fd))
    };
    let socket = match netns {
        None => make()?,
        Some(pin) => namespace::in_netns(pin, make)?,
    };
    socket.set_nodelay(true).context(|| "set TCP_NODELAY")?;
    Ok(socket)
}

/// Begins to connect, and asks again how it went once the socket is writable: false while it goes on.
pub fn connect(socket: &TcpStream, address: SocketAddr) -> std::io::Result<bool> {
    match rustix::net::connect(socket, &address) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::ALREADY | rustix::io::Errno::INTR) => Ok(false),
        // Asked again after success.
        Err(rustix::io::Errno::ISCONN) => Ok(true),
        Err(e) => Err(Errno::from_raw(e.raw_os_error()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn wait(socket: &TcpStream, address: SocketAddr) -> std::io::Result<()> {
        use std::os::fd::AsFd;
        while !connect(socket, address)? {
            let mut fds = [nix::poll::PollFd::new(socket.as_fd(), nix::poll::PollFlags::POLLOUT)];
            nix::poll::poll(&mut fds, 5000u16).unwrap();
        }
        Ok(())
    }

    #[test]
    fn connects_and_is_refused() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(host).unwrap();
            let address = listener.local_addr().unwrap();
            let mut client = socket(None, address).unwrap();
            wait(&client, address).unwrap();
            client.write_all(b"hello").unwrap();
            drop(client);
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
            drop(listener);
            let error = wait(&socket(None, address).unwrap(), address).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{host}");
        }
    }
}
