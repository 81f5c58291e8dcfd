//! A value that threads wait on: a ranked lock with a condition variable. Waits end at once when their call is cancelled or
//! its deadline passes; nobody polls.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Condvar;

use super::cancel::Cancel;
use super::lock::{Guard, Lock, Rank};
use crate::error::Result;

/// Clones share the value.
pub struct Awaited<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    value: Lock<T>,
    changed: Condvar,
}

impl<T> Clone for Awaited<T> {
    fn clone(&self) -> Awaited<T> {
        Awaited { shared: self.shared.clone() }
    }
}

impl<T: Send + 'static> Awaited<T> {
    pub fn new(rank: Rank, value: T) -> Awaited<T> {
        Awaited { shared: Arc::new(Shared { value: Lock::new(rank, value), changed: Condvar::new() }) }
    }

    /// To look at the value, or to change what nobody waits for.
    pub fn lock(&self) -> Guard<'_, T> {
        self.shared.value.lock()
    }

    /// Changes the value and wakes all who wait.
    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut self.shared.value.lock());
        self.shared.changed.notify_all();
        result
    }

    /// Waits until `take`, called with the lock held, gives something. CANCELLED and DEADLINE_EXCEEDED as the call ends; what can be
    /// had at once is had even then.
    pub fn wait<R>(&self, cancel: &Cancel, mut take: impl FnMut(&mut T) -> Option<R>) -> Result<R> {
        if let Some(found) = take(&mut self.lock()) {
            return Ok(found);
        }
        let shared = self.shared.clone();
        let _hook = cancel.on_set(move || {
            // With the lock taken once, nobody is between his look at the flag and his wait.
            drop(shared.value.lock());
            shared.changed.notify_all();
        });
        let mut value = self.lock();
        loop {
            if let Some(found) = take(&mut value) {
                return Ok(found);
            }
            cancel.check()?;
            match cancel.remaining() {
                // Rounded up, so that the deadline has passed when the wait is over.
                Some(left) => drop(value.wait_for(&self.shared.changed, left + Duration::from_millis(1))),
                None => value.wait(&self.shared.changed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use std::time::Instant;

    #[test]
    fn changes_cancellation_and_deadlines_wake() {
        let value = Awaited::new(Rank::Leaf, 0);
        let (ours, cancel) = (value.clone(), Cancel::never());
        let theirs = cancel.clone();
        let waiter = std::thread::spawn(move || {
            let three = ours.wait(&theirs, |v| (*v == 3).then_some("three"));
            (three, ours.wait(&theirs, |v| (*v == 4).then_some(())))
        });
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(5));
            value.change(|v| *v += 1);
        }
        std::thread::sleep(Duration::from_millis(20));
        let begin = Instant::now();
        cancel.set();
        let (three, never) = waiter.join().unwrap();
        assert_eq!((three.unwrap(), never.unwrap_err().code()), ("three", Code::Cancelled));
        assert!(begin.elapsed() < Duration::from_secs(60));
        let late = Cancel::never().within(Duration::from_millis(5));
        assert_eq!(value.wait(&late, |_| None::<()>).unwrap_err().code(), Code::DeadlineExceeded);
        assert_eq!(value.wait(&cancel, |v| Some(*v)).unwrap(), 3, "what is there is had");
    }

    #[test]
    fn no_cancellation_is_lost() {
        for _ in 0..200 {
            let (value, cancel) = (Awaited::new(Rank::Leaf, ()), Cancel::never());
            let ours = cancel.clone();
            let waiter = std::thread::spawn(move || value.wait(&ours, |()| None::<()>));
            cancel.set();
            waiter.join().unwrap().unwrap_err();
        }
    }
}
