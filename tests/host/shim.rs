//! The shim with real OCI runtimes: the whole life of containers, and nothing left of them. Needs root, runc, crun and
//! a static busybox; a runtime that is not installed is passed over with a word.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crisp::cgroup::{Cgroup, Layout};
use crisp::error::Code;
use crisp::runtime::{Handler, Kind};
use crisp::shim::client::{self, Client, Started};
use crisp::shim::protocol::{Event, ExecRequest, ExitRecord, Phase, ShimConfig, VERSION};
use crisp::sys::cancel::Cancel;
use crisp::sys::{monitor, mount, pidfd, process};
use serde_json::{json, Value};

use crate::daemon::patience;
use crate::harness::wanted_runtimes;

/// How long anything may take.
static LIMIT: LazyLock<Duration> = LazyLock::new(|| patience(Duration::from_secs(30)));

fn shim_binary() -> PathBuf {
    std::env::var_os("CRISP_SHIM").map_or_else(|| env!("CARGO_BIN_EXE_crisp-shim").into(), PathBuf::from)
}

/// A place for containers of one OCI runtime.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub handler: Handler,
    pub parent: String,
}

/// The cgroup above all containers of a fixture.
pub struct Parent(pub Cgroup);

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.0.remove(patience(Duration::from_secs(1)));
    }
}

/// One container.
pub struct Container {
    pub dir: PathBuf,
    pub config: ShimConfig,
    pub spec: Value,
}

impl Fixture {
    pub fn new(kind: Kind, program: &str) -> Fixture {
        let dir = tempfile::Builder::new().prefix("crisp-shim-").tempdir().unwrap();
        let handler = Handler { name: program.into(), path: program.into(), root: dir.path().join("oci"), kind, systemd_cgroup: false };
        let bin = dir.path().join("rootfs/bin");
        for sub in ["rootfs/bin", "rootfs/proc", "rootfs/dev", "rootfs/sys", "rootfs/tmp"] {
            std::fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for applet in ["sh", "sleep", "cat", "head", "tr", "setsid", "true", "kill", "ps", "dd", "tail", "stty", "yes", "touch", "tee"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
        }
        Fixture { dir, handler, parent: format!("/crisp-shim-test-{}-{kind:?}", std::process::id()) }
    }

    pub fn container(&self, id: &str, script: &str) -> Container {
        let dir = self.dir.path().join("containers").join(id);
        std::fs::create_dir_all(&dir).unwrap();
        let cgroup = format!("{}/{id}", self.parent);
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": process_of(&["sh", "-c", script]),
            "root": {"path": self.dir.path().join("rootfs"), "readonly": false},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
            ],
            "linux": {
                "cgroupsPath": cgroup,
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
            },
        });
        let config = ShimConfig {
            version: VERSION,
            id: format!("{id}-{}", std::process::id()),
            handler: self.handler.clone(),
            cgroup,
            log_path: Some(dir.join("log")),
            tty: false,
            stdin: false,
            stdin_once: false,
            stdio_uid: None,
            stdio_gid: None,
            runtime_timeout_ms: 20_000,
        };
        Container { dir, config, spec }
    }
}

pub fn process_of(args: &[&str]) -> Value {
    json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "terminal": false})
}

impl Container {
    fn try_start(&self) -> crisp::error::Result<Started> {
        std::fs::write(self.dir.join("config.json"), self.spec.to_string()).unwrap();
        client::start(&shim_binary(), &self.dir, &self.config, &Cancel::never(), *LIMIT)
    }

    pub fn start(&self) -> Started {
        self.try_start().unwrap()
    }

    pub fn client(&self) -> Client {
        Client::new(&self.dir)
    }

    /// Waits for the end of the shim, after which everything but record and log is gone.
    pub fn finish(&self) -> ExitRecord {
        eventually("the shim ends", || !self.dir.join("shim.sock").exists() && client::exit_record(&self.dir).unwrap().is_some());
        assert!(!self.cgroup().exists(), "cgroups of {} are left", self.config.id);
        client::exit_record(&self.dir).unwrap().unwrap()
    }

    pub fn cgroup(&self) -> Cgroup {
        Cgroup::at(&Layout::detect().unwrap(), &self.config.cgroup).unwrap()
    }

    /// Texts of the log with stream and tag.
    pub fn log(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join("log")).unwrap();
        text.lines().map(|l| l.split_once(' ').unwrap().1.to_owned()).collect()
    }

    pub fn wait_for_line(&self, line: &str) {
        eventually(line, || self.log().iter().any(|l| l == line));
    }

    fn exec(&self, id: &str, script: &str) -> crisp::error::Result<(client::RunningExec, File)> {
        self.exec_process(id, process_of(&["sh", "-c", script]))
    }

    fn exec_process(&self, id: &str, process: Value) -> crisp::error::Result<(client::RunningExec, File)> {
        let (output, end): (OwnedFd, OwnedFd) = monitor::pipe().unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let request = ExecRequest { id: id.into(), process, console: None, keep: false };
        let exec = self.client().exec(&request, [null.as_fd(), end.as_fd(), null.as_fd()], &Cancel::never().within(*LIMIT))?;
        Ok((exec, File::from(output)))
    }
}

impl Drop for Container {
    /// A test that failed leaves nothing either.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.client().kill(9, true);
            let cgroup = Cgroup::at(&Layout::detect().unwrap(), &self.config.cgroup).unwrap();
            let _ = client::cleanup_dead(&self.config.handler, &self.config.id, &self.dir, Some(&cgroup), *LIMIT);
        }
    }
}

pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + *LIMIT;
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn exit_code_and_log(f: &Fixture) {
    let c = f.container("plain", "echo out; echo err >&2; printf end; exit 3");
    let started = c.start();
    assert!(started.pid > 1 && started.start_time > 0);
    let record = c.finish();
    assert_eq!((record.exit_code, record.signal, record.oom), (3, None, false));
    let age = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i64 - record.finished_at;
    assert!((0..10_000_000_000).contains(&age), "{age}");
    let mut log = c.log();
    log.sort();
    assert_eq!(log, ["stderr F err", "stdout F out", "stdout P end"]);
    let left: BTreeSet<String> = std::fs::read_dir(&c.dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(left, BTreeSet::from(["config.json", "exit", "log", "shim.json"].map(str::to_owned)));
    eventually("the shim is gone", || !lives(started.shim_pid));
    // One that has ended is not started again.
    assert_eq!(c.try_start().unwrap_err().code(), Code::FailedPrecondition);
}

fn signals(f: &Fixture) {
    let c = f.container("signals", "trap 'stop=1' TERM; echo ready; while [ -z \"$stop\" ]; do sleep 0.02; done; echo term; exit 7");
    c.start();
    c.wait_for_line("stdout F ready");
    c.client().kill(15, false).unwrap();
    assert_eq!(c.finish().exit_code, 7);
    assert!(c.log().contains(&"stdout F term".to_owned()));

    let mut c = f.container("killed", "");
    c.spec["process"]["args"] = json!(["sleep", "1000"]);
    let started = c.start();
    assert_eq!(pidfd::start_time_of(started.pid), Some(started.start_time));
    // The first process must not inherit what the shim does with its own signals.
    let status = std::fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
    for key in ["SigBlk", "SigIgn"] {
        let line = status.lines().find(|l| l.starts_with(key)).unwrap();
        // From 32 on they belong to the C library and to runc's Go.
        let set = u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap();
        assert_eq!(set & 0x7fff_ffff, 0, "{line}");
    }
    c.client().kill(9, true).unwrap();
    let record = c.finish();
    assert_eq!((record.exit_code, record.signal, record.oom), (137, Some(9), false));
}

fn events(f: &Fixture) {
    let c = f.container("events", "sleep 1000");
    let started = c.start();
    let watch = c.client().watch().unwrap();
    let Some(Event::State(state)) = watch.next().unwrap() else { panic!() };
    assert_eq!((state.phase, state.pid), (Phase::Running, started.pid));
    c.client().kill(9, false).unwrap();
    let Some(Event::Exit(record)) = watch.next().unwrap() else { panic!() };
    // Whoever hears of the end finds the record.
    assert_eq!(client::exit_record(&c.dir).unwrap().unwrap(), record);
    assert!(watch.next().unwrap().is_none());
    c.finish();
    assert_eq!(c.client().state().unwrap_err().code(), Code::Unavailable);
}

fn long_output(f: &Fixture) {
    let c = f.container("long", "head -c 1048576 /dev/zero | tr '\\0' x; exec sleep 0.1");
    // /dev/zero: the runtimes put it there.
    c.start();
    assert_eq!(c.finish().exit_code, 0);
    let log = c.log();
    assert_eq!(log.iter().map(|l| l.len() - "stdout P ".len()).sum::<usize>(), 1 << 20);
    assert!(log.iter().all(|l| l.starts_with("stdout P x") && l.len() <= 16 * 1024 + 9));
}

fn log_reopen(f: &Fixture) {
    let c = f.container("reopen", "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done; echo done; sleep 1000");
    c.start();
    let log = c.dir.join("log");
    let mut all = String::new();
    for n in 0.. {
        let old = c.dir.join(format!("log.{n}"));
        std::fs::rename(&log, &old).unwrap();
        c.client().reopen_log(&log).unwrap();
        assert!(log.exists() && n < 10_000);
        all.push_str(&std::fs::read_to_string(&old).unwrap());
        if all.ends_with(" F done\n") {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let numbers: Vec<String> = all.lines().map(|l| l.rsplit(' ').next().unwrap().to_owned()).collect();
    let expected: Vec<String> = (0..3000).map(|n| n.to_string()).chain(["done".to_owned()]).collect();
    assert_eq!(numbers, expected);
    c.client().kill(9, true).unwrap();
    c.finish();
    assert!(c.client().reopen_log(&log).is_err());
}

fn out_of_memory(f: &Fixture) {
    for (id, script, code) in [("oom", "exec tail /dev/zero", 137), ("oom-child", "tail /dev/zero; exit 5", 5)] {
        let mut c = f.container(id, &format!("sleep 0.2; {script}"));
        c.spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        c.start();
        let watch = c.client().watch().unwrap();
        let mut seen = Vec::new();
        while let Some(event) = watch.next().unwrap() {
            seen.push(event);
        }
        let record = c.finish();
        assert_eq!((record.exit_code, record.oom), (code, true), "{id}");
        if code != 137 {
            assert!(seen.iter().any(|e| matches!(e, Event::Oom { kills: 1 })) || seen.len() == 2, "{seen:?}");
        }
    }
}

fn failed_start(f: &Fixture) {
    let mut c = f.container("missing", "");
    c.spec["process"]["args"] = json!(["/bin/nope"]);
    let error = c.try_start().unwrap_err();
    assert!(error.message().contains("nope"), "{error}");
    assert!(error.message().starts_with("start container missing-"), "{error}");
    assert!(!c.cgroup().exists());
    assert!(!c.dir.join("shim.sock").exists() && !c.dir.join("exit").exists());
    // The words of the runtime are no output of the container.
    assert!(c.log().is_empty());

    let mut c = f.container("no-runtime", "true");
    c.config.handler.path = "/nonexistent/runtime".into();
    assert!(c.try_start().unwrap_err().message().contains("/nonexistent/runtime"));

    let mut c = f.container("hangs", "true");
    let script = f.dir.path().join("hangs");
    let text = "#!/bin/sh\ncase \"$*\" in *delete*) exit 0;; esac\nsleep 1000 & sleep 1000\n";
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    c.config.handler.path = script.clone();
    c.config.runtime_timeout_ms = 300;
    let error = c.try_start().unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().contains("timed out after 0.3 s"), "{error}");

    // Given up by the caller.
    let mut c = f.container("given-up", "true");
    c.config.handler.path = script;
    std::fs::write(c.dir.join("config.json"), c.spec.to_string()).unwrap();
    let cancel = Cancel::never();
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| client::start(&shim_binary(), &c.dir, &c.config, &cancel, *LIMIT));
        eventually("the shim listens", || crisp::sys::socket::connect(&c.dir.join("shim.sock")).is_ok());
        let begin = Instant::now();
        cancel.set();
        assert_eq!(starting.join().unwrap().unwrap_err().code(), Code::Cancelled);
        // Told to, it gives up at once; one that must be done without is waited for for 15 s.
        assert!(begin.elapsed() < Duration::from_secs(15) && !c.dir.join("shim.sock").exists());
    });
}

fn execs(f: &Fixture) {
    let c = f.container("execs", "sleep 1000");
    c.start();
    let (exec, mut output) = c.exec("e1", "echo hello; cat /proc/self/cgroup; exit 4").unwrap();
    assert_eq!(exec.wait(&Cancel::never()).unwrap(), 4);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("hello\n"));
    // In the container's cgroup or a child of it, in every hierarchy: limits hold for execs too.
    for (name, path) in text.lines().skip(1).filter_map(|l| l.split_once(':')?.1.split_once(':')) {
        let apart = ["hugetlb", "misc", "rdma", "net_cls,net_prio", "perf_event"].contains(&name);
        assert!(apart || path.starts_with(&c.config.cgroup), "{text}");
    }

    // A program that is not there is an error, not exit 127.
    let error = c.exec_process("e2", process_of(&["/bin/nope"])).unwrap_err();
    assert!(error.message().contains("nope"), "{error}");

    // A daemon is left alone.
    let (exec, _output) = c.exec("e3", "setsid sleep 999 & sleep 0.1; exit 0").unwrap();
    assert_eq!(exec.wait(&Cancel::never().within(*LIMIT)).unwrap(), 0);
    assert_eq!(in_container(&c, "999"), 1);

    // Many at once.
    let many: Vec<_> = (0..8).map(|n| c.exec(&format!("m{n}"), &format!("sleep 0.2; exit {n}")).unwrap()).collect();
    for (n, (exec, _)) in many.iter().enumerate() {
        assert_eq!(exec.wait(&Cancel::never()).unwrap(), n as i32);
    }

    // A time limit: everything dies, also what has left its session and parent.
    let (exec, _output) = c.exec("e4", "(setsid sh -c 'sleep 998 & sleep 998' &); sleep 998").unwrap();
    eventually("three sleepers", || in_container(&c, "998") == 3);
    assert_eq!(exec.wait(&Cancel::never().within(Duration::from_millis(50))).unwrap_err().code(), Code::DeadlineExceeded);
    exec.kill().unwrap();
    assert_eq!(in_container(&c, "998"), 0);
    assert_eq!(exec.wait(&Cancel::never()).unwrap(), 137);
    exec.kill().unwrap();

    // A client that goes away takes its exec along.
    let (exec, _output) = c.exec("e5", "sleep 997").unwrap();
    drop(exec);
    eventually("the abandoned exec ends", || in_container(&c, "997") == 0);

    // One that runs when the container ends is answered.
    let (exec, _output) = c.exec("e6", "sleep 1000").unwrap();
    c.client().kill(9, true).unwrap();
    assert_eq!(exec.wait(&Cancel::never()).unwrap(), 137);
    c.finish();
    assert!(c.exec("e7", "true").is_err());
}

/// Living processes of the container whose command line has the word.
pub fn in_container(c: &Container, word: &str) -> usize {
    let of = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is = |pid: &i32| of(pid).split(|b| *b == 0).any(|w| w == word.as_bytes());
    c.cgroup().procs().iter().filter(|p| lives(**p) && is(p)).count()
}

fn exec_out_of_memory(f: &Fixture) {
    let mut c = f.container("exec-oom", "sleep 1000");
    c.spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    c.start();
    let (exec, _output) = c.exec("e1", "exec tail /dev/zero").unwrap();
    assert_eq!(exec.wait(&Cancel::never()).unwrap(), 137);
    eventually("the kill is counted", || c.client().state().unwrap().oom_kills == 1);
    c.client().kill(9, true).unwrap();
    assert!(c.finish().oom);
}

fn shared_pid_namespace(f: &Fixture) {
    let mut c = f.container("shared", "sleep 996 & setsid sleep 996 & sleep 0.1; exit 2");
    c.spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]);
    c.start();
    eventually("three processes", || in_container(&c, "996") == 2 || c.dir.join("exit").exists());
    // Not when those would have ended by themselves: it has a limit.
    assert_eq!(c.finish().exit_code, 2);
}

fn update(f: &Fixture) {
    let c = f.container("update", "sleep 1000");
    c.start();
    c.client().update(json!({"memory": {"limit": 64 << 20, "swap": 64 << 20}}), *LIMIT).unwrap();
    let dir = c.cgroup().dir("memory").unwrap().to_owned();
    let value = ["memory.limit_in_bytes", "memory.max"].iter().find_map(|n| std::fs::read_to_string(dir.join(n)).ok());
    assert_eq!(value.unwrap().trim(), (64 << 20).to_string());
    // crun takes any text for a number.
    let refused = c.client().update(json!({"memory": {"limit": "many"}}), *LIMIT);
    assert!(refused.is_err() || f.handler.kind == Kind::Crun);
    c.client().kill(9, true).unwrap();
    c.finish();
}

fn terminal(f: &Fixture) {
    let mut c = f.container("tty", "test -t 0 && test -t 1 && echo terminal");
    c.spec["process"]["terminal"] = json!(true);
    c.config.tty = true;
    c.start();
    assert_eq!(c.finish().exit_code, 0);
    assert_eq!(c.log(), ["stdout F terminal\r"].map(|l| l.trim_end().to_owned()));
}

fn stdin_kept_open(f: &Fixture) {
    let mut c = f.container("stdin", "cat; echo never");
    c.config.stdin = true;
    c.config.log_path = None;
    c.start();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(c.client().state().unwrap().phase, Phase::Running);
    c.client().kill(9, true).unwrap();
    assert_eq!(c.finish().exit_code, 137);
}

fn rubbish(f: &Fixture) {
    use std::io::Write;
    let c = f.container("rubbish", "sleep 1000");
    c.start();
    let socket = c.dir.join("shim.sock");
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], b"\x02\0\0\0{}", b"\x05\0\0\0{}", b""] {
        let mut stream = crisp::sys::socket::connect(&socket).unwrap();
        let _ = stream.write_all(bytes);
    }
    let stream = crisp::sys::socket::connect(&socket).unwrap();
    crisp::sys::socket::send(&stream, br#"{"version":99,"body":"state"}"#, &[]).unwrap();
    let (answer, _) = crisp::sys::socket::receive(&stream).unwrap().unwrap();
    assert!(String::from_utf8(answer).unwrap().contains("protocol version 99"));
    // More connections than there may be.
    let crowd: Vec<_> = (0..200).filter_map(|_| crisp::sys::socket::connect(&socket).ok()).collect();
    drop(crowd);
    eventually("it answers again", || c.client().state().is_ok());
    c.client().kill(9, true).unwrap();
    c.finish();
}

fn shim_killed(f: &Fixture) {
    let c = f.container("orphan", "sleep 995");
    let started = c.start();
    let watch = c.client().watch().unwrap();
    assert!(matches!(watch.next().unwrap(), Some(Event::State(_))));
    monitor::kill(started.shim_pid, libc::SIGKILL).unwrap();
    assert_eq!(watch.next().unwrap(), None);
    assert!(lives(started.pid));
    client::cleanup_dead(&f.handler, &c.config.id, &c.dir, Some(&c.cgroup()), *LIMIT).unwrap();
    assert!(!lives(started.pid) && !c.cgroup().exists());
    assert_eq!(client::exit_record(&c.dir).unwrap(), None);
    client::cleanup_dead(&f.handler, &c.config.id, &c.dir, Some(&c.cgroup()), *LIMIT).unwrap();
}

fn deaf_to_signals(f: &Fixture) {
    let c = f.container("deaf", "sleep 1000");
    let started = c.start();
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGPIPE] {
        monitor::kill(started.shim_pid, signal).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(c.client().state().unwrap().phase, Phase::Running);
    c.client().kill(9, true).unwrap();
    c.finish();
}

fn small(f: &Fixture) {
    let c = f.container("small", "echo hello; sleep 1000");
    let started = c.start();
    c.wait_for_line("stdout F hello");
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", started.shim_pid)).unwrap();
    let value = |key: &str| rollup.lines().find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok()).unwrap();
    println!("{}: shim pss {} KiB, anonymous {} KiB", f.handler.name, value("Pss:"), value("Anonymous:"));
    // The static release build alone is small.
    if std::env::var_os("CRISP_SHIM").is_some() {
        assert!(value("Anonymous:") <= 200, "{rollup}");
    }
    c.client().kill(9, true).unwrap();
    c.finish();
}

/// Name and body.
pub type Scenario = (&'static str, fn(&Fixture));

fn all(kind: Kind, program: &str) {
    let f = Fixture::new(kind, program);
    let scenarios: [Scenario; 17] = [
        ("exit_code_and_log", exit_code_and_log),
        ("signals", signals),
        ("events", events),
        ("long_output", long_output),
        ("log_reopen", log_reopen),
        ("out_of_memory", out_of_memory),
        ("failed_start", failed_start),
        ("execs", execs),
        ("exec_out_of_memory", exec_out_of_memory),
        ("shared_pid_namespace", shared_pid_namespace),
        ("update", update),
        ("terminal", terminal),
        ("stdin_kept_open", stdin_kept_open),
        ("rubbish", rubbish),
        ("shim_killed", shim_killed),
        ("deaf_to_signals", deaf_to_signals),
        ("small", small),
    ];
    run_all(&f, program, &scenarios);
}

/// Runs scenarios one after the other; nothing of them may be left.
pub fn run_all(f: &Fixture, program: &str, scenarios: &[Scenario]) {
    let _parent = Parent(Cgroup::at(&Layout::detect().unwrap(), &f.parent).unwrap());
    for (name, scenario) in scenarios {
        let begin = Instant::now();
        scenario(f);
        println!("{program} {name}: {} ms", begin.elapsed().as_millis());
    }
    let parent = Cgroup::at(&Layout::detect().unwrap(), &f.parent).unwrap();
    assert!(parent.procs().is_empty());
    parent.remove(patience(Duration::from_secs(1))).unwrap();
    assert!(!std::fs::read_dir(&f.handler.root).is_ok_and(|mut d| d.next().is_some()), "the runtime remembers something");
    assert!(mount::below(f.dir.path()).unwrap().is_empty());
    let ours = f.dir.path().to_string_lossy().into_owned();
    // A shim's socket goes before its process does.
    eventually("no process is left", || {
        let lines = std::fs::read_dir("/proc").unwrap().flatten().map(|e| std::fs::read(e.path().join("cmdline")).unwrap_or_default());
        !lines.into_iter().any(|line| String::from_utf8_lossy(&line).contains(&ours))
    });
}

/// Whether `program` is to be tested and there.
pub fn installed(program: &str) -> bool {
    if !wanted_runtimes().contains(&program) {
        return false;
    }
    let found = process::Program::new(program).arg("--version").run(&Cancel::never(), *LIMIT).is_ok();
    if !found {
        println!("{program} is not installed: passed over");
    }
    found
}

/// crun 1.8 wants hugetlb as a v1 hierarchy where there is v1 at all.
pub struct Hugetlb(Option<&'static Path>);

impl Hugetlb {
    pub fn mounted() -> Hugetlb {
        let layout = Layout::detect().unwrap();
        let place = Path::new("/sys/fs/cgroup/hugetlb");
        if layout.mode == crisp::cgroup::Mode::V2 || layout.v1("hugetlb").is_some() {
            return Hugetlb(None);
        }
        std::fs::create_dir_all(place).unwrap();
        let done = nix::mount::mount(Some("cgroup"), place, Some("cgroup"), nix::mount::MsFlags::empty(), Some("hugetlb"));
        done.unwrap();
        Hugetlb(Some(place))
    }
}

impl Drop for Hugetlb {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            let _ = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
            let _ = std::fs::remove_dir(place);
        }
    }
}

#[test]
fn shim_with_runc_and_crun() {
    if installed("runc") {
        all(Kind::Runc, "runc");
    }
    if installed("crun") {
        let _hugetlb = Hugetlb::mounted();
        all(Kind::Crun, "crun");
    }
}

/// The static build; a container has no libraries for another one.
fn static_shim() -> Option<PathBuf> {
    let found = std::env::var_os("CRISP_SHIM").map(PathBuf::from);
    if found.is_none() {
        println!("CRISP_SHIM does not name a static crisp-shim: passed over");
    }
    found
}

#[test]
fn probe_tells_what_works() {
    let Some(shim) = static_shim() else { return };
    let dir = tempfile::tempdir().unwrap();
    let handler = |program: &str, kind| Handler {
        name: program.into(),
        path: program.into(),
        root: dir.path().join("oci"),
        kind,
        systemd_cgroup: false,
    };
    if installed("runc") {
        let (version, features) = crisp::runtime::probe::probe(&handler("runc", Kind::Runc), dir.path(), &shim).unwrap();
        assert_eq!(version.name, "runc");
        assert!(features.documented && features.user_namespaces() && !features.mount_options.is_empty(), "{features:?}");
    }
    if installed("crun") {
        // 1.8.1 has no `features`: what it can do was tried.
        let (version, features) = crisp::runtime::probe::probe(&handler("crun", Kind::Crun), dir.path(), &shim).unwrap();
        assert!(version.name == "crun" && features.user_namespaces(), "{features:?}");
    }
    // A runtime that says it is one and refuses everything: its own words come back.
    let refuses = dir.path().join("refuses");
    let text = "#!/bin/sh\ncase \"$*\" in --version) echo crun version 9.9;; *) echo 'no cgroups for me' >&2; exit 1;; esac\n";
    std::fs::write(&refuses, text).unwrap();
    std::fs::set_permissions(&refuses, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = crisp::runtime::probe::probe(&handler(refuses.to_str().unwrap(), Kind::Crun), dir.path(), &shim).unwrap_err();
    assert!(error.message().ends_with("run a container: exit 1: no cgroups for me"), "{error}");
    std::fs::remove_file(&refuses).unwrap();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).filter(|n| n != "oci").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn sandbox_init_has_nothing_and_reaps() {
    let Some(shim) = static_shim() else { return };
    let args = ["--pid", "--fork", "--kill-child"];
    let mut outer = process::Program::new("unshare").args(args).arg(&shim).arg("init").spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", outer.id());
    let pid = || std::fs::read_to_string(&children).ok()?.trim().parse::<i32>().ok();
    let status = |key: &str| {
        let text = std::fs::read_to_string(format!("/proc/{}/status", pid()?)).ok()?;
        text.lines().find_map(|l| Some(l.strip_prefix(key)?.trim().to_owned()))
    };
    eventually("init is confined", || status("Seccomp:").as_deref() == Some("2"));
    let init = pid().unwrap();
    for key in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(status(key).as_deref(), Some("0000000000000000"), "{key}");
    }
    assert_eq!(status("NoNewPrivs:").as_deref(), Some("1"));
    let names = |of: &str| std::fs::read_dir(format!("/proc/{init}/{of}")).unwrap().count();
    assert_eq!((names("root"), names("fd")), (0, 0));
    assert_eq!(std::fs::read_to_string(format!("/proc/{init}/mounts")).unwrap().lines().count(), 1);
    // Not "text file busy", which would end with the process. (The mount is asked first only when truncating.)
    let written = File::options().write(true).truncate(true).open(format!("/proc/{init}/exe")).unwrap_err();
    assert_eq!(written.raw_os_error(), Some(libc::EROFS));
    // From inside, TERM does nothing and orphans are reaped.
    let inside = |script: &str| {
        let enter = process::Program::new("nsenter").args(["-t", &init.to_string(), "--pid", "sh", "-c", script]);
        enter.run_ok(&Cancel::never(), *LIMIT).unwrap();
    };
    inside("kill -TERM 1; kill -HUP 1; (sleep 0.05 &)");
    let descendants = format!("/proc/{init}/task/{init}/children");
    eventually("the orphan is reaped", || std::fs::read_to_string(&descendants).unwrap().is_empty());
    assert_eq!(pid(), Some(init));
    let rollup = std::fs::read_to_string(format!("/proc/{init}/smaps_rollup")).unwrap();
    println!("sandbox init: {}", rollup.lines().filter(|l| l.starts_with("Pss:") || l.starts_with("Private_Dirty")).collect::<String>());
    monitor::kill(init, libc::SIGKILL).unwrap();
    outer.wait().unwrap();
}

#[test]
fn fifty_shims_are_small() {
    if static_shim().is_none() || !installed("runc") {
        return;
    }
    let f = Fixture::new(Kind::Runc, "runc");
    let f = Fixture { parent: format!("{}-fifty", f.parent), ..f };
    let _parent = Parent(Cgroup::at(&Layout::detect().unwrap(), &f.parent).unwrap());
    let all: Vec<(Container, Started)> = (0..50)
        .map(|n| {
            let c = f.container(&format!("c{n}"), "sleep 1000");
            let started = c.start();
            (c, started)
        })
        .collect();
    let sum = |key: &str| -> u64 {
        let of = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let value = |text: String| text.lines().find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok());
        all.iter().map(|(_, s)| value(of(s.shim_pid)).unwrap()).sum()
    };
    println!("50 shims: pss {} KiB each, private dirty {} KiB each", sum("Pss:") / 50, sum("Private_Dirty:") / 50);
    assert!(sum("Pss:") / 50 <= 200);
    for (c, _) in &all {
        c.client().kill(9, true).unwrap();
    }
    for (c, _) in &all {
        c.finish();
    }
}
