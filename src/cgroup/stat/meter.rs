//! One cgroup over time: its reader, opened at the first sample and closed at the end, and its CPU rate.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Reader, Sample};
use crate::cgroup::Cgroup;
use crate::sys::lock::{Lock, Rank};

/// A rate needs a sample that is at least this old.
pub const RATE_MIN: Duration = Duration::from_millis(100);

/// The reader of one cgroup and its last samples. Locks are held for a copy, never for a reading.
pub struct Meter {
    reader: Lock<State>,
    cpu: Lock<Rate>,
}

enum State {
    /// Not read yet, or gone since.
    Unopened,
    Open(Arc<Reader>),
    /// For good.
    Closed,
}

impl Default for Meter {
    fn default() -> Meter {
        Meter { reader: Lock::new(Rank::Leaf, State::Unopened), cpu: Lock::new(Rank::Leaf, Rate::default()) }
    }
}

impl Meter {
    /// The reader; `at` says where the cgroup is when it must be opened. None: there is none (any more).
    pub fn reader(&self, at: impl FnOnce() -> Option<Cgroup>) -> Option<Arc<Reader>> {
        match &*self.reader.lock() {
            State::Open(reader) => return Some(reader.clone()),
            State::Closed => return None,
            State::Unopened => {}
        }
        let opened = Arc::new(Reader::open(at()?)?);
        let mut state = self.reader.lock();
        match &*state {
            // Somebody was faster.
            State::Open(reader) => Some(reader.clone()),
            State::Closed => None,
            State::Unopened => {
                *state = State::Open(opened.clone());
                Some(opened)
            }
        }
    }

    /// A sample and the CPU rate in billionths of a core, absent until there are two samples 100 ms apart.
    pub fn sample(&self, at: impl FnOnce() -> Option<Cgroup>) -> Option<(Sample, Option<u64>)> {
        let reader = self.reader(at)?;
        let Some(sample) = reader.sample() else {
            self.lose(&reader);
            return None;
        };
        let rate = sample.cpu.and_then(|usage| self.cpu.lock().add(sample.clock, usage));
        Some((sample, rate))
    }

    /// Forgets a reader whose cgroup is gone: one of the same name may come.
    fn lose(&self, reader: &Arc<Reader>) {
        let mut state = self.reader.lock();
        if matches!(&*state, State::Open(current) if Arc::ptr_eq(current, reader)) {
            *state = State::Unopened;
        }
    }

    /// Closes the files for good; what is being read just now is closed after that.
    pub fn close(&self) {
        let before = std::mem::replace(&mut *self.reader.lock(), State::Closed);
        drop(before);
    }
}

/// A CPU counter over time: the two last samples that are worth keeping.
#[derive(Default)]
pub struct Rate {
    newest: Option<(Instant, u64)>,
    older: Option<(Instant, u64)>,
}

impl Rate {
    /// Adds a sample, nanoseconds of CPU time at `now`; gives the rate since the newest sample that is at least 100 ms older,
    /// in billionths of a core. Samples may come in any order and at any pace: those too close are compared with the older
    /// one, and not kept.
    pub fn add(&mut self, now: Instant, usage: u64) -> Option<u64> {
        let Some((newest, newest_usage)) = self.newest else {
            self.newest = Some((now, usage));
            return None;
        };
        let old_enough = |at: Instant| now.checked_duration_since(at).is_some_and(|age| age >= RATE_MIN);
        if now >= newest && usage < newest_usage {
            // Another cgroup of the same name: begin again.
            *self = Rate { newest: Some((now, usage)), older: None };
            return None;
        }
        if old_enough(newest) {
            self.older = self.newest.replace((now, usage));
            return per_second(now - newest, usage.saturating_sub(newest_usage));
        }
        let (older, older_usage) = self.older.filter(|(at, _)| old_enough(*at))?;
        per_second(now - older, usage.saturating_sub(older_usage))
    }
}

fn per_second(elapsed: Duration, used: u64) -> Option<u64> {
    u64::try_from(u128::from(used) * 1_000_000_000 / elapsed.as_nanos().max(1)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn rates_of_samples_far_apart() {
        let (mut rate, t) = (Rate::default(), Instant::now());
        assert_eq!(rate.add(t, 100 * MS), None);
        assert_eq!(rate.add(t + ms(1000), 600 * MS), Some(500_000_000));
        assert_eq!(rate.add(t + ms(1100), 800 * MS), Some(2_000_000_000));
    }

    #[test]
    fn samples_too_close_use_the_older_one() {
        let (mut rate, t) = (Rate::default(), Instant::now());
        rate.add(t, 0);
        assert_eq!(rate.add(t + ms(5), 5 * MS), None);
        assert_eq!(rate.add(t + ms(1000), 500 * MS), Some(500_000_000));
        for n in 1..100 {
            // Half a core all the time, asked every millisecond.
            assert_eq!(rate.add(t + ms(1000 + n), (500 * MS) + n * MS / 2), Some(500_000_000), "{n}");
        }
        assert_eq!(rate.add(t + ms(1100), 550 * MS), Some(500_000_000));
        // One that was read before the newest but comes after it.
        assert_eq!(rate.add(t + ms(1099), 549 * MS + MS / 2), None);
    }

    #[test]
    fn a_counter_that_begins_again() {
        let (mut rate, t) = (Rate::default(), Instant::now());
        rate.add(t, 500 * MS);
        assert_eq!(rate.add(t + ms(200), 10 * MS), None);
        assert_eq!(rate.add(t + ms(400), 110 * MS), Some(500_000_000));
    }

    #[test]
    fn a_closed_meter_stays_closed() {
        let meter = Meter::default();
        assert!(meter.reader(|| None).is_none());
        meter.close();
        assert!(meter.reader(|| panic!("it is not asked for")).is_none());
    }

    proptest::proptest! {
        #[test]
        fn a_steady_rate_is_found_at_any_pace(steps in proptest::collection::vec(0u64..300, 1..60), share in 0u64..4000) {
            let (mut rate, t, mut at) = (Rate::default(), Instant::now(), 0);
            for step in steps {
                at += step;
                if let Some(found) = rate.add(t + ms(at), at * share * 1000) {
                    proptest::prop_assert_eq!(found, share * 1_000_000);
                }
            }
        }
    }
}
