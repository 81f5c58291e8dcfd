//! The bytes of a layer between the thread that brings them and the one that unpacks them: a few buffers that go round, so
//! that both work at the same time and neither runs away from the other.

use std::collections::VecDeque;
use std::io::{BufRead, Error, Read, Result};

use super::digest::{Digest, Hasher};
use crate::sys::awaited::Awaited;
use crate::sys::cancel::Cancel;
use crate::sys::lock::Rank;

/// One buffer: many small files at once, and still in a core's cache when the other side looks.
const BUFFER: usize = 128 << 10;
/// Buffers of one layer.
const COUNT: usize = 4;

struct State {
    full: VecDeque<(Vec<u8>, usize)>,
    spare: Vec<Vec<u8>>,
    /// Buffers that exist.
    made: usize,
    ended: Option<Result<()>>,
    /// Nobody reads any more.
    abandoned: bool,
}

/// The end that bytes go into.
pub struct Writer {
    ring: Awaited<State>,
    cancel: Cancel,
}

/// The end they come out of; it hashes and counts them.
pub struct Reader {
    ring: Awaited<State>,
    cancel: Cancel,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    hasher: Hasher,
    count: u64,
    limit: u64,
    over: bool,
}

/// Both ends. More than `limit` bytes are an error of the reader's.
pub fn pipe(limit: u64, cancel: &Cancel) -> (Writer, Reader) {
    let state = State { full: VecDeque::new(), spare: Vec::new(), made: 0, ended: None, abandoned: false };
    let ring = Awaited::new(Rank::Leaf, state);
    let reader = Reader {
        ring: ring.clone(),
        cancel: cancel.clone(),
        buffer: Vec::new(),
        at: 0,
        end: 0,
        hasher: Hasher::default(),
        count: 0,
        limit,
        over: false,
    };
    (Writer { ring, cancel: cancel.clone() }, reader)
}

impl Writer {
    /// Passes everything on, up to the end or the first error, which the reader gets after what came before it. Stops early
    /// when nobody reads any more or the call was cancelled.
    pub fn pass(self, mut source: impl Read) {
        loop {
            let room = self.ring.wait(&self.cancel, |state| {
                if state.abandoned {
                    return Some(None);
                }
                let spare = state.spare.pop();
                let new = spare.is_none() && state.made < COUNT;
                state.made += usize::from(new);
                (spare.is_some() || new).then_some(Some(spare))
            });
            let Ok(Some(spare)) = room else { return };
            let mut buffer = spare.unwrap_or_else(|| vec![0; BUFFER]);
            let mut filled = 0;
            let end = loop {
                match source.read(&mut buffer[filled..]) {
                    Ok(0) => break Some(Ok(())),
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => break Some(Err(e)),
                }
                if filled == buffer.len() {
                    break None;
                }
            };
            let more = end.is_none();
            self.ring.change(|state| {
                if filled > 0 {
                    state.full.push_back((buffer, filled));
                }
                state.ended = end;
            });
            if !more {
                return;
            }
        }
    }
}

impl Writer {
    /// There is nothing but an error to pass on.
    pub fn fail(self, error: Error) {
        self.ring.change(|state| state.ended = Some(Err(error)));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.ring.change(|state| {
            // A panic, or a cancelled call.
            state.ended.get_or_insert_with(|| Err(Error::other("the stream was given up")));
        });
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.ring.change(|state| state.abandoned = true);
    }
}

impl BufRead for Reader {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        if self.at == self.end && !self.over {
            let used = std::mem::take(&mut self.buffer);
            if !used.is_empty() {
                self.ring.change(|state| state.spare.push(used));
            }
            let next = self.ring.wait(&self.cancel, |state| match state.full.pop_front() {
                Some(full) => Some(Ok(Some(full))),
                None => state.ended.take().map(|end| end.map(|()| None)),
            });
            (self.at, self.end) = (0, 0);
            match next.map_err(|e| Error::other(e.to_string()))? {
                Ok(Some((buffer, filled))) => {
                    (self.buffer, self.end) = (buffer, filled);
                    self.hasher.add(&self.buffer[..filled]);
                    self.count += filled as u64;
                    if self.count > self.limit {
                        return Err(Error::other(format!("more than {} bytes", self.limit)));
                    }
                }
                Ok(None) => self.over = true,
                Err(e) => return Err(e),
            }
        }
        Ok(&self.buffer[self.at..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.at += n.min(self.end - self.at);
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let data = self.fill_buf()?;
        let n = data.len().min(buffer.len());
        buffer[..n].copy_from_slice(&data[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl Reader {
    /// Reads to the end, which must come within `tail` bytes, and gives the digest of everything and its length.
    pub fn finish(mut self, tail: u64) -> Result<(Digest, u64)> {
        self.limit = self.limit.min(self.count.saturating_add(tail));
        loop {
            let n = self.fill_buf()?.len();
            if n == 0 {
                let hasher = std::mem::take(&mut self.hasher);
                return Ok((hasher.finish(), self.count));
            }
            self.consume(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn data(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i / 7) as u8).collect()
    }

    #[test]
    fn all_bytes_in_order_then_the_end() {
        for length in [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 9 * BUFFER + 5] {
            let (writer, mut reader) = pipe(u64::MAX, &Cancel::never());
            let (sent, mut got) = (data(length), Vec::new());
            let source = sent.clone();
            let thread = std::thread::spawn(move || writer.pass(Cursor::new(source)));
            reader.read_to_end(&mut got).unwrap();
            assert_eq!(reader.read(&mut [0; 10]).unwrap(), 0, "the end stays the end");
            assert!(reader.ring.lock().made <= COUNT);
            assert_eq!(reader.finish(0).unwrap(), (Digest::of(&sent), length as u64));
            assert!(got == sent);
            thread.join().unwrap();
        }
    }

    #[test]
    fn errors_come_after_the_bytes_before_them() {
        struct Broken(usize);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
                self.0 = self.0.checked_sub(1).ok_or_else(|| Error::other("broken"))?;
                buffer[0] = 7;
                Ok(1)
            }
        }
        let (writer, mut reader) = pipe(u64::MAX, &Cancel::never());
        writer.pass(Broken(3));
        let mut got = Vec::new();
        assert_eq!((reader.read_to_end(&mut got).unwrap_err().to_string().as_str(), got.as_slice()), ("broken", &[7, 7, 7][..]));
        let (writer, mut reader) = pipe(u64::MAX, &Cancel::never());
        drop(writer);
        assert!(reader.read(&mut [0]).unwrap_err().to_string().contains("given up"));
    }

    #[test]
    fn both_sides_stop_when_the_other_is_gone_or_the_call_is_over() {
        let cancel = Cancel::never();
        let (writer, reader) = pipe(u64::MAX, &cancel);
        let thread = std::thread::spawn(move || writer.pass(std::io::repeat(1)));
        drop(reader);
        thread.join().unwrap();
        let (writer, mut reader) = pipe(u64::MAX, &cancel);
        let waiting = std::thread::spawn(move || reader.read(&mut [0]).map(drop));
        std::thread::sleep(std::time::Duration::from_millis(10));
        cancel.set();
        assert!(waiting.join().unwrap().unwrap_err().to_string().contains("cancelled"));
        drop(writer);
    }

    #[test]
    fn lengths_are_bounded() {
        let (writer, mut reader) = pipe(1000, &Cancel::never());
        writer.pass(Cursor::new(data(1001)));
        assert!(reader.read_to_end(&mut Vec::new()).unwrap_err().to_string().contains("more than 1000"));
        let (writer, reader) = pipe(u64::MAX, &Cancel::never());
        let thread = std::thread::spawn(move || writer.pass(std::io::repeat(0)));
        assert!(reader.finish(1 << 20).is_err(), "an endless tail");
        thread.join().unwrap();
    }
}
