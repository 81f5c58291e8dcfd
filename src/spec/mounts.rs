//! The mounts of a container: the usual ones, the sandbox's files, the request's.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

use super::{userns, Inputs};

/// A bind mount of the request, its host path resolved (`container::mounts::find`), or a volume that an image brings
/// (`container::image_volumes`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvedMount {
    /// Absolute and clean.
    pub container_path: PathBuf,
    /// Absolute, without links, existing.
    pub host_path: PathBuf,
    pub readonly: bool,
    /// With all that is mounted below.
    pub recursive_read_only: bool,
    pub propagation: Propagation,
    /// Further options, of [`OPTIONS`].
    pub options: Vec<String>,
    /// Of what is mounted below a volume on the host and listed for an OCI runtime that leaves it out (`container::below`): where that
    /// volume is in the container.
    pub comes_with: Option<PathBuf>,
}

/// What mount_options may say. They hold for the mount itself, as `readonly` does, not for what is mounted below it; whatever
/// else a mount has is given by fields of its own.
pub const OPTIONS: [&str; 3] = ["noexec", "nosuid", "nodev"];

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    #[default]
    Private,
    HostToContainer,
    Bidirectional,
}

impl Propagation {
    fn option(self) -> &'static str {
        match self {
            Propagation::Private => "rprivate",
            Propagation::HostToContainer => "rslave",
            Propagation::Bidirectional => "rshared",
        }
    }
}

/// All mounts, parents before children. A mount of the request replaces a usual one with the same destination; one on /dev
/// replaces all that would come below it.
pub(super) fn mounts(inputs: &Inputs) -> Vec<Mount> {
    let asked = || inputs.mounts.iter().filter(|mount| mount.comes_with.is_none());
    let requested = |path: &Path| asked().any(|mount| mount.container_path == path);
    let dev_is_requested = requested(Path::new("/dev"));
    let replaced = |path: &Path| requested(path) || (dev_is_requested && path.starts_with("/dev"));

    let mut all: Vec<Mount> = usual(inputs).into_iter().filter(|mount| !replaced(mount.destination())).collect();
    // These come in even below a requested /dev: /dev/shm is the sandbox's.
    all.extend(sandbox_files(inputs).into_iter().filter(|mount| !requested(mount.destination())));
    let devices = inputs.devices.iter().filter(|device| userns::binds_device(inputs, &device.path) && !replaced(&device.path));
    all.extend(devices.map(|device| userns::device_bind(&device.path, &device.host_path)));
    // What a volume brings along gives way to what each container has: it is covered by that where volumes are bound whole.
    let gives_way = |mount: &ResolvedMount| {
        let covers =
            |other: &Mount, volume| other.destination().starts_with(volume) && mount.container_path.starts_with(other.destination());
        mount.comes_with.as_ref().is_some_and(|volume| all.iter().any(|other| covers(other, volume)))
    };
    let binds: Vec<Mount> = inputs.mounts.iter().filter(|mount| !gives_way(mount)).map(requested_bind).collect();
    all.extend(binds);
    // Stable: /proc stays before /dev.
    all.sort_by_key(|mount| mount.destination().components().count());
    all
}

/// What the root mount must be, so that a request's propagation works: the strongest that was asked for.
pub(super) fn rootfs_propagation(mounts: &[ResolvedMount]) -> Option<String> {
    let has = |propagation| mounts.iter().any(|mount| mount.propagation == propagation);
    let strongest = [Propagation::Bidirectional, Propagation::HostToContainer].into_iter().find(|propagation| has(*propagation));
    strongest.map(|propagation| propagation.option().to_owned())
}

fn usual(inputs: &Inputs) -> Vec<Mount> {
    let privileged = inputs.privileged();
    let access = if privileged { "rw" } else { "ro" };
    let mut cgroup = vec!["nosuid", "noexec", "nodev", "relatime", access];
    if !inputs.host.cgroup_v2 {
        // runc binds v1's hierarchies from the host's mounts, which are shared: where a volume makes the container's mounts shared too,
        // what `security::readonly_paths` puts over them would come out and make the host's own read-only.
        cgroup.insert(4, "private");
    }
    let mut list = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        // Never `ro` here: runc would make the superblock read-only, and with it /sys of every other container of the sandbox.
        // `security::readonly_paths` makes the mount read-only instead.
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "rw"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &cgroup),
    ];
    if inputs.files.shm.is_none() {
        list.push(mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]));
    }
    userns::adjust(&mut list, inputs);
    list
}

fn sandbox_files(inputs: &Inputs) -> Vec<Mount> {
    let files = inputs.files;
    let readonly = inputs.security().readonly_rootfs;
    let mut list = Vec::new();
    for (path, file) in [("/etc/hosts", &files.hosts), ("/etc/hostname", &files.hostname), ("/etc/resolv.conf", &files.resolv_conf)] {
        list.extend(file.as_ref().map(|file| bind(Path::new(path), file, readonly, "rprivate")));
    }
    list.extend(files.shm.as_ref().map(|shm| bind(Path::new("/dev/shm"), shm, false, "rprivate")));
    list
}

fn requested_bind(asked: &ResolvedMount) -> Mount {
    let mut mount = bind(&asked.container_path, &asked.host_path, asked.readonly, asked.propagation.option());
    let options = mount.options_mut().get_or_insert_with(Vec::new);
    if asked.recursive_read_only {
        options.push("rro".to_owned());
    }
    for option in &asked.options {
        if !options.contains(option) {
            options.push(option.clone());
        }
    }
    mount
}

pub(super) fn bind(destination: &Path, source: &Path, readonly: bool, propagation: &str) -> Mount {
    let access = if readonly { "ro" } else { "rw" };
    let mut bind = Mount::default();
    bind.set_destination(destination.to_path_buf())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_path_buf()))
        .set_options(Some(["rbind", propagation, access].map(str::to_owned).to_vec()));
    bind
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(destination))
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(PathBuf::from(source)))
        .set_options(Some(options.iter().map(|option| option.to_string()).collect()));
    mount
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    fn destinations(fixture: &Fixture) -> Vec<String> {
        mounts(&fixture.inputs()).iter().map(|m| m.destination().display().to_string()).collect()
    }

    fn at(fixture: &Fixture, path: &str) -> Mount {
        let found: Vec<_> = mounts(&fixture.inputs()).into_iter().filter(|m| m.destination() == Path::new(path)).collect();
        assert_eq!(found.len(), 1, "{path}");
        found.into_iter().next().unwrap()
    }

    fn options(mount: &Mount) -> String {
        mount.options().clone().unwrap_or_default().join(",")
    }

    #[test]
    fn usual_mounts_in_order() {
        let order = ["/proc", "/dev", "/sys", "/dev/pts", "/dev/mqueue", "/dev/shm", "/sys/fs/cgroup"];
        assert_eq!(destinations(&Fixture::new()), order);
    }

    #[test]
    fn sys_and_cgroup_are_readonly_unless_privileged() {
        let mut fixture = Fixture::new();
        let readonly = |f: &mut Fixture| f.build().0.linux().as_ref().unwrap().readonly_paths().clone().unwrap_or_default();
        assert_eq!(readonly(&mut fixture)[..2], ["/sys", "/sys/fs/cgroup"]);
        assert!(options(&at(&fixture, "/sys/fs/cgroup")).ends_with(",ro"));
        fixture.set_privileged();
        assert!(readonly(&mut fixture).is_empty());
        assert!(options(&at(&fixture, "/sys/fs/cgroup")).ends_with(",rw"));
    }

    /// The host's /dev, /etc and /sys as volumes, with what is mounted below them there.
    #[test]
    fn what_comes_with_a_volume_covers_nothing_of_the_containers_own() {
        let mut fixture = Fixture::new();
        fixture.files.hosts = Some("/run/s/hosts".into());
        fixture.files.shm = Some("/run/s/shm".into());
        for volume in ["/dev", "/etc", "/sys"] {
            fixture.mount(volume, volume);
        }
        for (path, volume) in [
            ("/dev/shm", "/dev"),
            ("/dev/hugepages", "/dev"),
            ("/etc/hosts", "/etc"),
            ("/etc/sub", "/etc"),
            ("/sys/fs/cgroup", "/sys"),
            ("/sys/fs/cgroup/memory", "/sys"),
            ("/sys/fs/bpf", "/sys"),
        ] {
            fixture.mount(path, &format!("/host{path}"));
            fixture.mounts.last_mut().unwrap().comes_with = Some(volume.into());
        }
        for (path, source) in [
            ("/dev/shm", "/run/s/shm"),
            ("/dev/hugepages", "/host/dev/hugepages"),
            ("/etc/hosts", "/run/s/hosts"),
            ("/etc/sub", "/host/etc/sub"),
            ("/sys/fs/cgroup", "cgroup"),
            ("/sys/fs/bpf", "/host/sys/fs/bpf"),
        ] {
            assert_eq!(at(&fixture, path).source().as_deref(), Some(Path::new(source)), "{path}");
        }
        assert!(!destinations(&fixture).iter().any(|path| path == "/sys/fs/cgroup/memory"));
    }

    #[test]
    fn sandbox_files_are_bound_unless_the_request_brings_its_own() {
        let mut fixture = Fixture::new();
        fixture.files.hosts = Some("/run/s1/hosts".into());
        fixture.files.resolv_conf = Some("/run/s1/resolv.conf".into());
        fixture.files.shm = Some("/run/s1/shm".into());
        fixture.mount("/etc/hosts", "/var/lib/kubelet/hosts");
        assert_eq!(at(&fixture, "/etc/hosts").source().as_deref(), Some(Path::new("/var/lib/kubelet/hosts")));
        assert_eq!(options(&at(&fixture, "/etc/resolv.conf")), "rbind,rprivate,rw");
        assert_eq!(at(&fixture, "/dev/shm").typ().as_deref(), Some("bind"));
        assert!(!destinations(&fixture).contains(&"/etc/hostname".to_string()));
        fixture.security().readonly_rootfs = true;
        assert_eq!(options(&at(&fixture, "/etc/resolv.conf")), "rbind,rprivate,ro");
        assert_eq!(options(&at(&fixture, "/dev/shm")), "rbind,rprivate,rw");
    }

    #[test]
    fn requested_mount_replaces_a_usual_one() {
        let mut fixture = Fixture::new();
        fixture.mount("/sys/fs/cgroup", "/sys/fs/cgroup").readonly = true;
        let mount = at(&fixture, "/sys/fs/cgroup");
        assert_eq!((mount.typ().as_deref(), options(&mount).as_str()), (Some("bind"), "rbind,rprivate,ro"));
    }

    #[test]
    fn requested_dev_replaces_all_below_it_but_the_sandboxs_shm() {
        let mut fixture = Fixture::new();
        fixture.mount("/dev", "/dev");
        fixture.files.shm = Some("/run/s1/shm".into());
        assert_eq!(destinations(&fixture), ["/proc", "/sys", "/dev", "/dev/shm", "/sys/fs/cgroup"]);
    }

    #[test]
    fn options_of_a_requested_mount() {
        let mut fixture = Fixture::new();
        let mount = fixture.mount("/a", "/a");
        (mount.readonly, mount.recursive_read_only) = (true, true);
        assert_eq!(options(&at(&fixture, "/a")), "rbind,rprivate,ro,rro");
        fixture.mount("/b", "/b").options = ["noexec", "nodev", "noexec"].map(str::to_owned).to_vec();
        assert_eq!(options(&at(&fixture, "/b")), "rbind,rprivate,rw,noexec,nodev");
    }

    #[test]
    fn parents_come_before_children() {
        let mut fixture = Fixture::new();
        fixture.mount("/data/a/b", "/1");
        fixture.mount("/data", "/2");
        fixture.mount("/data/a", "/3");
        let order: Vec<_> = destinations(&fixture).into_iter().filter(|d| d.starts_with("/data")).collect();
        assert_eq!(order, ["/data", "/data/a", "/data/a/b"]);
    }

    #[test]
    fn propagation_reaches_the_root_mount() {
        let mut fixture = Fixture::new();
        fixture.mount("/a", "/a");
        assert_eq!(rootfs_propagation(&fixture.mounts), None);
        fixture.mount("/b", "/b").propagation = Propagation::HostToContainer;
        assert_eq!(rootfs_propagation(&fixture.mounts).as_deref(), Some("rslave"));
        fixture.mount("/c", "/c").propagation = Propagation::Bidirectional;
        assert_eq!(rootfs_propagation(&fixture.mounts).as_deref(), Some("rshared"));
        assert_eq!(options(&at(&fixture, "/b")), "rbind,rslave,rw");
        assert_eq!(options(&at(&fixture, "/c")), "rbind,rshared,rw");
    }
}
