//! What this host can do, found out once at start.

use std::path::Path;

use oci_spec::runtime::{Capabilities, PosixRlimitType};
use rustix::process::Resource;

use crate::error::{Context, Error, Result};
use crate::spec::security::BY_NUMBER;
use crate::spec::HostFacts;
use crate::sys::mount::{self, table, MountInfo};

const CGROUP: &str = "/sys/fs/cgroup";
/// CGROUP2_SUPER_MAGIC of linux/magic.h
const CGROUP2_MAGIC: i64 = 0x6367_7270;
const CAP_SYS_RESOURCE: u32 = 24;

const RLIMITS: [(PosixRlimitType, Resource); 16] = [
    (PosixRlimitType::RlimitCpu, Resource::Cpu),
    (PosixRlimitType::RlimitFsize, Resource::Fsize),
    (PosixRlimitType::RlimitData, Resource::Data),
    (PosixRlimitType::RlimitStack, Resource::Stack),
    (PosixRlimitType::RlimitCore, Resource::Core),
    (PosixRlimitType::RlimitRss, Resource::Rss),
    (PosixRlimitType::RlimitNproc, Resource::Nproc),
    (PosixRlimitType::RlimitNofile, Resource::Nofile),
    (PosixRlimitType::RlimitMemlock, Resource::Memlock),
    (PosixRlimitType::RlimitAs, Resource::As),
    (PosixRlimitType::RlimitLocks, Resource::Locks),
    (PosixRlimitType::RlimitSigpending, Resource::Sigpending),
    (PosixRlimitType::RlimitMsgqueue, Resource::Msgqueue),
    (PosixRlimitType::RlimitNice, Resource::Nice),
    (PosixRlimitType::RlimitRtprio, Resource::Rtprio),
    (PosixRlimitType::RlimitRttime, Resource::Rttime),
];

/// Looks at the machine and at this process.
pub fn detect() -> Result<HostFacts> {
    let status = text("/proc/self/status")?;
    let may_raise = capability_mask(&status, "CapEff")? & (1 << CAP_SYS_RESOURCE) != 0;
    let mounts = table()?;
    // i64 on some machines, u32 or u64 on others.
    let magic = rustix::fs::statfs(CGROUP).context(|| format!("look at {CGROUP}"))?.f_type as i64;
    let cgroup_v2 = magic == CGROUP2_MAGIC;
    Ok(HostFacts {
        cgroup_v2,
        cgroup_controllers: if cgroup_v2 { v2_controllers() } else { Vec::new() },
        cgroup_mounts: if cgroup_v2 { Vec::new() } else { cgroup_mounts(&mounts) },
        host_mounts: mounts.iter().map(|m| &m.target).filter(|target| is_taken_from_host(target)).cloned().collect(),
        bounding: capabilities(capability_mask(&status, "CapBnd")?),
        arch: std::env::consts::ARCH.to_owned(),
        oom_score_adj_floor: if may_raise { -1000 } else { own_oom_score_adj()? },
        hard_rlimits: if may_raise { Vec::new() } else { hard_rlimits() },
        swap_accounting: if cgroup_v2 { swap_on_v2() } else { swap_on_v1(&mounts) },
        hugepage_sizes: hugepage_sizes(),
        hugetlb_controller: if cgroup_v2 {
            v2_controllers().iter().any(|c| c == "hugetlb")
        } else {
            v1_hierarchy(&mounts, "hugetlb").is_some()
        },
        seccomp: Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
        kernel: kernel_version(&text("/proc/sys/kernel/osrelease")?)?,
        apparmor: apparmor(Path::new("/sys/module/apparmor/parameters/enabled"), Path::new("/sys/kernel/security/apparmor")),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        mount_setattr: mount::has_setattr(),
    })
}

/// Enabled, and its list of profiles can be read: in a container of another runtime it often cannot.
fn apparmor(enabled: &Path, files: &Path) -> bool {
    files.is_dir() && read(enabled).starts_with('Y')
}

/// `6.1.0-18-cloud-amd64` -> (6, 1)
fn kernel_version(release: &str) -> Result<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(Error::internal(format!("read the kernel's version: found {release:?}"))),
    }
}

/// Mount points that a container in a user namespace may have to take from the host.
fn is_taken_from_host(target: &Path) -> bool {
    target == Path::new("/dev/mqueue") || (target.starts_with("/sys") && target != Path::new("/sys"))
}

fn text(path: &str) -> Result<String> {
    std::fs::read_to_string(path).context(|| format!("read {path}"))
}

/// The text of a file that need not be there.
fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn capability_mask(status: &str, field: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .ok_or_else(|| Error::internal(format!("read /proc/self/status: no {field}")))
}

/// Capabilities newer than this program are left out: it cannot name them.
fn capabilities(mask: u64) -> Capabilities {
    BY_NUMBER.into_iter().enumerate().filter(|(number, _)| mask & (1 << number) != 0).map(|(_, capability)| capability).collect()
}

fn own_oom_score_adj() -> Result<i32> {
    let path = "/proc/self/oom_score_adj";
    text(path)?.trim().parse::<i32>().context(|| format!("read {path}"))
}

fn hard_rlimits() -> Vec<(PosixRlimitType, u64)> {
    RLIMITS.into_iter().filter_map(|(kind, resource)| Some((kind, rustix::process::getrlimit(resource).maximum?))).collect()
}

/// Mount points of hierarchies as OCI runtimes name them: as here, by the words of /proc/self/cgroup, or by controller. Those
/// of the kernel that are not mounted yet count too: they may be before the next container.
fn cgroup_mounts(mounts: &[MountInfo]) -> Vec<String> {
    let own = read("/proc/self/cgroup");
    let by_process = own.lines().filter_map(|line| line.split(':').nth(1)).map(|names| names.trim_start_matches("name=").to_owned());
    let kernel = read("/proc/cgroups");
    let by_kernel = kernel.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split('\t').next()).map(str::to_owned);
    let points = mounts.iter().filter(|m| m.fstype == "cgroup" || m.fstype == "cgroup2").filter_map(|m| m.target.file_name());
    let by_mount = points.map(|name| name.to_string_lossy().into_owned());
    let names: std::collections::BTreeSet<String> = by_process.chain(by_kernel).chain(by_mount).filter(|name| !name.is_empty()).collect();
    names.into_iter().collect()
}

fn v1_hierarchy<'a>(mounts: &'a [MountInfo], controller: &str) -> Option<&'a Path> {
    let found = mounts.iter().find(|m| m.fstype == "cgroup" && m.super_options.split(',').any(|option| option == controller));
    found.map(|m| m.target.as_path())
}

fn swap_on_v1(mounts: &[MountInfo]) -> bool {
    v1_hierarchy(mounts, "memory").is_some_and(|dir| dir.join("memory.memsw.limit_in_bytes").exists())
}

/// The root has no limits, so any cgroup below it is asked. With none to ask, a kernel with swap accounts it (since 6.1
/// always, before that unless it was told not to).
fn swap_on_v2() -> bool {
    let entries = std::fs::read_dir(CGROUP).into_iter().flatten().flatten().map(|entry| entry.path());
    let limited = |dir: &Path| dir.join("memory.max").exists();
    match entries.filter(|dir| limited(dir)).map(|dir| dir.join("memory.swap.max").exists()).next() {
        Some(answer) => answer,
        None => Path::new("/proc/swaps").exists(),
    }
}

fn v2_controllers() -> Vec<String> {
    read(Path::new(CGROUP).join("cgroup.controllers")).split_ascii_whitespace().map(str::to_owned).collect()
}

fn hugepage_sizes() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let mut sizes: Vec<String> = entries.filter_map(|entry| page_size(entry.file_name().to_str()?)).collect();
    sizes.sort();
    sizes
}

/// `hugepages-2048kB` -> `2MB`, the name in hugetlb.2MB.limit_in_bytes and in CRI.
fn page_size(directory: &str) -> Option<String> {
    let kib: u64 = directory.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kib {
        kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
        kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
        kib => format!("{kib}KB"),
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Capability;

    use super::*;

    #[test]
    fn capability_masks() {
        let status = "Name:\tx\nCapEff:\t0000000000000000\nCapBnd:\t0000000001000001\n";
        let bounding = capabilities(capability_mask(status, "CapBnd").unwrap());
        assert_eq!(bounding, [Capability::Chown, Capability::SysResource].into());
        assert_eq!(capability_mask(status, "CapEff").unwrap(), 0);
        assert!(capability_mask(status, "CapAmb").is_err());
        assert_eq!(capabilities(u64::MAX).len(), 41);
        assert_eq!(capabilities(1 << 40), [Capability::CheckpointRestore].into());
    }

    #[test]
    fn kernel_versions() {
        for (text, version) in [("6.1.0-18-cloud-amd64\n", (6, 1)), ("5.10", (5, 10)), ("4.8+", (4, 8))] {
            assert_eq!(kernel_version(text).unwrap(), version);
        }
        for bad in ["", "six", "6", "6.x"] {
            assert!(kernel_version(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn apparmor_needs_to_be_enabled_and_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (enabled, files) = (dir.path().join("enabled"), dir.path().join("apparmor"));
        std::fs::write(&enabled, "Y\n").unwrap();
        assert!(!apparmor(&enabled, &files));
        std::fs::create_dir(&files).unwrap();
        assert!(apparmor(&enabled, &files));
        std::fs::write(&enabled, "N\n").unwrap();
        assert!(!apparmor(&enabled, &files));
        assert!(!apparmor(Path::new("/nonexistent"), &files));
    }

    #[test]
    fn page_sizes_are_named_as_cgroup_files() {
        let names =
            ["hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "hugepages-16777216kB"].map(|name| page_size(name).unwrap());
        assert_eq!(names, ["2MB", "1GB", "64KB", "16GB"]);
        assert_eq!(page_size("hugepages-xkB"), None);
    }

    #[test]
    fn this_host_is_understood() {
        let host = detect().unwrap();
        assert!(host.cgroup_mounts.is_empty() == host.cgroup_v2);
        let v1 = table().unwrap().into_iter().filter(|m| m.fstype == "cgroup").filter_map(|m| m.target.file_name().map(|n| n.to_owned()));
        assert!(v1.into_iter().all(|name| host.cgroup_v2 || host.cgroup_mounts.iter().any(|found| name == found.as_str())));
        assert!(!host.bounding.is_empty() && host.seccomp);
        assert!((-1000..=1000).contains(&host.oom_score_adj_floor));
        assert!(host.hard_rlimits.iter().all(|(_, hard)| *hard < u64::MAX));
    }
}
