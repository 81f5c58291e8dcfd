//! Space for layers: a pull that would fill the disk is refused before it does, since a full disk hurts everything else on
//! the host.

use std::path::{Path, PathBuf};

use crate::error::{Code, Context, Error, Result};

/// The file system that layers are unpacked to.
#[derive(Clone, Debug)]
pub struct Room {
    dir: PathBuf,
    /// Percent of its size, and of its inodes, that pulls leave free.
    keep: u64,
}

impl Room {
    pub fn new(dir: &Path, keep: u64) -> Room {
        Room { dir: dir.to_owned(), keep }
    }

    /// Whether `want` bytes more fit. RESOURCE_EXHAUSTED when not, in words that say how much there is.
    pub fn check(&self, want: u64) -> Result<()> {
        let fs = rustix::fs::statvfs(&self.dir).context(|| format!("ask for the space of {}", self.dir.display()))?;
        let keep = (fs.f_blocks / 100).saturating_mul(self.keep).saturating_mul(fs.f_frsize);
        let free = fs.f_bavail.saturating_mul(fs.f_frsize);
        if free < want.saturating_add(keep) {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            let words = format!(
                "no room in {}: {} MiB are free, {} MiB more are needed, and {} MiB ({} percent) stay free",
                self.dir.display(),
                free >> 20,
                mib(want),
                mib(keep),
                self.keep
            );
            return Err(Error::new(Code::ResourceExhausted, words));
        }
        // File systems that make inodes as they need them say none.
        if fs.f_files > 0 && fs.f_favail <= fs.f_files / 100 * self.keep {
            let words = format!("no room in {}: {} of {} inodes are free", self.dir.display(), fs.f_favail, fs.f_files);
            return Err(Error::new(Code::ResourceExhausted, words));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        Room::new(dir.path(), 0).check(1).unwrap();
        let e = Room::new(dir.path(), 0).check(1 << 60).unwrap_err();
        assert!(e.code() == Code::ResourceExhausted && e.message().contains("MiB more are needed"), "{e}");
        assert_eq!(Room::new(dir.path(), 100).check(1).unwrap_err().code(), Code::ResourceExhausted);
        assert_eq!(Room::new(&dir.path().join("gone"), 0).check(1).unwrap_err().code(), Code::Internal);
    }
}
