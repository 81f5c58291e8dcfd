//! Answers on their way. A client that opens no window for them, or does not read, must not keep a worker: whoever sends an answer
//! leaves it here and goes on; the completion queue that tells of its end lets go of it.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Wake, Waker};

use parking_lot::Mutex;

/// Most answers on their way; then the oldest is cancelled, which is one that its client does not take: others are gone in no time.
const MOST: usize = 512;

/// Oldest first; those that are done have no strong reference.
static UNDER_WAY: Mutex<VecDeque<Weak<Answer>>> = Mutex::new(VecDeque::new());

type Sending = Pin<Box<dyn Future<Output = grpcio::Result<()>> + Send>>;

/// Keeps `sending`, which has begun, until it is done. Never waits.
pub(super) fn see_off(sending: impl Future<Output = grpcio::Result<()>> + Send + 'static) {
    let answer = Arc::new(Answer { sending: Mutex::new(Some(Box::pin(sending))) });
    let oldest = enter(&mut UNDER_WAY.lock(), Arc::downgrade(&answer));
    if let Some(oldest) = oldest {
        log::warn!("more than {MOST} answers wait for clients that do not take them: the oldest is dropped");
        oldest.cancel();
    }
    answer.wake();
}

/// Puts an answer behind those under way; gives the one that has to go for it.
fn enter(under_way: &mut VecDeque<Weak<Answer>>, answer: Weak<Answer>) -> Option<Arc<Answer>> {
    while under_way.front().is_some_and(|oldest| oldest.strong_count() == 0) {
        under_way.pop_front();
    }
    if under_way.len() >= MOST {
        under_way.retain(|answer| answer.strong_count() > 0);
    }
    let oldest = if under_way.len() >= MOST { under_way.pop_front() } else { None };
    under_way.push_back(answer);
    oldest.and_then(|oldest| oldest.upgrade())
}

/// One answer. What it waits for has its waker, and so keeps it.
struct Answer {
    /// None: done.
    sending: Mutex<Option<Sending>>,
}

impl Answer {
    fn cancel(&self) {
        let sending = self.sending.lock().take();
        drop(sending);
    }
}

impl Wake for Answer {
    fn wake(self: Arc<Self>) {
        let waker = Waker::from(self.clone());
        let mut slot = self.sending.lock();
        // A client that is gone does not need it.
        let done = slot.as_mut().is_some_and(|sending| sending.as_mut().poll(&mut Context::from_waker(&waker)).is_ready());
        if done {
            let sending = slot.take();
            drop(slot);
            drop(sending);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(sending: impl Future<Output = grpcio::Result<()>> + Send + 'static) -> Arc<Answer> {
        Arc::new(Answer { sending: Mutex::new(Some(Box::pin(sending))) })
    }

    #[test]
    fn the_one_that_waits_longest_goes() {
        let mut under_way = VecDeque::new();
        let stuck: Vec<_> = (0..MOST).map(|_| answer(std::future::pending())).collect();
        for one in &stuck[..MOST - 1] {
            assert!(enter(&mut under_way, Arc::downgrade(one)).is_none());
        }
        // Those that are done make no room necessary, wherever they are.
        for _ in 0..3 * MOST {
            let done = answer(std::future::ready(Ok(())));
            assert!(enter(&mut under_way, Arc::downgrade(&done)).is_none());
            done.wake();
        }
        assert!(enter(&mut under_way, Arc::downgrade(&stuck[MOST - 1])).is_none());
        let one_more = answer(std::future::pending());
        let gone = enter(&mut under_way, Arc::downgrade(&one_more)).expect("one goes");
        assert!(Arc::ptr_eq(&gone, &stuck[0]));
        gone.cancel();
        assert!(gone.sending.lock().is_none() && under_way.len() <= MOST);
    }
}
