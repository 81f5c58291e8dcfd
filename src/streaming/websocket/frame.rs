//! Frames from bytes, as a server reads them (RFC 6455, 5): pieces of messages as they come, control frames whole.

use std::io::Cursor;
use std::ops::Range;

use tungstenite::protocol::frame::coding::{Control, Data, OpCode};
use tungstenite::protocol::frame::FrameHeader;

use crate::error::{Error, Result};

/// Read at once. Below the size from which malloc maps memory of its own, because sessions copy pieces of this size.
const BUFFER: usize = 96 * 1024;
/// Longest control frame (RFC 6455, 5.5).
pub const CONTROL_LIMIT: usize = 125;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A part of a message, unmasked: bytes `at` of the buffer. It may be empty.
    Piece {
        text: bool,
        first: bool,
        last: bool,
        at: Range<usize>,
    },
    Ping(Vec<u8>),
    Pong,
    /// With the code, if one is given.
    Close(Option<u16>),
}

/// A frame whose payload is not all read.
struct Frame {
    opcode: OpCode,
    is_final: bool,
    mask: [u8; 4],
    left: u64,
    /// Nothing of this frame has been given out yet.
    fresh: bool,
}

/// Bytes in, frames out.
pub struct Decoder {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    frame: Option<Frame>,
    /// A message whose last frame has not begun: whether it is text.
    message: Option<bool>,
    control: Vec<u8>,
}

fn broken(words: &str) -> Error {
    Error::invalid(format!("read a WebSocket frame: {words}"))
}

impl Decoder {
    pub fn new() -> Decoder {
        Decoder { buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0, frame: None, message: None, control: Vec::new() }
    }

    /// Where to read to, once `next` has said None; never empty then.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// So many bytes have been read to `space`.
    pub fn filled(&mut self, bytes: usize) {
        self.end = (self.end + bytes).min(self.buffer.len());
    }

    pub fn bytes(&self, at: &Range<usize>) -> &[u8] {
        &self.buffer[at.clone()]
    }

    /// The next frame or part of one; None: more bytes are needed. INVALID_ARGUMENT: the connection is of no use any more.
    pub fn next(&mut self) -> Result<Option<Found>> {
        loop {
            if self.frame.is_none() && !self.begin()? {
                return Ok(None);
            }
            let Some(frame) = &mut self.frame else { return Ok(None) };
            let have = (self.end - self.start).min(usize::try_from(frame.left).unwrap_or(usize::MAX));
            if have == 0 && frame.left > 0 {
                return Ok(None);
            }
            let at = self.start..self.start + have;
            unmask(&mut self.buffer[at.clone()], &mut frame.mask);
            self.start += have;
            frame.left -= have as u64;
            let (done, first) = (frame.left == 0, std::mem::replace(&mut frame.fresh, false));
            let (opcode, is_final) = (frame.opcode, frame.is_final);
            if done {
                self.frame = None;
            }
            let OpCode::Control(control) = opcode else {
                let text = match opcode {
                    OpCode::Data(Data::Text) => true,
                    OpCode::Data(Data::Continue) => self.message.unwrap_or_default(),
                    _ => false,
                };
                let last = done && is_final;
                self.message = (!last).then_some(text);
                let first = first && opcode != OpCode::Data(Data::Continue);
                return Ok(Some(Found::Piece { text, first, last, at }));
            };
            self.control.extend_from_slice(&self.buffer[at]);
            if done {
                return Ok(Some(whole(control, std::mem::take(&mut self.control))?));
            }
        }
    }

    /// Whether `next` has something without more bytes.
    pub fn has_ahead(&self) -> bool {
        let have = &self.buffer[self.start..self.end];
        !have.is_empty() && (self.frame.is_some() || !matches!(FrameHeader::parse(&mut Cursor::new(have)), Ok(None)))
    }

    /// Reads a head. False: it is not all there.
    fn begin(&mut self) -> Result<bool> {
        let mut cursor = Cursor::new(&self.buffer[self.start..self.end]);
        let Some((head, length)) = FrameHeader::parse(&mut cursor).map_err(|e| broken(&e.to_string()))? else { return Ok(false) };
        self.start += cursor.position() as usize;
        if head.rsv1 || head.rsv2 || head.rsv3 {
            return Err(broken("a reserved bit is set"));
        }
        let mask = head.mask.ok_or_else(|| broken("it is not masked"))?;
        if length > i64::MAX as u64 {
            return Err(broken("its length is out of range"));
        }
        match head.opcode {
            OpCode::Control(_) if !head.is_final => return Err(broken("a control frame in parts")),
            OpCode::Control(_) if length > CONTROL_LIMIT as u64 => return Err(broken("a control frame of more than 125 bytes")),
            OpCode::Data(Data::Continue) if self.message.is_none() => return Err(broken("a continuation of nothing")),
            OpCode::Data(Data::Text | Data::Binary) if self.message.is_some() => return Err(broken("a message inside another")),
            _ => {}
        }
        self.frame = Some(Frame { opcode: head.opcode, is_final: head.is_final, mask, left: length, fresh: true });
        Ok(true)
    }
}

fn whole(control: Control, payload: Vec<u8>) -> Result<Found> {
    Ok(match control {
        Control::Ping => Found::Ping(payload),
        Control::Close => match payload[..] {
            [] => Found::Close(None),
            [_] => return Err(broken("half a close code")),
            [a, b, ..] => Found::Close(Some(u16::from_be_bytes([a, b]))),
        },
        _ => Found::Pong,
    })
}

/// Unmasks a part of a payload and turns the mask so that it fits the next part.
fn unmask(bytes: &mut [u8], mask: &mut [u8; 4]) {
    let m = *mask;
    let wide = u128::from_ne_bytes(std::array::from_fn(|i| m[i % 4]));
    let mut chunks = bytes.chunks_exact_mut(16);
    for chunk in &mut chunks {
        let Ok(word) = <[u8; 16]>::try_from(&*chunk) else { continue };
        chunk.copy_from_slice(&(u128::from_ne_bytes(word) ^ wide).to_ne_bytes());
    }
    for (i, byte) in chunks.into_remainder().iter_mut().enumerate() {
        *byte ^= m[i % 4];
    }
    mask.rotate_left(bytes.len() % 4);
}

/// The head of a frame from a server: the last of its message, not masked.
pub fn head(opcode: OpCode, length: usize, out: &mut Vec<u8>) -> Result<()> {
    let head = FrameHeader { opcode, ..FrameHeader::default() };
    head.format(length as u64, out).map_err(|e| Error::internal(format!("write a WebSocket frame: {e}")))
}
