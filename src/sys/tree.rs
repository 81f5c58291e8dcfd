//! Removing directory trees that a stranger may have made. However deep they are, it takes two descriptors and no stack: a
//! container can nest directories as far as its disk goes, and recursion would end the whole process.

use std::ffi::{CStr, CString, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// Neither over a link nor into another mount: what is mounted below is somebody else's.
const BELOW: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_XDEV);
/// Subdirectories noted at once of one directory, down to this level; further down one at a time, so that the notes stay small.
const NOTED: usize = 64;
const DEEP: usize = 32;
/// Bytes of directory entries read at once.
const BUFFER: usize = 8192;

/// A directory on the way down.
struct Level {
    /// Its name in the one above.
    name: CString,
    /// To know it again when we come back.
    id: (u64, u64),
    subdirs: Vec<CString>,
}

/// Removes what `path` names and all below it; a link is removed itself. False when it was not there. A mount point below is an
/// error, and what is mounted there stays.
pub fn remove(path: &Path) -> Result<bool> {
    let what = || format!("remove tree {}", path.display());
    let (above, Some(name)) = (path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")), path.file_name()) else {
        return Err(Error::internal(format!("{}: it has no name", what())));
    };
    match rustix::fs::open(above, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(above) => remove_at(above.as_fd(), name).context(what),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(e) => Err(e).context(what),
    }
}

/// The same for an entry of an open directory.
pub fn remove_at(above: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
    let stat = match rustix::fs::statat(above, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(e).context(|| "look at it"),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return gone(rustix::fs::unlinkat(above, name, AtFlags::empty())).context(|| "remove");
    }
    let top = match rustix::fs::openat2(above, name, DIRECTORY, Mode::empty(), BELOW) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(e).context(|| format!("open {}", name.to_string_lossy())),
    };
    empty(top)?;
    gone(rustix::fs::unlinkat(above, name, AtFlags::REMOVEDIR)).context(|| "remove directory")
}

/// Removes everything in a directory.
fn empty(top: OwnedFd) -> Result<()> {
    let stat = rustix::fs::fstat(&top).context(|| "look at a directory")?;
    let mut current = top;
    let mut levels = vec![Level { name: CString::default(), id: id(&stat), subdirs: Vec::new() }];
    loop {
        let limit = if levels.len() > DEEP { 1 } else { NOTED };
        let Some(level) = levels.last_mut() else { break };
        if level.subdirs.is_empty() {
            level.subdirs = clear(current.as_fd(), limit)?;
        }
        if let Some(name) = level.subdirs.pop() {
            let open = || rustix::fs::openat2(&current, &name, DIRECTORY, Mode::empty(), BELOW);
            let child = match again(open) {
                Ok(child) => child,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(e).context(|| format!("open directory {}", name.to_string_lossy())),
            };
            let stat = rustix::fs::fstat(&child).context(|| "look at a directory")?;
            levels.push(Level { name, id: id(&stat), subdirs: Vec::new() });
            current = child;
            continue;
        }
        // Nothing is left in it.
        let Some(done) = levels.pop() else { break };
        let Some(above) = levels.last() else { break };
        let parent = rustix::fs::openat(&current, "..", DIRECTORY, Mode::empty()).context(|| "open the directory above")?;
        if id(&rustix::fs::fstat(&parent).context(|| "look at a directory")?) != above.id {
            return Err(Error::internal(format!("directory {} was moved meanwhile", done.name.to_string_lossy())));
        }
        let removed = rustix::fs::unlinkat(&parent, &done.name, AtFlags::REMOVEDIR);
        gone(removed).context(|| format!("remove directory {}", done.name.to_string_lossy()))?;
        current = parent;
    }
    Ok(())
}

/// Removes the files of a directory up to the `limit`th subdirectory; the names of those it met. None: it is empty.
fn clear(dir: BorrowedFd<'_>, limit: usize) -> Result<Vec<CString>> {
    let what = |name: &CStr| format!("remove {}", name.to_string_lossy());
    let mut subdirs = Vec::new();
    rustix::fs::seek(dir, SeekFrom::Start(0)).context(|| "list a directory")?;
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut entries = RawDir::new(dir, &mut buffer);
    while subdirs.len() < limit {
        let entry = match entries.next() {
            None => break,
            Some(Ok(entry)) => entry,
            Some(Err(Errno::INTR)) => continue,
            Some(Err(e)) => return Err(e).context(|| "list a directory"),
        };
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        // Not every file system says what it is.
        match entry.file_type() {
            FileType::Directory => subdirs.push(name.to_owned()),
            kind => match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                Err(Errno::ISDIR | Errno::PERM) if kind == FileType::Unknown => subdirs.push(name.to_owned()),
                removed => drop(gone(removed).context(|| what(name))?),
            },
        }
    }
    Ok(subdirs)
}

/// openat2 is documented to be tried again after a rename somewhere on the machine.
fn again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::AGAIN | Errno::INTR) => continue,
            other => return other,
        }
    }
}

/// Whether it was there to be removed.
fn gone(removed: rustix::io::Result<()>) -> rustix::io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn id(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_links_and_what_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(path("kept/sub")).unwrap();
        std::fs::write(path("kept/file"), "").unwrap();
        std::fs::create_dir_all(path("tree/a/b")).unwrap();
        for n in 0..3 * NOTED {
            std::fs::create_dir_all(path(&format!("tree/wide/{n}/x"))).unwrap();
            std::fs::write(path(&format!("tree/wide/{n}/x/file")), "").unwrap();
        }
        symlink(path("kept"), path("tree/out")).unwrap();
        symlink("tree", path("link")).unwrap();
        nix::unistd::mkfifo(&path("tree/a/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(remove(&path("link")).unwrap());
        assert!(path("tree/a/b").exists(), "a link is removed, not followed");
        assert!(remove(&path("tree")).unwrap());
        assert!(!remove(&path("tree")).unwrap() && !remove(&path("none/x")).unwrap());
        assert!(path("kept/sub").exists() && path("kept/file").exists());
        assert!(remove(&path("kept/file")).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(remove(Path::new("/")).is_err());
    }

    /// Deeper than descriptors, paths and stacks go.
    #[test]
    fn any_depth() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("deep");
        std::fs::create_dir(&root).unwrap();
        let mut at = rustix::fs::open(&root, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..20_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, "d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        let removed = std::thread::Builder::new().stack_size(64 << 10).spawn(move || remove(&root)).unwrap();
        assert!(removed.join().unwrap().unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn mounts_below_stay() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (theirs, tree) = (dir.path().join("theirs"), dir.path().join("tree"));
        std::fs::create_dir_all(tree.join("a/mounted")).unwrap();
        std::fs::create_dir(&theirs).unwrap();
        std::fs::write(theirs.join("file"), "").unwrap();
        crate::sys::mount::bind(&theirs, &tree.join("a/mounted"), false).unwrap();
        let refused = remove(&tree);
        let top = remove(&tree.join("a/mounted"));
        crate::sys::mount::unmount(&tree.join("a/mounted")).unwrap();
        assert!(refused.unwrap_err().message().contains("mounted") && top.is_err());
        assert!(theirs.join("file").exists());
        assert!(remove(&tree).unwrap());
    }
}
