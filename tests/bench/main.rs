//! The benchmark: crispd and Debian's containerd on this host in one run, side by side, through one gRPC channel each.
//!
//! `make bench`, or `cargo bench --bench bench -- [--quick] [--rounds N] [--pods N] [--pulls] [--only crisp|containerd] [--json FILE]`.
//! Prints a table and writes target/bench.json. Rounds of the peers alternate, so that both see the same machine.

mod images;
mod pods;
mod pulls;
mod streams;

#[path = "../host/client.rs"]
mod client;
#[path = "../host/daemon.rs"]
mod daemon;
#[path = "../host/registry.rs"]
mod registry;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crisp::api::runtime::VersionRequest;
use crisp::cli::bench::lifecycle::{self, Life};
use crisp::cli::bench::process::Server;
use crisp::cli::bench::report::{Cell, Report};
use crisp::cli::bench::samples::millis;
use crisp::cli::bench::stats::Effort;
use crisp::cli::bench::workload::Workload;
use crisp::cli::bench::{self, progress};
use crisp::cli::client::{Client, SHORT};
use crisp::cli::failure::Outcome;
use daemon::{crispd, find, image, shim, Daemon, Kind, Options, BUSYBOX};

/// What is measured: a daemon with one of its runtime handlers.
pub struct Peer {
    /// Index into the daemons.
    daemon: usize,
    /// `crisp/crun`
    name: String,
    handler: String,
    client: Client,
    server: Server,
}

impl Peer {
    fn workload(&self, daemon: &Daemon, host_network: bool) -> Workload {
        Workload {
            socket: daemon.layout.socket(),
            handler: self.handler.clone(),
            image: BUSYBOX.to_owned(),
            command: ["sleep", "1000000"].map(str::to_owned).to_vec(),
            host_network,
            cgroup_parent: daemon.layout.cgroup_parent(),
            logs: daemon.layout.path("logs"),
            token: daemon.layout.tag.clone(),
        }
    }
}

/// What is done between two rounds.
const PACES: [(&str, Duration); 2] = [("back to back", Duration::ZERO), ("200 ms pauses", Duration::from_millis(200))];

struct Plan {
    rounds: usize,
    idle_rounds: usize,
    pods: usize,
    only: Option<Kind>,
    json: PathBuf,
    /// Calls of each kind of statistics.
    effort: Effort,
    /// Calls after which memory is looked at again.
    growth: Effort,
    /// Through a forwarded port.
    bytes: usize,
    /// Rounds of pulls, and the data of the larger image's files.
    pulls: usize,
    image_bytes: u64,
    /// Nothing but the pulls.
    pulls_alone: bool,
}

fn main() {
    let plan = plan(std::env::args().skip(1));
    assert!(nix::unistd::geteuid().is_root(), "the benchmark makes sandboxes: run it as root");
    // The bridge plugin turns it on, and nobody off.
    let forwarding = fs::read("/proc/sys/net/ipv4/ip_forward").expect("read ip_forward");
    // Caught, so that what was changed is put back also when a call fails; the daemons clean up when they are dropped.
    let outcome = std::panic::catch_unwind(|| run(&plan));
    let _ = fs::write("/proc/sys/net/ipv4/ip_forward", forwarding);
    if outcome.is_err() {
        std::process::exit(1);
    }
}

fn run(plan: &Plan) {
    let (daemons, peers) = start(plan.only);
    let yardstick = peers.iter().position(|peer| daemons[peer.daemon].kind == Kind::Containerd);
    let mut report = Report::new(peers.iter().map(|peer| peer.name.clone()).collect(), yardstick);
    for (at, daemon) in daemons.iter().enumerate() {
        let column = column(&peers, at);
        let version = peers[column].client.runtime().version(&VersionRequest::default(), SHORT).expect("read version");
        report.fact(&version.runtime_name, version.runtime_version);
        binaries(&mut report, column, daemon.kind);
    }
    if !plan.pulls_alone {
        sandboxes(plan, &daemons, &peers, &mut report);
    }
    let columns: Vec<usize> = (0..daemons.len()).map(|at| column(&peers, at)).collect();
    pulls::measure(&daemons, &peers, &columns, plan, &mut report);
    progress("");
    print!("{}", report.table());
    fs::create_dir_all(plan.json.parent().expect("a file in a directory")).expect("make the directory of the results");
    fs::write(&plan.json, report.json()).unwrap_or_else(|e| panic!("write {}: {e}", plan.json.display()));
    println!("\nas JSON: {}", plan.json.display());
}

/// All about sandboxes and containers.
fn sandboxes(plan: &Plan, daemons: &[Daemon], peers: &[Peer], report: &mut Report) {
    for (network, host_network) in [("host network", true), ("CNI (bridge, portmap, tuning)", false)] {
        for (at, (pace, pause)) in PACES.into_iter().enumerate() {
            let rounds = if at == 0 { plan.rounds } else { plan.idle_rounds };
            let title = format!("{network}, {pace}");
            let mut lives = vec![Life::default(); peers.len()];
            // The first round pays for caches and is not counted.
            for round in 0..=rounds {
                for (peer, life) in peers.iter().zip(&mut lives) {
                    std::thread::sleep(pause);
                    let workload = peer.workload(&daemons[peer.daemon], host_network);
                    // Measuring CPU time takes time of its own, and would make the calls idle ones.
                    let mut meter = (at > 0).then(|| peer.server.meter());
                    let times = must(lifecycle::round(&workload, &peer.client, round, meter.as_mut()));
                    if round > 0 {
                        life.add(times);
                    }
                }
                progress(&format!("{title}: {round}/{rounds}"));
            }
            for (column, life) in lives.iter().enumerate() {
                show(report, &title, column, life, at > 0);
            }
        }
    }
    for (column, peer) in peers.iter().enumerate() {
        let daemon = &daemons[peer.daemon];
        streams::measure(daemon, &peer.client, &peer.workload(daemon, true), plan, report, column);
    }
    // One handler each: its first. Density is about the daemon.
    for (at, daemon) in daemons.iter().enumerate() {
        let column = column(peers, at);
        let Peer { client, server, .. } = &peers[column];
        let workload = peers[column].workload(daemon, false);
        pods::Subject { workload: &workload, client, server, report, column }.measure(plan);
    }
}

/// The first peer of a daemon.
fn column(peers: &[Peer], daemon: usize) -> usize {
    peers.iter().position(|peer| peer.daemon == daemon).expect("each daemon has a peer")
}

fn show(report: &mut Report, title: &str, column: usize, life: &Life, cpu: bool) {
    for (at, step) in lifecycle::STEPS.into_iter().enumerate() {
        report.set(title, step, "ms", column, Cell::of(&life.times[at]));
    }
    // The sums at the end alone: single calls are for `crisp bench`.
    for at in lifecycle::STEPS.len() - 2..lifecycle::STEPS.len() {
        if cpu {
            let value = millis(life.cpu[at]) / f64::from(life.rounds.max(1));
            report.set(title, &format!("{}: CPU", lifecycle::STEPS[at]), "ms", column, Some(value.into()));
        }
    }
}

fn binaries(report: &mut Report, column: usize, kind: Kind) {
    let (program, monitor) = match kind {
        Kind::Crispd => (Some(crispd()), Some(shim())),
        Kind::Containerd => (find("containerd"), find("containerd-shim-runc-v2")),
    };
    for (label, path) in [("daemon", program), ("monitor", monitor)] {
        if let Some(size) = path.and_then(|path| fs::metadata(path).ok()).map(|data| data.len()) {
            report.set("programs on disk", label, "MiB", column, Some((size as f64 / f64::from(1 << 20)).into()));
        }
    }
}

/// What must not fail: the benchmark has nobody to tell but whoever runs it.
fn must<T>(outcome: Outcome<T>) -> T {
    outcome.unwrap_or_else(|failure| panic!("{failure:?}"))
}

fn start(only: Option<Kind>) -> (Vec<Daemon>, Vec<Peer>) {
    let (mut daemons, mut names) = (Vec::new(), Vec::new());
    if only != Some(Kind::Containerd) {
        let runtimes: Vec<_> = ["crun", "runc"].into_iter().filter(|name| usable(name)).collect();
        let options = Options {
            runtimes: runtimes.iter().map(|&name| (name.to_owned(), find(name).expect("usable"))).collect(),
            ..Default::default()
        };
        names.extend(runtimes.iter().map(|name| (0, format!("crisp/{name}"), (*name).to_owned())));
        daemons.push(Daemon::start(Kind::Crispd, options));
    }
    if only != Some(Kind::Crispd) && find("containerd").is_some() {
        names.push((daemons.len(), "containerd/runc".to_owned(), String::new()));
        daemons.push(Daemon::start(Kind::Containerd, Options::default()));
    }
    assert!(!names.is_empty(), "nothing to measure: no OCI runtime works here, or containerd is not installed");
    for daemon in &daemons {
        daemon.import(&image("busybox"));
        daemon.import(&image("pause"));
    }
    let peer = |(daemon, name, handler): (usize, String, String)| {
        let socket = daemons[daemon].layout.socket();
        let client = must(Client::connect(&socket));
        // Its directory is in the command line of every monitor.
        let server = must(bench::server(&client, &socket, &[]));
        assert_eq!(server.pid(), daemons[daemon].pid(), "{name} is not who listens");
        Peer { daemon, name, handler, client, server }
    };
    let peers = names.into_iter().map(peer).collect();
    (daemons, peers)
}

/// crun before 1.9 refuses hybrid cgroups unless hugetlb is mounted (scripts/with-hugetlb).
fn usable(runtime: &str) -> bool {
    let hybrid = PathBuf::from("/sys/fs/cgroup/unified/cgroup.controllers").exists();
    let mounted = fs::read_to_string("/proc/mounts").is_ok_and(|text| text.contains(" /sys/fs/cgroup/hugetlb "));
    find(runtime).is_some() && (runtime != "crun" || !hybrid || mounted)
}

fn plan(arguments: impl Iterator<Item = String>) -> Plan {
    let json = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench.json");
    let effort = |calls, seconds| Effort { calls, time: Duration::from_secs(seconds) };
    let mut plan = Plan {
        rounds: 40,
        idle_rounds: 20,
        pods: 100,
        only: None,
        json,
        effort: effort(200, 10),
        growth: effort(10_000, 30),
        bytes: 1 << 30,
        pulls: 3,
        image_bytes: 1 << 30,
        pulls_alone: false,
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| usage(&format!("{argument} needs a value")));
        match argument.as_str() {
            // cargo bench says so to every benchmark.
            "--bench" => {}
            "--quick" => {
                (plan.rounds, plan.idle_rounds, plan.pods) = (5, 3, 20);
                (plan.effort, plan.growth, plan.bytes) = (effort(20, 3), effort(1_000, 5), 128 << 20);
                (plan.pulls, plan.image_bytes) = (1, 128 << 20);
            }
            "--rounds" => {
                plan.rounds = value().parse().unwrap_or_else(|_| usage("--rounds needs a number"));
                plan.idle_rounds = plan.rounds.div_ceil(2);
            }
            "--pods" => plan.pods = value().parse().unwrap_or_else(|_| usage("--pods needs a number")),
            "--pulls" => plan.pulls_alone = true,
            "--only" => match value().as_str() {
                "crisp" => plan.only = Some(Kind::Crispd),
                "containerd" => plan.only = Some(Kind::Containerd),
                other => usage(&format!("--only {other}: crisp or containerd")),
            },
            "--json" => plan.json = std::env::current_dir().expect("a current directory").join(value()),
            other => usage(&format!("{other}: unknown")),
        }
    }
    plan
}

fn usage(error: &str) -> ! {
    eprintln!("{error}\nusage: bench [--quick] [--rounds N] [--pods N] [--pulls] [--only crisp|containerd] [--json FILE]");
    std::process::exit(2);
}
