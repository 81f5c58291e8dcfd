//! CDI, the Container Device Interface (github.com/cncf-tags/container-device-interface, SPEC.md, 1.1.0 and older): devices by
//! names as `vendor.com/gpu=0`, and spec files that say what a container needs for each: nodes, mounts, variables, hooks.
//!
//! The crate container-device-interface is not used: for these files it brings a schema validator, a command line parser
//! and a YAML parser that is not maintained any more, writes to stdout and needs a newer compiler than we do.

/// Spec files: their form and what makes one valid.
mod document;
/// What a device changes in an OCI spec.
mod edits;
/// Names of devices, in requests and annotations.
mod name;
/// YAML as JSON values.
pub mod yaml;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::runtime::Spec;

use self::document::Document;
pub use self::name::{requested, Name};
use crate::error::{Context, Error, Result};
use crate::sys::file;
use crate::sys::lock::{Lock, Rank};

/// Larger spec files are not read, bytes.
const FILE_LIMIT: u64 = 4 << 20;

/// The spec files of the configured directories.
pub struct Registry {
    /// In rising priority.
    dirs: Vec<PathBuf>,
    /// Files as they were last read.
    files: Lock<HashMap<PathBuf, Known>>,
}

#[derive(Clone)]
struct Known {
    stamp: Stamp,
    /// Or why it cannot be used.
    document: std::result::Result<Arc<Document>, String>,
}

/// A file that has the same one has not been written since.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}

/// Files that are not valid, and why.
type Broken = Vec<(PathBuf, String)>;

/// Where a device is defined.
struct Place {
    document: Arc<Document>,
    /// Of the device in the document.
    index: usize,
    priority: usize,
    path: PathBuf,
    /// Another file of the same priority that defines it too: neither counts then.
    rival: Option<PathBuf>,
}

impl Registry {
    /// Spec files in `dirs`; a device in a later one wins.
    pub fn new(dirs: Vec<PathBuf>) -> Registry {
        Registry { dirs, files: Lock::new(Rank::Leaf, HashMap::new()) }
    }

    /// Gives the container of `spec` these devices, each once. FAILED_PRECONDITION names one that no valid spec file defines, or
    /// that cannot be given on this host. On an error the spec may be changed in part.
    pub fn inject(&self, names: &[Name], spec: &mut Spec) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let (places, broken) = self.scan()?;
        let mut used: Vec<&Arc<Document>> = Vec::new();
        let mut all = Vec::new();
        for name in names {
            let place = places.get(name).ok_or_else(|| self.unknown(name, &broken))?;
            if let Some(rival) = &place.rival {
                let (one, other) = (place.path.display(), rival.display());
                return Err(Error::precondition(format!("CDI device {name}: both {one} and {other} define it")));
            }
            // What a file says of all its devices comes once, before the first of them.
            if !used.iter().any(|document| Arc::ptr_eq(document, &place.document)) {
                used.push(&place.document);
                all.push((name, &place.path, &place.document.container_edits));
            }
            all.push((name, &place.path, &place.document.devices[place.index].container_edits));
        }
        for (name, path, edits) in all {
            edits::apply(edits, spec).context(|| format!("CDI device {name} of {}", path.display()))?;
        }
        edits::order_mounts(spec);
        Ok(())
    }

    /// The names of all devices, and what is wrong with files that are not valid.
    pub fn survey(&self) -> Result<(Vec<String>, Vec<String>)> {
        let (places, broken) = self.scan()?;
        let broken = broken.into_iter().map(|(path, why)| format!("{}: {why}", path.display())).collect();
        Ok((places.keys().map(Name::to_string).collect(), broken))
    }

    fn unknown(&self, name: &Name, broken: &Broken) -> Error {
        let dirs: Vec<_> = self.dirs.iter().map(|dir| dir.display().to_string()).collect();
        let broken: Vec<_> = broken.iter().map(|(path, why)| format!("; {} is not valid: {why}", path.display())).collect();
        Error::precondition(format!("CDI device {name}: no spec file in {} defines it{}", dirs.join(", "), broken.concat()))
    }

    /// All devices by name, and the files that are not valid. Only files that have changed are read; those that cannot be used are
    /// logged when they are.
    fn scan(&self) -> Result<(BTreeMap<Name, Place>, Broken)> {
        let mut known = self.files.lock();
        let mut files = HashMap::new();
        let mut places: BTreeMap<Name, Place> = BTreeMap::new();
        let mut broken = Vec::new();
        for (priority, dir) in self.dirs.iter().enumerate() {
            for path in spec_files(dir)? {
                // Gone meanwhile.
                let Some(stamp) = stamp(&path)? else { continue };
                let entry = match known.remove(&path).filter(|entry| entry.stamp == stamp) {
                    Some(entry) => entry,
                    None => Known { stamp, document: read(&path) },
                };
                match &entry.document {
                    Ok(document) => add(&mut places, document, priority, &path),
                    Err(why) => broken.push((path.clone(), why.clone())),
                }
                files.insert(path, entry);
            }
        }
        *known = files;
        Ok((places, broken))
    }
}

fn add(places: &mut BTreeMap<Name, Place>, document: &Arc<Document>, priority: usize, path: &Path) {
    for (index, device) in document.devices.iter().enumerate() {
        let name = document.name_of(device);
        let rival = match places.get(&name) {
            Some(other) if other.priority == priority => Some(other.path.clone()),
            _ => None,
        };
        places.insert(name, Place { document: document.clone(), index, priority, path: path.to_owned(), rival });
    }
}

fn spec_files(dir: &Path) -> Result<impl Iterator<Item = PathBuf>> {
    let files = file::list(dir).context(|| "look for CDI specs")?;
    Ok(files.into_iter().filter(|path| file::has_extension(path, &["json", "yaml"])))
}

/// None for what is gone or no file.
fn stamp(path: &Path) -> Result<Option<Stamp>> {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(Stamp { modified: meta.modified().ok(), length: meta.len(), inode: meta.ino() })),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(|| format!("look at CDI spec {}", path.display())),
    }
}

fn read(path: &Path) -> std::result::Result<Arc<Document>, String> {
    let parse = || {
        let bytes = file::read(path, FILE_LIMIT).map_err(|error| error.to_string())?;
        let text = String::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())?;
        let json = file::has_extension(path, &["json"]);
        Document::parse(&text, json)
    };
    let parsed = parse();
    if let Err(why) = &parsed {
        log::warn!("CDI spec {} is left out: {why}", path.display());
    }
    parsed.map(Arc::new)
}

#[cfg(test)]
mod tests;
