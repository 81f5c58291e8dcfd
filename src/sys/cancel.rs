//! Cancellation and deadline of a call, seen by everything that waits on its behalf.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use rustix::event::EventfdFlags;

use crate::error::{Context, Error, Result};

/// One call's wish to go on. Clones share the flag. `Cancel::never()` for work that nobody can abandon.
#[derive(Clone)]
pub struct Cancel {
    shared: Arc<Shared>,
    /// Those that this one is part of: it ends with each of them.
    above: Vec<Arc<Shared>>,
    deadline: Option<Instant>,
}

struct Shared {
    set: AtomicBool,
    // Made by the first poller only: most calls never wait on a descriptor.
    fd: OnceLock<Option<OwnedFd>>,
    hooks: Mutex<Vec<(u64, Action)>>,
}

type Action = Arc<dyn Fn() + Send + Sync>;

/// Takes back what `Cancel::on_set` was given, when it is dropped.
pub struct Hook {
    placed: Vec<(Arc<Shared>, u64)>,
}

impl Drop for Hook {
    fn drop(&mut self) {
        for (shared, number) in &self.placed {
            shared.hooks.lock().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| other != number);
        }
    }
}

impl Shared {
    fn new() -> Shared {
        Shared { set: AtomicBool::new(false), fd: OnceLock::new(), hooks: Mutex::default() }
    }

    fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }

    /// Readable once cancelled. Stays readable.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        let fd = self.fd.get_or_init(|| rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok());
        if self.is_set() {
            if let Some(fd) = fd {
                let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
            }
        }
        fd.as_ref().map(|fd| fd.as_fd())
    }
}

impl Cancel {
    pub fn new(deadline: Option<Instant>) -> Cancel {
        Cancel { shared: Arc::new(Shared::new()), above: Vec::new(), deadline }
    }

    pub fn never() -> Cancel {
        Cancel::new(None)
    }

    /// The same flag under a deadline that is at most `limit` from now.
    pub fn within(&self, limit: Duration) -> Cancel {
        let ours = Instant::now() + limit;
        Cancel { deadline: Some(self.deadline.map_or(ours, |d| d.min(ours))), ..self.clone() }
    }

    /// A part of the call that can be cancelled alone; it ends with the call as well.
    pub fn part(&self) -> Cancel {
        let above = self.above.iter().chain([&self.shared]).cloned().collect();
        Cancel { shared: Arc::new(Shared::new()), above, deadline: self.deadline }
    }

    /// Cancels: every waiter wakes.
    pub fn set(&self) {
        self.shared.set.store(true, Ordering::SeqCst);
        if let Some(Some(fd)) = self.shared.fd.get() {
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
        // Outside of the lock: what runs may well end a wait whose hook then goes.
        let hooks = self.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        hooks.iter().for_each(|(_, action)| action());
    }

    /// Has `action` run when the call is cancelled from here on, by the thread that cancels it: for waits on something else
    /// than a descriptor. Who looks at `check` after this misses no cancellation. It may still run while the guard is dropped.
    pub fn on_set(&self, action: impl Fn() + Send + Sync + 'static) -> Hook {
        let action: Action = Arc::new(action);
        let place = |shared: &Arc<Shared>| {
            let mut hooks = shared.hooks.lock().unwrap_or_else(PoisonError::into_inner);
            let number = hooks.last().map_or(0, |(number, _)| number + 1);
            hooks.push((number, action.clone()));
            (shared.clone(), number)
        };
        Hook { placed: self.above.iter().chain([&self.shared]).map(place).collect() }
    }

    pub fn is_cancelled(&self) -> bool {
        self.shared.is_set() || self.above.iter().any(|shared| shared.is_set())
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// CANCELLED or DEADLINE_EXCEEDED once the caller is gone or out of time.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::cancelled("the client cancelled the call"));
        }
        if self.deadline.is_some_and(|d| Instant::now() >= d) {
            return Err(Error::deadline("the deadline of the call has passed"));
        }
        Ok(())
    }

    /// Time left until the deadline.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|d| d.saturating_duration_since(Instant::now()))
    }

    /// Waits until one of `fds` is ready, the call is cancelled or its deadline passes (both errors), or `limit` has
    /// passed (Ok, with no flag set). Gives back the ready flags in the order of `fds`.
    pub fn poll(&self, fds: &[(BorrowedFd<'_>, PollFlags)], limit: Option<Duration>) -> Result<Vec<PollFlags>> {
        let end = limit.map(|l| Instant::now() + l);
        loop {
            self.check()?;
            let wait = match (self.deadline, end) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            // Rounded up: a poll that ends early would spin through the last millisecond.
            let timeout = wait.map_or(PollTimeout::NONE, |w| {
                let ms = w.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
                PollTimeout::try_from(ms.min(i32::MAX as u128) as i32).unwrap_or(PollTimeout::MAX)
            });
            let mut set: Vec<PollFd> = fds.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
            let ends = self.above.iter().chain([&self.shared]).filter_map(|shared| shared.fd());
            set.extend(ends.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match nix::poll::poll(&mut set, timeout) {
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => return Err(e).context(|| "poll"),
            }
            let flags: Vec<PollFlags> = set[..fds.len()].iter().map(|p| p.revents().unwrap_or(PollFlags::empty())).collect();
            if flags.iter().any(|f| !f.is_empty()) {
                return Ok(flags);
            }
            self.check()?;
            if end.is_some_and(|e| Instant::now() >= e) {
                return Ok(flags);
            }
        }
    }

    /// Sleeps for `limit`, or less if the call ends first (an error then).
    pub fn sleep(&self, limit: Duration) -> Result<()> {
        self.poll(&[], Some(limit)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_wakes_a_sleeper() {
        let cancel = Cancel::never();
        let other = cancel.clone();
        let t = std::thread::spawn(move || other.sleep(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(20));
        cancel.set();
        assert_eq!(t.join().unwrap().unwrap_err().code(), crate::error::Code::Cancelled);
        assert!(cancel.sleep(Duration::from_secs(60)).is_err());
    }

    #[test]
    fn a_part_ends_alone_or_with_the_whole() {
        let whole = Cancel::never();
        let (one, other) = (whole.part(), whole.part().within(Duration::from_secs(60)));
        one.set();
        assert!(one.part().check().is_err() && other.check().is_ok() && whole.check().is_ok());
        let t = std::thread::spawn(move || other.part().sleep(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(20));
        whole.set();
        assert_eq!(t.join().unwrap().unwrap_err().code(), crate::error::Code::Cancelled);
    }

    #[test]
    fn deadline_ends_a_sleep() {
        let cancel = Cancel::never().within(Duration::from_millis(5));
        assert_eq!(cancel.sleep(Duration::from_secs(60)).unwrap_err().code(), crate::error::Code::DeadlineExceeded);
        assert!(Cancel::never().sleep(Duration::from_millis(1)).is_ok());
    }
}
