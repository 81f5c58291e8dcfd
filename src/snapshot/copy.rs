//! Snapshots as copies: every layer is copied over the one below, whiteouts applied on the way.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use crate::error::{Context, Result};
use crate::sys::mount;
use crate::sys::rooted::{self, Rooted};

const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub fn prepare(fs: &Path, layers: &[PathBuf], target: &Path) -> Result<()> {
    for layer in layers.iter().rev() {
        let open = |path: &Path| rustix::fs::open(path, DIR, Mode::empty()).context(|| format!("open {}", path.display()));
        let mut merge = Merge { links: HashMap::new(), root: Rooted::open(fs)?, path: PathBuf::new() };
        merge.dir(&open(layer)?, &open(fs)?).context(|| format!("copy {} at {}", layer.display(), merge.path.display()))?;
    }
    mount::bind(fs, target, false)
}

/// One layer on its way into the tree.
struct Merge {
    /// Where the first name of a file with several went.
    links: HashMap<u64, PathBuf>,
    root: Rooted,
    /// The directory being copied.
    path: PathBuf,
}

impl Merge {
    fn dir(&mut self, from: &OwnedFd, to: &OwnedFd) -> Result<()> {
        if rooted::is_opaque(&rooted::proc_path(from.as_fd(), Path::new(""))) {
            for name in names(to)? {
                remove(to, &name)?;
            }
        }
        for name in names(from)? {
            self.path.push(&name);
            self.entry(from, to, Path::new(&name))?;
            self.path.pop();
        }
        // Last: every file made in it changed its times.
        rooted::copy_dir_metadata(from, to, Path::new(""))
    }

    fn entry(&mut self, from: &OwnedFd, to: &OwnedFd, name: &Path) -> Result<()> {
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).context(|| "look at the source")?;
        if rooted::is_whiteout(&stat) {
            return remove(to, name.as_os_str());
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
            return self.dir(&open(from)?, &open(to)?);
        }
        remove(to, name.as_os_str())?;
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                let above = self.root.dir(first.parent().unwrap_or(Path::new(""))).context(|| "open directory")?;
                return rustix::fs::linkat(above, first.file_name().unwrap_or_default(), to, name, AtFlags::empty()).context(|| "link");
            }
            self.links.insert(stat.st_ino, self.path.clone());
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
        describe(from, to, name, &stat)
    }
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
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => std::fs::remove_dir_all(rooted::proc_path(dir.as_fd(), Path::new(name))).context(|| "remove directory"),
        Err(e) => Err(e).context(|| "remove"),
    }
}
