//! Unpacks one layer into a directory in overlayfs's form: whiteouts become character devices 0/0, opaque marks become
//! an xattr. The layer is hostile until proven otherwise: see `rooted` for paths, `tarball` for headers.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::tarball::{Entry, Kind, Tarball};
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::rooted::{self, Rooted};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Names that only AUFS understands (its hard link and trash directories).
const AUFS_PREFIX: &[u8] = b".wh..wh.";
/// What a file or directory costs on disk besides its data: sums are rounded up to blocks of this size.
const DISK_BLOCK: u64 = 4096;

/// Bounds of one layer.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_entries: u64,
    /// Sum of the files' sizes.
    pub max_bytes: u64,
}

/// What was unpacked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Disk space, files rounded up to blocks.
    pub bytes: u64,
    pub inodes: u64,
    /// Directories that the layer does not name but has files in; their metadata is the layer's below.
    pub implicit: BTreeSet<PathBuf>,
}

/// Unpacks the tar stream into the empty directory `dir`. The stream is not read beyond the archive's end mark: the caller
/// drains it, because digests count the tail too.
pub fn unpack(stream: &mut dyn Read, dir: &Path, limits: &Limits, cancel: &Cancel) -> Result<Unpacked> {
    let mut unpacker = Unpacker {
        rooted: Rooted::open(dir)?,
        limits: limits.clone(),
        data: 0,
        entries: 0,
        done: Unpacked { bytes: DISK_BLOCK, inodes: 1, implicit: BTreeSet::from([PathBuf::new()]) },
        times: BTreeMap::new(),
        parent: None,
        owner: rustix::process::geteuid().is_root(),
        buffer: vec![0; 128 << 10],
    };
    let mut tar = Tarball::new(stream);
    while let Some(entry) = tar.next_entry().context(|| "read layer archive").map_err(broken)? {
        cancel.check()?;
        let name = || format!("unpack {}", String::from_utf8_lossy(&entry.path[..entry.path.len().min(300)]));
        unpacker.add(&entry, &mut tar, cancel).context(name)?;
    }
    unpacker.finish()
}

/// A stream that cannot be read is the image's fault.
fn broken(error: Error) -> Error {
    error.with_code(Code::FailedPrecondition)
}

struct Unpacker {
    rooted: Rooted,
    limits: Limits,
    data: u64,
    entries: u64,
    done: Unpacked,
    /// Times of directories, set last: every file made in one changes them.
    times: BTreeMap<PathBuf, (i64, u32)>,
    /// The last parent directory: archives are ordered by directory.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Owners and devices are root's to set.
    owner: bool,
    buffer: Vec<u8>,
}

impl Unpacker {
    fn add(&mut self, entry: &Entry, data: &mut impl Read, cancel: &Cancel) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            return Err(Error::new(Code::ResourceExhausted, format!("more than {} entries in one layer", self.limits.max_entries)));
        }
        if entry.size > self.limits.max_bytes - self.data {
            return Err(Error::new(Code::ResourceExhausted, format!("more than {} bytes in one layer", self.limits.max_bytes)));
        }
        let path = rooted::normalise(&entry.path)?;
        if path.as_os_str().is_empty() {
            if entry.kind != Kind::Directory {
                return Err(Error::precondition("the root of a layer is a directory"));
            }
            let root = self.rooted.dir(&path).context(|| "open the layer's root")?;
            self.describe(&root, Path::new(""), entry)?;
            self.done.implicit.remove(&path);
            self.times.insert(path, entry.mtime);
            return Ok(());
        }
        let (above, name) = (path.parent().unwrap_or(Path::new("")), Path::new(path.file_name().unwrap_or_default()));
        let name_bytes = name.as_os_str().as_bytes();
        self.enter(above)?;
        let Some((_, parent)) = &self.parent else { return Err(Error::internal("no parent directory")) };
        if name_bytes == OPAQUE_NAME {
            return rooted::set_opaque(&rooted::proc_path(parent.as_fd(), Path::new(""))).context(|| "mark directory opaque");
        }
        if name_bytes.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = name_bytes.strip_prefix(WHITEOUT_PREFIX) {
            return self.whiteout(hidden);
        }
        let parent = parent.try_clone().context(|| "duplicate a descriptor")?;
        let opaque = self.make_room(&parent, name, entry.kind)?;
        match entry.kind {
            Kind::Directory => {
                match rustix::fs::mkdirat(&parent, name, Mode::from(0o700)) {
                    Ok(()) => self.count(0),
                    Err(Errno::EXIST) => {}
                    Err(e) => return Err(e).context(|| "make directory"),
                }
                if opaque {
                    rooted::set_opaque(&rooted::proc_path(parent.as_fd(), name)).context(|| "mark directory opaque")?;
                }
                self.describe(&parent, name, entry)?;
                // The name may have led through links: what was made is known by its name alone, which is what counts.
                self.done.implicit.remove(&path);
                self.times.insert(path, entry.mtime);
                return Ok(());
            }
            Kind::File => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut file = File::from(rustix::fs::openat(&parent, name, flags, Mode::from(0o600)).context(|| "create file")?);
                self.fill(&mut file, entry, data, cancel)?;
                self.count(entry.stored);
            }
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(Error::precondition("a symbolic link without a target"));
                }
                rustix::fs::symlinkat(OsStr::from_bytes(&entry.link), &parent, name).context(|| "make symbolic link")?;
                self.count(0);
            }
            Kind::Hardlink => return self.hardlink(&parent, name, entry),
            Kind::Char | Kind::Block | Kind::Fifo => {
                if entry.kind == Kind::Char && entry.device == (0, 0) {
                    return Err(Error::precondition("a character device 0/0: whiteouts of a layer are named .wh."));
                }
                let (kind, device) = match entry.kind {
                    Kind::Char => (FileType::CharacterDevice, rustix::fs::makedev(entry.device.0, entry.device.1)),
                    Kind::Block => (FileType::BlockDevice, rustix::fs::makedev(entry.device.0, entry.device.1)),
                    _ => (FileType::Fifo, 0),
                };
                rustix::fs::mknodat(&parent, name, kind, Mode::from(0o600), device).context(|| "make device")?;
                self.count(0);
            }
        }
        self.describe(&parent, name, entry)?;
        rooted::set_times(&parent, name, entry.mtime)
    }

    /// Opens the parent directory, making what is missing.
    fn enter(&mut self, path: &Path) -> Result<()> {
        if self.parent.as_ref().is_some_and(|(p, _)| p == path) {
            return Ok(());
        }
        let ensured = self.rooted.ensure_dir(path)?;
        for made in ensured.made {
            self.count(0);
            self.done.implicit.insert(made);
        }
        self.parent = Some((path.to_owned(), ensured.dir));
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.done.inodes += 1;
        self.done.bytes += bytes.div_ceil(DISK_BLOCK).max(1) * DISK_BLOCK;
    }

    /// `.wh.NAME`: hides NAME of the layers below. When this layer also has a directory of that name, it hides theirs.
    fn whiteout(&mut self, hidden: &[u8]) -> Result<()> {
        let Some((_, parent)) = &self.parent else { return Err(Error::internal("no parent directory")) };
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Error::precondition("a whiteout of nothing"));
        }
        let name = Path::new(OsStr::from_bytes(hidden));
        match rustix::fs::mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => self.count(0),
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).context(|| "look at a whiteout's target")?;
                if rooted::is_dir(&stat) {
                    rooted::set_opaque(&rooted::proc_path(parent.as_fd(), name)).context(|| "mark directory opaque")?;
                }
            }
            Err(e) => return Err(e).context(|| "make whiteout"),
        }
        Ok(())
    }

    /// Removes what an earlier entry of this layer left under the name; a directory stays for a directory. True when a
    /// whiteout gave way, so that a directory in its place must be opaque.
    fn make_room(&mut self, parent: &OwnedFd, name: &Path, kind: Kind) -> Result<bool> {
        let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(e).context(|| "look at what is there"),
        };
        // What goes may be a link that the cached parent was reached by, or a directory above it.
        self.parent = None;
        if !rooted::is_dir(&stat) {
            rustix::fs::unlinkat(parent, name, AtFlags::empty()).context(|| "replace")?;
            return Ok(rooted::is_whiteout(&stat));
        }
        if kind != Kind::Directory {
            let path = rooted::proc_path(parent.as_fd(), name);
            std::fs::remove_dir_all(&path).context(|| "replace directory")?;
        }
        Ok(false)
    }

    fn hardlink(&mut self, parent: &OwnedFd, name: &Path, entry: &Entry) -> Result<()> {
        let target = rooted::normalise(&entry.link)?;
        let what = || format!("link to {}", target.display());
        let (above, base) = (target.parent().unwrap_or(Path::new("")), target.file_name().unwrap_or_default());
        let missing = || Error::precondition(format!("{}: no such file in this layer", what()));
        let from = match self.rooted.dir(above) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(missing()),
            Err(e) => return Err(e).context(what),
        };
        let stat = match rustix::fs::statat(&from, base, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(missing()),
            Err(e) => return Err(e).context(what),
        };
        if rooted::is_dir(&stat) || rooted::is_whiteout(&stat) {
            return Err(Error::precondition(format!("{}: not a file", what())));
        }
        rustix::fs::linkat(&from, base, parent, name, AtFlags::empty()).context(what)
    }

    /// Copies an entry's data; the holes of a sparse file stay holes.
    fn fill(&mut self, file: &mut File, entry: &Entry, data: &mut impl Read, cancel: &Cancel) -> Result<()> {
        let whole = [(0, entry.size)];
        for (offset, length) in entry.pieces.as_deref().unwrap_or(&whole) {
            file.seek(SeekFrom::Start(*offset)).context(|| "seek")?;
            let mut left = *length;
            while left > 0 {
                cancel.check()?;
                let part = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let n = data.read(&mut self.buffer[..part]).context(|| "read layer archive").map_err(broken)?;
                if n == 0 {
                    return Err(Error::precondition("the archive ends inside a file"));
                }
                file.write_all(&self.buffer[..n]).context(|| "write file")?;
                left -= n as u64;
            }
        }
        if entry.pieces.is_some() {
            file.set_len(entry.size).context(|| "extend sparse file")?;
        }
        self.data += entry.size;
        Ok(())
    }

    /// Owner, attributes and mode, in the order in which the kernel does not undo one by another.
    fn describe(&self, parent: impl AsFd, name: &Path, entry: &Entry) -> Result<()> {
        let parent = parent.as_fd();
        let at = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        if self.owner {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            rustix::fs::chownat(parent, at, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(|| "set owner")?;
        }
        let path = rooted::proc_path(parent, name);
        for (key, value) in &entry.xattrs {
            if key.starts_with(rooted::OVERLAY_XATTRS.as_bytes()) {
                return Err(Error::precondition(format!("attribute {} is overlayfs's own", String::from_utf8_lossy(key))));
            }
            match rustix::fs::lsetxattr(&path, OsStr::from_bytes(key), value, rustix::fs::XattrFlags::empty()) {
                Ok(()) => {}
                // Not this file system's, not this kind of file's, or not ours to set without root.
                Err(Errno::OPNOTSUPP) => log::debug!("image: attribute {} is not supported here", String::from_utf8_lossy(key)),
                Err(Errno::PERM) if !self.owner || entry.kind == Kind::Symlink => {}
                Err(e) => return Err(e).context(|| format!("set attribute {}", String::from_utf8_lossy(key))),
            }
        }
        if entry.kind != Kind::Symlink {
            rooted::set_mode(parent, name, entry.mode).context(|| "set mode")?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Unpacked> {
        for (path, time) in std::mem::take(&mut self.times) {
            let (above, name) = (path.parent().unwrap_or(Path::new("")), Path::new(path.file_name().unwrap_or_default()));
            match self.rooted.dir(above) {
                Ok(parent) => match self.rooted.handle(&path).and_then(rustix::fs::fstat) {
                    Ok(stat) if rooted::is_dir(&stat) => rooted::set_times(&parent, name, time)?,
                    _ => {}
                },
                // Replaced by a later entry.
                Err(_) => continue,
            }
        }
        Ok(self.done)
    }
}

/// Gives the implicit directories of a layer the metadata they have in the layers below (top first). A directory that
/// a layer between hides keeps the default.
pub fn inherit(dir: &Path, implicit: &BTreeSet<PathBuf>, below: &[PathBuf]) -> Result<()> {
    let rooted = Rooted::open(dir)?;
    for path in implicit {
        let what = || format!("take metadata of {} from the layer below", path.display());
        let Some(source) = find_below(path, below)? else { continue };
        let parent = rooted.dir(path.parent().unwrap_or(Path::new(""))).context(what)?;
        let name = Path::new(path.file_name().unwrap_or_default());
        rooted::copy_dir_metadata(&source, &parent, name).context(what)?;
    }
    Ok(())
}

/// The directory that `path` names in the highest layer that has it, unless something hides it first.
fn find_below(path: &Path, below: &[PathBuf]) -> Result<Option<OwnedFd>> {
    'layers: for layer in below {
        let rooted = Rooted::open(layer)?;
        // From the root down: a whiteout, file or link at any part ends the search, an opaque part ends it after this layer.
        let mut opaque = false;
        let mut sofar = PathBuf::new();
        for part in std::iter::once(OsStr::new("")).chain(path.iter()) {
            if !part.is_empty() {
                sofar.push(part);
            }
            let handle = match rooted.handle(&sofar) {
                Ok(handle) => handle,
                Err(Errno::NOENT) if !opaque => continue 'layers,
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                Err(e) => return Err(e).context(|| format!("look for {} in {}", path.display(), layer.display())),
            };
            let stat = rustix::fs::fstat(&handle).context(|| format!("look at {}", sofar.display()))?;
            if !rooted::is_dir(&stat) {
                return Ok(None);
            }
            opaque |= rooted::is_opaque(&rooted::proc_path(handle.as_fd(), Path::new("")));
            if sofar == path {
                return Ok(Some(handle));
            }
        }
    }
    Ok(None)
}
