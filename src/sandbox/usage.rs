//! What is kept open to measure a sandbox: its cgroup and its network. All of it is closed before the sandbox's namespaces go.

use std::sync::Arc;

use super::Sandbox;
use crate::cgroup::stat::{Meter, Reader, Sample};
use crate::cgroup::{path, Cgroup, Layout};
use crate::error::Result;
use crate::sys::links::{Link, Links};
use crate::sys::lock::{Lock, Rank};

/// Kept open from the first reading to the stop.
pub struct Usage {
    meter: Meter,
    network: Lock<Network>,
}

enum Network {
    Unopened,
    Open(Arc<Links>),
    /// For good.
    Closed,
}

impl Default for Usage {
    fn default() -> Usage {
        Usage { meter: Meter::default(), network: Lock::new(Rank::Leaf, Network::Unopened) }
    }
}

impl Usage {
    /// Closes everything for good; what is being read just now is closed after that.
    pub(super) fn close(&self) {
        self.meter.close();
        let before = std::mem::replace(&mut *self.network.lock(), Network::Closed);
        drop(before);
    }
}

impl Sandbox {
    /// The cgroup that holds this sandbox alone: our own, or the pod's when kubelet made one, which it names after the pod's
    /// uid. None: its parent may hold others too.
    pub fn cgroup(&self) -> Option<Result<Cgroup>> {
        let parent = &self.meta.cgroup_parent;
        if !self.meta.own_cgroup_parent && !path::is_of_pod(parent, &self.config.metadata.uid) {
            return None;
        }
        Some(path::parent(parent).and_then(|path| Cgroup::at(Layout::host()?, &path)))
    }

    /// A sample of its cgroup and the CPU rate; None without a cgroup of its own (see `cgroup`), or when that is not there.
    pub fn sample(&self) -> Option<(Sample, Option<u64>)> {
        self.usage.meter.sample(|| self.cgroup()?.ok())
    }

    /// The reader of its cgroup, for what a sample does not have.
    pub fn reader(&self) -> Option<Arc<Reader>> {
        self.usage.meter.reader(|| self.cgroup()?.ok())
    }

    /// Traffic of its links; None on the host's network, and once it is stopped.
    pub fn links(&self) -> Option<Vec<Link>> {
        let links = self.links_socket()?;
        links.read().map_err(|e| log::debug!("sandbox {}: {e}", self.meta.id)).ok()
    }

    fn links_socket(&self) -> Option<Arc<Links>> {
        let pin = self.meta.netns.as_deref()?;
        match &*self.usage.network.lock() {
            Network::Open(links) => return Some(links.clone()),
            Network::Closed => return None,
            Network::Unopened => {}
        }
        let opened = Links::open(pin).map_err(|e| log::debug!("sandbox {}: {e}", self.meta.id)).ok()?;
        let mut network = self.usage.network.lock();
        match &*network {
            // Somebody was faster.
            Network::Open(links) => Some(links.clone()),
            Network::Closed => None,
            Network::Unopened => {
                let opened = Arc::new(opened);
                *network = Network::Open(opened.clone());
                Some(opened)
            }
        }
    }
}
