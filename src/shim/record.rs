//! The exit record: the last word on a container, on disk before anybody is told.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::protocol::{ExitRecord, EXIT_FILE, VERSION};
use crate::error::{Context, Error, Result};
use crate::sys::file;

/// Writes the record into the container's directory.
pub fn write(dir: &Path, record: &ExitRecord) -> Result<()> {
    let text = serde_json::to_vec(record).context(|| "write exit record")?;
    file::write(&dir.join(EXIT_FILE), &text, 0o600, file::Durability::Atomic)
}

/// Writes that the container could not be started: a shim that finds a record starts nothing.
pub fn refuse(dir: &Path) -> Result<()> {
    write(dir, &ExitRecord { version: VERSION, exit_code: 128, signal: None, oom: false, finished_at: now() })
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}

/// Reads it; None when there is none.
pub fn read(dir: &Path) -> Result<Option<ExitRecord>> {
    let path = dir.join(EXIT_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let record: ExitRecord = serde_json::from_slice(&file::read(&path, 64 * 1024)?).context(|| format!("read {}", path.display()))?;
    if record.version != VERSION {
        return Err(Error::internal(format!("read {}: version {}", path.display(), record.version)));
    }
    Ok(Some(record))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
        let record = ExitRecord { version: VERSION, exit_code: 137, signal: Some(9), oom: true, finished_at: 5 };
        write(dir.path(), &record).unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(record));
        std::fs::write(dir.path().join(EXIT_FILE), "{").unwrap();
        assert!(read(dir.path()).is_err());
    }
}
