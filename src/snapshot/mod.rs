//! Root filesystems of containers from layers: a snapshot is `root/snapshots/<container id>` and what is mounted from it.

mod copy;
mod overlay;
mod owners;

pub use owners::{Mapping, Owners};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::quota::Projects;
use crate::sys::{file, mount};

/// How root filesystems are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// overlayfs: layers are shared, a writable directory on top.
    Overlay,
    /// A copy of all layers for each container, for hosts without overlayfs.
    Copy,
}

/// Makes and removes snapshots below one root.
#[derive(Clone, Debug)]
pub struct Snapshotter {
    dir: PathBuf,
    kind: Kind,
    mapping: Mapping,
    /// Set: the kernel counts what each snapshot takes.
    projects: Option<Arc<Projects>>,
}

impl Snapshotter {
    /// A snapshotter of a given kind, as configured.
    pub fn new(root: &Path, kind: Kind) -> Result<Snapshotter> {
        let dir = root.join("snapshots");
        file::make_dir(&dir, 0o711)?;
        Ok(Snapshotter { dir, kind, mapping: Mapping::default(), projects: None })
    }

    /// overlayfs if this file system can carry one (tried with a real mount), else copies, with a warning.
    pub fn detect(root: &Path) -> Result<Snapshotter> {
        let mut found = Snapshotter::new(root, Kind::Overlay)?;
        if let Err(e) = overlay::probe(&found.dir) {
            log::warn!("snapshot: overlayfs does not work here, every container gets a copy of its image: {e}");
            found.kind = Kind::Copy;
        }
        Ok(found)
    }

    /// Has the kernel count new snapshots, if their file system can do it.
    pub fn count_projects(&mut self) -> Option<Arc<Projects>> {
        self.projects = Projects::detect(&self.dir).map_err(|e| log::debug!("snapshot: {e}")).ok().map(Arc::new);
        self.projects.clone()
    }

    /// How root filesystems for user namespaces are made by a snapshotter of overlays; one of copies changes the owners while it copies.
    pub fn set_mapping(&mut self, mapping: Mapping) {
        self.mapping = mapping;
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The directory that receives what a container writes; for disk usage.
    pub fn writable(&self, container: &str) -> PathBuf {
        self.dir.join(container).join("fs")
    }

    /// Makes the snapshot of a container and mounts it on `target`. `layers` is ordered top first and may be empty. `owners`: for a user
    /// namespace. On an error nothing is left.
    pub fn prepare(&self, container: &str, layers: &[PathBuf], target: &Path, owners: Option<&Owners>) -> Result<()> {
        let what = || format!("prepare snapshot of {container}");
        let place = self.place(container)?;
        if place.exists() {
            return Err(Error::internal(format!("{}: {} exists", what(), place.display())));
        }
        // On disk before the mount: what a crash leaves is found by `list`.
        file::make_dir(&place, 0o700)?;
        let undo = Undo { snapshotter: self, container, target };
        // Before anything is in it: all of it inherits the project, and renames between projects are refused.
        if let Some(Err(e)) = self.projects.as_ref().map(|p| p.assign(&place)) {
            log::warn!("{}: {e}; it will be walked", what());
        }
        let fs = place.join("fs");
        file::make_dir(&fs, 0o755)?;
        file::make_dir(target, 0o711)?;
        match (self.kind, owners, self.mapping) {
            (Kind::Overlay, None, _) => overlay::prepare(&place, layers, target),
            (Kind::Overlay, Some(owners), Mapping::Idmap) => owners::prepare_mapped(&place, layers, target, owners)
                .map_err(|e| Error::precondition(format!("userns_rootfs = \"idmap\", and layers cannot be mounted id-mapped: {e}"))),
            (Kind::Overlay, Some(owners), Mapping::Auto) => match owners::prepare_mapped(&place, layers, target, owners) {
                Ok(()) => Ok(()),
                Err(e) => {
                    static ONCE: std::sync::Once = std::sync::Once::new();
                    ONCE.call_once(|| log::warn!("snapshot: containers of user namespaces get a copy of their image: {e}"));
                    owners::reset(&place, target).and_then(|()| copy::prepare(&fs, layers, target, Some(&owners.maps)))
                }
            },
            (Kind::Overlay, Some(owners), Mapping::Chown) | (Kind::Copy, Some(owners), _) => {
                copy::prepare(&fs, layers, target, Some(&owners.maps))
            }
            (Kind::Copy, None, _) => copy::prepare(&fs, layers, target, None),
        }
        .context(what)?;
        undo.commit();
        Ok(())
    }

    /// Unmounts a container's snapshot from `target` and deletes it. Not there is fine. Every step is tried.
    pub fn remove(&self, container: &str, target: &Path) -> Result<()> {
        let place = self.place(container)?;
        let mut errors = ErrorList::default();
        // Deleting below a mount that stayed would delete the files of whatever is mounted.
        if errors.keep(mount::unmount(target)).is_some() & errors.keep(owners::release(&place)).is_some() {
            errors.keep(file::remove_tree(&place));
        }
        errors.finish().context(|| format!("remove snapshot of {container}"))
    }

    /// The containers that have a snapshot here: for the sweep of orphans at start.
    pub fn list(&self) -> Result<Vec<String>> {
        let what = || format!("list {}", self.dir.display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir).context(what)? {
            found.push(entry.context(what)?.file_name().to_string_lossy().into_owned());
        }
        found.sort();
        Ok(found)
    }

    fn place(&self, container: &str) -> Result<PathBuf> {
        if container.is_empty() || container == "." || container == ".." || container.contains('/') {
            return Err(Error::internal(format!("snapshot of {container:?}: not a container id")));
        }
        Ok(self.dir.join(container))
    }
}

/// Removes a half-made snapshot unless committed.
struct Undo<'a> {
    snapshotter: &'a Snapshotter,
    container: &'a str,
    target: &'a Path,
}

impl Undo<'_> {
    fn commit(self) {
        std::mem::forget(self);
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.snapshotter.remove(self.container, self.target) {
            log::error!("snapshot: {e}");
        }
    }
}

#[cfg(test)]
mod tests;
