//! One thread that waits on many descriptors (epoll(7)) and runs a closure for each that becomes readable.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rustix::event::EventfdFlags;

use super::lock::{Lock, Rank};
use crate::error::{Context, Result};

/// What a closure says of its descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Yes,
    No,
}

/// Called when the descriptor is readable or hung up. Must not block: it would delay every other descriptor.
pub type OnReady = Box<dyn FnMut() -> Keep + Send>;

struct Watched {
    fd: OwnedFd,
    what: String,
    on_ready: OnReady,
}

/// The watcher; clones share the thread.
#[derive(Clone)]
pub struct Watcher {
    shared: Arc<Shared>,
}

struct Shared {
    epoll: Epoll,
    map: Lock<(u64, HashMap<u64, Watched>)>,
    /// Readable once the thread is to end.
    stop: OwnedFd,
}

/// The token of `stop`; those of the others begin after it.
const STOP: u64 = 0;

impl Watcher {
    /// Starts the thread `name`.
    pub fn start(name: &str) -> Result<Watcher> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context(|| "create epoll")?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd")?;
        epoll.add(stop.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, STOP)).context(|| "watch a descriptor")?;
        let shared = Arc::new(Shared { epoll, map: Lock::new(Rank::Leaf, (STOP, HashMap::new())), stop });
        let watcher = Watcher { shared: shared.clone() };
        super::thread::spawn(name, move || shared.run())?;
        Ok(watcher)
    }

    /// Watches `fd` until `on_ready` answers `Keep::No`. `what` it is says the log, should the closure panic.
    pub fn add(&self, what: String, fd: OwnedFd, on_ready: OnReady) -> Result<()> {
        let mut map = self.shared.map.lock();
        map.0 += 1;
        let token = map.0;
        self.shared.epoll.add(fd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token)).context(|| "watch a descriptor")?;
        map.1.insert(token, Watched { fd, what, on_ready });
        Ok(())
    }

    /// Ends the thread: no closure runs any more, and all of them are dropped.
    pub fn stop(&self) {
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
    }
}

impl Shared {
    fn run(&self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => {
                    log::error!("wait for exits: {e}");
                    return;
                }
            };
            if events[..count].iter().any(|event| event.data() == STOP) {
                // Dropped without the lock: a closure may own what owns this.
                let watched = std::mem::take(&mut self.map.lock().1);
                drop(watched);
                return;
            }
            for event in &events[..count] {
                // Taken out while it runs: the closure may add descriptors or take other locks.
                let Some(mut watched) = self.map.lock().1.remove(&event.data()) else { continue };
                // A panic ends this one alone: all the others would go unheard with the thread.
                let keep = catch_unwind(AssertUnwindSafe(|| (watched.on_ready)())).unwrap_or_else(|_| {
                    log::error!("{}: what was to be done about it panicked; it is watched no more", watched.what);
                    Keep::No
                });
                if keep == Keep::Yes {
                    self.map.lock().1.insert(event.data(), watched);
                } else {
                    let _ = self.epoll.delete(watched.fd.as_fd());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_descriptors_run_until_they_say_no() {
        let watcher = Watcher::start("test").unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (tx, rx) = crossbeam_channel::unbounded();
        let mut reader = ours.try_clone().unwrap();
        watcher
            .add(
                "a socket".into(),
                ours.into(),
                Box::new(move || {
                    let mut byte = [0];
                    let n = std::io::Read::read(&mut reader, &mut byte).unwrap();
                    tx.send((n, byte[0])).unwrap();
                    if n == 0 {
                        Keep::No
                    } else {
                        Keep::Yes
                    }
                }),
            )
            .unwrap();
        std::io::Write::write_all(&mut &theirs, b"ab").unwrap();
        assert_eq!((rx.recv().unwrap(), rx.recv().unwrap()), ((1, b'a'), (1, b'b')));
        drop(theirs);
        assert_eq!(rx.recv().unwrap().0, 0);
        assert!(rx.recv().is_err());
    }

    #[test]
    fn a_stopped_watcher_drops_its_closures() {
        let watcher = Watcher::start("test").unwrap();
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (tx, rx) = crossbeam_channel::unbounded::<()>();
        let on_ready = move || {
            let _ = tx.send(());
            Keep::Yes
        };
        watcher.add("a socket".into(), ours.into(), Box::new(on_ready)).unwrap();
        watcher.stop();
        assert!(rx.recv().is_err());
    }

    #[test]
    fn a_panic_ends_its_descriptor_alone() {
        let watcher = Watcher::start("test").unwrap();
        let (tx, rx) = crossbeam_channel::unbounded::<&str>();
        let (bad, mut to_bad) = std::os::unix::net::UnixStream::pair().unwrap();
        let (good, mut to_good) = std::os::unix::net::UnixStream::pair().unwrap();
        let (bad_says, good_says) = (tx.clone(), tx);
        let panics = move || {
            let _ = bad_says.send("bad");
            panic!("this is part of the test");
        };
        watcher.add("the bad one".into(), bad.into(), Box::new(panics)).unwrap();
        std::io::Write::write_all(&mut to_bad, b"a").unwrap();
        assert_eq!(rx.recv(), Ok("bad"));
        let says = move || {
            let _ = good_says.send("good");
            Keep::No
        };
        watcher.add("the good one".into(), good.into(), Box::new(says)).unwrap();
        std::io::Write::write_all(&mut to_good, b"a").unwrap();
        assert_eq!(rx.recv(), Ok("good"));
        // Both closures are dropped, the first one's byte unread.
        assert!(rx.recv().is_err());
    }
}
