//! What happened to sandboxes and containers, for subscribers. Queues are bounded: a slow subscriber loses its oldest events, which
//! are counted, and never makes anybody wait.
//!
//! A manager tells a change while it holds the lock that makes the change visible (an object's status, or the index it enters or
//! leaves), so the order on the bus is the order in which things happened. Nothing is made for a bus without subscribers.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::event::EventfdFlags;

use crate::error::{Code, Context, Error, Result};
use crate::store::now_ns;
use crate::sys::cancel::Cancel;
use crate::sys::lock::{Lock, Rank};

/// A slow subscriber is told of in the log at most this often.
const WARN_PERIOD: Duration = Duration::from_secs(30);

/// A step in the life of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Created,
    Started,
    /// The stop has begun. CRI has no event for it: it is here for what other events tell of their moment.
    Stopping,
    Stopped,
    Deleted,
}

/// One step of an object `T` with statuses `S` around it: who hears of it later can still tell what was when.
pub struct Change<T, S> {
    pub kind: Kind,
    pub object: Arc<T>,
    /// None: it was not there.
    pub before: Option<S>,
    /// None: it is gone.
    pub after: Option<S>,
}

/// Where a manager tells changes of type `C`. Called under locks up to those of a status: it takes none but leaves, and never
/// waits.
pub trait Listener<C>: Send + Sync {
    /// False: nobody would hear a change, so none need be made.
    fn is_listening(&self) -> bool;
    fn hear(&self, change: C);
}

/// A change with the time it has on the bus, nanoseconds since the epoch: later events have later times.
pub struct Event<E> {
    pub at: i64,
    pub change: E,
}

/// A bounded queue per subscriber.
pub struct Bus<E> {
    /// Events that wait for one subscriber.
    capacity: usize,
    /// Subscribers at a time.
    seats: usize,
    taken: AtomicUsize,
    state: Lock<State<E>>,
}

struct State<E> {
    last: i64,
    closed: bool,
    serial: u64,
    queues: Vec<Queue<E>>,
}

struct Queue<E> {
    id: u64,
    events: VecDeque<Arc<Event<E>>>,
    dropped: u64,
    warned: Option<Instant>,
    /// Readable while there is something to take.
    wake: Arc<OwnedFd>,
}

/// One subscriber's queue; dropping it gives its seat back.
pub struct Subscription<E> {
    bus: Arc<Bus<E>>,
    id: u64,
    wake: Arc<OwnedFd>,
}

impl<E> Bus<E> {
    /// A bus of at most `seats` subscribers, for each of which at most `capacity` events wait.
    pub fn new(capacity: usize, seats: usize) -> Arc<Bus<E>> {
        let state = State { last: 0, closed: false, serial: 0, queues: Vec::new() };
        Arc::new(Bus { capacity: capacity.max(1), seats, taken: AtomicUsize::new(0), state: Lock::new(Rank::Leaf, state) })
    }

    /// Gives the change to every subscriber. Never waits for one.
    pub fn publish(&self, change: E) {
        let mut slow = Vec::new();
        let mut state = self.state.lock();
        // The clock may be set back, and two events may fall into one tick of it.
        let at = now_ns().max(state.last + 1);
        state.last = at;
        let event = Arc::new(Event { at, change });
        for queue in &mut state.queues {
            if queue.events.len() == self.capacity {
                queue.events.pop_front();
                queue.dropped += 1;
                crate::telemetry::events_dropped(1);
                if queue.warned.is_none_or(|then| then.elapsed() >= WARN_PERIOD) {
                    queue.warned = Some(Instant::now());
                    slow.push((queue.id, queue.dropped));
                }
            }
            queue.events.push_back(event.clone());
            if queue.events.len() == 1 {
                notify(&queue.wake);
            }
        }
        drop(state);
        for (id, dropped) in slow {
            log::warn!("event subscriber {id} is slow: {dropped} of its oldest events are dropped so far");
        }
    }

    /// A queue for what is published from now on. RESOURCE_EXHAUSTED when all seats are taken, UNAVAILABLE after `close`.
    pub fn subscribe(self: &Arc<Self>) -> Result<Subscription<E>> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd")?;
        let wake = Arc::new(wake);
        let mut state = self.state.lock();
        if state.closed {
            return Err(closed());
        }
        if state.queues.len() >= self.seats {
            return Err(Error::new(Code::ResourceExhausted, format!("subscribe to events: there are {} subscribers already", self.seats)));
        }
        state.serial += 1;
        let id = state.serial;
        state.queues.push(Queue { id, events: VecDeque::new(), dropped: 0, warned: None, wake: wake.clone() });
        self.taken.store(state.queues.len(), Ordering::SeqCst);
        Ok(Subscription { bus: self.clone(), id, wake })
    }

    /// Ends every subscription; what waits is lost.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.queues.iter().for_each(|queue| notify(&queue.wake));
    }

    /// How many subscribers there are.
    pub fn subscribers(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }
}

impl<C, E: From<C> + Send + Sync> Listener<C> for Bus<E> {
    fn is_listening(&self) -> bool {
        self.subscribers() > 0
    }

    fn hear(&self, change: C) {
        self.publish(change.into());
    }
}

impl<E> Subscription<E> {
    /// The oldest event that was not taken yet; waits for it. CANCELLED with `cancel`, UNAVAILABLE once the bus is closed.
    pub fn next(&self, cancel: &Cancel) -> Result<Arc<Event<E>>> {
        loop {
            cancel.check()?;
            {
                let mut state = self.bus.state.lock();
                if state.closed {
                    return Err(closed());
                }
                let queue = state.queues.iter_mut().find(|queue| queue.id == self.id);
                if let Some(event) = queue.and_then(|queue| queue.events.pop_front()) {
                    return Ok(event);
                }
                // Under the lock: whoever publishes from here on finds the queue empty and wakes us again.
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            }
            cancel.poll(&[(self.wake.as_fd(), PollFlags::POLLIN)], None)?;
        }
    }

    /// Looks at the events that wait, from the newest back to the oldest.
    pub fn look_back(&self, mut look: impl FnMut(&E)) {
        let waiting: Vec<Arc<Event<E>>> = {
            let state = self.bus.state.lock();
            let queue = state.queues.iter().find(|queue| queue.id == self.id);
            queue.map(|queue| queue.events.iter().rev().cloned().collect()).unwrap_or_default()
        };
        waiting.iter().for_each(|event| look(&event.change));
    }

    /// Events lost because this subscriber was slow.
    pub fn dropped(&self) -> u64 {
        self.bus.state.lock().queues.iter().find(|queue| queue.id == self.id).map_or(0, |queue| queue.dropped)
    }
}

impl<E> Drop for Subscription<E> {
    fn drop(&mut self) {
        let mut state = self.bus.state.lock();
        let at = state.queues.iter().position(|queue| queue.id == self.id);
        let gone = at.map(|at| state.queues.swap_remove(at));
        self.bus.taken.store(state.queues.len(), Ordering::SeqCst);
        drop(state);
        // What waits may be the last that holds a removed object: not under the lock.
        drop(gone);
    }
}

fn notify(wake: &OwnedFd) {
    // Only a counter at its end could refuse, and that is readable.
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

fn closed() -> Error {
    Error::new(Code::Unavailable, "the daemon is stopping")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(subscription: &Subscription<u32>, count: usize) -> Vec<u32> {
        let cancel = Cancel::never().within(Duration::from_secs(10));
        (0..count).map(|_| subscription.next(&cancel).unwrap().change).collect()
    }

    #[test]
    fn every_subscriber_gets_all_in_order_with_rising_times() {
        let bus = Bus::new(100, 2);
        let (a, b) = (bus.subscribe().unwrap(), bus.subscribe().unwrap());
        (0..50).for_each(|n| bus.publish(n));
        assert_eq!(values(&a, 50), (0..50).collect::<Vec<_>>());
        let cancel = Cancel::never();
        let times: Vec<i64> = (0..50).map(|_| b.next(&cancel).unwrap().at).collect();
        assert!(times.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_slow_subscriber_loses_its_oldest_and_others_lose_nothing() {
        let bus = Bus::new(3, 2);
        let (slow, quick) = (bus.subscribe().unwrap(), bus.subscribe().unwrap());
        for n in 0..10 {
            bus.publish(n);
            assert_eq!(values(&quick, 1), [n]);
        }
        assert_eq!((slow.dropped(), quick.dropped()), (7, 0));
        let mut waiting = Vec::new();
        slow.look_back(|n| waiting.push(*n));
        assert_eq!(waiting, [9, 8, 7]);
        assert_eq!(values(&slow, 3), [7, 8, 9]);
    }

    #[test]
    fn seats_are_counted_and_given_back() {
        let bus: Arc<Bus<u32>> = Bus::new(1, 1);
        assert!(!Listener::<u32>::is_listening(&*bus));
        let first = bus.subscribe().unwrap();
        assert!(Listener::<u32>::is_listening(&*bus));
        assert_eq!(bus.subscribe().err().map(|e| e.code()), Some(Code::ResourceExhausted));
        drop(first);
        assert_eq!(bus.subscribers(), 0);
        assert!(bus.subscribe().is_ok());
    }

    #[test]
    fn a_waiter_is_woken_by_an_event_by_its_cancellation_and_by_the_end() {
        let bus: Arc<Bus<u32>> = Bus::new(8, 4);
        let cancel = Cancel::never();
        let (a, b, c) = (bus.subscribe().unwrap(), bus.subscribe().unwrap(), bus.subscribe().unwrap());
        std::thread::scope(|scope| {
            let cancelled = scope.spawn(|| a.next(&cancel).err().map(|e| e.code()));
            let heard = scope.spawn(|| b.next(&Cancel::never()).map(|event| event.change));
            cancel.set();
            assert_eq!(cancelled.join().unwrap(), Some(Code::Cancelled));
            bus.publish(7);
            assert_eq!(heard.join().unwrap().unwrap(), 7);
            assert_eq!(c.next(&Cancel::never()).unwrap().change, 7);
            let ended = scope.spawn(|| c.next(&Cancel::never()).err().map(|e| e.code()));
            bus.close();
            assert_eq!(ended.join().unwrap(), Some(Code::Unavailable));
        });
        assert!(bus.subscribe().is_err());
    }
}
