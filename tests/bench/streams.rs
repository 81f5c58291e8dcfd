//! Streams: an exec through one beside the OCI runtime's own, and bytes through a forwarded port beside a plain copy.

use std::path::PathBuf;
use std::time::Duration;

use crisp::cli::bench::report::{Cell, Report};
use crisp::cli::bench::samples::{timed, Samples};
use crisp::cli::bench::streaming;
use crisp::cli::bench::workload::Workload;
use crisp::cli::client::Client;
use crisp::sys::cancel::Cancel;
use crisp::sys::process::Program;

use crate::daemon::{find, Daemon, Kind};
use crate::{must, progress, Plan};

const TITLE: &str = "streams";
const PAUSE: Duration = Duration::from_millis(200);
/// Runs of a copy; the best counts: everything else on the machine only makes it slower.
const COPIES: usize = 3;

pub fn measure(daemon: &Daemon, client: &Client, workload: &Workload, plan: &Plan, report: &mut Report, column: usize) {
    let workload = Workload { host_network: true, ..workload.clone() };
    let (pair, _) = must(workload.up(client, "streams"));
    let runtime = if workload.handler.is_empty() { "runc" } else { &workload.handler };
    let root = match daemon.kind {
        Kind::Crispd => daemon.layout.path("run/runtime").join(runtime),
        Kind::Containerd => PathBuf::from("/run/containerd/runc/k8s.io"),
    };
    let program = find(runtime).expect("a runtime that is measured is there");
    let direct = || {
        let words = ["--root".into(), root.clone(), "exec".into(), pair.container.clone().into(), "true".into()];
        timed(|| Program::new(&program).args(words).run_ok(&Cancel::never(), Duration::from_secs(20)).expect("exec of true")).1
    };
    for (name, pause, rounds) in [("back to back", Duration::ZERO, plan.rounds), ("200 ms pauses", PAUSE, plan.idle_rounds)] {
        progress(&format!("exec, {name}"));
        let (mut through, mut alone) = (Samples::default(), Samples::default());
        for round in 0..=rounds {
            std::thread::sleep(pause);
            let time = speaks(daemon.kind).then(|| must(streaming::exec_true(client, &pair.container))).flatten();
            std::thread::sleep(pause);
            let own = direct();
            // The first pays for caches.
            if round > 0 {
                time.into_iter().for_each(|time| through.add(time));
                alone.add(own);
            }
        }
        report.set(TITLE, &format!("exec of true by WebSocket, {name}"), "ms", column, Cell::of(&through));
        report.set(TITLE, &format!("the OCI runtime's own exec, {name}"), "ms", column, Cell::of(&alone));
    }
    progress("bytes through a port");
    let mut best = [0.0f64; 2];
    for _ in 0..COPIES {
        if speaks(daemon.kind) {
            best[0] = best[0].max(must(streaming::forward_rate(client, &pair.sandbox, plan.bytes)));
        }
        best[1] = best[1].max(must(streaming::copy_rate(plan.bytes)));
    }
    let rate = |value: f64| (value > 0.0).then_some(value / 1e6);
    report.set_rate(TITLE, "port-forward by WebSocket", "MB/s", column, rate(best[0]));
    report.set_rate(TITLE, "plain TCP copy by one thread", "MB/s", column, rate(best[1]));
    must(workload.down(client, &pair.sandbox));
}

/// containerd 1.6 knows SPDY alone.
fn speaks(kind: Kind) -> bool {
    kind == Kind::Crispd
}
