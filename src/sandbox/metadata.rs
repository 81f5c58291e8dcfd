//! What never changes about a sandbox. It is on disk before anything else is made.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sys::idmap::IdMaps;

/// PID mode of a sandbox's containers, unless a container asks for its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PidMode {
    /// One PID namespace for all; the sandbox's init is its PID 1.
    Sandbox,
    /// One PID namespace for each container.
    Container,
    /// The host's.
    Node,
}

/// Immutable facts, beside the config message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metadata {
    pub id: String,
    /// `<name>_<namespace>_<uid>_<attempt>`: one sandbox at a time has it.
    pub name: String,
    /// Name of the runtime handler as resolved; never empty.
    pub handler: String,
    /// The handler as it was asked for: "" is the default one.
    pub requested_handler: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// Network namespace pin; None: the host's network.
    pub netns: Option<PathBuf>,
    /// Whether the sandbox has an IPC namespace of its own.
    pub ipc: bool,
    pub pid: PidMode,
    /// Maps of its user namespace; None, and missing in older records: the host's.
    #[serde(default)]
    pub userns: Option<IdMaps>,
    pub hostname: String,
    /// Parent of the containers' cgroups, in the form of the cgroup driver.
    pub cgroup_parent: String,
    /// The parent is ours alone, to be removed with the sandbox.
    pub own_cgroup_parent: bool,
    /// SELinux level of its containers and files; "" without SELinux.
    #[serde(default)]
    pub selinux_level: String,
    /// `run/sandboxes/<id>`
    pub dir: PathBuf,
}

impl Metadata {
    /// Pin of the IPC namespace; None: the host's.
    pub fn ipc_pin(&self) -> Option<PathBuf> {
        self.ipc.then(|| self.dir.join("ns/ipc"))
    }

    /// Pin of the UTS namespace; None: the host's, which host network implies.
    pub fn uts_pin(&self) -> Option<PathBuf> {
        self.netns.is_some().then(|| self.dir.join("ns/uts"))
    }

    /// Pin of the user namespace; None: the host's.
    pub fn user_pin(&self) -> Option<PathBuf> {
        self.userns.map(|_| self.dir.join("ns/user"))
    }

    /// Who owns the sandbox's files on the host: the root that its containers see.
    pub fn root(&self) -> (u32, u32) {
        self.userns.map_or((0, 0), |maps| maps.root())
    }

    /// `/dev/shm` of the containers.
    pub fn shm(&self) -> PathBuf {
        if self.ipc {
            self.dir.join("shm")
        } else {
            Path::new("/dev/shm").to_owned()
        }
    }

    /// Where the sandbox keeps `hostname`, `hosts`, `resolv.conf`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What can be said of a sandbox whose record is lost: enough to undo it.
    pub fn orphan(id: &str, sandboxes: &Path, netns_dir: &Path) -> Metadata {
        Metadata {
            id: id.to_owned(),
            name: String::new(),
            handler: String::new(),
            requested_handler: String::new(),
            created_at: 0,
            netns: Some(netns_dir.join(format!("crisp-{id}"))),
            ipc: true,
            pid: PidMode::Container,
            userns: None,
            hostname: String::new(),
            cgroup_parent: format!("/crisp-{id}"),
            own_cgroup_parent: true,
            selinux_level: String::new(),
            dir: sandboxes.join(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record as the first versions wrote it.
    #[test]
    fn old_records_have_the_hosts_users() {
        let record = r#"{"id":"i","name":"n","handler":"crun","requested_handler":"","created_at":1,"netns":"/run/netns/crisp-i","ipc":true,
            "pid":"container","hostname":"h","cgroup_parent":"/c","own_cgroup_parent":false,"dir":"/run/crisp/sandboxes/i"}"#;
        let meta: Metadata = serde_json::from_str(record).unwrap();
        assert_eq!((meta.userns, meta.user_pin(), meta.root()), (None, None, (0, 0)));
        let again: Metadata = serde_json::from_str(&serde_json::to_string(&meta).unwrap()).unwrap();
        assert_eq!(again.id, "i");
    }
}
