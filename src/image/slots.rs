//! Things of which there are only so many for all pulls together: layers on their way, memory for decompression.

use crate::error::Result;
use crate::sys::awaited::Awaited;
use crate::sys::cancel::Cancel;
use crate::sys::lock::Rank;

/// A stock to take from. Clones share it.
#[derive(Clone)]
pub struct Slots {
    all: u64,
    free: Awaited<u64>,
}

/// What was taken; given back on drop.
pub struct Taken {
    free: Awaited<u64>,
    count: u64,
}

impl Slots {
    /// At least one: with none nobody would ever get any.
    pub fn new(all: u64) -> Slots {
        let all = all.max(1);
        Slots { all, free: Awaited::new(Rank::Leaf, all) }
    }

    /// Takes `count`, and all of them where more is wanted than there is; waits until so many are free.
    pub fn take(&self, count: u64, cancel: &Cancel) -> Result<Taken> {
        let count = count.min(self.all);
        self.free.wait(cancel, |free| {
            *free = free.checked_sub(count)?;
            Some(())
        })?;
        Ok(Taken { free: self.free.clone(), count })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.free.change(|free| *free += self.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[test]
    fn never_more_than_there_are() {
        let (slots, used, most) = (Slots::new(3), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = (0..20)
            .map(|i| {
                let (slots, used, most) = (slots.clone(), used.clone(), most.clone());
                std::thread::spawn(move || {
                    let want = 1 + i % 2;
                    let _taken = slots.take(want, &Cancel::never()).unwrap();
                    most.fetch_max(used.fetch_add(want, Ordering::SeqCst) + want, Ordering::SeqCst);
                    // Some of them meet, also where threads begin slowly.
                    let begin = Instant::now();
                    while most.load(Ordering::SeqCst) < 3 && begin.elapsed() < Duration::from_secs(20) {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    used.fetch_sub(want, Ordering::SeqCst);
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!((most.load(Ordering::SeqCst), *slots.free.lock()), (3, 3));
        let all = slots.take(1000, &Cancel::never()).unwrap();
        assert_eq!(*slots.free.lock(), 0);
        assert!(slots.take(1, &Cancel::never().within(Duration::from_millis(5))).is_err());
        drop(all);
        assert!(slots.take(3, &Cancel::never()).is_ok());
    }
}
