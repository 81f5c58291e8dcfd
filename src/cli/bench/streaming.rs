//! What the streams cost: an exec from its call to its exit code, and bytes through a forwarded port.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::samples::timed;
use crate::cli::client::Client;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::stream::connect::{Input, Trust};
use crate::cli::stream::session::{self, End, Io, Plan};
use crate::cli::stream::{open_exec, open_port, Refused};
use crate::error::Context;

/// Bytes at a time.
const CHUNK: usize = 64 << 10;

/// Runs `true` in a container through a stream; the time from the call to the exit code. None if the server has no
/// streams, or none that speak WebSocket.
pub fn exec_true(client: &Client, container: &str) -> Outcome<Option<Duration>> {
    let null = std::fs::File::open("/dev/null").context(|| "open /dev/null")?;
    let (outcome, time) = timed(|| {
        let command = ["true".to_owned()];
        let mut link = match open_exec(client, container, &command, false, false, &Trust::default()) {
            Ok(link) => link,
            Err(Refused::Unknown) => return Ok(None),
            Err(Refused::Failed(failure)) => return Err(failure),
        };
        let (mut stdout, mut stderr) = (std::io::sink(), std::io::sink());
        let mut io = Io { stdin: null.as_fd(), stdout: &mut stdout, stderr: &mut stderr, signals: None, size: &|| None };
        session::run(&mut link, &Plan::default(), &mut io).map(Some)
    });
    match outcome? {
        None => Ok(None),
        Some(End::Status(status)) => match session::exit_code(&status) {
            Ok(0) => Ok(Some(time)),
            Ok(code) => Err(Failure::failed(format!("exec of true in {container}: exit code {code}"))),
            Err(message) => Err(Failure::failed(format!("exec of true in {container}: {message}"))),
        },
        Some(_) => Err(Failure::failed(format!("exec of true in {container}: the connection ended before the command did"))),
    }
}

/// A server on loopback that gives `bytes` zeros to one client; its port.
fn source(bytes: usize) -> Outcome<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context(|| "listen on loopback")?;
    let port = listener.local_addr().context(|| "listen on loopback")?.port();
    crate::sys::thread::spawn("source", move || {
        let Ok((mut client, _)) = listener.accept() else { return };
        let chunk = vec![0; CHUNK];
        let mut left = bytes;
        while left > 0 && client.write_all(&chunk[..left.min(CHUNK)]).is_ok() {
            left -= left.min(CHUNK);
        }
    })?;
    Ok(port)
}

/// Bytes per second from a source on the host's loopback through a port of a sandbox that shares the host's network.
pub fn forward_rate(client: &Client, sandbox: &str, bytes: usize) -> Outcome<f64> {
    let port = source(bytes)?;
    let mut link = open_port(client, sandbox, port, &Trust::default())?;
    let (begin, mut got) = (Instant::now(), 0);
    // The port in front of the data is no data.
    while got < bytes + 2 {
        match link.receive()? {
            Input::Data(0, data) => got += data.len(),
            Input::Data(..) => {}
            Input::Closed => return Err(Failure::failed(format!("forward port: ended after {got} of {bytes} bytes"))),
            Input::Nothing => {
                let mut set = [PollFd::new(link.fd(), PollFlags::POLLIN)];
                nix::poll::poll(&mut set, PollTimeout::NONE).context(|| "poll")?;
            }
        }
    }
    Ok(bytes as f64 / begin.elapsed().as_secs_f64())
}

/// The same through one thread that reads from the source and writes to us: what there is to compare with.
pub fn copy_rate(bytes: usize) -> Outcome<f64> {
    let port = source(bytes)?;
    let listener = TcpListener::bind("127.0.0.1:0").context(|| "listen on loopback")?;
    let address = listener.local_addr().context(|| "listen on loopback")?;
    crate::sys::thread::spawn("copy", move || -> std::io::Result<()> {
        let (mut to, _) = listener.accept()?;
        let mut from = TcpStream::connect(("127.0.0.1", port))?;
        let mut chunk = vec![0; CHUNK];
        loop {
            match from.read(&mut chunk)? {
                0 => return Ok(()),
                length => to.write_all(&chunk[..length])?,
            }
        }
    })?;
    let mut stream = TcpStream::connect(address).context(|| "connect to loopback")?;
    let (begin, mut got, mut chunk) = (Instant::now(), 0, vec![0; CHUNK]);
    while got < bytes {
        match stream.read(&mut chunk).context(|| "read from loopback")? {
            0 => return Err(Failure::failed(format!("copy: ended after {got} of {bytes} bytes"))),
            length => got += length,
        }
    }
    Ok(bytes as f64 / begin.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_moves_all_bytes() {
        assert!(copy_rate(3 * CHUNK + 1).unwrap() > 0.0);
    }
}
