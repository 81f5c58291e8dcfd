//! What /proc tells of a container's descriptors: descriptors, sockets, states of threads, limits. It costs a few calls for
//! each of them, so what was dear is asked for less often.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, RawDir, CWD};

use crate::sys::lock::{Rank, SharedLock};

/// An answer is good for so many times what it cost: the rest of the time the processor is somebody else's.
const REST: u32 = 50;
/// Below this an answer is not worth keeping.
const CHEAP: Duration = Duration::from_millis(1);

/// Sums over the processes of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tasks {
    pub descriptors: u64,
    pub sockets: u64,
    pub states: States,
    /// Soft limit of open files of the first process; `u64::MAX`: none.
    pub open_files: Option<u64>,
}

/// Threads by what they do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct States {
    pub running: u64,
    pub sleeping: u64,
    pub stopped: u64,
    pub uninterruptible: u64,
}

impl States {
    fn add(&mut self, state: u8) {
        match state {
            b'R' => self.running += 1,
            b'S' | b'I' => self.sleeping += 1,
            b'T' | b't' => self.stopped += 1,
            b'D' => self.uninterruptible += 1,
            // Dead, or about to be.
            _ => {}
        }
    }
}

/// Answers that were dear.
pub struct Kept {
    kept: SharedLock<HashMap<String, (Instant, Arc<Tasks>)>>,
}

impl Default for Kept {
    fn default() -> Kept {
        Kept { kept: SharedLock::new(Rank::Leaf, HashMap::new()) }
    }
}

impl Kept {
    /// The facts of the container `id`, from `ask` or from a moment ago.
    pub fn get(&self, id: &str, ask: impl FnOnce() -> Tasks) -> Arc<Tasks> {
        self.get_timed(id, || {
            let begin = Instant::now();
            let tasks = ask();
            (tasks, begin.elapsed())
        })
    }

    /// As `get`; `ask` tells too how long it took.
    fn get_timed(&self, id: &str, ask: impl FnOnce() -> (Tasks, Duration)) -> Arc<Tasks> {
        let begin = Instant::now();
        if let Some((until, tasks)) = self.kept.read().get(id) {
            if begin < *until {
                return tasks.clone();
            }
        }
        let (tasks, took) = ask();
        let tasks = Arc::new(tasks);
        if took > CHEAP {
            self.kept.write().insert(id.to_owned(), (begin + took * REST, tasks.clone()));
        }
        tasks
    }

    /// Lets go of what is not worth keeping any more.
    pub fn clean(&self) {
        let now = Instant::now();
        if self.kept.read().values().any(|(until, ..)| *until < now) {
            self.kept.write().retain(|_, (until, ..)| *until >= now);
        }
    }
}

/// Asks /proc about the processes `pids`; `first` is the container's own. What is gone meanwhile counts for nothing.
pub fn ask(pids: &[i32], first: i32) -> Tasks {
    let mut tasks = Tasks::default();
    for pid in pids {
        count_descriptors(*pid, &mut tasks);
        match stat(CWD, format!("/proc/{pid}/stat").as_bytes()) {
            Some((state, 1)) => tasks.states.add(state),
            Some(_) => for_each_name(&format!("/proc/{pid}/task"), |dir, name| {
                if let Some((state, _)) = stat(dir, &[name.to_bytes(), b"/stat"].concat()) {
                    tasks.states.add(state);
                }
            }),
            None => {}
        }
    }
    tasks.open_files = crate::sys::process::open_files_limit(first);
    tasks
}

fn count_descriptors(pid: i32, tasks: &mut Tasks) {
    let (mut descriptors, mut sockets) = (0, 0);
    for_each_name(&format!("/proc/{pid}/fd"), |dir, name| {
        descriptors += 1;
        let mut link = [0u8; 16];
        if let Ok(length) = rustix::fs::readlinkat_raw(dir, name, &mut link) {
            sockets += u64::from(link[..length].starts_with(b"socket:"));
        }
    });
    tasks.descriptors += descriptors;
    tasks.sockets += sockets;
}

fn for_each_name(path: &str, mut each: impl FnMut(&std::os::fd::OwnedFd, &std::ffi::CStr)) {
    let Ok(dir) = rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else { return };
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&dir, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            each(&dir, name);
        }
    }
}

/// State and number of threads, fields 3 and 20 of a stat file (proc(5)), counted behind the name, which may have anything
/// in it.
fn stat(dir: impl AsFd, path: &[u8]) -> Option<(u8, u64)> {
    let file = rustix::fs::openat(dir, path, OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut buffer = [0u8; 512];
    let n = rustix::io::read(&file, &mut buffer).ok()?;
    let end = buffer[..n].iter().rposition(|b| *b == b')')?;
    let mut fields = std::str::from_utf8(&buffer[end + 1..n]).ok()?.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    Some((state, fields.nth(16)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ourselves() {
        let pid = std::process::id() as i32;
        let before = ask(&[pid], pid);
        let _socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let after = ask(&[pid, i32::MAX], pid);
        // Other tests open and close things meanwhile.
        assert!(after.descriptors > 3 && after.sockets >= 1 && before.descriptors > 2, "{after:?}");
        assert!(after.states.running >= 1, "{after:?}");
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        assert_eq!(after.open_files, Some(limit));
        assert_eq!(ask(&[], i32::MAX), Tasks::default());
    }

    #[test]
    fn dear_answers_are_kept_and_cheap_ones_are_not() {
        let kept = Kept::default();
        let answer = |descriptors, took| move || (Tasks { descriptors, ..Tasks::default() }, took);
        let (dear, cheap) = (CHEAP * 1000, CHEAP);
        assert_eq!(kept.get_timed("a", answer(1, dear)).descriptors, 1);
        assert_eq!(kept.get_timed("a", answer(2, dear)).descriptors, 1);
        assert_eq!(kept.get_timed("b", answer(3, cheap)).descriptors, 3);
        assert_eq!(kept.get_timed("b", answer(4, cheap)).descriptors, 4);
        assert_eq!(kept.get("a", Tasks::default).descriptors, 1);
        kept.clean();
        assert_eq!(kept.kept.read().len(), 1);
    }
}
