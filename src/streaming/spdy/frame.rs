//! Frames to bytes and back. Pure; what waits inside is bounded by one control frame.

use super::header;
use crate::error::{Error, Result};

/// Longest control frame that is taken, bytes after its head. Header blocks of real clients are below 200.
pub const CONTROL_LIMIT: usize = 32 << 10;
/// Longest data frame, by its length field.
pub const DATA_LIMIT: usize = (1 << 24) - 1;

/// Reasons in RST_STREAM.
pub const PROTOCOL_ERROR: u32 = 1;
pub const REFUSED_STREAM: u32 = 3;
pub const CANCEL: u32 = 5;

const FIN: u8 = 1;
const SETTINGS_INITIAL_WINDOW: u32 = 7;

/// What the peer sent. Long data frames come in several pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        stream: u32,
        fin: bool,
        headers: Vec<(String, String)>,
    },
    SynReply {
        stream: u32,
        fin: bool,
        headers: Vec<(String, String)>,
    },
    Reset {
        stream: u32,
        status: u32,
    },
    /// Only the initial window matters to us.
    Settings {
        initial_window: Option<u32>,
    },
    Ping(u32),
    GoAway {
        last_stream: u32,
        status: u32,
    },
    Headers {
        stream: u32,
        fin: bool,
        headers: Vec<(String, String)>,
    },
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    Data {
        stream: u32,
        bytes: Vec<u8>,
        fin: bool,
    },
}

/// Takes bytes, gives frames.
#[derive(Default)]
pub struct Decoder {
    blocks: header::Reader,
    /// A head, or a control frame, that is not whole.
    part: Vec<u8>,
    data: Option<Data>,
}

/// A data frame whose end has not come.
struct Data {
    stream: u32,
    left: usize,
    fin: bool,
}

impl Decoder {
    /// Takes some of `input`: says how many bytes, and the frame that they completed. Nothing completed: all bytes were taken. After an
    /// error the connection is of no use.
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<Frame>)> {
        let mut used = 0;
        loop {
            if let Some(data) = &mut self.data {
                let n = data.left.min(input.len() - used);
                if n == 0 && data.left > 0 {
                    return Ok((used, None));
                }
                data.left -= n;
                let (stream, ended, fin) = (data.stream, data.left == 0, data.fin);
                if ended {
                    self.data = None;
                }
                let bytes = input[used..used + n].to_vec();
                return Ok((used + n, Some(Frame::Data { stream, bytes, fin: fin && ended })));
            }
            let Some(head) = self.fill(input, &mut used, 8) else { return Ok((used, None)) };
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
            let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            if first >> 31 == 0 {
                if first == 0 {
                    return Err(Error::invalid("data for stream 0"));
                }
                self.data = Some(Data { stream: first, left: length, fin: head[4] & FIN != 0 });
                self.part.clear();
                continue;
            }
            if length > CONTROL_LIMIT {
                return Err(Error::invalid(format!("control frame of {length} bytes")));
            }
            if self.fill(input, &mut used, 8 + length).is_none() {
                return Ok((used, None));
            }
            let whole = std::mem::take(&mut self.part);
            if let Some(frame) = self.control(&whole)? {
                return Ok((used, Some(frame)));
            }
        }
    }

    /// Brings `part` to `length` bytes; None when the input does not have them.
    fn fill(&mut self, input: &[u8], used: &mut usize, length: usize) -> Option<&[u8]> {
        let n = length.saturating_sub(self.part.len()).min(input.len() - *used);
        self.part.extend_from_slice(&input[*used..*used + n]);
        *used += n;
        (self.part.len() >= length).then_some(&self.part)
    }

    /// None for kinds that do not concern us.
    fn control(&mut self, whole: &[u8]) -> Result<Option<Frame>> {
        let (version, kind, flags, body) = (u16::from_be_bytes([whole[0] & 0x7f, whole[1]]), whole[3], whole[4], &whole[8..]);
        if version != 3 {
            return Err(Error::invalid(format!("frame of SPDY/{version}")));
        }
        if whole[2] != 0 {
            return Ok(None);
        }
        let word = |at: usize| {
            let bytes = body.get(at..at + 4).and_then(|b| b.first_chunk::<4>());
            bytes.map(|b| u32::from_be_bytes(*b)).ok_or_else(|| Error::invalid(format!("control frame {kind} of {} bytes", body.len())))
        };
        let stream = |at: usize| match word(at)? & 0x7fff_ffff {
            0 => Err(Error::invalid(format!("control frame {kind} for stream 0"))),
            id => Ok(id),
        };
        let fin = flags & FIN != 0;
        Ok(Some(match kind {
            1 => {
                let id = stream(0)?;
                let block = body.get(10..).ok_or_else(|| Error::invalid("SYN_STREAM is cut short"))?;
                Frame::SynStream { stream: id, fin, headers: self.blocks.read(block)? }
            }
            2 => Frame::SynReply { stream: stream(0)?, fin, headers: self.blocks.read(&body[4..])? },
            3 => Frame::Reset { stream: stream(0)?, status: word(4)? },
            4 => {
                let count = word(0)? as usize;
                if body.len() != 4 + count.saturating_mul(8) {
                    return Err(Error::invalid(format!("SETTINGS of {} bytes with {count} entries", body.len())));
                }
                let mut initial_window = None;
                for n in 0..count {
                    if word(4 + n * 8)? & 0x00ff_ffff == SETTINGS_INITIAL_WINDOW {
                        initial_window = Some(word(8 + n * 8)?);
                    }
                }
                Frame::Settings { initial_window }
            }
            6 => Frame::Ping(word(0)?),
            7 => Frame::GoAway { last_stream: word(0)? & 0x7fff_ffff, status: word(4).unwrap_or(0) },
            8 => Frame::Headers { stream: stream(0)?, fin, headers: self.blocks.read(&body[4..])? },
            9 => Frame::WindowUpdate { stream: word(0)? & 0x7fff_ffff, delta: word(4)? & 0x7fff_ffff },
            _ => return Ok(None),
        }))
    }
}

/// Makes frames.
#[derive(Default)]
pub struct Encoder {
    blocks: header::Writer,
}

impl Encoder {
    pub fn syn_stream(&mut self, stream: u32, fin: bool, headers: &[(&str, &str)]) -> Vec<u8> {
        let block = self.blocks.write(headers);
        let mut body = stream.to_be_bytes().to_vec();
        // Associated stream, priority and credential slot: none.
        body.extend_from_slice(&[0; 6]);
        body.extend_from_slice(&block);
        control(1, u8::from(fin), &body)
    }

    pub fn syn_reply(&mut self, stream: u32, fin: bool, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut body = stream.to_be_bytes().to_vec();
        body.extend_from_slice(&self.blocks.write(headers));
        control(2, u8::from(fin), &body)
    }
}

/// The head of a data frame; `length` bytes (at most `DATA_LIMIT`) follow it.
pub fn data_head(stream: u32, length: usize, fin: bool) -> [u8; 8] {
    let (s, l) = ((stream & 0x7fff_ffff).to_be_bytes(), (length as u32).to_be_bytes());
    [s[0], s[1], s[2], s[3], u8::from(fin), l[1], l[2], l[3]]
}

pub fn reset(stream: u32, status: u32) -> Vec<u8> {
    words(3, &[stream, status])
}

pub fn settings(initial_window: u32) -> Vec<u8> {
    words(4, &[1, SETTINGS_INITIAL_WINDOW, initial_window])
}

pub fn ping(id: u32) -> Vec<u8> {
    words(6, &[id])
}

pub fn go_away(last_stream: u32, status: u32) -> Vec<u8> {
    words(7, &[last_stream, status])
}

pub fn window_update(stream: u32, delta: u32) -> Vec<u8> {
    words(9, &[stream, delta])
}

fn words(kind: u8, words: &[u32]) -> Vec<u8> {
    let body: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    control(kind, 0, &body)
}

fn control(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    let mut out = vec![0x80, 3, 0, kind, flags, length[1], length[2], length[3]];
    out.extend_from_slice(body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(decoder: &mut Decoder, mut input: &[u8]) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        loop {
            let (used, frame) = decoder.decode(input)?;
            input = &input[used..];
            match frame {
                Some(frame) => frames.push(frame),
                None => {
                    assert!(input.is_empty());
                    return Ok(frames);
                }
            }
        }
    }

    fn sample() -> (Vec<u8>, Vec<Frame>) {
        let mut encoder = Encoder::default();
        let headers = |kind: &str| vec![("streamtype".to_owned(), kind.to_owned())];
        let mut bytes = encoder.syn_stream(1, false, &[("streamtype", "error")]);
        bytes.extend(encoder.syn_reply(1, true, &[]));
        bytes.extend(encoder.syn_stream(3, true, &[("streamtype", "stdin")]));
        bytes.extend(settings(1000));
        bytes.extend(ping(7));
        bytes.extend(reset(3, CANCEL));
        bytes.extend(control(10, 0, b"a credential is skipped"));
        bytes.extend(window_update(0, 9));
        bytes.extend(data_head(3, 3, true));
        bytes.extend(b"abc");
        bytes.extend(data_head(3, 0, false));
        bytes.extend(go_away(3, 0));
        let frames = vec![
            Frame::SynStream { stream: 1, fin: false, headers: headers("error") },
            Frame::SynReply { stream: 1, fin: true, headers: Vec::new() },
            Frame::SynStream { stream: 3, fin: true, headers: headers("stdin") },
            Frame::Settings { initial_window: Some(1000) },
            Frame::Ping(7),
            Frame::Reset { stream: 3, status: CANCEL },
            Frame::WindowUpdate { stream: 0, delta: 9 },
            Frame::Data { stream: 3, bytes: b"abc".to_vec(), fin: true },
            Frame::Data { stream: 3, bytes: Vec::new(), fin: false },
            Frame::GoAway { last_stream: 3, status: 0 },
        ];
        (bytes, frames)
    }

    #[test]
    fn round_trip_at_once_and_byte_by_byte() {
        let (bytes, frames) = sample();
        assert_eq!(all(&mut Decoder::default(), &bytes).unwrap(), frames);
        let mut decoder = Decoder::default();
        let mut got: Vec<Frame> = Vec::new();
        for byte in &bytes {
            for frame in all(&mut decoder, &[*byte]).unwrap() {
                // Pieces of one data frame are joined.
                match (got.last_mut(), frame) {
                    (Some(Frame::Data { stream: 3, bytes, fin }), Frame::Data { stream: 3, bytes: more, fin: last })
                        if !more.is_empty() =>
                    {
                        bytes.extend(more);
                        *fin |= last;
                    }
                    (_, frame) => got.push(frame),
                }
            }
        }
        assert_eq!(got, frames);
    }

    /// The kind of stream in a SYN_STREAM.
    fn kind(frame: &Frame) -> Option<(u32, &str)> {
        match frame {
            Frame::SynStream { stream, headers, .. } => {
                let value = |name| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
                Some((*stream, value("streamtype")?))
            }
            _ => None,
        }
    }

    #[test]
    fn frames_of_kubectl() {
        let frames = all(&mut Decoder::default(), include_bytes!("../../../tests/fixtures/spdy/exec-tty.bin")).unwrap();
        let kinds: Vec<_> = frames.iter().filter_map(kind).collect();
        assert_eq!(kinds, [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "resize")]);
        let data = |stream, bytes: &[u8], fin| Frame::Data { stream, bytes: bytes.to_vec(), fin };
        let size = b"{\"Width\":91,\"Height\":17}\n";
        assert_eq!(frames[4..7], [data(7, size, false), data(3, b"exit 3\n", false), data(3, b"", true)]);
        let frames = all(&mut Decoder::default(), include_bytes!("../../../tests/fixtures/spdy/port-forward.bin")).unwrap();
        let kinds: Vec<_> = frames.iter().filter_map(kind).collect();
        assert_eq!(kinds, [(1, "error"), (3, "data"), (5, "error"), (7, "data")]);
        let Frame::SynStream { headers, .. } = &frames[0] else { panic!("{:?}", frames[0]) };
        for (name, value) in [("port", "18091"), ("requestid", "0")] {
            assert!(headers.contains(&(name.to_owned(), value.to_owned())), "{headers:?}");
        }
    }

    #[test]
    fn hostile_frames_are_errors() {
        let mut wrong_version = ping(1);
        wrong_version[1] = 2;
        let mut settings_lie = settings(1);
        settings_lie[11] = 0xff;
        for bytes in [
            wrong_version,
            settings_lie,
            data_head(0, 1, false).to_vec(),
            vec![0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
            control(1, 0, &[0, 0, 0, 1, 0]),
            control(3, 0, &[0, 0, 0, 1]),
            control(2, 0, &[0, 0]),
            control(2, 0, &[0, 0, 0, 0]),
            reset(0, 1),
        ] {
            assert!(all(&mut Decoder::default(), &bytes).is_err(), "{bytes:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_never_pile_up(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000), cut in 1usize..500) {
            let mut decoder = Decoder::default();
            for chunk in bytes.chunks(cut) {
                if all(&mut decoder, chunk).is_err() {
                    break;
                }
                assert!(decoder.part.len() <= CONTROL_LIMIT + 8);
            }
        }

        #[test]
        fn a_flipped_byte_never_panics(at in 0usize..200, bit in 0u8..8) {
            let (mut bytes, _) = sample();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = all(&mut Decoder::default(), &bytes);
        }
    }
}
