//! Mounts and the mount table (mount(2), mount_setattr(2), proc_pid_mountinfo(5)).

use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

use crate::error::{Context, Error, Result};

/// Mounts file or directory `source` on `target`.
pub fn bind(source: &Path, target: &Path, recursive: bool) -> Result<()> {
    let flags = if recursive { MsFlags::MS_BIND | MsFlags::MS_REC } else { MsFlags::MS_BIND };
    nix::mount::mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .context(|| format!("bind {} on {}", source.display(), target.display()))
}

/// Makes the mount at `target` private: what happens below does not spread.
pub fn make_private(target: &Path) -> Result<()> {
    nix::mount::mount(None::<&str>, target, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)
        .context(|| format!("make mount {} private", target.display()))
}

/// Makes the bind mount at `target` read-only; what is mounted below it is not touched.
pub fn make_readonly(target: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .context(|| format!("make mount {} read-only", target.display()))
}

/// Whether the kernel has mount_setattr(2): asked with a descriptor that is none.
#[cfg(feature = "engine")]
pub fn has_setattr() -> bool {
    // SAFETY: the call takes numbers, an empty path and a zeroed structure (struct mount_attr) that outlives it; it changes nothing,
    // because descriptor -1 is none.
    let result = unsafe {
        let attributes = [0u64; 4];
        libc::syscall(
            libc::SYS_mount_setattr,
            -1,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attributes.as_ptr(),
            std::mem::size_of_val(&attributes),
        )
    };
    result == 0 || Errno::last() != Errno::ENOSYS
}

/// Mounts a tmpfs of at most `size` bytes, whose root directory is `owner`'s (uid and gid).
pub fn tmpfs(target: &Path, size: u64, mode: u32, owner: (u32, u32)) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode={mode:o},size={size},uid={},gid={}", owner.0, owner.1);
    nix::mount::mount(Some("shm"), target, Some("tmpfs"), flags, Some(options.as_str()))
        .context(|| format!("mount tmpfs on {}", target.display()))
}

/// What to mount as an overlay. `lower` is ordered top layer first, as overlayfs wants it.
pub struct Overlay<'a> {
    pub lower: &'a [PathBuf],
    /// Without upper and work the mount is read-only.
    pub upper_work: Option<(&'a Path, &'a Path)>,
    /// `volatile`: no fsync of the upper, for throw-away views.
    pub volatile: bool,
    /// SELinux label of everything in it, whatever the layers' files have.
    pub label: Option<&'a str>,
}

/// Mounts an overlay through the new mount API, one option per call, so that the number of layers is not limited by the
/// page that mount(2) gives all options together.
pub fn overlay(overlay: &Overlay, target: &Path) -> Result<()> {
    let what = || format!("mount overlay on {}", target.display());
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context(what)?;
    let set = |key: &str, value: &Path| {
        let value = CString::new(value.as_os_str().as_bytes()).map_err(|_| Error::internal(format!("{}: NUL in a path", what())))?;
        rustix::mount::fsconfig_set_string(fs.as_fd(), key, value.as_c_str())
            .context(|| format!("{}: {key}={}{}", what(), value.to_string_lossy(), fs_log(fs.as_fd())))
    };
    if overlay.upper_work.is_none() && overlay.lower.len() == 1 {
        return Err(Error::internal(format!("{}: a read-only overlay needs two layers", what())));
    }
    // `lowerdir+` (Linux 6.7) takes one layer a call; older kernels want the colon list, which one string value carries up to 255 bytes.
    // They say so here, or, before 6.5, when the file system is made.
    for (i, layer) in overlay.lower.iter().enumerate() {
        match set("lowerdir+", layer) {
            Ok(()) => {}
            Err(_) if i == 0 => return overlay_by_options(overlay, target),
            Err(e) => return Err(e),
        }
    }
    if let Some((upper, work)) = overlay.upper_work {
        set("upperdir", upper)?;
        set("workdir", work)?;
    }
    if overlay.volatile {
        rustix::mount::fsconfig_set_flag(fs.as_fd(), "volatile").context(what)?;
    }
    if let Some(label) = overlay.label {
        set("context", Path::new(label))?;
    }
    match rustix::mount::fsconfig_create(fs.as_fd()) {
        Ok(()) => {}
        // Before 6.5 overlayfs looks at its options only now.
        Err(rustix::io::Errno::INVAL) => return overlay_by_options(overlay, target),
        Err(e) => return Err(e).context(|| format!("{}{}", what(), fs_log(fs.as_fd()))),
    }
    let mount = rustix::mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).context(what)?;
    rustix::mount::move_mount(mount.as_fd(), "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context(what)
}

/// mount(2) with the layers relative to their common parent, for kernels before 6.7. The working directory is a
/// property of the process, so this runs on a thread that has unshared it.
fn overlay_by_options(overlay: &Overlay, target: &Path) -> Result<()> {
    let target = target.to_owned();
    let base = parent_of_all(overlay.lower);
    let relative = |p: &Path| p.strip_prefix(&base).ok().filter(|r| !r.as_os_str().is_empty()).unwrap_or(p).to_owned();
    let lower: Vec<String> = overlay.lower.iter().map(|p| escape(&relative(p))).collect();
    let mut options = format!("lowerdir={}", lower.join(":"));
    if let Some((upper, work)) = overlay.upper_work {
        options.push_str(&format!(",upperdir={},workdir={}", escape(upper), escape(work)));
    }
    if overlay.volatile {
        options.push_str(",volatile");
    }
    if let Some(label) = overlay.label {
        // Quoted: categories are separated by commas too.
        options.push_str(&format!(",context=\"{label}\""));
    }
    if options.len() >= rustix::param::page_size() {
        return Err(Error::internal(format!(
            "mount overlay on {}: too many layers for this kernel ({} bytes of options)",
            target.display(),
            options.len()
        )));
    }
    super::thread::run_apart("overlay", move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).context(|| "unshare the working directory")?;
        nix::unistd::chdir(&base).context(|| format!("enter {}", base.display()))?;
        nix::mount::mount(Some("overlay"), &target, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .context(|| format!("mount overlay on {}", target.display()))
    })
}

/// overlayfs separates with `:` and `,` and escapes with a backslash.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
}

fn parent_of_all(paths: &[PathBuf]) -> PathBuf {
    let mut parent = paths.first().and_then(|p| p.parent()).map(Path::to_owned).unwrap_or_else(|| PathBuf::from("/"));
    while !paths.iter().all(|p| p.starts_with(&parent)) && parent.pop() {}
    parent
}

/// The kernel's own words about a failed mount, one message per read.
fn fs_log(fs: std::os::fd::BorrowedFd<'_>) -> String {
    let mut text = String::new();
    let mut buffer = [0u8; 512];
    while let Ok(n) = rustix::io::read(fs, &mut buffer) {
        if n == 0 {
            break;
        }
        text.push_str("; ");
        text.push_str(String::from_utf8_lossy(&buffer[..n]).trim());
    }
    text
}

/// Unmounts everything stacked on `target`. Not mounted or not there is fine. Detached (MNT_DETACH), so that a process
/// of a container that is still looking cannot keep it.
pub fn unmount(target: &Path) -> Result<()> {
    loop {
        match nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            Err(e) => return Err(e).context(|| format!("unmount {}", target.display())),
        }
    }
}

/// One line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    pub root: PathBuf,
    pub target: PathBuf,
    pub options: String,
    /// Optional fields: `shared:N`, `master:N`.
    pub tags: Vec<String>,
    pub fstype: String,
    pub source: String,
    pub super_options: String,
}

/// The mount table of this process.
pub fn table() -> Result<Vec<MountInfo>> {
    let text = std::fs::read("/proc/self/mountinfo").context(|| "read /proc/self/mountinfo")?;
    Ok(parse_table(&String::from_utf8_lossy(&text)))
}

/// The mounts of some filesystem types alone, read line by line: a host of many sandboxes has thousands of others, which a small
/// process must not hold in memory.
pub fn table_of(fstypes: &[&str]) -> Result<Vec<MountInfo>> {
    use std::io::BufRead;
    let what = || "read /proc/self/mountinfo";
    let mut reader = std::io::BufReader::with_capacity(4096, std::fs::File::open("/proc/self/mountinfo").context(what)?);
    let (mut found, mut line) = (Vec::new(), Vec::new());
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).context(what)? == 0 {
            return Ok(found);
        }
        // Most lines are overlays with long options: they are told apart before they are taken apart.
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line));
        let wanted = text.split_once(" - ").is_some_and(|(_, right)| fstypes.iter().any(|f| right.split(' ').next() == Some(*f)));
        found.extend(if wanted { parse_line(&text) } else { None });
    }
}

/// Mount points at or below `dir`, deepest first: the order to unmount in.
pub fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = table()?.into_iter().map(|m| m.target).filter(|t| t.starts_with(dir)).collect();
    found.reverse();
    Ok(found)
}

/// The mount that holds `path` (absolute, links resolved).
pub fn holding<'a>(table: &'a [MountInfo], path: &Path) -> Option<&'a MountInfo> {
    // The last of equals: later mounts cover earlier ones.
    table.iter().filter(|m| path.starts_with(&m.target)).max_by_key(|m| m.target.as_os_str().len())
}

/// The lines that are well formed.
pub(crate) fn parse_table(text: &str) -> Vec<MountInfo> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<MountInfo> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, target, options) = (left.next()?, left.next()?, left.next()?);
    let tags = left.filter(|t| !t.is_empty()).map(str::to_owned).collect();
    let mut right = right.splitn(3, ' ');
    Some(MountInfo {
        root: unescape(root).into(),
        target: unescape(target).into(),
        options: options.to_owned(),
        tags,
        fstype: right.next()?.to_owned(),
        source: unescape(right.next()?),
        super_options: right.next().unwrap_or_default().to_owned(),
    })
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let octal = bytes.get(i + 1..i + 4).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match (bytes[i], octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                i += 4;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let table = parse_table("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:1 master:2 - ext4 /dev/root rw,errors=continue\n1 2 0:4 / / rw - overlay overlay rw\nbroken\n");
        assert_eq!(table.len(), 2);
        assert_eq!(table[0].target, Path::new("/mnt 2"));
        assert_eq!(table[0].tags, ["shared:1", "master:2"]);
        assert_eq!((table[1].fstype.as_str(), table[1].tags.len()), ("overlay", 0));
        assert_eq!(holding(&table, Path::new("/mnt 2/a")).unwrap().fstype, "ext4");
        assert_eq!(holding(&table, Path::new("/mnt 23")).unwrap().fstype, "overlay");
    }

    #[test]
    fn one_type_of_the_table() {
        let all = table().unwrap();
        let proc: Vec<MountInfo> = all.into_iter().filter(|m| m.fstype == "proc").collect();
        assert!(!proc.is_empty());
        assert_eq!(table_of(&["proc"]).unwrap(), proc);
    }

    #[test]
    fn parent_of_layers() {
        let p = |s: &str| PathBuf::from(s);
        assert_eq!(parent_of_all(&[p("/a/l/1/diff"), p("/a/l/2/diff")]), p("/a/l"));
        assert_eq!(parent_of_all(&[p("/a/l/1/diff")]), p("/a/l/1"));
    }

    proptest::proptest! {
        #[test]
        fn mountinfo_never_panics(text in "\\PC*") {
            parse_table(&text);
        }
    }
}
