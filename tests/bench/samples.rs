//! Times of one kind of work, and what is said of them.

use std::time::{Duration, Instant};

#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// Milliseconds; the nearest rank, `None` without samples.
    pub fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).map(|time| time.as_secs_f64() * 1000.0)
    }
}

/// Runs `body`; its time.
pub fn timed<T>(body: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let value = body();
    (value, begin.elapsed())
}
