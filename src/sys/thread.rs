//! Threads with names; the only `std::thread::Builder` of the crate.

use std::thread::JoinHandle;

use crate::error::{Context, Result};

/// Starts a thread named `name` (the kernel shows the first 15 bytes). Stacks are 512 KiB: they are only reserved.
pub fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(512 * 1024).spawn(body).context(|| format!("start thread {name}"))
}

/// From here on the calling thread gets processor and disk only when nobody else wants them.
#[cfg(feature = "engine")]
pub fn lowest_priority() {
    // IOPRIO_CLASS_IDLE of <linux/ioprio.h>.
    const IDLE: libc::c_int = 3 << 13;
    // For Linux 0 is the calling thread, not its process. A failure costs others a little time, nothing else.
    let _ = rustix::process::setpriority_process(None, 19);
    // SAFETY: the call takes numbers alone: IOPRIO_WHO_PROCESS, this thread, the class.
    let _ = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, IDLE) };
}

/// Runs `body` on a fresh thread and waits for it: for work that changes the thread's namespaces, after which the thread
/// must not be used again.
pub fn run_apart<T: Send + 'static>(name: &str, body: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match spawn(name, body)?.join() {
        Ok(result) => result,
        Err(_) => Err(crate::error::Error::internal(format!("thread {name} panicked"))),
    }
}

/// Runs `work` for each item on a thread of its own, at most 32 at a time, and gives the results in order.
pub fn for_each<T: Sync, R: Send>(name: &str, items: &[T], work: &(impl Fn(&T) -> R + Sync)) -> Vec<R> {
    let mut results = Vec::with_capacity(items.len());
    for chunk in items.chunks(32) {
        std::thread::scope(|scope| {
            let started: Vec<_> = chunk
                .iter()
                .map(|item| {
                    std::thread::Builder::new().name(name.to_owned()).stack_size(512 * 1024).spawn_scoped(scope, move || work(item)).ok()
                })
                .collect();
            for (thread, item) in started.into_iter().zip(chunk) {
                // Without a thread, and after a panic, the work is done here: it must be done.
                results.push(thread.and_then(|t| t.join().ok()).unwrap_or_else(|| work(item)));
            }
        });
    }
    results
}
