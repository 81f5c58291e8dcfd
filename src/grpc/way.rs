//! Answers on their way. A client that opens no window for them, or does not read, must not keep a worker: whoever sends an answer
//! leaves it here and goes on; the completion queue that tells of its end lets go of it.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use parking_lot::Mutex;

/// Most answers on their way; what is beyond is cancelled. Real clients take theirs at once.
const MOST: usize = 4096;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

type Sending = Pin<Box<dyn Future<Output = grpcio::Result<()>> + Send>>;

/// Keeps `sending`, which has begun, until it is done. Never waits.
pub(super) fn see_off(sending: impl Future<Output = grpcio::Result<()>> + Send + 'static) {
    if UNDER_WAY.fetch_add(1, Ordering::SeqCst) >= MOST {
        UNDER_WAY.fetch_sub(1, Ordering::SeqCst);
        log::warn!("more than {MOST} answers wait for clients that do not take them: one is dropped");
        return;
    }
    Arc::new(Answer { sending: Mutex::new(Some(Box::pin(sending))) }).wake();
}

/// One answer. What it waits for has its waker, and so keeps it.
struct Answer {
    /// None: done.
    sending: Mutex<Option<Sending>>,
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
            UNDER_WAY.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
