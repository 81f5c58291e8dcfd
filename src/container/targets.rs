//! The places in a container's root filesystem where something will be mounted, looked at and made ready before the OCI runtime goes
//! there: links of the image may move them.

use std::path::Path;

use oci_spec::runtime::Mount;

use crate::error::{Context, Error, Result};
use crate::spec::process;
use crate::spec::userns::may_be_bound;
use crate::sys::inroot::Root;

/// Where the kernel's own file systems are in a container. What is mounted there takes masks and read-only paths away (CVE-2019-16884),
/// or reaches what a process should not have.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A customary name for this is /run/shm, a link to it.
const SHM: &str = "/dev/shm";

/// Whether a clean path is in one of the kernel's own file systems.
pub(super) fn is_kernels(path: &Path) -> bool {
    KERNEL.iter().any(|dir| path.starts_with(dir))
}

/// Whether links may lead a mount to this clean path. Of /dev, to names that mean nothing to kernel or OCI runtime: images have logs that
/// are links to /dev/stdout, over which a file may be mounted.
fn may_be_led_to(place: &Path) -> bool {
    let is_plain_name = place.parent() == Some(Path::new("/dev"))
        && may_be_bound(place)
        && !["/dev/pts", "/dev/mqueue"].iter().any(|own| place == Path::new(own));
    place != Path::new("/") && (!is_kernels(place) || place.starts_with(SHM) || is_plain_name)
}

/// Follows each destination of `mounts`, which come in the order of the spec, through links of the image and of what is mounted before it,
/// and makes the directory above it where that is the root filesystem's: crun does not make the target of a dangling link.
/// FAILED_PRECONDITION for one that links lead to the root or into the kernel's file systems: crun would mount there. `owner`: of
/// directories that are made.
pub(super) fn prepare(rootfs: &Path, mounts: &[Mount], owner: Option<(u32, u32)>) -> Result<()> {
    let mut root = Root::open(rootfs)?.owned_by(owner);
    for mount in mounts {
        let what = || format!("mount {}", mount.destination().display());
        let asked = process::clean(mount.destination());
        let place = if is_kernels(&asked) { asked.clone() } else { root.resolve(&asked).context(what)? };
        if !is_kernels(&asked) && !may_be_led_to(&place) {
            return Err(Error::precondition(format!(
                "{}: links of the image lead to {}, where nothing may be mounted",
                what(),
                place.display()
            )));
        }
        if let Some(parent) = place.parent().filter(|_| !is_kernels(&place) && !root.is_covered(&place)) {
            root.make_dirs(parent).context(what)?;
        }
        root.cover(place, directory(mount)).context(what)?;
    }
    Ok(())
}

/// The directory of the host that a bind mount shows.
fn directory(mount: &Mount) -> Option<&Path> {
    let options = mount.options().as_deref().unwrap_or_default();
    let binds = options.iter().any(|option| option == "bind" || option == "rbind");
    mount.source().as_deref().filter(|source| binds && source.is_dir())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;
    use crate::error::Code;

    /// A root filesystem and a volume beside it.
    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let [rootfs, volume] = ["rootfs", "volume"].map(|name| dir.path().join(name));
        std::fs::create_dir_all(rootfs.join("etc")).unwrap();
        std::fs::create_dir_all(volume.join("plain")).unwrap();
        (dir, rootfs, volume)
    }

    fn bind(destination: &str, source: &Path) -> Mount {
        let mut mount = Mount::default();
        mount.set_destination(destination.into()).set_typ(Some("bind".into())).set_source(Some(source.into()));
        mount.set_options(Some(vec!["rbind".into(), "rw".into()]));
        mount
    }

    fn kernels(destination: &str) -> Mount {
        let mut mount = Mount::default();
        mount.set_destination(destination.into()).set_typ(Some("tmpfs".into())).set_source(Some("tmpfs".into())).set_options(None);
        mount
    }

    /// The usual ones first, as in a spec.
    fn prepared(rootfs: &Path, mounts: &[Mount]) -> Result<()> {
        let usual = ["/proc", "/dev", "/sys", "/dev/shm", "/sys/fs/cgroup"].map(kernels);
        prepare(rootfs, &[&usual, mounts].concat(), None)
    }

    #[test]
    fn links_into_the_kernels_file_systems_are_refused_by_the_name_of_the_mount() {
        let (_dir, rootfs, volume) = place();
        for (name, target) in [
            ("etc/hosts", "/proc/1/attr/exec"),
            ("mnt", "/proc"),
            ("up", "../../sys/kernel"),
            ("null", "/dev/null"),
            ("twice", "/mnt"),
            ("all", "/"),
        ] {
            symlink(target, rootfs.join(name)).unwrap();
        }
        for asked in ["/etc/hosts", "/mnt", "/mnt/sys", "/up", "/null", "/twice/sys/kernel", "/etc/../mnt/", "/all", "/all/proc/self"] {
            let error = prepared(&rootfs, &[bind(asked, &volume)]).unwrap_err();
            assert!(error.code() == Code::FailedPrecondition && error.message().contains(&format!("mount {asked}")), "{error}");
        }
        assert!(!rootfs.join("proc").exists() && !rootfs.join("sys").exists(), "nothing is made");
        // These say what they want, and others are not led there.
        prepared(&rootfs, &["/proc/driver/x", "/sys/fs/bpf", "/dev/bus", "/process", "/devices/x"].map(|at| bind(at, &volume))).unwrap();
        assert!(rootfs.join("devices").is_dir() && !rootfs.join("proc").exists());
    }

    #[test]
    fn an_old_name_of_shm_is_let_through() {
        let (_dir, rootfs, volume) = place();
        std::fs::create_dir(rootfs.join("run")).unwrap();
        symlink("/dev/shm", rootfs.join("run/shm")).unwrap();
        prepared(&rootfs, &[bind("/run/shm", &volume)]).unwrap();
        assert!(!rootfs.join("dev").exists());
    }

    /// As the images of web servers have them.
    #[test]
    fn logs_that_are_links_to_streams_may_be_covered() {
        let (_dir, rootfs, volume) = place();
        for (name, target) in [("access.log", "/dev/stdout"), ("error.log", "/dev/stderr"), ("terminals", "/dev/pts"), ("devices", "/dev")]
        {
            symlink(target, rootfs.join("etc").join(name)).unwrap();
        }
        prepared(&rootfs, &[bind("/etc/access.log", &volume), bind("/etc/error.log", &volume)]).unwrap();
        for asked in ["/etc/terminals", "/etc/terminals/0", "/etc/devices", "/etc/devices/pts", "/etc/devices/tty"] {
            assert_eq!(prepared(&rootfs, &[bind(asked, &volume)]).unwrap_err().code(), Code::FailedPrecondition, "{asked}");
        }
    }

    #[test]
    fn links_of_a_volume_are_followed_as_the_images_are() {
        let (_dir, rootfs, volume) = place();
        symlink("/proc", volume.join("kernels")).unwrap();
        symlink("/etc/new", volume.join("images")).unwrap();
        symlink("/data/none", volume.join("own")).unwrap();
        let both = |at: &str| [bind("/data", &volume), bind(at, &volume)];
        for asked in ["/data/kernels", "/data/kernels/sys", "/data/plain/../kernels"] {
            assert_eq!(prepared(&rootfs, &both(asked)).unwrap_err().code(), Code::FailedPrecondition, "{asked}");
        }
        // The way to the volume is not there yet: the OCI runtime makes it in the empty one before.
        let empty = volume.join("plain");
        let nested = [bind("/data", &empty), bind("/data/a/b", &volume), bind("/data/a/b/kernels/sys", &volume)];
        assert_eq!(prepared(&rootfs, &nested).unwrap_err().code(), Code::FailedPrecondition);
        for asked in ["/data/plain", "/data/new/deep", "/data/own/deep", "/data/images/deep"] {
            prepared(&rootfs, &both(asked)).unwrap();
        }
        // What is below a mount is made by the OCI runtime, in the volume or not at all.
        assert!(!volume.join("new").exists() && !volume.join("none").exists() && !rootfs.join("data").exists());
        assert!(rootfs.join("etc/new").is_dir());
        // A mount over the volume hides its links.
        let hidden = [bind("/data", &volume), bind("/data", &volume.join("plain")), bind("/data/kernels/x", &volume)];
        prepared(&rootfs, &hidden).unwrap();
    }

    #[test]
    fn ways_to_mount_points_are_made_through_dangling_links() {
        let (_dir, rootfs, volume) = place();
        std::fs::create_dir(rootfs.join("var")).unwrap();
        symlink("/run", rootfs.join("var/run")).unwrap();
        symlink("../lib/resolve/stub.conf", rootfs.join("etc/resolv.conf")).unwrap();
        let mounts = [bind("/etc/resolv.conf", &volume), bind("/var/run/secrets/token", &volume)];
        prepare(&rootfs, &mounts, Some((7, 8))).unwrap();
        use std::os::unix::fs::MetadataExt;
        for made in ["run", "run/secrets", "lib/resolve"] {
            let meta = rootfs.join(made).symlink_metadata().unwrap();
            assert_eq!((meta.is_dir(), meta.uid(), meta.gid(), meta.mode() & 0o7777), (true, 7, 8, 0o755), "{made}");
        }
        // The mount point itself is the OCI runtime's: a file or a directory.
        assert!(!rootfs.join("run/secrets/token").exists());
        std::fs::write(rootfs.join("file"), "").unwrap();
        assert!(prepared(&rootfs, &[bind("/file/x/y", &volume)]).unwrap_err().message().starts_with("mount /file/x/y"));
    }
}
