//! The preload directory: archives that become images at the daemon's start, each once.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Images;
use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file::{self, Durability};

/// What makes a file the same file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    size: u64,
    mtime: i64,
    mtime_nsec: i64,
    /// The images it gave: when one is gone, the file is not imported again; who removed it meant it.
    images: Vec<String>,
}

pub(super) fn preload(images: &Images, dir: &Path) {
    let record = images.inner.root.join("images/preloaded.json");
    if let Err(e) = all(images, dir, &record) {
        log::error!("image: preload {}: {e}", dir.display());
    }
}

fn all(images: &Images, dir: &Path, record: &Path) -> Result<()> {
    let mut seen: BTreeMap<String, Seen> =
        file::read(record, 16 << 20).ok().and_then(|data| serde_json::from_slice(&data).ok()).unwrap_or_default();
    let mut found = BTreeMap::new();
    for path in file::list(dir)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Of a layout directory the index says what is in it.
        let index = path.join("index.json");
        let Ok(meta) = std::fs::metadata(if index.is_file() { &index } else { &path }) else { continue };
        if name.starts_with('.') || !meta.is_file() {
            continue;
        }
        found.insert(name, (path, Seen { size: meta.size(), mtime: meta.mtime(), mtime_nsec: meta.mtime_nsec(), images: Vec::new() }));
    }
    seen.retain(|name, _| found.contains_key(name));
    for (name, (path, mut now)) in found {
        if seen.get(&name).is_some_and(|s| (s.size, s.mtime, s.mtime_nsec) == (now.size, now.mtime, now.mtime_nsec)) {
            continue;
        }
        match images.import(&path, None, &Cancel::never()) {
            Ok(made) => {
                now.images = made.iter().map(|i| i.id.clone()).collect();
                log::info!("image: preloaded {}: {}", path.display(), now.images.join(", "));
                seen.insert(name, now);
            }
            Err(e) => log::error!("image: preload: {e}"),
        }
    }
    let data = serde_json::to_vec(&seen).context(|| "write the list of preloaded files")?;
    file::write(record, &data, 0o600, Durability::Atomic)
}
