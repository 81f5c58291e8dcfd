//! Security labels of files (the extended attribute of SELinux).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags, XattrFlags, CWD};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Where SELinux keeps the label of a file.
pub const SELINUX: &str = "security.selinux";
/// Each open directory on the way down is a descriptor.
const DEEPEST: usize = 256;

/// Gives `path` and everything below it this label, following no link: neither one in the tree nor `path` itself. Files that have it
/// already are left alone; a filesystem that cannot hold labels is fine, as is a file that goes away meanwhile.
pub fn set_tree(path: &Path, attribute: &str, label: &str) -> Result<()> {
    if !set(path, attribute, label)? {
        return Ok(());
    }
    match rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty()) {
        Ok(dir) => below(dir, path, attribute, label, 1),
        // A file, or a link.
        Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => Ok(()),
        Err(e) => Err(e).context(|| format!("label {}", path.display())),
    }
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

fn old_label(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\0").unwrap_or(bytes)
}

/// The entries of an open directory, by way of its descriptor: what is put in its place meanwhile is not entered.
fn below(dir: OwnedFd, shown: &Path, attribute: &str, label: &str, depth: usize) -> Result<()> {
    let what = || format!("label {}", shown.display());
    if depth > DEEPEST {
        return Err(Error::precondition(format!("{}: more than {DEEPEST} directories deep", what())));
    }
    let base = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    for entry in Dir::read_from(&dir).context(what)? {
        let entry = entry.context(what)?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let shown = shown.join(path_of(name));
        // Errors speak of the path that people know.
        if !set(&base.join(path_of(name)), attribute, label).context(|| format!("label {}", shown.display()))? {
            continue;
        }
        if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
            match rustix::fs::openat(&dir, name, flags, Mode::empty()) {
                Ok(inner) => below(inner, &shown, attribute, label, depth + 1)?,
                Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => {}
                Err(e) => return Err(e).context(|| format!("label {}", shown.display())),
            }
        }
    }
    Ok(())
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
        let mut buffer = [0u8; 256];
        let n = rustix::fs::lgetxattr(path, ATTRIBUTE, &mut buffer).ok()?;
        Some(String::from_utf8(old_label(&buffer[..n]).to_vec()).unwrap())
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
        let mut deep = dir.path().to_owned();
        for _ in 0..DEEPEST + 2 {
            deep.push("d");
        }
        std::fs::create_dir_all(&deep).unwrap();
        let error = set_tree(dir.path(), ATTRIBUTE, LABEL).unwrap_err();
        assert!(error.message().contains("directories deep"), "{error}");
    }
}
