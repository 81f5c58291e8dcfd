//! Project quotas: the kernel keeps the sum of bytes and inodes of a directory tree, for file systems that were made and
//! mounted with them (ext4: `-O project,quota`, `-o prjquota`; XFS: `-o pquota`). quotactl(2), ioctl_fsxattr of <linux/fs.h>.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::error::{Code, Context, Error, Result};
use crate::sys::file;

/// Our numbers begin here: "cr" and then 65536 of our own before we take others'.
const FIRST: u32 = 0x6372_0000;
const LAST: u32 = 0x6372_ffff;
/// FS_XFLAG_PROJINHERIT: what is made in the directory belongs to its project.
const INHERIT: u32 = 0x200;
/// Q_GETQUOTA of PRJQUOTA.
const GET_PROJECT: libc::c_int = (0x80_0007 << 8) | 2;

/// struct fsxattr.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// struct if_dqblk; spaces in bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Block {
    hard_blocks: u64,
    soft_blocks: u64,
    space: u64,
    hard_inodes: u64,
    soft_inodes: u64,
    inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
}

nix::ioctl_read!(get_attributes, b'X', 31, Attributes);
nix::ioctl_write_ptr!(set_attributes, b'X', 32, Attributes);

/// The projects of one file system.
#[derive(Debug)]
pub struct Projects {
    /// A directory on it.
    dir: OwnedFd,
    next: AtomicU32,
}

impl Projects {
    /// Tries it out in `dir`; an error says what this file system or kernel lacks. Numbers that directories in `dir` have
    /// are not given again.
    pub fn detect(dir: &Path) -> Result<Projects> {
        let mut next = FIRST;
        for entry in std::fs::read_dir(dir).context(|| format!("list {}", dir.display()))?.flatten() {
            if let Ok(Some(project)) = project_of(&entry.path()) {
                next = next.max(project + 1);
            }
        }
        let projects = Projects { dir: open(dir)?, next: AtomicU32::new(next) };
        let probe = dir.join(format!(".quota-{}", std::process::id()));
        file::remove_tree(&probe)?;
        file::make_dir(&probe, 0o700)?;
        let tried = projects.probe(&probe);
        file::remove_tree(&probe)?;
        tried.context(|| format!("try project quotas in {}", dir.display())).map(|()| projects)
    }

    fn probe(&self, dir: &Path) -> Result<()> {
        const SIZE: usize = 64 << 10;
        let project = self.assign(dir)?;
        let path = dir.join("file");
        std::fs::write(&path, vec![1; SIZE]).context(|| format!("write {}", path.display()))?;
        // Space is taken when it is written back.
        std::fs::File::open(&path).and_then(|f| f.sync_all()).context(|| format!("sync {}", path.display()))?;
        match self.usage(project)? {
            (bytes, inodes) if bytes >= SIZE as u64 && inodes >= 2 => Ok(()),
            (bytes, inodes) => Err(Error::precondition(format!("{SIZE} bytes were counted as {bytes} in {inodes} inodes"))),
        }
    }

    /// Makes `dir`, which must be empty, the root of a project of its own.
    pub fn assign(&self, dir: &Path) -> Result<u32> {
        let what = || format!("give {} a project", dir.display());
        let taken = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n <= LAST).then_some(n + 1));
        let Ok(project) = taken else { return Err(Error::new(Code::ResourceExhausted, format!("{}: all numbers are taken", what()))) };
        let fd = open(dir)?;
        let mut attributes = attributes(&fd).context(what)?;
        attributes.flags |= INHERIT;
        attributes.project = project;
        // SAFETY: the descriptor is open and the struct is what the kernel reads for this request.
        unsafe { set_attributes(fd.as_raw_fd(), &attributes) }.context(what)?;
        Ok(project)
    }

    /// Bytes and inodes of a project now.
    pub fn usage(&self, project: u32) -> Result<(u64, u64)> {
        let mut block = Block::default();
        // SAFETY: the descriptor is open, and the kernel writes one struct if_dqblk, which `block` is.
        let done = unsafe { libc::syscall(libc::SYS_quotactl_fd, self.dir.as_raw_fd(), GET_PROJECT, project, &mut block as *mut Block) };
        if done != 0 {
            return Err(std::io::Error::last_os_error()).context(|| format!("ask for the quota of project {project}"));
        }
        Ok((block.space, block.inodes))
    }
}

/// The project of ours that a directory belongs to.
pub fn project_of(dir: &Path) -> Result<Option<u32>> {
    let project = attributes(open(dir)?).context(|| format!("ask for the project of {}", dir.display()))?.project;
    Ok((FIRST..=LAST).contains(&project).then_some(project))
}

fn attributes(fd: impl AsFd) -> Result<Attributes> {
    let mut found = Attributes::default();
    // SAFETY: the descriptor is open and the kernel writes one struct fsxattr.
    unsafe { get_attributes(fd.as_fd().as_raw_fd(), &mut found) }.context(|| "read the file attributes")?;
    Ok(found)
}

fn open(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty()).context(|| format!("open {}", PathBuf::from(dir).display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_are_the_kernels() {
        assert_eq!((std::mem::size_of::<Attributes>(), std::mem::size_of::<Block>()), (28, 72));
    }

    #[test]
    fn a_file_system_without_projects_is_refused_and_left_clean() {
        // tmpfs has none on any kernel.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        assert!(Projects::detect(dir.path()).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(!matches!(project_of(dir.path()), Ok(Some(_))));
    }
}
