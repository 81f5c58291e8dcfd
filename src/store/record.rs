//! Records: `<id>.json` (versioned metadata and status) beside `<id>.pb` (the request's config message as protobuf bytes).
//! Replaced atomically, without fsync: a power cut may lose the last seconds but never tears. What cannot be read
//! is moved to quarantine with a log line; it stops nothing and deletes nothing.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorList, Result};
use crate::sys::file::{self, Durability};

/// Format version written; a higher one is quarantined (a newer crisp wrote it).
const VERSION: u32 = 1;
/// A record larger than this is not one of ours.
const LIMIT: u64 = 16 << 20;

#[derive(Serialize)]
struct Written<'a, T> {
    version: u32,
    id: &'a str,
    record: &'a T,
}

#[derive(Deserialize)]
struct Read<T> {
    version: u32,
    id: String,
    record: T,
}

/// The records of one noun in one directory.
pub struct Records {
    dir: PathBuf,
    quarantine: PathBuf,
}

/// A record read back.
pub struct Restored<T> {
    pub id: String,
    pub record: T,
    /// The config message.
    pub config: Vec<u8>,
}

impl Records {
    /// Records in `root/<noun>`; both directories are made.
    pub fn open(root: &Path, noun: &str) -> Result<Records> {
        let records = Records { dir: root.join(noun), quarantine: root.join("quarantine") };
        file::make_dir(&records.dir, 0o700)?;
        file::make_dir(&records.quarantine, 0o700)?;
        Ok(records)
    }

    /// Writes the config message; before the first `save` of that id.
    pub fn save_config(&self, id: &str, config: &[u8]) -> Result<()> {
        file::write(&self.dir.join(format!("{id}.pb")), config, 0o600, Durability::Atomic)
    }

    pub fn save<T: Serialize>(&self, id: &str, record: &T) -> Result<()> {
        let json = serde_json::to_vec(&Written { version: VERSION, id, record }).context(|| format!("encode record {id}"))?;
        file::write(&self.dir.join(format!("{id}.json")), &json, 0o600, Durability::Atomic)
    }

    /// Removes both files; the record first, so that a crash between leaves only a config nobody reads.
    pub fn remove(&self, id: &str) -> Result<()> {
        let mut errors = ErrorList::default();
        errors.keep(file::remove_file(&self.dir.join(format!("{id}.json"))));
        errors.keep(file::remove_file(&self.dir.join(format!("{id}.pb"))));
        errors.finish()
    }

    /// Reads all, sorted by id. Left-over temporary files and configs without a record are removed.
    pub fn load<T: DeserializeOwned>(&self) -> Result<Vec<Restored<T>>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).context(|| format!("list {}", self.dir.display()))? {
            let entry = entry.context(|| format!("list {}", self.dir.display()))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let mut restored = Vec::new();
        for name in &names {
            let Some(id) = name.strip_suffix(".json").filter(|n| !n.starts_with('.')) else {
                let orphan = name.strip_suffix(".pb").is_some_and(|id| names.binary_search(&format!("{id}.json")).is_err());
                if orphan || name.ends_with(".tmp") {
                    file::remove_file(&self.dir.join(name))?;
                }
                continue;
            };
            match self.read(id) {
                Ok(record) => restored.push(record),
                Err(e) => self.set_aside(id, &e),
            }
        }
        Ok(restored)
    }

    fn read<T: DeserializeOwned>(&self, id: &str) -> Result<Restored<T>> {
        let path = self.dir.join(format!("{id}.json"));
        let json = file::read(&path, LIMIT)?;
        let read: Read<T> = serde_json::from_slice(&json).context(|| format!("read {}", path.display()))?;
        if read.version != VERSION || read.id != id {
            return Err(Error::internal(format!("read {}: version {} of {}, expected {VERSION}", path.display(), read.version, read.id)));
        }
        Ok(Restored { id: read.id, record: read.record, config: file::read(&self.dir.join(format!("{id}.pb")), LIMIT)? })
    }

    /// Moves what cannot be used to quarantine.
    pub fn set_aside(&self, id: &str, why: &Error) {
        log::error!("record {id} of {} is set aside in {}: {why}", self.dir.display(), self.quarantine.display());
        let noun = self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for suffix in ["json", "pb"] {
            let from = self.dir.join(format!("{id}.{suffix}"));
            if from.exists() {
                if let Err(e) = std::fs::rename(&from, self.quarantine.join(format!("{noun}-{id}.{suffix}"))) {
                    log::error!("move {} to quarantine: {e}", from.display());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_quarantine() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::open(root.path(), "sandboxes").unwrap();
        for id in ["a", "b", "c", "d"] {
            records.save_config(id, b"pb").unwrap();
            records.save(id, &vec![id.to_owned()]).unwrap();
        }
        let dir = root.path().join("sandboxes");
        std::fs::write(dir.join("b.json"), "{\"version\":1,\"id\":\"b\",\"rec").unwrap();
        std::fs::write(dir.join("c.json"), "{\"version\":9,\"id\":\"c\",\"record\":[]}").unwrap();
        std::fs::remove_file(dir.join("d.pb")).unwrap();
        std::fs::write(dir.join("e.pb"), "orphan").unwrap();
        std::fs::write(dir.join(".a.json.tmp"), "torn").unwrap();
        let all: Vec<Restored<Vec<String>>> = records.load().unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].id.as_str(), all[0].config.as_slice()), ("a", &b"pb"[..]));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
        assert_eq!(std::fs::read_dir(root.path().join("quarantine")).unwrap().count(), 5);
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    }
}
