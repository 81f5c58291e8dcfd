//! What the kernel has.

use serde_json::json;

use super::{is_root, nearest, text, Finding, Known};
use crate::config::{Config, Snapshotter};
use crate::container::host;
use crate::snapshot;

const TOPIC: &str = "kernel";
/// pidfd_open(2) and clone3(2); Debian 11 has 5.10.
const OLDEST: (u32, u32) = (5, 3);

pub(super) fn look(config: &Config, known: Option<&Known>, findings: &mut Vec<Finding>) {
    let name = rustix::system::uname();
    let (release, machine) = (name.release().to_string_lossy(), name.machine().to_string_lossy());
    let found = format!("{release} {machine}");
    let data = json!({"release": release, "machine": machine});
    findings.push(
        match version(&release).is_none_or(|version| version >= OLDEST) {
            true => Finding::ok(TOPIC, "version", found),
            false => Finding::missing(TOPIC, "version", found, format!("a kernel of {}.{} or newer", OLDEST.0, OLDEST.1)),
        }
        .with(data),
    );
    let own;
    let facts = match known.map(|known| known.host) {
        Some(facts) => facts,
        None => match host::detect() {
            Ok(facts) => {
                own = facts;
                &own
            }
            Err(error) => return findings.push(Finding::missing(TOPIC, "facts", error.to_string(), "mount /proc and /sys")),
        },
    };
    findings.push(match facts.seccomp {
        true => Finding::ok(TOPIC, "seccomp", text("/proc/sys/kernel/seccomp/actions_avail")),
        false => Finding::warn(TOPIC, "seccomp", "no filters", "CONFIG_SECCOMP_FILTER: containers with RuntimeDefault are refused"),
    });
    findings.push(match facts.apparmor {
        true => Finding::ok(TOPIC, "apparmor", "enabled"),
        false => Finding::ok(TOPIC, "apparmor", "not enabled; containers that ask for a profile are refused"),
    });
    findings.push(match facts.selinux {
        true => Finding::ok(TOPIC, "selinux", if text("/sys/fs/selinux/enforce") == "1" { "enforcing" } else { "permissive" }),
        false => Finding::ok(TOPIC, "selinux", "not enabled; labels do not apply"),
    });
    user_namespaces(findings);
    for (name, first) in [("recursive read-only", (5, 12)), ("id-mapped mounts", (5, 12)), ("id-mapped overlay layers", (5, 19))] {
        findings.push(match version(&release).is_none_or(|version| version >= first) {
            true => Finding::ok(TOPIC, name, "yes"),
            false => {
                let hint = format!("a kernel of {}.{} or newer: what asks for it is refused, or copied", first.0, first.1);
                Finding::warn(TOPIC, name, "no", hint)
            }
        });
    }
    findings.push(match facts.swap_accounting {
        true => Finding::ok(TOPIC, "swap accounting", "yes"),
        false => Finding::warn(TOPIC, "swap accounting", "no", "boot with swapaccount=1: swap limits are left out otherwise"),
    });
    let sizes = facts.hugepage_sizes.join(" ");
    findings.push(match (facts.hugepage_sizes.is_empty(), facts.hugetlb_controller) {
        (true, _) => Finding::ok(TOPIC, "hugepages", "none"),
        (false, true) => Finding::ok(TOPIC, "hugepages", sizes),
        (false, false) => {
            Finding::warn(TOPIC, "hugepages", format!("{sizes}, not limited"), "mount the hugetlb cgroup controller: limits are refused")
        }
    });
    overlay(config, known, findings);
}

/// `6.18.0-1-amd64` -> (6, 18)
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn user_namespaces(findings: &mut Vec<Finding>) {
    let name = "user namespaces";
    let most = text("/proc/sys/user/max_user_namespaces").parse::<u64>().ok();
    findings.push(match (std::path::Path::new("/proc/self/ns/user").exists(), most) {
        (false, _) => Finding::warn(TOPIC, name, "none", "CONFIG_USER_NS: sandboxes that ask for one are refused"),
        (true, Some(0)) => Finding::warn(TOPIC, name, "none allowed", "sysctl -w user.max_user_namespaces=15000"),
        (true, most) => Finding::ok(TOPIC, name, most.map_or("yes".to_owned(), |most| format!("up to {most}"))).with(json!(most)),
    });
}

/// A small one is really mounted, where layers will be.
fn overlay(config: &Config, known: Option<&Known>, findings: &mut Vec<Finding>) {
    let copies = "every container gets a copy of its image";
    if config.snapshotter == Snapshotter::Copy {
        return findings.push(Finding::ok(TOPIC, "overlayfs", format!("not used: snapshotter = \"copy\", {copies}")));
    }
    let tried = match known {
        Some(known) if known.overlay => Ok(()),
        Some(_) => Err(copies.to_owned()),
        None if is_root() => snapshot::try_overlay(nearest(&config.root)).map_err(|error| error.to_string()),
        None => return findings.push(Finding::warn(TOPIC, "overlayfs", "not tried", "run crispd check as root")),
    };
    let hint = "the file system of root must carry one (ext4, xfs with ftype=1, no overlay itself), and the kernel have overlayfs";
    findings.push(match (tried, config.snapshotter) {
        (Ok(()), _) => Finding::ok(TOPIC, "overlayfs", format!("works in {}", config.root.display())),
        (Err(why), Snapshotter::Auto) => Finding::warn(TOPIC, "overlayfs", why, format!("{hint}; {copies} otherwise")),
        (Err(why), _) => Finding::missing(TOPIC, "overlayfs", why, hint),
    });
}
