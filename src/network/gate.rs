//! Keeps GC and setups apart: GC tells plugins which attachments are valid, and one added meanwhile would be freed. Neither
//! side holds a lock while it runs plugins.

use std::time::Duration;

use parking_lot::Condvar;

use crate::error::{Code, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};

/// Many setups or one GC.
pub struct Gate {
    state: Lock<State>,
    opened: Condvar,
}

#[derive(Default)]
struct State {
    setups: usize,
    closed: bool,
}

impl Default for Gate {
    fn default() -> Gate {
        Gate { state: Lock::new(Rank::Leaf, State::default()), opened: Condvar::new() }
    }
}

/// A running setup.
pub struct Setup<'a>(&'a Gate);

/// A running GC.
pub struct Closed<'a>(&'a Gate);

impl Gate {
    /// Begins a setup; waits while GC runs.
    pub fn enter(&self, cancel: &Cancel) -> Result<Setup<'_>> {
        let mut state = self.state.lock();
        while state.closed {
            cancel.check()?;
            state.wait_for(&self.opened, Duration::from_millis(100));
        }
        state.setups += 1;
        Ok(Setup(self))
    }

    /// Begins a GC; UNAVAILABLE while setups or another GC run.
    pub fn close(&self) -> Result<Closed<'_>> {
        let mut state = self.state.lock();
        if state.closed || state.setups > 0 {
            return Err(Error::new(Code::Unavailable, "collect garbage of networks: sandboxes are being set up"));
        }
        state.closed = true;
        Ok(Closed(self))
    }
}

impl Drop for Setup<'_> {
    fn drop(&mut self) {
        self.0.state.lock().setups -= 1;
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.state.lock().closed = false;
        self.0.opened.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setups_and_gc_exclude_each_other() {
        let gate = Gate::default();
        let (a, b) = (gate.enter(&Cancel::never()).unwrap(), gate.enter(&Cancel::never()).unwrap());
        assert_eq!(gate.close().err().unwrap().code(), Code::Unavailable);
        drop((a, b));
        let closed = gate.close().unwrap();
        let soon = Cancel::never().within(Duration::from_millis(10));
        assert_eq!(gate.enter(&soon).err().unwrap().code(), Code::DeadlineExceeded);
        drop(closed);
        drop(gate.enter(&soon.within(Duration::ZERO)).unwrap());
    }
}
