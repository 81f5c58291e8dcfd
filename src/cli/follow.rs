//! Reading a log file that is being written, renamed and written anew.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::failure::Outcome;
use super::log::{self, Sink};
use crate::error::{Context, Result};

/// Bytes read at a time.
const CHUNK: usize = 64 * 1024;
/// Longest line kept while its end is not there; the shim splits lines long before that.
const LINE_LIMIT: usize = 1 << 20;

/// A log file and how far it has been read.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    position: u64,
    /// The start of a line whose end has not been written yet.
    pending: Vec<u8>,
}

impl LogFile {
    /// Reads `path` from its start, or from where it last had `tail` lines. A file that is not there yet may come.
    pub fn open(path: &Path, tail: Option<usize>) -> Result<LogFile> {
        let mut log = LogFile { path: path.to_owned(), file: None, position: 0, pending: Vec::new() };
        log.reopen()?;
        if let (Some(file), Some(lines)) = (&mut log.file, tail) {
            log.position = tail_position(file, lines).context(|| format!("read {}", path.display()))?;
        }
        Ok(log)
    }

    /// Whether there was a file.
    pub fn exists(&self) -> bool {
        self.file.is_some()
    }

    /// Hands on all that has been written since the last time; true if there was something.
    pub fn pump(&mut self, sink: &mut Sink<'_>) -> Outcome<bool> {
        let mut any = self.read_on(sink)?;
        if self.replaced()? {
            // The old file got its last bytes before it was closed; they may be younger than the read above.
            any |= self.read_on(sink)?;
            self.end_line(sink)?;
            self.reopen()?;
            any |= self.read_on(sink)?;
        }
        if any {
            sink.flush()?;
        }
        Ok(any)
    }

    /// Hands on a last line without an end, when nothing more will come.
    pub fn finish(&mut self, sink: &mut Sink<'_>) -> Outcome<()> {
        self.end_line(sink)?;
        sink.flush()
    }

    fn end_line(&mut self, sink: &mut Sink<'_>) -> Outcome<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        sink.line(&std::mem::take(&mut self.pending))
    }

    fn read_on(&mut self, sink: &mut Sink<'_>) -> Outcome<bool> {
        let what = || format!("read {}", self.path.display());
        let Some(file) = &mut self.file else { return Ok(false) };
        if file.metadata().context(what)?.len() < self.position {
            // Truncated in place: what is there now is new.
            self.position = 0;
            self.pending.clear();
        }
        file.seek(SeekFrom::Start(self.position)).context(what)?;
        let mut chunk = vec![0; CHUNK];
        let mut any = false;
        loop {
            let count = match file.read(&mut chunk) {
                Ok(0) => return Ok(any),
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).context(what).map_err(Into::into),
            };
            any = true;
            self.position += count as u64;
            let mut rest = &chunk[..count];
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                self.pending.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                sink.line(&self.pending)?;
                self.pending.clear();
            }
            self.pending.extend_from_slice(rest);
            self.pending.truncate(LINE_LIMIT);
        }
    }

    /// Whether another file has come under the name.
    fn replaced(&self) -> Result<bool> {
        let named = match std::fs::metadata(&self.path) {
            Ok(named) => named,
            // Renamed, and the new file is still to come; or removed, which the container's state tells.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).context(|| format!("read {}", self.path.display())),
        };
        let Some(file) = &self.file else { return Ok(true) };
        let open = file.metadata().context(|| format!("read {}", self.path.display()))?;
        Ok((open.dev(), open.ino()) != (named.dev(), named.ino()))
    }

    fn reopen(&mut self) -> Result<()> {
        self.position = 0;
        self.file = match File::open(&self.path) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e).context(|| format!("open {}", self.path.display())),
        };
        Ok(())
    }
}

/// Where the last `lines` lines of the container begin, read backwards so that a long log costs nothing. A line in
/// parts counts once; a start that is not of the format counts as a line.
fn tail_position(file: &mut File, lines: usize) -> std::io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    // Bytes from `start` to the end of the earliest line that has not been looked at.
    let (mut start, mut held) = (length, Vec::new());
    let (mut seen, mut begin) = (0, length);
    while start > 0 {
        let step = start.min(CHUNK as u64);
        start -= step;
        let mut chunk = vec![0; step as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut chunk)?;
        chunk.append(&mut held);
        held = chunk;
        loop {
            let body = held.strip_suffix(b"\n").unwrap_or(&held);
            let from = match body.iter().rposition(|byte| *byte == b'\n') {
                Some(newline) => newline + 1,
                None if start == 0 && !held.is_empty() => 0,
                None => break,
            };
            // The end of a line opens the next of the wanted ones; parts before it belong to it.
            let ends = log::parse(&body[from..]).is_none_or(|record| !record.partial);
            if ends || begin == length {
                if seen == lines {
                    return Ok(begin);
                }
                seen += 1;
            }
            begin = start + from as u64;
            held.truncate(from);
        }
    }
    Ok(begin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const T: &str = "2026-01-02T03:04:05.000000006Z";

    fn records(lines: &[&str]) -> String {
        lines.iter().map(|line| format!("{T} stdout {line}\n")).collect()
    }

    fn read(log: &mut LogFile) -> String {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        log.pump(&mut Sink::new(&mut out, &mut err, false)).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn growth_rotation_and_truncation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.log");
        let mut log = LogFile::open(&path, None).unwrap();
        assert!(!log.exists());
        assert_eq!(read(&mut log), "");
        let mut file = File::create(&path).unwrap();
        file.write_all(records(&["F one", "P tw"]).as_bytes()).unwrap();
        assert_eq!(read(&mut log), "one\ntw");
        // Half a record waits for its end.
        file.write_all(&records(&["F o"]).as_bytes()[..20]).unwrap();
        assert_eq!(read(&mut log), "");
        file.write_all(&records(&["F o"]).as_bytes()[20..]).unwrap();
        assert_eq!(read(&mut log), "o\n");
        std::fs::rename(&path, dir.path().join("c.log.1")).unwrap();
        file.write_all(records(&["F old"]).as_bytes()).unwrap();
        std::fs::write(&path, records(&["F new"])).unwrap();
        assert_eq!(read(&mut log), "old\nnew\n");
        std::fs::write(&path, records(&["F x"])).unwrap();
        assert_eq!(read(&mut log), "x\n");
    }

    #[test]
    fn tails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.log");
        std::fs::write(&path, records(&["F one", "P t", "P w", "F o", "F three"])).unwrap();
        for (lines, text) in [(0, ""), (1, "three\n"), (2, "two\nthree\n"), (3, "one\ntwo\nthree\n"), (9, "one\ntwo\nthree\n")] {
            assert_eq!(read(&mut LogFile::open(&path, Some(lines)).unwrap()), text, "{lines}");
        }
        // A last line without an end is one of them.
        std::fs::write(&path, records(&["F one", "P t", "P w"])).unwrap();
        assert_eq!(read(&mut LogFile::open(&path, Some(1)).unwrap()), "tw");
        std::fs::write(&path, "").unwrap();
        assert_eq!(read(&mut LogFile::open(&path, Some(1)).unwrap()), "");
        // Over several chunks.
        let long = "y".repeat(3000);
        let many: Vec<String> = (0..100).map(|n| format!("F {n} {long}")).collect();
        std::fs::write(&path, records(&many.iter().map(String::as_str).collect::<Vec<_>>())).unwrap();
        assert_eq!(read(&mut LogFile::open(&path, Some(60)).unwrap()).lines().next().unwrap(), format!("40 {long}"));
    }
}
