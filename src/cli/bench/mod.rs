//! `crisp bench`: what calls of a CRI socket cost, be it ours or a peer's, in time, CPU and memory. The benchmark of the
//! repository, which sets two servers side by side, measures with the same functions.
//!
//! What a run makes carries a label (`workload::LABEL`) and is gone when the run ends, whatever ends it.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{select, Receiver};
use nix::sys::signal::Signal;

use super::args::bench::{Bench, What};
use super::client::{Client, SHORT};
use super::failure::{warn, During, Failure, Outcome};
use super::{interrupt, print, request};
use crate::api::admin::InfoRequest;
use crate::api::runtime::VersionRequest;
use crate::error::Context;
use crate::sys::cancel::Cancel;

/// Many pods, up and down.
pub mod density;
/// One pod, call by call.
pub mod lifecycle;
/// The processes behind a socket.
pub mod process;
/// Tables, bars and JSON.
pub mod report;
/// Percentiles.
pub mod samples;
/// Calls that read statistics.
pub mod stats;
/// Streams.
pub mod streaming;
/// Pictures.
pub mod svg;
/// What is made to be measured.
pub mod workload;

use process::Server;
use report::{Cell, Report};
use stats::Effort;
use workload::Workload;

/// Sampling windows: long enough for a median, short enough for a terminal.
const WINDOW: Duration = Duration::from_secs(20);
/// Time for which callers compete.
const RIVALRY: Duration = Duration::from_secs(3);
/// Callers of stats at once, unless said otherwise.
const CALLERS: usize = 8;

/// `crisp bench`
pub fn run(client: &Client, socket: &Path, bench: &Bench, json: bool, signals: &Receiver<Signal>) -> Outcome<u8> {
    if bench.what == What::Clean {
        return clean(client);
    }
    let logs = nix::unistd::mkdtemp(&std::env::temp_dir().join("crisp-bench-XXXXXX")).context(|| "create directory for logs")?;
    let outcome = run_in(client, socket, bench, logs.clone(), signals);
    if let Err(error) = crate::sys::file::remove_tree(&logs) {
        warn(&error.to_string());
    }
    let report = outcome?;
    if let Some(path) = &bench.svg {
        std::fs::write(path, svg::svg(&report)).context(|| format!("write {path}"))?;
    }
    print(&if json { report.json() } else { report.chart(0) }).map(|()| 0)
}

/// Measures on a thread, so that a signal is heard meanwhile: the first ends the measurement, a third the cleaning up too.
fn run_in(client: &Client, socket: &Path, bench: &Bench, logs: PathBuf, signals: &Receiver<Signal>) -> Outcome<Report> {
    let workload = Workload {
        socket: socket.to_owned(),
        handler: bench.handler.clone(),
        image: bench.image.clone(),
        command: bench.command.clone(),
        host_network: bench.host_network,
        cgroup_parent: bench.cgroup_parent.clone(),
        logs,
        token: request::token()?,
    };
    let cancel = Cancel::never();
    let (sender, done) = crossbeam_channel::bounded(1);
    let job = (client.clone(), bench.clone(), workload.clone(), cancel.clone());
    crate::sys::thread::spawn("bench", move || {
        let (client, bench, workload, cancel) = job;
        let measured = std::panic::catch_unwind(AssertUnwindSafe(|| measure(&client, &bench, &workload, &cancel)));
        let measured = measured.unwrap_or_else(|_| Err(Failure::failed("the benchmark panicked")));
        let cleaned = workload.clean(&client);
        let _ = sender.send((measured, cleaned));
    })?;
    let mut interrupts = Vec::new();
    loop {
        select! {
            recv(done) -> result => {
                progress("");
                let (measured, cleaned) = result.map_err(|_| Failure::failed("the benchmark ended without a word"))?;
                return match (measured, interrupts.first()) {
                    (Err(_), Some(signal)) => cleaned.and(Err(Failure::Silent(interrupt::exit_code(*signal)))),
                    (measured, _) => cleaned.and(measured),
                };
            }
            recv(signals) -> signal => {
                interrupts.extend(signal);
                cancel.set();
                if interrupts.len() == 3 {
                    return Err(Failure::failed(format!(
                        "gave up cleaning up: sandboxes with the label {}={} may be left; crisp bench clean removes them",
                        workload::LABEL, workload.token,
                    )));
                }
            }
        }
    }
}

/// Removes what earlier runs have left.
fn clean(client: &Client) -> Outcome<u8> {
    for sandbox in workload::leftovers(client)? {
        super::object::remove_sandbox(client, &sandbox.id)?;
        print(&format!("{}\n", sandbox.id))?;
    }
    Ok(0)
}

/// The server behind the socket; what it says of its directories helps to find its monitors.
pub fn server(client: &Client, socket: &Path, monitors: &[String]) -> Outcome<Server> {
    let dirs = match workload::known(client.admin().info(&InfoRequest::new(), SHORT)).during(|| "read info")? {
        Some(info) => vec![info.root, info.run],
        None => Vec::new(),
    };
    Ok(Server::behind(socket, &dirs, monitors)?)
}

fn measure(client: &Client, bench: &Bench, workload: &Workload, cancel: &Cancel) -> Outcome<Report> {
    let version = client.runtime().version(&VersionRequest::default(), SHORT).during(|| "read version")?;
    let server = server(client, &workload.socket, &bench.monitors)?;
    let mut report = Report::new(vec![version.runtime_name.clone()], None);
    report.fact(&version.runtime_name, version.runtime_version);
    if !bench.image.is_empty() {
        progress(&format!("looking for {}", bench.image));
        workload.prepare(client)?;
    }
    match bench.what {
        What::Stats => measure_stats(client, bench, workload, &server, &mut report, cancel)?,
        What::Lifecycle => measure_lifecycle(client, bench, workload, &server, &mut report, cancel)?,
        What::Density => measure_density(bench, workload, &server, &mut report, cancel)?,
        What::Clean => {}
    }
    Ok(report)
}

fn measure_stats(
    client: &Client,
    bench: &Bench,
    workload: &Workload,
    server: &Server,
    report: &mut Report,
    cancel: &Cancel,
) -> Outcome<()> {
    if bench.pods > 0 {
        progress(&format!("{} pods up", bench.pods));
        density::up(workload, "stat", bench.pods, 4, cancel)?;
    }
    let callers = if bench.callers == 0 { CALLERS } else { bench.callers };
    let effort = Effort { calls: bench.rounds, time: WINDOW };
    for query in stats::QUERIES {
        progress(&format!("{} calls of {}", bench.rounds, query.name()));
        let Some(cost) = stats::cost(query, client, server, effort, cancel)? else {
            report.set("time", query.name(), "ms", 0, None);
            continue;
        };
        report.fact(query.name(), format!("{} items", cost.items));
        report.set("time", query.name(), "ms", 0, Cell::of(&cost.times));
        report.set("CPU of server and helpers per call", query.name(), "ms", 0, Some(samples::millis(cost.cpu).into()));
        for number in [1, callers] {
            progress(&format!("{} by {number} callers", query.name()));
            let rate = stats::rate(query, workload, number, RIVALRY, cancel)?;
            report.set_rate("calls per second", &format!("{}, {number} callers", query.name()), "1/s", 0, Some(rate));
        }
    }
    memory(server, "with what is there", report);
    Ok(())
}

fn measure_lifecycle(
    client: &Client,
    bench: &Bench,
    workload: &Workload,
    server: &Server,
    report: &mut Report,
    cancel: &Cancel,
) -> Outcome<()> {
    let mut life = lifecycle::Life::default();
    let mut meter = server.meter();
    // The first round pays for caches and is not counted.
    for round in 0..=bench.rounds {
        cancel.check()?;
        progress(&format!("round {round} of {}", bench.rounds));
        let times = lifecycle::round(workload, client, round, Some(&mut meter))?;
        if round > 0 {
            life.add(times);
        }
    }
    for (at, step) in lifecycle::STEPS.into_iter().enumerate() {
        report.set("time", step, "ms", 0, Cell::of(&life.times[at]));
    }
    for (at, step) in lifecycle::STEPS.into_iter().enumerate() {
        let cpu = samples::millis(life.cpu[at]) / f64::from(life.rounds.max(1));
        report.set("CPU of server and helpers per call", step, "ms", 0, Some(cpu.into()));
    }
    Ok(())
}

fn measure_density(bench: &Bench, workload: &Workload, server: &Server, report: &mut Report, cancel: &Cancel) -> Outcome<()> {
    let callers = if bench.callers == 0 { bench.pods } else { bench.callers };
    memory(server, "memory before", report);
    let mut meter = server.meter();
    progress(&format!("{} pods up, {callers} callers", bench.pods));
    let up = density::up(workload, "dense", bench.pods, callers, cancel)?;
    let up_cpu = meter.take();
    // Allocators give back, and monitors settle, a moment later.
    cancel.sleep(Duration::from_secs(1))?;
    memory(server, &format!("memory with {} pods", bench.pods), report);
    progress("and down again");
    meter.take();
    let down = density::down(workload, up.pairs, callers, cancel)?;
    let down_cpu = meter.take();
    let title = format!("{} pods of one container, {callers} callers", bench.pods);
    let whole = |time: Duration| Some(Cell::from(time.as_secs_f64()));
    report.set(&title, "up, until all run", "s", 0, whole(up.time));
    report.set(&title, "down", "s", 0, whole(down.time));
    report.set(&title, "CPU of server and helpers, up", "s", 0, whole(up_cpu));
    report.set(&title, "CPU of server and helpers, down", "s", 0, whole(down_cpu));
    for (label, samples) in [
        ("RunPodSandbox", &up.run),
        ("CreateContainer", &up.create),
        ("StartContainer", &up.start),
        ("pod up (run+create+start)", &up.pod),
        ("StopPodSandbox", &down.stop),
        ("RemovePodSandbox", &down.remove),
    ] {
        report.set("time of calls", label, "ms", 0, Cell::of(samples));
    }
    Ok(())
}

/// PSS and RSS of each kind of process.
fn memory(server: &Server, title: &str, report: &mut Report) {
    for (name, memory) in server.memory() {
        for (what, kib) in [("PSS", memory.pss), ("RSS", memory.rss)] {
            let label = format!("{name}, {what} of {} processes", memory.processes);
            report.set(title, &label, "MiB", 0, Some((kib as f64 / 1024.0).into()));
        }
    }
}

/// One line that replaces itself, on a terminal alone.
pub fn progress(text: &str) {
    use std::io::{IsTerminal, Write};
    let mut out = std::io::stderr();
    if out.is_terminal() {
        let _ = write!(out, "\r\x1b[K{text}");
        let _ = out.flush();
    }
}
