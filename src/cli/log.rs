//! The CRI log format: `TIME STREAM TAGS TEXT`, one record per line, tag P for a part of a line and F for its end.

use std::io::Write;

use super::failure::{Failure, Outcome};

/// Which of a container's outputs a record is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One line of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// RFC 3339 with nanoseconds, as it was written.
    pub time: &'a str,
    pub stream: Stream,
    /// The line of the container goes on in the next record of this stream.
    pub partial: bool,
    pub text: &'a [u8],
}

/// Reads one line, without its newline. None if it is not of the format.
pub fn parse(line: &[u8]) -> Option<Record<'_>> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    // Enough to tell a record from text that happens to have three words: 2026-01-02T…
    if time.len() < 20 || time.as_bytes()[4] != b'-' || time.as_bytes()[10] != b'T' {
        return None;
    }
    let stream = match fields.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    // The format leaves room for more tags after a colon.
    let partial = match fields.next()?.split(|byte| *byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Record { time, stream, partial, text: fields.next().unwrap_or_default() })
}

/// Where the two outputs of a container go.
pub struct Sink<'a> {
    pub stdout: &'a mut dyn Write,
    pub stderr: &'a mut dyn Write,
    /// Put the time before each line.
    pub times: bool,
    /// The last record written was a part of a line.
    inside: bool,
    /// A line that is not of the format has been complained about.
    warned: bool,
}

impl<'a> Sink<'a> {
    pub fn new(stdout: &'a mut dyn Write, stderr: &'a mut dyn Write, times: bool) -> Sink<'a> {
        Sink { stdout, stderr, times, inside: false, warned: false }
    }

    /// Writes what one line of the log file says. A foreign line is left out, with one warning for all.
    pub fn line(&mut self, line: &[u8]) -> Outcome<()> {
        let Some(record) = parse(line) else {
            if !std::mem::replace(&mut self.warned, true) {
                super::failure::warn("the log has lines that are not in the CRI log format; they are left out");
            }
            return Ok(());
        };
        let writer = match record.stream {
            Stream::Stdout => &mut *self.stdout,
            Stream::Stderr => &mut *self.stderr,
        };
        if self.times && !self.inside {
            writer.write_all(format!("{} ", record.time).as_bytes()).map_err(Failure::output)?;
        }
        writer.write_all(record.text).map_err(Failure::output)?;
        if !record.partial {
            writer.write_all(b"\n").map_err(Failure::output)?;
        }
        self.inside = record.partial;
        Ok(())
    }

    /// Hands on what the writers hold back.
    pub fn flush(&mut self) -> Outcome<()> {
        self.stdout.flush().and_then(|()| self.stderr.flush()).map_err(Failure::output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: &str = "2026-01-02T03:04:05.000000006Z";

    #[test]
    fn records() {
        let record = |stream, partial, text| Some(Record { time: T, stream, partial, text });
        for (rest, expected) in [
            (" stdout F hello world", record(Stream::Stdout, false, &b"hello world"[..])),
            (" stderr P  two spaces ", record(Stream::Stderr, true, b" two spaces ")),
            (" stdout F ", record(Stream::Stdout, false, b"")),
            (" stdout F", record(Stream::Stdout, false, b"")),
            (" stdout P:more F", record(Stream::Stdout, true, b"F")),
            (" stdin F x", None),
            (" stdout X x", None),
            (" stdout", None),
            ("", None),
        ] {
            assert_eq!(parse(format!("{T}{rest}").as_bytes()), expected, "{rest}");
        }
        assert_eq!(parse(b"{\"log\":\"x\"} stdout F x"), None);
        assert_eq!(parse(b"short stdout F x"), None);
        assert_eq!(parse(b"\xff\xfe stdout F x"), None);
        assert_eq!(parse(b"2026-01-02T03:04:05.000000006+02:00 stdout F \xff").unwrap().text, b"\xff");
    }

    #[test]
    fn parts_are_joined_and_streams_kept_apart() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut sink = Sink::new(&mut out, &mut err, false);
        for line in ["stdout P ab", "stdout F cd", "stderr F e", "stdout F ", "stdout P last"] {
            sink.line(format!("{T} {line}").as_bytes()).unwrap();
        }
        assert_eq!((out.as_slice(), err.as_slice()), (&b"abcd\n\nlast"[..], &b"e\n"[..]));
    }

    #[test]
    fn times_come_once_per_line() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut sink = Sink::new(&mut out, &mut err, true);
        for line in ["stdout P ab", "stdout F cd"] {
            sink.line(format!("{T} {line}").as_bytes()).unwrap();
        }
        assert_eq!(String::from_utf8(out).unwrap(), format!("{T} abcd\n"));
    }
}
