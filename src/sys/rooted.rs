//! File operations inside one directory that holds a stranger's files: every path is resolved by the kernel with
//! RESOLVE_IN_ROOT, so that no link, however made, leads outside.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Links followed by `enter` before it gives up.
const LINK_LIMIT: usize = 40;
/// Directories above a file at most, however the archive names it: whoever walks the tree later, to remove it for one, has a
/// bounded stack and bounded descriptors.
pub const DEPTH_LIMIT: usize = 255;
/// NAME_MAX of Linux.
const NAME_LIMIT: usize = 255;

/// A directory that paths cannot leave. Paths given are relative and normalised (`normalise`); "" is the root itself.
pub struct Rooted {
    root: OwnedFd,
}

/// The cleaned form of a name from an archive: relative, without `.`, `..` and double slashes. A name that climbs above
/// the root, or has a NUL or more than PATH_MAX bytes, is an error.
pub fn normalise(name: &[u8]) -> Result<PathBuf> {
    let wrong = |why: &str| Error::precondition(format!("path {:?}: {why}", String::from_utf8_lossy(&name[..name.len().min(200)])));
    if name.len() >= 4096 {
        return Err(wrong("longer than 4095 bytes"));
    }
    if name.contains(&0) {
        return Err(wrong("contains NUL"));
    }
    let mut path = PathBuf::new();
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if !path.pop() {
                    return Err(wrong("leads outside the layer"));
                }
            }
            part if part.len() > NAME_LIMIT => return Err(wrong("a name longer than 255 bytes")),
            part => path.push(OsStr::from_bytes(part)),
        }
    }
    if path.iter().count() > DEPTH_LIMIT + 1 {
        return Err(wrong("more than 255 directories deep"));
    }
    Ok(path)
}

/// Whether a file is overlayfs's whiteout: a character device 0/0.
pub fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

pub fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// A made or found directory, and what had to be made for it. Paths are from the root, without links.
#[derive(Debug)]
pub struct Entered {
    pub dir: OwnedFd,
    pub path: PathBuf,
    pub made: Vec<Made>,
}

/// A directory that was missing.
#[derive(Debug, PartialEq, Eq)]
pub struct Made {
    pub path: PathBuf,
    /// It took the place of a whiteout: what lower layers have there is hidden.
    pub opaque: bool,
}

impl Rooted {
    pub fn open(root: &Path) -> Result<Rooted> {
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .context(|| format!("open {}", root.display()))?;
        Ok(Rooted { root })
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                // A rename or mount somewhere on the machine; documented to be tried again.
                Err(Errno::AGAIN | Errno::INTR) => continue,
                other => return other,
            }
        }
    }

    /// Opens a directory; links on the way are followed inside the root.
    pub fn dir(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Finds what the path names, links followed inside the root: a handle for metadata, or to open it by.
    pub fn find(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, OFlags::PATH)
    }

    /// Opens what the path names without following a link there: a handle for metadata only.
    pub fn handle(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.resolve(path, OFlags::PATH | OFlags::NOFOLLOW)
    }

    /// Opens a regular file for reading.
    pub fn file(&self, path: &Path) -> rustix::io::Result<File> {
        self.resolve(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK).map(File::from)
    }

    /// Opens a directory that no link leads to; links are an error (ELOOP).
    pub fn plain_dir(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        beneath(&self.root, path)
    }

    /// Opens a directory, making it and its missing parents 0755. A whiteout in the way gives room to an opaque directory; a
    /// dangling link is followed by its text (the target may live in a lower layer); a file in the way is an error. Links
    /// are followed here, part by part and never above the root; the kernel follows none. Nobody else may change the tree.
    pub fn enter(&self, path: &Path) -> Result<Entered> {
        let what = || format!("make directory {}", path.display());
        if let Ok(dir) = self.plain_dir(path) {
            return Ok(Entered { dir, path: path.to_owned(), made: Vec::new() });
        }
        let parts = |path: &Path| -> Vec<OsString> { path.iter().rev().map(OsStr::to_owned).collect() };
        // What is left to do, the next part last.
        let mut left = parts(path);
        let (mut at, mut dir, mut made, mut links) = (PathBuf::new(), self.plain_dir(Path::new("")).context(what)?, Vec::new(), 0);
        while let Some(part) = left.pop() {
            match part.as_bytes() {
                b"/" => (at, dir) = (PathBuf::new(), self.plain_dir(Path::new("")).context(what)?),
                b"." => {}
                b".." => {
                    at.pop();
                    dir = self.plain_dir(&at).context(what)?;
                }
                _ => {
                    let make = |opaque: bool, made: &mut Vec<Made>| -> Result<()> {
                        rustix::fs::mkdirat(&dir, &part, Mode::from(0o755)).context(what)?;
                        set_mode(&dir, Path::new(&part), 0o755).context(what)?;
                        if opaque {
                            set_opaque(&proc_path(dir.as_fd(), Path::new(&part))).context(what)?;
                        }
                        made.push(Made { path: at.join(&part), opaque });
                        Ok(())
                    };
                    match rustix::fs::statat(&dir, &part, AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(stat) if is_dir(&stat) => {}
                        Err(Errno::NOENT) => make(false, &mut made)?,
                        Ok(stat) if is_whiteout(&stat) => {
                            rustix::fs::unlinkat(&dir, &part, AtFlags::empty()).context(what)?;
                            make(true, &mut made)?;
                        }
                        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {
                            links += 1;
                            if links > LINK_LIMIT {
                                return Err(Error::precondition(format!("{}: too many links", what())));
                            }
                            let text = rustix::fs::readlinkat(&dir, &part, Vec::new()).context(what)?;
                            left.extend(parts(Path::new(OsStr::from_bytes(text.as_bytes()))));
                            continue;
                        }
                        Ok(_) => return Err(Error::precondition(format!("{}: a file of the same layer is in the way", what()))),
                        Err(e) => return Err(e).context(what),
                    }
                    dir = beneath(&dir, Path::new(&part)).context(what)?;
                    at.push(part);
                    if at.iter().count() > DEPTH_LIMIT {
                        return Err(Error::precondition(format!("{}: more than {DEPTH_LIMIT} directories deep", what())));
                    }
                }
            }
        }
        Ok(Entered { dir, path: at, made })
    }
}

/// Opens a directory below `dir`; no part of the way may be a link or a mount.
pub fn beneath(dir: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    loop {
        match rustix::fs::openat2(&dir, at_name(path), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), how) {
            Err(Errno::AGAIN | Errno::INTR) => continue,
            other => return other,
        }
    }
}

/// `/proc/self/fd/N/name`: a path to a file in an open directory, for calls that have no `at` form. The kernel follows
/// the descriptor; `name` is a single component.
pub fn proc_path(dir: BorrowedFd<'_>, name: &Path) -> PathBuf {
    let fd = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    // The root itself: the descriptor's own link, with a slash so that it is followed.
    if name.as_os_str().is_empty() {
        fd.join(".")
    } else {
        fd.join(name)
    }
}

/// chmod of `name` in `dir`; it must not be a link.
pub fn set_mode(dir: impl AsFd, name: &Path, mode: u32) -> rustix::io::Result<()> {
    rustix::fs::chmodat(dir, at_name(name), Mode::from(mode), AtFlags::empty())
}

/// Marks a directory opaque: what lower layers have in it is hidden.
pub fn set_opaque(path: &Path) -> rustix::io::Result<()> {
    rustix::fs::lsetxattr(path, OPAQUE, b"y", rustix::fs::XattrFlags::empty())
}

/// Whether a directory is marked opaque.
pub fn is_opaque(path: &Path) -> bool {
    let mut value = [0u8; 4];
    matches!(rustix::fs::lgetxattr(path, OPAQUE, &mut value[..]), Ok(1) if value[0] == b'y')
}

/// overlayfs's mark of an opaque directory.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// overlayfs's own attributes: no layer may bring them.
pub const OVERLAY_XATTRS: &str = "trusted.overlay.";

/// The name for calls with an `at` form: "" is the directory itself.
fn at_name(name: &Path) -> &Path {
    if name.as_os_str().is_empty() {
        Path::new(".")
    } else {
        name
    }
}

/// Sets both times of `name` in `parent`, a link not followed: seconds and nanoseconds.
pub fn set_times(parent: impl AsFd, name: &Path, (seconds, nanos): (i64, u32)) -> Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(parent, at_name(name), &times, AtFlags::SYMLINK_NOFOLLOW).context(|| "set times")
}

/// Owner, attributes (but overlayfs's own), mode and times of directory `source` for `name` in `parent`.
pub fn copy_dir_metadata(source: impl AsFd, parent: impl AsFd, name: &Path) -> Result<()> {
    let stat = rustix::fs::fstat(&source).context(|| "look at the source")?;
    let parent = parent.as_fd();
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::chownat(parent, at_name(name), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(|| "set owner")?;
    }
    let (from, to) = (proc_path(source.as_fd(), Path::new("")), proc_path(parent, name));
    for (key, value) in xattrs(&from).context(|| "list attributes")? {
        if !key.as_bytes().starts_with(OVERLAY_XATTRS.as_bytes()) {
            rustix::fs::lsetxattr(&to, &key, &value, rustix::fs::XattrFlags::empty())
                .context(|| format!("set attribute {}", key.to_string_lossy()))?;
        }
    }
    set_mode(parent, name, stat.st_mode & 0o7777).context(|| "set mode")?;
    set_times(parent, name, (stat.st_mtime, stat.st_mtime_nsec as u32))
}

/// All extended attributes of a file, links not followed. A file system without them has none.
pub fn xattrs(path: &Path) -> rustix::io::Result<Vec<(std::ffi::OsString, Vec<u8>)>> {
    let mut names = vec![0u8; 64 << 10];
    let n = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(n) => n,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for name in names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = std::ffi::OsStr::from_bytes(name);
        let mut value = vec![0u8; 64 << 10];
        let n = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(n);
        found.push((name.to_owned(), value));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises() {
        let n = |s: &str| normalise(s.as_bytes()).map(|p| p.to_str().unwrap().to_owned());
        assert_eq!(n("./a//b/./c/").unwrap(), "a/b/c");
        assert_eq!(n("/etc/passwd").unwrap(), "etc/passwd");
        assert_eq!(n("a/../b").unwrap(), "b");
        assert_eq!(n("./").unwrap(), "");
        assert!(n("../a").is_err() && n("a/../../b").is_err() && n("a\0b").is_err() && n(&"a/".repeat(2100)).is_err());
        assert!(n(&"n".repeat(255)).is_ok() && n(&"n".repeat(256)).is_err());
    }

    #[test]
    fn links_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).unwrap();
        std::os::unix::fs::symlink("../../../../../..", dir.path().join("up")).unwrap();
        let rooted = Rooted::open(dir.path()).unwrap();
        let entered = rooted.enter(Path::new("out/x")).unwrap();
        let inside = outside.path().strip_prefix("/").unwrap().join("x");
        assert_eq!((&entered.path, &entered.made.last().unwrap().path), (&inside, &inside), "paths without links");
        assert!(dir.path().join(&inside).is_dir());
        assert!(!outside.path().join("x").exists());
        assert_eq!(rooted.enter(Path::new("up/y")).unwrap().path, Path::new("y"));
        assert!(dir.path().join("y").is_dir());
        assert_eq!(rooted.plain_dir(Path::new("up")).unwrap_err(), Errno::LOOP);
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        assert!(rooted.enter(Path::new("loop/z")).unwrap_err().message().contains("too many links"));
        std::os::unix::fs::symlink("./y/../y//", dir.path().join("round")).unwrap();
        assert_eq!(rooted.enter(Path::new("round/q")).unwrap().path, Path::new("y/q"));
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(rooted.enter(Path::new("file/z")).unwrap_err().message().contains("in the way"));
    }

    #[test]
    fn depth_is_bounded_however_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let rooted = Rooted::open(dir.path()).unwrap();
        let deep: PathBuf = std::iter::repeat_n("d", DEPTH_LIMIT).collect();
        assert_eq!(rooted.enter(&deep).unwrap().made.len(), DEPTH_LIMIT);
        assert!(normalise(deep.join("file").as_os_str().as_bytes()).is_ok());
        assert!(normalise(deep.join("d/file").as_os_str().as_bytes()).is_err());
        std::os::unix::fs::symlink(deep.strip_prefix("d").unwrap(), dir.path().join("d/short")).unwrap();
        let e = rooted.enter(Path::new("d/short/d/e")).unwrap_err();
        assert!(e.message().contains("directories deep"), "{e}");
    }

    proptest::proptest! {
        #[test]
        fn normalised_paths_have_only_normal_parts(name in proptest::collection::vec(proptest::num::u8::ANY, 0..80)) {
            if let Ok(path) = normalise(&name) {
                proptest::prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
            }
        }
    }
}
