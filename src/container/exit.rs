//! What exits of shims and containers do. The exits thread waits on all shims; it takes no op lock and starts no process: a
//! shim that died leaves work that goes to a thread of its own.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::manager::{Container, Containers};
use super::status::{State, Status};
use crate::error::Context;
use crate::shim::client::{self, Client, Watch};
use crate::shim::protocol::{Event, ExitRecord, UNDELETED_FILE};
use crate::store::now_ns;
use crate::sys::thread;
use crate::sys::watch::Keep;

/// For killing what is left of a container, and for the OCI runtime's delete.
pub(super) const CLEANUP_LIMIT: Duration = Duration::from_secs(20);
/// For both, one after the other.
pub(super) const BURY_LIMIT: Duration = Duration::from_secs(45);

impl Containers {
    /// Follows the container's shim from now on. A shim that is already gone is treated as one that goes now.
    pub(super) fn watch(self: &Arc<Self>, container: &Arc<Container>) {
        let watched = Client::new(&container.meta.dir).watch().and_then(|watch| {
            let fd = rustix::io::fcntl_dupfd_cloexec(watch.as_fd(), 3);
            let fd = fd.context(|| "duplicate the shim's socket")?;
            self.watcher.add(format!("shim of container {}", container.id()), fd, self.on_event(container, watch))
        });
        if let Err(e) = watched {
            log::debug!("container {}: watch its shim: {e}", container.id());
            self.shim_gone(container);
        }
    }

    fn on_event(self: &Arc<Self>, container: &Arc<Container>, watch: Watch) -> Box<dyn FnMut() -> Keep + Send> {
        let (manager, container) = (self.clone(), container.clone());
        Box::new(move || match watch.next() {
            Ok(Some(Event::Exit(record))) => {
                manager.ended(&container, &record);
                Keep::Yes
            }
            Ok(Some(_)) => Keep::Yes,
            Ok(None) => {
                manager.shim_gone(&container);
                Keep::No
            }
            Err(e) => {
                log::warn!("container {}: its shim: {e}", container.id());
                manager.shim_gone(&container);
                Keep::No
            }
        })
    }

    /// The container has ended by itself or was killed.
    pub(super) fn ended(&self, container: &Arc<Container>, record: &ExitRecord) {
        if self.note_end(container, |s| s.end(record.exit_code, record.oom, record.finished_at)) {
            log::info!("container {} exited: code {}{}", container.id(), record.exit_code, if record.oom { ", out of memory" } else { "" });
        }
    }

    /// Notes how a container ended, and whether this was the first to say so. Its event, its record and whoever cleans up after its shim may
    /// all tell of one end: what clients have seen of it stays.
    fn note_end(&self, container: &Arc<Container>, end: impl FnOnce(&mut Status)) -> bool {
        if container.status.lock().state == State::Exited {
            return false;
        }
        let mut first = false;
        self.note(container, |s| {
            // Another may have been here since we looked.
            first = s.state != State::Exited;
            if first {
                end(s);
            }
        });
        first
    }

    /// The shim has closed its socket: after its work, or because it died.
    fn shim_gone(self: &Arc<Self>, container: &Arc<Container>) {
        match client::exit_record(&container.meta.dir) {
            Ok(Some(record)) => {
                self.ended(container, &record);
                let mut status = container.status.lock();
                // Whoever killed it is still cleaning up, and says when that is done.
                if !status.buried {
                    status.shim_alive = false;
                }
                drop(status);
                container.changed.notify_all();
            }
            found => {
                if let Err(e) = found {
                    log::error!("container {}: {e}", container.id());
                }
                let (manager, theirs) = (self.clone(), container.clone());
                let started = thread::spawn("shim-died", move || manager.bury(&theirs, 137, "ShimDied", "its shim died, so it was killed"));
                if let Err(e) = started {
                    log::error!("container {}: {e}", container.id());
                    // A stop finds one that runs on; one that has ended is not to wait for a shim that is not there.
                    container.status.lock().shim_alive = false;
                    container.changed.notify_all();
                }
            }
        }
    }

    /// Deletes what the OCI runtime could not delete when the container ended. One that still cannot (it may be gone for good)
    /// does not keep the container from being removed.
    pub(super) fn delete_again(&self, container: &Container) {
        let meta = &container.meta;
        if !meta.dir.join(UNDELETED_FILE).exists() {
            return;
        }
        let cleaned =
            container.cgroup().and_then(|cgroup| client::cleanup_dead(&meta.handler, &meta.id, &meta.dir, Some(&cgroup), CLEANUP_LIMIT));
        if let Err(e) = cleaned {
            log::warn!("container {}: the OCI runtime still cannot delete it: {e}", meta.id);
        }
    }

    /// Kills what is left of a container whose shim is not there, deletes the runtime's state, and says how it ended, unless that is known.
    /// Once: whoever comes while another is at it, or later, leaves it to the first, who notifies `changed`.
    pub(super) fn bury(&self, container: &Arc<Container>, exit_code: i32, reason: &str, message: &str) {
        let (id, meta) = (container.id(), &container.meta);
        let ended = {
            let mut status = container.status.lock();
            if std::mem::replace(&mut status.buried, true) {
                return;
            }
            status.state == State::Exited
        };
        match ended {
            // Known before: its shim has told it but could not write it down, nor what it left undone; or it never ran.
            true => log::debug!("container {id}: cleaned up after its end"),
            false => log::warn!("container {id}: {message}"),
        }
        if !ended && reason == "ShimDied" {
            crate::telemetry::shim_died();
        }
        let cleaned =
            container.cgroup().and_then(|cgroup| client::cleanup_dead(&meta.handler, id, &meta.dir, Some(&cgroup), CLEANUP_LIMIT));
        if let Err(e) = cleaned {
            log::error!("container {id}: clean up after its shim: {e}");
        }
        // What was written between our look and the kill is the truth.
        match client::exit_record(&meta.dir) {
            Ok(Some(record)) => self.ended(container, &record),
            _ => {
                self.note_end(container, |s| s.end_because(exit_code, reason, message.to_owned(), now_ns()));
            }
        }
        container.status.lock().shim_alive = false;
        container.changed.notify_all();
    }
}
