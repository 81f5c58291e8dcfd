//! Whether containers can be limited, and by whom.

use serde_json::json;

use super::{is_root, text, Finding};
use crate::cgroup::{Layout, Mode};
use crate::config::Config;

const TOPIC: &str = "cgroups";

pub(super) fn look(config: &Config, findings: &mut Vec<Finding>) {
    let layout = match Layout::detect() {
        Ok(layout) => layout,
        Err(error) => {
            let hint = "mount the cgroup filesystem: mount -t cgroup2 none /sys/fs/cgroup";
            return findings.push(Finding::missing(TOPIC, "version", error.to_string(), hint));
        }
    };
    let mut controllers: Vec<String> = layout.hierarchies.iter().flat_map(|hierarchy| hierarchy.controllers.clone()).collect();
    if let Some(unified) = layout.v2() {
        let own = text(&unified.mount.join("cgroup.controllers").display().to_string());
        controllers.extend(own.split_ascii_whitespace().map(str::to_owned));
    }
    controllers.retain(|name| !name.starts_with("name="));
    controllers.sort();
    controllers.dedup();

    let version = match layout.mode {
        Mode::V1 => "v1",
        Mode::V2 => "v2",
        Mode::Hybrid => "v1, with a v2 tree beside it",
    };
    findings.push(Finding::ok(TOPIC, "version", version).with(json!({"v1": layout.mode != Mode::V2, "v2": layout.mode != Mode::V1})));

    let has = |name: &str| controllers.iter().any(|known| known == name);
    let data = json!(controllers);
    let needed: Vec<&str> = ["cpu", "cpuset", "memory", "pids"].into_iter().filter(|name| !has(name)).collect();
    findings.push(match needed.as_slice() {
        [] => Finding::ok(TOPIC, "controllers", controllers.join(" ")).with(data),
        lacking => {
            let hint = match lacking.contains(&"memory") {
                true => "boot with cgroup_enable=memory",
                false => "mount them, or enable them in cgroup.subtree_control of the parent",
            };
            Finding::warn(TOPIC, "controllers", format!("{}; not {}", controllers.join(" "), lacking.join(", ")), hint).with(data)
        }
    });

    if let Some(dir) = layout.v2().filter(|_| layout.mode == Mode::V2).or(layout.v1("memory")).or(layout.hierarchies.first()) {
        let writable = rustix::fs::access(&dir.mount, rustix::fs::Access::WRITE_OK).is_ok();
        findings.push(match (writable, is_root()) {
            (true, _) => Finding::ok(TOPIC, "writable", dir.mount.display().to_string()),
            (false, true) => Finding::missing(TOPIC, "writable", format!("{} is read-only", dir.mount.display()), "mount it writable"),
            (false, false) => Finding::warn(TOPIC, "writable", "not seen as this user", "run crispd check as root"),
        });
    }

    let systemd = std::path::Path::new("/run/systemd/system").is_dir();
    findings.push(match (config.systemd_cgroup, systemd) {
        (true, true) => Finding::ok(TOPIC, "driver", "systemd"),
        (true, false) => Finding::missing(TOPIC, "driver", "systemd, which does not run here", "set cgroup_driver = \"cgroupfs\""),
        (false, true) if layout.mode == Mode::V2 => {
            Finding::warn(TOPIC, "driver", "cgroupfs, and systemd manages the same tree", "set cgroup_driver = \"systemd\", in kubelet too")
        }
        (false, _) => Finding::ok(TOPIC, "driver", "cgroupfs"),
    });
}
