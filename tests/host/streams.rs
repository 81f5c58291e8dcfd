//! Exec with streams and attach, at the shim, with real OCI runtimes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crisp::cgroup::warm::Warmer;
use crisp::cgroup::Layout;
use crisp::error::{Code, Result};
use crisp::runtime::Kind;
use crisp::shim::client::{Attachment, RunningExec};
use crisp::shim::protocol::ExecRequest;
use crisp::sys::cancel::Cancel;
use crisp::sys::monitor;
use crisp::sys::process::Program;
use nix::poll::PollFlags;
use rustix::termios::{tcsetwinsize, Winsize};
use serde_json::json;

use crate::daemon::{patience, slowness};
use crate::shim::{eventually, in_container, installed, lives, process_of, run_all, Container, Fixture, Hugetlb, Scenario};

static LIMIT: LazyLock<Duration> = LazyLock::new(|| patience(Duration::from_secs(30)));

fn within() -> Cancel {
    Cancel::never().within(*LIMIT)
}

/// What a session has: our ends of the streams.
struct Attached {
    stdin: Option<File>,
    stdout: File,
    stderr: File,
    session: Attachment,
}

impl Attached {
    fn to(c: &Container, stdin: bool) -> Attached {
        let ([stdin_read, stdin_write], [stdout, stdout_end], [stderr, stderr_end]) = (pipe(), pipe(), pipe());
        let ends = [stdin.then(|| stdin_read.as_fd()), Some(stdout_end.as_fd()), Some(stderr_end.as_fd())];
        let session = c.client().attach(ends, &within()).unwrap();
        Attached { stdin: stdin.then(|| stdin_write.into()), stdout: stdout.into(), stderr: stderr.into(), session }
    }

    fn type_in(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    fn exit_code(&self) -> i32 {
        within().poll(&[(self.session.as_fd(), PollFlags::POLLIN)], None).unwrap();
        self.session.ended().unwrap().expect("it is readable").exit_code
    }
}

fn pipe() -> [OwnedFd; 2] {
    let (read, write) = monitor::pipe().unwrap();
    [read, write]
}

fn read_until(mut from: &File, word: &str) -> String {
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        within().poll(&[(from.as_fd(), PollFlags::POLLIN)], None).unwrap_or_else(|e| panic!("{word:?} is not in {text:?}: {e}"));
        match from.read(&mut chunk) {
            Ok(n) if n > 0 => text.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            other => panic!("{word:?} is not in {:?}: {other:?}", String::from_utf8_lossy(&text)),
        }
        if String::from_utf8_lossy(&text).contains(word) {
            return String::from_utf8(text).unwrap();
        }
    }
}

fn read_all(mut from: &File) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).unwrap();
    all
}

/// Starts a script with a terminal.
fn terminal(c: &Container, id: &str, script: &str, keep: bool) -> (RunningExec, File) {
    let mut process = process_of(&["sh", "-c", script]);
    process["terminal"] = json!(true);
    let request = ExecRequest { id: id.into(), process, console: None, keep };
    let (exec, terminal) = c.client().exec_terminal(&request, &within()).unwrap();
    (exec, terminal.into())
}

/// Starts a script with pipes: stdin and stdout.
fn piped(c: &Container, id: &str, script: &str, keep: bool) -> Result<(RunningExec, File, File)> {
    let ([stdin_read, stdin], [stdout, stdout_end]) = (pipe(), pipe());
    let request = ExecRequest { id: id.into(), process: process_of(&["sh", "-c", script]), console: None, keep };
    let exec = c.client().exec(&request, [stdin_read.as_fd(), stdout_end.as_fd(), stdout_end.as_fd()], &within())?;
    Ok((exec, stdin.into(), stdout.into()))
}

fn end(c: &Container) {
    c.client().kill(9, true).unwrap();
    c.finish();
}

fn exec_on_a_terminal(f: &Fixture) {
    let c = f.container("exec-tty", "sleep 1000");
    c.start();
    let (exec, mut tty) = terminal(&c, "t1", "test -t 0 && test -t 1 && test -t 2 && echo all three; exec sh", false);
    read_until(&tty, "all three");
    tcsetwinsize(&tty, Winsize { ws_col: 101, ws_row: 33, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    tty.write_all(b"stty size\n").unwrap();
    read_until(&tty, "33 101");
    tty.write_all(b"sleep 771\n").unwrap();
    eventually("it sleeps", || in_container(&c, "771") == 1);
    tty.write_all(b"\x03").unwrap();
    eventually("it is interrupted", || in_container(&c, "771") == 0);
    tty.write_all(b"exit 5\n").unwrap();
    assert_eq!(exec.wait(&within()).unwrap(), 5);
    // A program that is not there.
    let mut process = process_of(&["/bin/nope"]);
    process["terminal"] = json!(true);
    let request = ExecRequest { id: "t2".into(), process, console: None, keep: false };
    let error = c.client().exec_terminal(&request, &within()).unwrap_err();
    assert!(error.message().contains("nope"), "{error}");
    let left: Vec<_> = std::fs::read_dir(&c.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_string_lossy().starts_with("exec-")), "{left:?}");
    // The end of the container is the end of the session, which hears of it.
    let (exec, tty) = terminal(&c, "t3", "echo here; sleep 1000", true);
    read_until(&tty, "here");
    end(&c);
    assert_eq!(exec.wait(&within()).unwrap(), 137);
}

fn hanging_up(f: &Fixture) {
    let c = f.container("hangup", "sleep 1000");
    c.start();
    let tmp = f.dir.path().join("rootfs/tmp");
    let (exec, stdin, stdout) = piped(&c, "h1", "cat; touch /tmp/eof; exec sleep 881", true).unwrap();
    drop((exec, stdin, stdout));
    eventually("stdin has ended, and it goes on", || tmp.join("eof").exists() && in_container(&c, "881") == 1);

    let (exec, tty) =
        terminal(&c, "h2", "trap 'touch /tmp/hup' HUP; echo ready; while sleep 0.02; do test -e /tmp/hup && exec sleep 882; done", true);
    read_until(&tty, "ready");
    drop((exec, tty));
    eventually("the terminal was hung up, and it goes on", || tmp.join("hup").exists() && in_container(&c, "882") == 1);

    // What has no trap for it ends with its terminal.
    let (exec, tty) = terminal(&c, "h3", "echo ready; exec sleep 883", true);
    read_until(&tty, "ready");
    drop(tty);
    assert_eq!(exec.wait(&within()).unwrap(), 128 + libc::SIGHUP);

    // Those that nobody waits for count for nothing, and end with the container.
    let (exec, _stdin, stdout) = piped(&c, "h4", "echo ready; exec sleep 884", false).unwrap();
    read_until(&stdout, "ready");
    drop(exec);
    eventually("not to be kept", || in_container(&c, "884") == 0);
    eventually("two are left", || c.client().state().unwrap().execs == 2);
    end(&c);
    for name in ["eof", "hup"] {
        std::fs::remove_file(tmp.join(name)).unwrap();
    }
}

fn three_attachers(f: &Fixture) {
    let mut c = f.container("three", "read x; head -c 3000000 /dev/urandom; echo err >&2; read x; echo; echo late; exit 3");
    c.config.stdin = true;
    c.config.log_path = None;
    c.start();
    let mut all: Vec<Attached> = (0..3).map(|n| Attached::to(&c, n == 0)).collect();
    all[0].type_in("go\n");
    // One reads slowly at first.
    let firsts: Vec<Vec<u8>> = std::thread::scope(|s| {
        let read = |a: &Attached, pause: u64| {
            let mut first = vec![0; 3_000_000];
            let mut from = &a.stdout;
            from.read_exact(&mut first[..1000]).unwrap();
            std::thread::sleep(Duration::from_millis(pause));
            from.read_exact(&mut first[1000..]).unwrap();
            first
        };
        let threads: Vec<_> = all.iter().enumerate().map(|(n, a)| s.spawn(move || read(a, 100 * n as u64))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(firsts.windows(2).all(|w| w[0] == w[1]), "the attachers differ");
    let late = Attached::to(&c, false);
    // One goes in the middle.
    drop(all.pop());
    all[0].type_in("go\n");
    for a in &all {
        assert_eq!((read_all(&a.stdout), read_all(&a.stderr), a.exit_code()), (b"\nlate\n".to_vec(), b"err\n".to_vec(), 3));
    }
    assert_eq!((read_all(&late.stdout), late.exit_code()), (b"\nlate\n".to_vec(), 3));
    c.finish();
}

/// The output of a container that ends is all there, also for one who reads it when everything is over.
fn attached_to_the_end(f: &Fixture) {
    let mut c = f.container("to-the-end", "read x; head -c 100000 /dev/zero | tr '\\0' x; printf end");
    c.config.stdin = true;
    c.start();
    let mut slow = Attached::to(&c, true);
    let quick = Attached::to(&c, false);
    slow.type_in("go\n");
    let begin = Instant::now();
    assert_eq!(read_all(&quick.stdout).len(), 100_003);
    assert_eq!(quick.exit_code(), 0);
    eventually("the end is not late for one who does not read", || c.dir.join("exit").exists());
    // Who does not read is waited for in vain for 10 s.
    assert!(begin.elapsed() < patience(Duration::from_secs(10)));
    let got = read_all(&slow.stdout);
    assert!(got.len() == 100_003 && got.ends_with(b"xend"));
    assert_eq!(slow.exit_code(), 0);
    c.finish();
    let error = c.client().attach([None; 3], &within()).unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
}

fn stuck_attacher(f: &Fixture) {
    let mut c = f.container("stuck", "read x; head -c 1048576 /dev/zero | tr '\\0' x; echo; echo done; sleep 1000");
    c.config.stdin = true;
    let started = c.start();
    let stuck = Attached::to(&c, false);
    let mut reads = Attached::to(&c, true);
    let begin = Instant::now();
    reads.type_in("go\n");
    read_until(&reads.stdout, "done");
    let waited = begin.elapsed();
    // It holds the others up, for they must not lose anything, but only so long: `read_until` has its own limit.
    assert!(waited >= Duration::from_secs(10), "{waited:?}");
    let error = stuck.session.ended().unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().contains("having taken no output for 10 s"), "{error}");
    c.wait_for_line("stdout F done");
    assert!(lives(started.pid));
    end(&c);
}

fn stdin_of_attachers(f: &Fixture) {
    // Once: the container's stdin ends with the first one's.
    let mut c = f.container("once", "cat; echo end");
    (c.config.stdin, c.config.stdin_once) = (true, true);
    c.start();
    let without = Attached::to(&c, false);
    drop(without);
    let mut a = Attached::to(&c, true);
    a.type_in("hello\n");
    a.stdin = None;
    assert_eq!((read_all(&a.stdout), a.exit_code()), (b"hello\nend\n".to_vec(), 0));
    c.finish();
    // One that goes without a word counts too, and what it wrote last arrives.
    let mut c = f.container("once-gone", "cat");
    (c.config.stdin, c.config.stdin_once) = (true, true);
    c.start();
    let mut a = Attached::to(&c, true);
    a.type_in("last\n");
    drop(a);
    assert_eq!(c.finish().exit_code, 0);
    assert_eq!(c.log(), ["stdout F last"]);

    // Else it stays open for others, of which several may write.
    let mut c = f.container("open", "cat");
    c.config.stdin = true;
    c.start();
    let mut a = Attached::to(&c, true);
    a.type_in("one\n");
    c.wait_for_line("stdout F one");
    drop(a);
    let (mut a, mut b) = (Attached::to(&c, true), Attached::to(&c, true));
    a.type_in("two\n");
    read_until(&b.stdout, "two");
    b.type_in("three\n");
    read_until(&a.stdout, "three");
    // More than anybody's buffers.
    let big = vec![b'y'; 1 << 20];
    let (mut stdin, out) = (a.stdin.take().unwrap(), &a.stdout);
    drop(b);
    std::thread::scope(|s| {
        s.spawn(move || stdin.write_all(&big).unwrap());
        let mut got = vec![0; 1 << 20];
        let mut out = out;
        out.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|b| *b == b'y'));
    });
    end(&c);

    // An output that the container closes ends, though it runs on; also for who comes later.
    let mut c = f.container("closes", "echo last; exec >&-; read x; echo err >&2; sleep 1000");
    c.config.stdin = true;
    c.start();
    let mut a = Attached::to(&c, true);
    read_all(&a.stdout);
    let b = Attached::to(&c, false);
    assert_eq!(read_all(&b.stdout), b"");
    a.type_in("go\n");
    assert_eq!((read_until(&a.stderr, "err"), read_until(&b.stderr, "err")), ("err\n".into(), "err\n".into()));
    end(&c);

    // A container without stdin closes it.
    let c = f.container("none", "sleep 1000");
    c.start();
    let mut a = Attached::to(&c, true);
    let error = a.stdin.as_mut().unwrap().write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    end(&c);
}

fn attached_to_a_terminal(f: &Fixture) {
    let mut c = f.container(
        "attach-tty",
        "trap 'stty size; echo winch; told=yes' WINCH; echo up; while :; do \
        if read line; then told=; echo \"got $line\"; elif [ \"$told\" ]; then told=; else break; fi; done; echo eof",
    );
    c.spec["process"]["terminal"] = json!(true);
    (c.config.tty, c.config.stdin, c.config.stdin_once) = (true, true, true);
    c.start();
    c.wait_for_line("stdout F up");
    let mut a = Attached::to(&c, true);
    a.session.resize(90, 25).unwrap();
    read_until(&a.stdout, "winch");
    a.type_in("one\n");
    read_until(&a.stdout, "got one");
    let mut b = Attached::to(&c, true);
    // The same size, and yet the programs are told.
    b.session.resize(90, 25).unwrap();
    let text = read_until(&b.stdout, "winch");
    assert!(text.contains("25 90"), "{text:?}");
    b.type_in("two\n");
    read_until(&b.stdout, "got two");
    // Not again.
    b.session.resize(90, 25).unwrap();
    b.type_in("three\nfour\n");
    assert!(!read_until(&b.stdout, "got four").contains("winch"));
    // Neither who goes away ends it nor who writes no more: only the key does.
    drop(a);
    b.type_in("five\n");
    read_until(&b.stdout, "got five");
    let mut third = Attached::to(&c, true);
    third.stdin = None;
    b.type_in("six\n");
    read_until(&third.stdout, "got six");
    b.type_in("\x04");
    read_until(&b.stdout, "eof");
    assert_eq!(b.exit_code(), 0);
    c.finish();
}

/// A gibibyte arrives unchanged, and the shim does not grow.
fn plenty(f: &Fixture) {
    let size: usize = 1 << 30;
    let pattern: Vec<u8> = (0..4u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let file = f.dir.path().join("rootfs/tmp/pattern");
    std::fs::write(&file, &pattern).unwrap();
    let script = format!("i=0; while [ $i -lt {} ]; do cat /tmp/pattern; i=$((i+1)); done", size / pattern.len());
    let mut c = f.container("plenty", &format!("read x; {script}; exec sleep 1000"));
    (c.config.stdin, c.config.log_path) = (true, None);
    let started = c.start();
    let count = |mut from: &File| {
        let mut chunk = vec![0; 1 << 17];
        let begin = Instant::now();
        for place in (0..size).step_by(chunk.len()) {
            from.read_exact(&mut chunk).unwrap();
            let expected = &pattern[place % pattern.len()..][..chunk.len()];
            assert!(chunk == expected, "bytes have changed at {place}");
        }
        size as f64 / begin.elapsed().as_secs_f64() / 1e6
    };
    let (exec, _stdin, stdout) = piped(&c, "p1", &script, true).unwrap();
    let exec_rate = count(&stdout);
    assert_eq!(exec.wait(&within()).unwrap(), 0);
    let mut a = Attached::to(&c, true);
    a.type_in("go\n");
    let attach_rate = count(&a.stdout);
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", started.shim_pid)).unwrap();
    let anonymous = rollup.lines().find_map(|l| l.strip_prefix("Anonymous:")?.split_whitespace().next()?.parse::<u64>().ok()).unwrap();
    println!("{}: exec {exec_rate:.0} MB/s, attach {attach_rate:.0} MB/s; shim {anonymous} KiB anonymous after it", f.handler.name);
    if std::env::var_os("CRISP_SHIM").is_some() {
        assert!(anonymous <= 200, "{rollup}");
    }
    end(&c);
    std::fs::remove_file(file).unwrap();
}

fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn many_execs(f: &Fixture) {
    let c = f.container("many", "sleep 1000");
    let started = c.start();
    let before = descriptors(started.shim_pid);
    // 20 at once.
    std::thread::scope(|s| {
        for n in 0..20 {
            let c = &c;
            s.spawn(move || {
                let (exec, mut stdin, stdout) = piped(c, &format!("at-once-{n}"), &format!("cat; exit {n}"), true).unwrap();
                stdin.write_all(format!("exec {n}").as_bytes()).unwrap();
                drop(stdin);
                assert_eq!(read_all(&stdout), format!("exec {n}").into_bytes());
                assert_eq!(exec.wait(&within()).unwrap(), n);
            });
        }
    });
    let count: u32 = if f.handler.kind == Kind::Crun { 1000 } else { 100 } / slowness().pow(2);
    // The OCI runtime alone now and then, as a measure.
    let input = c.dir.join("own.json");
    std::fs::write(&input, process_of(&["true"]).to_string()).unwrap();
    let warmer = Warmer::start(&Layout::detect().unwrap()).unwrap();
    let (mut ours, mut own) = (Vec::new(), Vec::new());
    for n in 0..count {
        warmer.request();
        let begin = Instant::now();
        let request = ExecRequest { id: format!("n{n}"), process: process_of(&["true"]), console: None, keep: true };
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let exec = c.client().exec(&request, [null.as_fd(); 3], &within()).unwrap();
        assert_eq!(exec.wait(&within()).unwrap(), 0);
        ours.push(begin.elapsed());
        if n % 10 == 0 {
            warmer.request();
            let begin = Instant::now();
            let alone = Program::new(&f.handler.path).arg("--root").arg(&f.handler.root);
            alone.args(["exec", "--process"]).arg(&input).arg(&c.config.id).run_ok(&Cancel::never(), *LIMIT).unwrap();
            own.push(begin.elapsed());
        }
    }
    ours.sort();
    own.sort();
    println!("{}: p50 of exec {:?}, of the runtime's own {:?}", f.handler.name, ours[ours.len() / 2], own[own.len() / 2]);
    eventually("descriptors are closed", || descriptors(started.shim_pid) <= before);
    end(&c);
}

/// Nobody can start where nothing may be forked: an error, and nothing is left.
fn at_the_pids_limit(f: &Fixture) {
    let mut c = f.container("pids", "sleep 1000 & sleep 1000 & sleep 1000 & wait");
    c.spec["linux"]["resources"] = json!({"pids": {"limit": 4}});
    let started = c.start();
    eventually("it is full", || c.cgroup().procs().len() == 4);
    let before = descriptors(started.shim_pid);
    for n in 0..3 {
        // The process itself need not be forked below the limit, but what it forks is.
        if let Ok((exec, ..)) = piped(&c, &format!("full-{n}"), "sleep 0; sleep 0", true) {
            assert_ne!(exec.wait(&within()).unwrap(), 0);
        }
    }
    eventually("no exec is left", || c.client().state().unwrap().execs == 0 && c.cgroup().procs().len() == 4);
    eventually("descriptors are closed", || descriptors(started.shim_pid) <= before);
    let left: Vec<_> = std::fs::read_dir(&c.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_string_lossy().starts_with("exec-")), "{left:?}");
    end(&c);
}

/// A shim from before these requests says so in words.
fn older_shim(f: &Fixture) {
    let c = f.container("older", "sleep 1000");
    c.start();
    let stream = crisp::sys::socket::connect(&c.dir.join("shim.sock")).unwrap();
    crisp::sys::socket::send(&stream, br#"{"version":1,"body":{"not_yet":{}}}"#, &[]).unwrap();
    let (answer, _) = crisp::sys::socket::receive(&stream).unwrap().unwrap();
    let text = String::from_utf8(answer).unwrap();
    assert!(text.contains("unknown variant"), "{text}");
    end(&c);
}

#[test]
fn streams_with_runc_and_crun() {
    let scenarios: [Scenario; 11] = [
        ("exec_on_a_terminal", exec_on_a_terminal),
        ("hanging_up", hanging_up),
        ("three_attachers", three_attachers),
        ("attached_to_the_end", attached_to_the_end),
        ("stuck_attacher", stuck_attacher),
        ("stdin_of_attachers", stdin_of_attachers),
        ("attached_to_a_terminal", attached_to_a_terminal),
        ("plenty", plenty),
        ("many_execs", many_execs),
        ("at_the_pids_limit", at_the_pids_limit),
        ("older_shim", older_shim),
    ];
    let of = |kind, program: &str| {
        let f = Fixture::new(kind, program);
        let f = Fixture { parent: format!("{}-streams", f.parent), ..f };
        run_all(&f, program, &scenarios);
    };
    if installed("runc") {
        of(Kind::Runc, "runc");
    }
    if installed("crun") {
        let _hugetlb = Hugetlb::mounted();
        of(Kind::Crun, "crun");
    }
}
