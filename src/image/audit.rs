//! Whether an unpacked layer is still what its archive made: the archive is put together again from the tape and the files
//! and must have the layer's diff ID; every file must have the metadata its header says; nothing else may be there.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Stat};
use rustix::io::Errno;

use super::digest::Digest;
use super::layers::TAPE;
use super::tape::Replay;
use super::tarball::{Entry, Kind, Tarball};
use super::unpack::{self, AUFS_PREFIX, OPAQUE_NAME, WHITEOUT_PREFIX};
use crate::error::{Context, Result};
use crate::sys::cancel::Cancel;
use crate::sys::rooted::{self, Rooted};

/// A capability that nobody gave is more than damage.
const CAPABILITY: &[u8] = b"security.capability";

/// What is wrong with a layer, in words. A cancelled call and an unreadable disk are errors.
type Finding = std::result::Result<(), String>;

/// Verifies the layer in `place`, which has a tape. `told` gets the bytes of files read, now and then. None: all is well; else
/// the first thing that is not.
pub fn audit(place: &Path, diff_id: &Digest, cancel: &Cancel, told: &mut dyn FnMut(u64) -> Result<()>) -> Result<Option<String>> {
    let tape = place.join(TAPE);
    let replay = match Replay::open(&tape) {
        Ok(replay) => replay,
        Err(e) => return Ok(Some(format!("its tape cannot be read: {e}"))),
    };
    let root = match Rooted::open(&place.join("diff")) {
        Ok(root) => root,
        Err(e) => return Ok(Some(e.to_string())),
    };
    let mut audit = Audit { root, owner: rustix::process::geteuid().is_root(), known: HashSet::new(), dirs: BTreeMap::new() };
    let mut tar = Tarball::new(replay);
    let mut buffer = vec![0u8; 128 << 10];
    loop {
        cancel.check()?;
        let entry = match tar.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(e) => return Ok(Some(format!("its tape is damaged: {e}"))),
        };
        let name = String::from_utf8_lossy(&entry.path).into_owned();
        if let Err(why) = audit.entry(&entry, &mut tar) {
            return Ok(Some(format!("{name}: {why}")));
        }
        loop {
            cancel.check()?;
            match tar.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => told(n as u64)?,
                Err(e) => return Ok(Some(format!("{name}: {e}"))),
            }
        }
        if tar.source().differed() {
            return Ok(Some(format!("{name}: its content has changed")));
        }
    }
    let replay = match tar.into_drained() {
        Ok(replay) => replay,
        Err(e) => return Ok(Some(format!("its tape is damaged: {e}"))),
    };
    let found = replay.digest();
    if found != *diff_id {
        return Ok(Some(format!("tape and files are {found}, not {diff_id}")));
    }
    if let Err(why) = audit.directories() {
        return Ok(Some(why));
    }
    audit.strangers(&place.join("diff"), cancel)
}

struct Audit {
    root: Rooted,
    /// Only root could set owners.
    owner: bool,
    /// Inodes that entries made.
    known: HashSet<u64>,
    /// The last entry of each directory: it may be named twice.
    dirs: BTreeMap<PathBuf, Entry>,
}

fn split(path: &Path) -> (&Path, &OsStr) {
    (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default())
}

fn words(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn missing(e: Errno) -> String {
    match e {
        Errno::NOENT | Errno::NOTDIR => "it is missing".to_owned(),
        e => words(e),
    }
}

impl Audit {
    fn look(&self, path: &Path) -> std::result::Result<(OwnedFd, Stat), String> {
        let (above, name) = split(path);
        let parent = self.root.dir(above).map_err(missing)?;
        let name = if name.is_empty() { OsStr::new(".") } else { name };
        let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(missing)?;
        Ok((parent, stat))
    }

    /// Checks all but content and directories' metadata, and says where the content is.
    fn entry(&mut self, entry: &Entry, tar: &mut Tarball<Replay>) -> Finding {
        let path = rooted::normalise(&entry.path).map_err(words)?;
        let (above, name) = split(&path);
        let bytes = name.as_bytes();
        if bytes == OPAQUE_NAME {
            let dir = self.root.dir(above).map_err(missing)?;
            return opaque(&dir, Path::new(""));
        }
        if bytes.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = bytes.strip_prefix(WHITEOUT_PREFIX) {
            let (parent, stat) = self.look(&above.join(OsStr::from_bytes(hidden)))?;
            self.known.insert(stat.st_ino);
            // A file of the layer itself hides what is below as well.
            return if rooted::is_dir(&stat) { opaque(&parent, Path::new(OsStr::from_bytes(hidden))) } else { Ok(()) };
        }
        let (parent, stat) = self.look(&path)?;
        self.known.insert(stat.st_ino);
        let want = match entry.kind {
            Kind::Directory => {
                self.dirs.insert(path.clone(), entry.clone());
                FileType::Directory
            }
            Kind::Hardlink => {
                let target = rooted::normalise(&entry.link).map_err(words)?;
                let (_, other) = self.look(&target).map_err(|why| format!("{}, to which it is a link: {why}", target.display()))?;
                let same = (other.st_dev, other.st_ino) == (stat.st_dev, stat.st_ino);
                return if same { Ok(()) } else { Err(format!("no longer a link to {}", target.display())) };
            }
            Kind::File => FileType::RegularFile,
            Kind::Symlink => FileType::Symlink,
            Kind::Char => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
        };
        if FileType::from_raw_mode(stat.st_mode) != want {
            return Err("its kind has changed".to_owned());
        }
        match entry.kind {
            Kind::File => {
                if stat.st_size as u64 != entry.size {
                    return Err(format!("{} bytes, not {}", stat.st_size, entry.size));
                }
                if entry.stored > 0 {
                    let file = self.root.file(&path).map_err(words)?;
                    let whole = [(0, entry.size)];
                    tar.source().feed(file, entry.pieces.as_deref().unwrap_or(&whole));
                }
            }
            Kind::Symlink => {
                let target = rustix::fs::readlinkat(&parent, name, Vec::new()).map_err(words)?;
                if target.as_bytes() != entry.link {
                    return Err("it points elsewhere".to_owned());
                }
            }
            Kind::Char | Kind::Block if stat.st_rdev != rustix::fs::makedev(entry.device.0, entry.device.1) => {
                return Err("another device".to_owned());
            }
            _ => {}
        }
        if entry.kind == Kind::Directory {
            return Ok(());
        }
        self.metadata(&parent, Path::new(name), entry, &stat)
    }

    fn directories(&self) -> Finding {
        for (path, entry) in &self.dirs {
            let check = || {
                let (parent, stat) = self.look(path)?;
                let (_, name) = split(path);
                self.metadata(&parent, Path::new(name), entry, &stat)
            };
            check().map_err(|why| format!("{}: {why}", if path.as_os_str().is_empty() { Path::new("/") } else { path }.display()))?;
        }
        Ok(())
    }

    fn metadata(&self, parent: &OwnedFd, name: &Path, entry: &Entry, stat: &Stat) -> Finding {
        if entry.kind != Kind::Symlink && stat.st_mode & 0o7777 != entry.mode {
            return Err(format!("mode {:o}, not {:o}", stat.st_mode & 0o7777, entry.mode));
        }
        if self.owner && (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
            return Err(format!("owner {}:{}, not {}:{}", stat.st_uid, stat.st_gid, entry.uid, entry.gid));
        }
        if (stat.st_mtime, stat.st_mtime_nsec as u32) != entry.mtime {
            return Err("its time has changed".to_owned());
        }
        let found = rooted::xattrs(&rooted::proc_path(parent.as_fd(), name)).map_err(words)?;
        let value = |key: &[u8]| found.iter().find(|(k, _)| k.as_bytes() == key).map(|(_, v)| v.as_slice());
        for (key, want) in entry.xattrs.iter().filter(|(key, _)| unpack::allowed(key)) {
            match value(key) {
                Some(found) if found == want => {}
                // What the file system or the kind of file does not take was left out when it was unpacked.
                None if !key.starts_with(CAPABILITY) => {}
                _ => return Err(format!("attribute {} has changed", String::from_utf8_lossy(key))),
            }
        }
        if value(CAPABILITY).is_some() && !entry.xattrs.iter().any(|(key, _)| key == CAPABILITY) {
            return Err("a capability that the image does not give".to_owned());
        }
        Ok(())
    }

    /// The first file that no entry made. Directories may be implicit.
    fn strangers(&self, dir: &Path, cancel: &Cancel) -> Result<Option<String>> {
        let mut todo = vec![dir.to_owned()];
        while let Some(at) = todo.pop() {
            cancel.check()?;
            let what = || format!("list {}", at.display());
            for entry in std::fs::read_dir(&at).context(what)? {
                let entry = entry.context(what)?;
                let meta = entry.metadata().context(what)?;
                if meta.is_dir() {
                    todo.push(entry.path());
                } else if !self.known.contains(&std::os::unix::fs::MetadataExt::ino(&meta)) {
                    let path = entry.path();
                    return Ok(Some(format!("{}: not of this layer", path.strip_prefix(dir).unwrap_or(&path).display())));
                }
            }
        }
        Ok(None)
    }
}

fn opaque(parent: &OwnedFd, name: &Path) -> Finding {
    if rooted::is_opaque(&rooted::proc_path(parent.as_fd(), name)) {
        Ok(())
    } else {
        Err("the directory is no longer opaque".to_owned())
    }
}
