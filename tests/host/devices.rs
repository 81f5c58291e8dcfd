//! Devices as containers find them: nodes, permissions and the rules that hold whoever makes a node of his own; CDI; hooks.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crisp::api::runtime::{CDIDevice, ContainerConfig, Device};
use grpcio::RpcStatusCode;
use nix::sys::stat::{makedev, mknod, Mode, SFlag};
use serde_json::{json, Value};

use crate::daemon::{patience, Kind};
use crate::harness::{handlers, kind, Host, PATIENCE};
use crate::objects::{container_config, create_request, sandbox_config};

const SLEEP: [&str; 2] = ["sleep", "1000000"];

/// A device of this host that no container has by itself, and that can be opened without harm.
struct Spare {
    path: &'static str,
    major: u32,
    minor: u32,
}

fn spare() -> Spare {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    for path in ["/dev/fuse", "/dev/loop-control"] {
        if let Some(meta) = fs::metadata(path).ok().filter(|meta| meta.file_type().is_char_device()) {
            return Spare { path, major: rustix::fs::major(meta.rdev()), minor: rustix::fs::minor(meta.rdev()) };
        }
    }
    panic!("this host has neither /dev/fuse nor /dev/loop-control: modprobe fuse");
}

fn device(host_path: impl AsRef<Path>, container_path: &str, permissions: &str) -> Device {
    Device {
        host_path: host_path.as_ref().display().to_string(),
        container_path: container_path.into(),
        permissions: permissions.into(),
        ..Default::default()
    }
}

/// Whether `path` can be opened for reading, and for writing.
fn opens(host: &Host, container: &crate::harness::Container, path: &str) -> (bool, bool) {
    let script = format!("(: < {path}) 2>/dev/null && echo r; (: >> {path}) 2>/dev/null && echo w; true");
    let (code, text, error) = host.exec(container, &["sh", "-c", &script]);
    assert_eq!(code, 0, "{error}");
    (text.contains('r'), text.contains('w'))
}

/// Waits until a file has as many lines, and gives them.
fn lines(path: &Path, count: usize) -> Vec<String> {
    let begin = Instant::now();
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        if lines.len() >= count {
            return lines;
        }
        assert!(begin.elapsed() < patience(PATIENCE), "{} has {lines:?}", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn permissions_hold_for_the_node_and_for_any_other_of_its_number() {
    let spare = spare();
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("devices", &handler);
        for (name, permissions, read, write) in [("r", "r", true, false), ("w", "w", false, true), ("rwm", "mrw", true, true)] {
            let container = host.create_with(&sandbox, name, &SLEEP, |config| {
                config.devices = vec![device(spare.path, "/dev/given", permissions)];
            });
            host.start_container(&container);
            assert_eq!(opens(&host, &container, "/dev/given"), (read, write), "{handler}: {permissions}");
            // Making a node is CAP_MKNOD's affair, opening it the rules'.
            let make = format!("mknod /tmp/own c {} {}", spare.major, spare.minor);
            let (code, _, error) = host.exec(&container, &["sh", "-c", &make]);
            assert_eq!(code, 0, "{handler}: {error}");
            assert_eq!(opens(&host, &container, "/tmp/own"), (read, write), "{handler}: {permissions}");
            assert_eq!(opens(&host, &container, "/dev/null"), (true, true), "{handler}");
            host.remove(&container);
        }
        // Without the device none of its number opens, not even in the container's own /dev; without the capability none can be made.
        let none = host.launch(&sandbox, "none", &SLEEP);
        let make = format!("for dir in /tmp /dev; do mknod $dir/own c {} {} || exit 1; done", spare.major, spare.minor);
        let (code, _, error) = host.exec(&none, &["sh", "-c", &make]);
        assert_eq!(code, 0, "{handler}: {error}");
        for path in ["/tmp/own", "/dev/own"] {
            assert_eq!(opens(&host, &none, path), (false, false), "{handler}: {path}");
        }
        let (_, _, error) = host.exec(&none, &["cat", "/tmp/own"]);
        assert!(error.contains("Operation not permitted"), "{handler}: {error}");
        let plain = host.create_with(&sandbox, "plain", &SLEEP, |config| {
            let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            security.capabilities.mut_or_insert_default().drop_capabilities = vec!["MKNOD".into()];
        });
        host.start_container(&plain);
        assert_ne!(host.exec(&plain, &["mknod", "/tmp/own", "c", "1", "3"]).0, 0, "{handler}");
        assert_ne!(host.exec(&plain, &["ls", "/dev/given"]).0, 0, "{handler}");
        host.remove_all();
    }
    host.finish();
}

/// As VPNs have it: a hostPath mount and NET_ADMIN, no device asked for.
#[test]
fn a_tunnel_device_that_is_mounted_can_be_opened() {
    let host = Host::start();
    let dir = host.daemon.layout.path("tunnel");
    fs::create_dir_all(&dir).expect("make a directory");
    // Of its own, for a host whose module is not loaded has none.
    let tun = dir.join("tun");
    mknod(&tun, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(10, 200)).expect("make the node");
    let driver = fs::OpenOptions::new().read(true).write(true).open(&tun).is_ok();
    for handler in handlers() {
        let sandbox = host.sandbox("tunnel", &handler);
        let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
            config.mounts = vec![crate::mounts::bind("/dev/net/tun", &tun)];
            let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            security.capabilities.mut_or_insert_default().add_capabilities = vec!["NET_ADMIN".into()];
        });
        host.start_container(&container);
        let (code, _, error) = host.exec(&container, &["sh", "-c", ": <> /dev/net/tun"]);
        assert!(!error.contains("Operation not permitted"), "{handler}: {error}");
        assert_eq!(code == 0, driver, "{handler}: {error}");
        host.remove_all();
    }
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

#[test]
fn a_privileged_container_has_all_devices() {
    let spare = spare();
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "privileged", false);
        config.linux.as_mut().and_then(|l| l.security_context.as_mut()).expect("set").privileged = true;
        let sandbox = host.run(config, &handler);
        let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
            // Its own name for one more.
            config.devices = vec![device("/dev/zero", "/dev/nothing", "r")];
        });
        host.start_container(&container);
        assert_eq!(opens(&host, &container, spare.path), (true, true), "{handler}");
        assert_eq!(opens(&host, &container, "/dev/nothing"), (true, true), "{handler}");
        // What has no node there yet may be made.
        let (code, _, error) = host.exec(&container, &["mknod", "/tmp/own", "c", &spare.major.to_string(), &spare.minor.to_string()]);
        assert_eq!(code, 0, "{handler}: {error}");
        assert_eq!(opens(&host, &container, "/tmp/own"), (true, true), "{handler}");
        host.remove_all();
    }
    host.finish();
}

#[test]
fn links_and_directories_of_devices() {
    let spare = spare();
    let host = Host::start();
    let dir = host.daemon.layout.path("nodes");
    fs::create_dir_all(dir.join("sub")).expect("make directories");
    let make = |name: &str, major, minor| {
        mknod(&dir.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o640), makedev(major, minor)).expect("make a node");
    };
    make("zero", 1, 5);
    make("sub/spare", spare.major.into(), spare.minor.into());
    fs::write(dir.join("file"), "").expect("write a file");
    symlink("/dev/mem", dir.join("link")).expect("link");
    for handler in handlers() {
        let sandbox = host.sandbox("nodes", &handler);
        let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
            let link = host.daemon.layout.path("link");
            let _ = symlink(spare.path, &link);
            config.devices = vec![device(&dir, "/dev/many", "rw"), device(&link, "/dev/linked", "rw")];
        });
        host.start_container(&container);
        let (_, text, error) = host.exec(&container, &["sh", "-c", "cd /dev/many && find . -type c | sort; stat -c %a zero; ls -A"]);
        assert_eq!(text, "./sub/spare\n./zero\n640\nsub\nzero\n", "{handler}: {error}");
        for path in ["/dev/many/sub/spare", "/dev/many/zero", "/dev/linked"] {
            assert_eq!(opens(&host, &container, path), (true, true), "{handler}: {path}");
        }
        host.remove_all();
    }
    host.finish();
}

/// No OCI runtime can make a node there: each binds the host's, runc that of the name which the container gives it.
#[test]
fn devices_in_a_user_namespace_are_the_hosts() {
    use std::os::unix::fs::PermissionsExt;
    if kind() == Kind::Containerd {
        return;
    }
    let host = Host::start();
    let (dir, specs) = (host.daemon.layout.path("nodes"), host.daemon.layout.path("cdi"));
    fs::create_dir_all(&dir).expect("make a directory");
    // Numbers of /dev/zero and /dev/full, which may be opened everywhere.
    for (name, minor) in [("zero", 5), ("full", 7)] {
        mknod(&dir.join(name), SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, minor)).expect("make a node");
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o666)).expect("open it to all");
    }
    let device_node = json!({"path": "/dev/vendor/full", "hostPath": dir.join("full"), "permissions": "rw"});
    let edits = json!({"deviceNodes": [device_node]});
    let document = json!({"cdiVersion": "0.6.0", "kind": "v.com/c", "devices": [{"name": "a", "containerEdits": edits}]});
    write_json(&specs.join("vendor.json"), &document);
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "users", false);
        let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().userns_options = Some(crate::userns::users()).into();
        let sandbox = host.run(config, &handler);
        let container = host.create_with(&sandbox, "main", &SLEEP, |config| {
            config.devices = vec![
                device(dir.join("zero"), "/dev/given/zero", "rw"),
                // The host has another device of that name.
                device(dir.join("zero"), "/dev/fuse", "r"),
                device("/dev/null", "", "rw"),
                device(dir.join("full"), "", "r"),
            ];
            config.CDI_devices = vec![CDIDevice { name: "v.com/c=a".into(), ..Default::default() }];
        });
        host.start_container(&container);
        let own = dir.join("full");
        let script = format!(
            "stat -c '%a %t:%T' /dev/given/zero /dev/fuse /dev/null {} /dev/vendor/full; for f in /dev/given/zero /dev/fuse; do head -c 3 $f | wc -c; done; \
             echo x > /dev/vendor/full; head -c 3 /dev/full | wc -c; umask",
            own.display()
        );
        let (_, text, error) = host.exec(&container, &["sh", "-c", &script]);
        assert_eq!(text, "666 1:5\n666 1:5\n666 1:3\n666 1:7\n666 1:7\n3\n3\n3\n0022\n", "{handler}: {error}");
        assert!(error.contains("No space left"), "{handler}: {error}");
        host.remove_all();
    }
    fs::remove_dir_all(&dir).expect("remove the directory");
    host.finish();
}

/// A hook that appends its stage, and the container's id from its stdin, to `file`.
fn note(file: &Path, stage: &str) -> (PathBuf, Vec<String>) {
    let dir = file.parent().expect("in a directory").display();
    let script =
        format!("mkdir -p {dir}; echo {stage} $(tr -d ' \\n\\t' | sed 's/.*\"id\":\"\\([0-9a-f]*\\)\".*/\\1/') >> {}", file.display());
    ("/bin/sh".into(), ["sh", "-c", &script].map(str::to_owned).to_vec())
}

fn write_json(path: &Path, value: &Value) {
    fs::create_dir_all(path.parent().expect("in a directory")).expect("make a directory");
    fs::write(path, value.to_string()).expect("write a file");
}

#[test]
fn cdi_devices_are_given_and_their_hooks_run() {
    let spare = spare();
    let host = Host::start();
    let (specs, notes) = (host.daemon.layout.path("cdi"), host.daemon.layout.path("notes/cdi"));
    let data = host.daemon.layout.path("data");
    fs::write(&data, "from the host\n").expect("write a file");
    let hook = |stage: &str| {
        let (path, args) = note(&notes, stage);
        json!({"hookName": stage, "path": path, "args": args})
    };
    write_json(
        &specs.join("vendor.json"),
        &json!({
            "cdiVersion": "0.7.0",
            "kind": "vendor.com/thing",
            "containerEdits": {"env": ["VENDOR=yes"], "additionalGids": [4242]},
            "devices": [
                {"name": "one", "containerEdits": {
                    "env": ["ONE=1"],
                    "deviceNodes": [{"path": "/dev/thing", "hostPath": spare.path, "permissions": "r"}],
                    "mounts": [{"hostPath": data, "containerPath": "/etc/thing", "options": ["ro", "nosuid", "bind"]}],
                    "hooks": [hook("createRuntime"), hook("poststop")],
                }},
            ],
        }),
    );
    fs::write(
        specs.join("other.yaml"),
        "cdiVersion: 0.6.0\nkind: vendor.com/other\ndevices:\n- name: two\n  containerEdits:\n    env: [TWO=2]\n",
    )
    .expect("write a spec");
    for handler in handlers() {
        let _ = fs::remove_file(&notes);
        let sandbox = host.sandbox("cdi", &handler);
        let ask = |config: &mut ContainerConfig| {
            config.CDI_devices = vec![CDIDevice { name: "vendor.com/thing=one".into(), ..Default::default() }];
            config.annotations.insert("cdi.k8s.io/test_1".into(), "vendor.com/other=two,vendor.com/thing=one".into());
        };
        let container = host.create_with(&sandbox, "main", &SLEEP, ask);
        host.start_container(&container);
        let (_, text, error) = host.exec(&container, &["sh", "-c", "echo $VENDOR $ONE $TWO; id -G; cat /etc/thing; echo x > /etc/thing"]);
        assert_eq!(text, "yes 1 2\n0 4242\nfrom the host\n", "{handler}: {error}");
        assert!(error.contains("Read-only"), "{handler}: {error}");
        assert_eq!(opens(&host, &container, "/dev/thing"), (true, false), "{handler}");
        assert_eq!(lines(&notes, 1), [format!("createRuntime {}", container.id)], "{handler}");
        host.stop(&container, 0);
        // The end of the container, not its removal, is what it is after.
        assert_eq!(lines(&notes, 2)[1], format!("poststop {}", container.id), "{handler}");
        host.remove_all();
        assert_eq!(lines(&notes, 2).len(), 2, "{handler}: each hook runs once");

        let sandbox = host.sandbox("absent", &handler);
        let mut config = container_config(&sandbox.config, "main", &SLEEP);
        config.CDI_devices = vec![CDIDevice { name: "vendor.com/thing=absent".into(), ..Default::default() }];
        let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("vendor.com/thing=absent"), "{message}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn hooks_of_the_administrator_run_at_every_stage() {
    const STAGES: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    let host = Host::start();
    let (hooks, notes) = (host.daemon.layout.path("hooks"), host.daemon.layout.path("notes/hooks"));
    for stage in STAGES {
        let (path, args) = note(&notes, stage);
        write_json(
            &hooks.join(format!("{stage}.json")),
            &json!({
                "version": "1.0.0",
                "hook": {"path": path, "args": args, "timeout": 30},
                "when": {"annotations": {"^example\\.com/hook$": "^yes$"}, "commands": ["^sleep$"]},
                "stages": [stage],
            }),
        );
    }
    for handler in handlers() {
        let _ = fs::remove_file(&notes);
        let sandbox = host.sandbox("hooked", &handler);
        let ask = |config: &mut ContainerConfig| drop(config.annotations.insert("example.com/hook".into(), "yes".into()));
        let plain = host.launch(&sandbox, "plain", &SLEEP);
        let other = host.create_with(&sandbox, "other", &["sh", "-c", "sleep 1000000"], ask);
        host.start_container(&other);
        let container = host.create_with(&sandbox, "main", &SLEEP, ask);
        host.start_container(&container);
        let id = &container.id;
        // startContainer runs inside and writes a file of the container; crun does not wait for it.
        let inside = host.daemon.layout.path("root/snapshots").join(id).join("fs").join(notes.strip_prefix("/").expect("absolute"));
        assert_eq!(lines(&inside, 1), [format!("startContainer {id}")], "{handler}");
        host.stop(&container, 0);
        // createContainer runs in the container's mount namespace before its root is entered: it writes the host's file.
        let found = lines(&notes, 5);
        let expected = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"].map(|stage| format!("{stage} {id}"));
        assert_eq!(found, expected, "{handler}");
        for container in [&plain, &other] {
            host.stop(container, 0);
        }
        host.remove_all();
        assert_eq!(lines(&notes, 5).len(), 5, "{handler}: of one container alone");
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_hook_that_fails_fails_the_start_and_leaves_nothing() {
    let host = Host::start();
    let hooks = host.daemon.layout.path("hooks");
    let file = |script: &str| {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        write_json(
            &hooks.join("a.json"),
            &json!({"version": "1.0.0", "hook": hook, "when": {"always": true}, "stages": ["createRuntime"]}),
        );
    };
    for handler in handlers() {
        file("echo no such gadget >&2; exit 3");
        let sandbox = host.sandbox("failing", &handler);
        let container = host.create(&sandbox, "main", &SLEEP);
        let (_, message) =
            host.refused(&crisp::api::runtime::StartContainerRequest { container_id: container.id.clone(), ..Default::default() });
        assert!(message.contains("hook"), "{handler}: {message}");
        assert_eq!(host.status(&container).reason, "StartError", "{handler}");
        fs::write(hooks.join("a.json"), "{").expect("write a file");
        let config = container_config(&sandbox.config, "second", &SLEEP);
        let (code, message) = host.refused(&create_request(&sandbox.id, &sandbox.config, &config));
        assert!(code == RpcStatusCode::FAILED_PRECONDITION && message.contains("hooks/a.json"), "{handler}: {message}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}
