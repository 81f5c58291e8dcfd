//! Which namespaces a container joins, makes, or shares with the host.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};

use super::{Inputs, UserNamespace};

/// The namespaces of the sandbox, as pinned on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespacePaths {
    /// None: the host's.
    pub user: Option<UserNamespace>,
    /// None: the host's.
    pub net: Option<PathBuf>,
    /// None: the host's.
    pub ipc: Option<PathBuf>,
    /// None: the host's.
    pub uts: Option<PathBuf>,
    pub pid: Pid,
}

/// The PID namespace of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pid {
    /// A new one: mode CONTAINER.
    #[default]
    Own,
    /// Mode NODE.
    Host,
    /// That of the sandbox's init (mode POD) or of another container (mode TARGET).
    Path(PathBuf),
}

pub(super) fn namespaces(inputs: &Inputs) -> Vec<LinuxNamespace> {
    let paths = inputs.namespaces;
    let mut list = vec![namespace(Type::Mount, None)];
    // The first: the others belong to it.
    list.extend(paths.user.as_ref().map(|user| namespace(Type::User, Some(&user.path))));
    let joined = [(Type::Network, &paths.net), (Type::Ipc, &paths.ipc), (Type::Uts, &paths.uts)];
    list.extend(joined.into_iter().filter_map(|(kind, path)| path.as_deref().map(|path| namespace(kind, Some(path)))));
    match &paths.pid {
        Pid::Own => list.push(namespace(Type::Pid, None)),
        Pid::Path(path) => list.push(namespace(Type::Pid, Some(path))),
        Pid::Host => {}
    }
    // v1 hierarchies are mounted per controller and peers show them whole; a privileged container manages the host's.
    if inputs.host.cgroup_v2 && !inputs.privileged() {
        list.push(namespace(Type::Cgroup, None));
    }
    list
}

fn namespace(kind: Type, path: Option<&Path>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path.map(Path::to_path_buf));
    namespace
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;

    fn of(fixture: &Fixture) -> Vec<(Type, Option<PathBuf>)> {
        namespaces(&fixture.inputs()).iter().map(|n| (n.typ(), n.path().clone())).collect()
    }

    #[test]
    fn sandbox_namespaces_are_joined_by_path() {
        let mut fixture = Fixture::new();
        fixture.namespaces = NamespacePaths {
            net: Some("/run/ns/net".into()),
            ipc: Some("/run/ns/ipc".into()),
            uts: Some("/run/ns/uts".into()),
            pid: Pid::Path("/proc/7/ns/pid".into()),
            user: None,
        };
        let list = of(&fixture);
        assert_eq!(list.len(), 5);
        assert!(list.contains(&(Type::Network, Some("/run/ns/net".into()))));
        assert!(list.contains(&(Type::Pid, Some("/proc/7/ns/pid".into()))));
        assert!(list.contains(&(Type::Mount, None)));
    }

    #[test]
    fn host_namespaces_have_no_entry() {
        let mut fixture = Fixture::new();
        fixture.namespaces = NamespacePaths { pid: Pid::Host, ..Default::default() };
        assert_eq!(of(&fixture), [(Type::Mount, None)]);
    }

    #[test]
    fn cgroup_namespace_on_v2_unless_privileged() {
        let mut fixture = Fixture::new();
        fixture.host.cgroup_v2 = true;
        assert!(of(&fixture).contains(&(Type::Cgroup, None)));
        fixture.set_privileged();
        assert!(!of(&fixture).contains(&(Type::Cgroup, None)));
    }
}
