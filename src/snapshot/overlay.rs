//! Snapshots as overlay mounts: the layers below, `fs` on top, `work` for the kernel.

use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::sys::rooted::{self, Rooted};
use crate::sys::{file, label, mount};

/// Layers whose names fit a page of options as they are.
const LONG_NAMES: usize = 30;

/// How a writable root filesystem is mounted.
#[derive(Clone, Copy)]
pub struct Writable<'a> {
    /// What is written is not synced, whoever asks; a power cut leaves the layer torn.
    pub volatile: bool,
    /// SELinux label of all that is in it.
    pub label: Option<&'a str>,
}

/// A writable root filesystem.
pub fn prepare(place: &Path, layers: &[PathBuf], target: &Path, how: Writable) -> Result<()> {
    let (upper, work) = (place.join("fs"), place.join("work"));
    file::make_dir(&work, 0o711)?;
    let empty;
    let lower = match layers {
        // An overlay needs one layer below; an image of none gets an empty one.
        [] => {
            empty = [bottom(place)?];
            &empty[..]
        }
        layers => {
            // The root directory of an overlay is that of its upper layer: it must look like the image's.
            let (top, upper) = (Rooted::open(&layers[0])?, Rooted::open(&upper)?);
            let root = |r: &Rooted| r.dir(Path::new("")).context(|| "open the root directory");
            rooted::copy_dir_metadata(root(&top)?, root(&upper)?, Path::new(""))
                .context(|| "take metadata of the image's root directory")?;
            layers
        }
    };
    mount_at(place, lower, Some((&upper, &work)), how, target)
}

/// What the layers make together, for reading alone: no upper layer, nothing to sync. The empty layer at the bottom makes an
/// overlay of a single layer too, so that its whiteouts and marks are hidden.
pub fn view(place: &Path, layers: &[PathBuf], target: &Path, label: Option<&str>) -> Result<()> {
    let empty = bottom(place)?;
    let mut lower = layers.to_vec();
    if lower.len() < 2 {
        lower.push(empty);
    }
    if lower.len() < 2 {
        label.map_or(Ok(()), |label| label::set_tree(&lower[0], label::SELINUX, label))?;
        return mount::bind(&lower[0], target, false).and_then(|()| mount::make_readonly(target));
    }
    mount_at(place, &lower, None, Writable { volatile: false, label }, target)
}

fn bottom(place: &Path) -> Result<PathBuf> {
    let empty = place.join("empty");
    file::make_dir(&empty, 0o755)?;
    Ok(empty)
}

fn mount_at(place: &Path, lower: &[PathBuf], upper_work: Option<(&Path, &Path)>, how: Writable, target: &Path) -> Result<()> {
    let links = place.join("l");
    let short;
    let lower = if lower.len() > LONG_NAMES {
        short = shorten(&links, lower)?;
        &short
    } else {
        lower
    };
    let result = mount::overlay(&mount::Overlay { lower, upper_work, volatile: how.volatile, label: how.label }, target);
    // The kernel resolved the links; the mount keeps the directories themselves.
    file::remove_tree(&links)?;
    result
}

/// A link of a few characters for each layer: all layers' names together must fit the one page of options that kernels
/// before 6.7 take.
fn shorten(links: &Path, layers: &[PathBuf]) -> Result<Vec<PathBuf>> {
    file::make_dir(links, 0o700)?;
    let link = |(i, layer): (usize, &PathBuf)| {
        let link = links.join(i.to_string());
        std::os::unix::fs::symlink(layer, &link).context(|| format!("link {}", link.display()))?;
        Ok(link)
    };
    layers.iter().enumerate().map(link).collect()
}

/// Mounts and unmounts a small overlay in `dir`, with what our layers need: opaque marks and whiteouts.
pub fn probe(dir: &Path, volatile: bool) -> Result<()> {
    let place = dir.join(format!(".probe-{}", std::process::id()));
    file::remove_tree(&place)?;
    let result = (|| {
        let (low, high, target) = (place.join("low"), place.join("high"), place.join("target"));
        for made in [&place, &low, &high, &place.join("fs"), &target] {
            file::make_dir(made, 0o700)?;
        }
        std::fs::write(low.join("hidden"), "").context(|| "write a file of the probe")?;
        rustix::fs::mknodat(rustix::fs::CWD, high.join("hidden"), rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty(), 0)
            .context(|| "make a whiteout")?;
        rooted::set_opaque(&high).context(|| "mark a directory opaque")?;
        prepare(&place, &[high, low], &target, Writable { volatile, label: None })
    })();
    mount::unmount(&place.join("target"))?;
    file::remove_tree(&place)?;
    result
}
