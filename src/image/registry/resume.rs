//! The stream of a layer: when its connection breaks, stalls or ends early, it goes on where it was, at the same host or at
//! the next one, as long as it gets on.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use ureq::http::{Response, StatusCode};
use ureq::{Body, BodyReader};

use super::endpoint::Ask;
use super::retry::{again, next, unavailable, Attempt, Pace, Verdict};
use super::{Remote, Source};
use crate::error::{Error, Result};
use crate::image::layers::{Breaks, Fault, Stream};
use crate::image::manifest::Descriptor;
use crate::sys::lock::{Lock, Rank};
use crate::telemetry;

/// Bytes that make a download one that gets on: its attempts are counted anew.
const HEADWAY: u64 = 1 << 20;

/// Opens the stream at the first source that has it.
pub(super) fn open(remote: &Arc<Remote>, sources: Vec<Source>, descriptor: &Descriptor) -> Result<Stream> {
    let fault: Fault = Arc::new(Lock::new(Rank::Leaf, None));
    let mut download = Download {
        remote: remote.clone(),
        sources,
        at: 0,
        body: None,
        skip: 0,
        exact: false,
        done: 0,
        size: descriptor.size,
        failures: 0,
        gained: 0,
        pace: Pace::new(remote.site.stall),
        stalled: false,
        what: format!("blob {}", descriptor.digest),
        fault: fault.clone(),
        breaks: Breaks::default(),
    };
    download.connect(0)?;
    let breaks = download.breaks.clone();
    Ok(Stream { reader: Box::new(download), fault, breaks })
}

struct Download {
    remote: Arc<Remote>,
    sources: Vec<Source>,
    /// The source that is being read.
    at: usize,
    body: Option<BodyReader<'static>>,
    /// Bytes to throw away first: this answer begins before what is needed.
    skip: u64,
    /// Whether the length of the answer was told, and so agrees with the size.
    exact: bool,
    done: u64,
    size: u64,
    /// Breaks without headway in between.
    failures: u32,
    /// Bytes since the last break.
    gained: u64,
    pace: Pace,
    /// The last read was one too slow.
    stalled: bool,
    what: String,
    fault: Fault,
    /// For whoever shows progress.
    breaks: Breaks,
}

/// An opened answer.
struct Opened {
    body: BodyReader<'static>,
    skip: u64,
    exact: bool,
}

impl Download {
    /// Opens an answer that has the byte `done`, from source `start` on.
    fn connect(&mut self, start: usize) -> Result<()> {
        let (remote, what, done, size) = (&self.remote, self.what.as_str(), self.done, self.size);
        let (at, opened) = remote.rounds(&self.sources, start, |i, source| match open_at(source, done, size, what) {
            Ok(opened) => Ok((i, opened)),
            // Somebody had it a moment ago.
            Err(failure) if done > 0 && failure.verdict == Verdict::Next => Err(again(failure.error)),
            Err(failure) => Err(failure),
        })?;
        (self.at, self.body, self.skip, self.exact) = (at, Some(opened.body), opened.skip, opened.exact);
        self.pace = Pace::new(self.remote.site.stall);
        Ok(())
    }

    /// After a break: waits when it was not the first, and connects again. `why` is told when there is no use in it.
    fn reconnect(&mut self, why: &str) -> Result<()> {
        self.body = None;
        self.failures = if self.gained >= HEADWAY { 1 } else { self.failures + 1 };
        self.gained = 0;
        let retries = self.remote.site.retries;
        let host = &self.sources[self.at].endpoint.authority;
        if self.failures >= retries.attempts {
            return Err(unavailable(format!("{} from {host}: {why}, at byte {} of {}", self.what, self.done, self.size)));
        }
        log::info!("image: {} from {host}: {why}; going on at byte {} of {}", self.what, self.done, self.size);
        telemetry::pull_resumed();
        self.breaks.broke(self.done);
        // The same host once more, at once; after that the others, in turn.
        let mut start = self.at;
        if self.failures > 1 {
            self.remote.site.cancel.sleep(retries.wait(self.failures - 1))?;
            start = (self.at + 1) % self.sources.len();
        }
        self.connect(start)
    }

    fn next(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            self.remote.site.cancel.check()?;
            let left = self.size - self.done;
            if left == 0 {
                // The end was told: reading it gives the connection back to its pool.
                if let Some(mut body) = self.body.take().filter(|_| self.exact) {
                    let _ = body.read(&mut [0]);
                }
                return Ok(0);
            }
            let Some(body) = &mut self.body else { return Err(unavailable(format!("{}: given up", self.what))) };
            if std::mem::take(&mut self.stalled) {
                self.reconnect("hardly anything comes")?;
                continue;
            }
            let want = if self.skip > 0 { self.skip } else { left }.min(buffer.len() as u64) as usize;
            let begin = Instant::now();
            let why = match body.read(&mut buffer[..want]) {
                Ok(0) => "ended early".to_owned(),
                Ok(n) => {
                    telemetry::pull_received(n as u64);
                    let fast_enough = self.pace.add(n, begin);
                    if self.skip > 0 {
                        self.skip -= n as u64;
                        if fast_enough {
                            continue;
                        }
                        "hardly anything comes".to_owned()
                    } else {
                        self.done += n as u64;
                        self.gained += n as u64;
                        // What came is passed on; the next read connects anew.
                        self.stalled = !fast_enough;
                        return Ok(n);
                    }
                }
                Err(e) => e.to_string(),
            };
            self.remote.site.cancel.check()?;
            self.reconnect(&why)?;
        }
    }
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        self.next(buffer).map_err(|error| {
            let text = error.to_string();
            self.fault.lock().get_or_insert(error);
            std::io::Error::other(text)
        })
    }
}

fn open_at(source: &Source, done: u64, size: u64, what: &str) -> Attempt<Opened> {
    let endpoint = &source.endpoint;
    let ask = |offset| endpoint.get(&Ask { url: &source.url, accept: "*/*", offset, has_digest: true, what });
    let response = ask(done)?;
    let wrong = |why: String| next(Error::precondition(format!("{what}: {} {why}", endpoint.authority)));
    let length = response.body().content_length();
    if response.status() != StatusCode::OK {
        match part(&response, done, size) {
            Ok(expected) if length.is_none_or(|length| length == expected) => {
                return Ok(Opened { body: response.into_body().into_reader(), skip: 0, exact: length.is_some() });
            }
            Ok(expected) => log::debug!("image: {}", wrong(format!("sends {} bytes of a range of {expected}", length.unwrap_or(0))).error),
            Err(why) => log::debug!("image: {}", wrong(why).error),
        }
    }
    // It does not know ranges, or does not know them well: all of it again.
    let response = if response.status() == StatusCode::OK { response } else { ask(0)? };
    let length = response.body().content_length();
    if let Some(length) = length.filter(|l| *l != size) {
        return Err(wrong(format!("sends {length} bytes, the manifest says {size}")));
    }
    Ok(Opened { body: response.into_body().into_reader(), skip: done, exact: length.is_some() })
}

/// The length of a partial answer that begins at `done`; else what is wrong with it.
fn part(response: &Response<Body>, done: u64, size: u64) -> std::result::Result<u64, String> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Err(format!("answers {} to a range", response.status().as_u16()));
    }
    let range = response.headers().get("content-range").and_then(|v| v.to_str().ok()).and_then(content_range);
    let Some((first, last, total)) = range else { return Err("sends a part without saying which".to_owned()) };
    if first != done || total.is_some_and(|total| total != size) || last >= size {
        let total = total.map_or("*".to_owned(), |t| t.to_string());
        return Err(format!("sends bytes {first}-{last} of {total}, asked for {done}- of {size}"));
    }
    Ok(last + 1 - first)
}

/// First and last byte and the whole length (None: `*`) of a Content-Range (RFC 9110, 14.4).
pub fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let total = if total == "*" { None } else { Some(number(total)?) };
    let (first, last) = (number(first)?, number(last)?);
    (unit.eq_ignore_ascii_case("bytes") && first <= last && last < u64::MAX && total.is_none_or(|total| last < total))
        .then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 2-5/10"), Some((2, 5, Some(10))));
        assert_eq!(content_range("Bytes 0-0/*"), Some((0, 0, None)));
        for bad in ["", "bytes", "bytes 5-2/10", "bytes 2-10/10", "bytes */10", "bytes -1-2/10", "items 1-2/3", "bytes +1-2/3", "bytes 1-2"]
        {
            assert_eq!(content_range(bad), None, "{bad:?}");
        }
    }
}
