//! Times of one kind of work, and what is said of them.

use std::time::{Duration, Instant};

/// Times in the order they were taken.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// Takes over all of `other`.
    pub fn append(&mut self, other: Samples) {
        self.0.extend(other.0);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Milliseconds; the nearest rank, `None` without samples.
    pub fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).map(|time| millis(*time))
    }
}

/// Milliseconds with their fraction.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Runs `body`; its time.
pub fn timed<T>(body: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let value = body();
    (value, begin.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut samples = Samples::default();
        assert_eq!(samples.percentile(50), None);
        (1..=10).rev().for_each(|n| samples.add(Duration::from_millis(n)));
        assert_eq!([1, 50, 95, 99, 100].map(|p| samples.percentile(p)), [1.0, 5.0, 10.0, 10.0, 10.0].map(Some));
    }
}
