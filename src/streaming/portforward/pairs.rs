//! Pairs of streams: a connection needs one for data and one for errors with the same request id.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::streaming::wire::StreamId;

/// What the second stream of a pair may take, as in Go's servers.
const PATIENCE: Duration = Duration::from_secs(30);
/// Streams that wait for their other half.
const LIMIT: usize = 512;

/// Half of a pair.
#[derive(Debug)]
struct Half {
    data: Option<StreamId>,
    error: Option<StreamId>,
    port: u16,
    until: Instant,
    early: Early,
}

/// What the client has sent before the pair was complete.
#[derive(Debug, Default)]
pub struct Early {
    pub bytes: Vec<Vec<u8>>,
    pub finished: bool,
}

/// Both streams of a request.
#[derive(Debug)]
pub struct Pair {
    pub data: StreamId,
    pub error: StreamId,
    pub port: u16,
    pub early: Early,
}

/// What came of an opened stream.
#[derive(Debug)]
pub enum Added {
    Half,
    Whole(Pair),
    /// Why the stream is reset.
    Refused(&'static str),
}

/// Pairs that are not complete.
#[derive(Default)]
pub struct Pairs(HashMap<String, Half>);

impl Pairs {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A stream with these headers (names in any case: SPDY sends them in lower case).
    pub fn add(&mut self, stream: StreamId, headers: &[(String, String)], now: Instant) -> Added {
        let header = |name: &str| headers.iter().find(|h| h.0.eq_ignore_ascii_case(name)).map(|h| h.1.as_str());
        let Some(port) = header("port").and_then(|p| p.parse::<u16>().ok()).filter(|p| *p > 0) else {
            return Added::Refused("no port from 1 to 65535");
        };
        let is_data = match header("streamType") {
            Some("data") => true,
            Some("error") => false,
            _ => return Added::Refused("neither data nor error"),
        };
        let request = match header("requestID").filter(|id| !id.is_empty()) {
            Some(id) => id.to_owned(),
            // Clients of before request ids open the error stream and then the data stream.
            None => stream.saturating_sub(if is_data { 2 } else { 0 }).to_string(),
        };
        if !self.0.contains_key(&request) && self.0.len() >= LIMIT {
            return Added::Refused("too many streams without their other half");
        }
        let half = self.0.entry(request.clone()).or_insert_with(|| Half {
            data: None,
            error: None,
            port,
            until: now + PATIENCE,
            early: Early::default(),
        });
        let place = if is_data { &mut half.data } else { &mut half.error };
        if place.is_some() {
            return Added::Refused("a second stream of the same kind");
        }
        *place = Some(stream);
        if is_data {
            half.port = port;
        }
        let (Some(data), Some(error)) = (half.data, half.error) else { return Added::Half };
        let port = half.port;
        let early = self.0.remove(&request).map(|h| h.early).unwrap_or_default();
        Added::Whole(Pair { data, error, port, early })
    }

    /// Where the data of a stream waits, if it is half of a pair.
    pub fn early(&mut self, stream: StreamId) -> Option<&mut Early> {
        self.0.values_mut().find(|h| h.data == Some(stream)).map(|h| &mut h.early)
    }

    /// The client has reset a stream: its other half goes too. Gives the streams and the bytes of theirs that nobody will use.
    pub fn remove(&mut self, stream: StreamId) -> Option<(Vec<StreamId>, usize)> {
        let request = self.0.iter().find(|(_, h)| h.data == Some(stream) || h.error == Some(stream)).map(|(r, _)| r.clone())?;
        self.0.remove(&request).map(|half| gone(&half))
    }

    /// Halves that have waited too long, as for `remove`.
    pub fn expired(&mut self, now: Instant) -> Vec<(Vec<StreamId>, usize)> {
        let mut old = Vec::new();
        self.0.retain(|_, half| {
            if half.until <= now {
                old.push(gone(half));
            }
            half.until > now
        });
        old
    }

    /// When the next half expires.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.values().map(|h| h.until).min()
    }
}

fn gone(half: &Half) -> (Vec<StreamId>, usize) {
    (half.data.into_iter().chain(half.error).collect(), half.early.bytes.iter().map(Vec::len).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &str, port: &str, request: &str) -> Vec<(String, String)> {
        [("streamtype", kind), ("port", port), ("requestid", request)].map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec()
    }

    #[test]
    fn pairs_by_request() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        assert!(matches!(pairs.add(1, &headers("error", "80", "0"), now), Added::Half));
        assert!(matches!(pairs.add(3, &headers("data", "81", "1"), now), Added::Half));
        assert!(matches!(pairs.add(5, &headers("data", "82", "1"), now), Added::Refused(_)));
        let Added::Whole(pair) = pairs.add(7, &headers("data", "80", "0"), now) else { panic!("no pair") };
        assert_eq!((pair.data, pair.error, pair.port), (7, 1, 80));
        pairs.early(3).unwrap().bytes.push(vec![0; 10]);
        assert!(pairs.expired(now + PATIENCE / 2).is_empty());
        assert_eq!(pairs.expired(now + PATIENCE), [(vec![3], 10)]);
        assert!(pairs.is_empty());
    }

    #[test]
    fn pairs_without_a_request_id() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        assert!(matches!(pairs.add(5, &headers("error", "80", ""), now), Added::Half));
        assert!(matches!(pairs.add(7, &headers("data", "80", ""), now), Added::Whole(Pair { data: 7, error: 5, .. })));
    }

    #[test]
    fn wrong_headers() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        for (kind, port) in [("data", "0"), ("data", "65536"), ("data", "http"), ("data", ""), ("stdin", "80"), ("", "80")] {
            assert!(matches!(pairs.add(1, &headers(kind, port, "0"), now), Added::Refused(_)), "{kind} {port}");
        }
        for n in 0..LIMIT as u32 {
            assert!(matches!(pairs.add(n, &headers("error", "80", &format!("r{n}")), now), Added::Half));
        }
        assert!(matches!(pairs.add(9999, &headers("error", "80", "more"), now), Added::Refused(_)));
        assert_eq!(pairs.remove(3), Some((vec![3], 0)));
        assert_eq!(pairs.remove(3), None);
    }
}
