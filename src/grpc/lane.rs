//! A bounded queue with worker threads that are started when needed and end when idle.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError};

use crate::sys::lock::{Lock, Rank};

/// A call, ready to run and answer itself.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// An idle worker beyond the first ends after this.
const IDLE: Duration = Duration::from_secs(10);

/// One lane.
pub(crate) struct Lane {
    name: &'static str,
    cap: usize,
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    workers: Lock<Workers>,
}

#[derive(Default)]
struct Workers {
    running: usize,
    idle: usize,
    started: usize,
}

impl Lane {
    /// A lane of at most `cap` workers and `queue` waiting jobs.
    pub fn new(name: &'static str, cap: usize, queue: usize) -> Arc<Lane> {
        let (sender, receiver) = crossbeam_channel::bounded(queue);
        Arc::new(Lane { name, cap, sender, receiver, workers: Lock::new(Rank::Leaf, Workers::default()) })
    }

    /// Queues `job`; gives it back when the queue is full.
    pub fn submit(self: &Arc<Lane>, job: Job) -> Result<(), Job> {
        self.sender.try_send(job).map_err(|e| {
            crate::telemetry::lane_refused(self.name);
            match e {
                TrySendError::Full(job) | TrySendError::Disconnected(job) => job,
            }
        })?;
        let mut workers = self.workers.lock();
        if self.receiver.len() > workers.idle && workers.running < self.cap {
            workers.running += 1;
            workers.started += 1;
            let name = format!("{}-{}", self.name, workers.started);
            drop(workers);
            let lane = self.clone();
            if let Err(e) = crate::sys::thread::spawn(&name, move || lane.work()) {
                // The job stays queued for the workers there are; with none, the next submit tries again.
                log::error!("{e}");
                self.workers.lock().running -= 1;
            }
        }
        Ok(())
    }

    /// Calls that wait, workers, and how many of them are at work.
    pub fn load(&self) -> (usize, usize, usize) {
        let queued = self.receiver.len();
        let workers = self.workers.lock();
        (queued, workers.running, workers.running.saturating_sub(workers.idle))
    }

    fn work(&self) {
        loop {
            self.workers.lock().idle += 1;
            let job = self.receiver.recv_timeout(IDLE);
            let mut workers = self.workers.lock();
            workers.idle -= 1;
            match job {
                Ok(job) => {
                    drop(workers);
                    // Jobs catch their own panics; this only keeps the count right.
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                        log::error!("a job of lane {} panicked", self.name);
                    }
                }
                // Checked under the lock: a job queued before is seen here, one queued after sees that we are gone.
                Err(_) if self.receiver.is_empty() && workers.running > 1 => {
                    workers.running -= 1;
                    return;
                }
                Err(_) => {}
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
}
