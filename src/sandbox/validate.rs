//! Which sandbox configs are accepted. What a sandbox without a process cannot use is accepted and does not apply: of
//! LinuxSandboxSecurityContext run_as_user, run_as_group, supplemental_groups, readonly_rootfs, seccomp, seccomp_profile_path and
//! apparmor (the sandbox's init has a filter, an empty root and no capabilities of its own). Its selinux_options are those of
//! its files, and of its containers that have none themselves; `privileged` is what its containers may ask for. What matters
//! for security and cannot be honoured is refused by name.
//! src/spec/fields.md has every field.

use crate::api::runtime::{IDMapping, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig, PodSandboxMetadata, UserNamespace};
use crate::error::{Error, Result};
use crate::sandbox::PidMode;
use crate::sys::idmap::{IdMap, IdMaps};

/// Longest host name of Linux (HOST_NAME_MAX), bytes.
const HOSTNAME_LIMIT: usize = 64;
/// Characters that end up in names, CNI_ARGS and files.
fn is_plain(text: &str) -> bool {
    !text.bytes().any(|b| b.is_ascii_control())
}

/// The namespaces a config asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespaces {
    pub host_network: bool,
    pub host_ipc: bool,
    pub pid: PidMode,
    /// None: the host's user namespace.
    pub userns: Option<IdMaps>,
}

/// Metadata of a sandbox: name, namespace and uid are required.
pub fn metadata(config: &PodSandboxConfig) -> Result<&PodSandboxMetadata> {
    let Some(m) = config.metadata.as_ref() else { return Err(Error::invalid("config.metadata is missing")) };
    for (field, value) in [("name", &m.name), ("namespace", &m.namespace), ("uid", &m.uid)] {
        if value.is_empty() {
            return Err(Error::invalid(format!("config.metadata.{field} is empty")));
        }
        if !is_plain(value) {
            return Err(Error::invalid(format!("config.metadata.{field}: control characters in {value:?}")));
        }
    }
    Ok(m)
}

/// Checks the rest of the config and gives the namespaces it asks for.
pub fn namespaces(config: &PodSandboxConfig) -> Result<Namespaces> {
    let linux = config.linux.as_ref();
    let context = linux.and_then(|l| l.security_context.as_ref());
    let options = context.and_then(|c| c.namespace_options.as_ref()).cloned().unwrap_or_default();
    let field = "linux.security_context.namespace_options";
    let mode = |name: &str, value: protobuf::EnumOrUnknown<NamespaceMode>| {
        value.enum_value().map_err(|n| Error::invalid(format!("{field}.{name}: no namespace mode {n}")))
    };
    let two = |name: &str, value| match mode(name, value)? {
        NamespaceMode::POD => Ok(false),
        NamespaceMode::NODE => Ok(true),
        other => Err(Error::invalid(format!("{field}.{name}: expected POD or NODE, found {other:?}"))),
    };
    let pid = match mode("pid", options.pid)? {
        NamespaceMode::POD => PidMode::Sandbox,
        NamespaceMode::CONTAINER => PidMode::Container,
        NamespaceMode::NODE => PidMode::Node,
        NamespaceMode::TARGET => return Err(Error::invalid(format!("{field}.pid: TARGET is a container's mode, not a sandbox's"))),
    };
    let userns = match options.userns_options.as_ref() {
        Some(options) => user_namespace(options, &format!("{field}.userns_options"))?,
        None => None,
    };
    Ok(Namespaces { host_network: two("network", options.network)?, host_ipc: two("ipc", options.ipc)?, pid, userns })
}

/// The maps of mode POD, None with mode NODE. INVALID_ARGUMENT names what is wrong below `field`.
pub fn user_namespace(options: &UserNamespace, field: &str) -> Result<Option<IdMaps>> {
    match options.mode.enum_value() {
        Ok(NamespaceMode::POD) => {}
        Ok(NamespaceMode::NODE) => {
            return match options.uids.is_empty() && options.gids.is_empty() {
                true => Ok(None),
                false => Err(Error::invalid(format!("{field}: mappings, and mode NODE"))),
            };
        }
        Ok(other) => return Err(Error::invalid(format!("{field}.mode: expected POD or NODE, found {other:?}"))),
        Err(n) => return Err(Error::invalid(format!("{field}.mode: no namespace mode {n}"))),
    }
    let maps = IdMaps { uids: id_map(&options.uids, &format!("{field}.uids"))?, gids: id_map(&options.gids, &format!("{field}.gids"))? };
    if maps.uids.length != maps.gids.length {
        let (uids, gids) = (maps.uids.length, maps.gids.length);
        return Err(Error::invalid(format!("{field}.gids: {gids} ids are mapped, and {uids} of uids")));
    }
    Ok(Some(maps))
}

fn id_map(list: &[IDMapping], field: &str) -> Result<IdMap> {
    let [map] = list else {
        return Err(Error::invalid(format!("{field}: expected one mapping, found {}", list.len())));
    };
    let map = IdMap { container: map.container_id, host: map.host_id, length: map.length };
    if map.length == 0 {
        return Err(Error::invalid(format!("{field}: length is 0")));
    }
    if map.container != 0 {
        return Err(Error::invalid(format!("{field}: container_id 0 is not mapped")));
    }
    if !map.fits() {
        return Err(Error::invalid(format!("{field}: {} ids from {} on are more than there are", map.length, map.host)));
    }
    Ok(map)
}

/// What a default sysctl is in a sandbox: gids of a user namespace end with its map, and the kernel takes no others.
pub fn default_sysctl(path: &str, value: &str, ns: &Namespaces) -> String {
    match (path, ns.userns) {
        ("net/ipv4/ping_group_range", Some(maps)) => {
            let ends: Option<Vec<u32>> = value.split_whitespace().map(|end| end.parse().ok()).collect();
            match ends.as_deref() {
                // "1 0" means nobody.
                Some([first, last]) if first <= last => format!("{first} {}", (*last).min(maps.gids.length - 1)),
                _ => value.to_owned(),
            }
        }
        _ => value.to_owned(),
    }
}

/// The host name of the sandbox: its own, or the host's when it has none.
pub fn hostname(config: &PodSandboxConfig) -> Result<String> {
    let name = &config.hostname;
    if name.len() > HOSTNAME_LIMIT || !is_plain(name) || name.contains('/') {
        return Err(Error::invalid(format!("config.hostname: expected at most {HOSTNAME_LIMIT} printable bytes, found {name:?}")));
    }
    Ok(name.clone())
}

/// The sysctls to set, as paths below /proc/sys: only namespaced ones that the sandbox has a namespace for, `a.b` or `a/b`.
pub fn sysctls(linux: Option<&LinuxPodSandboxConfig>, ns: &Namespaces) -> Result<Vec<(String, String)>> {
    let Some(linux) = linux else { return Ok(Vec::new()) };
    let mut list = Vec::with_capacity(linux.sysctls.len());
    for (key, value) in &linux.sysctls {
        let path = sysctl_path(key)?;
        let (has, needs) = match sysctl_namespace(&path) {
            Some("net") => (!ns.host_network, "a network namespace of its own"),
            Some("ipc") => (!ns.host_ipc, "an IPC namespace of its own"),
            Some(_) => (!ns.host_network, "a UTS namespace of its own"),
            None => return Err(Error::invalid(format!("linux.sysctls: {key} is not namespaced, it would change the host"))),
        };
        if !has {
            return Err(Error::invalid(format!("linux.sysctls: {key} needs {needs}")));
        }
        if !is_plain(value) && value.trim_end_matches('\n').bytes().any(|b| b.is_ascii_control() && b != b'\t') {
            return Err(Error::invalid(format!("linux.sysctls: {key}: control characters in the value")));
        }
        list.push((path, value.clone()));
    }
    Ok(list)
}

/// `net.ipv4.ip_forward` or `net/ipv4/ip_forward` as a path. As in sysctl(8), the first separator found decides which one separates;
/// with slashes, a dot belongs to a name (interfaces such as eth0.100), with dots a slash does.
pub fn sysctl_path(key: &str) -> Result<String> {
    let bad = || Error::invalid(format!("linux.sysctls: {key:?} is not a sysctl name"));
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'/' | b'-' | b'_' | b'*' | b':' | b'@');
    if key.is_empty() || key.len() > 253 || !key.bytes().all(allowed) {
        return Err(bad());
    }
    let path = match key.find(['.', '/']).map(|i| key.as_bytes()[i]) {
        Some(b'.') => key
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => key.to_owned(),
    };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(bad());
    }
    Ok(path)
}

/// Which namespace a sysctl belongs to (kernel documentation, admin-guide/sysctl).
fn sysctl_namespace(path: &str) -> Option<&'static str> {
    const IPC: &[&str] = &[
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    match path {
        _ if path.starts_with("net/") => Some("net"),
        _ if path.starts_with("fs/mqueue/") || IPC.contains(&path) => Some("ipc"),
        "kernel/domainname" => Some("uts"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{LinuxSandboxSecurityContext, NamespaceOption};
    use protobuf::MessageField;

    const POD: Namespaces = Namespaces { host_network: false, host_ipc: false, pid: PidMode::Container, userns: None };
    const MAP: IdMap = IdMap { container: 0, host: 100_000, length: 65536 };

    fn config(options: NamespaceOption) -> PodSandboxConfig {
        let context = LinuxSandboxSecurityContext { namespace_options: MessageField::some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: MessageField::some(context), ..Default::default() };
        PodSandboxConfig { linux: MessageField::some(linux), ..Default::default() }
    }

    #[test]
    fn modes() {
        let ns = namespaces(&PodSandboxConfig::default()).unwrap();
        assert_eq!(ns, Namespaces { pid: PidMode::Sandbox, ..POD });
        let host = NamespaceOption { network: NamespaceMode::NODE.into(), pid: NamespaceMode::CONTAINER.into(), ..Default::default() };
        assert!(namespaces(&config(host)).unwrap().host_network);
        for bad in [
            NamespaceOption { network: NamespaceMode::CONTAINER.into(), ..Default::default() },
            NamespaceOption { pid: NamespaceMode::TARGET.into(), ..Default::default() },
            NamespaceOption { ipc: protobuf::EnumOrUnknown::from_i32(9), ..Default::default() },
        ] {
            assert_eq!(namespaces(&config(bad)).unwrap_err().code(), crate::error::Code::InvalidArgument);
        }
    }

    fn mapping(container_id: u32, host_id: u32, length: u32) -> IDMapping {
        IDMapping { container_id, host_id, length, ..Default::default() }
    }

    fn userns(uids: Vec<IDMapping>, gids: Vec<IDMapping>) -> UserNamespace {
        UserNamespace { mode: NamespaceMode::POD.into(), uids, gids, ..Default::default() }
    }

    #[test]
    fn user_namespaces_have_one_map_of_each_kind() {
        let good = userns(vec![mapping(0, 100_000, 65536)], vec![mapping(0, 200_000, 65536)]);
        let maps = IdMaps { uids: MAP, gids: IdMap { host: 200_000, ..MAP } };
        assert_eq!(user_namespace(&good, "f").unwrap(), Some(maps));
        let options = NamespaceOption { userns_options: MessageField::some(good.clone()), ..Default::default() };
        assert_eq!(namespaces(&config(options)).unwrap().userns, Some(maps));
        let node = UserNamespace { mode: NamespaceMode::NODE.into(), ..Default::default() };
        assert_eq!(user_namespace(&node, "f").unwrap(), None);

        let one = || vec![mapping(0, 100_000, 65536)];
        for (bad, field) in [
            (userns(vec![], one()), "f.uids"),
            (userns(one(), vec![]), "f.gids"),
            (userns(vec![mapping(0, 1, 1), mapping(1, 2, 1)], one()), "f.uids"),
            (userns(one(), vec![mapping(0, 100_000, 1000)]), "f.gids"),
            (userns(vec![mapping(1, 100_000, 65536)], one()), "f.uids"),
            (userns(one(), vec![mapping(0, 100_000, 0)]), "f.gids"),
            (userns(vec![mapping(0, u32::MAX - 10, 11)], vec![mapping(0, 1, 11)]), "f.uids"),
            (UserNamespace { mode: NamespaceMode::CONTAINER.into(), ..good.clone() }, "f.mode"),
            (UserNamespace { mode: NamespaceMode::TARGET.into(), ..good.clone() }, "f.mode"),
            (UserNamespace { mode: protobuf::EnumOrUnknown::from_i32(9), ..good.clone() }, "f.mode"),
            (UserNamespace { mode: NamespaceMode::NODE.into(), ..good.clone() }, "f: "),
        ] {
            let error = user_namespace(&bad, "f").unwrap_err();
            assert!(error.code() == crate::error::Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
    }

    #[test]
    fn the_default_ping_range_ends_with_the_map() {
        let mapped = Namespaces { userns: Some(IdMaps { uids: MAP, gids: MAP }), ..POD };
        let key = "net/ipv4/ping_group_range";
        assert_eq!(default_sysctl(key, "0 2147483647", &POD), "0 2147483647");
        assert_eq!(default_sysctl(key, "0 2147483647", &mapped), "0 65535");
        assert_eq!(default_sysctl(key, "5\t9", &mapped), "5 9");
        assert_eq!(default_sysctl(key, "1 0", &mapped), "1 0");
        assert_eq!(default_sysctl("net/ipv4/ip_unprivileged_port_start", "0", &mapped), "0");
    }

    #[test]
    fn sysctl_names() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/rp_filter").unwrap(), "net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.rp_filter").unwrap(), "net/ipv4/conf/eth0.1/rp_filter");
        for bad in ["", "net.+", "net..ipv4", "net/../kernel", "/net/a", "net.ipv4.", "a b", "net/./x"] {
            assert!(sysctl_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sysctls_need_their_namespace() {
        let with = |key: &str| LinuxPodSandboxConfig { sysctls: [(key.to_owned(), "1".to_owned())].into(), ..Default::default() };
        let host = Namespaces { host_network: true, host_ipc: true, ..POD };
        for key in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.domainname"] {
            assert_eq!(sysctls(Some(&with(key)), &POD).unwrap().len(), 1, "{key}");
            assert!(sysctls(Some(&with(key)), &host).is_err(), "{key}");
        }
        for key in ["kernel.panic", "vm.swappiness", "kernel.hostname", "kernel.shm_next_id"] {
            assert!(sysctls(Some(&with(key)), &POD).unwrap_err().message().contains("not namespaced"), "{key}");
        }
    }

    proptest::proptest! {
        /// Whatever is accepted is one the kernel takes, and maps root.
        #[test]
        fn accepted_maps_are_whole(raw in proptest::collection::vec((0u32..3, proptest::num::u32::ANY, proptest::num::u32::ANY), 0..3)) {
            let list: Vec<IDMapping> = raw.iter().map(|(c, h, l)| mapping(*c, *h, *l)).collect();
            if let Ok(Some(maps)) = user_namespace(&userns(list.clone(), list), "f") {
                proptest::prop_assert!(maps.uids.fits() && maps.uids.to_host(0) == Some(maps.uids.host));
                proptest::prop_assert!(maps.uids.host as u64 + maps.uids.length as u64 <= u32::MAX as u64);
            }
        }

        #[test]
        fn sysctl_paths_stay_below(key in "\\PC{0,40}") {
            if let Ok(path) = sysctl_path(&key) {
                proptest::prop_assert!(!path.starts_with('/') && !path.split('/').any(|p| p == ".." || p.is_empty()));
            }
        }
    }
}
