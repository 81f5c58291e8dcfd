//! Ranked locks. A thread takes locks only in rising rank (ARCHITECTURE.md, "Lock ranks") and never two of one rank; debug
//! builds assert it, release builds pay nothing.

use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::ops::{Deref, DerefMut};

/// The ranks, lowest taken first. Only the first two may be held across processes, network or shim calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    SandboxOp = 1,
    ContainerOp = 2,
    Names = 3,
    Index = 4,
    Status = 5,
    Leaf = 6,
}

#[cfg(debug_assertions)]
thread_local! {
    static HELD: std::cell::RefCell<Vec<Rank>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Notes a held rank for the life of a guard.
struct Held {
    #[cfg(debug_assertions)]
    rank: Rank,
}

impl Held {
    #[cfg(debug_assertions)]
    fn new(rank: Rank) -> Held {
        HELD.with_borrow_mut(|held| {
            if let Some(top) = held.iter().max() {
                assert!(*top < rank, "lock of rank {rank:?} taken while {top:?} is held");
            }
            held.push(rank);
        });
        Held { rank }
    }

    #[cfg(not(debug_assertions))]
    fn new(_: Rank) -> Held {
        Held {}
    }
}

#[cfg(debug_assertions)]
impl Drop for Held {
    fn drop(&mut self) {
        HELD.with_borrow_mut(|held| {
            if let Some(i) = held.iter().rposition(|r| *r == self.rank) {
                held.remove(i);
            }
        });
    }
}

/// A mutex with a rank.
pub struct Lock<T> {
    rank: Rank,
    inner: Mutex<T>,
}

/// Guard of a `Lock`.
pub struct Guard<'a, T> {
    inner: MutexGuard<'a, T>,
    _held: Held,
}

impl<T> Lock<T> {
    pub const fn new(rank: Rank, value: T) -> Lock<T> {
        Lock { rank, inner: Mutex::new(value) }
    }

    pub fn lock(&self) -> Guard<'_, T> {
        let held = Held::new(self.rank);
        Guard { inner: self.inner.lock(), _held: held }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<'a, T> Guard<'a, T> {
    /// Waits on `condvar` with the lock released; false when `limit` passed.
    pub fn wait_for(&mut self, condvar: &parking_lot::Condvar, limit: std::time::Duration) -> bool {
        !condvar.wait_for(&mut self.inner, limit).timed_out()
    }

    /// Waits on `condvar` with the lock released.
    pub fn wait(&mut self, condvar: &parking_lot::Condvar) {
        condvar.wait(&mut self.inner);
    }
}

/// A read-write lock with a rank.
pub struct SharedLock<T> {
    rank: Rank,
    inner: RwLock<T>,
}

/// Guard of a `SharedLock` taken for reading.
pub struct ReadGuard<'a, T> {
    inner: RwLockReadGuard<'a, T>,
    _held: Held,
}

/// Guard of a `SharedLock` taken for writing.
pub struct WriteGuard<'a, T> {
    inner: RwLockWriteGuard<'a, T>,
    _held: Held,
}

impl<T> SharedLock<T> {
    pub const fn new(rank: Rank, value: T) -> SharedLock<T> {
        SharedLock { rank, inner: RwLock::new(value) }
    }

    pub fn read(&self) -> ReadGuard<'_, T> {
        let held = Held::new(self.rank);
        ReadGuard { inner: self.inner.read(), _held: held }
    }

    pub fn write(&self) -> WriteGuard<'_, T> {
        let held = Held::new(self.rank);
        WriteGuard { inner: self.inner.write(), _held: held }
    }
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rising_is_fine() {
        let (a, b) = (Lock::new(Rank::Names, 1), SharedLock::new(Rank::Leaf, 2));
        let x = a.lock();
        let y = b.read();
        assert_eq!(*x + *y, 3);
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "lock of rank Names taken while Leaf is held")]
    fn falling_is_not() {
        let (a, b) = (Lock::new(Rank::Names, ()), Lock::new(Rank::Leaf, ()));
        let _b = b.lock();
        let _a = a.lock();
    }
}
