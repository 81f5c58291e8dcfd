//! Containers found at the daemon's start: running ones are reconnected, exits that happened meanwhile are taken from their
//! records, half-made ones are undone.

use std::path::Path;
use std::sync::Arc;

use super::exit::{BURY_LIMIT, CLEANUP_LIMIT};
use super::manager::{Container, Containers, RecordIn};
use super::status::State;
use crate::api::runtime::ContainerConfig;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Code, Context, Error, ErrorList, Result};
use crate::shim::client::{self, Client};
use crate::shim::protocol::{Phase, ShimConfig, CONFIG_FILE};
use crate::shim::record;
use crate::store::record::Restored;
use crate::sys::cancel::Cancel;
use crate::sys::file;

impl Containers {
    /// Reads the records, in parallel; then removes what has none. `sandbox_exists` says which sandboxes were restored.
    pub fn restore(self: &Arc<Self>, sandbox_exists: impl Fn(&str) -> bool + Sync) -> Result<()> {
        use rayon::prelude::*;
        let restored = self.records.load::<RecordIn>()?;
        restored.into_par_iter().for_each(|record| {
            let id = record.id.clone();
            if let Err(e) = self.restore_one(record, &sandbox_exists) {
                log::error!("restore container {id}: {e}");
            }
        });
        self.sweep()
    }

    fn restore_one(self: &Arc<Self>, restored: Restored<RecordIn>, sandbox_exists: &impl Fn(&str) -> bool) -> Result<()> {
        let RecordIn { metadata: meta, mut status } = restored.record;
        let config: ContainerConfig = match protobuf::Message::parse_from_bytes(&restored.config) {
            Ok(config) => config,
            Err(e) => {
                self.records.set_aside(&meta.id, &Error::internal(format!("config: {e}")));
                return Ok(());
            }
        };
        let mut request = restored.config;
        request.extend_from_slice(meta.sandbox_id.as_bytes());
        let found = (status.state, status.starting);
        status.shim_alive = false;
        let container = Container::new(meta, config, status);
        let meta = &container.meta;
        match found {
            (State::Making, _) => {
                log::info!("container {}: half made by a daemon that ended, undone", meta.id);
                self.release(&container)?;
                return self.unrecord(&container);
            }
            (State::Running, _) | (State::Created, true) => self.reconnect(&container),
            (State::Exited, _) if meta.dir.join(crate::shim::protocol::SOCKET_FILE).exists() => self.follow(&container),
            _ => {}
        }
        if let Err(e) = self.finish_undo(&container) {
            log::error!("container {}: {e}", meta.id);
        }
        if !sandbox_exists(&meta.sandbox_id) {
            log::warn!("container {}: its sandbox {} is gone, removed", meta.id, meta.sandbox_id);
            self.bury(&container, 137, "ContainerStatusUnknown", "its sandbox is gone");
            // Another may be at it already.
            self.wait_until(&container, BURY_LIMIT, &Cancel::never(), |s| !s.shim_alive)?;
            self.release(&container)?;
            return self.unrecord(&container);
        }
        if let Err(e) = self.images.hold_restored(&meta.id, &meta.chains().concat()) {
            // It may run on: its layers are mounted. But it cannot be trusted to start.
            log::error!("container {}: {e}", meta.id);
        }
        self.names.restore(&meta.name, &meta.id, &request);
        self.settings.layers.appeared(&meta.id, &self.snapshots.writable(&meta.id));
        self.index.insert(&meta.id.clone(), container);
        Ok(())
    }

    /// A container that ran, or was being started.
    fn reconnect(self: &Arc<Self>, container: &Arc<Container>) {
        let meta = &container.meta;
        let starting = container.status.lock().starting;
        match Client::new(&meta.dir).state() {
            Ok(state) if state.phase != Phase::Starting => {
                self.note(container, |s| {
                    s.started_at = state.started_at;
                    s.state = State::Running;
                    s.starting = false;
                    s.pid = state.pid;
                });
                return self.follow(container);
            }
            // Whoever asked for the start has had no answer, and asks again.
            Ok(_) => {
                if let Err(e) = client::abandon(&meta.dir) {
                    log::warn!("container {}: give up its start: {e}", meta.id);
                }
            }
            // It is there and does not answer in time, be it for a disk that does not: its container may be well.
            Err(e) if e.code() != Code::Unavailable && !starting => {
                log::warn!("container {}: its shim does not answer: {e}", meta.id);
                return self.follow(container);
            }
            Err(_) => {}
        }
        match (client::exit_record(&meta.dir), starting) {
            (Ok(Some(_)), _) => self.follow(container),
            (_, true) => {
                // The record first: a shim that is only now starting finds it and gives up.
                if let Err(e) = record::refuse(&meta.dir).and_then(|()| client::kill_shim(&meta.dir)) {
                    log::error!("container {}: {e}", meta.id);
                }
                let why = "the daemon ended while it was being started";
                log::warn!("container {}: {why}", meta.id);
                self.note(container, |s| s.end_because(128, "StartError", why.to_owned(), crate::store::now_ns()));
                self.bury(container, 128, "StartError", why);
            }
            (_, false) => self.bury(container, 255, "Unknown", "its shim is gone, and left no exit record"),
        }
    }

    /// Follows a shim that is there, or takes the exit record of one that is not.
    fn follow(self: &Arc<Self>, container: &Arc<Container>) {
        container.status.lock().shim_alive = true;
        self.watch(container);
    }

    /// Removes bundles and snapshots without a record.
    fn sweep(&self) -> Result<()> {
        let mut errors = ErrorList::default();
        let dir = self.settings.run.join("containers");
        let known = |id: &str| self.index.find(id).ok().flatten().is_some();
        for entry in std::fs::read_dir(&dir).context(|| format!("list {}", dir.display()))?.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            if known(&id) {
                continue;
            }
            log::warn!("container {id}: left without a record, removed");
            let bundle = dir.join(&id);
            if errors.keep(end_orphan(&id, &bundle)).is_none() {
                // Its processes may still use what is below; the next start tries again.
                continue;
            }
            if errors.keep(super::image_volumes::unmount_images(&bundle)).is_none() {
                continue;
            }
            errors.keep(self.snapshots.remove(&id, &bundle.join("rootfs")));
            if errors.keep(super::volumes::remove(&bundle)).is_some() {
                errors.keep(file::remove_tree(&bundle));
            }
        }
        for id in self.snapshots.list()? {
            if !known(&id) {
                errors.keep(self.snapshots.remove(&id, &dir.join(&id).join("rootfs")));
            }
        }
        // What stays is nobody's hindrance; the next start tries again.
        if let Err(e) = errors.finish() {
            log::error!("remove what no container needs: {e}");
        }
        Ok(())
    }
}

/// Ends a container whose record is lost: its shim's configuration tells what there is to kill. A bundle without one never ran.
fn end_orphan(id: &str, bundle: &Path) -> Result<()> {
    let path = bundle.join(CONFIG_FILE);
    if !path.exists() {
        return Ok(());
    }
    let config: ShimConfig = serde_json::from_slice(&file::read(&path, 1 << 20)?).context(|| format!("read {}", path.display()))?;
    // A living shim goes with its container; what a dead one left is killed by its cgroup.
    let _ = Client::new(bundle).kill(libc::SIGKILL, true);
    let cgroup = Cgroup::at(Layout::host()?, &config.cgroup)?;
    client::cleanup_dead(&config.handler, id, bundle, Some(&cgroup), CLEANUP_LIMIT)
}
