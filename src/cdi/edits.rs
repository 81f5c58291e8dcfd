//! Edits of an OCI spec, in the order and with the defaults of the other runtimes that know CDI.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Hook as OciHook, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType as Kind, LinuxIntelRdt, LinuxNamespaceType, Mount as OciMount,
    Process, Spec,
};

use super::document::{Edits, Hook, IntelRdt, Mount, Node};
use crate::error::{Context, Error, Result};
use crate::hooks;
use crate::spec::userns;

/// Makes the edits. FAILED_PRECONDITION for what this host or the runtimes do not have.
pub(super) fn apply(edits: &Edits, spec: &mut Spec) -> Result<()> {
    if !edits.net_devices.is_empty() {
        return Err(Error::precondition("netDevices: OCI runtimes of runtime-spec 1.3 alone move them"));
    }
    if let Some(process) = spec.process_mut() {
        variables(&edits.env, process);
        groups(&edits.additional_gids, process);
    }
    for node in &edits.device_nodes {
        device(node, spec).context(|| format!("deviceNodes: {}", node.path))?;
    }
    for asked in &edits.mounts {
        mount(asked, spec);
    }
    for asked in &edits.hooks {
        hooks::add(spec, &asked.hook_name, hook(asked));
    }
    if let Some(asked) = &edits.intel_rdt {
        let rdt = intel_rdt(asked)?;
        spec.linux_mut().get_or_insert_with(Default::default).set_intel_rdt(Some(rdt));
    }
    Ok(())
}

/// Parents before children, otherwise as they are.
pub(super) fn order_mounts(spec: &mut Spec) {
    if let Some(mounts) = spec.mounts_mut() {
        mounts.sort_by_key(|mount| mount.destination().components().count());
    }
}

/// A variable that is there gets the new value in its place.
fn variables(added: &[String], process: &mut Process) {
    let env = process.env_mut().get_or_insert_with(Vec::new);
    for variable in added {
        let name = |text: &str| text.split('=').next().unwrap_or_default().to_owned();
        match env.iter_mut().find(|old| name(old) == name(variable)) {
            Some(old) => old.clone_from(variable),
            None => env.push(variable.clone()),
        }
    }
}

fn groups(added: &[u32], process: &mut Process) {
    let mut user = process.user().clone();
    let mut gids = user.additional_gids().clone().unwrap_or_default();
    for gid in added {
        if *gid != 0 && !gids.contains(gid) {
            gids.push(*gid);
        }
    }
    user.set_additional_gids(Some(gids).filter(|gids| !gids.is_empty()));
    process.set_user(user);
}

/// A node, which replaces one of the same path, and the rule that lets it be used. In a user namespace it is the host's, with the host's
/// owner and mode, for none can be made there.
fn device(node: &Node, spec: &mut Spec) -> Result<()> {
    let (kind, major, minor) = numbers(node)?;
    let path = PathBuf::from(&node.path);
    let in_user_namespace = has_user_namespace(spec);
    let bound = match in_user_namespace && userns::may_be_bound(&path) {
        true => of_host(node, kind, major, minor),
        false => None,
    };
    // What runtimes take for none, but for crun before it enters a user namespace: nobody could open it.
    let usual_mode = in_user_namespace.then_some(0o666);
    let user = spec.process().as_ref().map(|process| (process.user().uid(), process.user().gid())).unwrap_or_default();
    let owner = |given: Option<u32>, own: u32| given.or(Some(own).filter(|own| *own != 0));
    let mut made = LinuxDevice::default();
    made.set_path(PathBuf::from(&node.path))
        .set_typ(kind)
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(node.file_mode.or(usual_mode))
        .set_uid(owner(node.uid, user.0))
        .set_gid(owner(node.gid, user.1));

    if let Some(host_path) = &bound {
        place(userns::device_bind(&path, host_path), spec);
    }
    let linux = spec.linux_mut().get_or_insert_with(Default::default);
    let devices = linux.devices_mut().get_or_insert_with(Vec::new);
    devices.retain(|device| device.path() != made.path());
    if bound.is_none() {
        devices.push(made);
    }
    if kind == Kind::P {
        return Ok(());
    }
    let access = match node.permissions.as_str() {
        "none" => return Ok(()),
        "" => "rwm",
        some => some,
    };
    let mut rule = LinuxDeviceCgroup::default();
    let typ = if kind == Kind::B { Kind::B } else { Kind::C };
    rule.set_allow(true).set_typ(Some(typ)).set_major(Some(major)).set_minor(Some(minor)).set_access(Some(access.to_owned()));
    linux.resources_mut().get_or_insert_with(Default::default).devices_mut().get_or_insert_with(Vec::new).push(rule);
    Ok(())
}

fn has_user_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}

/// Where the host has this very device; None: a number of the spec file's own, or a FIFO.
fn of_host(node: &Node, kind: Kind, major: i64, minor: i64) -> Option<PathBuf> {
    let path = Path::new(host_path(node)).canonicalize().ok()?;
    let meta = path.metadata().ok()?;
    let same = match kind {
        Kind::B => meta.file_type().is_block_device(),
        Kind::C | Kind::U => meta.file_type().is_char_device(),
        _ => false,
    };
    (same && (major, minor) == (rustix::fs::major(meta.rdev()).into(), rustix::fs::minor(meta.rdev()).into())).then_some(path)
}

fn host_path(node: &Node) -> &str {
    if node.host_path.is_empty() {
        &node.path
    } else {
        &node.host_path
    }
}

/// Type, major and minor: the file's own, and what it leaves out from the host's device.
fn numbers(node: &Node) -> Result<(Kind, i64, i64)> {
    let given = match node.kind.as_str() {
        "b" => Some(Kind::B),
        "c" => Some(Kind::C),
        "u" => Some(Kind::U),
        "p" => Some(Kind::P),
        _ => None,
    };
    match given {
        Some(Kind::P) => return Ok((Kind::P, 0, 0)),
        Some(kind) if node.major != 0 => return Ok((kind, node.major, node.minor)),
        _ => {}
    }
    let path = Path::new(host_path(node));
    let what = || format!("look at device {}", path.display());
    let meta = path.metadata().map_err(|error| Error::precondition(format!("{}: {error}", what())))?;
    let kind = meta.file_type();
    let found = match () {
        () if kind.is_block_device() => Kind::B,
        () if kind.is_char_device() => Kind::C,
        () if kind.is_fifo() => Kind::P,
        () => return Err(Error::precondition(format!("{}: it is none", what()))),
    };
    let same = given.is_none_or(|kind| kind == found || (kind == Kind::U && found == Kind::C));
    if !same {
        return Err(Error::precondition(format!("{}: its type is not {}", what(), node.kind)));
    }
    match (found, node.major) {
        (Kind::P, _) => Ok((found, 0, 0)),
        (_, 0) => Ok((given.unwrap_or(found), rustix::fs::major(meta.rdev()).into(), rustix::fs::minor(meta.rdev()).into())),
        (_, major) => Ok((given.unwrap_or(found), major, node.minor)),
    }
}

/// A mount, which replaces those of the same place.
fn mount(asked: &Mount, spec: &mut Spec) {
    let kind = if asked.kind.is_empty() { "bind" } else { &asked.kind };
    let mut options = asked.options.clone();
    if kind == "bind" && !options.iter().any(|option| option == "bind" || option == "rbind") {
        options.push("rbind".to_owned());
    }
    let readonly = options.iter().any(|option| option == "ro");
    let destination = PathBuf::from(&asked.container_path);
    let mut made = OciMount::default();
    made.set_destination(destination.clone())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(PathBuf::from(&asked.host_path)))
        .set_options(Some(options));
    place(made, spec);

    // crun copies what is mounted below a read-only path before it makes that read-only (see `spec::security`).
    if let Some(paths) = spec.linux_mut().as_mut().and_then(|linux| linux.readonly_paths_mut().as_mut()) {
        if readonly && paths.iter().any(|path| destination.starts_with(path)) {
            paths.push(asked.container_path.clone());
        }
    }
}

fn place(made: OciMount, spec: &mut Spec) {
    let mounts = spec.mounts_mut().get_or_insert_with(Vec::new);
    mounts.retain(|mount| mount.destination() != made.destination());
    mounts.push(made);
}

fn hook(asked: &Hook) -> OciHook {
    let mut hook = OciHook::default();
    hook.set_path(PathBuf::from(&asked.path)).set_args(asked.args.clone()).set_env(asked.env.clone()).set_timeout(asked.timeout);
    hook
}

fn intel_rdt(asked: &IntelRdt) -> Result<LinuxIntelRdt> {
    if asked.schemata.is_some() || asked.enable_monitoring.is_some() {
        return Err(Error::precondition("intelRdt: schemata and enableMonitoring: OCI runtimes of runtime-spec 1.3 alone set them"));
    }
    // No way to say these without the words the type calls deprecated.
    if asked.enable_cmt == Some(true) || asked.enable_mbm == Some(true) {
        return Err(Error::precondition("intelRdt: enableCMT and enableMBM: monitoring groups are not made"));
    }
    let mut rdt = LinuxIntelRdt::default();
    rdt.set_clos_id(asked.clos_id.clone())
        .set_l3_cache_schema(asked.l3_cache_schema.clone())
        .set_mem_bw_schema(asked.mem_bw_schema.clone());
    Ok(rdt)
}
