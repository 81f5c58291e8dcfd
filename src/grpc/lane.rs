//! A bounded queue with worker threads that are started when needed and end when idle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use parking_lot::Condvar;

use crate::error::Result;
use crate::sys::lock::{Lock, Rank};

/// A call, ready to run and answer itself.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Starts a thread of a name.
type Spawn = Box<dyn Fn(&str, Job) -> Result<()> + Send + Sync>;

/// An idle worker beyond the first ends after this.
const IDLE: Duration = Duration::from_secs(10);

/// One lane.
pub(crate) struct Lane {
    name: &'static str,
    cap: usize,
    idle: Duration,
    spawn: Spawn,
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    workers: Lock<Workers>,
    /// The last job has ended.
    quiet: Condvar,
}

#[derive(Default)]
struct Workers {
    running: usize,
    /// Jobs that were submitted and have not ended. A job that a worker has just taken counts on: counting idle workers
    /// instead would miss that the last of them is about to be busy, and leave the next job without one.
    jobs: usize,
    started: usize,
}

impl Lane {
    /// A lane of at most `cap` workers and `queue` waiting jobs.
    pub fn new(name: &'static str, cap: usize, queue: usize) -> Arc<Lane> {
        Lane::with(name, cap, queue, IDLE, Box::new(|name, work| crate::sys::thread::spawn(name, work).map(drop)))
    }

    fn with(name: &'static str, cap: usize, queue: usize, idle: Duration, spawn: Spawn) -> Arc<Lane> {
        let (sender, receiver) = crossbeam_channel::bounded(queue);
        let workers = Lock::new(Rank::Leaf, Workers::default());
        Arc::new(Lane { name, cap, idle, spawn, sender, receiver, workers, quiet: Condvar::new() })
    }

    /// Queues `job`; gives it back when the queue is full.
    pub fn submit(self: &Arc<Lane>, job: Job) -> std::result::Result<(), Job> {
        let mut workers = self.workers.lock();
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = self.sender.try_send(job) {
            drop(workers);
            crate::telemetry::lane_refused(self.name);
            return Err(job);
        }
        workers.jobs += 1;
        drop(workers);
        self.staff();
        Ok(())
    }

    /// Starts workers until each job has one, or there are as many as may be. Called whenever there may be too few: a thread that could
    /// not be started (EAGAIN) is missing until somebody tries again.
    fn staff(self: &Arc<Lane>) {
        loop {
            let mut workers = self.workers.lock();
            if workers.jobs <= workers.running || workers.running >= self.cap {
                return;
            }
            workers.running += 1;
            workers.started += 1;
            let name = format!("{}-{}", self.name, workers.started);
            drop(workers);
            let lane = self.clone();
            if let Err(e) = (self.spawn)(&name, Box::new(move || lane.work())) {
                // The job stays queued: the next call to be submitted, taken or ended tries again.
                log::error!("{e}");
                self.workers.lock().running -= 1;
                return;
            }
        }
    }

    /// Calls that wait, workers, and how many of them are at work.
    pub fn load(&self) -> (usize, usize, usize) {
        let workers = self.workers.lock();
        let queued = self.receiver.len();
        (queued, workers.running, workers.jobs - queued)
    }

    /// Waits until no job is left, until `end` at most. False: some are.
    pub fn wait_until_idle(&self, end: Instant) -> bool {
        let mut workers = self.workers.lock();
        while workers.jobs > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            workers.wait_for(&self.quiet, left);
        }
        true
    }

    fn work(self: &Arc<Lane>) {
        loop {
            match self.receiver.recv_timeout(self.idle) {
                Ok(job) => {
                    // It may take long, and those behind it have perhaps no worker.
                    self.staff();
                    // Jobs catch their own panics; this only keeps the count right.
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                        log::error!("a job of lane {} panicked", self.name);
                    }
                    let mut workers = self.workers.lock();
                    workers.jobs -= 1;
                    if workers.jobs == 0 {
                        self.quiet.notify_all();
                    }
                    drop(workers);
                    self.staff();
                }
                Err(_) => {
                    let mut workers = self.workers.lock();
                    // Never one that a job counts on.
                    if workers.running > workers.jobs.max(1) {
                        workers.running -= 1;
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn blocked_jobs_get_workers_up_to_the_cap_and_a_full_queue_refuses() {
        let lane = Lane::new("test", 3, 2);
        let (release, gate) = crossbeam_channel::bounded::<()>(0);
        let started = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 {
            let (gate, counted) = (gate.clone(), started.clone());
            let job = Box::new(move || {
                counted.fetch_add(1, Ordering::SeqCst);
                let _ = gate.recv();
            });
            assert!(lane.submit(job).is_ok());
            while started.load(Ordering::SeqCst) < lane.workers.lock().running {
                std::thread::yield_now();
            }
        }
        assert!(lane.submit(Box::new(|| {})).is_ok());
        assert!(lane.submit(Box::new(|| {})).is_ok());
        assert!(lane.submit(Box::new(|| {})).is_err());
        drop(release);
        while !lane.receiver.is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(started.load(Ordering::SeqCst), 3);
    }

    /// A job that waits for all of `together`.
    fn meets(together: &Arc<std::sync::Barrier>) -> Job {
        let together = together.clone();
        Box::new(move || {
            together.wait();
        })
    }

    /// Threads that could not be started are started as soon as they can be.
    #[test]
    fn workers_that_were_missing_come_later() {
        let failing = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let fails = failing.clone();
        let spawn = move |name: &str, work: Job| match fails.load(Ordering::SeqCst) {
            true => Err(crate::error::Error::internal(format!("start thread {name}: none left"))),
            false => crate::sys::thread::spawn(name, work).map(drop),
        };
        let lane = Lane::with("test", 8, 8, IDLE, Box::new(spawn));
        let together = Arc::new(std::sync::Barrier::new(4));
        let (release, gate) = crossbeam_channel::bounded::<()>(0);
        assert!(lane
            .submit(Box::new(move || {
                let _ = gate.recv();
            }))
            .is_ok());
        failing.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            assert!(lane.submit(meets(&together)).is_ok());
        }
        failing.store(false, Ordering::SeqCst);
        // Nobody submits any more: the one worker there is gets the others.
        drop(release);
        let (done, all) = crossbeam_channel::bounded::<()>(1);
        std::thread::spawn(move || (together.wait(), done.send(())));
        assert!(all.recv_timeout(Duration::from_secs(10)).is_ok(), "{:?}", lane.load());
    }

    /// One call that is submitted makes up for all that failed before.
    #[test]
    fn a_submit_starts_all_that_are_missing() {
        let left = Arc::new(AtomicUsize::new(3));
        let spawn = move |name: &str, work: Job| match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) {
            Ok(_) => Err(crate::error::Error::internal(format!("start thread {name}: none left"))),
            Err(_) => crate::sys::thread::spawn(name, work).map(drop),
        };
        let lane = Lane::with("test", 8, 8, IDLE, Box::new(spawn));
        let together = Arc::new(std::sync::Barrier::new(5));
        for _ in 0..4 {
            assert!(lane.submit(meets(&together)).is_ok());
        }
        let (done, all) = crossbeam_channel::bounded::<()>(1);
        std::thread::spawn(move || (together.wait(), done.send(())));
        assert!(all.recv_timeout(Duration::from_secs(10)).is_ok(), "{:?}", lane.load());
    }

    /// Each of a burst of jobs gets a worker, also one that is submitted while the idle worker begins its own.
    #[test]
    fn no_job_waits_for_one_that_waits() {
        let lane =
            Lane::with("test", 8, 8, Duration::from_millis(1), Box::new(|name, work| crate::sys::thread::spawn(name, work).map(drop)));
        for round in 0..2000u32 {
            let together = Arc::new(std::sync::Barrier::new(5));
            for _ in 0..4 {
                assert!(lane.submit(meets(&together)).is_ok());
                // Another moment of the worker's each round.
                (0..round % 500 * 4).for_each(|_| std::hint::spin_loop());
            }
            let (done, all) = crossbeam_channel::bounded::<()>(1);
            std::thread::spawn(move || (together.wait(), done.send(())));
            assert!(all.recv_timeout(Duration::from_secs(10)).is_ok(), "round {round}: {:?}", lane.load());
            while lane.load() != (0, 1, 0) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}
