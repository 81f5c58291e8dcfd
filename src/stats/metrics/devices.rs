//! Names of block devices, as labels.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::sys::lock::{Rank, SharedLock};

/// Names asked for once. Devices come and go seldom; beyond this many the names are asked for again.
const KEPT: usize = 1024;

/// `/dev/NAME` by major and minor number.
pub struct Devices {
    names: SharedLock<HashMap<(u32, u32), Arc<str>>>,
}

impl Default for Devices {
    fn default() -> Devices {
        Devices { names: SharedLock::new(Rank::Leaf, HashMap::new()) }
    }
}

impl Devices {
    /// The name; `MAJOR:MINOR` for what is no block device with a name.
    pub fn name(&self, major: u32, minor: u32) -> Arc<str> {
        if let Some(name) = self.names.read().get(&(major, minor)) {
            return name.clone();
        }
        let found = ask(major, minor);
        let mut names = self.names.write();
        if names.len() >= KEPT {
            names.clear();
        }
        names.insert((major, minor), found.clone());
        found
    }
}

fn ask(major: u32, minor: u32) -> Arc<str> {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).unwrap_or_default();
    match uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")) {
        Some(name) => format!("/dev/{name}").into(),
        None => format!("{major}:{minor}").into(),
    }
}

/// Major and minor number of the device that `path` is on.
pub fn of(path: &Path) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::metadata(path).map_or(0, |m| m.dev());
    (rustix::fs::major(device), rustix::fs::minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let devices = Devices::default();
        assert_eq!(&*devices.name(0, 12345), "0:12345");
        let listed = std::fs::read_dir("/sys/dev/block").map(|l| l.flatten().next()).ok().flatten();
        if let Some(entry) = listed {
            let name = entry.file_name().into_string().unwrap();
            let (major, minor) = name.split_once(':').unwrap();
            let found = devices.name(major.parse().unwrap(), minor.parse().unwrap());
            assert!(found.starts_with("/dev/"), "{found}");
        }
    }
}
