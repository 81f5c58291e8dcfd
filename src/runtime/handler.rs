//! Runtime handlers: the OCI runtimes of the configuration, by name.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which program it is: they differ in what they can do beyond the OCI command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Crun,
    Runc,
    Other,
}

/// An OCI runtime and how to call it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handler {
    /// The name that CRI's runtime_handler asks for.
    pub name: String,
    /// The program.
    pub path: PathBuf,
    /// Where the runtime keeps its own state (`--root`).
    pub root: PathBuf,
    pub kind: Kind,
    /// Cgroup paths are `slice:prefix:name` and systemd makes them.
    #[serde(default)]
    pub systemd_cgroup: bool,
}
