//! Snapshots as copies: every layer is copied over the one below, whiteouts applied on the way.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::sys::rooted::{self, Rooted};
use crate::sys::{mount, tree};

const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub fn prepare(fs: &Path, layers: &[PathBuf], target: &Path) -> Result<()> {
    merge(fs, layers)?;
    mount::bind(fs, target, false)
}

/// Puts what layers make together, ordered top first, into the directory `to`.
pub fn merge(to: &Path, layers: &[PathBuf]) -> Result<()> {
    for layer in layers.iter().rev() {
        let from = rustix::fs::open(layer, DIR, Mode::empty()).context(|| format!("open {}", layer.display()))?;
        directory(from.as_fd(), to).context(|| format!("copy {}", layer.display()))?;
    }
    Ok(())
}

/// Copies everything in the open directory `from`, and what it says of itself, into the directory `to`. No link is followed.
pub fn directory(from: BorrowedFd<'_>, to: &Path) -> Result<()> {
    // The handle may be one for metadata alone.
    let from = rustix::fs::openat(from, ".", DIR, Mode::empty()).context(|| "open the source")?;
    let open = rustix::fs::open(to, DIR, Mode::empty()).context(|| format!("open {}", to.display()))?;
    let mut merge = Merge { links: HashMap::new(), root: Rooted::open(to)?, path: PathBuf::new() };
    merge.tree(from, open).context(|| format!("at {}", merge.path.display()))
}

/// One layer on its way into the tree.
struct Merge {
    /// Where the first name of a file with several went.
    links: HashMap<(u64, u64), PathBuf>,
    root: Rooted,
    /// What is being copied.
    path: PathBuf,
}

/// A directory on the way down: what is left to do in it, and how to know both sides again when we come back.
struct Level {
    names: std::vec::IntoIter<OsString>,
    from: (u64, u64),
    to: (u64, u64),
}

impl Merge {
    /// Keeps one directory open on each side, and no place on the stack: a stranger chose how deep they are.
    fn tree(&mut self, mut from: OwnedFd, mut to: OwnedFd) -> Result<()> {
        let mut levels = vec![enter(&from, &to)?];
        while let Some(level) = levels.last_mut() {
            if let Some(name) = level.names.next() {
                self.path.push(&name);
                match self.entry(&from, &to, Path::new(&name))? {
                    Some(below) => {
                        (from, to) = below;
                        levels.push(enter(&from, &to)?);
                    }
                    None => drop(self.path.pop()),
                }
                continue;
            }
            // Last: every file made in it changed its times.
            rooted::copy_dir_metadata(&from, &to, Path::new(""))?;
            levels.pop();
            self.path.pop();
            if let Some(above) = levels.last() {
                (from, to) = (parent(&from, above.from)?, parent(&to, above.to)?);
            }
        }
        Ok(())
    }

    /// Copies one entry; the two sides of a directory, which is still to be filled.
    fn entry(&mut self, from: &OwnedFd, to: &OwnedFd, name: &Path) -> Result<Option<(OwnedFd, OwnedFd)>> {
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).context(|| "look at the source")?;
        if rooted::is_whiteout(&stat) {
            remove(to, name.as_os_str())?;
            return Ok(None);
        }
        if rooted::is_dir(&stat) {
            match rustix::fs::statat(to, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(there) if rooted::is_dir(&there) => {}
                Ok(_) => remove(to, name.as_os_str())?,
                Err(_) => {}
            }
            match rustix::fs::mkdirat(to, name, Mode::from(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e).context(|| "make directory"),
            }
            let open = |dir: &OwnedFd| rustix::fs::openat(dir, name, DIR, Mode::empty()).context(|| "open directory");
            return Ok(Some((open(from)?, open(to)?)));
        }
        remove(to, name.as_os_str())?;
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev as u64, stat.st_ino)) {
                let above = self.root.dir(first.parent().unwrap_or(Path::new(""))).context(|| "open directory")?;
                let first = first.file_name().unwrap_or_default();
                rustix::fs::linkat(above, first, to, name, AtFlags::empty()).context(|| "link")?;
                return Ok(None);
            }
            self.links.insert((stat.st_dev as u64, stat.st_ino), self.path.clone());
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut source = File::from(rustix::fs::openat(from, name, flags, Mode::empty()).context(|| "open file")?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut copy = File::from(rustix::fs::openat(to, name, flags, Mode::from(0o600)).context(|| "create file")?);
                // copy_file_range inside: shared extents where the file system has them.
                std::io::copy(&mut source, &mut copy).context(|| "copy file")?;
            }
            FileType::Symlink => {
                let text = rustix::fs::readlinkat(from, name, Vec::new()).context(|| "read link")?;
                rustix::fs::symlinkat(text.as_c_str(), to, name).context(|| "make link")?;
            }
            kind => rustix::fs::mknodat(to, name, kind, Mode::from(0o600), stat.st_rdev).context(|| "make device")?,
        }
        describe(from, to, name, &stat)?;
        Ok(None)
    }
}

/// The work to do in a directory.
fn enter(from: &OwnedFd, to: &OwnedFd) -> Result<Level> {
    if rooted::is_opaque(&rooted::proc_path(from.as_fd(), Path::new(""))) {
        for name in names(to)? {
            remove(to, &name)?;
        }
    }
    Ok(Level { names: names(from)?.into_iter(), from: id(from)?, to: id(to)? })
}

/// The directory above, if it is the one we came from.
fn parent(dir: &OwnedFd, wanted: (u64, u64)) -> Result<OwnedFd> {
    let parent = rustix::fs::openat(dir, "..", DIR, Mode::empty()).context(|| "open the directory above")?;
    match id(&parent)? == wanted {
        true => Ok(parent),
        false => Err(Error::internal("a directory was moved while it was copied")),
    }
}

fn id(dir: &OwnedFd) -> Result<(u64, u64)> {
    let stat = rustix::fs::fstat(dir).context(|| "look at a directory")?;
    Ok((stat.st_dev as u64, stat.st_ino))
}

fn describe(from: &OwnedFd, to: &OwnedFd, name: &Path, stat: &Stat) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(|| "set owner")?;
    }
    for (key, value) in rooted::xattrs(&rooted::proc_path(from.as_fd(), name)).context(|| "list attributes")? {
        rustix::fs::lsetxattr(rooted::proc_path(to.as_fd(), name), &key, &value, rustix::fs::XattrFlags::empty())
            .context(|| format!("set attribute {}", key.to_string_lossy()))?;
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        rooted::set_mode(to, name, stat.st_mode & 0o7777).context(|| "set mode")?;
    }
    rooted::set_times(to, name, (stat.st_mtime, stat.st_mtime_nsec as u32))
}

fn names(dir: &OwnedFd) -> Result<Vec<OsString>> {
    let what = || "list directory";
    let mut found = Vec::new();
    for entry in Dir::read_from(dir.as_fd()).context(what)? {
        let entry = entry.context(what)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Removes a file or tree in a directory; not there is fine.
fn remove(dir: &OwnedFd, name: &OsStr) -> Result<()> {
    tree::remove_at(dir.as_fd(), name).map(drop)
}
