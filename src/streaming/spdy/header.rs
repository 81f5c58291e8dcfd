//! Header blocks: pairs of name and value in one zlib stream per direction. Reading is bounded; writing stores instead of
//! compressing, since our answers have next to no headers and a deflate state costs 256 KiB per session.

use flate2::{Decompress, FlushDecompress, Status};

use super::dictionary;
use crate::error::{Error, Result};

/// Longest block after decompression, bytes.
pub const BLOCK_LIMIT: usize = 16 << 10;
/// Most pairs of a block.
const PAIRS: usize = 64;

/// The zlib stream from the client.
pub struct Reader {
    zlib: Decompress,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader { zlib: Decompress::new(true) }
    }
}

impl Reader {
    /// The pairs of the next block; names in lower case. After an error the stream is lost, and the connection with it.
    pub fn read(&mut self, compressed: &[u8]) -> Result<Vec<(String, String)>> {
        let block = self.inflate(compressed)?;
        parse(&block)
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>> {
        let mut block = Vec::with_capacity(1024);
        let mut out = [0; 4096];
        loop {
            let before = (self.zlib.total_in(), self.zlib.total_out());
            let status = self.zlib.decompress(input, &mut out, FlushDecompress::Sync);
            let used = (self.zlib.total_in() - before.0) as usize;
            let made = (self.zlib.total_out() - before.1) as usize;
            input = &input[used..];
            match status {
                Err(e) if e.needs_dictionary() == Some(dictionary::ID) => {
                    self.zlib.set_dictionary(&dictionary::BYTES).map_err(|e| Error::invalid(format!("header block: {e}")))?;
                    continue;
                }
                Err(e) => return Err(Error::invalid(format!("header block: {e}"))),
                Ok(Status::StreamEnd) => return Err(Error::invalid("header block: the zlib stream ends")),
                Ok(_) => {}
            }
            if block.len() + made > BLOCK_LIMIT {
                return Err(Error::invalid(format!("header block of more than {BLOCK_LIMIT} bytes")));
            }
            block.extend_from_slice(&out[..made]);
            if made < out.len() && (input.is_empty() || (used == 0 && made == 0)) {
                break;
            }
        }
        if !input.is_empty() {
            return Err(Error::invalid("header block: bytes after its end"));
        }
        Ok(block)
    }
}

/// Splits a decompressed block. Values that hold several (separated by NUL) give several pairs.
fn parse(block: &[u8]) -> Result<Vec<(String, String)>> {
    let mut rest = block;
    let count = number(&mut rest)?;
    if count > PAIRS {
        return Err(Error::invalid(format!("header block of {count} pairs")));
    }
    let mut pairs = Vec::with_capacity(count);
    for _ in 0..count {
        let (name, value) = (text(&mut rest)?, text(&mut rest)?);
        if name.is_empty() {
            return Err(Error::invalid("header block: a name is empty"));
        }
        let name = name.to_ascii_lowercase();
        for value in value.split('\0') {
            if pairs.len() == PAIRS {
                return Err(Error::invalid(format!("header block of more than {PAIRS} values")));
            }
            pairs.push((name.clone(), value.to_owned()));
        }
    }
    match rest.is_empty() {
        true => Ok(pairs),
        false => Err(Error::invalid(format!("header block: {} bytes after the last pair", rest.len()))),
    }
}

fn number(rest: &mut &[u8]) -> Result<usize> {
    let (head, tail) = rest.split_first_chunk::<4>().ok_or_else(|| Error::invalid("header block is cut short"))?;
    *rest = tail;
    Ok(u32::from_be_bytes(*head) as usize)
}

fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str> {
    let length = number(rest)?;
    if length > rest.len() {
        return Err(Error::invalid("header block is cut short"));
    }
    let (head, tail) = rest.split_at(length);
    *rest = tail;
    std::str::from_utf8(head).map_err(|_| Error::invalid("header block: a text that is not UTF-8"))
}

/// The zlib stream to the client.
#[derive(Default)]
pub struct Writer {
    begun: bool,
}

impl Writer {
    /// The next block. Names must be in lower case; together they must be shorter than 64 KiB.
    pub fn write(&mut self, pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut block = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(text.len() as u32).to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        let mut out = Vec::with_capacity(block.len() + 16);
        if !self.begun {
            // CMF: deflate with a window of 32 KiB. FLG: FDICT and the check bits (RFC 1950).
            out.extend_from_slice(&[0x78, 0x20 + 31 - ((0x7820u32 % 31) as u8)]);
            out.extend_from_slice(&dictionary::ID.to_be_bytes());
            self.begun = true;
        }
        // A stored block that is not the last (RFC 1951): ends on a byte, so the next one begins on one.
        let length = u16::try_from(block.len()).unwrap_or(u16::MAX);
        out.push(0);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&(!length).to_le_bytes());
        out.extend_from_slice(&block[..usize::from(length)]);
        // An empty one, as zlib's sync flush ends: Go's inflate hands out what it has only there.
        out.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    fn deflate(zlib: &mut Compress, block: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(block.len() + 1024);
        zlib.compress_vec(block, &mut out, FlushCompress::Sync).unwrap();
        out
    }

    fn compressor() -> Compress {
        let mut zlib = Compress::new(Compression::best(), true);
        zlib.set_dictionary(&dictionary::BYTES).unwrap();
        zlib
    }

    fn block(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut out = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(n, v)| [n, v]) {
            out.extend_from_slice(&(text.len() as u32).to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn one_stream_over_many_blocks() {
        let (mut zlib, mut reader) = (compressor(), Reader::default());
        for n in 0..50 {
            let id = n.to_string();
            let pairs = [("streamtype", "stdin"), ("port", "80"), ("requestid", id.as_str())];
            assert_eq!(reader.read(&deflate(&mut zlib, &block(&pairs))).unwrap(), owned(&pairs));
        }
        let upper = block(&[("Streamtype", "a\0b")]);
        assert_eq!(reader.read(&deflate(&mut zlib, &upper)).unwrap(), owned(&[("streamtype", "a"), ("streamtype", "b")]));
    }

    #[test]
    fn what_we_write_a_real_inflate_reads() {
        let (mut writer, mut reader) = (Writer::default(), Reader::default());
        for pairs in [&[][..], &[("a", "b")][..], &[("status", "200 OK"), ("x", "")][..]] {
            assert_eq!(reader.read(&writer.write(pairs)).unwrap(), owned(pairs));
        }
    }

    #[test]
    fn bombs_and_lies() {
        let bomb = block(&[("a", &"x".repeat(10 << 20))]);
        assert!(Reader::default().read(&deflate(&mut compressor(), &bomb)).is_err());
        let mut lies = vec![block(&[("a", "b")]); 5];
        lies[0][3] = 2;
        lies[1][3] = 0;
        lies[2][4] = 0xff;
        lies[3].pop();
        lies[4][7] = 0;
        lies.push(vec![0xff; 4]);
        lies.push(block(&[("", "b")]));
        lies.push(block(&[("a", &"\0".repeat(100))]));
        for (n, lie) in lies.iter().enumerate() {
            assert!(Reader::default().read(&deflate(&mut compressor(), lie)).is_err(), "{n}");
        }
        assert!(Reader::default().read(b"").is_err());
    }

    proptest::proptest! {
        #[test]
        fn hostile_blocks_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..500), good in proptest::bool::ANY) {
            let mut reader = Reader::default();
            let bytes = if good { deflate(&mut compressor(), &bytes) } else { bytes };
            let _ = reader.read(&bytes);
            let _ = reader.read(&bytes);
        }
    }
}
