//! Maps of user and group ids, and mounts on which files appear with other owners (mount_setattr(2), MOUNT_ATTR_IDMAP).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};

/// One line of /proc/PID/uid_map: `length` ids from `container` on are those from `host` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IdMap {
    pub container: u32,
    pub host: u32,
    pub length: u32,
}

impl IdMap {
    /// The id outside; None: it is not mapped.
    pub fn to_host(&self, id: u32) -> Option<u32> {
        let offset = id.checked_sub(self.container).filter(|offset| *offset < self.length)?;
        self.host.checked_add(offset)
    }

    /// Whether both ranges stay below the last id, which the kernel keeps for "none".
    pub fn fits(&self) -> bool {
        self.length > 0 && [self.container, self.host].iter().all(|first| first.checked_add(self.length).is_some())
    }
}

/// The maps of a sandbox's user namespace: one range of each kind, from the container's id 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    pub uids: IdMap,
    pub gids: IdMap,
}

impl IdMaps {
    /// What the ids are on the host; an unmapped one stays as it is.
    pub fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        (self.uids.to_host(uid).unwrap_or(uid), self.gids.to_host(gid).unwrap_or(gid))
    }

    /// The container's root, on the host.
    pub fn root(&self) -> (u32, u32) {
        self.owner(0, 0)
    }
}

/// The text for /proc/PID/uid_map.
pub fn lines(maps: &[IdMap]) -> String {
    maps.iter().map(|map| format!("{} {} {}\n", map.container, map.host, map.length)).collect()
}

/// What becomes of mounts and unmounts of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Nothing comes or goes.
    Private,
    /// What the source gets, this gets too.
    FromSource,
}

/// A copy of the mount of `source` that is nowhere yet, on which the owners are those that `namespace` (an open user namespace) makes of
/// them. What is mounted below `source` comes along with `recursive`; where it cannot be mapped it keeps its owners. EINVAL: the file
/// system cannot do it.
pub fn detached(source: &Path, namespace: BorrowedFd<'_>, recursive: bool, readonly: bool, flow: Flow) -> Result<OwnedFd> {
    let what = || format!("map the owners of {}", source.display());
    let copy = |recursive: bool| {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        rustix::mount::open_tree(rustix::fs::CWD, source, flags).context(|| format!("copy the mount of {}", source.display()))
    };
    let tree = copy(recursive)?;
    // First of all, and for all: a copy that is shared would take its unmounts back to the source.
    let propagation = match flow {
        Flow::Private => MS_PRIVATE,
        Flow::FromSource => MS_SLAVE,
    };
    set(&tree, true, &Attributes { propagation, ..Attributes::default() }).context(what)?;
    let mut mapped = Attributes { set: MOUNT_ATTR_IDMAP, userns_fd: namespace.as_raw_fd() as u64, ..Attributes::default() };
    if readonly {
        mapped.set |= MOUNT_ATTR_RDONLY;
    }
    match set(&tree, recursive, &mapped) {
        // All or nothing: one of those below cannot be mapped, but perhaps the one that was asked for can.
        Err(nix::errno::Errno::EINVAL) if recursive => set(&tree, false, &mapped).context(what)?,
        other => other.context(what)?,
    }
    Ok(tree)
}

/// Puts a detached mount on `target`.
pub fn attach(mount: impl AsFd, target: &Path) -> Result<()> {
    rustix::mount::move_mount(mount.as_fd(), "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context(|| format!("mount on {}", target.display()))
}

/// struct mount_attr of <linux/mount.h>, its first version.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Of <linux/mount.h>.
const MS_PRIVATE: u64 = 1 << 18;
const MS_SLAVE: u64 = 1 << 19;
const MOUNT_ATTR_RDONLY: u64 = 0x0000_0001;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

fn set(mount: &OwnedFd, recursive: bool, attributes: &Attributes) -> nix::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: an open descriptor, an empty path that ends, and a structure of the size that is told; the kernel reads them only.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes as *const Attributes,
            std::mem::size_of::<Attributes>(),
        )
    };
    nix::errno::Errno::result(r).map(drop)
}

/// Of <linux/fcntl.h>.
const AT_RECURSIVE: libc::c_int = 0x8000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_shifted() {
        let map = IdMap { container: 0, host: 100_000, length: 65536 };
        assert_eq!((map.to_host(0), map.to_host(65535), map.to_host(65536)), (Some(100_000), Some(165_535), None));
        let high = IdMap { container: 5, host: 10, length: 2 };
        assert_eq!((high.to_host(4), high.to_host(6), high.to_host(7)), (None, Some(11), None));
        let maps = IdMaps { uids: map, gids: IdMap { host: 200_000, ..map } };
        assert_eq!((maps.root(), maps.owner(70_000, 1)), ((100_000, 200_000), (70_000, 200_001)));
        assert_eq!(lines(&[map, high]), "0 100000 65536\n5 10 2\n");
    }

    #[test]
    fn ranges_end_before_the_last_id() {
        let map = |container, host, length| IdMap { container, host, length };
        assert!(map(0, 0, u32::MAX).fits() && map(0, u32::MAX - 1, 1).fits());
        for bad in [map(0, 0, 0), map(0, 1, u32::MAX), map(1, 0, u32::MAX), map(0, u32::MAX, 1)] {
            assert!(!bad.fits(), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_fits_never_overflows(container: u32, host: u32, length: u32, id: u32) {
            let map = IdMap { container, host, length };
            if map.fits() {
                proptest::prop_assert_eq!(map.to_host(id).is_some(), id >= container && id - container < length);
            }
        }
    }
}
