//! The container log in CRI's format: `2026-01-02T03:04:05.000000006Z stdout F text`. Tag P marks a piece of a longer line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Context, Error, Result};

/// Longest text on one line, bytes; longer lines are split.
pub const LINE_LIMIT: usize = 16 * 1024;
/// Formatted bytes written at once.
const BATCH: usize = 16 * 1024;

/// The log file, or nothing.
pub struct Log {
    file: Option<File>,
    batch: Vec<u8>,
    stamp: Stamp,
    /// The last write ended inside a line.
    torn: bool,
}

impl Log {
    pub fn open(path: Option<&Path>) -> Result<Log> {
        let file = path.map(open_file).transpose()?;
        Ok(Log { file, batch: Vec::new(), stamp: Stamp::default(), torn: false })
    }

    /// Goes on in a new file; what was taken before is in the old one. On an error the old one stays.
    pub fn reopen(&mut self, path: &Path) -> Result<()> {
        let file = open_file(path)?;
        self.write_out();
        self.file = Some(file);
        self.torn = false;
        Ok(())
    }

    /// Adds a line to the batch. `whole`: it ended with a newline.
    fn line(&mut self, tag: &str, whole: bool, text: &[u8]) {
        if self.file.is_none() {
            return;
        }
        if self.batch.len() + text.len() > BATCH {
            self.write_out();
        }
        self.batch.extend_from_slice(self.stamp.text());
        self.batch.push(b' ');
        self.batch.extend_from_slice(tag.as_bytes());
        self.batch.extend_from_slice(if whole { b" F " } else { b" P " });
        self.batch.extend_from_slice(text);
        self.batch.push(b'\n');
    }

    /// Writes the batch. A full disk loses lines; it must not stop the container, so nobody is told.
    fn write_out(&mut self) {
        let Some(file) = &mut self.file else { return };
        if self.torn && !self.batch.is_empty() {
            // Ends the line that a full disk cut, so that the next one can be read.
            self.batch.insert(0, b'\n');
        }
        let mut sent = 0;
        while sent < self.batch.len() {
            match file.write(&self.batch[sent..]) {
                Ok(0) => break,
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if sent > 0 {
            self.torn = self.batch[sent - 1] != b'\n';
        }
        self.batch.clear();
    }
}

/// O_NOFOLLOW: the directory may belong to somebody who makes links. O_NONBLOCK: a FIFO must not hold us.
fn open_file(path: &Path) -> Result<File> {
    let what = || format!("open log {}", path.display());
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .context(what)?;
    if !file.metadata().context(what)?.is_file() {
        return Err(Error::internal(format!("{}: not a regular file", what())));
    }
    Ok(file)
}

/// One output of the container on its way to the log.
pub struct Output<R> {
    reader: R,
    tag: &'static str,
    /// The start of a line whose end has not come. One byte more than a line may hold, to see the newline after a full one.
    line: Vec<u8>,
    filled: usize,
}

/// What a reader had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Nothing more for now.
    Idle,
    End,
}

/// Reads of one `pump`: the loop has other things to look at.
const READS: usize = 32;

impl<R: Read> Output<R> {
    /// `tag`: stdout or stderr.
    pub fn new(reader: R, tag: &'static str) -> Output<R> {
        Output { reader, tag, line: Vec::new(), filled: 0 }
    }

    pub fn reader(&self) -> &R {
        &self.reader
    }

    /// Moves what is there to the log, with one write per read or so. Each piece is also shown to `tap`, which says whether to
    /// go on now.
    pub fn pump(&mut self, log: &mut Log, tap: &mut dyn FnMut(&[u8]) -> bool) -> Pumped {
        if self.line.is_empty() {
            self.line = vec![0; LINE_LIMIT + 1];
        }
        for _ in 0..READS {
            let n = match self.reader.read(&mut self.line[self.filled..]) {
                Ok(0) => return Pumped::End,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Pumped::Idle,
                // A terminal whose last user is gone answers EIO.
                Err(_) => return Pumped::End,
            };
            let go_on = tap(&self.line[self.filled..self.filled + n]);
            self.take(n, log);
            if !go_on {
                break;
            }
        }
        Pumped::Idle
    }

    /// Takes `n` new bytes behind the filled ones.
    fn take(&mut self, n: usize, log: &mut Log) {
        if log.file.is_none() {
            return;
        }
        log.stamp.now();
        let (mut begin, mut search) = (0, self.filled);
        self.filled += n;
        while let Some(at) = newline(&self.line[search..self.filled]) {
            log.line(self.tag, true, &self.line[begin..search + at]);
            begin = search + at + 1;
            search = begin;
        }
        if self.filled - begin > LINE_LIMIT {
            log.line(self.tag, false, &self.line[begin..begin + LINE_LIMIT]);
            begin += LINE_LIMIT;
        }
        self.line.copy_within(begin..self.filled, 0);
        self.filled -= begin;
        log.write_out();
    }

    /// Writes a last line that has no newline.
    pub fn finish(&mut self, log: &mut Log) {
        if self.filled > 0 {
            log.stamp.now();
            log.line(self.tag, false, &self.line[..self.filled]);
            log.write_out();
            self.filled = 0;
        }
    }
}

/// Where the first newline is: found by the C library, many bytes at a time.
fn newline(mut text: &[u8]) -> Option<usize> {
    let whole = text;
    let end = text.skip_until(b'\n').unwrap_or_default();
    (end > 0 && whole[end - 1] == b'\n').then(|| end - 1)
}

/// The time as text, RFC 3339 with nanoseconds in UTC. The part down to the second is computed once a second.
struct Stamp {
    second: u64,
    text: [u8; 30],
}

impl Default for Stamp {
    fn default() -> Stamp {
        let mut stamp = Stamp { second: 0, text: *b"1970-01-01T00:00:00.000000000Z" };
        stamp.now();
        stamp
    }
}

impl Stamp {
    fn text(&self) -> &[u8] {
        &self.text
    }

    fn now(&mut self) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.set(since.as_secs(), since.subsec_nanos());
    }

    fn set(&mut self, second: u64, nanos: u32) {
        if second != self.second {
            self.second = second;
            let (year, month, day) = date(second / 86_400);
            let time = second % 86_400;
            digits(&mut self.text[0..4], year);
            digits(&mut self.text[5..7], month);
            digits(&mut self.text[8..10], day);
            digits(&mut self.text[11..13], time / 3600);
            digits(&mut self.text[14..16], time / 60 % 60);
            digits(&mut self.text[17..19], time % 60);
        }
        digits(&mut self.text[20..29], nanos.into());
    }
}

/// Writes `value` right-aligned with zeros in front.
fn digits(place: &mut [u8], mut value: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Year, month, day of a day since 1970 in the Gregorian calendar. Years are counted from March, so that the leap day is
/// the last one, in cycles of 400 years = 146,097 days.
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // days since 0000-03-01
    let (cycle, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153; // 0 = March
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let calendar = if month < 10 { month + 3 } else { month - 9 };
    (cycle * 400 + year + u64::from(calendar <= 2), calendar, of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp_of(second: u64, nanos: u32) -> String {
        let mut stamp = Stamp::default();
        stamp.set(second, nanos);
        String::from_utf8(stamp.text().to_vec()).unwrap()
    }

    #[test]
    fn stamps() {
        assert_eq!(stamp_of(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(stamp_of(951_782_400, 6), "2000-02-29T00:00:00.000000006Z");
        assert_eq!(stamp_of(1_767_225_599, 999_999_999), "2025-12-31T23:59:59.999999999Z");
        assert_eq!(stamp_of(4_107_542_400, 0), "2100-03-01T00:00:00.000000000Z");
    }

    /// Feeds the pieces one read each.
    fn log_of(pieces: &[&[u8]]) -> Vec<String> {
        struct Pieces<'a>(std::slice::Iter<'a, &'a [u8]>, &'a [u8]);
        impl Read for Pieces<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                if self.1.is_empty() {
                    self.1 = self.0.next().copied().unwrap_or_default();
                }
                self.1.read(buffer)
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::open(Some(&path)).unwrap();
        let mut output = Output::new(Pieces(pieces.iter(), &[]), "stdout");
        while output.pump(&mut log, &mut |_| true) != Pumped::End {}
        output.finish(&mut log);
        let text = std::fs::read_to_string(&path).unwrap();
        text.split_terminator('\n').map(|l| l[31..].to_owned()).collect()
    }

    #[test]
    fn lines_and_pieces() {
        assert_eq!(log_of(&[b"a\nb", b"c\n\n", b"end"]), ["stdout F a", "stdout F bc", "stdout F ", "stdout P end"]);
        assert!(log_of(&[]).is_empty());
    }

    #[test]
    fn long_lines_are_split_and_lose_nothing() {
        let exact = [vec![b'x'; LINE_LIMIT], b"\n".to_vec()].concat();
        assert_eq!(log_of(&[&exact]), [format!("stdout F {}", "x".repeat(LINE_LIMIT))]);
        let long = vec![b'y'; 1 << 20];
        let lines = log_of(&[&long]);
        assert_eq!(lines.iter().map(|l| l.len() - "stdout P ".len()).sum::<usize>(), 1 << 20);
        assert!(lines.iter().all(|l| l.starts_with("stdout P ") && l.len() <= LINE_LIMIT + 9));
    }

    #[test]
    fn reopen_keeps_the_old_on_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("1"), dir.path().join("2"));
        let mut log = Log::open(Some(&one)).unwrap();
        log.line("stdout", true, b"old");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(log.reopen(&dir.path().join("link")).is_err());
        log.reopen(&two).unwrap();
        log.line("stderr", true, b"new");
        log.write_out();
        assert!(std::fs::read_to_string(one).unwrap().ends_with(" stdout F old\n"));
        assert!(std::fs::read_to_string(two).unwrap().ends_with(" stderr F new\n"));
    }

    #[test]
    fn without_a_file_output_is_dropped() {
        let mut log = Log::open(None).unwrap();
        let mut output = Output::new(&b"a\nb"[..], "stdout");
        assert_eq!(output.pump(&mut log, &mut |_| true), Pumped::End);
        assert!(log.batch.is_empty());
    }

    #[test]
    fn a_full_disk_stops_nothing() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut log = Log { file: Some(file), batch: vec![], stamp: Stamp::default(), torn: false };
        let mut output = Output::new(&b"a\nb\n"[..], "stdout");
        assert_eq!(output.pump(&mut log, &mut |_| true), Pumped::End);
        assert!(log.batch.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn nothing_is_lost(pieces in proptest::collection::vec(proptest::collection::vec(proptest::char::range('\n', 'a'), 0..300), 0..8)) {
            let pieces: Vec<Vec<u8>> = pieces.into_iter().map(|p| p.into_iter().map(|c| c as u8).collect()).collect();
            let whole: Vec<u8> = pieces.concat();
            let lines = log_of(&pieces.iter().filter(|p| !p.is_empty()).map(Vec::as_slice).collect::<Vec<_>>());
            let mut back = String::new();
            for line in lines {
                back.push_str(&line[9..]);
                if line.starts_with("stdout F") {
                    back.push('\n');
                }
            }
            proptest::prop_assert_eq!(back.into_bytes(), whole);
        }
    }
}
