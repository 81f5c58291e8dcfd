//! Root filesystems of containers from layers: a snapshot is `root/snapshots/<container id>` and what is mounted from it. Volumes
//! that images declare are directories in `root/volumes/<container id>`, beside the layers: writes to them do not pass the
//! overlay, work with a read-only root filesystem too, and are not part of the writable layer whose size kubelet is told.

mod copy;
mod overlay;
mod owners;

pub use owners::{Mapping, Owners};

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::quota::Projects;
use crate::sys::{file, label, mount, namespace};

/// How root filesystems are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// overlayfs: layers are shared, a writable directory on top.
    Overlay,
    /// A copy of all layers for each container, for hosts without overlayfs.
    Copy,
}

/// In a snapshot: what views of other images need.
const VIEWS: &str = "views";

/// Whether the file system of `dir` can carry overlays: mounts a small one, where nobody else sees it, and removes it again.
pub fn try_overlay(dir: &Path) -> Result<()> {
    let dir = dir.to_owned();
    namespace::in_own_mounts(move || overlay::probe(&dir, false))
}

/// What the files of a container have instead of what the image says.
#[derive(Clone, Copy, Default)]
pub struct Attributes<'a> {
    /// For a user namespace.
    pub owners: Option<&'a Owners<'a>>,
    /// The SELinux label of all of them.
    pub label: Option<&'a str>,
}

/// Makes and removes snapshots below one root.
#[derive(Clone, Debug)]
pub struct Snapshotter {
    dir: PathBuf,
    volumes: PathBuf,
    kind: Kind,
    /// Whether the kernel may leave writable layers unsynced.
    volatile: bool,
    mapping: Mapping,
    /// Set: the kernel counts what each snapshot takes.
    projects: Option<Arc<Projects>>,
}

impl Snapshotter {
    /// A snapshotter of a given kind, as configured.
    pub fn new(root: &Path, kind: Kind) -> Result<Snapshotter> {
        let (dir, volumes) = (root.join("snapshots"), root.join("volumes"));
        file::make_dir(&dir, 0o711)?;
        Ok(Snapshotter { dir, volumes, kind, volatile: false, mapping: Mapping::default(), projects: None })
    }

    /// overlayfs if this file system can carry one (tried with a real mount), else copies, with a warning.
    pub fn detect(root: &Path) -> Result<Snapshotter> {
        let mut found = Snapshotter::new(root, Kind::Overlay)?;
        if let Err(e) = overlay::probe(&found.dir, false) {
            log::warn!("snapshot: overlayfs does not work here, every container gets a copy of its image: {e}");
            found.kind = Kind::Copy;
        }
        Ok(found)
    }

    /// From now on writable layers need not be synced, where overlayfs knows how (Linux 5.10; tried with a real mount): no
    /// container outlives a reboot, so nobody would read what the syncs were for.
    pub fn allow_volatile(&mut self) {
        if self.kind == Kind::Overlay {
            self.volatile = overlay::probe(&self.dir, true).map_err(|e| log::info!("snapshot: no volatile overlays here: {e}")).is_ok();
        }
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

    /// Makes the snapshot of a container and mounts it on `target`. `layers` is ordered top first and may be empty. On an error nothing is
    /// left.
    pub fn prepare(&self, container: &str, layers: &[PathBuf], target: &Path, Attributes { owners, label }: Attributes) -> Result<()> {
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
        let how = overlay::Writable { volatile: self.volatile, label };
        let copy = |owners: Option<&Owners>| {
            copy::prepare(&fs, layers, target, owners.map(|owners| &owners.maps))?;
            label.map_or(Ok(()), |label| label::set_tree(target, label::SELINUX, label))
        };
        match (self.kind, owners, self.mapping) {
            (Kind::Overlay, None, _) => overlay::prepare(&place, layers, target, how),
            (Kind::Overlay, Some(owners), Mapping::Idmap) => owners::prepare_mapped(&place, layers, target, owners, how)
                .map_err(|e| Error::precondition(format!("userns_rootfs = \"idmap\", and layers cannot be mounted id-mapped: {e}"))),
            (Kind::Overlay, Some(owners), Mapping::Auto) => match owners::prepare_mapped(&place, layers, target, owners, how) {
                Ok(()) => Ok(()),
                Err(e) => {
                    static ONCE: std::sync::Once = std::sync::Once::new();
                    ONCE.call_once(|| log::warn!("snapshot: containers of user namespaces get a copy of their image: {e}"));
                    owners::reset(&place, target).and_then(|()| copy(Some(owners)))
                }
            },
            (Kind::Overlay, Some(owners), Mapping::Chown) | (Kind::Copy, Some(owners), _) => copy(Some(owners)),
            (Kind::Copy, None, _) => copy(None),
        }
        .context(what)?;
        undo.commit();
        Ok(())
    }

    /// Mounts what `layers` (top first) make together on `target`, read-only: the `number`th such view of a container that has a
    /// snapshot. The caller unmounts it before `remove`, which takes the rest.
    pub fn view(&self, container: &str, number: usize, layers: &[PathBuf], target: &Path, attributes: Attributes) -> Result<()> {
        let Attributes { owners, label } = attributes;
        let what = || format!("mount a view of {} layers on {}", layers.len(), target.display());
        let place = self.place(container)?.join(VIEWS).join(number.to_string());
        file::make_dir(&place, 0o700)?;
        file::make_dir(target, 0o711)?;
        let copied = || {
            let fs = place.join("fs");
            file::make_dir(&fs, 0o755)?;
            copy::merge(&fs, layers, owners.map(|owners| &owners.maps))?;
            label.map_or(Ok(()), |label| label::set_tree(&fs, label::SELINUX, label))?;
            mount::bind(&fs, target, false).and_then(|()| mount::make_readonly(target))
        };
        let mounted = match (self.kind, owners, self.mapping) {
            (Kind::Overlay, None, _) => overlay::view(&place, layers, target, label),
            (Kind::Overlay, Some(owners), Mapping::Idmap) => owners::view_mapped(&place, layers, target, owners, label),
            (Kind::Overlay, Some(owners), Mapping::Auto) => owners::view_mapped(&place, layers, target, owners, label).or_else(|e| {
                log::debug!("{}: {e}; it is copied", what());
                owners::release(&place).and_then(|()| copied())
            }),
            _ => copied(),
        };
        if mounted.is_err() {
            mount::unmount(target)?;
        }
        mounted.context(what)
    }

    /// Makes the `number`th volume of a container: a directory of its own with what is in the open directory `from`, owners, modes
    /// and attributes included. Returns where it is; `remove` takes it. `from` is part of a root filesystem for the same owners.
    pub fn volume(&self, container: &str, number: usize, from: BorrowedFd<'_>, attributes: Attributes) -> Result<PathBuf> {
        let Attributes { owners, label } = attributes;
        let what = || format!("make volume {number} of {container}");
        self.place(container)?;
        file::make_dir(&self.volumes, 0o711)?;
        let place = self.volumes.join(container);
        // The volume itself may be open to everybody: nobody but the container's root gets so far.
        file::make_dir(&place, 0o700)?;
        if let Some(owners) = owners {
            std::os::unix::fs::chown(&place, None, Some(owners.maps.root().1)).context(what)?;
            std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o710)).context(what)?;
        }
        let volume = place.join(number.to_string());
        std::fs::create_dir(&volume).context(what)?;
        copy::directory(from, &volume, None).context(what)?;
        label.map_or(Ok(()), |label| label::set_tree(&volume, label::SELINUX, label)).context(what)?;
        Ok(volume)
    }

    /// Unmounts a container's snapshot from `target` and deletes it. Not there is fine. Every step is tried.
    pub fn remove(&self, container: &str, target: &Path) -> Result<()> {
        let place = self.place(container)?;
        let mut errors = ErrorList::default();
        // Deleting below a mount that stayed would delete the files of whatever is mounted.
        let mut unmounted = errors.keep(mount::unmount(target)).is_some() & errors.keep(owners::release(&place)).is_some();
        for view in std::fs::read_dir(place.join(VIEWS)).into_iter().flatten().flatten() {
            unmounted &= errors.keep(owners::release(&view.path())).is_some();
        }
        if unmounted {
            errors.keep(file::remove_tree(&place));
        }
        errors.keep(file::remove_tree(&self.volumes.join(container)));
        errors.finish().context(|| format!("remove snapshot of {container}"))
    }

    /// The containers that have a snapshot or volumes here: for the sweep of orphans at start.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut found = BTreeSet::new();
        for dir in [&self.dir, &self.volumes] {
            let what = || format!("list {}", dir.display());
            let entries = match std::fs::read_dir(dir) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                entries => entries.context(what)?,
            };
            for entry in entries {
                found.insert(entry.context(what)?.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(found.into_iter().collect())
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
