//! The thread `cni-watch`: follows the conf directory by inotify, and asks plugins of version 1.1.0 for their STATUS, so
//! that no request ever waits for either.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use inotify::{Inotify, WatchDescriptor, WatchMask};
use nix::poll::PollFlags;

use super::manager::Network;
use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::thread;

/// How often the directory is looked at when inotify is exhausted.
const POLL_EVERY: Duration = Duration::from_secs(5);

/// Lets a writer finish: one reload for a burst of changes, and fewer looks at half-written files.
const SETTLE: Duration = Duration::from_millis(20);

/// Starts the thread. It ends when `stop` is set or the network is dropped; a write to the eventfd `wake` makes it look at once.
pub(super) fn start(network: &Arc<Network>, conf_dir: PathBuf, stop: Cancel, wake: Arc<OwnedFd>) -> Result<()> {
    let network = Arc::downgrade(network);
    thread::spawn("cni-watch", move || run(&network, &conf_dir, &stop, &wake)).map(drop)
}

fn run(network: &Weak<Network>, conf_dir: &Path, stop: &Cancel, wake: &OwnedFd) {
    let mut watcher = Watcher { inotify: None, watched: BTreeMap::new(), warned: false };
    let mut look = true;
    loop {
        let pause = {
            let Some(network) = network.upgrade() else { return };
            // Taken before looking: a wake-up after this is for the next round.
            let _ = rustix::io::read(wake, &mut [0; 8]);
            // Armed before the directory is read: a change after the reading wakes us.
            watcher.arm(conf_dir, &network.plugin_dirs());
            if look {
                network.reload_logged();
                // The reading may have found new directories of plugins.
                watcher.arm(conf_dir, &network.plugin_dirs());
            }
            network.refresh_status()
        };
        match watcher.wait(stop, wake, pause) {
            Ok(changed) => look = changed,
            // Set by the drop of the network.
            Err(_) if stop.is_cancelled() => return,
            Err(e) => {
                log::warn!("watch {}: {e}", conf_dir.display());
                if stop.sleep(POLL_EVERY).is_err() {
                    return;
                }
                look = true;
            }
        }
    }
}

struct Watcher {
    inotify: Option<Inotify>,
    /// What is watched, and as which inode: a directory that was replaced is watched anew.
    watched: BTreeMap<PathBuf, (WatchDescriptor, (u64, u64))>,
    warned: bool,
}

impl Watcher {
    /// Watches the conf directory, or its nearest existing ancestor while it is missing, and the directories given. Without
    /// inotify, `wait` polls.
    fn arm(&mut self, conf_dir: &Path, plugin_dirs: &[PathBuf]) {
        let result = self.try_arm(conf_dir, plugin_dirs);
        match result {
            Ok(()) => self.warned = false,
            Err(e) => {
                self.inotify = None;
                self.watched.clear();
                if !std::mem::replace(&mut self.warned, true) {
                    log::warn!("watch {}: {e}; looking every {} s instead", conf_dir.display(), POLL_EVERY.as_secs());
                }
            }
        }
    }

    fn try_arm(&mut self, conf_dir: &Path, plugin_dirs: &[PathBuf]) -> Result<()> {
        if self.inotify.is_none() {
            self.inotify = Some(Inotify::init().context(|| "make an inotify instance")?);
        }
        let mut nearest = nearest(conf_dir);
        loop {
            let wanted: Vec<&Path> = std::iter::once(nearest).chain(plugin_dirs.iter().map(PathBuf::as_path)).collect();
            self.forget(|path| !wanted.contains(&path));
            for path in &wanted {
                self.add(path)?;
            }
            // The missing directory may have appeared since.
            let now = super::watch::nearest(conf_dir);
            if now == nearest {
                return Ok(());
            }
            nearest = now;
        }
    }

    fn forget(&mut self, unwanted: impl Fn(&Path) -> bool) {
        let Some(inotify) = &self.inotify else { return };
        self.watched.retain(|path, (watch, _)| {
            let keep = !unwanted(path);
            if !keep {
                // Gone with its directory, maybe.
                let _ = inotify.watches().remove(watch.clone());
            }
            keep
        });
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let Some(inotify) = &self.inotify else { return Ok(()) };
        // A directory that is gone again is the business of the next round.
        let Ok(meta) = std::fs::metadata(path) else { return Ok(()) };
        let inode = (meta.dev(), meta.ino());
        if self.watched.get(path).is_some_and(|(_, known)| *known == inode) {
            return Ok(());
        }
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::CLOSE_WRITE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF;
        match inotify.watches().add(path, mask) {
            Ok(watch) => drop(self.watched.insert(path.to_owned(), (watch, inode))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).context(|| format!("watch {}", path.display())),
        }
        Ok(())
    }

    /// Waits for a change, a wake-up, or `pause`. True when the directory is to be read again.
    fn wait(&mut self, stop: &Cancel, wake: &OwnedFd, pause: Option<Duration>) -> Result<bool> {
        let limit = if self.inotify.is_some() { pause } else { Some(pause.map_or(POLL_EVERY, |p| p.min(POLL_EVERY))) };
        let mut set = vec![(wake.as_fd(), PollFlags::POLLIN)];
        set.extend(self.inotify.as_ref().map(|i| (i.as_fd(), PollFlags::POLLIN)));
        let ready = stop.poll(&set, limit)?;
        let Some(inotify) = &mut self.inotify else { return Ok(true) };
        if ready.get(1).is_none_or(|flags| flags.is_empty()) {
            return Ok(false);
        }
        stop.sleep(SETTLE)?;
        let mut buffer = [0; 4096];
        loop {
            match inotify.read_events(&mut buffer) {
                Ok(events) => {
                    for event in events {
                        // The kernel dropped the watch with its directory.
                        if event.mask.contains(inotify::EventMask::IGNORED) {
                            self.watched.retain(|_, (watch, _)| *watch != event.wd);
                        }
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) => return Err(e).context(|| "read inotify events"),
            }
        }
    }
}

/// The directory itself, or its nearest ancestor that exists.
fn nearest(path: &Path) -> &Path {
    path.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"))
}
