//! Watches for OOM kills. The kernel's notice says "look", the counter says what happened: notices also come for siblings and
//! when a cgroup is removed.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::event::EventfdFlags;

use crate::cgroup::Cgroup;

/// The notice of v1 comes before the kill is counted: how long and how often to look again.
const LOOK_FOR: Duration = Duration::from_millis(200);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The watch on one container's cgroup.
pub struct OomWatch {
    source: Source,
    seen: u64,
    look_until: Option<Instant>,
}

enum Source {
    /// memory.oom_control with an eventfd (v1).
    EventFd { event: OwnedFd, _control: File },
    /// memory.events, polled for POLLPRI (v2).
    Events(File),
}

impl OomWatch {
    /// None where the kernel cannot tell; the counter is read at the end all the same.
    pub fn new(cgroup: &Cgroup) -> Option<OomWatch> {
        let v1 = cgroup.dirs().iter().find(|d| d.controllers.iter().any(|c| c == "memory"));
        let source = match v1 {
            Some(dir) => {
                let control = File::open(dir.path.join("memory.oom_control")).ok()?;
                let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
                let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
                std::fs::write(dir.path.join("cgroup.event_control"), line).ok()?;
                Source::EventFd { event, _control: control }
            }
            None => {
                let dir = cgroup.dirs().iter().find(|d| d.unified)?;
                Source::Events(File::open(dir.path.join("memory.events")).ok()?)
            }
        };
        Some(OomWatch { source, seen: 0, look_until: None })
    }

    /// What to poll.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        match &self.source {
            Source::EventFd { event, .. } => (event.as_fd(), PollFlags::POLLIN),
            Source::Events(file) => (file.as_fd(), PollFlags::POLLPRI),
        }
    }

    /// Takes a notice.
    pub fn notice(&mut self, now: Instant) {
        match &self.source {
            Source::EventFd { event, .. } => drop(rustix::io::read(event, &mut [0u8; 8])),
            // Reading acknowledges.
            Source::Events(file) => drop(rustix::io::pread(file, &mut [0u8; 512], 0)),
        }
        self.look_until = Some(now + LOOK_FOR);
    }

    /// When to look at the counter next.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.look_until.map(|_| now + LOOK_EVERY)
    }

    /// Looks, if a notice asked for it: the counter when it has grown.
    pub fn look(&mut self, cgroup: &Cgroup, now: Instant) -> Option<u64> {
        let until = self.look_until?;
        let kills = cgroup.oom_kills();
        if kills > self.seen {
            self.seen = kills;
            self.look_until = None;
            return Some(kills);
        }
        if now >= until {
            self.look_until = None;
        }
        None
    }
}
