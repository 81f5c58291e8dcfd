//! An exec or attach session: the client's streams on one side, the process's descriptors on the other, one poll(2) over
//! all. A side that does not take its bytes makes the other wait; what waits here is bounded by the wire.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::termios::SpecialCodeIndex;

use super::request::{Protocol, Wanted};
use super::resize::{Size, Sizes};
use super::status::Verdict;
use super::wire::{Input, StreamId, Wire};
use crate::container::stream::{Control, Ended, Streams};
use crate::container::{Container, Containers};
use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;

/// What a client may take to open its streams.
const OPEN_TIME: Duration = Duration::from_secs(30);
/// What it may take to close the connection after the last byte: closing first could cut what it has not read (see `spdy`).
const LINGER: Duration = Duration::from_secs(10);
/// The same when the daemon stops.
const STOP_LINGER: Duration = Duration::from_secs(1);
/// A session on which nothing moves says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// After the exit, output that somebody else holds open is over when nothing came for so long.
const QUIET: Duration = Duration::from_millis(100);
/// The same for a terminal, whose last bytes take a way through the kernel's line discipline.
const QUIET_TERMINAL: Duration = Duration::from_secs(1);
/// The default of termios(3)'s VEOF.
const END_OF_FILE: u8 = 4;
/// Bytes of one read from the process: what a pipe holds.
const READ: usize = 64 << 10;

/// What is run.
pub(super) enum What<'a> {
    Exec(&'a [String]),
    Attach,
}

/// A session as the RPC asked for it.
pub(super) struct Remote<'a> {
    pub containers: &'a Containers,
    pub container: &'a Container,
    pub what: What<'a>,
    pub terms: Terms<'a>,
}

/// What a session needs to know to move bytes.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    pub wanted: Wanted,
    pub protocol: Protocol,
    /// Zero: never ends for that.
    pub idle: Duration,
    /// Set when the daemon stops.
    pub cancel: &'a Cancel,
}

/// Serves the client until the command ends or the client goes. CANCELLED: it went, or the daemon stops. The process, if
/// it still runs then, has lost its stdin and terminal.
pub(super) fn run(wire: Box<dyn Wire>, remote: &Remote<'_>) -> Result<()> {
    let Terms { wanted, cancel, .. } = &remote.terms;
    let mut session = Session::new(wire, remote.terms, remote.input_end());
    session.wait_for_streams()?;
    let started = match &remote.what {
        What::Exec(cmd) => remote.containers.exec_stream(remote.container, cmd, wanted, cancel),
        What::Attach => remote.containers.attach(remote.container, wanted, cancel),
    };
    let ended = started.and_then(|streams| session.pump(streams));
    let verdict = match ended {
        Ok(Over::Ended(ended)) => remote.verdict(ended),
        Ok(Over::InputGiven) => Verdict::Success,
        // Nobody is there to be told.
        Err(e) if session.is_gone => return Err(e),
        Err(_) if cancel.is_cancelled() => remote.failure(&Error::cancelled("the runtime is stopping")),
        Err(e) => remote.failure(&e),
    };
    session.farewell(&verdict)
}

/// What it means that the client writes no more to stdin. One that has hung up has said nothing of the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InputEnd {
    /// The process reads the end too.
    Close,
    /// A terminal cannot be half closed: it gets its end-of-file character.
    Type,
    /// The container keeps its stdin open for others: the session is over. Its peers end an attach then, too.
    Leave,
}

/// Why a session has nothing more to move.
#[derive(Debug, PartialEq, Eq)]
enum Over {
    Ended(Ended),
    /// The container has got all input of a client that has no more, and goes on.
    InputGiven,
}

impl Remote<'_> {
    fn input_end(&self) -> InputEnd {
        let config = &self.container.config;
        match self.what {
            What::Exec(_) if self.terms.wanted.tty => InputEnd::Type,
            What::Attach if config.tty && config.stdin_once => InputEnd::Type,
            What::Attach if config.stdin && !config.stdin_once && !config.tty => InputEnd::Leave,
            What::Exec(_) | What::Attach => InputEnd::Close,
        }
    }

    fn verdict(&self, ended: Ended) -> Verdict {
        match (ended, &self.what) {
            (Ended::Exited(code), What::Exec(cmd)) if code != 0 => Verdict::ExitCode { cmd: cmd.join(" "), code },
            // A container that has ended ends exec as if by signal 9, and an attach well.
            (Ended::ContainerEnded(code), What::Exec(cmd)) => {
                Verdict::ExitCode { cmd: cmd.join(" "), code: code.filter(|c| *c != 0).unwrap_or(137) }
            }
            (Ended::Detached, What::Attach) => {
                Verdict::Failure("error attaching to container: the output was not taken for too long".into())
            }
            _ => Verdict::Success,
        }
    }

    fn failure(&self, e: &Error) -> Verdict {
        match self.what {
            What::Exec(_) => Verdict::Failure(format!("error executing command in container: {e}")),
            What::Attach => Verdict::Failure(format!("error attaching to container: {e}")),
        }
    }
}

/// One output of the process.
struct Output {
    file: File,
    /// None: the client does not want it any more.
    stream: Option<StreamId>,
}

struct Session<'a> {
    wire: Box<dyn Wire>,
    terms: Terms<'a>,
    error: Option<StreamId>,
    stdin: Option<StreamId>,
    stdout: Option<StreamId>,
    stderr: Option<StreamId>,
    resize: Option<StreamId>,
    /// For the process, oldest first; `written` bytes of the first piece have gone.
    input: VecDeque<Vec<u8>>,
    written: usize,
    input_finished: bool,
    input_end: InputEnd,
    /// What was written ends within a line.
    in_line: bool,
    sizes: Sizes,
    size: Option<Size>,
    /// When the last byte moved, and when the client last heard of us.
    moved: Instant,
    spoken: Instant,
    is_gone: bool,
}

impl<'a> Session<'a> {
    fn new(wire: Box<dyn Wire>, terms: Terms<'a>, input_end: InputEnd) -> Session<'a> {
        let now = Instant::now();
        Session {
            wire,
            terms,
            error: None,
            stdin: None,
            stdout: None,
            stderr: None,
            resize: None,
            input: VecDeque::new(),
            written: 0,
            input_finished: false,
            input_end,
            in_line: false,
            sizes: Sizes::default(),
            size: None,
            moved: now,
            spoken: now,
            is_gone: false,
        }
    }

    /// Until the client has opened every stream that was asked for.
    fn wait_for_streams(&mut self) -> Result<()> {
        let cancel = self.terms.cancel.within(OPEN_TIME);
        let wanted = self.terms.wanted;
        let wants_resize = wanted.tty && self.terms.protocol.has_resize();
        loop {
            self.take_inputs()?;
            let there = |wants: bool, stream: Option<StreamId>| !wants || stream.is_some();
            let outputs = there(wanted.stdout, self.stdout) && there(wanted.stderr, self.stderr);
            if self.error.is_some() && there(wanted.stdin, self.stdin) && outputs && there(wants_resize, self.resize) {
                return Ok(());
            }
            let waited = cancel.poll(&[(self.wire.socket(), self.wire.interest())], None);
            match waited {
                Ok(ready) => self.wire_ready(ready[0])?,
                Err(e) => {
                    let _ = self.wire.goodbye();
                    let slow = e.code() == Code::DeadlineExceeded;
                    return Err(if slow { e.with_code(Code::Cancelled) } else { e });
                }
            }
        }
    }

    fn wire_ready(&mut self, flags: PollFlags) -> Result<()> {
        if flags.is_empty() {
            return Ok(());
        }
        let result = self.wire.ready(flags);
        self.note(result)
    }

    /// An error of the wire is the end of the client.
    fn note<T>(&mut self, result: Result<T>) -> Result<T> {
        self.is_gone |= result.is_err();
        result
    }

    /// Everything the client has done.
    fn take_inputs(&mut self) -> Result<()> {
        while let Some(input) = self.wire.next() {
            let result = self.take(input);
            self.note(result)?;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Opened { stream, headers } => self.open(stream, &headers)?,
            Input::Data { stream, bytes } if Some(stream) == self.stdin && !self.input_finished => {
                self.moved = Instant::now();
                self.input.push_back(bytes);
            }
            Input::Data { stream, bytes } => {
                if Some(stream) == self.resize {
                    self.size = self.sizes.push(&bytes).or(self.size);
                }
                self.wire.consumed(stream, bytes.len())?;
            }
            Input::Finished { stream } => self.input_finished |= Some(stream) == self.stdin,
            Input::Reset { stream } => {
                if Some(stream) == self.stdin {
                    self.input_finished = true;
                    let unwritten = self.input.iter().map(Vec::len).sum::<usize>() - self.written;
                    self.input.clear();
                    self.written = 0;
                    self.wire.consumed(stream, unwritten)?;
                }
                for slot in [&mut self.error, &mut self.stdin, &mut self.stdout, &mut self.stderr, &mut self.resize] {
                    if *slot == Some(stream) {
                        *slot = None;
                    }
                }
                if self.error.is_none() && self.stdin.is_none() && self.stdout.is_none() && self.stderr.is_none() {
                    return Err(Error::cancelled("the client has reset its streams"));
                }
            }
        }
        Ok(())
    }

    /// A new stream: one of each kind that was asked for.
    fn open(&mut self, stream: StreamId, headers: &[(String, String)]) -> Result<()> {
        let wanted = self.terms.wanted;
        let kind = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("streamtype")).map(|(_, value)| value.as_str());
        let slot = match kind {
            Some("error") => Some(&mut self.error),
            Some("stdin") if wanted.stdin => Some(&mut self.stdin),
            Some("stdout") if wanted.stdout => Some(&mut self.stdout),
            Some("stderr") if wanted.stderr => Some(&mut self.stderr),
            Some("resize") if wanted.tty => Some(&mut self.resize),
            _ => None,
        };
        match slot {
            Some(slot) if slot.is_none() => {
                *slot = Some(stream);
                self.wire.accept(stream)
            }
            _ => self.wire.reset(stream),
        }
    }

    /// Moves bytes until the process has ended and its output was sent, or nothing is left to do for an attacher.
    fn pump(&mut self, streams: Streams) -> Result<Over> {
        let Streams { stdin, stdout, stderr, mut control } = streams;
        let mut stdin = stdin.map(File::from);
        let output = |fd: Option<OwnedFd>, stream| fd.map(|fd| Output { file: File::from(fd), stream });
        let mut outputs = [output(stdout, self.stdout), output(stderr, self.stderr)];
        let quiet = if self.terms.wanted.tty { QUIET_TERMINAL } else { QUIET };
        let mut buffer = vec![0; READ];
        let mut ended: Option<Ended> = None;
        let mut given: Option<Instant> = None;
        let mut heard = Instant::now();
        self.moved = heard;
        loop {
            self.take_inputs()?;
            // Written first, asked again after: what was used may let the wire read on.
            while self.write_input(&mut stdin)? {
                self.take_inputs()?;
            }
            self.apply_size(&control);
            for (output, stream) in outputs.iter_mut().zip([self.stdout, self.stderr]) {
                if let Some(output) = output {
                    output.stream = output.stream.and(stream);
                }
            }
            if let Some(ended) = ended.filter(|_| outputs.iter().all(Option::is_none)) {
                return Ok(Over::Ended(ended));
            }
            if given.is_none() && self.is_given(stdin.as_ref()) {
                given = Some(Instant::now());
            }
            let limit = if ended.is_some() { Some(quiet) } else { given.map(|then| QUIET.saturating_sub(then.elapsed())) };
            let ready = self.wait((ended.is_none()).then_some(&control), stdin.as_ref(), &outputs, limit)?;
            self.wire_ready(ready.wire)?;
            let mut silent = true;
            for (output, polled) in outputs.iter_mut().zip(ready.outputs) {
                let Some(open) = output else { continue };
                let room = self.room(open).min(READ);
                match polled {
                    Some(flags) if flags.is_empty() => {}
                    Some(_) if room > 0 => {
                        silent = false;
                        if self.read_output(output, &mut buffer[..room])? {
                            heard = Instant::now();
                        }
                    }
                    // It waits for the client: nobody has asked whether it has something.
                    _ => {
                        silent = false;
                        heard = Instant::now();
                    }
                }
            }
            // Not by the clock alone: this thread may have been without a processor for so long.
            if let Some(ended) = ended.filter(|_| silent && heard.elapsed() >= quiet) {
                return Ok(Over::Ended(ended));
            }
            // What there was of output has gone along; of a container that always talks, what it said until then.
            if ended.is_none() && given.is_some_and(|then| then.elapsed() >= QUIET) {
                return Ok(Over::InputGiven);
            }
            if ended.is_none() && !ready.control.is_empty() {
                ended = control.outcome()?;
                if ended.is_some() {
                    heard = Instant::now();
                    stdin = None;
                }
            }
        }
    }

    fn room(&self, output: &Output) -> usize {
        output.stream.map_or(READ, |stream| self.wire.room(stream))
    }

    /// Whether a session that ends with the client's input is over: the shim has taken the last of it.
    fn is_given(&self, stdin: Option<&File>) -> bool {
        let all = self.input_end == InputEnd::Leave && self.input_finished && self.input.is_empty();
        all && stdin.is_none_or(|pipe| !matches!(rustix::io::ioctl_fionread(pipe), Ok(n) if n > 0) || has_no_reader(pipe))
    }

    /// Waits until something can move, for `within` at most.
    fn wait(
        &mut self,
        control: Option<&Control>,
        stdin: Option<&File>,
        outputs: &[Option<Output>; 2],
        within: Option<Duration>,
    ) -> Result<Ready> {
        let interest = self.wire.interest();
        let mut fds = vec![(self.wire.socket(), interest)];
        let mut place = [None; 4];
        if let Some(control) = control {
            place[0] = Some(fds.len());
            fds.push((control.as_fd(), PollFlags::POLLIN));
        }
        let last = self.input_finished && self.input_end == InputEnd::Type;
        if let Some(stdin) = stdin.filter(|_| !self.input.is_empty() || last) {
            place[1] = Some(fds.len());
            fds.push((stdin.as_fd(), PollFlags::POLLOUT));
        }
        for (n, output) in outputs.iter().enumerate() {
            // Not even for POLLHUP while the client has no room: it would not end.
            if let Some(output) = output.as_ref().filter(|o| self.room(o) > 0) {
                place[2 + n] = Some(fds.len());
                fds.push((output.file.as_fd(), PollFlags::POLLIN));
            }
        }
        let paused = !interest.contains(PollFlags::POLLIN);
        let mut limit = KEEP_ALIVE.saturating_sub(self.spoken.max(self.moved).elapsed());
        if !self.terms.idle.is_zero() {
            limit = limit.min(self.terms.idle.saturating_sub(self.moved.elapsed()));
        }
        if paused {
            limit = limit.min(Duration::from_secs(1));
        }
        limit = limit.min(within.unwrap_or(limit));
        if self.input_finished && self.input_end == InputEnd::Leave {
            // No poll tells that the shim has emptied the pipe.
            limit = limit.min(QUIET);
        }
        let flags = self.terms.cancel.poll(&fds, Some(limit))?;
        let of = |n: usize| place[n].map(|at: usize| flags[at]);
        let ready = Ready { wire: flags[0], control: of(0).unwrap_or(PollFlags::empty()), outputs: [of(2), of(3)] };
        self.tick(paused)?;
        Ok(ready)
    }

    /// What time brings: the end of an idle session, a sign of life, a client that went while it had to wait.
    fn tick(&mut self, paused: bool) -> Result<()> {
        let idle = self.terms.idle;
        if !idle.is_zero() && self.moved.elapsed() >= idle {
            return Err(Error::deadline(format!("nothing moved for {} s", idle.as_secs())));
        }
        if self.spoken.max(self.moved).elapsed() >= KEEP_ALIVE {
            self.spoken = Instant::now();
            let result = self.wire.keep_alive();
            self.note(result)?;
        }
        if paused && has_hung_up(&*self.wire) {
            self.is_gone = true;
            return Err(Error::cancelled("the client has closed the connection"));
        }
        Ok(())
    }

    /// Writes what the process takes; true when something was handed back to the client.
    fn write_input(&mut self, stdin: &mut Option<File>) -> Result<bool> {
        let Some(stream) = self.stdin else {
            // Its client has reset it.
            if self.input_finished {
                self.end_input(stdin);
            }
            return Ok(false);
        };
        let mut used = 0;
        while let Some(piece) = self.input.front() {
            let Some(file) = stdin.as_mut() else {
                // Nobody reads it any more.
                used += piece.len() - self.written;
                self.pop_input();
                continue;
            };
            match file.write(&piece[self.written..]) {
                Ok(n) => {
                    used += n;
                    self.in_line = piece[self.written..][..n].last().is_some_and(|last| !matches!(last, b'\n' | b'\r'));
                    self.written += n;
                    if self.written == piece.len() {
                        self.pop_input();
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => *stdin = None,
            }
        }
        if self.input.is_empty() && self.input_finished {
            self.end_input(stdin);
        }
        if used > 0 {
            self.moved = Instant::now();
            let result = self.wire.consumed(stream, used);
            self.note(result)?;
        }
        Ok(used > 0)
    }

    /// Everything is written that the client ever writes.
    fn end_input(&mut self, stdin: &mut Option<File>) {
        match (self.input_end, stdin.as_mut()) {
            (InputEnd::Leave, _) | (_, None) => return,
            (InputEnd::Close, _) => {}
            (InputEnd::Type, Some(terminal)) => {
                // An attacher's is a pipe to the shim, which has the terminal.
                let key = rustix::termios::tcgetattr(&*terminal).map_or(END_OF_FILE, |t| t.special_codes[SpecialCodeIndex::VEOF]);
                // The first one ends the line that was begun, the next one is the end.
                loop {
                    match terminal.write(&[key]) {
                        Ok(_) if std::mem::take(&mut self.in_line) => {}
                        Err(e) if e.kind() == ErrorKind::Interrupted => {}
                        Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                        Ok(_) | Err(_) => break,
                    }
                }
            }
        }
        *stdin = None;
    }

    fn pop_input(&mut self) {
        self.input.pop_front();
        self.written = 0;
    }

    /// Reads once and sends it; true when there was something. At the end of the output, `output` becomes None.
    fn read_output(&mut self, output: &mut Option<Output>, buffer: &mut [u8]) -> Result<bool> {
        let Some(o) = output else { return Ok(false) };
        match o.file.read(buffer) {
            Ok(n) if n > 0 => {
                self.moved = Instant::now();
                if let Some(stream) = o.stream {
                    let result = self.wire.send(stream, &buffer[..n]);
                    self.note(result)?;
                }
                Ok(true)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            // EIO: a terminal that nobody has open any more.
            Ok(_) | Err(_) => {
                *output = None;
                Ok(false)
            }
        }
    }

    fn apply_size(&mut self, control: &Control) {
        if let Some(size) = self.size.take() {
            self.moved = Instant::now();
            if let Err(e) = control.resize(size.width, size.height) {
                log::debug!("streaming: {e}");
            }
        }
    }

    /// The last word, and the end of all streams; then the client closes the connection.
    fn farewell(mut self, verdict: &Verdict) -> Result<()> {
        for stream in [self.stdout, self.stderr].into_iter().flatten() {
            self.wire.finish(stream)?;
        }
        let mut words = verdict.bytes(self.terms.protocol);
        let stopping = self.terms.cancel.is_cancelled();
        let mut end = Instant::now() + if stopping { STOP_LINGER } else { LINGER };
        let mut said = false;
        let patience = Cancel::never();
        loop {
            if !said {
                let room = self.error.map_or(words.len(), |stream| self.wire.room(stream)).min(words.len());
                if let Some(stream) = self.error.filter(|_| room > 0) {
                    self.wire.send(stream, &words[..room])?;
                }
                words.drain(..room);
                if words.is_empty() {
                    said = true;
                    for stream in [self.error, self.stdin, self.resize].into_iter().flatten() {
                        self.wire.finish(stream)?;
                    }
                    self.wire.goodbye()?;
                }
            }
            while let Some(input) = self.wire.next() {
                if let Input::Data { stream, bytes } = input {
                    self.wire.consumed(stream, bytes.len())?;
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let pending = !self.wire.is_flushed();
            let flags = patience.poll(&[(self.wire.socket(), self.wire.interest())], Some(left))?[0];
            if !flags.is_empty() {
                match self.wire.ready(flags) {
                    Err(e) if said && e.code() == Code::Cancelled => return Ok(()),
                    other => other?,
                }
            }
            // A slow client that still takes something has its time again.
            if pending && flags.contains(PollFlags::POLLOUT) && !stopping {
                end = Instant::now() + LINGER;
            }
        }
    }
}

/// What is ready, in the terms of a session.
struct Ready {
    wire: PollFlags,
    control: PollFlags,
    /// None: it is closed, or was not asked.
    outputs: [Option<PollFlags>; 2],
}

/// Whether what is in a pipe is lost.
fn has_no_reader(pipe: &File) -> bool {
    use rustix::event::{poll, PollFd, PollFlags, Timespec};
    let mut set = [PollFd::new(pipe, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut set, Some(&now)).is_ok_and(|n| n > 0)
}

/// Whether the peer has closed, also behind bytes that are not read yet.
fn has_hung_up(wire: &dyn Wire) -> bool {
    use rustix::event::{poll, PollFd, PollFlags, Timespec};
    let socket = wire.socket();
    let mut set = [PollFd::new(&socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut set, Some(&now)).is_ok_and(|n| n > 0)
}

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
