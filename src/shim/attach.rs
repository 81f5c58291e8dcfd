//! Attachers: each hears what the container writes from its attach on, and may write to its stdin.
//!
//! What an attacher cannot take at once waits here: at most one piece for each of its streams, for until it is gone nothing more
//! is read from the container, which then waits as it would for a slow terminal. So no byte is lost or out of order, and memory is
//! flat. An attacher that takes nothing at all for `PATIENCE` is let go with a word: it must not hold the container for ever.
//! Of a container that ends everything is read at once, so that its end is not late; that much has to fit into `REST`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::io::Errno;

use super::protocol::{Event, ExitRecord, Fault, Phase};
use super::server::{Ending, Ready, Shim};
use crate::error::{Code, Error, Result};
use crate::sys::process;

/// Most attachers at a time: they share the connections with those that stop the container.
const ATTACHERS: usize = 16;
/// How long an attacher may hold the container up by taking nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of an ended container's stream that wait for one attacher.
const REST: usize = 256 * 1024;
/// Bytes taken from an attacher at once.
const PIECE: usize = 8 * 1024;

/// Everybody who is attached.
#[derive(Default)]
pub struct Attachers {
    all: Vec<Attacher>,
    /// Bytes that the container's stdin did not take yet. No more is read from anybody meanwhile.
    input: Vec<u8>,
    /// The container's stdin ends once `input` is written.
    input_ends: bool,
}

/// One of them, known by its connection.
struct Attacher {
    peer: u32,
    stdin: Option<OwnedFd>,
    /// stdout (or the terminal) and stderr.
    outputs: [Option<Sink>; 2],
    /// It has told the size of its terminal.
    sized: bool,
}

/// Where one output goes.
struct Sink {
    pipe: OwnedFd,
    waiting: Vec<u8>,
    /// Since when the pipe takes nothing, while something waits.
    since: Instant,
    /// The container has closed the output: nothing comes after what waits.
    ends: bool,
}

impl Sink {
    /// Writes what waits. False once nobody reads any more, or nothing more comes.
    fn flush(&mut self) -> bool {
        let mut sent = 0;
        let open = loop {
            if sent == self.waiting.len() {
                break true;
            }
            match rustix::io::write(&self.pipe, &self.waiting[sent..]) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break true,
                Err(_) => break false,
            }
        };
        if sent > 0 {
            self.since = Instant::now();
        }
        if sent == self.waiting.len() {
            // An idle attacher costs no memory.
            self.waiting = Vec::new();
        } else {
            self.waiting.drain(..sent);
        }
        open && !(self.ends && self.waiting.is_empty())
    }

    /// Takes a piece, behind what waits already. False once nobody reads any more.
    fn take(&mut self, mut piece: &[u8]) -> bool {
        while self.waiting.is_empty() && !piece.is_empty() {
            match rustix::io::write(&self.pipe, piece) {
                Ok(n) => piece = &piece[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.since = Instant::now();
                    break;
                }
                Err(_) => return false,
            }
        }
        self.waiting.extend_from_slice(piece);
        true
    }
}

impl Attachers {
    /// Whether output `index` of the container has to wait for somebody.
    pub fn are_full(&self, index: usize) -> bool {
        self.all.iter().filter_map(|a| a.outputs[index].as_ref()).any(|s| !s.waiting.is_empty())
    }

    /// Passes a piece of output `index` on. Whether more may come.
    pub fn take(&mut self, index: usize, piece: &[u8]) -> bool {
        let mut room = true;
        for attacher in &mut self.all {
            if let Some(sink) = &mut attacher.outputs[index] {
                if !sink.take(piece) {
                    attacher.outputs[index] = None;
                } else {
                    room &= sink.waiting.is_empty();
                }
            }
        }
        room
    }

    /// Output `index` has ended.
    pub fn end(&mut self, index: usize) {
        for output in self.all.iter_mut().map(|a| &mut a.outputs[index]) {
            match output {
                Some(sink) if !sink.waiting.is_empty() => sink.ends = true,
                _ => *output = None,
            }
        }
    }

    /// What to poll. `input`: where what they write goes.
    pub fn interest<'a>(&'a self, input: Option<BorrowedFd<'a>>, set: &mut Vec<(BorrowedFd<'a>, PollFlags, Ready)>) {
        for attacher in &self.all {
            for (index, sink) in attacher.outputs.iter().enumerate() {
                if let Some(sink) = sink.as_ref().filter(|s| !s.waiting.is_empty()) {
                    set.push((sink.pipe.as_fd(), PollFlags::POLLOUT, Ready::Sink(attacher.peer, index)));
                }
            }
            if self.input.is_empty() {
                set.extend(attacher.stdin.as_ref().map(|s| (s.as_fd(), PollFlags::POLLIN, Ready::Typed(attacher.peer))));
            }
        }
        if !self.input.is_empty() {
            set.extend(input.map(|i| (i, PollFlags::POLLOUT, Ready::Input)));
        }
    }

    fn find(&mut self, peer: u32) -> Option<&mut Attacher> {
        self.all.iter_mut().find(|a| a.peer == peer)
    }

    pub fn has(&self, peer: u32) -> bool {
        self.all.iter().any(|a| a.peer == peer)
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Writes what waits for an attacher.
    pub fn flush(&mut self, peer: u32, index: usize) {
        if let Some(output) = self.find(peer).map(|a| &mut a.outputs[index]) {
            if output.as_mut().is_some_and(|sink| !sink.flush()) {
                *output = None;
            }
        }
    }

    /// When patience with somebody ends.
    fn deadline(&self) -> Option<Instant> {
        let sinks = self.all.iter().flat_map(|a| a.outputs.iter().flatten());
        sinks.filter(|s| !s.waiting.is_empty()).map(|s| s.since + PATIENCE).min()
    }

    /// Those that are to be let go.
    fn stuck(&self, now: Instant) -> Vec<u32> {
        let stuck = |s: &Sink| !s.waiting.is_empty() && (now >= s.since + PATIENCE || s.waiting.len() > REST);
        self.all.iter().filter(|a| a.outputs.iter().flatten().any(stuck)).map(|a| a.peer).collect()
    }

    /// Those that have taken everything.
    fn done(&self) -> Vec<u32> {
        let done = |a: &&Attacher| a.outputs.iter().flatten().all(|s| s.waiting.is_empty());
        self.all.iter().filter(done).map(|a| a.peer).collect()
    }
}

impl Shim {
    /// Attaches the connection; the descriptors are for the streams that are wanted, in order.
    pub fn attach(&mut self, peer: u32, wanted: [bool; 3], fds: Vec<OwnedFd>) -> Result<()> {
        if self.phase != Phase::Running {
            return Err(Error::precondition("attach: the container is not running"));
        }
        if self.attachers.all.len() >= ATTACHERS {
            return Err(Error::new(Code::ResourceExhausted, format!("attach: {ATTACHERS} are attached")));
        }
        let count = wanted.iter().filter(|w| **w).count();
        if fds.len() != count {
            return Err(Error::invalid(format!("attach: {} descriptors instead of {count}", fds.len())));
        }
        fds.iter().try_for_each(process::set_nonblocking)?;
        let mut fds = fds.into_iter();
        let [stdin, stdout, stderr] = wanted.map(|w| w.then(|| fds.next()).flatten());
        // Where nobody may write, the attacher finds its stdin closed.
        let stdin = stdin.filter(|_| self.stdio.input().is_some() && !self.attachers.input_ends);
        let open = |index: usize| self.stdio.open_outputs().any(|(i, _)| i == index);
        let outputs = [stdout.filter(|_| open(0)), stderr.filter(|_| open(1))];
        let outputs = outputs.map(|o| o.map(|pipe| Sink { pipe, waiting: Vec::new(), since: Instant::now(), ends: false }));
        self.attachers.all.push(Attacher { peer, stdin, outputs, sized: false });
        self.answer(peer, &Event::Attached, false);
        Ok(())
    }

    /// Something of the attachers is ready.
    pub fn attacher_ready(&mut self, ready: &Ready) {
        match ready {
            Ready::Sink(peer, index) => self.attachers.flush(*peer, *index),
            Ready::Typed(peer) => self.typed(*peer),
            Ready::Input => self.write_input(),
            _ => {}
        }
    }

    /// Takes what an attacher has written.
    fn typed(&mut self, peer: u32) {
        let Some(attacher) = self.attachers.find(peer) else { return };
        let Some(stdin) = &attacher.stdin else { return };
        let mut piece = [0; PIECE];
        match rustix::io::read(stdin, &mut piece) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(n) if n > 0 => {
                self.attachers.input.extend_from_slice(&piece[..n]);
                self.write_input();
            }
            Ok(_) | Err(_) => {
                attacher.stdin = None;
                self.writer_left();
            }
        }
    }

    /// One that could write has gone, or writes no more. For a terminal that is nothing: whoever meant its end has typed the
    /// end-of-file character, and a connection that broke must not end a shell.
    fn writer_left(&mut self) {
        if self.config.stdin_once && !self.config.tty {
            self.attachers.input_ends = true;
            self.write_input();
        }
    }

    /// Writes what the container's stdin takes, and ends it if that is due.
    fn write_input(&mut self) {
        let attachers = &mut self.attachers;
        let mut sent = 0;
        while sent < attachers.input.len() {
            match self.stdio.input().map(|i| rustix::io::write(i, &attachers.input[sent..])) {
                Some(Ok(n)) => sent += n,
                Some(Err(Errno::INTR)) => {}
                Some(Err(Errno::AGAIN)) => break,
                // Nobody will read it: neither this nor anything later.
                Some(Err(_)) | None => {
                    self.stdio.end_input();
                    attachers.all.iter_mut().for_each(|a| a.stdin = None);
                    sent = attachers.input.len();
                }
            }
        }
        attachers.input.drain(..sent);
        if attachers.input.is_empty() {
            attachers.input = Vec::new();
            if std::mem::take(&mut attachers.input_ends) {
                self.stdio.end_input();
                if self.stdio.input().is_none() {
                    self.attachers.all.iter_mut().for_each(|a| a.stdin = None);
                }
            }
        }
    }

    /// Sets the size of the container's terminal.
    pub fn resize(&mut self, peer: u32, width: u16, height: u16) {
        let Some(terminal) = self.stdio.terminal() else { return };
        let Some(attacher) = self.attachers.find(peer) else { return };
        let mut size = rustix::termios::Winsize { ws_col: width, ws_row: height, ws_xpixel: 0, ws_ypixel: 0 };
        // The first word of a new attacher: have the programs draw their screen for it, which they do for a change only.
        let first = !std::mem::replace(&mut attacher.sized, true);
        let same = |old: rustix::termios::Winsize| (old.ws_col, old.ws_row) == (width, height);
        if first && rustix::termios::tcgetwinsize(terminal).is_ok_and(same) {
            size.ws_row = size.ws_row.wrapping_add(1);
            let _ = rustix::termios::tcsetwinsize(terminal, size);
            size.ws_row = height;
        }
        let _ = rustix::termios::tcsetwinsize(terminal, size);
    }

    /// The connection of an attacher has gone.
    pub fn detach(&mut self, peer: u32) {
        let attachers = &mut self.attachers;
        let Some(index) = attachers.all.iter().position(|a| a.peer == peer) else { return };
        let attacher = attachers.all.swap_remove(index);
        if attacher.stdin.is_some() {
            self.writer_left();
        }
    }

    /// Lets attachers go that take nothing, or that have everything of a container that has ended. Gives the time to look again.
    pub fn advance_attachers(&mut self, now: Instant) -> Option<Instant> {
        for peer in self.attachers.stuck(now) {
            let text = format!("attach: let go, having taken no output for {} s", PATIENCE.as_secs());
            self.answer(peer, &Event::Error(Fault::from(&Error::deadline(text))), true);
            self.detach(peer);
        }
        if let Some(record) = self.ended.clone() {
            self.dismiss(&record);
        }
        if self.attachers.is_empty() && matches!(self.ending, Some(Ending::Delivering)) {
            self.finished = true;
        }
        self.attachers.deadline()
    }

    /// Tells those who have all output how the container ended.
    fn dismiss(&mut self, record: &ExitRecord) {
        for peer in self.attachers.done() {
            // Its pipes are closed first: when it hears of the end, the output has one too.
            self.attachers.all.retain(|a| a.peer != peer);
            self.answer(peer, &Event::Exit(record.clone()), true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn attachers(count: u32) -> (Attachers, Vec<std::fs::File>) {
        let mut attachers = Attachers::default();
        let mut readers = Vec::new();
        for peer in 0..count {
            let (read, pipe) = crate::sys::monitor::pipe().unwrap();
            process::set_nonblocking(&pipe).unwrap();
            let sink = Sink { pipe, waiting: vec![], since: Instant::now(), ends: false };
            attachers.all.push(Attacher { peer, stdin: None, outputs: [Some(sink), None], sized: false });
            readers.push(read.into());
        }
        (attachers, readers)
    }

    #[test]
    fn a_full_one_holds_the_output_and_loses_nothing() {
        let (mut a, mut readers) = attachers(2);
        let mut fed = 0u64;
        // Only the first is read.
        let mut read = Vec::new();
        while a.take(0, &fed.to_le_bytes().repeat(512)) {
            fed += 1;
            let mut piece = [0; 4096];
            readers[0].read_exact(&mut piece).unwrap();
            read.extend_from_slice(&piece);
        }
        assert!(a.are_full(0) && !a.are_full(1) && a.stuck(Instant::now()).is_empty());
        assert_eq!(a.done(), [0]);
        assert_eq!(a.stuck(Instant::now() + PATIENCE), [1]);
        let all = (fed as usize + 1) * 4096;
        let mut second = vec![0; all];
        // The output ends for everybody, once each has what waits.
        a.end(0);
        assert!(a.all[0].outputs[0].is_none() && a.are_full(0));
        readers[1].read_exact(&mut second[..60_000]).unwrap();
        a.flush(1, 0);
        assert!(a.all[1].outputs[0].is_none());
        readers[1].read_exact(&mut second[60_000..]).unwrap();
        assert_eq!(readers[1].read(&mut [0]).unwrap(), 0);
        readers[0].read_to_end(&mut read).unwrap();
        assert!(read == second, "the two differ");
    }

    #[test]
    fn one_that_does_not_read_any_more_holds_nobody() {
        let (mut a, readers) = attachers(1);
        drop(readers);
        assert!(a.take(0, &[0; 100_000]));
        assert!(a.all[0].outputs[0].is_none() && !a.are_full(0));
    }
}
