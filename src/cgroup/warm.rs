//! The kernel's global threadgroup lock. The first write of a pid to a v1 `cgroup.procs` after a quiet time waits for an
//! RCU grace period (5-28 ms measured); those that follow within some 10 ms do not. A write of our own pid to our own
//! cgroup, which moves nothing, takes that wait on a thread of ours while the caller prepares other things, and the OCI
//! runtime finds the lock warm.

use std::path::PathBuf;
use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use super::{Cgroup, Layout, Mode};
use crate::error::{Context, Result};

/// Moves this process into the v1 cgroup it is in: nothing but the wait. A no-op on hosts without v1.
pub fn warm(layout: &Layout) -> Result<()> {
    match own_procs_file(layout) {
        Some(file) => touch(&file),
        None => Ok(()),
    }
}

fn touch(file: &PathBuf) -> Result<()> {
    std::fs::write(file, std::process::id().to_string()).context(|| format!("write {}", file.display()))
}

/// `cgroup.procs` of this process in one v1 hierarchy.
fn own_procs_file(layout: &Layout) -> Option<PathBuf> {
    if layout.mode == Mode::V2 {
        return None;
    }
    // Fewest side effects first: `pids` moves no memory, `freezer` neither.
    let hierarchy = ["pids", "freezer", "name=systemd", "devices"].iter().find_map(|c| layout.v1(c))?;
    let own = Cgroup::of_pid(layout, std::process::id() as i32).ok()?;
    // In the root of the hierarchy there is no entry.
    let dir = own.dirs().iter().find(|d| d.controllers == hierarchy.controllers).map_or(hierarchy.mount.clone(), |d| d.path.clone());
    Some(dir.join("cgroup.procs"))
}

/// A thread that warms the lock on request, at most once per `PAUSE`.
pub struct Warmer {
    wake: Option<SyncSender<()>>,
}

/// The lock stays warm for about this long.
const PAUSE: Duration = Duration::from_millis(5);

impl Warmer {
    /// Starts the thread; on hosts without v1 there is none and requests do nothing. The thread ends with the value.
    pub fn start(layout: &Layout) -> Result<Warmer> {
        let Some(file) = own_procs_file(layout) else { return Ok(Warmer { wake: None }) };
        let (wake, requests) = sync_channel::<()>(1);
        crate::sys::thread::spawn("cgroup-warm", move || {
            let mut last: Option<Instant> = None;
            while requests.recv().is_ok() {
                if last.is_none_or(|l| l.elapsed() >= PAUSE) {
                    // A failure costs speed alone.
                    let _ = touch(&file);
                    last = Some(Instant::now());
                }
            }
        })?;
        Ok(Warmer { wake: Some(wake) })
    }

    /// Asks for a warm lock and does not wait. Call it some milliseconds before an OCI runtime is started.
    pub fn request(&self) {
        if let Some(wake) = &self.wake {
            match wake.try_send(()) {
                Ok(()) | Err(TrySendError::Full(())) | Err(TrySendError::Disconnected(())) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_warm_on_v2() {
        let layout = Layout { mode: Mode::V2, hierarchies: vec![] };
        warm(&layout).unwrap();
        Warmer::start(&layout).unwrap().request();
    }
}
