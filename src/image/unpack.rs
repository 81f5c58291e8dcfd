//! Unpacks one layer into a directory in overlayfs's form: whiteouts become character devices 0/0, opaque marks become
//! an xattr. The layer is hostile until proven otherwise: see `rooted` for paths, `tarball` for headers.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::room::Room;
use super::tape::Tape;
use super::tarball::{Entry, Kind, Tarball};
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::label;
use crate::sys::rooted::{self, Rooted};

pub(super) const WHITEOUT_PREFIX: &[u8] = b".wh.";
pub(super) const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Names that only AUFS understands (its hard link and trash directories).
pub(super) const AUFS_PREFIX: &[u8] = b".wh..wh.";
/// What a file or directory costs on disk besides its data: sums are rounded up to blocks of this size.
const DISK_BLOCK: u64 = 4096;
/// The space left on disk is looked at after so many bytes, and before each file that is as large.
const LOOK: u64 = 16 << 20;
/// Bytes of paths kept in memory for one layer.
const PATHS_LIMIT: usize = 64 << 20;
/// A large file starts on its way to the disk after so many bytes: the commit then waits for little.
const FLUSH: u64 = 8 << 20;

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
    /// Whether the tape is whole: the files and it are the archive again.
    pub taped: bool,
}

/// Unpacks the tar stream into the empty directory `dir`, reading it to its end: digests count the tail too. `tape` is a
/// new file for what `fsck` needs.
pub fn unpack(stream: &mut dyn BufRead, dir: &Path, tape: &Path, limits: &Limits, room: &Room, cancel: &Cancel) -> Result<Unpacked> {
    let mut unpacker = Unpacker {
        rooted: Rooted::open(dir)?,
        limits: limits.clone(),
        room,
        data: 0,
        entries: 0,
        unseen: 0,
        kept: 0,
        done: Unpacked { bytes: DISK_BLOCK, inodes: 1, implicit: BTreeSet::from([PathBuf::new()]), taped: false },
        lossy: false,
        times: BTreeMap::new(),
        parent: None,
        owner: rustix::process::geteuid().is_root(),
        dropped: false,
    };
    let taping = || format!("write {}", tape.display());
    let mut tar = Tarball::taped(stream, Tape::create(tape).context(taping)?);
    while let Some(entry) = tar.next_entry().context(|| "read layer archive").map_err(broken)? {
        cancel.check()?;
        let name = || format!("unpack {}", String::from_utf8_lossy(&entry.path[..entry.path.len().min(300)]));
        unpacker.add(&entry, &mut tar, cancel).context(name)?;
    }
    let recorded = match tar.finish().context(|| "read layer archive").map_err(broken)? {
        // A file that the archive itself replaced, for one, is nowhere to be read again.
        Some(recorded) if !unpacker.lossy => recorded.finish().context(taping)?,
        _ => None,
    };
    match recorded {
        Some(bytes) => unpacker.count(bytes),
        None => file::remove_file(tape)?,
    }
    unpacker.done.taped = recorded.is_some();
    unpacker.finish()
}

/// A stream that cannot be read is the image's fault.
fn broken(error: Error) -> Error {
    match error.code() {
        // The tape did not fit.
        Code::ResourceExhausted => error,
        _ => error.with_code(Code::FailedPrecondition),
    }
}

/// The directory an entry goes into.
struct Parent {
    /// As the archive names it.
    named: PathBuf,
    /// Without links.
    path: PathBuf,
    dir: OwnedFd,
}

struct Unpacker<'a> {
    rooted: Rooted,
    limits: Limits,
    room: &'a Room,
    data: u64,
    entries: u64,
    /// Bytes written since the space was last looked at.
    unseen: u64,
    /// Bytes of paths in `times` and `implicit`.
    kept: usize,
    done: Unpacked,
    /// Times of directories, set last: every file made in one changes them.
    times: BTreeMap<PathBuf, (i64, u32)>,
    /// The last one: archives are ordered by directory.
    parent: Option<Rc<Parent>>,
    /// The files do not hold all that the archive has: an entry took the place of another one's, or left something out.
    lossy: bool,
    /// Owners and devices are root's to set.
    owner: bool,
    /// An attribute was left out, which is said once.
    dropped: bool,
}

impl Unpacker<'_> {
    fn add(&mut self, entry: &Entry, tar: &mut Tarball<&mut dyn BufRead>, cancel: &Cancel) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            return Err(Error::new(Code::ResourceExhausted, format!("more than {} entries in one layer", self.limits.max_entries)));
        }
        if entry.size > self.limits.max_bytes - self.data {
            return Err(Error::new(Code::ResourceExhausted, format!("more than {} bytes in one layer", self.limits.max_bytes)));
        }
        let path = rooted::normalise(&entry.path)?;
        let Some(name) = path.file_name() else {
            return self.root(entry);
        };
        // File systems keep times from 1901 to 2446.
        self.lossy |= !(-(1 << 31)..1 << 34).contains(&entry.mtime.0);
        let (above, name) = (path.parent().unwrap_or(Path::new("")), Path::new(name));
        let special = name.as_os_str().as_bytes().starts_with(WHITEOUT_PREFIX);
        self.lossy |= special && entry.stored > 0;
        if above.iter().any(|part| part.as_bytes().starts_with(AUFS_PREFIX)) {
            self.lossy = true;
            return Ok(());
        }
        let parent = self.enter(above)?;
        let name_bytes = name.as_os_str().as_bytes();
        if name_bytes == OPAQUE_NAME {
            return rooted::set_opaque(&rooted::proc_path(parent.dir.as_fd(), Path::new(""))).context(|| "mark directory opaque");
        }
        if name_bytes.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = name_bytes.strip_prefix(WHITEOUT_PREFIX) {
            return self.whiteout(&parent, hidden);
        }
        match entry.kind {
            Kind::Directory => self.directory(&parent, name, entry),
            Kind::File => self.file(&parent, name, entry, tar, cancel),
            Kind::Hardlink => self.hardlink(&parent, name, entry),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) || entry.link.len() > 4095 {
                    return Err(Error::precondition("the target of a symbolic link is empty, too long, or has a NUL"));
                }
                let target = OsStr::from_bytes(&entry.link);
                self.place(&parent, name, "make symbolic link", |dir| rustix::fs::symlinkat(target, dir, name))?;
                self.special(&parent, name, entry)
            }
            Kind::Char | Kind::Block | Kind::Fifo => {
                let (kind, device) = node(entry)?;
                let make = |dir: BorrowedFd| rustix::fs::mknodat(dir, name, kind, Mode::from(0o600), device);
                self.place(&parent, name, "make device", make)?;
                self.special(&parent, name, entry)
            }
        }
    }

    fn root(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Directory {
            return Err(Error::precondition("the root of a layer is a directory"));
        }
        let root = self.rooted.plain_dir(Path::new("")).context(|| "open the layer's root")?;
        self.describe(root.as_fd(), entry)?;
        self.done.implicit.remove(Path::new(""));
        self.times.insert(PathBuf::new(), entry.mtime);
        Ok(())
    }

    fn directory(&mut self, parent: &Parent, name: &Path, entry: &Entry) -> Result<()> {
        let path = parent.path.join(name);
        let make = || rustix::fs::mkdirat(&parent.dir, name, Mode::from(0o700));
        match make() {
            Ok(()) => self.count(0),
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(&parent.dir, name, AtFlags::SYMLINK_NOFOLLOW).context(|| "look at what is there")?;
                if !rooted::is_dir(&stat) {
                    // A whiteout or a file gives way. What it hid, or would have replaced, stays hidden.
                    self.make_room(parent, name)?;
                    make().context(|| "make directory")?;
                    rooted::set_opaque(&rooted::proc_path(parent.dir.as_fd(), name)).context(|| "mark directory opaque")?;
                    self.count(0);
                }
            }
            Err(e) => return Err(e).context(|| "make directory"),
        }
        let dir = rooted::beneath(&parent.dir, name).context(|| "open directory")?;
        self.describe(dir.as_fd(), entry)?;
        self.done.implicit.remove(&path);
        self.keep(&path)?;
        self.times.insert(path.clone(), entry.mtime);
        // Most often what follows goes into it.
        self.parent = Some(Rc::new(Parent { named: path.clone(), path, dir }));
        Ok(())
    }

    fn file(&mut self, parent: &Parent, name: &Path, entry: &Entry, tar: &mut Tarball<&mut dyn BufRead>, cancel: &Cancel) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let make = |dir: BorrowedFd| rustix::fs::openat(dir, name, flags, Mode::from(0o600));
        let mut file = File::from(self.place(parent, name, "create file", make)?);
        self.fill(&mut file, entry, tar, cancel)?;
        self.count(entry.stored);
        // The owner before attributes and mode: the kernel takes capabilities and setuid bits away with a change of owner.
        self.describe(file.as_fd(), entry)?;
        rustix::fs::futimens(&file, &times(entry.mtime)).context(|| "set times")
    }

    /// Makes something under a name that may be taken: what an earlier entry of this layer left there goes then.
    fn place<T>(&mut self, parent: &Parent, name: &Path, what: &str, make: impl Fn(BorrowedFd) -> rustix::io::Result<T>) -> Result<T> {
        let mut made = make(parent.dir.as_fd());
        if matches!(made, Err(Errno::EXIST)) {
            self.make_room(parent, name)?;
            made = make(parent.dir.as_fd());
        }
        made.context(|| what)
    }

    /// Opens the parent directory, making what is missing.
    fn enter(&mut self, named: &Path) -> Result<Rc<Parent>> {
        if let Some(parent) = self.parent.as_ref().filter(|p| p.named == named) {
            return Ok(parent.clone());
        }
        let entered = self.rooted.enter(named)?;
        for made in entered.made {
            self.count(0);
            // An opaque one is new: it owes nothing to the layers below.
            if !made.opaque {
                self.keep(&made.path)?;
                self.done.implicit.insert(made.path);
            }
        }
        let parent = Rc::new(Parent { named: named.to_owned(), path: entered.path, dir: entered.dir });
        self.parent = Some(parent.clone());
        Ok(parent)
    }

    fn count(&mut self, bytes: u64) {
        self.done.inodes += 1;
        self.done.bytes += bytes.div_ceil(DISK_BLOCK).max(1) * DISK_BLOCK;
    }

    fn keep(&mut self, path: &Path) -> Result<()> {
        self.kept += path.as_os_str().len() + size_of::<PathBuf>();
        if self.kept > PATHS_LIMIT {
            return Err(Error::new(Code::ResourceExhausted, "too many directories with long names in one layer"));
        }
        Ok(())
    }

    /// `.wh.NAME`: hides NAME of the layers below. When this layer also has a directory of that name, it hides theirs.
    fn whiteout(&mut self, parent: &Parent, hidden: &[u8]) -> Result<()> {
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Error::precondition("a whiteout of nothing"));
        }
        let name = Path::new(OsStr::from_bytes(hidden));
        match rustix::fs::mknodat(&parent.dir, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => self.count(0),
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(&parent.dir, name, AtFlags::SYMLINK_NOFOLLOW).context(|| "look at a whiteout's target")?;
                if rooted::is_dir(&stat) {
                    rooted::set_opaque(&rooted::proc_path(parent.dir.as_fd(), name)).context(|| "mark directory opaque")?;
                    self.done.implicit.remove(&parent.path.join(name));
                }
            }
            Err(e) => return Err(e).context(|| "make whiteout"),
        }
        Ok(())
    }

    /// Removes what an earlier entry of this layer left under the name.
    fn make_room(&mut self, parent: &Parent, name: &Path) -> Result<()> {
        let stat = match rustix::fs::statat(&parent.dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e).context(|| "look at what is there"),
        };
        // What goes may be a link that the last parent was reached by, or a directory above it.
        self.parent = None;
        self.lossy |= !rooted::is_whiteout(&stat);
        if !rooted::is_dir(&stat) {
            return rustix::fs::unlinkat(&parent.dir, name, AtFlags::empty()).context(|| "replace");
        }
        crate::sys::tree::remove_at(parent.dir.as_fd(), name.as_os_str()).context(|| "replace directory")?;
        // What was in it stands together in the order of paths.
        let gone = parent.path.join(name);
        let times: Vec<PathBuf> = self.times.range(gone.clone()..).map(|(p, _)| p).take_while(|p| p.starts_with(&gone)).cloned().collect();
        for path in &times {
            self.times.remove(path);
        }
        let implicit: Vec<PathBuf> = self.done.implicit.range(gone.clone()..).take_while(|p| p.starts_with(&gone)).cloned().collect();
        for path in &implicit {
            self.done.implicit.remove(path);
        }
        Ok(())
    }

    /// The target is a file of this layer. Links on the way to it are followed inside the layer, as they are for entries.
    fn hardlink(&mut self, parent: &Parent, name: &Path, entry: &Entry) -> Result<()> {
        let target = rooted::normalise(&entry.link)?;
        let what = || format!("link to {}", target.display());
        let (above, base) = (target.parent().unwrap_or(Path::new("")), target.file_name().unwrap_or_default());
        let missing = || Error::precondition(format!("{}: no such file in this layer", what()));
        let from = match self.rooted.dir(above) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(missing()),
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
        match rustix::fs::linkat(&from, base, &parent.dir, name, AtFlags::empty()) {
            Err(Errno::EXIST) => {}
            other => return other.context(what),
        }
        let there = rustix::fs::statat(&parent.dir, name, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
        if (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino) {
            return Ok(());
        }
        self.make_room(parent, name)?;
        match rustix::fs::linkat(&from, base, &parent.dir, name, AtFlags::empty()) {
            // The target was in the directory that gave way.
            Err(Errno::NOENT) => Err(missing()),
            other => other.context(what),
        }
    }

    /// Copies an entry's data; the holes of a sparse file stay holes.
    fn fill(&mut self, file: &mut File, entry: &Entry, tar: &mut Tarball<&mut dyn BufRead>, cancel: &Cancel) -> Result<()> {
        self.unseen += entry.stored + DISK_BLOCK;
        if self.unseen >= LOOK {
            self.room.check(entry.stored)?;
            self.unseen = 0;
        }
        let whole = [(0, entry.size)];
        let mut written = 0;
        for (offset, length) in entry.pieces.as_deref().unwrap_or(&whole) {
            if entry.pieces.is_some() {
                file.seek(SeekFrom::Start(*offset)).context(|| "seek")?;
            }
            let mut left = *length;
            while left > 0 {
                cancel.check()?;
                let data = tar.data().context(|| "read layer archive").map_err(broken)?;
                let n = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                if n == 0 {
                    return Err(Error::precondition("the archive ends inside a file"));
                }
                file.write_all(&data[..n]).context(|| "write file")?;
                tar.consume(n).context(|| "read layer archive").map_err(broken)?;
                left -= n as u64;
                written += n as u64;
                if written / FLUSH != (written - n as u64) / FLUSH {
                    file::start_writeback(file);
                    self.room.check(entry.stored - written)?;
                }
            }
        }
        if entry.pieces.is_some() {
            file.set_len(entry.size).context(|| "extend sparse file")?;
        }
        self.data += entry.size;
        Ok(())
    }

    /// Owner, attributes and mode of an open file or directory, in the order in which the kernel does not undo one by another.
    fn describe(&mut self, file: BorrowedFd, entry: &Entry) -> Result<()> {
        if self.owner {
            rustix::fs::fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).context(|| "set owner")?;
        }
        for (key, value) in &entry.xattrs {
            let set = allowed(key).then(|| rustix::fs::fsetxattr(file, OsStr::from_bytes(key), value, XattrFlags::empty()));
            self.attribute(entry, key, set)?;
        }
        rustix::fs::fchmod(file, Mode::from(entry.mode)).context(|| "set mode")
    }

    /// The same and the times for what cannot be opened: links, devices, pipes.
    fn special(&mut self, parent: &Parent, name: &Path, entry: &Entry) -> Result<()> {
        self.count(0);
        let dir = parent.dir.as_fd();
        if self.owner {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(|| "set owner")?;
        }
        let path = rooted::proc_path(dir, name);
        for (key, value) in &entry.xattrs {
            let set = allowed(key).then(|| rustix::fs::lsetxattr(&path, OsStr::from_bytes(key), value, XattrFlags::empty()));
            self.attribute(entry, key, set)?;
        }
        if entry.kind != Kind::Symlink {
            rooted::set_mode(dir, name, entry.mode).context(|| "set mode")?;
        }
        rooted::set_times(dir, name, entry.mtime)
    }

    /// What became of an attribute: None when it is not allowed.
    fn attribute(&mut self, entry: &Entry, key: &[u8], set: Option<rustix::io::Result<()>>) -> Result<()> {
        let key = String::from_utf8_lossy(key);
        match set {
            Some(Ok(())) => {}
            None => {
                if !std::mem::replace(&mut self.dropped, true) {
                    log::warn!("image: attribute {key} of {} is not the image's to set; left out", String::from_utf8_lossy(&entry.path));
                }
            }
            // Not this file system's, not this kind of file's, or not ours to set without root.
            Some(Err(Errno::OPNOTSUPP)) => log::debug!("image: attribute {key} is not supported here"),
            Some(Err(Errno::PERM)) if !self.owner || !matches!(entry.kind, Kind::File | Kind::Directory) => {}
            Some(Err(e)) => return Err(e).context(|| format!("set attribute {key}")),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Unpacked> {
        for (path, time) in std::mem::take(&mut self.times) {
            let what = || format!("set times of {}", path.display());
            let dir = self.rooted.plain_dir(&path).context(what)?;
            rustix::fs::futimens(&dir, &times(time)).context(what)?;
        }
        Ok(self.done)
    }
}

/// overlayfs's own attributes say where lower layers' files are: those of the archive would speak of other places, and are left out. So are
/// labels of SELinux, which are of another host's policy: this one's kernel refuses what it does not know, and containers do not see them.
pub(super) fn allowed(key: &[u8]) -> bool {
    key != label::SELINUX.as_bytes() && ![rooted::OVERLAY_XATTRS.as_bytes(), b"user.overlay."].iter().any(|prefix| key.starts_with(prefix))
}

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
    Timestamps { last_access: time, last_modification: time }
}

/// Type and number of a device or pipe.
fn node(entry: &Entry) -> Result<(FileType, rustix::fs::Dev)> {
    let (major, minor) = entry.device;
    // The kernel's own widths: what is cut off would make another device of it.
    if entry.kind != Kind::Fifo && (major >= 1 << 12 || minor >= 1 << 20) {
        return Err(Error::precondition(format!("device number {major}:{minor} out of range")));
    }
    match entry.kind {
        Kind::Char if (major, minor) == (0, 0) => Err(Error::precondition("a character device 0/0: whiteouts of a layer are named .wh.")),
        Kind::Char => Ok((FileType::CharacterDevice, rustix::fs::makedev(major, minor))),
        Kind::Block => Ok((FileType::BlockDevice, rustix::fs::makedev(major, minor))),
        _ => Ok((FileType::Fifo, 0)),
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
