//! Watches for OOM kills. The kernel's notice says "look", the counter says what happened: notices also come for siblings and
//! when a cgroup is removed.
//!
//! systemd removes a scope as soon as nothing lives in it, often before its counter can be read. The counters of v2 include the
//! cgroups below, so the one above, of the sandbox, tells then: what it grew by since the last time that both could be read. Every
//! kill in the sandbox gives notice, and both are read at each, so that a kill in a sibling is taken for ours only if it came in the moment
//! before our own end: the kernel may keep a notice back for 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV), and we must have had time to read.
//! The counters of v1 are each cgroup's own; there a notice whose kill was not counted before the cgroup went tells, unless it may have
//! been the one of the removal. A cgroup above that runs out gives it to all below, so it counts for a moment only.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::event::EventfdFlags;

use crate::cgroup::{v2, Cgroup};

/// The notice comes before the kill is counted: how long and how often to look again.
const LOOK_FOR: Duration = Duration::from_millis(200);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The watch on one container's cgroup.
#[derive(Default)]
pub struct OomWatch {
    /// None until the container runs, after it has ended, and where the kernel cannot tell.
    source: Option<Source>,
    /// The counter when it was read last.
    own: u64,
    above: Option<Above>,
    /// What watchers know of.
    told: u64,
    look_until: Option<Instant>,
    /// v1: there was a notice of a kill that the counter does not have yet.
    warned: bool,
}

enum Source {
    /// memory.oom_control with an eventfd (v1).
    EventFd { event: OwnedFd, _control: File },
    /// memory.events, polled for POLLPRI (v2).
    Events(File),
}

/// The cgroup above, of v2.
struct Above {
    dir: PathBuf,
    events: Option<File>,
    /// Its counter when both were read last.
    kills: u64,
}

impl OomWatch {
    /// Has the cgroup above tell what `cgroup` cannot once it is gone. For before the container starts: what the one above has
    /// counted by then is not of this container.
    pub fn count_above(&mut self, cgroup: &Cgroup) {
        let own = cgroup.unified_dir().filter(|_| cgroup.v1_dir("memory").is_none());
        self.above = own.and_then(Path::parent).map(|dir| Above {
            dir: dir.to_owned(),
            events: None,
            // systemd makes a slice with its first scope.
            kills: v2::oom_kills(dir).unwrap_or(0),
        });
    }

    /// Asks the kernel for notices, for the container runs. The counter is read at the end whether it gives any or not.
    pub fn arm(&mut self, cgroup: &Cgroup) {
        self.source = Source::open(cgroup);
        if cgroup.exists() && cgroup.oom_kills().is_none() {
            // Nothing counts there, now or later.
            self.above = None;
        }
        if let Some(above) = &mut self.above {
            above.events = File::open(above.dir.join("memory.events")).ok();
        }
    }

    /// Wants no more notices: a descriptor reports for ever once the cgroup is gone.
    pub fn disarm(&mut self) {
        self.source = None;
        self.look_until = None;
        if let Some(above) = &mut self.above {
            above.events = None;
        }
    }

    /// What to poll.
    pub fn interest(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let own = self.source.as_ref().map(|source| match source {
            Source::EventFd { event, .. } => (event.as_fd(), PollFlags::POLLIN),
            Source::Events(file) => (file.as_fd(), PollFlags::POLLPRI),
        });
        let above = self.above.as_ref().and_then(|above| above.events.as_ref());
        own.into_iter().chain(above.map(|file| (file.as_fd(), PollFlags::POLLPRI)))
    }

    /// Takes a notice. A source that is gone gives no more.
    pub fn notice(&mut self, cgroup: &Cgroup, now: Instant) {
        match &self.source {
            Some(Source::EventFd { .. }) => self.take_warnings(cgroup.oom_kills().is_some()),
            Some(Source::Events(file)) if !acknowledge(file) => self.source = None,
            _ => {}
        }
        if let Some(above) = &mut self.above {
            above.events = above.events.take().filter(acknowledge);
        }
        self.look_until = Some(now + LOOK_FOR);
        // While both can be read.
        self.kills(cgroup);
    }

    /// Whether a notice asks to look at the counter.
    pub fn has_notice(&self) -> bool {
        self.look_until.is_some()
    }

    /// When to look at the counter next.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.look_until.map(|_| now + LOOK_EVERY)
    }

    /// Whether the counter, which says `kills` now, has grown since watchers were told.
    pub fn look(&mut self, kills: u64, now: Instant) -> bool {
        let grown = kills > self.told;
        self.told = kills.max(self.told);
        if self.look_until.is_some_and(|until| now + LOOK_FOR >= until + LOOK_EVERY) {
            // Nothing could be killed, or it was elsewhere.
            self.warned = false;
        }
        if grown || self.look_until.is_some_and(|until| now >= until) {
            self.look_until = None;
        }
        grown
    }

    /// OOM kills in the cgroup so far.
    pub fn kills(&mut self, cgroup: &Cgroup) -> u64 {
        // The kernel counts from below upwards, so a kill between the two reads is counted twice at worst, never missed.
        let above = self.above.as_ref().and_then(|above| v2::oom_kills(&above.dir));
        match (cgroup.oom_kills(), &mut self.above, above) {
            (Some(own), last, above) => {
                self.warned &= own == self.own;
                self.own = own;
                if let (Some(last), Some(kills)) = (last, above) {
                    last.kills = kills;
                }
            }
            (None, Some(last), Some(kills)) => {
                self.own += kills.saturating_sub(last.kills);
                last.kills = kills;
            }
            (None, ..) => {
                self.take_warnings(false);
                self.own += u64::from(std::mem::take(&mut self.warned));
            }
        }
        self.own
    }

    /// Takes the notices of v1: one before each kill, and one when the cgroup is removed, which may be the only one unless it `is_there`.
    fn take_warnings(&mut self, is_there: bool) {
        let Some(Source::EventFd { event, .. }) = &self.source else { return };
        let mut count = [0u8; 8];
        if rustix::io::read(event, &mut count).is_ok() {
            self.warned |= is_there || u64::from_ne_bytes(count) > 1;
        }
    }
}

impl Source {
    fn open(cgroup: &Cgroup) -> Option<Source> {
        let Some(dir) = cgroup.v1_dir("memory") else {
            return Some(Source::Events(File::open(cgroup.unified_dir()?.join("memory.events")).ok()?));
        };
        let control = File::open(dir.join("memory.oom_control")).ok()?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
        let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
        std::fs::write(dir.join("cgroup.event_control"), line).ok()?;
        Some(Source::EventFd { event, _control: control })
    }
}

/// Reads what a notice was about, which takes it; false when the file's cgroup is gone.
fn acknowledge(file: &File) -> bool {
    rustix::io::pread(file, &mut [0u8; 512], 0).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{Hierarchy, Layout, Mode};

    struct Tree {
        root: tempfile::TempDir,
        cgroup: Cgroup,
    }

    impl Tree {
        fn new() -> Tree {
            let root = tempfile::tempdir().unwrap();
            let hierarchy = Hierarchy { controllers: vec![], mount: root.path().into(), root: "/".into(), unified: true };
            let layout = Layout { mode: Mode::V2, hierarchies: vec![hierarchy] };
            let cgroup = Cgroup::at(&layout, "/pod.slice/c.scope").unwrap();
            Tree { root, cgroup }
        }

        fn count(&self, at: &str, kills: u64) {
            let dir = self.root.path().join(at);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("memory.events"), format!("oom {kills}\noom_kill {kills}\n")).unwrap();
        }

        fn remove(&self) {
            std::fs::remove_dir_all(self.root.path().join("pod.slice/c.scope")).unwrap();
        }
    }

    #[test]
    fn the_cgroup_above_tells_of_one_that_is_gone() {
        let tree = Tree::new();
        tree.count("pod.slice", 3);
        let mut watch = OomWatch::default();
        watch.count_above(&tree.cgroup);
        tree.count("pod.slice/c.scope", 0);
        watch.arm(&tree.cgroup);
        assert_eq!((watch.kills(&tree.cgroup), watch.interest().count()), (0, 2));
        // A sibling's, which gives notice.
        tree.count("pod.slice", 4);
        watch.notice(&tree.cgroup, Instant::now());
        assert_eq!(watch.kills(&tree.cgroup), 0);
        // Ours, while it can be read; then one that only the cgroup above tells of.
        tree.count("pod.slice/c.scope", 1);
        tree.count("pod.slice", 5);
        assert_eq!(watch.kills(&tree.cgroup), 1);
        tree.count("pod.slice", 6);
        tree.remove();
        assert_eq!((watch.kills(&tree.cgroup), watch.kills(&tree.cgroup)), (2, 2));
    }

    #[test]
    fn one_that_is_gone_was_not_killed_for_a_sibling() {
        let tree = Tree::new();
        let mut watch = OomWatch::default();
        // No slice yet: systemd makes it with its first scope.
        watch.count_above(&tree.cgroup);
        tree.count("pod.slice", 0);
        tree.count("pod.slice/c.scope", 0);
        watch.arm(&tree.cgroup);
        tree.count("pod.slice", 2);
        assert_eq!(watch.kills(&tree.cgroup), 0);
        tree.remove();
        assert_eq!(watch.kills(&tree.cgroup), 0);
        // The whole slice may be gone too.
        std::fs::remove_dir_all(tree.root.path().join("pod.slice")).unwrap();
        assert_eq!(watch.kills(&tree.cgroup), 0);
    }

    #[test]
    fn what_was_read_is_kept_and_without_one_above_nothing_is_guessed() {
        let tree = Tree::new();
        tree.count("pod.slice", 0);
        tree.count("pod.slice/c.scope", 1);
        let mut watch = OomWatch::default();
        watch.arm(&tree.cgroup);
        assert_eq!((watch.kills(&tree.cgroup), watch.interest().count()), (1, 1));
        tree.count("pod.slice", 9);
        tree.remove();
        assert_eq!(watch.kills(&tree.cgroup), 1);
    }

    /// As the kernel signals: once before each kill, once when the cgroup goes.
    #[test]
    fn notices_of_v1_tell_of_a_counter_that_is_gone() {
        let tree = Tree::new();
        let v1 = |signals: u64, there: bool| {
            let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            let control = File::open("/dev/null").unwrap();
            let mut watch = OomWatch { source: Some(Source::EventFd { event, _control: control }), ..Default::default() };
            if there {
                tree.count("pod.slice/c.scope", 0);
            }
            let Some(Source::EventFd { event, .. }) = &watch.source else { unreachable!() };
            rustix::io::write(event, &signals.to_ne_bytes()).unwrap();
            if there {
                watch.notice(&tree.cgroup, Instant::now());
                tree.remove();
            }
            watch
        };
        for (signals, there, kills) in [(1, false, 0), (2, false, 1), (1, true, 1)] {
            assert_eq!(v1(signals, there).kills(&tree.cgroup), kills, "{signals} {there}");
        }
        // Nothing came of it, or it was counted.
        let mut watch = v1(1, true);
        watch.look(0, Instant::now() + LOOK_EVERY);
        assert_eq!(watch.kills(&tree.cgroup), 0);
        let mut watch = v1(1, true);
        tree.count("pod.slice/c.scope", 1);
        assert_eq!(watch.kills(&tree.cgroup), 1);
        tree.remove();
        assert_eq!(watch.kills(&tree.cgroup), 1);
    }

    #[test]
    fn watchers_are_told_once_and_looking_ends() {
        let (mut watch, tree) = (OomWatch::default(), Tree::new());
        let begin = Instant::now();
        assert!(!watch.has_notice());
        watch.notice(&tree.cgroup, begin);
        assert!(watch.has_notice() && !watch.look(0, begin) && watch.deadline(begin) > Some(begin));
        assert!(watch.look(2, begin) && !watch.has_notice());
        watch.notice(&tree.cgroup, begin);
        assert!(!watch.look(2, begin) && watch.has_notice());
        assert!(!watch.look(2, begin + LOOK_FOR) && !watch.has_notice());
        watch.notice(&tree.cgroup, begin);
        watch.disarm();
        assert!(!watch.has_notice());
    }
}
