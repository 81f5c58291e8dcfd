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

use super::tape::Tape;
use super::tarball::{Entry, Kind, Tarball};
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::rooted::{self, Rooted};

pub(super) const WHITEOUT_PREFIX: &[u8] = b".wh.";
pub(super) const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Names that only AUFS understands (its hard link and trash directories).
pub(super) const AUFS_PREFIX: &[u8] = b".wh..wh.";
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
    /// Whether the tape is whole: the files and it are the archive again.
    pub taped: bool,
}

/// Unpacks the tar stream into the empty directory `dir`, reading it to its end: digests count the tail too. `tape` is a
/// new file for what `fsck` needs.
pub fn unpack(stream: &mut dyn Read, dir: &Path, tape: &Path, limits: &Limits, cancel: &Cancel) -> Result<Unpacked> {
    let mut unpacker = Unpacker {
        rooted: Rooted::open(dir)?,
        limits: limits.clone(),
        data: 0,
        entries: 0,
        done: Unpacked { bytes: DISK_BLOCK, inodes: 1, implicit: BTreeSet::from([PathBuf::new()]), taped: false },
        replaced: false,
        times: BTreeMap::new(),
        parent: None,
        owner: rustix::process::geteuid().is_root(),
        buffer: vec![0; 128 << 10],
    };
    let taping = || format!("write {}", tape.display());
    let mut tar = Tarball::taped(stream, Tape::create(tape).context(taping)?);
    while let Some(entry) = tar.next_entry().context(|| "read layer archive").map_err(broken)? {
        cancel.check()?;
        let name = || format!("unpack {}", String::from_utf8_lossy(&entry.path[..entry.path.len().min(300)]));
        unpacker.add(&entry, &mut tar, cancel).context(name)?;
    }
    let recorded = match tar.finish().context(|| "read layer archive").map_err(broken)? {
        // A file that the archive itself replaced is nowhere to be read again.
        Some(recorded) if !unpacker.replaced => recorded.finish().context(taping)?,
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
    /// An entry took the place of another one's.
    replaced: bool,
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
            self.replaced |= !rooted::is_whiteout(&stat);
            return Ok(rooted::is_whiteout(&stat));
        }
        if kind != Kind::Directory {
            self.replaced = true;
            crate::sys::tree::remove_at(parent.as_fd(), name.as_os_str()).context(|| "replace directory")?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use tar::EntryType;

    /// An entry as hostile as wanted: names are written as they are.
    struct Item<'a> {
        name: &'a str,
        kind: EntryType,
        link: &'a str,
        data: &'a [u8],
        pax: &'a [(&'a str, &'a [u8])],
        device: (u32, u32),
    }

    fn item<'a>(name: &'a str, kind: EntryType) -> Item<'a> {
        Item { name, kind, link: "", data: b"", pax: &[], device: (0, 0) }
    }

    fn file<'a>(name: &'a str, data: &'a [u8]) -> Item<'a> {
        Item { data, ..item(name, EntryType::Regular) }
    }

    fn link<'a>(name: &'a str, kind: EntryType, link: &'a str) -> Item<'a> {
        Item { link, ..item(name, kind) }
    }

    fn archive(items: &[Item]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for item in items {
            builder.append_pax_extensions(item.pax.iter().copied()).unwrap();
            let mut h = tar::Header::new_ustar();
            h.as_old_mut().name[..item.name.len()].copy_from_slice(item.name.as_bytes());
            h.as_old_mut().linkname[..item.link.len()].copy_from_slice(item.link.as_bytes());
            h.set_entry_type(item.kind);
            h.set_mode(0o755);
            h.set_uid(0);
            h.set_gid(0);
            h.set_mtime(1000);
            h.set_size(item.data.len() as u64);
            h.set_device_major(item.device.0).unwrap();
            h.set_device_minor(item.device.1).unwrap();
            h.set_cksum();
            builder.append(&h, item.data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    struct Site {
        dir: tempfile::TempDir,
    }

    impl Site {
        /// A layer directory beside a secret that nothing may reach.
        fn new() -> Site {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("layer")).unwrap();
            std::fs::write(dir.path().join("secret"), "secret").unwrap();
            Site { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join("layer").join(name)
        }

        fn unpack(&self, items: &[Item]) -> Result<Unpacked> {
            let limits = Limits { max_entries: 10, max_bytes: 10_000 };
            let tape = self.dir.path().join("tape");
            let result = unpack(&mut archive(items).as_slice(), &self.path(""), &tape, &limits, &Cancel::never());
            crate::sys::file::remove_file(&tape).unwrap();
            assert_eq!(std::fs::read(self.dir.path().join("secret")).unwrap(), b"secret");
            assert_eq!(std::fs::metadata(self.dir.path().join("secret")).unwrap().nlink(), 1);
            assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), 2, "something was made outside");
            result
        }
    }

    fn refused(items: &[Item], words: &str) {
        let e = Site::new().unpack(items).unwrap_err();
        assert!(e.message().contains(words), "{e}");
    }

    #[test]
    fn names_that_climb_are_refused_or_kept_inside() {
        refused(&[file("../evil", b"x")], "outside");
        refused(&[file("a/../../evil", b"x")], "outside");
        let site = Site::new();
        site.unpack(&[file("/abs/x", b"1"), file("a/../b", b"2")]).unwrap();
        assert!(site.path("abs/x").exists() && site.path("b").exists());
    }

    #[test]
    fn links_as_parents_stay_inside() {
        let site = Site::new();
        site.unpack(&[
            link("up", EntryType::Symlink, "../.."),
            file("up/secret", b"evil"),
            link("abs", EntryType::Symlink, "/"),
            file("abs/x", b"y"),
            link("dangling", EntryType::Symlink, "not/here"),
            file("dangling/z", b"z"),
        ])
        .unwrap();
        assert_eq!(std::fs::read(site.path("secret")).unwrap(), b"evil");
        assert!(site.path("x").exists() && site.path("not/here/z").exists());
    }

    #[test]
    fn a_file_is_never_written_through_a_link() {
        let site = Site::new();
        site.unpack(&[
            link("f", EntryType::Symlink, "../secret"),
            file("f", b"new"),
            item("d", EntryType::Directory),
            link("d", EntryType::Symlink, ".."),
        ])
        .unwrap();
        assert_eq!(std::fs::read(site.path("f")).unwrap(), b"new");
        assert!(site.path("d").symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn hard_links_stay_in_the_layer() {
        refused(&[link("l", EntryType::Link, "../secret")], "outside");
        refused(&[link("l", EntryType::Link, "/etc/passwd")], "no such file in this layer");
        refused(&[link("up", EntryType::Symlink, ".."), link("l", EntryType::Link, "up/secret")], "no such file in this layer");
        refused(&[item("d", EntryType::Directory), link("l", EntryType::Link, "d")], "not a file");
        refused(&[file(".wh.w", b""), link("l", EntryType::Link, "w")], "not a file");
        let site = Site::new();
        // A link to a link is a second name of the link, never of its target.
        let made = site.unpack(&[
            link("s", EntryType::Symlink, "../secret"),
            link("l", EntryType::Link, "s"),
            file("a", b"1"),
            link("b", EntryType::Link, "./a"),
        ]);
        // The root, the link, the file, and the tape.
        assert_eq!(made.unwrap().inodes, 4);
        assert!(site.path("l").symlink_metadata().unwrap().is_symlink());
        assert_eq!(site.path("b").metadata().unwrap().nlink(), 2);
    }

    #[test]
    fn whiteouts() {
        let site = Site::new();
        site.unpack(&[
            file(".wh.gone", b""),
            item("o", EntryType::Directory),
            file("o/.wh..wh..opq", b""),
            file(".wh..wh.plnk", b""),
            file(".wh.again/", b""),
            file("again/x", b"1"),
            item("kept", EntryType::Directory),
            file(".wh.kept", b""),
        ])
        .unwrap();
        assert!(site.path("gone").symlink_metadata().unwrap().file_type().is_char_device());
        for opaque in ["o", "again", "kept"] {
            assert!(rooted::is_opaque(&site.path(opaque)), "{opaque}");
        }
        assert!(!site.path(".wh..wh.plnk").exists());
        for bad in [".wh.", ".wh..", ".wh...", "d/.wh..."] {
            refused(&[file(bad, b"")], "whiteout of nothing");
        }
        let fake = Item { device: (0, 0), ..item("w", EntryType::Char) };
        refused(&[fake], "0/0");
        let forged = Item { pax: &[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")], ..item("d", EntryType::Directory) };
        refused(&[forged], "overlayfs's own");
    }

    #[test]
    fn devices_fifos_and_attributes() {
        let site = Site::new();
        let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"1\n2"), ("mtime", b"5.5")];
        let made = site
            .unpack(&[
                Item { device: (1, 3), ..item("null", EntryType::Char) },
                item("pipe", EntryType::Fifo),
                Item { pax, ..file("sub/f", b"x") },
            ])
            .unwrap();
        assert_eq!(made.implicit, BTreeSet::from([PathBuf::new(), PathBuf::from("sub")]));
        assert_eq!(site.path("null").metadata().unwrap().rdev(), rustix::fs::makedev(1, 3));
        assert!(site.path("pipe").metadata().unwrap().file_type().is_fifo());
        let meta = site.path("sub/f").metadata().unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (5, 500_000_000));
        assert_eq!(rooted::xattrs(&site.path("sub/f")).unwrap(), [("user.a".into(), b"1\n2".to_vec())]);
    }

    #[test]
    fn limits() {
        let names: Vec<String> = (0..11).map(|i| format!("f{i}")).collect();
        let items: Vec<Item> = names.iter().map(|n| file(n, b"")).collect();
        assert_eq!(Site::new().unpack(&items).unwrap_err().code(), Code::ResourceExhausted);
        let e = Site::new().unpack(&[file("a", &[0; 6000]), file("b", &[0; 6000])]).unwrap_err();
        assert_eq!(e.code(), Code::ResourceExhausted);
        // A size that lies is refused before a byte is read.
        let lie = Item { pax: &[("size", b"99999999999")], ..file("a", b"x") };
        assert_eq!(Site::new().unpack(&[lie]).unwrap_err().code(), Code::ResourceExhausted);
        refused(&[file("a", b""), file("a/b", b"")], "in the way");
        refused(&[item("", EntryType::Regular)], "root of a layer");
    }

    #[test]
    fn sparse_files_keep_their_holes() {
        let site = Site::new();
        let mut h = tar::Header::new_gnu();
        h.set_path("s").unwrap();
        h.set_entry_type(EntryType::GNUSparse);
        h.set_mode(0o644);
        h.set_size(512);
        let gnu = h.as_gnu_mut().unwrap();
        gnu.sparse[0].set_offset(4096);
        gnu.sparse[0].set_length(512);
        gnu.set_real_size(8192);
        h.set_cksum();
        let mut data = h.as_bytes().to_vec();
        data.extend([7u8; 512]);
        let limits = Limits { max_entries: 10, max_bytes: 10_000 };
        unpack(&mut data.as_slice(), &site.path(""), &site.dir.path().join("tape"), &limits, &Cancel::never()).unwrap();
        let text = std::fs::read(site.path("s")).unwrap();
        assert!(text.len() == 8192 && text[..4096] == [0; 4096] && text[4096..4608] == [7; 512] && text[4608..].iter().all(|b| *b == 0));
    }
}
