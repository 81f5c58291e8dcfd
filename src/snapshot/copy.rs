//! Snapshots as copies: every layer is copied over the one below, whiteouts applied and owners mapped on the way.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::sys::idmap::IdMaps;
use crate::sys::rooted::{self, Rooted};
use crate::sys::{mount, tree};

const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// `maps`: root of the image becomes that of a user namespace, and so on; an id that is not mapped stays as it is, and is nobody there.
pub fn prepare(fs: &Path, layers: &[PathBuf], target: &Path, maps: Option<&IdMaps>) -> Result<()> {
    merge(fs, layers, maps)?;
    mount::bind(fs, target, false)
}

/// Puts what layers make together, ordered top first, into the directory `to`.
pub fn merge(to: &Path, layers: &[PathBuf], maps: Option<&IdMaps>) -> Result<()> {
    if let Some(maps) = maps.filter(|_| layers.is_empty()) {
        let (uid, gid) = maps.root();
        std::os::unix::fs::chown(to, Some(uid), Some(gid)).context(|| format!("set the owner of {}", to.display()))?;
    }
    for layer in layers.iter().rev() {
        let from = rustix::fs::open(layer, DIR, Mode::empty()).context(|| format!("open {}", layer.display()))?;
        directory(from.as_fd(), to, maps).context(|| format!("copy {}", layer.display()))?;
    }
    Ok(())
}

/// Copies everything in the open directory `from`, and what it says of itself, into the directory `to`. No link is followed.
pub fn directory(from: BorrowedFd<'_>, to: &Path, maps: Option<&IdMaps>) -> Result<()> {
    // The handle may be one for metadata alone.
    let from = rustix::fs::openat(from, ".", DIR, Mode::empty()).context(|| "open the source")?;
    let open = rustix::fs::open(to, DIR, Mode::empty()).context(|| format!("open {}", to.display()))?;
    let mut merge = Merge { links: HashMap::new(), root: Rooted::open(to)?, path: PathBuf::new(), maps };
    merge.tree(from, open).context(|| format!("at {}", merge.path.display()))
}

/// One layer on its way into the tree.
struct Merge<'a> {
    /// Where the first name of a file with several went.
    links: HashMap<(u64, u64), PathBuf>,
    root: Rooted,
    /// What is being copied.
    path: PathBuf,
    maps: Option<&'a IdMaps>,
}

/// A directory on the way down: what is left to do in it, and how to know both sides again when we come back.
struct Level {
    names: std::vec::IntoIter<OsString>,
    from: (u64, u64),
    to: (u64, u64),
}

impl Merge<'_> {
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
            self.map_owner(&from, &to)?;
            levels.pop();
            self.path.pop();
            if let Some(above) = levels.last() {
                (from, to) = (parent(&from, above.from)?, parent(&to, above.to)?);
            }
        }
        Ok(())
    }

    fn map_owner(&self, from: &OwnedFd, to: &OwnedFd) -> Result<()> {
        let Some(maps) = self.maps else { return Ok(()) };
        let stat = rustix::fs::fstat(from).context(|| "look at the source")?;
        let (uid, gid) = maps.owner(stat.st_uid, stat.st_gid);
        rustix::fs::fchown(to, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).context(|| "set owner")
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
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                let above = self.root.dir(first.parent().unwrap_or(Path::new(""))).context(|| "open directory")?;
                let first = first.file_name().unwrap_or_default();
                rustix::fs::linkat(above, first, to, name, AtFlags::empty()).context(|| "link")?;
                return Ok(None);
            }
            self.links.insert((stat.st_dev, stat.st_ino), self.path.clone());
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
        describe(from, to, name, &stat, self.maps)?;
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
    Ok((stat.st_dev, stat.st_ino))
}

fn describe(from: &OwnedFd, to: &OwnedFd, name: &Path, stat: &Stat, maps: Option<&IdMaps>) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = maps.map_or((stat.st_uid, stat.st_gid), |maps| maps.owner(stat.st_uid, stat.st_gid));
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(|| "set owner")?;
    }
    for (key, mut value) in rooted::xattrs(&rooted::proc_path(from.as_fd(), name)).context(|| "list attributes")? {
        if let Some(maps) = maps.filter(|_| key == "security.capability") {
            value = capability_of(value, maps);
        }
        rustix::fs::lsetxattr(rooted::proc_path(to.as_fd(), name), &key, &value, rustix::fs::XattrFlags::empty())
            .context(|| format!("set attribute {}", key.to_string_lossy()))?;
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        rooted::set_mode(to, name, stat.st_mode & 0o7777).context(|| "set mode")?;
    }
    rooted::set_times(to, name, (stat.st_mtime, stat.st_mtime_nsec as u32))
}

/// struct vfs_ns_cap_data of <linux/capability.h>: capabilities of a file hold in the user namespace whose root they name. Version 2 names
/// none and means the host's.
fn capability_of(mut value: Vec<u8>, maps: &IdMaps) -> Vec<u8> {
    const VERSION_2: u8 = 2;
    const VERSION_3: u8 = 3;
    // Little endian: the version is the highest byte of the first word, the lowest is a flag.
    if value.len() == 20 && value[3] == VERSION_2 {
        value[3] = VERSION_3;
        value.extend_from_slice(&maps.root().0.to_le_bytes());
    }
    value
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::idmap::IdMap;

    #[test]
    fn capabilities_of_files_name_the_namespaces_root() {
        let map = IdMap { container: 0, host: 0x0102_0304, length: 1 };
        let maps = IdMaps { uids: map, gids: map };
        let mut ping = vec![1, 0, 0, 2, 0, 0x20, 0, 0];
        ping.extend([0; 12]);
        let mapped = capability_of(ping.clone(), &maps);
        assert_eq!((mapped.len(), mapped[3], &mapped[4..8], &mapped[20..]), (24, 3, &ping[4..8], &[4, 3, 2, 1][..]));
        assert_eq!(capability_of(mapped.clone(), &maps), mapped, "one that names a root keeps it");
        assert_eq!(capability_of(vec![1, 0, 0, 1], &maps), [1, 0, 0, 1]);
    }
}
