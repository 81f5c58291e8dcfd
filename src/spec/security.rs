//! Capabilities, masked and read-only paths.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::{HostFacts, Inputs};
use crate::api::runtime::LinuxContainerSecurityContext;
use crate::error::{Error, Result};

/// Every capability at the index that is its number in the kernel (include/uapi/linux/capability.h).
pub const BY_NUMBER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a container has when nothing is said; the set of Docker and containerd.
const DEFAULT: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// The sets of the container. ALL counts first, whatever its place: `drop ALL, add X` is X alone, `add ALL, drop X` is all
/// but X. A capability asked for by name that the daemon has not is an error; of the default ones it goes with a warning,
/// of ALL in silence (all that there are).
pub(super) fn capabilities(
    security: &LinuxContainerSecurityContext,
    host: &HostFacts,
    warnings: &mut Vec<String>,
) -> Result<LinuxCapabilities> {
    if security.privileged {
        return Ok(sets(host.bounding.clone(), Capabilities::new()));
    }
    let add = Names::parse("add_capabilities", &security.capabilities.add_capabilities)?;
    let drop = Names::parse("drop_capabilities", &security.capabilities.drop_capabilities)?;
    let ambient = Names::parse("add_ambient_capabilities", &security.capabilities.add_ambient_capabilities)?;

    let mut all: Capabilities = match (add.all || ambient.all, drop.all) {
        (_, true) => Capabilities::new(),
        (true, false) => host.bounding.clone(),
        (false, false) => {
            let missing: Vec<_> = DEFAULT.iter().filter(|c| !host.bounding.contains(c) && !drop.named.contains(c)).collect();
            if !missing.is_empty() {
                warnings.push(format!("default capabilities {missing:?} left out: the daemon does not have them"));
            }
            DEFAULT.into_iter().filter(|c| host.bounding.contains(c)).collect()
        }
    };
    for (field, names) in [("add_capabilities", &add), ("add_ambient_capabilities", &ambient)] {
        if let Some(missing) = names.named.iter().find(|c| !host.bounding.contains(c)) {
            return Err(Error::precondition(format!("{field}: the daemon itself does not have CAP_{missing}")));
        }
        all.extend(&names.named);
    }
    all.retain(|c| !drop.named.contains(c));
    let ambient = if ambient.all { all.clone() } else { ambient.named.intersection(&all).copied().collect() };
    Ok(sets(all, ambient))
}

/// Inheritable holds no more than ambient needs: CVE-2022-24769.
fn sets(all: Capabilities, ambient: Capabilities) -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(all.clone()))
        .set_effective(Some(all.clone()))
        .set_permitted(Some(all))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    sets
}

struct Names {
    all: bool,
    named: Capabilities,
}

impl Names {
    /// With or without CAP_, in any case.
    fn parse(field: &str, names: &[String]) -> Result<Names> {
        let mut parsed = Names { all: false, named: Capabilities::new() };
        for name in names {
            let upper = name.to_ascii_uppercase();
            match upper.strip_prefix("CAP_").unwrap_or(&upper) {
                "ALL" => parsed.all = true,
                bare => {
                    let capability = bare.parse().map_err(|_| Error::invalid(format!("{field}: {name:?} is not a capability")))?;
                    parsed.named.insert(capability);
                }
            }
        }
        Ok(parsed)
    }
}

/// Exactly the list given; none for a privileged container.
pub(super) fn masked_paths(security: &LinuxContainerSecurityContext) -> Result<Option<Vec<String>>> {
    paths("masked_paths", &security.masked_paths, security.privileged)
}

/// None for a privileged container. Else the request's list, /sys unless the container brings one of its own, and every
/// mount below these that must not be written to: crun copies what is mounted below such a path before it makes those
/// mounts read-only, and what the container then sees is the writable copy. With v1's devices.allow in it that would be a way out.
pub(super) fn readonly_paths(inputs: &Inputs) -> Result<Option<Vec<String>>> {
    let security = inputs.security();
    if security.privileged {
        return Ok(None);
    }
    let mut list = paths("readonly_paths", &security.readonly_paths, false)?.unwrap_or_default();
    let ours = |path: &Path| !inputs.mounts.iter().any(|mount| mount.container_path == path);
    let (sys, cgroup) = (Path::new("/sys"), Path::new("/sys/fs/cgroup"));
    if ours(sys) && !list.iter().any(|path| Path::new(path) == sys) {
        list.push(sys.display().to_string());
    }
    let mut below: Vec<PathBuf> = Vec::new();
    if ours(cgroup) {
        below.push(cgroup.to_owned());
        below.extend(inputs.host.cgroup_mounts.iter().map(|name| cgroup.join(name)));
    }
    if ours(sys) && super::userns::has_hosts_sys(inputs) {
        below.extend(inputs.host.host_mounts.iter().filter(|path| path.starts_with(sys) && !path.starts_with(cgroup)).cloned());
    }
    below.extend(inputs.mounts.iter().filter(|mount| mount.readonly).map(|mount| mount.container_path.clone()));
    below.retain(|inner| list.iter().any(|path| inner.starts_with(path)) && !list.iter().any(|path| inner == Path::new(path)));
    list.extend(below.into_iter().map(|path| path.display().to_string()));
    Ok((!list.is_empty()).then_some(list))
}

fn paths(field: &str, list: &[String], privileged: bool) -> Result<Option<Vec<String>>> {
    if privileged || list.is_empty() {
        return Ok(None);
    }
    match list.iter().find(|path| !path.starts_with('/') || path.contains('\0')) {
        Some(path) => Err(Error::invalid(format!("{field}: {path:?} is not an absolute path"))),
        None => Ok(Some(list.to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::super::fixture::{host, Fixture};
    use super::*;
    use crate::api::runtime::Capability as Asked;
    use crate::error::Code;

    fn asking(add: &[&str], drop: &[&str], ambient: &[&str]) -> LinuxContainerSecurityContext {
        let list = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
        let asked = Asked {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            add_ambient_capabilities: list(ambient),
            ..Default::default()
        };
        LinuxContainerSecurityContext { capabilities: MessageField::some(asked), ..Default::default() }
    }

    fn sets_of(add: &[&str], drop: &[&str], ambient: &[&str]) -> (Capabilities, Capabilities) {
        let sets = capabilities(&asking(add, drop, ambient), &host(), &mut Vec::new()).unwrap();
        assert_eq!(sets.bounding(), sets.effective());
        assert_eq!(sets.bounding(), sets.permitted());
        assert_eq!(sets.inheritable(), sets.ambient());
        (sets.bounding().clone().unwrap(), sets.ambient().clone().unwrap())
    }

    #[test]
    fn default_capabilities_are_fourteen() {
        let (all, ambient) = sets_of(&[], &[], &[]);
        assert_eq!((all.len(), ambient.len()), (14, 0));
        assert!(!all.contains(&Capability::SysAdmin));
    }

    #[test]
    fn names_come_in_any_form() {
        let (all, _) = sets_of(&["net_admin", "CAP_SYS_TIME", "cap_Bpf"], &["Mknod", "CAP_KILL"], &[]);
        assert_eq!(all.len(), 15);
        assert!(all.contains(&Capability::NetAdmin) && !all.contains(&Capability::Mknod));
        for bad in ["NOPE", "", "CAP_", "CAP_CAP_KILL"] {
            let error = capabilities(&asking(&[bad], &[], &[]), &host(), &mut Vec::new()).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn all_counts_first() {
        assert_eq!(sets_of(&["NET_ADMIN"], &["ALL"], &[]).0, [Capability::NetAdmin].into());
        assert_eq!(sets_of(&["all"], &["KILL"], &[]).0.len(), 40);
        assert_eq!(sets_of(&[], &["CAP_ALL"], &[]).0.len(), 0);
        assert_eq!(sets_of(&["ALL"], &[], &[]).0.len(), 41);
    }

    #[test]
    fn ambient_ones_are_in_all_sets() {
        let (all, ambient) = sets_of(&[], &["ALL"], &["NET_BIND_SERVICE"]);
        assert_eq!((all, ambient.clone()), (ambient, [Capability::NetBindService].into()));
    }

    #[test]
    fn never_more_than_the_daemon_has() {
        let mut host = host();
        host.bounding.remove(&Capability::SysResource);
        host.bounding.remove(&Capability::Mknod);
        let mut warnings = Vec::new();
        let of = |security: &LinuxContainerSecurityContext, warnings: &mut Vec<String>| capabilities(security, &host, warnings);
        let privileged = LinuxContainerSecurityContext { privileged: true, ..Default::default() };
        assert_eq!(of(&privileged, &mut warnings).unwrap().bounding().as_ref().unwrap().len(), 39);
        assert_eq!(of(&asking(&["ALL"], &[], &[]), &mut warnings).unwrap().bounding().as_ref().unwrap().len(), 39);
        assert!(warnings.is_empty());
        assert_eq!(of(&asking(&[], &[], &[]), &mut warnings).unwrap().bounding().as_ref().unwrap().len(), 13);
        assert_eq!(warnings.len(), 1);
        let error = of(&asking(&["SYS_RESOURCE"], &[], &[]), &mut warnings).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("CAP_SYS_RESOURCE"), "{error}");
    }

    #[test]
    fn masks_are_exactly_those_given() {
        let mut fixture = Fixture::new();
        fixture.security().masked_paths = vec!["/proc/kcore".into()];
        fixture.security().readonly_paths = vec!["/proc/sys".into(), "/proc/bus".into()];
        let linux = fixture.build().0.linux().clone().unwrap();
        assert_eq!(linux.masked_paths().as_ref().unwrap(), &["/proc/kcore"]);
        let cgroup = ["/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/memory"];
        assert_eq!(linux.readonly_paths().as_ref().unwrap(), &[&["/proc/sys", "/proc/bus", "/sys"][..], &cgroup].concat());
        fixture.set_privileged();
        let linux = fixture.build().0.linux().clone().unwrap();
        assert_eq!((linux.masked_paths(), linux.readonly_paths()), (&None, &None));
        fixture.security().privileged = false;
        fixture.security().masked_paths = vec!["proc".into()];
        assert_eq!(fixture.error().code(), Code::InvalidArgument);
    }

    #[test]
    fn mounts_below_readonly_paths_are_listed_if_they_are_readonly() {
        let listed = |fixture: &mut Fixture| fixture.build().0.linux().as_ref().unwrap().readonly_paths().clone().unwrap();
        let mut fixture = Fixture::new();
        fixture.host.cgroup_mounts.clear();
        fixture.mount("/data", "/data").readonly = true;
        fixture.mount("/sys/fs/bpf", "/sys/fs/bpf").readonly = true;
        fixture.mount("/sys/firmware", "/sys/firmware");
        assert_eq!(listed(&mut fixture), ["/sys", "/sys/fs/cgroup", "/sys/fs/bpf"]);
        // Its own cgroups are as it asked; a /sys of its own is no path of ours.
        fixture.mount("/sys/fs/cgroup", "/sys/fs/cgroup");
        assert_eq!(listed(&mut fixture), ["/sys", "/sys/fs/bpf"]);
        fixture.mount("/sys", "/sys").readonly = true;
        fixture.security().readonly_paths = vec!["/proc/sys".into()];
        assert_eq!(listed(&mut fixture), ["/proc/sys"]);
    }
}
