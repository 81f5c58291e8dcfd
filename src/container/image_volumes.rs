//! Volumes that come from images: other images that a request mounts, and the paths that the container's own image declares.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use super::metadata::Metadata;
use super::targets::is_kernels;
use crate::api::runtime::{ImageSpec, Mount};
use crate::error::{Code, Context, Error, ErrorList, Result};
use crate::image::{Held, Images};
use crate::snapshot::{Attributes, Snapshotter};
use crate::spec::{process, Propagation, ResolvedMount};
use crate::sys::rooted::Rooted;
use crate::sys::{inroot, mount};

/// An image that a request mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Which of the request's mounts.
    pub mount: usize,
    /// The image's id.
    pub image_id: String,
    /// Chain IDs of its layers, lowest first.
    pub chain: Vec<String>,
}

/// What `spec` calls its image. INVALID_ARGUMENT naming `field` for one that names none.
pub(super) fn wanted<'a>(spec: Option<&'a ImageSpec>, field: &str) -> Result<&'a str> {
    let Some(wanted) = spec.filter(|i| !i.image.is_empty()) else { return Err(Error::invalid(format!("{field}.image is empty"))) };
    Ok(&wanted.image)
}

/// Finds the images of mounts that have been checked. One that is not here is kubelet's ImageVolumeMountFailed, not NOT_FOUND.
pub(super) fn find(mounts: &[Mount], images: &Images) -> Result<Vec<ImageVolume>> {
    let mut found = Vec::new();
    for (number, asked) in mounts.iter().enumerate().filter(|(_, m)| m.image.is_some()) {
        let name = wanted(asked.image.as_ref(), &format!("mount {}: image", asked.container_path))?;
        let image = images.require(name).map_err(|e| failed(&asked.container_path, e))?;
        found.push(ImageVolume { mount: number, image_id: image.id.clone(), chain: image.chain.clone() });
    }
    Ok(found)
}

/// kubelet knows this by code UNKNOWN and the word that the message starts with.
fn failed(container_path: &str, error: Error) -> Error {
    Error::new(Code::Unknown, format!("ImageVolumeMountFailed: mount {container_path}: {error}"))
}

/// Mounts each image read-only and sets what its mount of the request shows. `held` are the layers of each volume.
pub(super) fn mount_images(
    meta: &Metadata,
    held: &[Held],
    asked: &[Mount],
    resolved: &mut [ResolvedMount],
    snapshots: &Snapshotter,
    attributes: Attributes,
) -> Result<()> {
    for (volume, held) in meta.image_volumes.iter().zip(held) {
        let (asked, resolved) = (&asked[volume.mount], &mut resolved[volume.mount]);
        let target = meta.images_dir().join(volume.mount.to_string());
        let source = snapshots
            .view(&meta.id, volume.mount, &held.layers, &target, attributes)
            .and_then(|()| inside(&target, &asked.image_sub_path).context(|| format!("image_sub_path {}", asked.image_sub_path)));
        resolved.host_path = source.map_err(|e| failed(&asked.container_path, e))?;
    }
    Ok(())
}

/// A file or directory in a volume, links resolved as if the volume were the root. The volume is read-only, so what is found
/// stays what it is.
fn inside(volume: &Path, sub_path: &str) -> Result<PathBuf> {
    if sub_path.is_empty() {
        return Ok(volume.to_owned());
    }
    let found = Rooted::open(volume)?.find(Path::new(sub_path)).context(|| "find it in the image")?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found).context(|| "look at it")?.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        return Err(Error::internal("it is neither a file nor a directory"));
    }
    let link = format!("/proc/self/fd/{}", found.as_raw_fd());
    let place = std::fs::read_link(&link).context(|| format!("read {link}"))?;
    // Never otherwise, but the OCI runtime mounts it by name.
    match place.starts_with(volume) {
        true => Ok(place),
        false => Err(Error::internal(format!("it is {}, outside of the volume", place.display()))),
    }
}

/// Unmounts the images of a container, by what is there: its record may be lost.
pub(super) fn unmount_images(bundle: &Path) -> Result<()> {
    let dir = bundle.join(IMAGES);
    let what = || format!("list {}", dir.display());
    let entries = match std::fs::read_dir(&dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.context(what)?,
    };
    let mut errors = ErrorList::default();
    for entry in entries {
        errors.keep(mount::unmount(&entry.context(what)?.path()));
    }
    errors.finish()
}

/// In the bundle: where images are mounted.
pub(super) const IMAGES: &str = "images";

/// Makes a volume for each path that the image declares and the request does not mount: a directory with what the image has
/// there. A path that leads to the root or to the kernel's file systems gets none, with a warning.
pub(super) fn declared(
    id: &str,
    paths: &[String],
    rootfs: &Path,
    requested: &[ResolvedMount],
    snapshots: &Snapshotter,
    attributes: Attributes,
) -> Result<Vec<ResolvedMount>> {
    let mut volumes = Vec::new();
    if paths.is_empty() {
        return Ok(volumes);
    }
    let owner = attributes.owners.map(|owners| owners.maps.root());
    let (root, inside) = (inroot::Root::open(rootfs)?.owned_by(owner), Rooted::open(rootfs)?);
    let mut taken = HashSet::new();
    for mount in requested {
        // A mount point may be reached by a link of the image: the volume must not cover what was asked for.
        taken.insert(root.resolve(&mount.container_path).unwrap_or_else(|_| mount.container_path.clone()));
        taken.insert(mount.container_path.clone());
    }
    for (number, declared) in paths.iter().enumerate() {
        let what = || format!("volume {declared} of the image");
        let place = process::clean(Path::new(declared));
        if taken.contains(&place) || taken.contains(&root.resolve(&place).context(what)?) {
            continue;
        }
        let real = root.resolve(&place).context(what)?;
        if real == Path::new("/") || is_kernels(&real) {
            log::warn!("container {id}: {} is left out: {} is no place for a volume", what(), real.display());
            continue;
        }
        let container_path = root.make_dirs(&real).context(what)?;
        let from = inside.dir(&container_path).context(what)?;
        let host_path = snapshots.volume(id, number, from.as_fd(), attributes).context(what)?;
        taken.insert(container_path.clone());
        volumes.push(ResolvedMount { container_path, host_path, propagation: Propagation::Private, ..Default::default() });
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};

    use super::*;
    use crate::snapshot::Kind;

    fn place() -> (tempfile::TempDir, PathBuf, Snapshotter) {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir_all(rootfs.join("data/sub")).unwrap();
        let snapshots = Snapshotter::new(dir.path(), Kind::Copy).unwrap();
        (dir, rootfs, snapshots)
    }

    fn paths(list: &[&str]) -> Vec<String> {
        list.iter().map(|path| path.to_string()).collect()
    }

    #[test]
    fn declared_volumes_have_the_images_files() {
        let (_dir, rootfs, snapshots) = place();
        std::fs::write(rootfs.join("data/sub/file"), "text").unwrap();
        symlink("/etc/passwd", rootfs.join("data/link")).unwrap();
        std::fs::set_permissions(rootfs.join("data"), std::fs::Permissions::from_mode(0o2770)).unwrap();
        std::os::unix::fs::lchown(rootfs.join("data"), Some(7), Some(8)).unwrap();
        let made = declared("c1", &paths(&["/data", "/new/dir"]), &rootfs, &[], &snapshots, Attributes::default()).unwrap();
        let seen: Vec<_> = made.iter().map(|m| (m.container_path.to_str().unwrap(), m.readonly)).collect();
        assert_eq!(seen, [("/data", false), ("/new/dir", false)]);
        let data = made[0].host_path.symlink_metadata().unwrap();
        assert_eq!((data.mode() & 0o7777, data.uid(), data.gid()), (0o2770, 7, 8));
        assert_eq!(std::fs::read(made[0].host_path.join("sub/file")).unwrap(), b"text");
        assert_eq!(std::fs::read_link(made[0].host_path.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(made[1].host_path.symlink_metadata().unwrap().mode() & 0o7777, 0o755);
        assert!(rootfs.join("new/dir").is_dir());
    }

    #[test]
    fn links_lead_nowhere_but_inside() {
        let (dir, rootfs, snapshots) = place();
        std::fs::create_dir(dir.path().join("secret")).unwrap();
        std::fs::write(dir.path().join("secret/file"), "host").unwrap();
        symlink(dir.path().join("secret"), rootfs.join("absolute")).unwrap();
        symlink("../../../../../../..", rootfs.join("up")).unwrap();
        symlink("proc", rootfs.join("kernel")).unwrap();
        let declared_paths = paths(&["/absolute", "/up", "/kernel", "/proc/sys", "../../dev", "/"]);
        let made = declared("c1", &declared_paths, &rootfs, &[], &snapshots, Attributes::default()).unwrap();
        assert_eq!(made.len(), 1, "the root and the kernel's are left out: {made:?}");
        assert!(made[0].container_path.ends_with("secret") && !made[0].host_path.join("file").exists());
    }

    #[test]
    fn what_the_request_mounts_is_not_covered() {
        let (_dir, rootfs, snapshots) = place();
        std::fs::create_dir(rootfs.join("run")).unwrap();
        symlink("/run", rootfs.join("var")).unwrap();
        let requested = |path: &str| ResolvedMount { container_path: path.into(), host_path: "/srv".into(), ..Default::default() };
        let list = paths(&["/data/", "/run/x", "/other", "/var/y"]);
        let mounts = [requested("/data"), requested("/var/x"), requested("/run/y")];
        let made = declared("c1", &list, &rootfs, &mounts, &snapshots, Attributes::default()).unwrap();
        assert_eq!(made.iter().map(|m| m.container_path.as_path()).collect::<Vec<_>>(), [Path::new("/other")]);
        // One place by two names is one volume.
        let made = declared("c2", &paths(&["/run/z", "/var/z"]), &rootfs, &[], &snapshots, Attributes::default()).unwrap();
        assert_eq!(made.len(), 1);
        std::fs::write(rootfs.join("file"), "").unwrap();
        assert!(declared("c3", &paths(&["/file"]), &rootfs, &[], &snapshots, Attributes::default()).is_err());
    }

    #[test]
    fn sub_paths_stay_in_their_volume() {
        let (dir, rootfs, _) = place();
        let volume = rootfs.canonicalize().unwrap();
        std::fs::write(dir.path().join("secret"), "host").unwrap();
        std::fs::write(rootfs.join("data/file"), "").unwrap();
        symlink("../../../../../../secret", rootfs.join("out")).unwrap();
        symlink("/data/file", rootfs.join("data/absolute")).unwrap();
        symlink("/proc/self/root", rootfs.join("magic")).unwrap();
        nix::unistd::mkfifo(&rootfs.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(inside(&volume, "").unwrap(), volume);
        for (path, found) in
            [("data", "data"), ("/data/sub/", "data/sub"), ("data/../data/file", "data/file"), ("data/absolute", "data/file")]
        {
            assert_eq!(inside(&volume, path).unwrap(), volume.join(found), "{path}");
        }
        assert_eq!(inside(&volume, "../../..").unwrap(), volume);
        for wrong in ["out", "none", "data/file/x", "magic", "fifo", "a\0b"] {
            assert!(inside(&volume, wrong).is_err(), "{wrong:?}");
        }
    }
}
