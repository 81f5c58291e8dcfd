//! Layer streams: gzip (any number of members) or plain, told apart by their first bytes, never by a media type.

use std::io::{BufRead, BufReader, Read, Result};

use flate2::bufread::GzDecoder;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const XZ: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const BZIP2: [u8; 3] = *b"BZh";

/// A stream without its compression.
pub enum Decompress<R: Read> {
    Plain(BufReader<R>),
    Gzip(Gzip<R>),
}

impl<R: Read> Decompress<R> {
    /// Looks at the first bytes. zstd, xz and bzip2 are refused by name.
    pub fn new(inner: R) -> Result<Decompress<R>> {
        let mut inner = BufReader::with_capacity(64 << 10, inner);
        let start = inner.fill_buf()?;
        for (magic, name) in [(&ZSTD[..], "zstd"), (&XZ, "xz"), (&BZIP2, "bzip2")] {
            if start.starts_with(magic) {
                return Err(std::io::Error::other(format!("compression {name} is not supported, only gzip")));
            }
        }
        if start.starts_with(&GZIP) {
            return Ok(Decompress::Gzip(Gzip { state: State::Member(Box::new(GzDecoder::new(inner))) }));
        }
        Ok(Decompress::Plain(inner))
    }
}

impl<R: Read> Read for Decompress<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        match self {
            Decompress::Plain(inner) => inner.read(buffer),
            Decompress::Gzip(inner) => inner.read(buffer),
        }
    }
}

/// Members one after another. Bytes after the last that start no member are read and dropped, as gzip(1) does: the diff
/// ID already says whether the content is right.
pub struct Gzip<R: Read> {
    state: State<R>,
}

enum State<R: Read> {
    Member(Box<GzDecoder<BufReader<R>>>),
    Tail(BufReader<R>),
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
                    // One byte at a buffer's end is enough to go on: a header that is none is an error of the decoder.
                    let start = inner.fill_buf()?;
                    let another = start.first() == Some(&GZIP[0]) && start.get(1).is_none_or(|b| *b == GZIP[1]);
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
        Decompress::new(data)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn plain_gzip_members_and_tails() {
        assert_eq!(read(b"plain").unwrap(), b"plain");
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(&gzip(b"one")).unwrap(), b"one");
        assert_eq!(read(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(), b"onetwo");
        assert_eq!(read(&[gzip(b"one"), vec![0; 100]].concat()).unwrap(), b"one");
        assert_eq!(read(&[gzip(b"one"), b"garbage".to_vec()].concat()).unwrap(), b"one");
    }

    #[test]
    fn cut_or_foreign_streams_are_errors() {
        let data = gzip(&[9u8; 5000]);
        assert!(read(&data[..data.len() - 3]).is_err());
        assert!(read(&ZSTD).unwrap_err().to_string().contains("zstd"));
    }
}
