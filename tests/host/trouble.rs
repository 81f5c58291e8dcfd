//! What goes wrong beside us: a shim that does not answer, containers of one sandbox that must not spoil each other, a full disk.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crisp::api::runtime::{ContainerState, PodSandboxState, StartContainerRequest};
use grpcio::RpcStatusCode;
use nix::mount::{mount, umount, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{handlers, Host};
use crate::objects::sandbox_config;
use crate::shim::eventually;

const SLEEP: [&str; 2] = ["sleep", "1000000"];

/// The shim of a container, by its command line.
pub fn shim_of(id: &str) -> Option<i32> {
    let processes = std::fs::read_dir("/proc").expect("read /proc").flatten().map(|e| e.path());
    let ours = |path: &PathBuf| {
        let text = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.contains("crisp-shim") && text.contains(id)
    };
    processes.into_iter().find(ours)?.file_name()?.to_str()?.parse().ok()
}

#[test]
fn a_shim_that_does_not_answer_does_not_keep_its_container() {
    let host = Host::start();
    for (handler, grace) in handlers().into_iter().flat_map(|h| [(h.clone(), 0), (h, 1)]) {
        let sandbox = host.sandbox("stuck", &handler);
        let container = host.launch(&sandbox, "main", &["sh", "-c", "sleep 1000000 & sleep 1000000"]);
        kill(Pid::from_raw(shim_of(&container.id).expect("a shim")), Signal::SIGSTOP).expect("stop the shim");
        host.stop(&container, grace);
        let status = host.status(&container);
        assert_eq!(status.state.enum_value(), Ok(ContainerState::CONTAINER_EXITED));
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "ShimDied"), "{status}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_plain_container_leaves_sys_writable_for_a_privileged_one() {
    let host = Host::start();
    for handler in handlers() {
        let mut config = sandbox_config(&host.daemon.layout, "mixed", false);
        config.linux.as_mut().and_then(|l| l.security_context.as_mut()).expect("set").privileged = true;
        let sandbox = host.run(config, &handler);
        let options = |container: &_| {
            let (_, text, _) = host.exec(container, &["grep", " /sys sysfs ", "/proc/mounts"]);
            // The last mount on a place covers those before it.
            let last = text.lines().last().unwrap_or_default().to_owned();
            last.split(' ').nth(3).unwrap_or_default().split(',').next().unwrap_or_default().to_owned()
        };
        let plain = host.launch(&sandbox, "plain", &["sleep", "1000000"]);
        assert_eq!(options(&plain), "ro", "{handler}");
        let privileged = host.create_with(&sandbox, "privileged", &["sleep", "1000000"], |config| {
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        });
        host.start_container(&privileged);
        assert_eq!(options(&privileged), "rw", "{handler}");
        let (code, _, error) = host.exec(&privileged, &["sh", "-c", "cat /sys/class/net/eth0/mtu > /sys/class/net/eth0/mtu"]);
        assert_eq!(code, 0, "{handler}: {error}");
        let (code, _, _) = host.exec(&plain, &["sh", "-c", "cat /sys/class/net/eth0/mtu > /sys/class/net/eth0/mtu"]);
        assert_ne!(code, 0, "{handler}");
        host.remove_all();
    }
    host.finish();
}

/// A directory of records as it is on a disk without a free block; gone with this.
struct Full(PathBuf);

impl Full {
    fn new(dir: PathBuf) -> Full {
        let files: Vec<_> =
            fs::read_dir(&dir).expect("list").flatten().map(|e| (e.file_name(), fs::read(e.path()).expect("read"))).collect();
        mount(Some("full"), &dir, Some("tmpfs"), MsFlags::empty(), Some("size=256k,mode=700")).expect("mount a small disk");
        for (name, text) in files {
            fs::write(dir.join(name), text).expect("copy");
        }
        fs::write(dir.join("filler"), vec![0; 256 << 10]).expect_err("it fills up");
        Full(dir)
    }

    fn records(&self) -> usize {
        fs::read_dir(&self.0).expect("list").count() - 1
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = umount(&self.0);
        // What lay below has been removed above.
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Nothing new can be recorded then; but what there is can be stopped and removed, which is how the disk gets free again.
#[test]
fn a_full_disk_holds_nothing_back_that_goes() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("full", &handler);
        let ended = host.launch(&sandbox, "ended", &["true"]);
        host.wait_exit(&ended);
        let running = host.launch(&sandbox, "running", &SLEEP);
        let last = host.launch(&sandbox, "last", &SLEEP);
        let created = host.create(&sandbox, "created", &SLEEP);
        let full = ["root/containers", "root/sandboxes"].map(|dir| Full::new(host.daemon.layout.path(dir)));
        let (code, message) = host.refused(&StartContainerRequest { container_id: created.id.clone(), ..Default::default() });
        assert_eq!(code, RpcStatusCode::RESOURCE_EXHAUSTED, "{handler}: {message}");
        assert_eq!(host.status(&created).state.enum_value(), Ok(ContainerState::CONTAINER_CREATED), "{handler}");
        host.remove(&ended);
        host.stop(&running, 0);
        assert_eq!(host.status(&running).exit_code, 137, "{handler}");
        // The records of what has gone made room; full again.
        fs::write(full[0].0.join("filler2"), vec![0; 256 << 10]).expect_err("it fills up");
        host.remove(&running);
        host.stop_sandbox(&sandbox.id);
        assert_eq!(host.sandbox_status(&sandbox.id).state.enum_value(), Ok(PodSandboxState::SANDBOX_NOTREADY), "{handler}");
        assert_eq!(host.status(&last).state.enum_value(), Ok(ContainerState::CONTAINER_EXITED), "{handler}");
        host.remove_sandbox(&sandbox.id);
        fs::remove_file(full[0].0.join("filler2")).expect("remove");
        assert_eq!((full[0].records(), full[1].records()), (0, 0), "{handler}");
        drop(full);
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

/// The record of a start cannot be written once the container runs: it runs all the same, and is nobody's but ours.
#[test]
fn a_start_whose_record_is_lost_is_still_ours() {
    let mut host = Host::start();
    let hooks = host.daemon.layout.path("hooks");
    let script = host.daemon.layout.path("block");
    let hook = json!({"version": "1.0.0", "hook": {"path": script}, "when": {"always": true}, "stages": ["createRuntime"]});
    for handler in handlers() {
        let sandbox = host.sandbox("lost", &handler);
        for restarted in [false, true] {
            fs::create_dir_all(&hooks).expect("make the directory of hooks");
            fs::write(hooks.join("a.json"), hook.to_string()).expect("write the hook");
            fs::write(&script, "#!/bin/sh\n").expect("write the script");
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("make it a program");
            let container = host.create(&sandbox, &format!("main-{restarted}"), &SLEEP);
            let record = host.daemon.layout.path("root/containers").join(format!("{}.json", container.id));
            let aside = host.daemon.layout.path("aside.json");
            let block = |record: &Path| format!("#!/bin/sh\nmv {0} {1} && mkdir {0} && touch {0}/x\n", record.display(), aside.display());
            fs::write(&script, block(&record)).expect("write the script");
            host.start_container(&container);
            fs::remove_file(hooks.join("a.json")).expect("remove the hook");
            let state = |host: &Host| host.status(&container).state.enum_value();
            assert_eq!(state(&host), Ok(ContainerState::CONTAINER_RUNNING), "{handler}");
            fs::remove_dir_all(&record).expect("remove what blocks it");
            fs::rename(&aside, &record).expect("bring the record back");
            if restarted {
                host.daemon.stop(Signal::SIGKILL);
                host.daemon.run();
                host.daemon.wait_ready();
                eventually("the next daemon finds it", || state(&host) == Ok(ContainerState::CONTAINER_RUNNING));
            }
            let again = host.refused(&StartContainerRequest { container_id: container.id.clone(), ..Default::default() });
            assert_eq!(again.0, RpcStatusCode::FAILED_PRECONDITION, "{handler}: {}", again.1);
            assert_eq!(host.exec(&container, &["true"]).0, 0, "{handler}");
            host.stop(&container, 0);
            assert_eq!(host.status(&container).exit_code, 137, "{handler}");
        }
        fs::remove_dir_all(&hooks).expect("remove the hooks");
        fs::remove_file(&script).expect("remove the script");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

/// No clock reaches so far.
#[test]
fn the_longest_timeouts_are_no_trouble() {
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox("patient", &handler);
        let container = host.launch(&sandbox, "main", &["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"]);
        container.log.wait_for("ready");
        let request = crisp::api::runtime::ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: vec!["echo".into(), "x".into()],
            timeout: i64::MAX,
            ..Default::default()
        };
        assert_eq!(host.call(&request).stdout, b"x\n", "{handler}");
        host.stop(&container, i64::MAX);
        assert_eq!(host.status(&container).exit_code, 7, "{handler}");
        host.remove_all();
    }
    host.finish();
}
