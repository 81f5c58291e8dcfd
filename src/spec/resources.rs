//! cgroup limits, classes and device rules of a container.

/// CPU and memory.
mod limits;
/// Files of cgroup v2.
mod unified;
/// Limits of huge pages.
mod hugepages;
/// Changes of a container that is there.
pub mod update;

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxBlockIo, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType as Kind, LinuxIntelRdt, LinuxPids, LinuxResources};

use super::{userns, HostFacts, Inputs};
use crate::api::runtime::LinuxContainerResources;
use crate::error::Result;

/// A device of the host, ready for a container (`container::devices`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedDevice {
    /// Where the container sees it.
    pub path: PathBuf,
    /// Where the host has it, without links.
    pub host_path: PathBuf,
    pub block: bool,
    pub major: i64,
    pub minor: i64,
    /// Permission bits of the node.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Some of r, w and m.
    pub access: String,
}

/// What the classes that annotations ask for mean on this host (`container::classes`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Classes {
    /// Weights and throttles of a block I/O class.
    pub block_io: Option<LinuxBlockIo>,
    /// The group of resctrl that is an RDT class.
    pub rdt: Option<String>,
}

/// May be used by each container, whatever was asked: null, zero, full, tty, random, urandom, console's slaves and ptmx, which are there;
/// and net/tun, whose node a VPN makes or mounts, and which does nothing without CAP_NET_ADMIN. runc allows that one by itself, crun does not.
const USUAL_DEVICES: [(i64, Option<i64>); 9] =
    [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(2)), (10, Some(200)), (136, None)];

pub(super) fn resources(inputs: &Inputs, warnings: &mut Vec<String>) -> Result<LinuxResources> {
    let asked = &inputs.config.linux.resources;
    let mut all = LinuxResources::default();
    apply(&mut all, asked, inputs.host, warnings)?;
    if let Some(cpu) = all.cpu_mut().as_mut().filter(|cpu| cpu.quota() == Some(-1)) {
        // What a new cgroup has; crun cannot write it on v1.
        cpu.set_quota(None);
    }
    all.set_hugepage_limits(hugepages::merge(&[], hugepages::limits(asked, inputs.host)?));
    all.set_devices(Some(device_rules(inputs)));
    all.set_block_io(inputs.classes.block_io.clone());
    if let Some(limit) = inputs.defaults.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        all.set_pids(Some(pids));
    }
    Ok(all)
}

/// The RDT class.
pub(super) fn rdt(classes: &Classes) -> Option<LinuxIntelRdt> {
    let group = classes.rdt.as_ref()?;
    let mut rdt = LinuxIntelRdt::default();
    rdt.set_clos_id(Some(group.clone()));
    Some(rdt)
}

/// cpu, memory and unified of a request over what is there.
fn apply(all: &mut LinuxResources, asked: &LinuxContainerResources, host: &HostFacts, warnings: &mut Vec<String>) -> Result<()> {
    if let Some(unified) = unified::unified(asked, host)? {
        all.unified_mut().get_or_insert_with(HashMap::new).extend(unified);
    }
    limits::apply_cpu(all, asked)?;
    limits::apply_memory(all, asked, host, warnings)
}

/// Whether these could be the resources of anything on any host: numbers, lists and names in their form. For what a sandbox is told
/// about the sum of its containers.
pub fn check(resources: &LinuxContainerResources) -> Result<()> {
    let mut all = LinuxResources::default();
    limits::apply_cpu(&mut all, resources)?;
    limits::check_memory(resources)?;
    super::process::check_oom_score_adj(resources.oom_score_adj)?;
    resources.unified.iter().try_for_each(|(key, value)| unified::check(key, value).map(drop))
}

/// Nothing but the usual ones and those asked for; everything for a privileged container. Making nodes is the business of
/// CAP_MKNOD: a node without a rule cannot be opened.
fn device_rules(inputs: &Inputs) -> Vec<LinuxDeviceCgroup> {
    if inputs.privileged() {
        return vec![rule(true, None, None, None, "rwm")];
    }
    let mut rules = vec![rule(false, None, None, None, "rwm"), rule(true, Some(Kind::C), None, None, "m")];
    rules.push(rule(true, Some(Kind::B), None, None, "m"));
    rules.extend(USUAL_DEVICES.map(|(major, minor)| rule(true, Some(Kind::C), Some(major), minor, "rwm")));
    rules
        .extend(inputs.devices.iter().map(|device| rule(true, Some(kind(device)), Some(device.major), Some(device.minor), &device.access)));
    rules
}

fn rule(allow: bool, kind: Option<Kind>, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_typ(kind).set_major(major).set_minor(minor).set_access(Some(access.to_owned()));
    rule
}

/// The nodes to make in the container's /dev: those that are not bound from the host.
pub(super) fn device_nodes(inputs: &Inputs) -> Vec<LinuxDevice> {
    let node = |device: &ResolvedDevice| {
        let mut node = LinuxDevice::default();
        node.set_path(device.path.clone())
            .set_typ(kind(device))
            .set_major(device.major)
            .set_minor(device.minor)
            .set_file_mode(Some(device.mode))
            .set_uid(Some(device.uid))
            .set_gid(Some(device.gid));
        node
    };
    inputs.devices.iter().filter(|device| !userns::binds_device(inputs, &device.path)).map(node).collect()
}

fn kind(device: &ResolvedDevice) -> Kind {
    match device.block {
        true => Kind::B,
        false => Kind::C,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;
    use crate::api::runtime::HugepageLimit;
    use crate::error::Code;

    pub(super) fn resources_of(fixture: &mut Fixture) -> LinuxResources {
        fixture.build().0.linux().clone().unwrap().resources().clone().unwrap()
    }

    pub(super) fn page_limit(size: &str, limit: u64) -> HugepageLimit {
        HugepageLimit { page_size: size.into(), limit, ..Default::default() }
    }

    #[test]
    fn nothing_asked_sets_nothing_but_devices() {
        let resources = resources_of(&mut Fixture::new());
        assert!(resources.cpu().is_none() && resources.memory().is_none() && resources.pids().is_none());
        assert!(resources.unified().is_none() && resources.hugepage_limits().is_none() && resources.block_io().is_none());
    }

    #[test]
    fn classes_reach_the_spec() {
        let mut fixture = Fixture::new();
        assert!(fixture.build().0.linux().as_ref().unwrap().intel_rdt().is_none());
        let mut block_io = LinuxBlockIo::default();
        block_io.set_weight(Some(80));
        fixture.classes = Classes { block_io: Some(block_io), rdt: Some("gold".into()) };
        let linux = fixture.build().0.linux().clone().unwrap();
        assert_eq!(linux.resources().as_ref().unwrap().block_io().as_ref().unwrap().weight(), Some(80));
        assert_eq!(serde_json::to_value(linux.intel_rdt()).unwrap(), serde_json::json!({"closID": "gold"}));
    }

    #[test]
    fn resources_of_a_sandbox_are_checked_for_their_form_alone() {
        let mut good = LinuxContainerResources { memory_limit_in_bytes: 5, cpu_shares: 2, oom_score_adj: -999, ..Default::default() };
        good.unified.insert("memory.high".into(), "7".into());
        good.hugepage_limits = vec![page_limit("64KB", 1)];
        check(&good).unwrap();
        type Change = fn(&mut LinuxContainerResources);
        let cases: [(&str, Change); 5] = [
            ("cpu_shares", |r| r.cpu_shares = -1),
            ("cpuset_mems", |r| r.cpuset_mems = "a".into()),
            ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -5),
            ("oom_score_adj", |r| r.oom_score_adj = 1001),
            ("unified", |r| drop(r.unified.insert("a/b".into(), "1".into()))),
        ];
        for (field, change) in cases {
            let mut bad = good.clone();
            change(&mut bad);
            let error = check(&bad).unwrap_err();
            assert!(error.code() == Code::InvalidArgument && error.message().starts_with(field), "{error}");
        }
    }

    fn device(path: &str) -> ResolvedDevice {
        let (path, host_path) = (path.into(), "/dev/loop1".into());
        ResolvedDevice { path, host_path, block: true, major: 7, minor: 1, mode: 0o660, uid: 0, gid: 6, access: "r".into() }
    }

    #[test]
    fn devices_are_denied_but_for_the_usual_and_the_requested() {
        let mut fixture = Fixture::new();
        fixture.devices = vec![device("/dev/loop1")];
        let (spec, _) = fixture.build();
        let linux = spec.linux().clone().unwrap();
        let rules: Vec<_> = linux.resources().clone().unwrap().devices().clone().unwrap();
        let text: Vec<_> = rules.iter().map(|r| format!("{} {r}", r.allow())).collect();
        assert_eq!(text[0], "false a *:* rwm");
        assert!(text.contains(&"true c 1:3 rwm".to_string()) && text.contains(&"true c 136:* rwm".to_string()));
        assert!(text.contains(&"true c 10:200 rwm".to_string()), "whichever OCI runtime: {text:?}");
        assert_eq!(text.last().unwrap(), "true b 7:1 r");
        let node = &linux.devices().clone().unwrap()[0];
        assert_eq!((node.path().to_str(), node.typ(), node.file_mode(), node.gid()), (Some("/dev/loop1"), Kind::B, Some(0o660), Some(6)));
    }

    /// What is bound, in order, and the nodes.
    fn devices_of(fixture: &mut Fixture) -> (Vec<(PathBuf, PathBuf)>, Vec<PathBuf>) {
        let spec = fixture.build().0;
        let mounts = spec.mounts().clone().unwrap_or_default().into_iter();
        let bound = mounts.filter(|m| m.source().as_deref() == Some("/dev/loop1".as_ref()));
        let bound = bound.map(|m| (m.destination().clone(), m.source().clone().unwrap())).collect();
        let nodes = spec.linux().clone().unwrap().devices().clone().unwrap_or_default();
        (bound, nodes.iter().map(|node| node.path().clone()).collect())
    }

    #[test]
    fn devices_of_a_user_namespace_are_bound_but_for_the_runtimes_own() {
        let mut fixture = Fixture::new();
        fixture.devices = ["/dev/loop1", "/dev/given/loop", "/dev/tty", "/dev/null"].map(device).to_vec();
        assert_eq!(
            devices_of(&mut fixture),
            (vec![], ["/dev/loop1", "/dev/given/loop", "/dev/tty", "/dev/null"].map(PathBuf::from).to_vec())
        );
        fixture.set_user_namespace();
        let bound = ["/dev/loop1", "/dev/given/loop"].map(|path| (PathBuf::from(path), PathBuf::from("/dev/loop1")));
        assert_eq!(devices_of(&mut fixture), (bound.to_vec(), ["/dev/tty", "/dev/null"].map(PathBuf::from).to_vec()));
        let rules = resources_of(&mut fixture).devices().clone().unwrap();
        assert_eq!(rules.iter().filter(|rule| rule.major() == Some(7)).count(), 4, "they may be used all the same");
        // A mount of the request over one of them covers it, and the host's /dev needs none.
        fixture.mount("/dev/given/loop", "/srv");
        assert_eq!(devices_of(&mut fixture).0, bound[..1]);
        fixture.mount("/dev", "/dev");
        assert_eq!(devices_of(&mut fixture).0, []);
    }

    #[test]
    fn privileged_may_use_every_device() {
        let mut fixture = Fixture::new();
        fixture.set_privileged();
        let rules = resources_of(&mut fixture).devices().clone().unwrap();
        assert_eq!(rules.iter().map(|r| format!("{} {r}", r.allow())).collect::<Vec<_>>(), ["true a *:* rwm"]);
    }
}
