//! The benchmark: crispd and Debian's containerd on this host in one run, side by side, through one gRPC channel each.
//!
//! `make bench`, or `cargo bench --bench bench -- [--quick] [--rounds N] [--pods N] [--only crisp|containerd] [--json FILE]`.
//! Prints a table and writes target/bench.json. Rounds of the peers alternate, so that both see the same machine.

mod density;
mod life;
mod memory;
mod report;
mod samples;

#[path = "../host/client.rs"]
mod client;
#[path = "../host/daemon.rs"]
mod daemon;
#[path = "../host/objects.rs"]
mod objects;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use client::Client;
use daemon::{find, image, Daemon, Kind, Options};
use life::{Network, Pace};
use report::Report;

/// What is measured: a daemon with one of its runtime handlers.
pub struct Peer {
    /// Index into the daemons.
    daemon: usize,
    /// `crisp/crun`
    name: String,
    handler: String,
}

struct Plan {
    rounds: usize,
    idle_rounds: usize,
    pods: usize,
    only: Option<Kind>,
    json: PathBuf,
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
    let clients: Vec<Client> = daemons.iter().map(Daemon::client).collect();
    let mut report = Report::new(&peers, &daemons);
    for network in [Network::Host, Network::Bridge] {
        for pace in [Pace::Hot, Pace::Idle] {
            let rounds = if pace == Pace::Hot { plan.rounds } else { plan.idle_rounds };
            let mut results = vec![Default::default(); peers.len()];
            // The first round pays for caches and is not counted.
            for round in 0..=rounds {
                for (peer, results) in peers.iter().zip(&mut results) {
                    if pace == Pace::Idle {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    let times = life::round(&clients[peer.daemon], &daemons[peer.daemon].layout, &peer.handler, network, round);
                    if round > 0 {
                        life::add(results, times);
                    }
                }
                progress(&format!("{}, {}: {round}/{rounds}", network.name(), pace.name()));
            }
            report.lives(network, pace, results);
        }
    }
    // One handler each: its first. Density is about the daemon.
    for (index, daemon) in daemons.iter().enumerate() {
        let at = peers.iter().position(|peer| peer.daemon == index).expect("each daemon has a peer");
        let result = density::measure(daemon, &peers[at].handler, plan.pods, progress);
        report.density(at, result);
    }
    progress("");
    print!("{}", report.table());
    fs::create_dir_all(plan.json.parent().expect("a file in a directory")).expect("make the directory of the results");
    fs::write(&plan.json, report.json()).unwrap_or_else(|e| panic!("write {}: {e}", plan.json.display()));
    println!("\nas JSON: {}", plan.json.display());
}

/// One line that replaces itself, on a terminal alone.
fn progress(text: &str) {
    use std::io::{IsTerminal, Write};
    let mut out = std::io::stderr();
    if out.is_terminal() {
        let _ = write!(out, "\r\x1b[K{text}");
        let _ = out.flush();
    }
}

fn start(only: Option<Kind>) -> (Vec<Daemon>, Vec<Peer>) {
    let (mut daemons, mut peers) = (Vec::new(), Vec::new());
    if only != Some(Kind::Containerd) {
        let runtimes: Vec<_> = ["crun", "runc"].into_iter().filter(|name| usable(name)).collect();
        let options = Options {
            runtimes: runtimes.iter().map(|&name| (name.to_owned(), find(name).expect("usable"))).collect(),
            ..Default::default()
        };
        daemons.push(Daemon::start(Kind::Crispd, options));
        for name in runtimes {
            peers.push(Peer { daemon: 0, name: format!("crisp/{name}"), handler: name.to_owned() });
        }
    }
    if only != Some(Kind::Crispd) && find("containerd").is_some() {
        peers.push(Peer { daemon: daemons.len(), name: "containerd/runc".into(), handler: String::new() });
        daemons.push(Daemon::start(Kind::Containerd, Options::default()));
    }
    assert!(!peers.is_empty(), "nothing to measure: no OCI runtime works here, or containerd is not installed");
    for daemon in &daemons {
        daemon.import(&image("busybox"));
        daemon.import(&image("pause"));
    }
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
    let mut plan = Plan { rounds: 40, idle_rounds: 20, pods: 100, only: None, json };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| usage(&format!("{argument} needs a value")));
        match argument.as_str() {
            // cargo bench says so to every benchmark.
            "--bench" => {}
            "--quick" => (plan.rounds, plan.idle_rounds, plan.pods) = (5, 3, 20),
            "--rounds" => {
                plan.rounds = value().parse().unwrap_or_else(|_| usage("--rounds needs a number"));
                plan.idle_rounds = plan.rounds.div_ceil(2);
            }
            "--pods" => plan.pods = value().parse().unwrap_or_else(|_| usage("--pods needs a number")),
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
    eprintln!("{error}\nusage: bench [--quick] [--rounds N] [--pods N] [--only crisp|containerd] [--json FILE]");
    std::process::exit(2);
}
