//! What goes wrong beside us: a shim that does not answer, containers of one sandbox that must not spoil each other.

use std::path::PathBuf;

use crisp::api::runtime::ContainerState;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::harness::{handlers, Host};
use crate::objects::sandbox_config;

/// The shim of a container, by its command line.
fn shim_of(id: &str) -> i32 {
    let processes = std::fs::read_dir("/proc").expect("read /proc").flatten().map(|e| e.path());
    let ours = |path: &PathBuf| {
        let text = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.contains("crisp-shim") && text.contains(id)
    };
    let found = processes.into_iter().find(ours).expect("a shim");
    found.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok()).expect("a pid")
}

#[test]
fn a_shim_that_does_not_answer_does_not_keep_its_container() {
    let host = Host::start();
    for (handler, grace) in handlers().into_iter().flat_map(|h| [(h.clone(), 0), (h, 1)]) {
        let sandbox = host.sandbox("stuck", &handler);
        let container = host.launch(&sandbox, "main", &["sh", "-c", "sleep 1000000 & sleep 1000000"]);
        kill(Pid::from_raw(shim_of(&container.id)), Signal::SIGSTOP).expect("stop the shim");
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
