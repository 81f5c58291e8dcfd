//! Pulls under way: one per reference and credentials, joined by whoever asks for the same. Who cancels leaves; the last
//! one to leave ends the pull.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use nix::poll::PollFlags;
use rustix::event::EventfdFlags;

use super::{Image, Progress, Watch};
use crate::error::{Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};
use crate::sys::thread;

/// The table of pulls under way.
pub struct Flights {
    table: Lock<HashMap<String, Entry>>,
}

struct Entry {
    flight: Arc<Flight>,
    waiters: usize,
}

struct Flight {
    cancel: Cancel,
    /// Readable once `result` is set.
    done: OwnedFd,
    result: Lock<Option<Result<Arc<Image>>>>,
    audience: Lock<Audience>,
}

/// Who watches a pull, and what there is to see: who joins late sees the same as the others.
struct Audience {
    watchers: Vec<Watch>,
    /// The last report of each layer.
    layers: Vec<Progress>,
}

impl Audience {
    fn tell(&mut self, progress: &Progress) {
        match self.layers.iter_mut().find(|l| l.place == progress.place) {
            Some(layer) => layer.clone_from(progress),
            None => self.layers.push(progress.clone()),
        }
        self.watchers.iter().for_each(|watch| watch(progress));
    }

    fn enter(&mut self, watch: Watch) {
        self.layers.iter().for_each(|progress| watch(progress));
        self.watchers.push(watch);
    }
}

impl Flights {
    pub fn new() -> Flights {
        Flights { table: Lock::new(Rank::Names, HashMap::new()) }
    }

    /// Joins the pull `key`, or starts it: `body` runs on a thread of its own.
    pub fn join(
        self: &Arc<Self>,
        key: &str,
        cancel: &Cancel,
        watch: Option<Watch>,
        body: impl FnOnce(&Cancel, Watch) -> Result<Arc<Image>> + Send + 'static,
    ) -> Result<Arc<Image>> {
        cancel.check()?;
        let flight = {
            let mut table = self.table.lock();
            match table.get_mut(key) {
                Some(entry) => {
                    entry.waiters += 1;
                    if let Some(watch) = watch {
                        entry.flight.audience.lock().enter(watch);
                    }
                    entry.flight.clone()
                }
                None => {
                    let flight = self.start(key, watch, body)?;
                    table.insert(key.to_owned(), Entry { flight: flight.clone(), waiters: 1 });
                    flight
                }
            }
        };
        let waited = cancel.poll(&[(flight.done.as_fd(), PollFlags::POLLIN)], None);
        if let Err(e) = waited {
            self.leave(key, &flight);
            return Err(e);
        }
        let result = flight.result.lock().clone();
        result.unwrap_or_else(|| Err(Error::internal("pull ended without a result")))
    }

    fn start(
        self: &Arc<Self>,
        key: &str,
        watch: Option<Watch>,
        body: impl FnOnce(&Cancel, Watch) -> Result<Arc<Image>> + Send + 'static,
    ) -> Result<Arc<Flight>> {
        let done = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd")?;
        let flight = Arc::new(Flight {
            cancel: Cancel::never(),
            done,
            result: Lock::new(Rank::Leaf, None),
            audience: Lock::new(Rank::Status, Audience { watchers: watch.into_iter().collect(), layers: Vec::new() }),
        });
        let (flights, ours, key) = (self.clone(), flight.clone(), key.to_owned());
        thread::spawn("pull", move || {
            let reporter = ours.clone();
            let report: Watch = Arc::new(move |progress: &Progress| reporter.audience.lock().tell(progress));
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| body(&ours.cancel, report)))
                .unwrap_or_else(|_| Err(Error::internal("the pull panicked")));
            // Off the table first: who comes now starts afresh and sees what this pull made.
            flights.forget(&key, &ours);
            ours.audience.lock().watchers.clear();
            *ours.result.lock() = Some(result);
            let _ = rustix::io::write(&ours.done, &1u64.to_ne_bytes());
        })?;
        Ok(flight)
    }

    fn forget(&self, key: &str, flight: &Arc<Flight>) {
        let mut table = self.table.lock();
        if table.get(key).is_some_and(|e| Arc::ptr_eq(&e.flight, flight)) {
            table.remove(key);
        }
    }

    /// Calls that wait for a pull.
    #[cfg(test)]
    pub fn waiters(&self) -> usize {
        self.table.lock().values().map(|entry| entry.waiters).sum()
    }

    fn leave(&self, key: &str, flight: &Arc<Flight>) {
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(key).filter(|e| Arc::ptr_eq(&e.flight, flight)) else { return };
        entry.waiters -= 1;
        if entry.waiters == 0 {
            // A cancelled pull must not be joined.
            table.remove(key);
            flight.cancel.set();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use crate::image::Phase;
    use std::sync::mpsc;
    use std::time::Duration;

    fn failing(cancel: &Cancel, release: mpsc::Receiver<()>) -> Result<Arc<Image>> {
        loop {
            cancel.check()?;
            if release.recv_timeout(Duration::from_millis(5)).is_ok() {
                return Err(Error::not_found("nothing"));
            }
        }
    }

    #[test]
    fn joiners_share_and_the_last_to_leave_cancels() {
        let flights = Arc::new(Flights::new());
        let (_keep, release) = mpsc::channel();
        let (ended, end) = mpsc::channel();
        let cancels = [Cancel::never(), Cancel::never()];
        let mut threads = Vec::new();
        let mut body = Some(release);
        for cancel in cancels.clone() {
            let (theirs, release, ended) = (flights.clone(), body.take(), ended.clone());
            threads.push(std::thread::spawn(move || {
                theirs.join("a", &cancel, None, move |cancel, _| {
                    let result = failing(cancel, release.expect("only the first may start"));
                    ended.send(result.clone().unwrap_err().code()).unwrap();
                    result
                })
            }));
            while flights.waiters() < threads.len() && !threads.iter().any(|t| t.is_finished()) {
                std::thread::yield_now();
            }
        }
        cancels[0].set();
        assert_eq!(threads.remove(0).join().unwrap().unwrap_err().code(), Code::Cancelled);
        assert!(end.recv_timeout(Duration::from_millis(50)).is_err());
        cancels[1].set();
        assert_eq!(end.recv_timeout(Duration::from_secs(60)).unwrap(), Code::Cancelled);
        threads.remove(0).join().unwrap().unwrap_err();
        assert!(flights.table.lock().is_empty());
    }

    #[test]
    fn who_joins_late_sees_the_same() {
        let flights = Arc::new(Flights::new());
        let (go, gate) = mpsc::channel::<()>();
        let (told, first_told) = mpsc::channel();
        let seen = [Arc::new(Lock::new(Rank::Leaf, Vec::new())), Arc::new(Lock::new(Rank::Leaf, Vec::new()))];
        let watch = |i: usize| -> Watch {
            let seen = seen[i].clone();
            Arc::new(move |p: &Progress| seen.lock().push((p.place, p.phase, p.done)))
        };
        let report = |place, phase, done| Progress { place, layer: "l".into(), phase, done, total: 9 };
        let first = {
            let (flights, watch) = (flights.clone(), watch(0));
            std::thread::spawn(move || {
                flights.join("a", &Cancel::never(), Some(watch), move |_, watch| {
                    watch(&report(0, Phase::Waiting, 0));
                    watch(&report(1, Phase::Waiting, 0));
                    watch(&report(0, Phase::Downloading, 5));
                    told.send(()).unwrap();
                    gate.recv().unwrap();
                    watch(&report(1, Phase::Done, 9));
                    Err(Error::not_found("nothing"))
                })
            })
        };
        first_told.recv().unwrap();
        let second = {
            let (flights, watch) = (flights.clone(), watch(1));
            std::thread::spawn(move || flights.join("a", &Cancel::never(), Some(watch), |_, _| unreachable!("it is under way")))
        };
        while seen[1].lock().len() < 2 {
            std::thread::yield_now();
        }
        go.send(()).unwrap();
        first.join().unwrap().unwrap_err();
        second.join().unwrap().unwrap_err();
        assert_eq!(*seen[1].lock(), [(0, Phase::Downloading, 5), (1, Phase::Waiting, 0), (1, Phase::Done, 9)]);
        assert_eq!(seen[0].lock().len(), 4);
    }

    #[test]
    fn a_panic_is_an_error() {
        let flights = Arc::new(Flights::new());
        let e = flights.join("a", &Cancel::never(), None, |_, _| panic!("boom")).unwrap_err();
        assert_eq!(e.code(), Code::Internal);
        assert!(flights.table.lock().is_empty());
    }
}
