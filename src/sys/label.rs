//! Security labels of files (the extended attribute of SELinux).

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags, XattrFlags, CWD};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Where SELinux keeps the label of a file.
pub const SELINUX: &str = "security.selinux";
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Gives `path` and everything below it this label, following no link: neither one in the tree nor `path` itself. Files that have it
/// already are left alone; a filesystem that cannot hold labels is fine, as is a file that goes away meanwhile.
pub fn set_tree(path: &Path, attribute: &str, label: &str) -> Result<()> {
    if !set(path, attribute, label)? {
        return Ok(());
    }
    match rustix::fs::openat(CWD, path, DIRECTORY, Mode::empty()) {
        Ok(dir) => below(dir, path, attribute, label),
        // A file, or a link.
        Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => Ok(()),
        Err(e) => Err(e).context(|| format!("label {}", path.display())),
    }
}

/// The label of the file itself; None: it has none, or cannot be asked.
pub fn get(path: &Path, attribute: &str) -> Option<String> {
    let mut value = [0u8; 512];
    let n = rustix::fs::lgetxattr(path, attribute, &mut value).ok()?;
    Some(String::from_utf8_lossy(old_label(&value[..n])).into_owned())
}

/// Gives the file itself a label. False when its filesystem cannot hold one.
pub fn set(path: &Path, attribute: &str, label: &str) -> Result<bool> {
    // With the NUL that libselinux writes; reading compares without.
    let (mut old, bytes) = ([0u8; 512], [label.as_bytes(), b"\0"].concat());
    match rustix::fs::lgetxattr(path, attribute, &mut old) {
        Ok(n) if old_label(&old[..n]) == label.as_bytes() => return Ok(true),
        Err(Errno::NOTSUP) => return Ok(false),
        _ => {}
    }
    match rustix::fs::lsetxattr(path, attribute, &bytes, XattrFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTSUP) => Ok(false),
        Err(e) => Err(e).context(|| format!("label {} {label}", path.display())),
    }
}

/// The same for an open file.
pub fn set_open(file: BorrowedFd<'_>, attribute: &str, label: &str) -> Result<bool> {
    match rustix::fs::fsetxattr(file, attribute, label.as_bytes(), XattrFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOTSUP) => Ok(false),
        Err(e) => Err(e).context(|| format!("set the label {label}")),
    }
}

fn old_label(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\0").unwrap_or(bytes)
}

/// A directory on the way down.
struct Level {
    /// To know it again when we come back.
    id: (u64, u64),
    subdirs: Vec<CString>,
}

/// What is below an open directory, however deep, by way of two descriptors: what is put in its place meanwhile is not entered.
fn below(top: OwnedFd, path: &Path, attribute: &str, label: &str) -> Result<()> {
    // Errors speak of the path that people know.
    let mut path = path.to_owned();
    let what = |path: &Path| format!("label {}", path.display());
    let mut levels = vec![enter(&top, attribute, label).context(|| what(&path))?];
    let mut current = top;
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.subdirs.pop() {
            match rustix::fs::openat(&current, &name, DIRECTORY, Mode::empty()) {
                Ok(child) => {
                    path.push(path_of(&name));
                    levels.push(enter(&child, attribute, label).context(|| what(&path))?);
                    current = child;
                }
                Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => {}
                Err(e) => return Err(e).context(|| what(&path)),
            }
            continue;
        }
        levels.pop();
        let Some(above) = levels.last() else { break };
        let parent = rustix::fs::openat(&current, "..", DIRECTORY, Mode::empty()).context(|| what(&path))?;
        if id(&parent)? != above.id {
            return Err(Error::internal(format!("{}: it was moved meanwhile", what(&path))));
        }
        path.pop();
        current = parent;
    }
    Ok(())
}

/// Labels the entries of a directory; those that may be directories are still to be entered.
fn enter(dir: &OwnedFd, attribute: &str, label: &str) -> Result<Level> {
    let base = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let mut subdirs = Vec::new();
    for entry in Dir::read_from(dir).context(|| "list it")? {
        let entry = entry.context(|| "list it")?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let labelled = set(&base.join(path_of(name)), attribute, label)?;
        if labelled && matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
            subdirs.push(name.to_owned());
        }
    }
    Ok(Level { id: id(dir)?, subdirs })
}

fn id(dir: &OwnedFd) -> Result<(u64, u64)> {
    let stat = rustix::fs::fstat(dir).context(|| "look at a directory")?;
    Ok((stat.st_dev, stat.st_ino))
}

fn path_of(name: &CStr) -> &Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Any filesystem with attributes takes it of root, whether or not the kernel runs SELinux.
    const ATTRIBUTE: &str = SELINUX;
    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";

    fn label_of(path: &Path) -> Option<String> {
        get(path, ATTRIBUTE)
    }

    #[test]
    fn everything_below_and_nothing_behind_links() {
        let (tree, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(tree.path().join("a/b")).unwrap();
        for file in [tree.path().join("a/b/file"), outside.path().join("file")] {
            std::fs::write(file, "").unwrap();
        }
        symlink(outside.path(), tree.path().join("a/dir")).unwrap();
        symlink(outside.path().join("file"), tree.path().join("a/link")).unwrap();
        set_tree(tree.path(), ATTRIBUTE, LABEL).unwrap();
        for path in ["", "a", "a/b", "a/b/file", "a/dir", "a/link"] {
            assert_eq!(label_of(&tree.path().join(path)).as_deref(), Some(LABEL), "{path}");
        }
        assert_eq!((label_of(outside.path()), label_of(&outside.path().join("file"))), (None, None));
        // A link itself is no way in either, and another label replaces the first.
        let link = outside.path().join("way in");
        symlink(tree.path(), &link).unwrap();
        set_tree(&link, ATTRIBUTE, "u:r:t:s0").unwrap();
        assert_eq!((label_of(&link).as_deref(), label_of(tree.path()).as_deref()), (Some("u:r:t:s0"), Some(LABEL)));
        set_tree(tree.path(), ATTRIBUTE, "u:r:t:s0").unwrap();
        assert_eq!(label_of(&tree.path().join("a/b/file")).as_deref(), Some("u:r:t:s0"));
    }

    #[test]
    fn files_that_cannot_or_are_not_there() {
        set_tree(Path::new("/proc/self"), ATTRIBUTE, LABEL).unwrap();
        let dir = tempfile::tempdir().unwrap();
        set_tree(&dir.path().join("gone"), ATTRIBUTE, LABEL).unwrap();
        // A container may have nested directories as far as its disk goes; each is wide enough to be come back to.
        let mut deep = dir.path().to_owned();
        for _ in 0..600 {
            deep.push("d");
            std::fs::create_dir_all(deep.join("e")).unwrap();
        }
        std::fs::write(deep.join("e/file"), "").unwrap();
        set_tree(dir.path(), ATTRIBUTE, LABEL).unwrap();
        for path in [deep.join("e/file"), deep, dir.path().join("d/e"), dir.path().join("d/d/d/e")] {
            assert_eq!(label_of(&path).as_deref(), Some(LABEL), "{}", path.display());
        }
    }
}
