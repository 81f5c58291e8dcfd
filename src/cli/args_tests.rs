//! Tests of the command line, as a table.

use super::flags::Protocol;
use super::stream::{Attach, Exec, Forward};
use super::*;

fn environment(name: &str) -> Option<String> {
    (name == "HOME").then(|| "/root".to_owned())
}

fn parse_line(line: &str) -> Result<Invocation, Stop> {
    parse(line.split_whitespace().map(OsString::from).collect::<Vec<_>>(), &environment)
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn commands() {
    let ids = strings(&["a", "b"]);
    let exec = |command: &[&str]| Exec { container: "c".into(), command: strings(command), keys: vec![16, 17], ..Exec::default() };
    let forward = |address: &str, ports: &[(u16, u16)]| Forward {
        sandbox: "s".into(),
        address: address.parse().unwrap(),
        ports: ports.to_vec(),
        ca: None,
    };
    let run = |image: &str| Run { image: image.to_owned(), ..Run::default() };
    for (line, expected) in [
        ("ps", Command::Ps { all: false, quiet: false }),
        ("ps -aq", Command::Ps { all: true, quiet: true }),
        ("ps --all", Command::Ps { all: true, quiet: false }),
        ("pods -q", Command::Pods { quiet: true }),
        ("images", Command::Images { quiet: false }),
        ("pull a b", Command::Pull { images: ids.clone(), credentials: None }),
        ("pull a --creds me:x b", Command::Pull { images: ids.clone(), credentials: Some(flags::credentials("me:x").unwrap()) }),
        ("import --name r a", Command::Import { files: strings(&["a"]), name: Some("r".into()) }),
        ("import a b", Command::Import { files: ids.clone(), name: None }),
        ("logs c", Command::Logs { container: "c".into(), follow: false, tail: None, times: false }),
        ("logs -f --tail 5 c -t", Command::Logs { container: "c".into(), follow: true, tail: Some(5), times: true }),
        ("logs --tail=0 c", Command::Logs { container: "c".into(), follow: false, tail: Some(0), times: false }),
        ("exec c ls -l --timeout", Command::Exec(exec(&["ls", "-l", "--timeout"]))),
        ("exec -it c sh", Command::Exec(Exec { stdin: true, tty: true, ..exec(&["sh"]) })),
        (
            "exec --sync --detach-keys= --ca f c -- sh",
            Command::Exec(Exec { sync: true, keys: vec![], ca: Some("f".into()), ..exec(&["sh"]) }),
        ),
        ("attach c -i", Command::Attach(Attach { container: "c".into(), stdin: true, keys: vec![16, 17], ..Attach::default() })),
        (
            "attach -t --detach-keys a,ctrl-b c",
            Command::Attach(Attach { container: "c".into(), tty: true, keys: b"a\x02".to_vec(), ..Attach::default() }),
        ),
        ("port-forward s 80 8080:81 :82", Command::PortForward(forward("127.0.0.1", &[(80, 80), (8080, 81), (0, 82)]))),
        ("port-forward --address ::1 s 0:82", Command::PortForward(forward("::1", &[(0, 82)]))),
        ("exec --timeout 3 c -- ls -- x", Command::Exec(Exec { timeout: 3, sync: true, ..exec(&["ls", "--", "x"]) })),
        ("stop a b", Command::Stop { ids: ids.clone(), timeout: GRACE }),
        ("stop a --timeout 0 b", Command::Stop { ids: ids.clone(), timeout: 0 }),
        ("rm -f a b", Command::Rm { ids: ids.clone(), force: true }),
        ("rm -- a b", Command::Rm { ids: ids.clone(), force: false }),
        ("rmi a b", Command::Rmi { images: ids.clone(), which: None }),
        ("rmi --all", Command::Rmi { images: Vec::new(), which: Some(Which::All) }),
        ("rmi -q", Command::Rmi { images: Vec::new(), which: Some(Which::Unused) }),
        ("prune", Command::Prune { dry_run: false }),
        ("prune -n", Command::Prune { dry_run: true }),
        ("image fsck --repair", Command::Fsck { repair: true }),
        ("inspect a b", Command::Inspect { ids: ids.clone() }),
        ("info", Command::Info),
        ("version", Command::Version),
        ("run i", Command::Run(run("i"))),
        ("run -d i", Command::Run(Run { detach: true, ..run("i") })),
        ("run --rm i --", Command::Run(run("i"))),
        ("run i -- sh -c x -d", Command::Run(Run { command: strings(&["sh", "-c", "x", "-d"]), ..run("i") })),
        (
            "run --name n --runtime crun --host-network -e A=1 -e HOME -v /a:/b:ro i",
            Command::Run(Run {
                name: Some("n".into()),
                runtime: "crun".into(),
                host_network: true,
                environment: vec![("A".into(), "1".into()), ("HOME".into(), "/root".into())],
                volumes: vec![Volume { host: "/a".into(), container: "/b".into(), readonly: true }],
                ..run("i")
            }),
        ),
        (
            "run i -p 8080:80",
            Command::Run(Run { ports: vec![Port { ip: String::new(), host: 8080, container: 80, protocol: Protocol::Tcp }], ..run("i") }),
        ),
    ] {
        let got = parse_line(line);
        assert_eq!(got.map(|invocation| invocation.command), Ok(expected), "{line}");
    }
}

#[test]
fn errors() {
    for (line, message) in [
        ("", "no command; crisp --help lists them"),
        ("frob", "unknown command \"frob\"; crisp --help lists them"),
        ("help frob", "unknown command \"frob\"; crisp --help lists them"),
        ("--frob ps", "unknown flag --frob; crisp --help says more"),
        ("ps --frob", "ps: unknown flag --frob; crisp ps --help says more"),
        ("ps -x", "ps: unknown flag -x; crisp ps --help says more"),
        ("ps x", "ps: unexpected \"x\"; crisp ps --help says more"),
        ("ps -V", "ps: unknown flag -V; crisp ps --help says more"),
        ("-o yaml ps", "unknown output \"yaml\"; expected table or json; crisp --help says more"),
        ("stop -o json x", "stop: -o json has no meaning here"),
        ("stop", "stop: no ID; crisp stop --help says more"),
        ("stop --timeout -1 x", "--timeout -1: expected a whole number, 0 or more"),
        ("stop --timeout", "missing argument for option '--timeout'"),
        ("ps --all=yes", "unexpected argument for option '--all': \"yes\""),
        ("logs a b", "logs: unexpected \"b\"; crisp logs --help says more"),
        ("exec c", "exec: no COMMAND; crisp exec --help says more"),
        ("exec", "exec: no CONTAINER; crisp exec --help says more"),
        ("exec -i --timeout 1 c ls", "exec: --sync and --timeout exclude -i and -t; crisp exec --help says more"),
        ("attach a b", "attach: unexpected \"b\"; crisp attach --help says more"),
        ("attach --detach-keys ctrl-1 a", "--detach-keys ctrl-1: \"ctrl-1\" is no key; expected a, ctrl-a…"),
        ("port-forward s", "port-forward: no PORT; crisp port-forward --help says more"),
        ("port-forward s 0", "port 0: expected [LOCAL:]REMOTE"),
        ("port-forward s 1:2:3", "port 1:2:3: expected [LOCAL:]REMOTE"),
        ("port-forward s 65536:1", "port 65536:1: expected [LOCAL:]REMOTE"),
        ("port-forward --address x s 1", "--address x: expected an IP address"),
        ("import --name r a b", "import: --name goes with one FILE; crisp import --help says more"),
        ("run", "run: no IMAGE; crisp run --help says more"),
        ("run i ls", "run: unexpected \"ls\"; the command goes after --; crisp run --help says more"),
        ("run --rm -d i", "run: --rm and --detach exclude each other; crisp run --help says more"),
        ("run --host-network -p 1:1 i", "run: -p has no meaning with --host-network; crisp run --help says more"),
        ("run -e NOPE i", "-e NOPE: not set here; expected KEY=VALUE"),
        ("-s tcp://x ps", "socket tcp://x: expected a path or unix://PATH"),
    ] {
        assert_eq!(parse_line(line), Err(Stop::Usage(message.to_owned())), "{line}");
    }
}

#[test]
fn help_and_version_win_over_what_is_missing() {
    assert_eq!(parse_line("--help"), Err(Stop::Help(None)));
    assert_eq!(parse_line("help"), Err(Stop::Help(None)));
    assert_eq!(parse_line("-V"), Err(Stop::Version));
    for line in ["run --help", "run -h i", "help run", "-s x run -h"] {
        assert_eq!(parse_line(line), Err(Stop::Help(help::topic("run"))), "{line}");
    }
    assert!(parse_line("exec c ls --help").is_ok());
}

#[test]
fn sockets() {
    let variables = |crisp: &'static str, cri: &'static str| {
        move |name: &str| match name {
            "CRISP_SOCKET" => Some(crisp.to_owned()),
            "CONTAINER_RUNTIME_ENDPOINT" => Some(cri.to_owned()),
            _ => None,
        }
    };
    for (line, crisp, cri, socket) in [
        ("ps", "", "", "/run/crisp/crisp.sock"),
        ("ps", "", "unix:///run/x.sock", "/run/x.sock"),
        ("ps", "/c.sock", "unix:///run/x.sock", "/c.sock"),
        ("ps -s /f.sock", "/c.sock", "", "/f.sock"),
        ("--socket=unix:///f.sock ps", "", "", "/f.sock"),
    ] {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let got = parse(words, &variables(crisp, cri)).unwrap();
        assert_eq!(got.socket, PathBuf::from(socket), "{line}");
    }
}

#[test]
fn output() {
    assert!(!parse_line("ps").unwrap().json);
    assert!(parse_line("ps -o json").unwrap().json);
    assert!(parse_line("-ojson ps").unwrap().json);
    assert!(!parse_line("-o table stop x").unwrap().json);
}

#[test]
fn measuring() {
    use super::bench::{Bench, Stats, What};
    let stats = || Stats { interval: 2, ..Stats::default() };
    let labels = vec![("a".to_owned(), "b=c".to_owned()), ("d".to_owned(), String::new())];
    for (line, expected) in [
        ("stats", stats()),
        ("stats -aw --interval 1", Stats { all: true, watch: true, interval: 1, ..stats() }),
        ("stats -p --pod x -l a=b=c --label d=", Stats { pods: true, pod: Some("x".into()), labels, ..stats() }),
        ("stats --id c", Stats { id: Some("c".into()), ..stats() }),
    ] {
        assert_eq!(parse_line(line).map(|invocation| invocation.command), Ok(Command::Stats(expected)), "{line}");
    }
    let Ok(Command::Bench(plain)) = parse_line("bench density --image i").map(|invocation| invocation.command) else { panic!() };
    assert_eq!((plain.what, plain.pods, plain.callers, plain.command), (What::Density, 100, 0, strings(&["sleep", "1000000"])));
    let line = "bench stats --image i -n 5 --rounds 7 --callers 2 --monitor x --svg f --runtime r --host-network --cgroup-parent /p -- a b";
    let full = Bench {
        what: What::Stats,
        image: "i".into(),
        command: strings(&["a", "b"]),
        handler: "r".into(),
        host_network: true,
        cgroup_parent: "/p".into(),
        pods: 5,
        rounds: 7,
        callers: 2,
        monitors: strings(&["x"]),
        svg: Some("f".into()),
    };
    assert_eq!(parse_line(line).map(|invocation| invocation.command), Ok(Command::Bench(full)));
    assert!(parse_line("bench stats -o json").unwrap().json);
    for (line, message) in [
        ("bench", "bench: no benchmark; expected stats, lifecycle, density or clean; crisp bench --help says more"),
        ("bench x", "bench: unknown benchmark \"x\"; expected stats, lifecycle, density or clean; crisp bench --help says more"),
        ("bench density", "bench: no --image; crisp bench --help says more"),
        ("bench stats -n 1", "bench: no --image; crisp bench --help says more"),
        ("bench lifecycle x", "bench: unexpected \"x\"; crisp bench --help says more"),
        ("bench density --image i -n 0", "bench: --pods is 0; crisp bench --help says more"),
        ("bench density --rounds 0", "--rounds 0: expected 1 or more"),
        ("stats -l x", "--label x: expected KEY=VALUE"),
        ("stats -p --id x", "stats: --id names a container; use --pod with --pods; crisp stats --help says more"),
        ("stats -w -o json", "stats: --watch and -o json exclude each other; crisp stats --help says more"),
    ] {
        assert_eq!(parse_line(line), Err(Stop::Usage(message.to_owned())), "{line}");
    }
}
