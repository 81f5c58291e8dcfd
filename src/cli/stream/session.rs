//! Exec and attach: one thread around one poll(2) moves bytes between our streams and the channels. What has not left
//! keeps stdin unread, and a reader of our output that is slow keeps the link unread: nothing piles up here.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use serde_json::{json, Value};

use super::connect::{Input, Link};
use super::keys::Keys;
use super::terminal::Size;
use crate::cli::failure::{Failure, Outcome};
use crate::cli::{interrupt, object};
use crate::error::Context;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Bytes of stdin per message.
const CHUNK: usize = 32 << 10;
/// Longest status that is read, bytes.
const STATUS_LIMIT: usize = 64 << 10;

/// Messages between two looks at everything else.
const BURST: usize = 32;

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub stdin: bool,
    pub tty: bool,
    /// Keys that end it with `tty`; none: nothing does.
    pub keys: Vec<u8>,
}

/// Our side.
pub struct Io<'a> {
    pub stdin: BorrowedFd<'a>,
    pub stdout: &'a mut dyn Write,
    pub stderr: &'a mut dyn Write,
    /// INT, TERM and their like end it; WINCH tells of a new size.
    pub signals: Option<&'a SignalFd>,
    /// The size of our terminal.
    pub size: &'a dyn Fn() -> Option<Size>,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// With what the server said on the error channel.
    Status(Vec<u8>),
    /// The connection ended without a word.
    Closed,
    /// By the detach keys.
    Detached,
}

/// Moves bytes until the server ends it, the user detaches, or a signal comes (a failure with its exit code).
pub fn run(link: &mut Link, plan: &Plan, io: &mut Io<'_>) -> Outcome<End> {
    let mut status = Vec::new();
    let mut keys = Keys::new(if plan.tty { plan.keys.clone() } else { Vec::new() });
    let mut typing = plan.stdin;
    if plan.tty {
        resize(link, io)?;
    }
    loop {
        // What has come, before anything is waited for: TLS may hold what no poll shows. Not without an end: signals and
        // keys must be heard through any flood.
        let mut more = true;
        for _ in 0..BURST {
            match link.receive()? {
                Input::Nothing => {
                    more = false;
                    break;
                }
                Input::Closed if status.is_empty() => return Ok(End::Closed),
                Input::Closed => return Ok(End::Status(status)),
                Input::Data(STDOUT, bytes) => io.stdout.write_all(&bytes).and_then(|()| io.stdout.flush()).map_err(Failure::output)?,
                Input::Data(STDERR, bytes) => io.stderr.write_all(&bytes).and_then(|()| io.stderr.flush()).map_err(Failure::output)?,
                Input::Data(ERROR, bytes) if status.len() + bytes.len() <= STATUS_LIMIT => status.extend_from_slice(&bytes),
                // Servers in Go send an empty message on a channel that only we write to.
                Input::Data(..) => {}
            }
        }
        let ready = wait(link, typing && link.has_room(), more, io)?;
        if !link.has_room() {
            link.flush()?;
        }
        for signal in ready.signals {
            match signal {
                Signal::SIGWINCH if plan.tty => resize(link, io)?,
                Signal::SIGWINCH => {}
                signal => {
                    link.close();
                    return Err(Failure::Silent(interrupt::exit_code(signal)));
                }
            }
        }
        if ready.stdin {
            let mut buffer = [0; CHUNK];
            let length = match nix::unistd::read(io.stdin, &mut buffer) {
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                // A terminal that was hung up, or a stdin that was never open.
                Err(Errno::EIO | Errno::EBADF) => 0,
                result => result.context(|| "read stdin")?,
            };
            let mut out = Vec::with_capacity(length);
            let detached = keys.feed(&buffer[..length], &mut out);
            if length == 0 {
                out.extend_from_slice(keys.held());
            }
            if !out.is_empty() {
                link.send(STDIN, &out)?;
            }
            if detached {
                link.close();
                return Ok(End::Detached);
            }
            if length == 0 {
                typing = false;
                link.finish(STDIN)?;
            }
        }
    }
}

struct Ready {
    stdin: bool,
    signals: Vec<Signal>,
}

fn wait(link: &Link, stdin: bool, at_once: bool, io: &Io<'_>) -> Outcome<Ready> {
    let mut set = vec![PollFd::new(link.fd(), PollFlags::POLLIN | link.unsent())];
    if let Some(signals) = io.signals {
        set.push(PollFd::new(signals.as_fd(), PollFlags::POLLIN));
    }
    if stdin {
        set.push(PollFd::new(io.stdin, PollFlags::POLLIN));
    }
    match nix::poll::poll(&mut set, if at_once { PollTimeout::ZERO } else { PollTimeout::NONE }) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context(|| "poll").map_err(Failure::from),
    }
    let is_ready = |entry: &PollFd<'_>| entry.revents().is_some_and(|flags| !flags.is_empty());
    let mut ready = Ready { stdin: stdin && set.last().is_some_and(is_ready), signals: Vec::new() };
    if let (Some(signals), true) = (io.signals, set.get(1).is_some_and(is_ready)) {
        while let Ok(Some(information)) = signals.read_signal() {
            ready.signals.extend(Signal::try_from(information.ssi_signo as i32));
        }
    }
    Ok(ready)
}

fn resize(link: &mut Link, io: &Io<'_>) -> Outcome<()> {
    match (io.size)() {
        Some(size) => link.send(RESIZE, json!({ "Width": size.width, "Height": size.height }).to_string().as_bytes()),
        None => Ok(()),
    }
}

/// The exit code in a Status, or what else it says.
pub fn exit_code(status: &[u8]) -> Result<u8, String> {
    let text = String::from_utf8_lossy(status);
    let Ok(Value::Object(parsed)) = serde_json::from_str::<Value>(&text) else { return Err(text.into_owned()) };
    if parsed.get("status").is_some_and(|status| status == "Success") {
        return Ok(0);
    }
    if parsed.get("reason").is_some_and(|reason| reason == "NonZeroExitCode") {
        let causes = parsed.get("details").and_then(|details| details.get("causes")).and_then(Value::as_array);
        let cause = causes.and_then(|causes| causes.iter().find(|cause| cause["reason"] == "ExitCode"));
        if let Some(code) = cause.and_then(|cause| cause["message"].as_str()?.parse().ok()) {
            return Ok(object::exit_code(code));
        }
    }
    let message = parsed.get("message").and_then(Value::as_str).filter(|message| !message.is_empty());
    Err(message.map_or_else(|| text.clone().into_owned(), str::to_owned))
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
