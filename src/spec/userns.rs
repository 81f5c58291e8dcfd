//! What a user namespace changes about the usual mounts: the kernel lets its root mount only what belongs to it.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount};

use super::{Inputs, Pid};
use crate::error::{Context, Result};
use crate::sys::idmap::{IdMap, IdMaps};

/// The user namespace of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserNamespace {
    /// Where it is pinned.
    pub path: PathBuf,
    pub maps: IdMaps,
}

/// `linux.uidMappings` and `gidMappings`. runc before 1.2 must have them beside the path of the namespace; later ones and crun take them
/// if they are those of the namespace, which they are.
pub(super) fn mappings(inputs: &Inputs) -> Result<Option<[Vec<LinuxIdMapping>; 2]>> {
    let Some(user) = &inputs.namespaces.user else { return Ok(None) };
    let list = |map: IdMap| {
        let mapping = LinuxIdMappingBuilder::default().container_id(map.container).host_id(map.host).size(map.length).build();
        mapping.map(|mapping| vec![mapping]).context(|| "write the maps of the user namespace")
    };
    Ok(Some([list(user.maps.uids)?, list(user.maps.gids)?]))
}

/// Whether /sys is the host's, for want of a network namespace that could have one.
pub(super) fn has_hosts_sys(inputs: &Inputs) -> bool {
    inputs.namespaces.user.is_some() && inputs.namespaces.net.is_none()
}

/// Replaces what cannot be mounted: what belongs to a namespace of the host is bound from the host, with all below it, since the kernel
/// lets nobody look under the mounts of another user namespace.
pub(super) fn adjust(list: &mut Vec<Mount>, inputs: &Inputs) {
    let Some(user) = &inputs.namespaces.user else { return };
    let hosts =
        [("/proc", inputs.namespaces.pid == Pid::Host), ("/sys", has_hosts_sys(inputs)), ("/dev/mqueue", inputs.namespaces.ipc.is_none())];
    let mqueue = Path::new("/dev/mqueue");
    if inputs.namespaces.ipc.is_none() && !inputs.host.host_mounts.iter().any(|path| path == mqueue) {
        list.retain(|mount| mount.destination() != mqueue);
    }
    for mount in list {
        let destination = mount.destination().clone();
        if hosts.iter().any(|(path, bound)| *bound && destination == Path::new(path)) {
            let mut options = vec!["rbind", "rprivate", "nosuid", "noexec", "nodev"];
            // The host's own mounts below it too, covered ones not left out; a runtime that does not know the word leaves those that
            // are seen to `security::readonly_paths`.
            if destination == Path::new("/sys") && !inputs.privileged() {
                options.push("rro");
            }
            let options = options.into_iter().map(str::to_owned).collect();
            mount.set_typ(Some("bind".to_owned())).set_source(Some(destination)).set_options(Some(options));
        } else if destination == Path::new("/dev/pts") {
            // The group tty must be mapped to own a terminal.
            if let Some(options) = mount.options_mut().as_mut().filter(|_| user.maps.gids.to_host(5).is_none()) {
                options.retain(|option| option != "gid=5");
            }
        }
    }
}

/// What each OCI runtime puts into /dev itself, over what is there or failing because of it.
const RUNTIMES_OWN: [&str; 8] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/console"];

/// Whether a device is bound from the host instead of being made: no node can be made in a user namespace. runc would bind the host's
/// node of the name that the container knows it by, and crun one that its umask has shut.
pub(super) fn binds_device(inputs: &Inputs, path: &Path) -> bool {
    inputs.namespaces.user.is_some() && may_be_bound(path)
}

/// Whether a device may be bound to this path, as far as the OCI runtime is concerned.
pub fn may_be_bound(path: &Path) -> bool {
    !RUNTIMES_OWN.iter().any(|own| path == Path::new(own))
}

/// The node of the host, with its owner and mode. Devices work there: the rules of the cgroup say how.
pub fn device_bind(path: &Path, host_path: &Path) -> Mount {
    super::mounts::bind(path, host_path, false, "rprivate")
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    fn fixture(length: u32) -> Fixture {
        let map = IdMap { container: 0, host: 100_000, length };
        let maps = IdMaps { uids: map, gids: IdMap { host: 200_000, ..map } };
        let mut fixture = Fixture::new();
        fixture.namespaces.user = Some(UserNamespace { path: "/run/ns/user".into(), maps });
        fixture.namespaces.net = Some("/run/ns/net".into());
        fixture.namespaces.ipc = Some("/run/ns/ipc".into());
        fixture
    }

    fn at(fixture: &mut Fixture, path: &str) -> (String, String) {
        let mounts = fixture.build().0.mounts().clone().unwrap();
        let mount = mounts.iter().find(|m| m.destination() == Path::new(path)).unwrap();
        (mount.typ().clone().unwrap(), mount.options().clone().unwrap().join(","))
    }

    #[test]
    fn maps_and_path_are_given_both() {
        let spec = fixture(65536).build().0;
        let linux = spec.linux().as_ref().unwrap();
        let uids = &linux.uid_mappings().as_ref().unwrap()[0];
        assert_eq!((uids.container_id(), uids.host_id(), uids.size()), (0, 100_000, 65536));
        assert_eq!(linux.gid_mappings().as_ref().unwrap()[0].host_id(), 200_000);
        let namespaces = linux.namespaces().as_ref().unwrap();
        let user = namespaces.iter().find(|n| n.typ() == oci_spec::runtime::LinuxNamespaceType::User).unwrap();
        assert_eq!(user.path().as_deref(), Some(Path::new("/run/ns/user")));
    }

    #[test]
    fn own_namespaces_have_their_own_mounts() {
        let mut fixture = fixture(65536);
        for (path, kind) in [("/proc", "proc"), ("/sys", "sysfs"), ("/dev/mqueue", "mqueue")] {
            assert_eq!(at(&mut fixture, path).0, kind);
        }
        assert!(at(&mut fixture, "/dev/pts").1.ends_with(",gid=5"));
    }

    #[test]
    fn what_is_the_hosts_is_bound() {
        let mut fixture = fixture(5);
        (fixture.namespaces.net, fixture.namespaces.ipc, fixture.namespaces.pid) = (None, None, Pid::Host);
        fixture.host.host_mounts = vec!["/sys/kernel/debug".into(), "/sys/fs/cgroup".into(), "/dev/mqueue".into()];
        for (path, more) in [("/proc", ""), ("/sys", ",rro"), ("/dev/mqueue", "")] {
            assert_eq!(at(&mut fixture, path), ("bind".into(), format!("rbind,rprivate,nosuid,noexec,nodev{more}")));
        }
        assert!(!at(&mut fixture, "/dev/pts").1.contains("gid=5"), "gid 5 is not mapped");
        let readonly = fixture.build().0.linux().as_ref().unwrap().readonly_paths().clone().unwrap();
        assert!(["/sys", "/sys/kernel/debug"].iter().all(|path| readonly.iter().any(|r| r == path)), "{readonly:?}");
        fixture.host.host_mounts.clear();
        assert!(!fixture.build().0.mounts().as_ref().unwrap().iter().any(|m| m.destination() == Path::new("/dev/mqueue")));
        fixture.namespaces.user = None;
        assert_eq!(at(&mut fixture, "/sys").0, "sysfs", "the host's users may mount");
    }
}
