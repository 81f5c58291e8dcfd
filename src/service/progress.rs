//! What a pull's reports come to: the layers in order, and how fast bytes arrive.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::api::admin::{LayerProgress, PullProgress};
use crate::image::{Phase, Progress};

/// Speeds are those of the last seconds, not of the whole pull.
const WINDOW: Duration = Duration::from_secs(5);
/// Before that a speed would say nothing.
const LEAST: Duration = Duration::from_millis(400);

/// Bytes over time.
#[derive(Default)]
struct Rate {
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// Notes that so many bytes have arrived in all, and gives bytes per second if that can be told.
    fn at(&mut self, now: Instant, bytes: u64) -> Option<u64> {
        self.samples.push_back((now, bytes));
        // One sample older than the window stays: its difference to the newest spans all of the window.
        while self.samples.get(1).is_some_and(|(time, _)| now.duration_since(*time) >= WINDOW) {
            self.samples.pop_front();
        }
        let (time, first) = *self.samples.front()?;
        let span = now.duration_since(time);
        (span >= LEAST).then(|| (bytes.saturating_sub(first) as f64 / span.as_secs_f64()) as u64)
    }
}

/// The layers of one pull.
#[derive(Default)]
pub struct Board {
    layers: BTreeMap<usize, Row>,
    rate: Rate,
}

struct Row {
    progress: Progress,
    rate: Rate,
}

impl Row {
    /// Bytes that came by this pull.
    fn received(&self) -> u64 {
        if self.progress.phase == Phase::Exists {
            0
        } else {
            self.progress.done
        }
    }

    fn message(&mut self, now: Instant) -> LayerProgress {
        let moving = matches!(self.progress.phase, Phase::Downloading | Phase::Retrying);
        let speed = if moving { self.rate.at(now, self.received()) } else { None };
        LayerProgress {
            digest: self.progress.layer.clone(),
            state: self.progress.phase.name().to_owned(),
            bytes: number(self.progress.done),
            total: number(self.progress.total),
            bytes_per_second: number(speed.unwrap_or(0)),
            ..Default::default()
        }
    }
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Board {
    /// Takes a report.
    pub fn note(&mut self, progress: &Progress) {
        match self.layers.get_mut(&progress.place) {
            Some(row) => row.progress.clone_from(progress),
            None => drop(self.layers.insert(progress.place, Row { progress: progress.clone(), rate: Rate::default() })),
        }
    }

    /// The state of `now`; `image_ref` is set at the end alone.
    pub fn message(&mut self, now: Instant, reference: &str, image_ref: &str) -> PullProgress {
        let received: u64 = self.layers.values().map(Row::received).sum();
        let rest: u64 = self.layers.values().map(|row| row.progress.total.saturating_sub(row.progress.done)).sum();
        let speed = self.rate.at(now, received).filter(|speed| *speed > 0 && rest > 0);
        PullProgress {
            reference: reference.to_owned(),
            layers: self.layers.values_mut().map(|row| row.message(now)).collect(),
            image_ref: image_ref.to_owned(),
            bytes_per_second: number(speed.unwrap_or(0)),
            eta_milliseconds: number(speed.map_or(0, |speed| (rest as f64 / speed as f64 * 1000.0).ceil() as u64)),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(place: usize, phase: Phase, done: u64, total: u64) -> Progress {
        Progress { place, layer: format!("sha256:{place}"), phase, done, total }
    }

    #[test]
    fn speed_and_rest_are_those_of_the_last_seconds() {
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let mut board = Board::default();
        board.note(&report(1, Phase::Waiting, 0, 4000));
        board.note(&report(0, Phase::Exists, 700, 700));
        board.note(&report(2, Phase::Downloading, 0, 10_000));
        let message = board.message(at(0), "a", "");
        let states: Vec<_> = message.layers.iter().map(|l| l.state.as_str()).collect();
        assert_eq!(states, ["exists", "waiting", "downloading"]);
        assert_eq!((message.bytes_per_second, message.eta_milliseconds), (0, 0));
        // 1000 a second for ten seconds; then nothing for four.
        for second in 1..=10 {
            board.note(&report(2, Phase::Downloading, second * 1000, 10_000));
            let message = board.message(at(second), "a", "");
            assert_eq!((message.bytes_per_second, message.layers[2].bytes_per_second), (1000, 1000), "{second}");
            assert_eq!(message.eta_milliseconds as u64, 4000 + (10 - second) * 1000, "{second}");
        }
        let message = board.message(at(14), "a", "");
        assert_eq!((message.bytes_per_second, message.eta_milliseconds), (200, 20_000));
        board.note(&report(2, Phase::Done, 10_000, 10_000));
        let message = board.message(at(60), "a", "id");
        assert_eq!((message.bytes_per_second, message.layers[2].bytes_per_second, message.image_ref.as_str()), (0, 0, "id"));
    }

    #[test]
    fn a_digest_may_stand_twice() {
        let mut board = Board::default();
        for place in 0..2 {
            board.note(&Progress { layer: "sha256:same".into(), ..report(place, Phase::Done, 5, 5) });
        }
        assert_eq!(board.message(Instant::now(), "a", "").layers.len(), 2);
    }
}
