//! Reads tar streams: ustar, GNU (long names, sparse) and PAX (records with binary values, sparse 0.0, 0.1 and 1.0), with a
//! limit on every header. Our own reader, because layers come from strangers: the tar crate reads extension headers of any size
//! into memory and cuts PAX values (such as `security.capability`) at their first newline byte.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Seek};

use super::tape::Tape;

const BLOCK: usize = 512;
/// Bytes of extension headers of one entry.
const EXTENSION_LIMIT: u64 = 1 << 20;
/// Bytes that global headers may leave in force, which every member takes over.
const GLOBAL_LIMIT: usize = 16 << 10;
/// Attributes of one member. Linux's file systems hold some hundred bytes to 64 KiB of them.
const XATTRS_LIMIT: usize = 512;
/// Bytes after the end mark.
const TAIL_LIMIT: u64 = 64 << 20;
/// Data pieces of one sparse file.
const PIECES_LIMIT: usize = 1 << 16;

/// What an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Hardlink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
}

/// One member of an archive, extension headers applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Target of a hard or symbolic link.
    pub link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of the file it makes; a sparse one stores fewer.
    pub size: u64,
    /// Bytes of data that `read` gives.
    pub stored: u64,
    /// Position of the data in the stream.
    pub offset: u64,
    /// Major and minor number.
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Offset and length of each piece of data of a sparse file, rising.
    pub pieces: Option<Vec<(u64, u64)>>,
}

/// A tar stream.
pub struct Tarball<R> {
    inner: R,
    position: u64,
    /// Data and padding of the current entry that are not read yet.
    left: u64,
    padding: u64,
    global: Pax,
    ended: bool,
    tape: Option<Tape>,
}

#[derive(Clone, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_major: Option<u64>,
    sparse_size: Option<u64>,
    sparse_name: Option<Vec<u8>>,
    /// Formats 0.0 (a record per number) and 0.1 (one record with all): offsets and lengths in turns.
    sparse_map: Option<Vec<u64>>,
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, what.into())
}

impl<R: Read> Tarball<R> {
    pub fn new(inner: R) -> Tarball<R> {
        Tarball { inner, position: 0, left: 0, padding: 0, global: Pax::default(), ended: false, tape: None }
    }

    /// As `new`; what is not read as a member's data goes to `tape`.
    pub fn taped(inner: R, tape: Tape) -> Tarball<R> {
        Tarball { tape: Some(tape), ..Tarball::new(inner) }
    }

    /// Reads all that follows the end mark, and gives the tape back. tar pads to some KiB; where a bomb may hide it is bounded.
    pub fn finish(mut self) -> Result<Option<Tape>> {
        self.skip_data()?;
        if self.skip(TAIL_LIMIT + 1)? > TAIL_LIMIT {
            return Err(bad("more than 64 MiB follow the archive's end mark"));
        }
        Ok(self.tape)
    }

    /// Reads all that follows the end mark, and gives the stream back.
    pub fn into_drained(mut self) -> Result<R> {
        self.skip_data()?;
        self.skip(u64::MAX)?;
        Ok(self.inner)
    }

    /// Where the stream comes from.
    pub fn source(&mut self) -> &mut R {
        &mut self.inner
    }

    fn read_full(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.inner.read_exact(buffer)?;
        self.position += buffer.len() as u64;
        if let Some(tape) = &mut self.tape {
            tape.keep(buffer)?;
        }
        Ok(())
    }

    /// Reads up to `todo` bytes and drops them.
    fn skip(&mut self, todo: u64) -> Result<u64> {
        let mut buffer = [0u8; 8 << 10];
        let mut done = 0;
        while done < todo {
            let want = buffer.len().min(usize::try_from(todo - done).unwrap_or(usize::MAX));
            let n = match self.inner.read(&mut buffer[..want]) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if let Some(tape) = &mut self.tape {
                tape.keep(&buffer[..n])?;
            }
            done += n as u64;
        }
        self.position += done;
        Ok(done)
    }

    /// The next member, or the end. What is left of the current one's data is skipped by reading.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip_data()?;
        if self.ended {
            return Ok(None);
        }
        let mut budget = EXTENSION_LIMIT;
        let mut pax = self.global.clone();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(header) = self.header()? else {
                self.ended = true;
                return Ok(None);
            };
            let stored = number(&header[124..136])?;
            let stored = u64::try_from(stored).map_err(|_| bad("negative size"))?;
            match header[156] {
                b'x' => {
                    let data = self.extension(stored, &mut budget)?;
                    pax.apply(&data)?;
                }
                b'g' => {
                    let data = self.extension(stored, &mut budget)?;
                    self.global.apply(&data)?;
                    if self.global.weight() > GLOBAL_LIMIT {
                        return Err(bad(format!("global headers of more than {} KiB", GLOBAL_LIMIT >> 10)));
                    }
                    pax.apply(&data)?;
                }
                b'L' => long_name = Some(until_nul(&self.extension(stored, &mut budget)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.extension(stored, &mut budget)?).to_vec()),
                kind => return self.member(&header, kind, stored, pax, long_name, long_link).map(Some),
            }
        }
    }

    fn member(
        &mut self,
        h: &[u8; BLOCK],
        kind: u8,
        stored: u64,
        mut pax: Pax,
        name: Option<Vec<u8>>,
        link: Option<Vec<u8>>,
    ) -> Result<Entry> {
        let gnu = &h[257..265] == b"ustar  \0";
        let ustar = &h[257..262] == b"ustar" && !gnu;
        let mut path = until_nul(&h[..100]).to_vec();
        if ustar && h[345] != 0 {
            path = [until_nul(&h[345..500]), b"/", &path].concat();
        }
        let path = pax.path.clone().or(name).unwrap_or(path);
        let link = pax.link.clone().or(link).unwrap_or_else(|| until_nul(&h[157..257]).to_vec());
        let kind_byte = kind;
        let kind = match kind {
            b'0' | 0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(bad(format!("{}: unknown entry type {:?}", String::from_utf8_lossy(&path), other as char))),
        };
        // POSIX: a hard link may carry data, the other special kinds announce sizes that mean nothing.
        let stored = match kind {
            Kind::File => pax.size.unwrap_or(stored),
            Kind::Hardlink => 0,
            _ => 0,
        };
        if i64::try_from(stored).is_err() {
            return Err(bad("size out of range"));
        }
        let mut entry = Entry {
            kind,
            link,
            mode: (number(&h[100..108])? & 0o7777) as u32,
            uid: id(pax.uid, &h[108..116])?,
            gid: id(pax.gid, &h[116..124])?,
            mtime: match pax.mtime {
                Some(mtime) => mtime,
                None => (number(&h[136..148])?, 0),
            },
            size: stored,
            stored,
            offset: self.position,
            device: if ustar || gnu { (device(&h[329..337])?, device(&h[337..345])?) } else { (0, 0) },
            xattrs: std::mem::take(&mut pax.xattrs),
            pieces: None,
            path,
        };
        self.left = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        if kind_byte == b'S' {
            if !gnu {
                return Err(bad("sparse entry without a GNU header"));
            }
            self.gnu_sparse(h, &mut entry)?;
        } else if kind == Kind::File {
            match (pax.sparse_major, &pax.sparse_map) {
                (Some(1), _) => self.pax_sparse(&pax, &mut entry)?,
                (None | Some(0), Some(map)) => old_sparse(&pax, map, &mut entry)?,
                (None | Some(0), None) => {}
                (Some(other), _) => return Err(bad(format!("unknown sparse format {other}"))),
            }
        }
        Ok(entry)
    }

    /// GNU's old sparse form: four pieces in the header, 21 in each extension block.
    fn gnu_sparse(&mut self, h: &[u8; BLOCK], entry: &mut Entry) -> Result<()> {
        let mut pieces = Vec::new();
        let mut take = |area: &[u8]| -> Result<()> {
            for piece in area.chunks_exact(24) {
                if piece[0] != 0 {
                    pieces.push((unsigned(&piece[..12])?, unsigned(&piece[12..])?));
                }
            }
            if pieces.len() > PIECES_LIMIT {
                return Err(bad("too many pieces of a sparse file"));
            }
            Ok(())
        };
        take(&h[386..482])?;
        let mut more = h[482] != 0;
        while more {
            let mut block = [0u8; BLOCK];
            self.read_full(&mut block)?;
            entry.offset += BLOCK as u64;
            take(&block[..504])?;
            more = block[504] != 0;
        }
        let size = unsigned(&h[483..495])?;
        check_pieces(&pieces, size, entry.stored)?;
        entry.size = size;
        entry.pieces = Some(pieces);
        Ok(())
    }

    /// PAX sparse 1.0: the pieces stand as decimal lines in front of the data, padded to a block.
    fn pax_sparse(&mut self, pax: &Pax, entry: &mut Entry) -> Result<()> {
        let mut text = Vec::new();
        let mut block = [0u8; BLOCK];
        let mut next_number = |this: &mut Self, text: &mut Vec<u8>| -> Result<u64> {
            loop {
                if let Some(end) = text.iter().position(|b| *b == b'\n') {
                    let digits: Vec<u8> = text.drain(..=end).collect();
                    return decimal(&digits[..end]);
                }
                if this.left < BLOCK as u64 || text.len() > 4 * BLOCK {
                    return Err(bad("malformed sparse map"));
                }
                this.read_full(&mut block)?;
                this.left -= BLOCK as u64;
                text.extend_from_slice(&block);
            }
        };
        let count = next_number(self, &mut text)?;
        if count > PIECES_LIMIT as u64 {
            return Err(bad("too many pieces of a sparse file"));
        }
        let mut pieces = Vec::new();
        for _ in 0..count {
            pieces.push((next_number(self, &mut text)?, next_number(self, &mut text)?));
        }
        let size = pax.sparse_size.ok_or_else(|| bad("sparse file without its size"))?;
        check_pieces(&pieces, size, self.left)?;
        entry.offset = self.position;
        entry.stored = self.left;
        entry.size = size;
        entry.pieces = Some(pieces);
        if let Some(name) = &pax.sparse_name {
            entry.path = name.clone();
        }
        Ok(())
    }

    /// The next header block; None at the end mark or the end of the stream.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(Error::new(ErrorKind::UnexpectedEof, "the archive ends inside a header")),
                n => filled += n,
            }
        }
        self.position += BLOCK as u64;
        if let Some(tape) = &mut self.tape {
            tape.keep(&block)?;
        }
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let want = number(&block[148..156])?;
        let blanked = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
        let unsigned: i64 = block.iter().enumerate().map(|(i, b)| i64::from(blanked(i, *b))).sum();
        let signed: i64 = block.iter().enumerate().map(|(i, b)| i64::from(blanked(i, *b) as i8)).sum();
        if want != unsigned && want != signed {
            return Err(bad("header checksum mismatch"));
        }
        Ok(Some(block))
    }

    fn extension(&mut self, size: u64, budget: &mut u64) -> Result<Vec<u8>> {
        *budget = budget.checked_sub(size).ok_or_else(|| bad("extension headers of one entry exceed 1 MiB"))?;
        let mut data = vec![0u8; size as usize];
        self.read_full(&mut data)?;
        self.left = 0;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        self.skip_data()?;
        Ok(data)
    }

    fn skip_data(&mut self) -> Result<()> {
        let todo = self.left + self.padding;
        let done = self.skip(todo)?;
        // The padding of the very last entry may be cut off; its data may not.
        if done < self.left {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the archive ends inside a file"));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }
}

impl<R: Read + Seek> Tarball<BufReader<R>> {
    /// Skips the current entry's data without reading it. A cut archive shows when the data is read.
    pub fn seek_over_data(&mut self) -> Result<()> {
        let todo = self.left + self.padding;
        self.inner.seek_relative(i64::try_from(todo).map_err(|_| bad("size out of range"))?)?;
        self.position += todo;
        (self.left, self.padding) = (0, 0);
        Ok(())
    }
}

impl<R: BufRead> Tarball<R> {
    /// A stretch of the current entry's data without copying it, empty at its end; `consume` takes it.
    pub fn data(&mut self) -> Result<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let data = self.inner.fill_buf()?;
        if data.is_empty() {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the archive ends inside a file"));
        }
        let n = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        Ok(&data[..n])
    }

    /// `n` bytes of what `data` gave are done with.
    pub fn consume(&mut self, n: usize) -> Result<()> {
        if let Some(tape) = &mut self.tape {
            tape.pass(&self.inner.fill_buf()?[..n])?;
        }
        self.inner.consume(n);
        self.left -= n as u64;
        self.position += n as u64;
        Ok(())
    }
}

/// The data of the current entry.
impl<R: Read> Read for Tarball<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buffer[..want])?;
        if n == 0 {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the archive ends inside a file"));
        }
        self.left -= n as u64;
        self.position += n as u64;
        if let Some(tape) = &mut self.tape {
            tape.pass(&buffer[..n])?;
        }
        Ok(n)
    }
}

impl Pax {
    /// Bytes it takes.
    fn weight(&self) -> usize {
        let texts = [&self.path, &self.link, &self.sparse_name].into_iter().flatten().map(Vec::len).sum::<usize>();
        let xattrs = self.xattrs.iter().map(|(name, value)| name.len() + value.len() + size_of::<(Vec<u8>, Vec<u8>)>()).sum::<usize>();
        texts + xattrs + self.sparse_map.as_ref().map_or(0, |map| map.len() * size_of::<u64>())
    }

    /// One number of format 0.0; offset and length take turns.
    fn sparse_number(&mut self, turn: usize, value: &[u8]) -> Result<()> {
        let map = self.sparse_map.get_or_insert_default();
        if map.len() % 2 != turn {
            return Err(bad("malformed sparse map"));
        }
        map.push(decimal(value)?);
        Ok(())
    }

    /// Records are `length key=value\n`; the length counts itself, so values may hold any byte.
    fn apply(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() && data[0] != 0 {
            let blank = data.iter().take(20).position(|b| *b == b' ').ok_or_else(|| bad("malformed PAX record"))?;
            let length = decimal(&data[..blank])? as usize;
            if length <= blank + 2 || length > data.len() || data[length - 1] != b'\n' {
                return Err(bad("malformed PAX record"));
            }
            let record = &data[blank + 1..length - 1];
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(|| bad("malformed PAX record"))?;
            self.set(&record[..equals], &record[equals + 1..])?;
            data = &data[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        // An empty value takes back what a global header said.
        let text = || Some(value.to_vec()).filter(|v| !v.is_empty());
        let count = || if value.is_empty() { Ok(None) } else { decimal(value).map(Some) };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => self.size = count()?,
            b"uid" => self.uid = count()?,
            b"gid" => self.gid = count()?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(time(value)?) },
            b"GNU.sparse.major" => self.sparse_major = count()?,
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse_size = count()?,
            b"GNU.sparse.name" => self.sparse_name = text(),
            b"GNU.sparse.numblocks" => drop(self.sparse_map.get_or_insert_default()),
            b"GNU.sparse.offset" => self.sparse_number(0, value)?,
            b"GNU.sparse.numbytes" => self.sparse_number(1, value)?,
            b"GNU.sparse.map" => {
                let numbers = value.split(|b| *b == b',').filter(|n| !n.is_empty()).map(decimal);
                self.sparse_map = Some(numbers.collect::<Result<_>>()?);
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.retain(|(n, _)| n != name);
                    if self.xattrs.len() == XATTRS_LIMIT {
                        return Err(bad(format!("more than {XATTRS_LIMIT} attributes")));
                    }
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

/// PAX sparse 0.0 and 0.1: the pieces stand in the header.
fn old_sparse(pax: &Pax, map: &[u64], entry: &mut Entry) -> Result<()> {
    if map.len() % 2 != 0 || map.len() / 2 > PIECES_LIMIT {
        return Err(bad("malformed sparse map"));
    }
    let pieces: Vec<(u64, u64)> = map.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let size = pax.sparse_size.ok_or_else(|| bad("sparse file without its size"))?;
    check_pieces(&pieces, size, entry.stored)?;
    if let Some(name) = &pax.sparse_name {
        entry.path = name.clone();
    }
    entry.size = size;
    entry.pieces = Some(pieces);
    Ok(())
}

fn check_pieces(pieces: &[(u64, u64)], size: u64, stored: u64) -> Result<()> {
    let (mut end, mut sum) = (0u64, 0u64);
    for (offset, length) in pieces {
        let next = offset.checked_add(*length).ok_or_else(|| bad("sparse piece out of range"))?;
        if *offset < end || next > size {
            return Err(bad("sparse pieces overlap or exceed the file"));
        }
        end = next;
        sum += length;
    }
    if sum != stored {
        return Err(bad("sparse pieces do not add up to the data stored"));
    }
    Ok(())
}

fn until_nul(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

/// Octal text, or base 256 (two's complement) when the first bit is set.
fn number(field: &[u8]) -> Result<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value: i64 = if negative { -1 } else { 0 };
        for (i, byte) in field.iter().enumerate() {
            let byte = if i == 0 && !negative { byte & 0x7f } else { *byte };
            if value >> 54 != 0 && value >> 54 != -1 {
                return Err(bad("number out of range"));
            }
            value = (value << 8) | i64::from(byte);
        }
        return Ok(value);
    }
    let text = until_nul(field);
    let mut value: i64 = 0;
    for byte in text.iter().copied().skip_while(|b| *b == b' ').take_while(|b| *b != b' ') {
        if !(b'0'..=b'7').contains(&byte) {
            return Err(bad("malformed octal number"));
        }
        value = value.checked_mul(8).and_then(|v| v.checked_add(i64::from(byte - b'0'))).ok_or_else(|| bad("number out of range"))?;
    }
    Ok(value)
}

fn unsigned(field: &[u8]) -> Result<u64> {
    u64::try_from(number(field)?).map_err(|_| bad("negative number"))
}

fn device(field: &[u8]) -> Result<u32> {
    u32::try_from(number(field)?).map_err(|_| bad("device number out of range"))
}

fn id(pax: Option<u64>, field: &[u8]) -> Result<u32> {
    let value = match pax {
        Some(value) => value,
        None => unsigned(field)?,
    };
    // The highest value means "leave alone" to chown(2).
    u32::try_from(value).ok().filter(|v| *v != u32::MAX).ok_or_else(|| bad(format!("owner id {value} out of range")))
}

fn decimal(text: &[u8]) -> Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .filter(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|t| t.parse().ok())
        .ok_or_else(|| bad("malformed decimal number"))
}

/// `[-]seconds[.fraction]`, to the nanosecond.
fn time(text: &[u8]) -> Result<(i64, u32)> {
    let text = std::str::from_utf8(text).map_err(|_| bad("malformed time"))?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |t| (true, t));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds = decimal(whole.as_bytes()).ok().and_then(|s| i64::try_from(s).ok()).ok_or_else(|| bad("malformed time"))?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos = decimal(digits.as_bytes())? as i64;
    match (negative, nanos) {
        (false, _) => Ok((seconds, nanos as u32)),
        (true, 0) => Ok((-seconds, 0)),
        (true, _) => Ok((-seconds - 1, (1_000_000_000 - nanos) as u32)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(data: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>> {
        let mut tar = Tarball::new(data);
        let mut out = Vec::new();
        while let Some(entry) = tar.next_entry()? {
            let mut data = Vec::new();
            tar.read_to_end(&mut data)?;
            out.push((entry, data));
        }
        Ok(out)
    }

    #[test]
    fn reads_what_the_tar_crate_writes() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("dir/{}", "x".repeat(180));
        for (name, data) in [("a", &b"hello"[..]), (long.as_str(), &[7u8; 1000][..])] {
            let mut h = tar::Header::new_gnu();
            h.set_size(data.len() as u64);
            h.set_mode(0o4755);
            h.set_uid(1 << 20);
            h.set_gid(3_000_000);
            h.set_mtime(1_700_000_000);
            builder.append_data(&mut h, name, data).unwrap();
        }
        let value = b"\x01\x00\n\x02=\n";
        builder.append_pax_extensions([("SCHILY.xattr.security.capability", &value[..]), ("mtime", b"12.5")]).unwrap();
        let mut h = tar::Header::new_ustar();
        h.set_size(0);
        h.set_entry_type(tar::EntryType::Symlink);
        builder.append_link(&mut h, "l", "../target").unwrap();
        let all = read_all(&builder.into_inner().unwrap()).unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!((all[0].1.as_slice(), all[0].0.mode, all[0].0.gid, all[0].0.mtime.0), (&b"hello"[..], 0o4755, 3_000_000, 1_700_000_000));
        assert_eq!((all[1].0.path.as_slice(), all[1].1.len()), (long.as_bytes(), 1000));
        let link = &all[2].0;
        assert_eq!((link.kind, link.link.as_slice(), link.mtime), (Kind::Symlink, &b"../target"[..], (12, 500_000_000)));
        assert_eq!(link.xattrs, [(b"security.capability".to_vec(), value.to_vec())]);
    }

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b"   644 \0").unwrap(), 0o644);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]).unwrap(), 256);
        assert_eq!(number(&[0xff; 12]).unwrap(), -1);
        assert!(number(&[0x80, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(number(b"9\0").is_err());
        assert_eq!(time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert!(time(b"1.x").is_err() && time(b"").is_err());
    }

    #[test]
    fn cut_archives_are_errors() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut h = tar::Header::new_gnu();
        h.set_size(600);
        builder.append_data(&mut h, "a", &[1u8; 600][..]).unwrap();
        let data = builder.into_inner().unwrap();
        assert!(read_all(&data[..300]).is_err());
        assert!(read_all(&data[..900]).is_err());
        assert_eq!(read_all(&data[..512 + 600]).unwrap().len(), 1);
        assert!(read_all(&[]).unwrap().is_empty());
    }

    #[test]
    fn giant_extension_headers_are_refused() {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(tar::EntryType::XHeader);
        h.set_size(1 << 40);
        h.set_cksum();
        assert!(read_all(h.as_bytes()).unwrap_err().to_string().contains("1 MiB"));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(data in proptest::collection::vec(proptest::num::u8::ANY, 0..2048)) {
            let _ = read_all(&data);
        }

        #[test]
        fn pax_never_panics(data in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Pax::default().apply(&data);
        }
    }
}
