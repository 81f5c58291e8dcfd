//! Directories of spec files, and what injection makes of a spec.

use std::path::Path;
use std::time::Duration;

use serde_json::{json, Value};

use super::*;
use crate::api::runtime::{CDIDevice, ContainerConfig};
use crate::error::Code;

struct Host {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Host {
    fn new() -> Host {
        let (dir, dirs) = file::priorities();
        Host { dir, registry: Registry::new(dirs) }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// A file with one device, whose mark is a variable.
    fn define(&self, file: &str, device: &str, mark: &str) {
        let edits = json!({"env": [format!("MARK={mark}")]});
        let spec = json!({"cdiVersion": "0.6.0", "kind": "v.com/c", "devices": [{"name": device, "containerEdits": edits}]});
        self.write(file, &spec.to_string());
    }

    fn inject(&self, names: &[&str]) -> Result<Value> {
        let devices = names.iter().map(|name| CDIDevice { name: format!("v.com/c={name}"), ..Default::default() }).collect();
        let names = requested(&ContainerConfig { CDI_devices: devices, ..Default::default() })?;
        let mut spec = bare();
        self.registry.inject(&names, &mut spec)?;
        Ok(serde_json::to_value(spec).unwrap())
    }

    fn mark(&self, device: &str) -> String {
        self.inject(&[device]).unwrap()["process"]["env"].as_array().unwrap().last().unwrap().as_str().unwrap().to_owned()
    }
}

/// A spec as ours are, without what does not matter here.
fn bare() -> Spec {
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "args": ["/bin/sh"], "env": ["A=1", "PATH=/bin"], "user": {"uid": 1000, "gid": 100, "additionalGids": [100]}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/data/a", "type": "bind", "source": "/a"}],
        "linux": {"readonlyPaths": ["/sys"], "resources": {"devices": [{"allow": false, "access": "rwm"}]}},
    });
    serde_json::from_value(spec).unwrap()
}

#[test]
fn later_directories_win_and_files_are_read_again_when_they_change() {
    let host = Host::new();
    host.define("low/a.json", "d", "low");
    assert_eq!(host.mark("d"), "MARK=low");
    host.define("high/b.json", "d", "high");
    assert_eq!(host.mark("d"), "MARK=high");
    std::fs::remove_file(host.dir.path().join("high/b.json")).unwrap();
    assert_eq!(host.mark("d"), "MARK=low");
    host.define("low/a.json", "d", "changed");
    assert_eq!(host.mark("d"), "MARK=changed");
}

#[test]
fn unchanged_files_are_not_read_again() {
    let host = Host::new();
    host.define("low/a.json", "d", "one");
    let path = host.dir.path().join("low/a.json");
    assert_eq!(host.mark("d"), "MARK=one");
    // The same length and time: nothing that a look at the file shows.
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    host.define("low/a.json", "d", "two");
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(host.mark("d"), "MARK=one");
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified + Duration::from_secs(1)).unwrap();
    assert_eq!(host.mark("d"), "MARK=two");
}

#[test]
fn unknown_devices_are_named_and_broken_files_harm_no_other() {
    let host = Host::new();
    host.define("low/a.json", "d", "low");
    host.write("high/broken.yaml", "cdiVersion: [\n");
    host.write("high/notes.txt", "no spec");
    std::fs::create_dir(host.dir.path().join("high/dir.json")).unwrap();
    assert_eq!(host.mark("d"), "MARK=low");
    let error = host.inject(&["d", "absent"]).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    for word in ["v.com/c=absent", "/low", "broken.yaml is not valid"] {
        assert!(error.message().contains(word), "{error}");
    }
    assert!(!error.message().contains("dir.json") && !error.message().contains("notes"), "{error}");
}

#[test]
fn two_files_of_one_directory_cannot_define_a_device() {
    let host = Host::new();
    host.define("low/a.json", "d", "a");
    host.define("low/b.json", "d", "b");
    let error = host.inject(&["d"]).unwrap_err();
    assert!(
        error.code() == Code::FailedPrecondition && error.message().contains("a.json") && error.message().contains("b.json"),
        "{error}"
    );
    host.define("high/c.json", "d", "c");
    assert_eq!(host.mark("d"), "MARK=c");
}

#[test]
fn every_edit_is_made() {
    let host = Host::new();
    let dir = host.dir.path().display();
    host.write(
        "low/a.yaml",
        &format!(
            "cdiVersion: 0.7.0
kind: v.com/c
containerEdits:
  env: [A=2, B=3]
  additionalGids: [0, 100, 44]
devices:
- name: one
  containerEdits:
    deviceNodes:
    - path: /dev/nothing
      hostPath: /dev/null
      permissions: rw
    - {{path: /dev/given, type: b, major: 7, minor: 200, fileMode: 432, uid: 0, gid: 6, permissions: none}}
    mounts:
    - {{hostPath: {dir}, containerPath: /data, options: [ro, nosuid, bind]}}
    - {{hostPath: {dir}, containerPath: /sys/x, options: [ro]}}
    - {{hostPath: tmpfs, containerPath: /data/a, type: tmpfs, options: [size=1m]}}
    hooks:
    - {{hookName: createRuntime, path: /bin/hook, args: [hook, a], env: [X=y], timeout: 5}}
    intelRdt: {{closID: low, l3CacheSchema: \"L3:0=f\"}}
- name: two
  containerEdits:
    env: [B=4]
    hooks:
    - {{hookName: createRuntime, path: /bin/two}}
"
        ),
    );
    let spec = host.inject(&["one", "two"]).unwrap();
    assert_eq!(spec["process"]["env"], json!(["A=2", "PATH=/bin", "B=4"]));
    assert_eq!(spec["process"]["user"]["additionalGids"], json!([100, 44]));
    let devices = &spec["linux"]["devices"];
    assert_eq!(devices[0], json!({"path": "/dev/nothing", "type": "c", "major": 1, "minor": 3, "uid": 1000, "gid": 100}));
    assert_eq!(devices[1], json!({"path": "/dev/given", "type": "b", "major": 7, "minor": 200, "fileMode": 432, "uid": 0, "gid": 6}));
    let rules = &spec["linux"]["resources"]["devices"];
    assert_eq!(rules[1], json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}));
    assert_eq!(rules.as_array().unwrap().len(), 2, "no rule for permissions none");
    let mounts: Vec<_> = spec["mounts"].as_array().unwrap().iter().map(|m| m["destination"].as_str().unwrap()).collect();
    assert_eq!(mounts, ["/proc", "/data", "/sys/x", "/data/a"]);
    assert_eq!((&spec["mounts"][1]["type"], &spec["mounts"][1]["options"]), (&json!("bind"), &json!(["ro", "nosuid", "bind"])));
    assert_eq!(spec["mounts"][2]["options"], json!(["ro", "rbind"]));
    assert_eq!(spec["mounts"][3]["type"], "tmpfs");
    assert_eq!(spec["linux"]["readonlyPaths"], json!(["/sys", "/sys/x"]));
    let hooks = &spec["hooks"]["createRuntime"];
    assert_eq!(hooks[0], json!({"path": "/bin/hook", "args": ["hook", "a"], "env": ["X=y"], "timeout": 5}));
    assert_eq!(hooks[1]["path"], "/bin/two");
    assert_eq!(spec["linux"]["intelRdt"], json!({"closID": "low", "l3CacheSchema": "L3:0=f"}));
}

#[test]
fn what_the_host_or_the_runtimes_lack_is_named() {
    let host = Host::new();
    for (edits, word) in [
        (json!({"deviceNodes": [{"path": "/dev/no-such-device"}]}), "/dev/no-such-device"),
        (json!({"deviceNodes": [{"path": "/dev/null", "type": "b"}]}), "type"),
        (json!({"deviceNodes": [{"path": "/etc/passwd"}]}), "/etc/passwd"),
        (json!({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}), "netDevices"),
        (json!({"intelRdt": {"schemata": ["x"]}}), "schemata"),
    ] {
        let spec = json!({"cdiVersion": "1.1.0", "kind": "v.com/c", "devices": [{"name": "d", "containerEdits": edits}]});
        host.write("low/a.json", &spec.to_string());
        let error = host.inject(&["d"]).unwrap_err();
        assert!(error.code() == Code::FailedPrecondition && error.message().contains(word), "{error}");
        assert!(error.message().contains("v.com/c=d") && error.message().contains("a.json"), "{error}");
    }
}

#[test]
fn nothing_asked_looks_at_nothing() {
    let mut spec = bare();
    Registry::new(vec![Path::new("/proc/self/mem/x").to_owned()]).inject(&[], &mut spec).unwrap();
    assert_eq!(spec, bare());
}

/// No node can be made there.
#[test]
fn devices_of_a_user_namespace_are_bound_from_the_host() {
    let host = Host::new();
    let nodes = json!([
        {"path": "/dev/vendor/zero", "hostPath": "/dev/zero", "permissions": "r"},
        {"path": "/dev/full", "hostPath": "/dev/full"},
        {"path": "/dev/other", "hostPath": "/dev/zero", "type": "c", "major": 250, "minor": 1},
        {"path": "/dev/link", "hostPath": host.dir.path().join("link"), "type": "c", "major": 1, "minor": 5, "fileMode": 0o600},
    ]);
    std::os::unix::fs::symlink("/dev/zero", host.dir.path().join("link")).unwrap();
    let document = json!({"cdiVersion": "0.6.0", "kind": "v.com/c", "devices": [{"name": "d", "containerEdits": {"deviceNodes": nodes}}]});
    host.write("low/a.json", &document.to_string());
    let mut spec = serde_json::to_value(bare()).unwrap();
    spec["linux"]["namespaces"] = json!([{"type": "user", "path": "/run/ns/user"}]);
    let old = json!({"destination": "/dev/link", "type": "bind", "source": "/old"});
    spec["mounts"].as_array_mut().unwrap().push(old);
    let mut spec = serde_json::from_value(spec).unwrap();
    let devices = vec![CDIDevice { name: "v.com/c=d".into(), ..Default::default() }];
    let names = requested(&ContainerConfig { CDI_devices: devices, ..Default::default() }).unwrap();
    host.registry.inject(&names, &mut spec).unwrap();
    let spec = serde_json::to_value(spec).unwrap();
    let mounts: Vec<_> = spec["mounts"].as_array().unwrap().iter().map(|m| (m["destination"].as_str(), m["source"].as_str())).collect();
    let expected = [("/proc", "proc"), ("/data/a", "/a"), ("/dev/link", "/dev/zero"), ("/dev/vendor/zero", "/dev/zero")];
    assert_eq!(mounts, expected.map(|(to, from)| (Some(to), Some(from))));
    assert!(!spec["mounts"][3]["options"].to_string().contains("nodev"), "{}", spec["mounts"][3]);
    // The runtimes have one of their own; a number that the host's node does not have is the file's business.
    let left: Vec<_> = spec["linux"]["devices"].as_array().unwrap().iter().map(|device| device["path"].as_str().unwrap()).collect();
    assert_eq!(left, ["/dev/full", "/dev/other"]);
    assert_eq!(spec["linux"]["devices"][1]["fileMode"], 0o666);
    assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().len(), 5, "all may be used");
}
