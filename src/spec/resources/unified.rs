//! `unified`: files of the container's own cgroup, on v2 alone.

use std::collections::HashMap;

use super::super::HostFacts;
use crate::api::runtime::LinuxContainerResources;
use crate::error::{Error, Result};

/// Files of the cgroup core that limit something. The others of it move processes, kill or freeze them.
const CORE: [&str; 3] = ["cgroup.max.depth", "cgroup.max.descendants", "cgroup.pressure"];

/// The files of a request, each checked: a plain name, of a controller that this host has, a value of one line.
pub(super) fn unified(asked: &LinuxContainerResources, host: &HostFacts) -> Result<Option<HashMap<String, String>>> {
    if asked.unified.is_empty() {
        return Ok(None);
    }
    if !host.cgroup_v2 {
        return Err(Error::precondition("unified: this host has cgroup v1"));
    }
    let mut all = HashMap::new();
    for (key, value) in &asked.unified {
        let controller = check(key, value)?;
        if controller != "cgroup" && !host.cgroup_controllers.iter().any(|known| known == controller) {
            return Err(Error::precondition(format!("unified: {key}: this host has no cgroup controller {controller:?}")));
        }
        all.insert(key.clone(), value.clone());
    }
    Ok(Some(all))
}

/// The controller of a file; an error when name or value cannot be those of one.
pub(super) fn check<'a>(key: &'a str, value: &str) -> Result<&'a str> {
    let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    let parts = key.split_once('.').filter(|(controller, file)| plain && !controller.is_empty() && !file.is_empty());
    let Some((controller, _)) = parts else { return Err(Error::invalid(format!("unified: {key:?} is not a cgroup file"))) };
    if controller == "cgroup" && !CORE.contains(&key) {
        return Err(Error::invalid(format!("unified: {key} is not a limit")));
    }
    if value.is_empty() || value.bytes().any(|b| b.is_ascii_control()) {
        return Err(Error::invalid(format!("unified: {key}: expected one line, found {value:?}")));
    }
    Ok(controller)
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::Fixture;
    use super::super::tests::resources_of;
    use crate::error::Code;

    fn with(key: &str, value: &str) -> Fixture {
        let mut fixture = Fixture::new();
        fixture.set_v2();
        fixture.resources().unified.insert(key.into(), value.into());
        fixture
    }

    #[test]
    fn files_of_known_controllers_are_taken() {
        for key in ["memory.high", "cpu.max.burst", "hugetlb.2MB.rsvd.max", "io.bfq.weight", "cgroup.max.descendants"] {
            let resources = resources_of(&mut with(key, "7"));
            assert_eq!(resources.unified().as_ref().unwrap()[key], "7");
        }
    }

    #[test]
    fn v1_has_none() {
        let mut fixture = with("memory.high", "7");
        fixture.host.cgroup_v2 = false;
        let error = fixture.error();
        assert_eq!((error.code(), error.message()), (Code::FailedPrecondition, "unified: this host has cgroup v1"));
    }

    #[test]
    fn names_and_values_that_are_none() {
        for bad in ["../memory.high", "memory", "a/b.c", "..", "", ".max", "memory.", "memory.high\n", "memory.high /x"] {
            let error = with(bad, "7").error();
            assert!(error.code() == Code::InvalidArgument && error.message().contains("is not a cgroup file"), "{bad:?}: {error}");
        }
        for bad in ["cgroup.procs", "cgroup.kill", "cgroup.freeze", "cgroup.subtree_control", "cgroup.type"] {
            assert!(with(bad, "1").error().message().contains("is not a limit"), "{bad}");
        }
        for bad in ["", "1\n2", "a\0"] {
            let error = with("memory.high", bad).error();
            assert!(error.code() == Code::InvalidArgument && error.message().contains("memory.high"), "{bad:?}: {error}");
        }
    }

    #[test]
    fn controllers_that_the_host_lacks() {
        let error = with("rdma.max", "mlx4_0 hca_handle=2").error();
        assert!(error.code() == Code::FailedPrecondition && error.message().contains("rdma"), "{error}");
    }
}
