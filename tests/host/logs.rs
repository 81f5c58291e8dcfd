//! Reads container logs in the CRI's form.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One line as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339 with nanoseconds, UTC: such times compare as text.
    pub time: String,
    pub stream: String,
    /// `F`, or `P` for a part of a line.
    pub tag: String,
    pub text: String,
}

/// The log file of one container.
#[derive(Debug, Clone)]
pub struct Log(pub PathBuf);

impl Log {
    pub fn lines(&self) -> Vec<Line> {
        parse(&self.0)
    }

    /// The text of a stream, parts joined.
    pub fn text(&self, stream: &str) -> String {
        let mut text = String::new();
        for line in self.lines().into_iter().filter(|line| line.stream == stream) {
            text += &line.text;
            text += if line.tag == "F" { "\n" } else { "" };
        }
        text
    }

    /// Waits until some line has `text`.
    pub fn wait_for(&self, text: &str) {
        let begin = Instant::now();
        while !self.lines().iter().any(|line| line.text.contains(text)) {
            assert!(
                begin.elapsed() < crate::daemon::patience(Duration::from_secs(20)),
                "no {text:?} in {}: {:?}",
                self.0.display(),
                self.lines()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn parse(path: &Path) -> Vec<Line> {
    let text = fs::read_to_string(path).unwrap_or_default();
    // What has no newline yet is still being written.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.split('\n').filter(|line| !line.is_empty());
    lines.map(|line| parse_line(line).unwrap_or_else(|| panic!("not a log line: {line:?}"))).collect()
}

fn parse_line(line: &str) -> Option<Line> {
    let mut parts = line.splitn(4, ' ').map(str::to_owned);
    let line = Line { time: parts.next()?, stream: parts.next()?, tag: parts.next()?, text: parts.next()? };
    let stamp = line.time.as_bytes();
    let timed = stamp.len() >= 20 && stamp[10] == b'T' && (stamp.ends_with(b"Z") || line.time.contains('+'));
    (timed && ["stdout", "stderr"].contains(&line.stream.as_str()) && ["F", "P"].contains(&line.tag.as_str())).then_some(line)
}

#[test]
fn a_line_has_four_parts() {
    let line = parse_line("2026-01-02T03:04:05.000000006Z stdout F a b").expect("a log line");
    assert_eq!((line.stream.as_str(), line.tag.as_str(), line.text.as_str()), ("stdout", "F", "a b"));
    assert_eq!(parse_line("2026-01-02T03:04:05.000000006Z stdout X a b"), None);
    assert_eq!(parse_line("stdout F a b"), None);
}
