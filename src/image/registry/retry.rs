//! What a failed attempt means for the next one, and how long to wait before it.

use std::time::{Duration, Instant, SystemTime};

use crate::error::{Code, Error};

/// A failed request, and what may be done about it.
#[derive(Debug)]
pub struct Failure {
    pub error: Error,
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The same host may do better later, or when it says.
    Again(Option<Duration>),
    /// This host will not; another may.
    Next,
    /// Nobody waits for it any more.
    Stop,
}

pub type Attempt<T> = std::result::Result<T, Failure>;

/// This host will not.
pub fn next(error: Error) -> Failure {
    Failure { error, verdict: Verdict::Next }
}

/// The same host may do better.
pub fn again(error: Error) -> Failure {
    Failure { error, verdict: Verdict::Again(None) }
}

/// Nobody waits for it any more.
pub fn stop(error: Error) -> Failure {
    Failure { error, verdict: Verdict::Stop }
}

/// kubelet knows this error by the first word of its message and the code UNKNOWN.
pub fn unavailable(text: impl std::fmt::Display) -> Error {
    Error::new(Code::Unknown, format!("{PREFIX}{text}"))
}

pub const PREFIX: &str = "RegistryUnavailable: ";

/// How often and how patiently.
#[derive(Clone, Copy, Debug)]
pub struct Retries {
    /// Requests of one thing to one host, at most. A download that moves on gets as many again.
    pub attempts: u32,
    /// Before the second attempt; doubled for each further one.
    pub first_wait: Duration,
    /// A host that asks for more (Retry-After) is not waited for.
    pub longest_wait: Duration,
}

impl Default for Retries {
    fn default() -> Retries {
        Retries { attempts: 5, first_wait: Duration::from_millis(500), longest_wait: Duration::from_secs(60) }
    }
}

impl Retries {
    /// The wait before attempt `tries + 1`, spread by up to a quarter so that many nodes do not come back together.
    pub fn wait(&self, tries: u32) -> Duration {
        let base = self.first_wait.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(self.longest_wait);
        let mut byte = [0];
        // Without randomness the waits are merely equal.
        let _ = getrandom::fill(&mut byte);
        base + base * u32::from(byte[0]) / 1024
    }
}

/// Whether a connection brings enough, by the time spent waiting for it (not by the time its reader takes).
pub struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

/// Bytes that must come in one window.
const FLOOR: u64 = 4096;

impl Pace {
    pub fn new(window: Duration) -> Pace {
        Pace { window, waited: Duration::ZERO, bytes: 0 }
    }

    /// Counts one read that began at `begin`; false when it has become too slow.
    pub fn add(&mut self, bytes: usize, begin: Instant) -> bool {
        self.bytes += bytes as u64;
        self.waited += begin.elapsed();
        if self.bytes >= FLOOR {
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        self.waited < self.window
    }
}

/// Retry-After (RFC 9110, 10.2.3): seconds, or a date.
pub fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::from_secs(u64::from(seconds)));
    }
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(http_date(text)?);
    Some(then.duration_since(now).unwrap_or_default())
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split_once(", ")?.1.split(' ').collect();
    let [day, month, year, clock, "GMT"] = words[..] else { return None };
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let month = MONTHS.iter().position(|m| *m == month)? as u64 + 1;
    let clock: Vec<u64> = clock.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [hour, minute, second] = clock[..] else { return None };
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days before a civil date, counted from March so that the leap day is the last of its year.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(days * 86400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_in_both_forms() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(retry_after(" 120 ", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:40 GMT", now), Some(Duration::from_secs(3)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:07 GMT", now), Some(Duration::ZERO));
        assert_eq!(http_date("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
        for bad in [
            "",
            "-1",
            "soon",
            "Sun, 06 Now 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49 GMT",
            "Sun, 6 Nov 99999 08:49:37 GMT",
            "99999999999",
        ] {
            assert_eq!(retry_after(bad, now), None, "{bad:?}");
        }
    }

    #[test]
    fn waits_grow_to_a_limit() {
        let r = Retries { attempts: 9, first_wait: Duration::from_millis(100), longest_wait: Duration::from_secs(1) };
        for (tries, least) in [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1000), (60, 1000)] {
            let wait = r.wait(tries).as_millis();
            assert!((least..=least + least / 4).contains(&wait), "{tries}: {wait}");
        }
    }

    #[test]
    fn slow_is_measured_by_waiting() {
        let mut pace = Pace::new(Duration::from_secs(50));
        assert!(pace.add(1, Instant::now()));
        assert!(!pace.add(1, Instant::now() - Duration::from_secs(60)));
        let mut pace = Pace::new(Duration::from_secs(50));
        for _ in 0..5 {
            assert!(pace.add(FLOOR as usize, Instant::now() - Duration::from_secs(10)));
        }
    }
}
