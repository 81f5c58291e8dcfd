//! Paths inside a foreign directory tree, such as the root filesystem of an image: links are resolved as if the tree were
//! the root, and never lead out of it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid};
use rustix::io::Errno;

use super::file;
use super::rooted::Rooted;
use crate::error::{Context, Error, Result};

/// As many links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// A directory that is "/" for the paths given to its methods.
pub struct Root {
    inside: Rooted,
    path: PathBuf,
    /// Of directories that are made; None: this process's.
    owner: Option<(Uid, Gid)>,
    /// What will be mounted over the tree, the latest last: where, and the directory that is seen there; None: nothing to look into.
    covers: Vec<(PathBuf, Option<Rooted>)>,
}

impl Root {
    pub fn open(path: &Path) -> Result<Root> {
        Ok(Root { inside: Rooted::open(path)?, path: path.to_path_buf(), owner: None, covers: Vec::new() })
    }

    /// Directories that are made belong to this user and group.
    pub fn owned_by(self, owner: Option<(u32, u32)>) -> Root {
        Root { owner: owner.map(|(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid))), ..self }
    }

    /// From now on `at`, a place as `resolve` gives it, shows the directory `source` of the host, whose links lead back to the root of the
    /// tree; None: something that cannot be looked at, below which paths are taken as written.
    pub fn cover(&mut self, at: PathBuf, source: Option<&Path>) -> Result<()> {
        let source = source.map(Rooted::open).transpose()?;
        self.covers.push((at, source));
        Ok(())
    }

    /// Whether a place, as `resolve` gives it, is where or below where something covers the tree.
    pub fn is_covered(&self, place: &Path) -> bool {
        self.cover_of(place).is_some()
    }

    fn cover_of(&self, place: &Path) -> Option<&(PathBuf, Option<Rooted>)> {
        self.covers.iter().rev().find(|(at, _)| place.starts_with(at))
    }

    /// Opens a directory of the tree; None when it is missing or out of sight.
    fn dir(&self, place: &Path) -> rustix::io::Result<Option<OwnedFd>> {
        let found = match self.cover_of(place) {
            None => self.inside.dir(place),
            Some((at, Some(source))) => source.dir(place.strip_prefix(at).unwrap_or(place)),
            Some((_, None)) => return Ok(None),
        };
        match found {
            Err(Errno::NOENT) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Reads a regular file of at most `limit` bytes, links followed inside the tree; None when there is no such file.
    /// Anything but a regular file is an error, and is not opened (a FIFO would block, a device may act).
    pub fn read(&self, path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
        let what = || format!("read {} in {}", path.display(), self.path.display());
        let found = match self.inside.find(path) {
            Ok(found) => found,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(error) => return Err(error).context(what),
        };
        let stat = rustix::fs::fstat(&found).context(what)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::internal(format!("{}: not a regular file", what())));
        }
        file::read(Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())), limit).context(what).map(Some)
    }

    /// Creates a directory and its missing parents with mode 0755, links followed inside the tree, dangling ones too.
    /// Returns where it is: absolute inside the tree, without links. Nobody else may change the tree meanwhile.
    pub fn make_dirs(&self, path: &Path) -> Result<PathBuf> {
        self.follow(path, true).context(|| format!("create directory {} in {}", path.display(), self.path.display()))
    }

    /// Where a path leads: absolute inside the tree, without links. What is missing is taken as written.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf> {
        self.follow(path, false).context(|| format!("resolve {} in {}", path.display(), self.path.display()))
    }

    /// Follows a path name by name; `make`: all of it must be a directory, and is made one.
    fn follow(&self, path: &Path, make: bool) -> rustix::io::Result<PathBuf> {
        let mut done = PathBuf::from("/");
        let mut ahead = parts(path);
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            if name == ".." {
                done.pop();
                continue;
            }
            // A mount point need not be in the tree yet.
            let next = done.join(&name);
            if self.cover_of(&next).is_some_and(|(at, _)| *at == next) {
                done = next;
                continue;
            }
            let Some(parent) = self.dir(&done)? else {
                done.push(name);
                continue;
            };
            let kind = match rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) if make => {
                    rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755))?;
                    if let Some((uid, gid)) = self.owner {
                        rustix::fs::chownat(&parent, &name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
                    }
                    FileType::Directory
                }
                // Something may be mounted below it all the same.
                Err(Errno::NOENT) => {
                    done.push(name);
                    continue;
                }
                Err(error) => return Err(error),
            };
            match kind {
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    let target = rustix::fs::readlinkat(&parent, &name, Vec::new())?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    if target.is_absolute() {
                        done = PathBuf::from("/");
                    }
                    parts(&target).into_iter().rev().for_each(|part| ahead.push_front(part));
                }
                FileType::Directory => done.push(&name),
                // A file can be the end of a path, but no step of it.
                _ if ahead.is_empty() && !make => done.push(&name),
                _ => return Err(Errno::NOTDIR),
            }
        }
        Ok(done)
    }
}

/// The names in a path and its "..".
fn parts(path: &Path) -> VecDeque<OsString> {
    let wanted = path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    wanted.map(|part| part.as_os_str().to_os_string()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(dir.path().join("secret"), "host").unwrap();
        (dir, root)
    }

    fn read(root: &Path, path: &str) -> Result<Option<Vec<u8>>> {
        Root::open(root).unwrap().read(Path::new(path), 8)
    }

    #[test]
    fn reads_inside_and_only_inside() {
        let (_dir, root) = tree();
        std::fs::write(root.join("etc/real"), "inside").unwrap();
        symlink("/etc/real", root.join("etc/passwd")).unwrap();
        symlink("../../../../secret", root.join("etc/out")).unwrap();
        symlink(_dir.path().join("secret"), root.join("etc/abs")).unwrap();
        assert_eq!(read(&root, "/etc/passwd").unwrap().unwrap(), b"inside");
        assert_eq!(read(&root, "etc/../../../etc/real").unwrap().unwrap(), b"inside");
        assert_eq!(read(&root, "/etc/out").unwrap(), None);
        assert_eq!(read(&root, "/etc/abs").unwrap(), None);
        assert_eq!(read(&root, "/none/x").unwrap(), None);
    }

    #[test]
    fn reads_regular_files_of_limited_size_alone() {
        let (_dir, root) = tree();
        std::fs::write(root.join("big"), "123456789").unwrap();
        nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        assert!(read(&root, "/big").unwrap_err().message().contains("more than 8 bytes"));
        assert!(read(&root, "/fifo").unwrap_err().message().contains("not a regular file"));
        assert!(read(&root, "/etc").unwrap_err().message().contains("not a regular file"));
        assert!(read(&root, "/loop").is_err());
    }

    #[test]
    fn makes_directories_through_links() {
        let (dir, root) = tree();
        symlink("/data/app", root.join("app")).unwrap();
        symlink("../../../outside", root.join("out")).unwrap();
        let tree = Root::open(&root).unwrap();
        assert_eq!(tree.make_dirs(Path::new("/app/x")).unwrap(), Path::new("/data/app/x"));
        assert!(root.join("data/app/x").is_dir());
        assert_eq!(tree.make_dirs(Path::new("out")).unwrap(), Path::new("/outside"));
        assert!(root.join("outside").is_dir() && !dir.path().join("outside").exists());
        assert_eq!(tree.make_dirs(Path::new("/")).unwrap(), Path::new("/"));
        assert_eq!(tree.make_dirs(Path::new("/etc")).unwrap(), Path::new("/etc"));
    }

    #[test]
    fn resolves_without_making() {
        let (_dir, root) = tree();
        symlink("/data/app", root.join("app")).unwrap();
        symlink("../../..", root.join("up")).unwrap();
        std::fs::write(root.join("etc/file"), "").unwrap();
        let tree = Root::open(&root).unwrap();
        for (path, found) in
            [("/app/x/../y", "/data/app/y"), ("/up/etc", "/etc"), ("etc/file", "/etc/file"), ("/", "/"), ("/none/../../b", "/b")]
        {
            assert_eq!(tree.resolve(Path::new(path)).unwrap(), Path::new(found), "{path}");
        }
        assert!(!root.join("data").exists());
        assert!(tree.resolve(Path::new("/etc/file/x")).is_err());
    }

    #[test]
    fn refuses_files_and_loops_on_the_way() {
        let (_dir, root) = tree();
        std::fs::write(root.join("file"), "").unwrap();
        symlink("b", root.join("a")).unwrap();
        symlink("a", root.join("b")).unwrap();
        let tree = Root::open(&root).unwrap();
        assert!(tree.make_dirs(Path::new("/file/x")).is_err());
        assert!(tree.make_dirs(Path::new("/a/x")).is_err());
    }
}
