//! Usage of writable layers, measured off the request path. Where the file system counts projects the kernel knows the sums;
//! else one thread of the lowest priority walks the layers in turns, within a budget of files per second, so that a layer of a
//! million files delays neither an answer nor the other layers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::walk::{Step, Walk};
use crate::container::LayerWatch;
use crate::error::Result;
use crate::store::now_ns;
use crate::sys::lock::{Lock, Rank, SharedLock};
use crate::sys::quota::{self, Projects};
use crate::sys::thread;

/// Files looked at in one layer before it is another one's turn.
const TURN: u32 = 512;
/// The budget is given out in parts of a second of this size, so that the thread does not wake for a few files.
const PARTS: u32 = 50;
/// Files looked at when a layer appears: a new one has hardly more, and is measured before its container starts.
const FIRST_LOOK: u32 = 32;
/// What may be spent at once after a pause, in such parts.
const BURST: u32 = 5;

/// What a writable layer takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Allocated, as du(1) counts.
    pub bytes: u64,
    /// Files, directories and everything else.
    pub inodes: u64,
    /// Nanoseconds since the epoch: when the walk began. Whatever was written before is counted; what was written since may be.
    pub taken_at: i64,
}

/// How much may be spent on it.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Between the beginnings of two walks of one layer, at least.
    pub interval: Duration,
    pub files_per_second: u32,
}

/// The writable layers of this host's containers.
pub struct Disk {
    shared: Arc<Shared>,
    projects: Option<Arc<Projects>>,
    thread: Lock<Option<JoinHandle<()>>>,
}

struct Shared {
    layers: SharedLock<HashMap<String, Arc<Layer>>>,
    inbox: Lock<Inbox>,
    /// Notified when `inbox` changes.
    wake: Condvar,
}

#[derive(Default)]
struct Inbox {
    new: Vec<Arc<Layer>>,
    stop: bool,
}

struct Layer {
    dir: PathBuf,
    /// The kernel counts it; nobody walks.
    project: Option<u32>,
    gone: AtomicBool,
    usage: Lock<Option<Usage>>,
}

impl Disk {
    /// Starts the thread. `projects`: if the snapshots' file system has them.
    pub fn start(settings: Settings, projects: Option<Arc<Projects>>) -> Result<Disk> {
        let shared = Arc::new(Shared {
            layers: SharedLock::new(Rank::Index, HashMap::new()),
            inbox: Lock::new(Rank::Leaf, Inbox::default()),
            wake: Condvar::new(),
        });
        let theirs = shared.clone();
        let thread = thread::spawn("disk-walk", move || {
            thread::lowest_priority();
            theirs.run(Walker::new(settings));
        })?;
        Ok(Disk { shared, projects, thread: Lock::new(Rank::Leaf, Some(thread)) })
    }

    /// The last known usage of a container's writable layer; None until there is one. Never waits for a disk.
    pub fn usage(&self, container_id: &str) -> Option<Usage> {
        let layer = self.shared.layers.read().get(container_id).cloned()?;
        match (layer.project, &self.projects) {
            (Some(project), Some(projects)) => {
                let taken_at = now_ns();
                let (bytes, inodes) = projects.usage(project).map_err(|e| log::debug!("container {container_id}: {e}")).ok()?;
                Some(Usage { bytes, inodes, taken_at })
            }
            _ => *layer.usage.lock(),
        }
    }

    /// Bytes and inodes of all writable layers, as far as they are known. Never waits for a disk.
    pub fn total(&self) -> (u64, u64) {
        let ids: Vec<String> = self.shared.layers.read().keys().cloned().collect();
        ids.iter().filter_map(|id| self.usage(id)).fold((0, 0), |(bytes, inodes), u| (bytes + u.bytes, inodes + u.inodes))
    }

    /// Measures `upper_dir` from now on; if there is little in it, the first time here.
    pub fn watch(&self, id: &str, upper_dir: PathBuf) {
        let project = self.projects.as_ref().and_then(|_| quota::project_of(&upper_dir).ok().flatten());
        let layer = Arc::new(Layer { dir: upper_dir, project, gone: AtomicBool::new(false), usage: Lock::new(Rank::Leaf, None) });
        let replaced = self.shared.layers.write().insert(id.to_owned(), layer.clone());
        if let Some(old) = replaced {
            old.gone.store(true, Ordering::Relaxed);
        }
        if layer.project.is_none() {
            layer.look();
            self.shared.inbox.lock().new.push(layer);
            self.shared.wake.notify_one();
        }
    }

    /// Measures it no more.
    pub fn forget(&self, id: &str) {
        let removed = self.shared.layers.write().remove(id);
        if let Some(layer) = removed {
            layer.gone.store(true, Ordering::Relaxed);
        }
    }

    /// Ends the thread; a walk under way is left where it is.
    pub fn stop(&self) {
        self.shared.inbox.lock().stop = true;
        self.shared.wake.notify_one();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Layer {
    /// Measures it if that takes next to nothing.
    fn look(&self) {
        let taken_at = now_ns();
        let Ok(mut walk) = Walk::new(&self.dir) else { return };
        if let Ok(Step::Done(_)) = walk.step(FIRST_LOOK) {
            let size = walk.size();
            *self.usage.lock() = Some(Usage { bytes: size.bytes, inodes: size.inodes, taken_at });
        }
    }
}

impl LayerWatch for Disk {
    fn appeared(&self, container_id: &str, upper_dir: &Path) {
        self.watch(container_id, upper_dir.to_owned());
    }

    fn disappears(&self, container_id: &str) {
        self.forget(container_id);
    }
}

impl Shared {
    fn run(&self, mut walker: Walker) {
        let begin = Instant::now();
        loop {
            let wait = walker.turn(begin.elapsed());
            let mut inbox = self.inbox.lock();
            if inbox.new.is_empty() && !inbox.stop && wait != Some(Duration::ZERO) {
                match wait {
                    Some(limit) => drop(inbox.wait_for(&self.wake, limit)),
                    None => inbox.wait(&self.wake),
                }
            }
            if inbox.stop {
                return;
            }
            let new = std::mem::take(&mut inbox.new);
            drop(inbox);
            walker.take(new, begin.elapsed());
        }
    }
}

/// Whose turn it is. Times are since the walker's begin, so that a test can make them.
struct Walker {
    settings: Settings,
    budget: Budget,
    /// Layers that wait for their time.
    due: BinaryHeap<Reverse<Due>>,
    serial: u64,
    /// Walks under way; the first is next.
    walks: VecDeque<Active>,
}

struct Due {
    at: Duration,
    /// Ties are resolved by age.
    serial: u64,
    layer: Arc<Layer>,
}

struct Active {
    layer: Arc<Layer>,
    walk: Walk,
    began: Duration,
    began_ns: i64,
}

impl Walker {
    fn new(settings: Settings) -> Walker {
        Walker { settings, budget: Budget::new(settings.files_per_second), due: BinaryHeap::new(), serial: 0, walks: VecDeque::new() }
    }

    fn take(&mut self, new: Vec<Arc<Layer>>, now: Duration) {
        for layer in new {
            self.wait_until(now, layer);
        }
    }

    fn wait_until(&mut self, at: Duration, layer: Arc<Layer>) {
        self.serial += 1;
        self.due.push(Reverse(Due { at, serial: self.serial, layer }));
    }

    /// One turn of one walk. How long until there is something to do; None: until there is a new layer.
    fn turn(&mut self, now: Duration) -> Option<Duration> {
        self.begin_due(now);
        let Some(mut active) = self.walks.pop_front() else {
            return self.due.peek().map(|Reverse(next)| next.at.saturating_sub(now));
        };
        if active.layer.gone.load(Ordering::Relaxed) {
            return Some(Duration::ZERO);
        }
        let files = match self.budget.part(now) {
            Ok(files) => files.min(TURN),
            Err(wait) => {
                self.walks.push_front(active);
                return Some(wait);
            }
        };
        match active.walk.step(files) {
            Ok(Step::More(used)) => {
                self.budget.spend(used);
                active.walk.rest();
                self.walks.push_back(active);
            }
            Ok(Step::Done(used)) => {
                self.budget.spend(used);
                let size = active.walk.size();
                *active.layer.usage.lock() = Some(Usage { bytes: size.bytes, inodes: size.inodes, taken_at: active.began_ns });
                // A layer that takes longer than the interval gets as long a pause as its walk took.
                let next = (active.began + self.settings.interval).max(now + now.saturating_sub(active.began));
                self.wait_until(next, active.layer);
            }
            Err(e) => {
                log::debug!("disk usage: {}: {e}", active.layer.dir.display());
                self.wait_until(now + self.settings.interval, active.layer);
            }
        }
        Some(Duration::ZERO)
    }

    /// Begins the walks whose time has come.
    fn begin_due(&mut self, now: Duration) {
        while self.due.peek().is_some_and(|Reverse(next)| next.at <= now || next.layer.gone.load(Ordering::Relaxed)) {
            let Some(Reverse(Due { layer, .. })) = self.due.pop() else { return };
            if layer.gone.load(Ordering::Relaxed) {
                continue;
            }
            let began_ns = now_ns();
            match Walk::new(&layer.dir) {
                Ok(walk) => self.walks.push_back(Active { layer, walk, began: now, began_ns }),
                Err(e) => {
                    log::debug!("disk usage: {e}");
                    self.wait_until(now + self.settings.interval, layer);
                }
            }
        }
    }
}

/// Files that may be looked at: so many a second, and a little saved up.
struct Budget {
    per_second: u32,
    saved: f64,
    last: Duration,
}

impl Budget {
    fn new(per_second: u32) -> Budget {
        let mut budget = Budget { per_second, saved: 0.0, last: Duration::ZERO };
        budget.saved = budget.most();
        budget
    }

    fn smallest(&self) -> f64 {
        f64::from((self.per_second / PARTS).max(1))
    }

    fn most(&self) -> f64 {
        self.smallest() * f64::from(BURST)
    }

    /// What may be spent now, or how long it takes until it is worth a turn.
    fn part(&mut self, now: Duration) -> std::result::Result<u32, Duration> {
        let earned = now.saturating_sub(self.last).as_secs_f64() * f64::from(self.per_second);
        self.saved = (self.saved + earned).min(self.most());
        self.last = now;
        let wanted = self.smallest().min(f64::from(TURN));
        match self.saved >= wanted {
            true => Ok(self.saved as u32),
            // Never zero, whatever rounding does: that would be a busy loop.
            false => Err(Duration::from_secs_f64((wanted - self.saved) / f64::from(self.per_second)) + Duration::from_micros(100)),
        }
    }

    fn spend(&mut self, files: u32) {
        self.saved -= f64::from(files);
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(dir: &Path, files: usize) {
        std::fs::create_dir_all(dir).unwrap();
        for n in 0..files {
            std::fs::File::create(dir.join(n.to_string())).unwrap();
        }
    }

    fn layer(dir: &Path) -> Arc<Layer> {
        Arc::new(Layer { dir: dir.to_owned(), project: None, gone: AtomicBool::new(false), usage: Lock::new(Rank::Leaf, None) })
    }

    fn inodes(layer: &Layer) -> Option<u64> {
        layer.usage.lock().map(|u| u.inodes)
    }

    /// Runs the walker on made-up time until `end`, without ever sleeping.
    fn run(walker: &mut Walker, now: &mut Duration, end: Duration, mut seen: impl FnMut(Duration)) {
        while *now < end {
            match walker.turn(*now) {
                Some(Duration::ZERO) => {}
                Some(wait) => *now += wait,
                None => return,
            }
            seen(*now);
        }
    }

    #[test]
    fn within_the_budget_and_in_turns() {
        let dir = tempfile::tempdir().unwrap();
        let (big, small, late) = (dir.path().join("big"), dir.path().join("small"), dir.path().join("late"));
        fill(&big, 20_000);
        fill(&small, 10);
        fill(&late, 10);
        let settings = Settings { interval: Duration::from_secs(60), files_per_second: 1000 };
        let (big, small, late) = (layer(&big), layer(&small), layer(&late));
        let mut walker = Walker::new(settings);
        let mut now = Duration::ZERO;
        walker.take(vec![big.clone(), small.clone()], now);
        let mut small_at = None;
        run(&mut walker, &mut now, Duration::from_secs(5), |now| {
            if small_at.is_none() && inodes(&small).is_some() {
                small_at = Some(now);
            }
        });
        assert!(small_at.unwrap() < Duration::from_millis(200), "{small_at:?}");
        assert_eq!((inodes(&small), inodes(&big)), (Some(11), None), "5000 files of 20000 in 5 s");
        let begin = now;
        walker.take(vec![late.clone()], now);
        run(&mut walker, &mut now, begin + Duration::from_millis(200), |_| {});
        assert_eq!(inodes(&late), Some(11), "a new layer does not wait for the big one");
        let mut big_at = None;
        run(&mut walker, &mut now, Duration::from_secs(40), |now| {
            if big_at.is_none() && inodes(&big).is_some() {
                big_at = Some(now);
            }
        });
        assert_eq!(inodes(&big), Some(20_001));
        let took = big_at.unwrap();
        assert!(took > Duration::from_millis(19_900) && took < Duration::from_secs(22), "{took:?}");
    }

    #[test]
    fn not_before_the_interval_and_not_without_pause() {
        let dir = tempfile::tempdir().unwrap();
        fill(&dir.path().join("small"), 3);
        fill(&dir.path().join("big"), 2000);
        let (small, big) = (layer(&dir.path().join("small")), layer(&dir.path().join("big")));
        let mut walker = Walker::new(Settings { interval: Duration::from_secs(10), files_per_second: 100 });
        let mut now = Duration::ZERO;
        walker.take(vec![small.clone()], now);
        run(&mut walker, &mut now, Duration::from_secs(1), |_| {});
        fill(&dir.path().join("small"), 5);
        let mut changed = None;
        let mut now = Duration::from_secs(1);
        run(&mut walker, &mut now, Duration::from_secs(12), |now| {
            if changed.is_none() && inodes(&small) == Some(6) {
                changed = Some(now);
            }
        });
        assert!(changed.unwrap() >= Duration::from_secs(10), "{changed:?}");
        // 20 s of walking, then 20 s of rest.
        small.gone.store(true, Ordering::Relaxed);
        let begin = now;
        walker.take(vec![big.clone()], now);
        let mut times = Vec::new();
        run(&mut walker, &mut now, begin + Duration::from_secs(50), |now| {
            if big.usage.lock().take().is_some() {
                times.push(now - begin);
            }
        });
        assert_eq!(times.len(), 1, "{times:?}");
        assert!(times[0] > Duration::from_secs(19), "{times:?}");
    }

    #[test]
    fn what_is_not_there_is_tried_again_and_what_is_forgotten_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("later");
        let ours = layer(&path);
        let mut walker = Walker::new(Settings { interval: Duration::from_secs(10), files_per_second: 1000 });
        let mut now = Duration::ZERO;
        walker.take(vec![ours.clone()], now);
        run(&mut walker, &mut now, Duration::from_secs(1), |_| {});
        assert_eq!(inodes(&ours), None);
        fill(&path, 1);
        run(&mut walker, &mut now, Duration::from_secs(21), |_| {});
        assert_eq!(inodes(&ours), Some(2));
        ours.gone.store(true, Ordering::Relaxed);
        assert_eq!(walker.turn(now), None);
        assert!(walker.due.is_empty() && walker.walks.is_empty());
    }

    #[test]
    fn a_hundred_thousand_files_do_not_delay_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let (big, small) = (dir.path().join("big"), dir.path().join("small"));
        for n in 0..100 {
            fill(&big.join(n.to_string()), 1000);
        }
        fill(&small, 50);
        let disk = Disk::start(Settings { interval: Duration::from_secs(60), files_per_second: 20_000 }, None).unwrap();
        let watched = Instant::now();
        disk.watch("big", big);
        assert!(disk.usage("big").is_none(), "an answer waits for the walk");
        let soon = |id: &str, limit: Duration| {
            let begin = Instant::now();
            loop {
                if let Some(found) = disk.usage(id) {
                    return found;
                }
                assert!(begin.elapsed() < limit, "no usage of {id}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        std::thread::sleep(Duration::from_millis(100));
        let before = now_ns();
        disk.watch("small", small);
        let found = soon("small", Duration::from_secs(30));
        assert_eq!(found.inodes, 51);
        assert!(found.taken_at >= before && found.taken_at <= now_ns());
        assert!(disk.usage("big").is_none() || watched.elapsed() > Duration::from_secs(4), "in turns, not one after the other");
        let found = soon("big", Duration::from_secs(120));
        assert_eq!(found.inodes, 100_101);
        let took = watched.elapsed();
        assert!(took > Duration::from_secs(4), "within the budget: {took:?}");
        // A layer that is next to empty is known at once.
        let tiny = dir.path().join("tiny");
        fill(&tiny, 3);
        disk.watch("tiny", tiny);
        assert_eq!(disk.usage("tiny").map(|u| u.inodes), Some(4));
        disk.forget("big");
        assert!(disk.usage("big").is_none());
        let begin = Instant::now();
        disk.watch("again", dir.path().join("big"));
        disk.stop();
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
