//! A layer's archive without its files' data: what stands between the data (headers, padding, end mark, tail), and a hash
//! for each file's data. Together with the unpacked files it gives the archive again, byte by byte, so that a layer can be
//! verified against the diff ID of its image years later, and the file that differs be named.
//!
//! It costs one XXH3 of the data (a tenth of a second per GiB) and some 50 bytes per file. The file is a zlib stream of
//! records: length of the bytes between (u32), these bytes, length of the data that follows (u64), its XXH3 (u64), all little
//! endian.

use std::fs::File;
use std::io::{BufReader, BufWriter, Error, ErrorKind, Read, Result, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use flate2::Compression;
use xxhash_rust::xxh3::Xxh3Default;

use super::digest::{Digest, Hasher};

/// Bytes of headers put into one record.
const CHUNK: usize = 32 << 10;
/// Compressed bytes of a whole tape. A layer with more is one that nobody can mean, and is kept without a tape.
const LIMIT: u64 = 128 << 20;

/// A tape that is being written.
pub struct Tape {
    out: ZlibEncoder<BufWriter<File>>,
    between: Vec<u8>,
    data: u64,
    hash: Xxh3Default,
}

impl Tape {
    /// Makes the file `path`.
    pub fn create(path: &Path) -> Result<Tape> {
        let file = BufWriter::with_capacity(16 << 10, File::options().write(true).create_new(true).open(path)?);
        Ok(Tape { out: ZlibEncoder::new(file, Compression::fast()), between: Vec::new(), data: 0, hash: Xxh3Default::new() })
    }

    /// Takes bytes that are no file's data.
    pub(super) fn keep(&mut self, bytes: &[u8]) -> Result<()> {
        if self.data > 0 || self.between.len() >= CHUNK {
            self.record()?;
        }
        self.between.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes note of a file's data.
    pub(super) fn pass(&mut self, data: &[u8]) -> Result<()> {
        self.hash.update(data);
        self.data += data.len() as u64;
        Ok(())
    }

    fn record(&mut self) -> Result<()> {
        // What is beyond the limit would only be written to be thrown away.
        if self.out.total_out() <= LIMIT {
            let length = u32::try_from(self.between.len()).map_err(|_| Error::other("headers out of range"))?;
            self.out.write_all(&length.to_le_bytes())?;
            self.out.write_all(&self.between)?;
            self.out.write_all(&self.data.to_le_bytes())?;
            self.out.write_all(&self.hash.digest().to_le_bytes())?;
        }
        self.between.clear();
        self.data = 0;
        self.hash.reset();
        Ok(())
    }

    /// Ends the file and gives its size; None if it grew beyond its limit and is useless.
    pub fn finish(mut self) -> Result<Option<u64>> {
        self.record()?;
        if self.out.total_out() > LIMIT {
            return Ok(None);
        }
        let mut file = self.out.finish()?;
        file.flush()?;
        Ok(Some(file.get_ref().metadata()?.len()))
    }
}

/// The file that the data of the archive's next member is read from, and its pieces.
struct Feed {
    file: File,
    /// Offset and length, those to come in front.
    pieces: std::collections::VecDeque<(u64, u64)>,
}

/// An archive that is put together again from its tape and the files. Without a file, data reads as zeros.
pub struct Replay {
    tape: ZlibDecoder<BufReader<File>>,
    between: u64,
    data: u64,
    /// Hash of the data of this record as it was, and as it is.
    want: u64,
    hash: Xxh3Default,
    feed: Option<Feed>,
    differs: bool,
    ended: bool,
    digest: Hasher,
}

impl Replay {
    pub fn open(path: &Path) -> Result<Replay> {
        let file = File::open(path)?;
        let tape = ZlibDecoder::new(BufReader::with_capacity(16 << 10, file));
        let mut replay = Replay {
            tape,
            between: 0,
            data: 0,
            want: 0,
            hash: Xxh3Default::new(),
            feed: None,
            differs: false,
            ended: false,
            digest: Hasher::default(),
        };
        replay.next_record()?;
        Ok(replay)
    }

    /// The data to come is that of `file`, in these pieces.
    pub fn feed(&mut self, file: File, pieces: &[(u64, u64)]) {
        self.feed = Some(Feed { file, pieces: pieces.iter().copied().filter(|p| p.1 > 0).collect() });
    }

    /// Ends a member: whether its data differed from what was unpacked. A file that was too short is one that differs.
    pub fn differed(&mut self) -> bool {
        self.feed = None;
        std::mem::take(&mut self.differs)
    }

    /// The diff ID of all that was read.
    pub fn digest(self) -> Digest {
        self.digest.finish()
    }

    fn next_record(&mut self) -> Result<()> {
        let mut length = [0u8; 4];
        // The end is between records.
        let mut filled = 0;
        while filled < length.len() {
            match self.tape.read(&mut length[filled..])? {
                0 if filled == 0 => {
                    self.ended = true;
                    return Ok(());
                }
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        self.between = u64::from(u32::from_le_bytes(length));
        Ok(())
    }

    /// Length and hash of data, which stand behind the bytes between.
    fn data_begins(&mut self) -> Result<()> {
        let mut number = [0u8; 8];
        self.tape.read_exact(&mut number)?;
        self.data = u64::from_le_bytes(number);
        self.tape.read_exact(&mut number)?;
        self.want = u64::from_le_bytes(number);
        self.hash.reset();
        Ok(())
    }

    fn data_ends(&mut self) -> Result<()> {
        self.differs |= self.hash.digest() != self.want;
        self.next_record()
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = buffer.len().min(usize::try_from(self.data).unwrap_or(usize::MAX));
        let mut n = 0;
        if let Some(feed) = &mut self.feed {
            if let Some((offset, length)) = feed.pieces.front_mut() {
                let part = want.min(usize::try_from(*length).unwrap_or(usize::MAX));
                n = feed.file.read_at(&mut buffer[..part], *offset)?;
                *offset += n as u64;
                *length -= n as u64;
                if *length == 0 {
                    feed.pieces.pop_front();
                }
            }
        }
        if n == 0 {
            // No file, or one that was cut: the lengths of the archive are kept all the same.
            buffer[..want].fill(0);
            n = want;
        }
        self.hash.update(&buffer[..n]);
        self.data -= n as u64;
        if self.data == 0 {
            self.data_ends()?;
        }
        Ok(n)
    }
}

impl Read for Replay {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if buffer.is_empty() || self.ended {
            return Ok(0);
        }
        let n = if self.data > 0 {
            self.read_data(buffer)?
        } else {
            let mut n = 0;
            if self.between > 0 {
                let want = buffer.len().min(self.between as usize);
                n = self.tape.read(&mut buffer[..want])?;
                if n == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                self.between -= n as u64;
            }
            // Empty data has nothing to compare; an empty record is only the last.
            if self.between == 0 {
                self.data_begins()?;
                if self.data == 0 {
                    self.next_record()?;
                }
            }
            if n == 0 {
                return self.read(buffer);
            }
            n
        };
        self.digest.add(&buffer[..n]);
        Ok(n)
    }
}
