//! A registry of a test, and how images get into it.

use crate::daemon::{image, tool};
use crate::registry::Registry;

impl Registry {
    pub fn start() -> Registry {
        let dir = tempfile::tempdir().expect("make a directory");
        let data = dir.path().join("data");
        let mut registry = Registry::serving(&data);
        registry._storage = Some(dir);
        registry
    }

    /// Pushes an image of scripts/image; the reference to pull it by.
    pub fn push(&self, name: &str) -> String {
        let reference = format!("{}/{name}:1", self.host);
        let source = format!("oci-archive:{}", image(name).display());
        tool("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &source, &format!("docker://{reference}")]);
        reference
    }
}
