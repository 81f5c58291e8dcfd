//! `crisp image fsck`: verifies all that is stored of images, and repairs it. What is damaged is never deleted together with
//! what is not: records and blobs go to the quarantine, a damaged layer is marked for the next pull to fetch it alone.
//!
//! It reads every byte of every layer once, hashes it with SHA-256 and XXH3, and looks at each file's metadata: as long as the
//! disk takes. It holds a layer while it looks at it, and no lock, so pulls, removals and containers go on beside it.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use super::audit::audit;
use super::digest::{is_hex, Digest};
use super::layers::{delete, read_marker, set_aside, Marker};
use super::Inner;
use crate::error::{Context, ErrorList, Result};
use crate::sys::cancel::Cancel;

/// What something is a problem of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Index,
    Blob,
    Marker,
    Layer,
    /// An image that lacks something already.
    Incomplete,
    /// A layer that may be right: there is nothing to verify it by.
    Unverifiable,
    /// Something that nobody needs.
    Orphan,
}

impl Part {
    /// The word for it in the admin service.
    pub fn name(self) -> &'static str {
        match self {
            Part::Index => "index",
            Part::Blob => "blob",
            Part::Marker => "marker",
            Part::Layer => "layer",
            Part::Incomplete => "incomplete",
            Part::Unverifiable => "unverifiable",
            Part::Orphan => "orphan",
        }
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub part: Part,
    /// Digest, chain ID or path.
    pub subject: String,
    pub message: String,
    /// What was done; empty when nothing was.
    pub action: String,
    /// Names, else ids, of the images that suffer.
    pub images: Vec<String>,
}

/// How far a check is.
#[derive(Clone, Debug, Default)]
pub struct Check {
    /// What is looked at.
    pub subject: String,
    /// Bytes of files read, and of all layers.
    pub bytes: u64,
    pub total: u64,
    /// Since the last one.
    pub problems: Vec<Problem>,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub images: usize,
    pub layers: usize,
    pub blobs: usize,
}

/// Keeps a layer from being collected while it is looked at.
struct Lease<'a> {
    inner: &'a Inner,
    holder: String,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.inner.layers.release(&self.holder);
    }
}

/// Checks everything; `tell` gets each part's outcome.
pub(super) fn check(inner: &Inner, repair: bool, cancel: &Cancel, tell: &mut dyn FnMut(Check) -> Result<()>) -> Result<Checked> {
    let mut layers = inner.layers.all();
    layers.sort();
    let total = inner.layers.usage().bytes;
    let quarantine = inner.root.join("quarantine");
    let lacking = inner.catalog.all_incomplete().into_iter().map(|image| Problem {
        part: Part::Incomplete,
        images: vec![image.names.first().unwrap_or(&image.id).clone()],
        subject: image.id,
        message: format!("{}; pull it again", image.reason),
        action: String::new(),
    });
    tell(Check { subject: "images".to_owned(), bytes: 0, total, problems: lacking.collect() })?;
    let (problems, mut checked) = inner.catalog.check(repair, &quarantine, &inner.layers)?;
    tell(Check { subject: "index and blobs".to_owned(), bytes: 0, total, problems })?;
    let mut bytes = 0;
    for chain_id in layers {
        let lease = Lease { inner, holder: format!("fsck/{}", inner.serial.fetch_add(1, Ordering::Relaxed)) };
        // Collected since, or condemned.
        if inner.layers.hold_ready(&lease.holder, std::slice::from_ref(&chain_id)).is_err() {
            continue;
        }
        let problems = layer(inner, &chain_id, repair, cancel, &mut |n| {
            bytes += n;
            tell(Check { subject: chain_id.to_string(), bytes, total, problems: Vec::new() })
        })?;
        checked.layers += 1;
        tell(Check { subject: chain_id.to_string(), bytes, total, problems })?;
    }
    let problems = orphans(inner, repair)?;
    tell(Check { subject: "orphans".to_owned(), bytes, total, problems })?;
    Ok(checked)
}

fn layer(inner: &Inner, chain_id: &Digest, repair: bool, cancel: &Cancel, told: &mut dyn FnMut(u64) -> Result<()>) -> Result<Vec<Problem>> {
    let Some(known) = inner.layers.marker(chain_id) else { return Ok(Vec::new()) };
    let images = inner.catalog.users(chain_id);
    let problem = |part, message: String, action: &str| Problem {
        part,
        subject: chain_id.to_string(),
        message,
        action: action.to_owned(),
        images: images.clone(),
    };
    let place = inner.layers.place(chain_id);
    let mut problems = Vec::new();
    let broken = match read_marker(&place) {
        Ok(marker) if marker == known => None,
        Ok(_) => Some("it says something else than at the start".to_owned()),
        Err(e) => Some(e.to_string()),
    };
    let finding = match known.taped {
        true => audit(&place, &known.diff_id, cancel, &mut steps(told))?,
        false => {
            let why = "its archive held a file twice, or it was made by an older version: there is nothing to verify it by";
            problems.push(problem(Part::Unverifiable, why.to_owned(), ""));
            None
        }
    };
    if let Some(why) = finding {
        let action = match repair && inner.layers.condemn(chain_id, &why)? {
            true => {
                inner.catalog.refresh(&inner.layers);
                "marked for the next pull"
            }
            false => "",
        };
        problems.push(problem(Part::Layer, why, action));
    } else if let Some(why) = broken {
        let action = if repair { write_marker(&known, &place).map(|()| "written anew")? } else { "" };
        problems.push(problem(Part::Marker, why, action));
    }
    Ok(problems)
}

/// What is left of a marker we cannot read is worth nothing.
fn write_marker(marker: &Marker, place: &std::path::Path) -> Result<()> {
    marker.write(place).context(|| format!("mend the marker of {}", marker.chain_id))
}

/// Not a message for each block.
fn steps<'a>(told: &'a mut dyn FnMut(u64) -> Result<()>) -> impl FnMut(u64) -> Result<()> + 'a {
    const STEP: u64 = 16 << 20;
    let mut pending = 0;
    move |n| {
        pending += n;
        if pending < STEP {
            return Ok(());
        }
        told(std::mem::take(&mut pending))
    }
}

/// Layers that no image and no container needs, and directories that no layer is.
fn orphans(inner: &Inner, repair: bool) -> Result<Vec<Problem>> {
    let orphan = |subject: String, message: &str, action: &str| Problem {
        part: Part::Orphan,
        subject,
        message: message.to_owned(),
        action: action.to_owned(),
        images: Vec::new(),
    };
    let mut problems = Vec::new();
    for chain_id in inner.layers.unneeded(&inner.catalog.used()) {
        problems.push(orphan(chain_id.to_string(), "layer that no image and no container needs", if repair { "removed" } else { "" }));
    }
    if repair {
        inner.spared.lock().clear();
        inner.collect()?;
    }
    let (mut gone, mut errors): (Vec<PathBuf>, _) = (Vec::new(), ErrorList::default());
    let dir = inner.layers.dir.clone();
    let what = || format!("list {}", dir.display());
    for entry in std::fs::read_dir(&dir).context(what)? {
        let path = entry.context(what)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (hex, rest) = name.split_at(name.find('.').unwrap_or(name.len()));
        // What is being made or removed has a claim.
        let chain_id = Digest::parse(&format!("sha256:{hex}")).ok().filter(|_| is_hex(hex, 64));
        let Some(chain_id) = chain_id else {
            problems.push(orphan(path.display().to_string(), "not a layer; left alone", ""));
            continue;
        };
        if rest.starts_with(".tmp-") && !inner.layers.is_busy(&chain_id) {
            let action = if repair { "removed" } else { "" };
            problems.push(orphan(path.display().to_string(), "half-made layer", action));
            if repair {
                match set_aside(&path) {
                    // Its pull has committed it, or given it up, since we looked.
                    Err(_) if !path.exists() => drop(problems.pop()),
                    result => gone.extend(errors.keep(result)),
                }
            }
        }
    }
    delete(gone);
    errors.finish().map(|()| problems)
}
