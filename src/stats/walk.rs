//! Counting what a directory tree takes on disk, as du(1) does, a few files at a time: a walk can be put aside after any
//! file and taken up later, and its memory does not grow with the tree.

use std::collections::HashSet;
use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Stat};
use rustix::io::Errno;

use crate::error::{Context, Result};

/// Descriptors that a walk keeps while it is at work; further up it goes back by "..".
const OPEN: usize = 16;
/// Subdirectories noted at once of one directory.
const NOTED: usize = 64;
/// From this level on one at a time: the notes of all levels together stay small.
const DEEP: usize = 32;
/// What lies deeper than this is not counted: nobody nests so deep but to exhaust us.
const DEPTH: usize = 20_000;
/// Inodes with several names that are remembered; of further ones each name counts for its share.
const LINKED: usize = 1 << 16;
/// Bytes of directory entries read at once.
const BUFFER: usize = 8192;
/// For directories: links are not followed, so that nothing outside of the tree is counted.
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// What a tree takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Allocated, so holes are free.
    pub bytes: u64,
    /// Files, directories and everything else, each once.
    pub inodes: u64,
}

/// A walk over one tree.
pub struct Walk {
    device: u64,
    /// From the root of the tree to where the walk is.
    levels: Vec<Level>,
    linked: HashSet<u64>,
    size: Size,
    /// Shares of files whose other names are not remembered: bytes, inodes.
    shares: (f64, f64),
}

/// One directory on the way.
struct Level {
    /// None when it was closed to save descriptors.
    fd: Option<OwnedFd>,
    inode: u64,
    /// Where the kernel goes on listing.
    cookie: u64,
    listed: bool,
    subdirs: Vec<CString>,
}

/// How far a step came.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more; so many files were looked at.
    More(u32),
    /// That was all; so many files were looked at.
    Done(u32),
}

impl Walk {
    /// Begins at the directory `root`.
    pub fn new(root: &Path) -> Result<Walk> {
        let what = || format!("walk {}", root.display());
        let fd = rustix::fs::open(root, DIRECTORY, Mode::empty()).context(what)?;
        let stat = rustix::fs::fstat(&fd).context(what)?;
        let mut walk = Walk { device: stat.st_dev, levels: Vec::new(), linked: HashSet::new(), size: Size::default(), shares: (0.0, 0.0) };
        walk.count(&stat);
        walk.push(fd, stat.st_ino);
        Ok(walk)
    }

    /// What was counted so far.
    pub fn size(&self) -> Size {
        Size { bytes: self.size.bytes + self.shares.0.round() as u64, inodes: self.size.inodes + self.shares.1.round() as u64 }
    }

    /// Looks at `limit` files at most.
    pub fn step(&mut self, limit: u32) -> Result<Step> {
        let mut used = 0;
        while used < limit {
            let Some(level) = self.levels.last() else { return Ok(Step::Done(used)) };
            if !level.listed && level.subdirs.is_empty() {
                self.list(limit, &mut used);
            } else if !level.subdirs.is_empty() {
                used += 1;
                self.descend()?;
            } else {
                self.ascend();
            }
        }
        Ok(if self.levels.is_empty() { Step::Done(used) } else { Step::More(used) })
    }

    /// Closes what a walk that waits does not need: the root and where it is stay open.
    pub fn rest(&mut self) {
        let last = self.levels.len().saturating_sub(1);
        for level in self.levels.iter_mut().take(last).skip(1) {
            level.fd = None;
        }
        self.linked.shrink_to_fit();
    }

    fn push(&mut self, fd: OwnedFd, inode: u64) {
        self.levels.push(Level { fd: Some(fd), inode, cookie: 0, listed: false, subdirs: Vec::new() });
        let depth = self.levels.len();
        if depth > OPEN + 1 {
            self.levels[depth - 1 - OPEN].fd = None;
        }
    }

    /// Reads entries of the last level and counts them, but for directories, which it notes.
    fn list(&mut self, limit: u32, used: &mut u32) {
        let depth = self.levels.len();
        let noted = if depth > DEEP { 1 } else { NOTED };
        let Some(mut level) = self.levels.pop() else { return };
        let Some(fd) = level.fd.as_ref() else { return };
        if rustix::fs::seek(fd, SeekFrom::Start(level.cookie)).is_err() {
            // It was removed under us.
            level.listed = true;
            self.levels.push(level);
            return;
        }
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut entries = RawDir::new(fd, &mut buffer);
        while *used < limit && level.subdirs.len() < noted {
            let entry = match entries.next() {
                None => {
                    level.listed = true;
                    break;
                }
                Some(Ok(entry)) => entry,
                Some(Err(Errno::INTR)) => continue,
                Some(Err(_)) => {
                    // The same, or it cannot be read: there is nothing more to have.
                    level.listed = true;
                    break;
                }
            };
            level.cookie = entry.next_entry_cookie();
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let mut kind = entry.file_type();
            if kind != FileType::Directory {
                *used += 1;
                // Gone meanwhile is fine.
                let Ok(stat) = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
                kind = FileType::from_raw_mode(stat.st_mode);
                if kind != FileType::Directory && stat.st_dev == self.device {
                    self.count(&stat);
                }
            }
            if kind == FileType::Directory && depth < DEPTH {
                level.subdirs.push(name.to_owned());
            }
        }
        self.levels.push(level);
    }

    /// Enters the next noted directory.
    fn descend(&mut self) -> Result<()> {
        let Some(level) = self.levels.last_mut() else { return Ok(()) };
        let Some(name) = level.subdirs.pop() else { return Ok(()) };
        let Some(fd) = level.fd.as_ref() else { return Ok(()) };
        let opened = match rustix::fs::openat(fd, &name, DIRECTORY, Mode::empty()) {
            Ok(opened) => opened,
            Err(e @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => return Err(e).context(|| "open a directory"),
            // Gone, or something else by now.
            Err(_) => return Ok(()),
        };
        let stat = rustix::fs::fstat(&opened).context(|| "look at a directory")?;
        if stat.st_dev == self.device {
            self.count(&stat);
            self.push(opened, stat.st_ino);
        }
        Ok(())
    }

    /// Leaves the last level, which is done.
    fn ascend(&mut self) {
        let Some(done) = self.levels.pop() else { return };
        let Some(level) = self.levels.last_mut() else { return };
        if level.fd.is_some() {
            return;
        }
        level.fd = done.fd.and_then(|fd| parent(fd.as_fd(), self.device, level.inode));
        if level.fd.is_none() {
            // What we came through was moved away. The root is always open: on from there.
            self.levels.truncate(1);
        }
    }

    fn count(&mut self, stat: &Stat) {
        // st_blocks is in units of 512 bytes whatever the file system's own unit is (stat(2)).
        let bytes = stat.st_blocks as u64 * 512;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if stat.st_nlink > 1 && !directory {
            if self.linked.contains(&stat.st_ino) {
                return;
            }
            if self.linked.len() >= LINKED {
                let names = stat.st_nlink as f64;
                self.shares.0 += bytes as f64 / names;
                self.shares.1 += 1.0 / names;
                return;
            }
            self.linked.insert(stat.st_ino);
        }
        self.size.bytes += bytes;
        self.size.inodes += 1;
    }
}

/// The parent directory of `fd` if it is the one we came from.
fn parent(fd: BorrowedFd<'_>, device: u64, inode: u64) -> Option<OwnedFd> {
    let opened = rustix::fs::openat(fd, "..", DIRECTORY, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&opened).ok()?;
    ((stat.st_dev, stat.st_ino) == (device, inode)).then_some(opened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    /// Walks in steps of `limit`, resting between them; `between` may change the tree.
    fn walk(root: &Path, limit: u32, mut between: impl FnMut()) -> Size {
        let mut walk = Walk::new(root).unwrap();
        loop {
            match walk.step(limit).unwrap() {
                Step::Done(used) => {
                    assert!(used <= limit);
                    return walk.size();
                }
                Step::More(used) => assert_eq!(used, limit),
            }
            walk.rest();
            between();
        }
    }

    /// What du says.
    fn du(root: &Path) -> Size {
        fn add(path: &Path, seen: &mut HashSet<u64>, size: &mut Size) {
            let meta = fs::symlink_metadata(path).unwrap();
            if seen.insert(meta.ino()) {
                size.bytes += meta.blocks() * 512;
                size.inodes += 1;
            }
            if meta.is_dir() {
                fs::read_dir(path).unwrap().for_each(|e| add(&e.unwrap().path(), seen, size));
            }
        }
        let mut size = Size::default();
        add(root, &mut HashSet::new(), &mut size);
        size
    }

    /// Holes, hard links, symbolic links, subdirectories.
    fn tree(root: &Path) {
        for a in 0..9 {
            for b in 0..7 {
                let dir = root.join(format!("{a}/{b}"));
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("file"), vec![1; 5000 * (b + 1)]).unwrap();
            }
        }
        fs::File::create(root.join("sparse")).unwrap().set_len(1 << 40).unwrap();
        for n in 0..20 {
            fs::hard_link(root.join("1/6/file"), root.join(format!("2/{}/link{n}", n % 7))).unwrap();
        }
        std::os::unix::fs::symlink("/usr", root.join("outside")).unwrap();
        std::os::unix::fs::symlink("..", root.join("3/up")).unwrap();
    }

    #[test]
    fn counts_as_du_whatever_the_steps() {
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path());
        let wanted = du(dir.path());
        assert!(wanted.bytes < 10 << 20, "{wanted:?}");
        for limit in [1, 2, 7, 100, u32::MAX] {
            assert_eq!(walk(dir.path(), limit, || {}), wanted, "steps of {limit}");
        }
        assert!(Walk::new(&dir.path().join("gone")).is_err());
        assert!(Walk::new(&dir.path().join("outside")).is_err(), "a link is not followed");
    }

    #[test]
    fn wide_and_deep() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..NOTED * 3 {
            fs::create_dir(dir.path().join(format!("d{n}"))).unwrap();
        }
        let mut deep = dir.path().join("d1");
        for n in 0..DEEP * 3 {
            fs::create_dir_all(deep.join("beside/more")).unwrap();
            fs::write(deep.join("file"), [n as u8; 10]).unwrap();
            deep.push("x");
            fs::create_dir(&deep).unwrap();
        }
        let wanted = du(dir.path());
        for limit in [1, 5, u32::MAX] {
            assert_eq!(walk(dir.path(), limit, || {}), wanted, "steps of {limit}");
        }
    }

    #[test]
    fn names_beyond_memory_count_for_their_share() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), [1; 9000]).unwrap();
        for n in 0..4 {
            fs::hard_link(dir.path().join("a"), dir.path().join(format!("b{n}"))).unwrap();
        }
        let mut full = Walk::new(dir.path()).unwrap();
        full.linked = (0..LINKED as u64).map(|n| u64::MAX - n).collect();
        assert!(matches!(full.step(1000).unwrap(), Step::Done(_)));
        assert_eq!(full.size(), du(dir.path()));
        assert_eq!(full.linked.len(), LINKED);
    }

    #[test]
    fn what_vanishes_is_not_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        tree(&root);
        let mut n = 0;
        walk(&root, 3, || {
            let _ = fs::remove_dir_all(root.join(format!("{}", n % 9)));
            n += 1;
        });
        tree(&root.join("again"));
        let mut moved = false;
        let size = walk(&root, 3, || {
            if !moved {
                moved = fs::rename(&root, dir.path().join("elsewhere")).is_ok();
            }
        });
        assert!(moved && size.inodes > 50, "{size:?}");
        assert!(fs::remove_dir_all(dir.path().join("elsewhere")).is_ok());
    }

    #[test]
    fn a_directory_moved_away_ends_the_way_back() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a").join("b").join("c");
        fs::create_dir_all(&deep).unwrap();
        for n in 0..50 {
            fs::write(deep.join(n.to_string()), "x").unwrap();
        }
        let mut walk = Walk::new(dir.path()).unwrap();
        assert_eq!(walk.step(20).unwrap(), Step::More(20));
        walk.rest();
        fs::rename(&deep, dir.path().join("c")).unwrap();
        assert!(matches!(walk.step(1000).unwrap(), Step::Done(_)));
        assert!(walk.size().inodes >= 50, "{:?}", walk.size());
    }
}
