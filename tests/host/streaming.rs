//! Exec and attach over SPDY/3.1 with real OCI runtimes, as kubectl uses them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crisp::api::runtime::{AttachRequest, ContainerState, ExecRequest};
use crisp::streaming::spdy::frame;
use sha2::{Digest, Sha256};

use crate::daemon::patience;
use crate::harness::{handlers, kind, Container, Host, Sandbox, PATIENCE};
use crate::spdy::{connect, open, request, split, upgrade, Client, End, Session, PROTOCOLS};

type Exec = Session<TcpStream>;

/// One mebibyte.
const MIB: usize = 1 << 20;

/// Runs `test` with a container of busybox per runtime handler that this host has.
fn with_each(test: impl Fn(&Host, &Sandbox, &Container)) {
    if kind() == crate::daemon::Kind::Containerd {
        return;
    }
    let host = Host::start();
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("stream-{handler}"), &handler);
        let container = host.launch(&sandbox, "app", &["sleep", "100000"]);
        test(&host, &sandbox, &container);
    }
    host.finish();
}

fn url(host: &Host, c: &Container, wanted: &str, command: &[&str]) -> String {
    let request = ExecRequest {
        container_id: c.id.clone(),
        cmd: command.iter().map(|&word| word.to_owned()).collect(),
        stdin: wanted.contains('i'),
        stdout: wanted.contains('o'),
        stderr: wanted.contains('e'),
        tty: wanted.contains('r'),
        ..Default::default()
    };
    host.call(&request).url
}

/// `wanted` as in `spdy::open`; r for a terminal.
fn exec(host: &Host, c: &Container, wanted: &str, command: &[&str]) -> Exec {
    let url = url(host, c, wanted, command);
    open(connect(&url), &split(&url).1, wanted)
}

fn shell(host: &Host, c: &Container, script: &str) -> End {
    exec(host, c, "oe", &["sh", "-c", script]).end()
}

/// Types into a terminal until its output ends with `word`.
fn expect(session: &mut Exec, input: &str, word: &str) {
    let stdin = session.stdin;
    session.client.send(stdin, input.as_bytes(), false);
    while !session.said().contains(word) {
        assert!(session.client.step(), "the server hung up before {word:?}");
    }
}

/// Bytes that do not repeat: a generator, since a file of random bytes would only cost time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < patience(PATIENCE), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process of the container has these arguments.
fn runs(host: &Host, c: &Container, arguments: &str) -> bool {
    host.exec(c, &["ps", "-o", "args"]).1.lines().any(|line| line.trim() == arguments)
}

#[test]
fn exit_codes_and_programs_that_are_not_there() {
    with_each(|host, _, c| {
        for (script, code) in [("true", 0), ("exit 1", 1), ("nosuch", 127), ("kill -9 $$", 137)] {
            assert_eq!(shell(host, c, script).code, Some(code), "{script}");
        }
        let end = shell(host, c, "echo out; echo err >&2");
        assert_eq!((end.stdout.as_slice(), end.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        let end = exec(host, c, "oe", &["/no/such/program"]).end();
        assert_eq!((end.code, &end.status["status"], &end.status["reason"]), (None, &"Failure".into(), &"InternalError".into()));
        // Half-closed stdin.
        let mut session = exec(host, c, "io", &["cat"]);
        let stdin = session.stdin;
        session.client.send(stdin, b"to be, ", false);
        session.client.send(stdin, b"or not", true);
        let end = session.end();
        assert_eq!((end.stdout.as_slice(), end.code), (&b"to be, or not"[..], Some(0)));
    });
}

#[test]
fn each_output_keeps_its_own_stream() {
    with_each(|host, sandbox, c| {
        let both = |end: &End| (String::from_utf8_lossy(&end.stdout).into_owned(), String::from_utf8_lossy(&end.stderr).into_owned());
        let said = |out: &str, err: &str| (out.to_owned(), err.to_owned());
        let end = exec(host, c, "e", &["sh", "-c", "echo out; echo err >&2"]).end();
        assert_eq!((both(&end), end.code), (said("", "err\n"), Some(0)));
        let end = exec(host, c, "o", &["sh", "-c", "echo out; echo err >&2"]).end();
        assert_eq!((both(&end), end.code), (said("out\n", ""), Some(0)));
        // One that ends early does not give its place to the other.
        let end = shell(host, c, "echo out; exec 1>&-; sleep 0.5; echo err >&2");
        assert_eq!(both(&end), said("out\n", "err\n"));
        let end = shell(host, c, "echo err >&2; exec 2>&-; sleep 0.5; echo out");
        assert_eq!(both(&end), said("out\n", "err\n"));

        let talker = host.launch(sandbox, "talker", &["sh", "-c", "while :; do echo out; echo err >&2; sleep 0.1; done"]);
        for wanted in ["e", "o"] {
            let request =
                AttachRequest { container_id: talker.id.clone(), stdout: wanted == "o", stderr: wanted == "e", ..Default::default() };
            let url = host.call(&request).url;
            let mut session = open(connect(&url), &split(&url).1, wanted);
            let word = if wanted == "e" { "err" } else { "out" };
            let stream = if wanted == "e" { session.stderr } else { session.stdout };
            session.client.until("it is heard", |client| String::from_utf8_lossy(&client.streams[&stream].bytes).contains(word));
        }
        host.stop(&talker, 0);
    });
}

/// A program may have nothing open of its terminal for a while, and its session goes on.
#[test]
fn a_terminal_outlives_its_users() {
    with_each(|host, _, c| {
        let script = "echo first; exec 0</dev/null 1>/dev/null 2>/dev/null; sleep 1; echo back > /dev/tty; exit 5";
        let end = exec(host, c, "or", &["sh", "-c", script]).end();
        let said = String::from_utf8_lossy(&end.stdout).into_owned();
        assert!(said.contains("first") && said.contains("back") && end.code == Some(5), "{end:?}");
    });
}

/// As a client that gives up: CANCEL for its stdin.
fn reset(session: &mut Exec) {
    session.client.socket.write_all(&frame::reset(session.stdin, 5)).expect("reset stdin");
}

/// Who resets stdin has nothing more to say: the process sees its end, whatever had not been written yet.
#[test]
fn a_reset_stdin_is_an_end() {
    with_each(|host, _, c| {
        let mut session = exec(host, c, "io", &["sh", "-c", "cat > /dev/null; echo end"]);
        reset(&mut session);
        assert_eq!(session.end().stdout, b"end\n");
        // More than the pipe takes, and a reader that is late.
        let mut session = exec(host, c, "io", &["sh", "-c", "sleep 0.5; wc -c > /dev/null; echo end"]);
        let stdin = session.stdin;
        session.client.send(stdin, &noise(300 << 10), false);
        reset(&mut session);
        assert_eq!(session.end().stdout, b"end\n");
    });
}

#[test]
fn a_shell_on_a_terminal() {
    with_each(|host, _, c| {
        let mut session = exec(host, c, "ior", &["sh"]);
        let resize = session.resize;
        session.client.send(resize, b"{\"Width\":91,\"Height\":17}", false);
        expect(&mut session, "until stty size | grep -q '17 91'; do :; done; echo si''ze one\n", "size one");
        // Two in one piece, and one in two.
        session.client.send(resize, b"{\"Width\":10,\"Height\":20}{\"Width\":30,\"Height\":4", false);
        session.client.send(resize, b"0}\n", false);
        expect(&mut session, "until stty size | grep -q '40 30'; do :; done; echo si''ze two\n", "size two");
        expect(&mut session, "test -t 0 && test -t 1 && test -t 2 && echo a ter''minal\n", "a terminal");
        // Control-C interrupts what runs there, not the shell.
        expect(&mut session, "echo wai''ting; sleep 1000\n", "waiting");
        expect(&mut session, "\x03", "^C");
        let stdin = session.stdin;
        session.client.send(stdin, b"exit 5\n", false);
        assert_eq!(session.end().code, Some(5));
    });
}

#[test]
fn a_hundred_mebibytes_of_tar_both_ways() {
    with_each(|host, _, c| {
        let bytes = noise(100 * MIB);
        let digest = hex(&Sha256::digest(&bytes));
        let mut archive = tar::Builder::new(Vec::with_capacity(bytes.len() + 4096));
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, "noise", bytes.as_slice()).expect("make an archive");
        let archive = archive.into_inner().expect("make an archive");
        let mut session = exec(host, c, "ioe", &["tar", "xf", "-", "-C", "/tmp"]);
        let stdin = session.stdin;
        for piece in archive.chunks(32 << 10) {
            session.client.send(stdin, piece, false);
        }
        session.client.send(stdin, b"", true);
        let end = session.end();
        assert_eq!((end.code, end.stderr.len()), (Some(0), 0), "{}", String::from_utf8_lossy(&end.stderr));
        let said = shell(host, c, "sha256sum /tmp/noise").stdout;
        assert!(said.starts_with(digest.as_bytes()), "{}", String::from_utf8_lossy(&said));
        let end = exec(host, c, "oe", &["tar", "cf", "-", "-C", "/tmp", "noise"]).end();
        assert_eq!(end.code, Some(0));
        let mut archive = tar::Archive::new(end.stdout.as_slice());
        let mut entry = archive.entries().expect("entries").next().expect("one").expect("a good one");
        let mut back = Vec::with_capacity(bytes.len());
        entry.read_to_end(&mut back).expect("read the archive");
        assert_eq!(hex(&Sha256::digest(&back)), digest);
        shell(host, c, "rm /tmp/noise");
    });
}

/// Resident memory, threads and descriptors of the daemon.
fn size(host: &Host) -> (usize, usize, usize) {
    let pid = host.daemon.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read status");
    let number = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect("a line");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    };
    (number("VmRSS:"), number("Threads:"), fs::read_dir(format!("/proc/{pid}/fd")).expect("list descriptors").count())
}

#[test]
fn a_gibibyte_in_flat_memory() {
    with_each(|host, _, c| {
        shell(host, c, "true");
        let before = size(host).0;
        let mut session = exec(host, c, "o", &["dd", "if=/dev/zero", "bs=1M", "count=1024"]);
        // Enough for the status.
        session.client.keep = 4096;
        let stdout = session.stdout;
        let mut most = 0;
        for step in 1..=16 {
            session.client.until("more", |c| c.streams[&stdout].count >= 64 * MIB * step);
            most = most.max(size(host).0);
        }
        assert_eq!(session.client.streams[&stdout].count, 1024 * MIB);
        assert_eq!(session.end().code, Some(0));
        assert!(most < before + 16 * 1024, "{most} KiB after {before} KiB");
    });
}

#[test]
fn twenty_at_once() {
    with_each(|host, _, c| {
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..20)
                .map(|n| {
                    let url = url(host, c, "ioe", &["sh", "-c", &format!("cat; echo {n} >&2; exit {n}")]);
                    scope.spawn(move || {
                        let mut session = open(connect(&url), &split(&url).1, "ioe");
                        let stdin = session.stdin;
                        session.client.send(stdin, format!("input {n}").as_bytes(), true);
                        (n, session.end())
                    })
                })
                .collect();
            for thread in started {
                let (n, end) = thread.join().expect("no panic");
                assert_eq!((end.stdout, end.stderr, end.code), (format!("input {n}").into(), format!("{n}\n").into(), Some(n)));
            }
        });
    });
}

#[test]
fn a_client_that_goes_away() {
    with_each(|host, _, c| {
        // Without a terminal: stdin ends, and what does not read it lives on.
        let mut session = exec(host, c, "io", &["sh", "-c", "echo begun; cat; echo end > /tmp/ended; exec sleep 77777"]);
        expect(&mut session, "", "begun");
        assert!(!runs(host, c, "sleep 77777"));
        drop(session);
        eventually("stdin ends", || runs(host, c, "sleep 77777"));
        // With one: it hangs up.
        let mut session = exec(host, c, "ior", &["sh", "-c", "echo begun; exec sleep 88888"]);
        expect(&mut session, "", "begun");
        assert!(runs(host, c, "sleep 88888"));
        drop(session);
        eventually("the terminal hangs up", || !runs(host, c, "sleep 88888"));
        assert!(runs(host, c, "sleep 77777"));
    });
}

#[test]
fn a_client_that_goes_away_and_kills() {
    if kind() == crate::daemon::Kind::Containerd {
        return;
    }
    let host = Host::start_with(|options| options.tables = "[streaming]\nkill_on_disconnect = true\n".into());
    for handler in handlers() {
        let sandbox = host.sandbox(&format!("kill-{handler}"), &handler);
        let c = host.launch(&sandbox, "app", &["sleep", "100000"]);
        let mut session = exec(&host, &c, "io", &["sh", "-c", "sleep 77777 & echo begun; exec sleep 88888"]);
        expect(&mut session, "", "begun");
        eventually("both run", || runs(&host, &c, "sleep 77777") && runs(&host, &c, "sleep 88888"));
        drop(session);
        eventually("both are dead", || !runs(&host, &c, "sleep 77777") && !runs(&host, &c, "sleep 88888"));
    }
    host.finish();
}

#[test]
fn attach_twice_and_detach() {
    with_each(|host, sandbox, _| {
        let script = "while read line; do echo \"got $line\"; done; exit 3";
        let c = host.create_with(sandbox, "reader", &["sh", "-c", script], |config| config.stdin = true);
        host.start_container(&c);
        let attach = || {
            let request = AttachRequest { container_id: c.id.clone(), stdin: true, stdout: true, stderr: true, ..Default::default() };
            let url = host.call(&request).url;
            open(connect(&url), &split(&url).1, "ioe")
        };
        let (mut one, mut two) = (attach(), attach());
        // Both hear what one of them says.
        expect(&mut one, "a\n", "got a");
        expect(&mut two, "b\n", "got b");
        expect(&mut one, "", "got b");
        drop(one);
        expect(&mut two, "c\n", "got c");
        assert_eq!(host.status(&c).state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING));
        host.stop(&c, 0);
        assert_eq!(two.end().code, Some(0));
    });
}

/// `kubectl run -i --leave-stdin-open` comes back, and `kubectl run -it` survives a lost connection.
#[test]
fn the_end_of_an_attached_stdin() {
    with_each(|host, sandbox, _| {
        let start = |name: &str, script: &str, tty: bool| {
            let c = host.create_with(sandbox, name, &["sh", "-c", script], |config| {
                (config.stdin, config.stdin_once, config.tty) = (true, tty, tty);
            });
            host.start_container(&c);
            c
        };
        let attach = |c: &Container, tty: bool| {
            let request = AttachRequest { container_id: c.id.clone(), stdin: true, stdout: true, stderr: !tty, tty, ..Default::default() };
            let url = host.call(&request).url;
            open(connect(&url), &split(&url).1, if tty { "ior" } else { "ioe" })
        };
        let open = start("open", "cat; echo over", false);
        for _ in 0..2 {
            let mut session = attach(&open, false);
            let stdin = session.stdin;
            expect(&mut session, "abcd1234\n", "abcd1234");
            session.client.send(stdin, b"", true);
            assert_eq!(session.end().code, Some(0));
            assert_eq!(host.status(&open).state.enum_value(), Ok(ContainerState::CONTAINER_RUNNING));
        }
        host.stop(&open, 0);
        let shell = start("shell", "while read line; do echo \"got $line\"; done; exit 6", true);
        let mut session = attach(&shell, true);
        expect(&mut session, "one\n", "got one");
        drop(session);
        let mut session = attach(&shell, true);
        expect(&mut session, "two\n", "got two");
        let stdin = session.stdin;
        session.client.send(stdin, b"", true);
        assert_eq!(session.end().code, Some(0));
        assert_eq!(host.wait_exit(&shell).exit_code, 6);
    });
}

/// `kubectl attach` without flags of a container with a terminal, and with them of one without.
#[test]
fn attach_with_the_other_kind_of_terminal() {
    with_each(|host, sandbox, _| {
        for tty in [true, false] {
            let script = "echo up; while read line; do echo \"got $line\"; done";
            let c =
                host.create_with(sandbox, &format!("tty-{tty}"), &["sh", "-c", script], |config| (config.stdin, config.tty) = (true, tty));
            host.start_container(&c);
            let request =
                AttachRequest { container_id: c.id.clone(), stdin: true, stdout: true, stderr: tty, tty: !tty, ..Default::default() };
            let url = host.call(&request).url;
            let mut session = open(connect(&url), &split(&url).1, if tty { "ioe" } else { "ior" });
            expect(&mut session, "a\n", "got a");
            host.stop(&c, 0);
            assert_eq!(session.end().code, Some(0));
        }
    });
}

/// Ten thousand are scaled to what fits into a minute with both runtimes here: a runtime's refusal takes 20 ms and more. CRISP_TEST_EXECS=10000
/// runs them all.
#[test]
fn failing_execs_leave_nothing() {
    with_each(|host, _, c| {
        let fail = |count: usize| {
            for _ in 0..count {
                assert_eq!(exec(host, c, "o", &["/no/such/program"]).end().code, None);
            }
        };
        fail(20);
        let (memory, threads, descriptors) = size(host);
        fail(std::env::var("CRISP_TEST_EXECS").map_or(300, |text| text.parse().expect("CRISP_TEST_EXECS is a number")));
        // What only costs a session: 3,000 clients that upgrade and go.
        for _ in 0..3000 {
            let url = url(host, c, "o", &["true"]);
            let mut socket = connect(&url);
            assert_eq!(request(&mut socket, "POST", &split(&url).1, &upgrade(PROTOCOLS)).0, 101);
            Client::new(socket).stream("error");
        }
        eventually("the sessions end", || size(host).1 <= threads + 2);
        let after = size(host);
        assert!(after.2 <= descriptors + 4, "{} descriptors after {descriptors}", after.2);
        assert!(after.0 < memory + 8 * 1024, "{} KiB after {memory} KiB", after.0);
    });
}
