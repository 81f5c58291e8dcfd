//! Root filesystems for user namespaces: an image's root becomes the namespace's.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::overlay;
use crate::error::{Context, ErrorList, Result};
use crate::sys::idmap::{self, Flow, IdMaps};
use crate::sys::{crash, file, mount};

/// Whose the files of a snapshot are.
#[derive(Clone, Copy, Debug)]
pub struct Owners<'a> {
    pub maps: IdMaps,
    /// Pin of the user namespace.
    pub namespace: &'a Path,
}

/// How the owners are changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapping {
    /// Id-mapped layers where they work, else a copy.
    #[default]
    Auto,
    /// Layers are mounted with other owners: nothing is copied. Linux 5.19, and a file system that can do it.
    Idmap,
    /// A copy of all layers for each container, with the owners changed.
    Chown,
}

/// Where layers are mounted while the overlay is made.
const LAYERS: &str = "mapped";

/// An overlay of id-mapped layers. The upper directory belongs to the namespace's root, like the top layer seen through the map.
pub fn prepare_mapped(place: &Path, layers: &[PathBuf], target: &Path, owners: &Owners, how: overlay::Writable) -> Result<()> {
    let mapped = map_layers(place, layers, owners)?;
    crash::step("create:1-mapped-layers");
    if layers.is_empty() {
        let (uid, gid) = owners.maps.root();
        let fs = place.join("fs");
        std::os::unix::fs::chown(&fs, Some(uid), Some(gid)).context(|| format!("set the owner of {}", fs.display()))?;
    }
    overlay::prepare(place, &mapped, target, how)?;
    // The overlay has its own copies of these mounts.
    release(place)
}

/// The same to be read alone.
pub fn view_mapped(place: &Path, layers: &[PathBuf], target: &Path, owners: &Owners, label: Option<&str>) -> Result<()> {
    let mapped = map_layers(place, layers, owners)?;
    overlay::view(place, &mapped, target, label)?;
    release(place)
}

fn map_layers(place: &Path, layers: &[PathBuf], owners: &Owners) -> Result<Vec<PathBuf>> {
    let namespace = File::open(owners.namespace).context(|| format!("open {}", owners.namespace.display()))?;
    let mut mapped = Vec::with_capacity(layers.len());
    for (number, layer) in layers.iter().enumerate() {
        let at = place.join(LAYERS).join(number.to_string());
        file::make_dir(&at, 0o700)?;
        // Read-only: whatever goes wrong with a snapshot, its removal cannot reach a layer.
        idmap::attach(idmap::detached(layer, namespace.as_fd(), false, true, Flow::Private)?, &at)?;
        mapped.push(at);
    }
    Ok(mapped)
}

/// Unmounts the layers, of which there are none but while an overlay is made and after a crash of just then.
pub fn release(place: &Path) -> Result<()> {
    let dir = place.join(LAYERS);
    let Ok(entries) = std::fs::read_dir(&dir) else { return Ok(()) };
    let mut errors = ErrorList::default();
    for entry in entries.flatten() {
        if errors.keep(mount::unmount(&entry.path())).is_some() {
            errors.keep(file::remove_dir(&entry.path()));
        }
    }
    errors.keep(file::remove_dir(&dir));
    errors.finish()
}

/// Takes back a half-made overlay so that a copy can take its place: `place` is as before.
pub fn reset(place: &Path, target: &Path) -> Result<()> {
    mount::unmount(target)?;
    release(place)?;
    for name in ["fs", "work", "empty", "l"] {
        file::remove_tree(&place.join(name))?;
    }
    file::make_dir(&place.join("fs"), 0o755)
}
