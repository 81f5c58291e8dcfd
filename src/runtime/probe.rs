//! Whether an OCI runtime works on this host: it is asked for its version, then made to run a container whose only program is
//! the shim binary printing its own. A runtime may be installed and still refuse the host's cgroups. Then it is asked what it can
//! do; one that does not know the question (crun before 1.9) is tried with what others advertise.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::json;

use super::features::Features;
use super::handler::Handler;
use super::oci;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::process::{Output, Program};

/// Longest run of one command.
const LIMIT: Duration = Duration::from_secs(10);
/// Of the next probe in this process.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// What a runtime says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// `runc`, `crun`.
    pub name: String,
    /// `1.1.5`.
    pub version: String,
}

/// Proves that `handler` works: gives its version and features, else its own words about what is wrong. Works in a directory made
/// below `scratch` and leaves nothing.
pub fn probe(handler: &Handler, scratch: &Path, shim: &Path) -> Result<(Version, Features)> {
    let what = || format!("probe runtime {}", handler.name);
    if !shim.is_file() {
        return Err(Error::precondition(format!("{}: it is tried with crisp-shim, and {} is not there", what(), shim.display())));
    }
    let output = Program::new(&handler.path).arg("--version").run_ok(&Cancel::never(), LIMIT).context(what)?;
    let version = parse_version(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| Error::precondition(format!("{}: {} --version says no version", what(), handler.path.display())))?;
    try_container(handler, scratch, shim, |_, _| Ok(())).context(what)?;
    Ok((version, features(handler, scratch, shim)))
}

/// What it says of itself; from one that says nothing, what it does.
fn features(handler: &Handler, scratch: &Path, shim: &Path) -> Features {
    let asked = Program::new(&handler.path).args(oci::features()).run_ok(&Cancel::never(), LIMIT);
    match asked.and_then(|output| Features::parse(&output.stdout)) {
        Ok(features) => features,
        Err(e) => {
            log::debug!("runtime handler {}: it does not tell its features, so they are tried: {e}", handler.name);
            let mut features = Features::default();
            match try_container(handler, scratch, shim, with_user_namespace) {
                Ok(()) => drop(features.namespaces.insert("user".to_owned())),
                Err(e) => log::info!("runtime handler {}: no user namespaces: {e}", handler.name),
            }
            match try_container(handler, scratch, shim, with_recursive_read_only) {
                Ok(()) => drop(features.mount_options.insert("rro".to_owned())),
                Err(e) => log::info!("runtime handler {}: no recursive read-only mounts: {e}", handler.name),
            }
            features
        }
    }
}

/// The container gets a user namespace in which its root is somebody else.
fn with_user_namespace(spec: &mut serde_json::Value, dir: &Path) -> Result<()> {
    /// No file on the host is this user's.
    const HOST: u32 = 0x7ff0_0000;
    for made in [dir.to_owned(), dir.join("rootfs")] {
        std::os::unix::fs::chown(&made, Some(HOST), Some(HOST)).context(|| format!("set the owner of {}", made.display()))?;
    }
    let map = json!([{"containerID": 0, "hostID": HOST, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
        list.push(json!({"type": "user"}));
    }
    Ok(())
}

/// The container gets a tmpfs that is read-only with all below it. A runtime that does not know the word hands it to tmpfs, which
/// refuses it; a bind mount would be made all the same, and be writable below.
fn with_recursive_read_only(spec: &mut serde_json::Value, _: &Path) -> Result<()> {
    if let Some(list) = spec["mounts"].as_array_mut() {
        list.push(json!({"destination": "/rro", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64k", "rro"]}));
    }
    Ok(())
}

/// Runs a container whose spec is `change`d before (it also gets the bundle's directory), to its end.
fn try_container(
    handler: &Handler,
    scratch: &Path,
    shim: &Path,
    change: impl FnOnce(&mut serde_json::Value, &Path) -> Result<()>,
) -> Result<()> {
    // A name of the configuration becomes a file name and an id; daemons of one process must not meet in one cgroup.
    let plain: String = handler.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let id = format!("crisp-probe-{plain}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let dir = scratch.join(&id);
    file::remove_tree(&dir)?;
    let ran = run_in(handler, &dir, &id, shim, change);
    let cleaned = file::remove_tree(&dir);
    ran?;
    cleaned
}

fn run_in(
    handler: &Handler,
    dir: &Path,
    id: &str,
    shim: &Path,
    change: impl FnOnce(&mut serde_json::Value, &Path) -> Result<()>,
) -> Result<()> {
    file::make_dir(&dir.join("rootfs"), 0o700)?;
    // What it remembers goes with the directory.
    let handler = &Handler { root: dir.join("state"), ..handler.clone() };
    let cgroup = if handler.systemd_cgroup { format!("system.slice:crisp:{id}") } else { format!("/{id}") };
    let mut spec = spec(shim, &cgroup);
    change(&mut spec, dir)?;
    let spec = serde_json::to_vec(&spec).context(|| "write config.json")?;
    file::write(&dir.join("config.json"), &spec, 0o600, file::Durability::Atomic)?;
    let log = dir.join("log");
    // Not detached: its end is the container's end, and its stdout the container's.
    let mut args = oci::run(handler, &log, dir, &dir.join("pid"), None, id);
    args.retain(|a| a != "--detach");
    let result = oci::program(handler, args, dir).run(&Cancel::never(), LIMIT).and_then(|output| judge(&output, &log));
    let _ = oci::program(handler, oci::delete(handler, None, id), dir).run(&Cancel::never(), LIMIT);
    if let Ok(left) = Layout::detect().and_then(|layout| Cgroup::at(&layout, &cgroup)) {
        let _ = left.kill_all(Duration::from_secs(1));
        let _ = left.remove(Duration::from_secs(1));
    }
    result
}

fn judge(output: &Output, log: &Path) -> Result<()> {
    let log = file::read(log, 1 << 20).unwrap_or_default();
    if output.status.success() && output.stdout.starts_with(b"crisp-shim ") {
        return Ok(());
    }
    let words = oci::last_error(&String::from_utf8_lossy(&log))
        .or_else(|| oci::last_error(&String::from_utf8_lossy(&output.stderr)))
        .unwrap_or_else(|| "its container printed nothing".to_owned());
    Err(Error::precondition(format!("run a container: {}: {words}", output.describe())))
}

/// No network namespace and no proc: the program needs neither.
fn spec(shim: &Path, cgroup: &str) -> serde_json::Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["/crisp-shim", "--version"], "env": ["PATH=/"], "terminal": false,
            "noNewPrivileges": true},
        "root": {"path": "rootfs", "readonly": false},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/crisp-shim", "type": "bind", "source": shim, "options": ["bind", "ro"]},
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
        },
    })
}

/// The first line: `runc version 1.1.5+ds1`, `crun version 1.8.1`.
fn parse_version(text: &str) -> Option<Version> {
    let mut words = text.lines().next()?.split_whitespace();
    let (name, version) = (words.next()?, words.next_back()?);
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| Version { name: name.to_owned(), version: version.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Kind;

    #[test]
    fn version_lines() {
        let runc = parse_version("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\nspec: 1.0.2-dev\n").unwrap();
        assert_eq!((runc.name.as_str(), runc.version.as_str()), ("runc", "1.1.5+ds1"));
        assert_eq!(parse_version("crun version 1.8.1\n").unwrap().version, "1.8.1");
        assert_eq!(parse_version("usage: thing\n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn a_missing_runtime_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = "/nonexistent/crun".into();
        let handler = Handler { name: "crun".into(), path, root: dir.path().join("oci"), kind: Kind::Crun, systemd_cgroup: false };
        let error = probe(&handler, dir.path(), Path::new("/bin/true")).unwrap_err();
        assert!(error.message().starts_with("probe runtime crun: run /nonexistent/crun: "), "{error}");
        let error = probe(&handler, dir.path(), Path::new("/nonexistent/crisp-shim")).unwrap_err();
        assert!(error.message().contains("/nonexistent/crisp-shim is not there"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
