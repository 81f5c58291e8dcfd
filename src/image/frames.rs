//! zstd (RFC 8878): any number of frames, skippable ones among them. The memory of a frame is its window, which the stream
//! chooses: it is bounded for one stream, and for all streams together.

use std::io::{BufRead, Error, ErrorKind, Read, Result};
use std::sync::LazyLock;

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::slots::{Slots, Taken};
use crate::sys::cancel::Cancel;

const MAGIC: u32 = 0xfd2f_b528;
/// The first of the sixteen magic numbers of skippable frames.
const SKIPPABLE: u32 = 0x184d_2a50;
/// The longest frame header: magic, descriptor, window, dictionary ID, content size.
const HEADER: usize = 18;
const INPUT: usize = 64 << 10;
/// The largest window. The tools that build images stay at or below 32 MiB at their highest levels.
const WINDOW_LIMIT: u64 = 64 << 20;
/// Memory for the windows of all streams together; a larger one has all of it for itself.
const WINDOWS: u64 = 32 << 20;

static MEMORY: LazyLock<Slots> = LazyLock::new(|| Slots::new(WINDOWS));

/// Whether a stream that starts so is zstd.
pub fn begins(start: &[u8]) -> bool {
    start.first_chunk().is_some_and(|magic| matches!(u32::from_le_bytes(*magic), n if n == MAGIC || is_skippable(n)))
}

fn is_skippable(magic: u32) -> bool {
    magic & !15 == SKIPPABLE
}

/// A zstd stream without its compression. What follows the last frame and starts none is dropped, as after gzip's members: the
/// diff ID says whether the content is right.
pub struct Frames<R> {
    input: Input<R>,
    place: Place,
    decoder: Option<Decoding>,
    cancel: Cancel,
}

struct Decoding {
    decoder: FrameDecoder,
    window: u64,
    _memory: Taken,
}

#[derive(Clone, Copy)]
enum Place {
    Between,
    Inside,
    Skipping(u64),
    Tail,
}

/// What stands between two frames.
#[derive(Debug, PartialEq, Eq)]
enum Head {
    /// A frame and the size of its window.
    Frame(u64),
    /// A skippable frame and its bytes, the header included.
    Skippable(u64),
    End,
}

fn head(bytes: &[u8]) -> Result<Head> {
    let Some(magic) = bytes.first_chunk() else { return Ok(Head::End) };
    let cut = || Error::new(ErrorKind::UnexpectedEof, "the stream ends inside a frame's header");
    let number = |at: usize, length: usize| -> Result<u64> {
        let mut word = [0u8; 8];
        word[..length].copy_from_slice(bytes.get(at..at + length).ok_or_else(cut)?);
        Ok(u64::from_le_bytes(word))
    };
    match u32::from_le_bytes(*magic) {
        MAGIC => {}
        magic if is_skippable(magic) => return Ok(Head::Skippable(8 + number(4, 4)?)),
        _ => return Ok(Head::End),
    }
    let descriptor = number(4, 1)?;
    if descriptor & 0x20 == 0 {
        let byte = number(5, 1)?;
        let base = 1u64 << (10 + (byte >> 3));
        return Ok(Head::Frame(base + base / 8 * (byte & 7)));
    }
    // A single segment: the whole content is the window.
    let dictionary = [0, 1, 2, 4][(descriptor & 3) as usize];
    let content = match descriptor >> 6 {
        0 => number(5 + dictionary, 1)?,
        1 => number(5 + dictionary, 2)? + 256,
        2 => number(5 + dictionary, 4)?,
        _ => number(5 + dictionary, 8)?,
    };
    Ok(Head::Frame(content))
}

impl<R: Read> Frames<R> {
    pub fn new(inner: R, cancel: &Cancel) -> Frames<R> {
        Frames { input: Input::new(inner), place: Place::Between, decoder: None, cancel: cancel.clone() }
    }

    fn begin(&mut self, window: u64) -> Result<()> {
        if window > WINDOW_LIMIT {
            let words = format!("zstd: a window of {} MiB, at most {} are allowed", window >> 20, WINDOW_LIMIT >> 20);
            return Err(Error::other(words));
        }
        if self.decoder.as_ref().is_none_or(|d| d.window < window) {
            // The old one's memory is free before more is asked for: nobody waits with some in hand.
            self.decoder = None;
            let memory = MEMORY.take(window, &self.cancel).map_err(|e| Error::other(e.to_string()))?;
            self.decoder = Some(Decoding { decoder: FrameDecoder::new(), window, _memory: memory });
        }
        match &mut self.decoder {
            Some(decoding) => decoding.decoder.reset(&mut self.input).map_err(|e| Error::other(format!("zstd: {e}"))),
            None => Ok(()),
        }
    }

    /// The next bytes of the frame; None at its end.
    fn inside(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let Some(Decoding { decoder, .. }) = &mut self.decoder else { return Err(Error::other("zstd stream used after an error")) };
        while decoder.can_collect() == 0 && !decoder.is_finished() {
            let some = BlockDecodingStrategy::UptoBytes(buffer.len());
            decoder.decode_blocks(&mut self.input, some).map_err(|e| Error::other(format!("zstd: {e}")))?;
        }
        let n = decoder.read(buffer)?;
        if n == 0 {
            self.place = Place::Between;
            return Ok(None);
        }
        Ok(Some(n))
    }
}

impl<R: Read> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.place {
                Place::Between => match head(self.input.peek(HEADER)?)? {
                    Head::Frame(window) => {
                        self.begin(window)?;
                        self.place = Place::Inside;
                    }
                    Head::Skippable(length) => self.place = Place::Skipping(length),
                    Head::End => {
                        self.decoder = None;
                        self.place = Place::Tail;
                    }
                },
                Place::Inside => {
                    if let Some(n) = self.inside(buffer)? {
                        return Ok(n);
                    }
                }
                Place::Skipping(0) => self.place = Place::Between,
                Place::Skipping(left) => {
                    let n = self.input.some()?.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    if n == 0 {
                        return Err(Error::new(ErrorKind::UnexpectedEof, "the stream ends inside a skippable frame"));
                    }
                    Input::consume(&mut self.input, n);
                    self.place = Place::Skipping(left - n as u64);
                }
                Place::Tail => {
                    let n = self.input.some()?.len();
                    if n == 0 {
                        return Ok(0);
                    }
                    Input::consume(&mut self.input, n);
                }
            }
        }
    }
}

/// A buffered stream that can show more than the rest of one read.
pub struct Input<R> {
    inner: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: Read> Input<R> {
    pub fn new(inner: R) -> Input<R> {
        Input { inner, buffer: vec![0; INPUT], start: 0, end: 0 }
    }

    /// The next `n` bytes, fewer only at the end.
    pub fn peek(&mut self, n: usize) -> Result<&[u8]> {
        while self.end - self.start < n {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(0) => break,
                Ok(more) => self.end += more,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(&self.buffer[self.start..self.end.min(self.start + n)])
    }

    /// Some bytes, none at the end.
    fn some(&mut self) -> Result<&[u8]> {
        if self.start == self.end {
            self.peek(1)?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
    }
}

impl<R: Read> BufRead for Input<R> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        self.some()
    }

    fn consume(&mut self, n: usize) {
        Input::consume(self, n);
    }
}

impl<R: Read> Read for Input<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let n = self.some()?.read(buffer)?;
        Input::consume(self, n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zstd(data: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn skippable(data: &[u8]) -> Vec<u8> {
        [&(SKIPPABLE + 5).to_le_bytes()[..], &(data.len() as u32).to_le_bytes(), data].concat()
    }

    /// Gives one byte at a time, so that every border falls between two reads.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
            let n = buffer.len().min(1);
            self.0.read(&mut buffer[..n])
        }
    }

    fn read(data: &[u8]) -> Result<Vec<u8>> {
        let (mut whole, mut slow) = (Vec::new(), Vec::new());
        let result = Frames::new(data, &Cancel::never()).read_to_end(&mut whole);
        let again = Frames::new(Slow(data), &Cancel::never()).read_to_end(&mut slow);
        assert!(result.is_ok() == again.is_ok() && (result.is_err() || whole == slow));
        result.map(|_| whole)
    }

    #[test]
    fn frames_skippable_frames_and_tails() {
        let long: Vec<u8> = (0..700_000u32).flat_map(|i| (i * 7).to_le_bytes()).collect();
        assert_eq!(read(&zstd(b"one")).unwrap(), b"one");
        assert_eq!(read(&zstd(b"")).unwrap(), b"");
        assert!(read(&zstd(&long)).unwrap() == long);
        let of_the_c_library = include_bytes!("../../tests/fuzz/corpus/layer_stream/zstd");
        assert_eq!(read(of_the_c_library).unwrap(), b"layer ".repeat(300));
        let mixed = [skippable(b"toc"), zstd(b"one"), skippable(b""), zstd(b""), zstd(b"two"), skippable(&[7; 100_000])].concat();
        assert!(begins(&mixed) && begins(&zstd(b"")) && !begins(b"plain") && !begins(&[0x28, 0xb5]));
        assert_eq!(read(&mixed).unwrap(), b"onetwo");
        assert_eq!(read(&[zstd(b"one"), vec![0; 1000]].concat()).unwrap(), b"one");
    }

    #[test]
    fn cut_and_damaged_streams_are_errors() {
        let noise: Vec<u8> = (0..50_000u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
        let data = zstd(&noise);
        for cut in [5, 10, 1000, data.len() - 1] {
            assert!(read(&data[..cut]).is_err(), "{cut}");
        }
        assert!(read(&skippable(b"abc")[..9]).is_err());
        // A block of the type that does not exist.
        let wrong = [&MAGIC.to_le_bytes()[..], &[0, 0], &[7, 0, 0]].concat();
        assert!(read(&wrong).is_err());
    }

    #[test]
    fn windows_are_bounded_and_shared() {
        // 1 << (10 + 20): a gigabyte.
        let huge = [&MAGIC.to_le_bytes()[..], &[0, 20 << 3], &[0; 20]].concat();
        assert_eq!(head(&huge).unwrap(), Head::Frame(1 << 30));
        assert!(read(&huge).unwrap_err().to_string().contains("window of 1024 MiB"));
        let single = [&MAGIC.to_le_bytes()[..], &[0xe0], &(1u64 << 40).to_le_bytes(), &[0; 9]].concat();
        assert!(read(&single).unwrap_err().to_string().contains("window of"));
        // A raw block in a frame with the widest window, 1 << (10 + 16).
        let wide = [&MAGIC.to_le_bytes()[..], &[0, 16 << 3], &[(3 << 3) | 1, 0, 0], b"abc"].concat();
        assert_eq!(head(&wide).unwrap(), Head::Frame(64 << 20));
        // While one has a wide window, the next one waits for it.
        let mut first = Frames::new(&wide[..], &Cancel::never());
        assert_eq!(first.read(&mut [0; 1]).unwrap(), 1);
        let soon = Cancel::never().within(std::time::Duration::from_millis(20));
        let e = Frames::new(&wide[..], &soon).read(&mut [0; 10]).unwrap_err();
        assert!(e.to_string().contains("deadline"), "{e}");
        drop(first);
        assert_eq!(read(&wide).unwrap(), b"abc");
    }

    proptest::proptest! {
        #[test]
        fn never_panics(data in proptest::collection::vec(proptest::num::u8::ANY, 0..300), frame: bool) {
            let data = if frame { [&MAGIC.to_le_bytes()[..], &data].concat() } else { data };
            // Bounded: a frame of noise may announce a wide window.
            let mut out = vec![0; 1 << 16];
            let _ = Frames::new(&data[..], &Cancel::never()).read(&mut out);
        }
    }
}
