//! Files: atomic writes, bounded reads, removal of trees.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// Whether a replaced file must survive a power cut (see ARCHITECTURE.md, "State on disk").
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Never torn, maybe the previous content after a power cut: lifecycle records.
    Atomic,
    /// fsync of the file and of its directory: image markers.
    Synced,
}

/// Replaces `path` by `data` with the given mode: a reader sees the old content or the new, never a part.
pub fn write(path: &Path, data: &[u8], mode: u32, durability: Durability) -> Result<()> {
    let what = || format!("write {}", path.display());
    let dir = path.parent().ok_or_else(|| Error::internal(format!("write {}: no parent directory", path.display())))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temp = dir.join(format!(".{name}.tmp"));
    // A left-over of a crash would keep its mode.
    remove_file(&temp)?;
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temp)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(data)?;
        if durability == Durability::Synced {
            file.sync_all()?;
        }
        std::fs::rename(&temp, path)?;
        if durability == Durability::Synced {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    })();
    if result.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    result.map_err(|e: std::io::Error| e).context(what)
}

/// Reads a regular file of at most `limit` bytes; more is an error, as is anything that is not a regular file.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let what = || format!("read {}", path.display());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).context(what)?;
    let meta = file.metadata().context(what)?;
    if !meta.is_file() {
        return Err(Error::internal(format!("read {}: not a regular file", path.display())));
    }
    let mut data = Vec::with_capacity(meta.len().min(limit) as usize);
    file.take(limit + 1).read_to_end(&mut data).context(what)?;
    if data.len() as u64 > limit {
        return Err(Error::internal(format!("read {}: more than {limit} bytes", path.display())));
    }
    Ok(data)
}

/// The entries of a directory, sorted by name; none of one that is not there.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("list {}", dir.display());
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).context(what),
    };
    let mut paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>().context(what)?;
    paths.sort();
    Ok(paths)
}

/// Whether the path's name ends in `.` and one of these.
pub fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|own| extensions.iter().any(|extension| own == *extension))
}

/// Creates `path` and its missing parents; `path` itself gets `mode` when it is new.
pub fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let what = || format!("create directory {}", path.display());
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).context(what)?;
    }
    match std::fs::create_dir(path) {
        Ok(()) => std::fs::set_permissions(path, Permissions::from_mode(mode)).context(what),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) => Err(e).context(what),
    }
}

/// Removes a file; one that is not there is fine.
pub fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(|| format!("remove {}", path.display())),
    }
}

/// Removes an empty directory; one that is not there is fine.
pub fn remove_dir(path: &Path) -> Result<()> {
    match std::fs::remove_dir(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(|| format!("remove directory {}", path.display())),
    }
}

/// Removes a directory and all below it, links not followed; one that is not there is fine. What is mounted below makes it
/// fail and stays as it is: callers unmount first.
pub fn remove_tree(path: &Path) -> Result<()> {
    super::tree::remove(path).map(drop)
}

/// Starts the writing of what a file has in memory alone, and does not wait for it. It promises nothing: an fsync that comes
/// later waits for less, and reports what went wrong.
pub fn start_writeback(file: &File) {
    // SAFETY: the call takes an open descriptor and numbers: from 0 to the end.
    let _ = unsafe { libc::sync_file_range(std::os::fd::AsRawFd::as_raw_fd(file), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Directories of rising priority, for those who read such: `missing`, `low` and `high` of a temporary one.
#[cfg(test)]
pub fn priorities() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["low", "high"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let dirs = ["missing", "low", "high"].map(|name| dir.path().join(name)).to_vec();
    (dir, dirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_replaces_and_leaves_no_temp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, b"one", 0o600, Durability::Atomic).unwrap();
        write(&path, b"two", 0o640, Durability::Synced).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn read_is_bounded_and_regular_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert!(read(&path, 4).unwrap_err().message().contains("more than 4 bytes"));
        assert!(read(dir.path(), 4).is_err());
    }
}
