//! Starts that end in the middle, shims that cannot answer for a while, and what is said twice at the same time.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crisp::api::runtime::{ContainerState, StartContainerRequest, StopContainerRequest};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::daemon::{cgroup_processes, find, patience};
use crate::harness::{wanted_runtimes, Container, Host};
use crate::objects::exec_request;
use crate::shim::eventually;
use crate::trouble::shim_of;

const SLEEP: [&str; 2] = ["sleep", "1000000"];

/// A host whose runtimes do not begin with the container that a file `slow` in the directory names, for as long as it is there.
fn slow_host() -> (tempfile::TempDir, Host) {
    host_with(
        "if [ -e $dir/slow ]; then\n  \
        case \" $* \" in *' run '*\" $(cat $dir/slow) \"*) while [ -e $dir/slow ]; do sleep 0.1; done ;; esac\nfi\n",
    )
}

/// A host whose runtimes do this first, in a shell; `$dir` is the directory.
fn host_with(script: &str) -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().expect("make a directory");
    let mut runtimes = Vec::new();
    for name in wanted_runtimes() {
        let (program, real) = (dir.path().join(name), find(name).expect("it is installed"));
        let script = format!("#!/bin/sh\ndir={}\n{script}exec {} \"$@\"\n", dir.path().display(), real.display());
        fs::write(&program, script).expect("write the runtime");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("make it a program");
        runtimes.push((name.to_owned(), program));
    }
    let host = Host::start_with(|options| options.runtimes = runtimes);
    (dir, host)
}

fn start_request(container: &Container) -> StartContainerRequest {
    StartContainerRequest { container_id: container.id.clone(), ..Default::default() }
}

/// Past the time at which a runtime that nobody stopped has started the container, once it may.
fn nothing_comes_of_it(host: &Host) {
    std::thread::sleep(patience(Duration::from_secs(2)));
    assert_eq!(cgroup_processes(&host.daemon.layout.tag), Vec::<i32>::new());
}

/// The shim of a container that is being started, which has started the runtime by now.
fn starting_shim(container: &Container) -> i32 {
    let mut shim = None;
    eventually("a shim has started the runtime", || {
        shim = parent_of_runtime(&container.id);
        shim.is_some()
    });
    shim.expect("just found")
}

/// Who has started `RUNTIME … run … ID`.
fn parent_of_runtime(id: &str) -> Option<i32> {
    let processes = fs::read_dir("/proc").expect("read /proc").flatten().map(|e| e.path());
    let is_runtime = |path: &PathBuf| {
        let text = fs::read(path.join("cmdline")).unwrap_or_default();
        let has = |word: &str| text.split(|b| *b == 0).any(|w| w == word.as_bytes());
        has("run") && has(id)
    };
    let status = processes.into_iter().find(is_runtime).and_then(|path| fs::read_to_string(path.join("status")).ok())?;
    status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
}

fn mark(dir: &Path, container: &Container) -> PathBuf {
    let mark = dir.join("slow");
    fs::write(&mark, &container.id).expect("slow it down");
    mark
}

#[test]
fn a_shim_that_is_killed_in_a_start_leaves_nothing() {
    let (dir, host) = slow_host();
    for handler in wanted_runtimes() {
        let sandbox = host.sandbox("killed", handler);
        let container = host.create(&sandbox, "main", &SLEEP);
        let slow = mark(dir.path(), &container);
        let client = host.daemon.client();
        let request = start_request(&container);
        let started = std::thread::spawn(move || client.call(&request));
        kill(Pid::from_raw(starting_shim(&container)), Signal::SIGKILL).expect("kill the shim");
        started.join().expect("no panic").expect_err("it cannot have started");
        fs::remove_file(slow).expect("quick again");
        assert_eq!(host.status(&container).reason, "StartError", "{handler}");
        nothing_comes_of_it(&host);
        host.remove(&container);
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_daemon_that_is_killed_in_a_start_leaves_nothing() {
    let (dir, mut host) = slow_host();
    for handler in wanted_runtimes() {
        let sandbox = host.sandbox("killed", handler);
        let container = host.create(&sandbox, "main", &SLEEP);
        let slow = mark(dir.path(), &container);
        let client = host.daemon.client();
        let request = start_request(&container);
        let started = std::thread::spawn(move || client.call(&request).map(drop));
        starting_shim(&container);
        host.daemon.stop(Signal::SIGKILL);
        let _ = started.join().expect("no panic");
        host.daemon.run();
        host.daemon.wait_ready();
        fs::remove_file(slow).expect("quick again");
        let status = host.status(&container);
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{handler}: {status}");
        assert!(status.message.contains("while it was being started"), "{handler}: {status}");
        nothing_comes_of_it(&host);
        assert_eq!(shim_of(&container.id), None, "{handler}");
        host.remove(&container);
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

#[test]
fn a_restart_leaves_a_container_alone_whose_shim_cannot_answer() {
    let mut host = Host::start();
    let sandbox = host.sandbox("mute", wanted_runtimes()[0]);
    let container = host.launch(&sandbox, "main", &SLEEP);
    let shim = Pid::from_raw(shim_of(&container.id).expect("a shim"));
    kill(shim, Signal::SIGSTOP).expect("stop the shim");
    host.daemon.stop(Signal::SIGKILL);
    host.daemon.run();
    host.daemon.wait_ready();
    assert_eq!(host.status(&container).state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING));
    kill(shim, Signal::SIGCONT).expect("let it go on");
    assert_eq!(host.exec(&container, &["echo", "well"]).1, "well\n");
    host.stop(&container, 0);
    assert_eq!(host.status(&container).exit_code, 137);
    host.remove_all();
    host.finish();
}

/// A program may have nothing open of its terminal for a while.
#[test]
fn a_terminal_outlives_its_users() {
    let host = Host::start();
    for handler in crate::harness::handlers() {
        let sandbox = host.sandbox(&format!("terminal-{handler}"), &handler);
        let script = "trap 'echo hung up > /dev/console; exit 77' HUP
            echo first; exec 0</dev/null 1>/dev/null 2>/dev/null; sleep 1; echo back > /dev/console; sleep 1; exit 5";
        let container = host.create_with(&sandbox, "main", &["sh", "-c", script], |config| config.tty = true);
        host.start_container(&container);
        let status = host.wait_exit(&container);
        let log = container.log.text("stdout");
        assert!(status.exit_code == 5 && log.contains("first") && log.contains("back"), "{handler}: {status}\n{log}");
        host.remove_all();
    }
    host.finish();
}

/// As runtimes do that bind their own binary for a moment: what they made by then stays when they are killed.
#[test]
fn a_runtime_whose_exec_nobody_wants_may_take_back_what_it_made() {
    let (dir, host) =
        host_with("case \" $* \" in *' exec '*) touch $dir/made; while [ -e $dir/hold ]; do sleep 0.01; done; rm $dir/made ;; esac\n");
    let (made, hold) = (dir.path().join("made"), dir.path().join("hold"));
    for handler in wanted_runtimes() {
        for cancelled in [true, false] {
            fs::write(&hold, b"").expect("write");
            let sandbox = host.sandbox("unwanted", handler);
            let container = host.launch(&sandbox, "main", &SLEEP);
            let first = cgroup_processes(&host.daemon.layout.tag)[0];
            let (client, limit) = (host.daemon.client(), if cancelled { 1 } else { 60 });
            let request = exec_request(&container.id, &["sleep", "1000000"], limit);
            let exec = std::thread::spawn(move || client.call(&request).map(drop));
            eventually("the runtime has begun", || made.exists());
            let end = match cancelled {
                true => exec,
                false => {
                    let (client, container_id) = (host.daemon.client(), container.id.clone());
                    std::thread::spawn(move || client.call(&StopContainerRequest { container_id, ..Default::default() }).map(drop))
                }
            };
            // Nobody wants it any more, for as long as it took to kill it at once.
            eventually("the exec, or the container, is given up", || match cancelled {
                true => end.is_finished(),
                false => !Path::new("/proc").join(first.to_string()).exists(),
            });
            std::thread::sleep(Duration::from_millis(50));
            fs::remove_file(&hold).expect("let it go on");
            eventually("the runtime has come back", || !made.exists());
            assert_eq!(end.join().expect("no panic").is_err(), cancelled, "{handler}");
            host.remove_all();
            host.assert_clean();
        }
    }
    host.finish();
}

/// One that is killed all the same, with its shim: the container's removal takes what is left.
#[test]
fn what_a_killed_runtime_left_goes_with_the_container() {
    let host = Host::start();
    for handler in crate::harness::handlers() {
        let sandbox = host.sandbox("left", &handler);
        let container = host.launch(&sandbox, "main", &SLEEP);
        let run = host.daemon.layout.path("run");
        let state = run.join("runtime").join(&handler).join(&container.id);
        assert!(state.is_dir(), "{}", state.display());
        let left = match handler.as_str() {
            "runc" => state.join("runc.Xy12ab"),
            _ => run.join("containers").join(&container.id).join("crun.Xy12ab"),
        };
        fs::write(&left, b"").expect("write");
        crisp::sys::mount::bind(Path::new("/bin/sh"), &left, false).expect("mount");
        host.stop(&container, 0);
        host.remove(&container);
        assert!(!left.exists() && !state.exists() && Path::new("/bin/sh").exists(), "{handler}");
        host.remove_all();
        host.assert_clean();
    }
    host.finish();
}

/// The same in a start, before the runtime knows the container: its `delete` finds none.
#[test]
fn what_a_failed_start_left_goes_too() {
    // `--root ROOT … run … ID`, in the container's directory.
    let (_dir, host) = host_with(
        "for id; do :; done\ncase \" $* \" in *probe*) ;; *' run '*)\n  \
        case $0 in *runc) left=$2/$id/runc.Xy12ab; mkdir -p $2/$id ;; *) left=crun.Xy12ab ;; esac\n  \
        : >$left; mount --bind /bin/sh $left; exit 1 ;;\nesac\n",
    );
    for handler in wanted_runtimes() {
        let sandbox = host.sandbox("failed", handler);
        let container = host.create(&sandbox, "main", &SLEEP);
        host.daemon.client().call(&start_request(&container)).expect_err("it cannot start");
        assert_eq!(host.status(&container).reason, "StartError", "{handler}");
        host.remove_all();
        let state = host.daemon.layout.path("run/runtime").join(handler).join(&container.id);
        assert!(!state.exists() && Path::new("/bin/sh").exists(), "{handler}");
        host.assert_clean();
    }
    host.finish();
}

/// Many programs take a second TERM for a wish to end at once.
#[test]
fn the_stop_signal_is_sent_once() {
    let host = Host::start();
    for handler in crate::harness::handlers() {
        let sandbox = host.sandbox(&format!("once-{handler}"), &handler);
        let container = host.launch(&sandbox, "main", &["sh", "-c", "trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"]);
        container.log.wait_for("ready");
        let stops: Vec<_> = [4, 4, 2]
            .into_iter()
            .map(|timeout| {
                let (client, container_id) = (host.daemon.client(), container.id.clone());
                std::thread::sleep(Duration::from_millis(200));
                std::thread::spawn(move || client.call(&StopContainerRequest { container_id, timeout, ..Default::default() }).map(drop))
            })
            .collect();
        stops.into_iter().for_each(|stop| stop.join().expect("no panic").expect("it stops"));
        assert_eq!(host.status(&container).exit_code, 137, "{handler}");
        let log = container.log.text("stdout");
        assert_eq!(log.matches("asked").count(), 1, "{handler}: {log}");
        host.remove_all();
    }
    host.finish();
}
