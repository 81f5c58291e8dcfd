//! Layer streams: gzip (any number of members), zstd (any number of frames) or plain, told apart by their first bytes, never
//! by a media type.

use std::io::{Chain, Cursor, Read, Result};

use flate2::bufread::GzDecoder;

use super::frames::{self, Frames, Input};
use crate::sys::cancel::Cancel;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const XZ: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const BZIP2: [u8; 3] = *b"BZh";

/// A stream whose first bytes have been looked at.
type Start<R> = Chain<Cursor<Vec<u8>>, R>;

/// A stream without its compression.
pub enum Decompress<R: Read> {
    Plain(Start<R>),
    Gzip(Gzip<Start<R>>),
    Zstd(Box<Frames<Start<R>>>),
}

impl<R: Read> Decompress<R> {
    /// Looks at the first bytes. xz and bzip2 are refused by name. `cancel` ends a wait for the memory that zstd needs.
    pub fn new(mut inner: R, cancel: &Cancel) -> Result<Decompress<R>> {
        let mut start = Vec::new();
        inner.by_ref().take(XZ.len() as u64).read_to_end(&mut start)?;
        for (magic, name) in [(&XZ[..], "xz"), (&BZIP2, "bzip2")] {
            if start.starts_with(magic) {
                return Err(std::io::Error::other(format!("compression {name} is not supported, only gzip and zstd")));
            }
        }
        let (gzip, zstd) = (start.starts_with(&GZIP), frames::begins(&start));
        let whole = Cursor::new(start).chain(inner);
        if zstd {
            return Ok(Decompress::Zstd(Box::new(Frames::new(whole, cancel))));
        }
        if gzip {
            return Ok(Decompress::Gzip(Gzip { state: State::Member(Box::new(GzDecoder::new(Input::new(whole)))) }));
        }
        Ok(Decompress::Plain(whole))
    }
}

impl<R: Read> Read for Decompress<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        match self {
            Decompress::Plain(inner) => inner.read(buffer),
            Decompress::Gzip(inner) => inner.read(buffer),
            Decompress::Zstd(inner) => inner.read(buffer),
        }
    }
}

/// Members one after another. Bytes after the last that start no member are read and dropped, as gzip(1) does: the diff
/// ID already says whether the content is right.
pub struct Gzip<R: Read> {
    state: State<R>,
}

enum State<R: Read> {
    Member(Box<GzDecoder<Input<R>>>),
    Tail(Input<R>),
    Changing,
}

impl<R: Read> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match &mut self.state {
                State::Member(decoder) => {
                    let n = decoder.read(buffer)?;
                    if n > 0 {
                        return Ok(n);
                    }
                    let State::Member(decoder) = std::mem::replace(&mut self.state, State::Changing) else { return Ok(0) };
                    let mut inner = decoder.into_inner();
                    let another = inner.peek(GZIP.len())? == GZIP;
                    self.state = if another { State::Member(Box::new(GzDecoder::new(inner))) } else { State::Tail(inner) };
                }
                State::Tail(inner) => {
                    std::io::copy(inner, &mut std::io::sink())?;
                    return Ok(0);
                }
                State::Changing => return Err(std::io::Error::other("gzip stream used after an error")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn read(data: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        Decompress::new(data, &Cancel::never())?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn plain_gzip_zstd_members_and_tails() {
        assert_eq!(read(b"plain").unwrap(), b"plain");
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(b"\x1f").unwrap(), b"\x1f");
        assert_eq!(read(&gzip(b"one")).unwrap(), b"one");
        assert_eq!(read(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(), b"onetwo");
        assert_eq!(read(&[gzip(b"one"), vec![0; 100]].concat()).unwrap(), b"one");
        assert_eq!(read(&[gzip(b"one"), b"garbage".to_vec()].concat()).unwrap(), b"one");
        assert_eq!(read(&[gzip(b"one"), vec![0x1f]].concat()).unwrap(), b"one");
        let zstd = ruzstd::encoding::compress_to_vec(&b"one"[..], ruzstd::encoding::CompressionLevel::Fastest);
        assert_eq!(read(&zstd).unwrap(), b"one");
    }

    #[test]
    fn cut_or_foreign_streams_are_errors() {
        let data = gzip(&[9u8; 5000]);
        assert!(read(&data[..data.len() - 3]).is_err());
        assert!(read(&XZ).unwrap_err().to_string().contains("xz"));
        assert!(read(b"BZh9").unwrap_err().to_string().contains("bzip2"));
    }
}
