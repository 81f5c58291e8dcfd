//! Hooks of the host's administrator, as podman and CRI-O read them (oci-hooks(5)): JSON files that say which program runs at which
//! stage of which containers' lives.

/// The files' form.
mod document;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::runtime::{Hook, Hooks, Spec};

use self::document::Document;
use crate::error::{Context, Error, Result};
use crate::sys::file;
use crate::sys::lock::{Lock, Rank};

/// The stages of the OCI runtime spec.
pub const STAGES: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Larger files are not read, bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// The hook files of the configured directories.
pub struct Directories {
    /// A file in a later one replaces the one of the same name in an earlier one.
    dirs: Vec<PathBuf>,
    files: Lock<HashMap<PathBuf, Known>>,
}

struct Known {
    modified: Option<SystemTime>,
    length: u64,
    document: Arc<Document>,
}

/// What hooks are chosen by.
pub struct Subject<'a> {
    /// Of sandbox and container.
    pub annotations: &'a BTreeMap<String, String>,
    /// Whether the request itself has mounts; the usual ones do not count.
    pub has_bind_mounts: bool,
}

impl Directories {
    /// Hooks in `dirs`, in rising priority.
    pub fn new(dirs: Vec<PathBuf>) -> Directories {
        Directories { dirs, files: Lock::new(Rank::Leaf, HashMap::new()) }
    }

    /// Puts the hooks that match into the spec, in the order of their files' names. FAILED_PRECONDITION names a file that is not valid:
    /// what an administrator wants of every container is not left out in silence.
    pub fn inject(&self, subject: &Subject, spec: &mut Spec) -> Result<()> {
        for (path, document) in self.scan()? {
            let command = spec.process().as_ref().and_then(|process| process.args().as_ref()?.first().cloned()).unwrap_or_default();
            if document.matches(subject, &command) {
                log::debug!("hook {} runs", path.display());
                for stage in &document.stages {
                    add(spec, stage, document.hook());
                }
            }
        }
        Ok(())
    }

    /// The files that count, all of them valid.
    pub fn survey(&self) -> Result<Vec<PathBuf>> {
        Ok(self.scan()?.into_iter().map(|(path, _)| path).collect())
    }

    /// The files that count, in the order of their names whatever the case.
    fn scan(&self) -> Result<Vec<(PathBuf, Arc<Document>)>> {
        let mut by_name: BTreeMap<(String, String), PathBuf> = BTreeMap::new();
        for dir in &self.dirs {
            let files = file::list(dir).context(|| "look for hooks")?;
            for path in files.into_iter().filter(|path| file::has_extension(path, &["json"])) {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                by_name.insert((name.to_lowercase(), name), path);
            }
        }
        let mut known = self.files.lock();
        let (mut kept, mut found) = (HashMap::new(), Vec::new());
        for path in by_name.into_values() {
            let what = || format!("read hook {}", path.display());
            let meta = match std::fs::metadata(&path) {
                Ok(meta) => meta,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).context(what),
            };
            let same = |known: &Known| known.modified == meta.modified().ok() && known.length == meta.len();
            let entry = match known.remove(&path).filter(same) {
                Some(entry) => entry,
                None => {
                    let text = file::read(&path, FILE_LIMIT).context(what)?;
                    let document = Document::parse(&text).map_err(|why| Error::precondition(format!("{}: {why}", what())))?;
                    Known { modified: meta.modified().ok(), length: meta.len(), document: Arc::new(document) }
                }
            };
            found.push((path.clone(), entry.document.clone()));
            kept.insert(path, entry);
        }
        *known = kept;
        Ok(found)
    }
}

/// Appends a hook to a stage of [`STAGES`].
pub fn add(spec: &mut Spec, stage: &str, hook: Hook) {
    let hooks = spec.hooks_mut().get_or_insert_with(Hooks::default);
    // prestart is deprecated for users, and still what most hooks are written for.
    #[allow(deprecated)]
    let list = match stage {
        "prestart" => hooks.prestart_mut(),
        "createRuntime" => hooks.create_runtime_mut(),
        "createContainer" => hooks.create_container_mut(),
        "startContainer" => hooks.start_container_mut(),
        "poststart" => hooks.poststart_mut(),
        _ => hooks.poststop_mut(),
    };
    list.get_or_insert_with(Vec::new).push(hook);
}

#[cfg(test)]
mod tests;
