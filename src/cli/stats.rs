//! `crisp stats`: what containers or pods use, once or again and again.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{IsTerminal, Write};
use std::time::Duration;

use crossbeam_channel::Receiver;
use nix::sys::signal::Signal;
use protobuf::MessageField;

use super::args::bench::Stats;
use super::client::{Client, SHORT};
use super::failure::{During, Failure, Outcome};
use super::table::{short_id, size, Table};
use super::{interrupt, json, print, resolve, spark};
use crate::api::runtime::{
    ContainerState, ContainerStats, ContainerStatsFilter, CpuUsage, ListContainerStatsRequest, ListContainerStatsResponse,
    ListContainersRequest, ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, PodSandboxStats, PodSandboxStatsFilter, UInt64Value,
};

/// Between two samples, when the daemon has no rate yet.
const PAUSE: Duration = Duration::from_secs(1);
/// Bars of a sparkline.
const HISTORY: usize = 20;

/// `crisp stats`
pub fn run(client: &Client, wanted: &Stats, json: bool, signals: &Receiver<Signal>) -> Outcome<u8> {
    let query = Query::new(client, wanted)?;
    if json {
        return print(&query.json(client)?).map(|()| 0);
    }
    if wanted.watch {
        return watch(client, &query, Duration::from_secs(wanted.interval.into()), signals);
    }
    let mut rows = query.rows(client)?;
    if rows.iter().any(|row| row.rate.is_none()) {
        let earlier: HashMap<String, Counter> = rows.iter().map(|row| (row.id.clone(), row.counter)).collect();
        if !rows.is_empty() {
            std::thread::sleep(PAUSE);
            rows = query.rows(client)?;
        }
        rows.iter_mut().for_each(|row| row.rate = row.rate_since(earlier.get(&row.id)));
    }
    print(&query.table(&rows, None).to_string()).map(|()| 0)
}

/// What is asked for, with names resolved.
struct Query {
    pods: bool,
    all: bool,
    id: String,
    sandbox: String,
    labels: Vec<(String, String)>,
    names: HashMap<String, String>,
}

/// A running sum of CPU time and when it was read, both in ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counter {
    used: Option<u64>,
    at: i64,
}

/// A line of the table.
#[derive(Clone, Debug)]
struct Row {
    id: String,
    name: String,
    sandbox: String,
    counter: Counter,
    /// Cores in use, as the daemon says or as two samples do.
    rate: Option<f64>,
    memory: Option<u64>,
    disk: Option<u64>,
    inodes: Option<u64>,
    swap: Option<u64>,
    /// Of a pod's default interface: received, sent.
    network: Option<(u64, u64)>,
    processes: Option<u64>,
}

fn number(field: &MessageField<UInt64Value>) -> Option<u64> {
    field.as_ref().map(|field| field.value)
}

fn counter(cpu: &MessageField<CpuUsage>) -> (Counter, Option<f64>) {
    let counter = Counter { used: number(&cpu.usage_core_nano_seconds), at: cpu.timestamp };
    (counter, number(&cpu.usage_nano_cores).map(|cores| cores as f64 / 1e9))
}

impl Row {
    fn container(stats: &ContainerStats, sandbox: Option<&String>) -> Row {
        let (counter, rate) = counter(&stats.cpu);
        // Where there is no working set, all of it.
        let memory = number(&stats.memory.working_set_bytes).or_else(|| number(&stats.memory.usage_bytes));
        Row {
            id: stats.attributes.id.clone(),
            name: stats.attributes.metadata.name.clone(),
            sandbox: sandbox.cloned().unwrap_or_default(),
            counter,
            rate,
            memory,
            disk: number(&stats.writable_layer.used_bytes),
            inodes: number(&stats.writable_layer.inodes_used),
            swap: number(&stats.swap.swap_usage_bytes),
            network: None,
            processes: None,
        }
    }

    fn sandbox(stats: &PodSandboxStats) -> Row {
        let linux = &stats.linux;
        let (counter, rate) = counter(&linux.cpu);
        let sum = |take: fn(&ContainerStats) -> Option<u64>| linux.containers.iter().filter_map(take).reduce(|a, b| a.saturating_add(b));
        let interface = linux.network.default_interface.as_ref();
        Row {
            id: stats.attributes.id.clone(),
            name: stats.attributes.metadata.name.clone(),
            sandbox: String::new(),
            counter,
            rate,
            memory: number(&linux.memory.working_set_bytes).or_else(|| number(&linux.memory.usage_bytes)),
            disk: sum(|container| number(&container.writable_layer.used_bytes)),
            inodes: sum(|container| number(&container.writable_layer.inodes_used)),
            swap: sum(|container| number(&container.swap.swap_usage_bytes)),
            network: interface.and_then(|link| Some((number(&link.rx_bytes)?, number(&link.tx_bytes)?))),
            processes: number(&linux.process.process_count),
        }
    }

    /// The daemon's rate, else that between `earlier` and now.
    fn rate_since(&self, earlier: Option<&Counter>) -> Option<f64> {
        self.rate.or_else(|| {
            let earlier = earlier?;
            let time = self.counter.at.checked_sub(earlier.at).filter(|time| *time > 0)?;
            // A restarted container begins at zero.
            Some(self.counter.used?.checked_sub(earlier.used?)? as f64 / time as f64)
        })
    }
}

impl Query {
    fn new(client: &Client, wanted: &Stats) -> Outcome<Query> {
        let objects = resolve::objects(client)?;
        let id = wanted.id.as_ref().map(|word| resolve::container(&objects, word).map(|object| object.id.clone())).transpose()?;
        let sandbox = wanted.pod.as_ref().map(|word| resolve::sandbox(&objects, word).map(|object| object.id.clone())).transpose()?;
        let sandboxes = objects.iter().filter(|object| object.kind == resolve::Kind::Sandbox);
        Ok(Query {
            pods: wanted.pods,
            all: wanted.all,
            id: id.unwrap_or_default(),
            sandbox: sandbox.unwrap_or_default(),
            labels: wanted.labels.clone(),
            names: sandboxes.map(|object| (object.id.clone(), object.name.clone())).collect(),
        })
    }

    fn container_stats(&self, client: &Client) -> Outcome<ListContainerStatsResponse> {
        let mut request = ListContainerStatsRequest::new();
        request.filter = MessageField::some(ContainerStatsFilter {
            id: self.id.clone(),
            pod_sandbox_id: self.sandbox.clone(),
            label_selector: self.labels.iter().cloned().collect(),
            ..Default::default()
        });
        client.runtime().list_container_stats(&request, SHORT).during(|| "list container stats")
    }

    fn sandbox_stats(&self, client: &Client) -> Outcome<ListPodSandboxStatsResponse> {
        let mut request = ListPodSandboxStatsRequest::new();
        request.filter = MessageField::some(PodSandboxStatsFilter {
            id: self.sandbox.clone(),
            label_selector: self.labels.iter().cloned().collect(),
            ..Default::default()
        });
        client.runtime().list_pod_sandbox_stats(&request, SHORT).during(|| "list sandbox stats")
    }

    /// Sandboxes by container, of running ones alone unless all are wanted.
    fn containers(&self, client: &Client) -> Outcome<HashMap<String, String>> {
        let mut request = ListContainersRequest::new();
        if !self.all {
            request.filter.mut_or_insert_default().state.mut_or_insert_default().state = ContainerState::CONTAINER_RUNNING.into();
        }
        let containers = client.runtime().list_containers(&request, SHORT).during(|| "list containers")?.containers;
        Ok(containers.into_iter().map(|container| (container.id, container.pod_sandbox_id)).collect())
    }

    fn json(&self, client: &Client) -> Outcome<String> {
        if self.pods {
            return Ok(json::text(&json::value(&self.sandbox_stats(client)?)?));
        }
        let mut answer = self.container_stats(client)?;
        let containers = self.containers(client)?;
        answer.stats.retain(|stats| containers.contains_key(&stats.attributes.id));
        Ok(json::text(&json::value(&answer)?))
    }

    /// In an order that stays: by name and id.
    fn rows(&self, client: &Client) -> Outcome<Vec<Row>> {
        let mut rows: Vec<Row> = if self.pods {
            self.sandbox_stats(client)?.stats.iter().map(Row::sandbox).collect()
        } else {
            let stats = self.container_stats(client)?.stats;
            let containers = self.containers(client)?;
            let shown = stats.iter().filter(|stats| containers.contains_key(&stats.attributes.id));
            shown.map(|stats| Row::container(stats, containers.get(&stats.attributes.id))).collect()
        };
        rows.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Ok(rows)
    }

    /// With `history`, how CPU and memory of each went.
    fn table(&self, rows: &[Row], history: Option<&HashMap<String, History>>) -> Table {
        let mut heading = vec![if self.pods { "SANDBOX" } else { "CONTAINER" }, "NAME", "CPU %"];
        let trend = history.is_some();
        heading.extend(trend.then_some("CPU"));
        heading.push("MEM");
        heading.extend(trend.then_some("MEMORY"));
        heading.extend(["DISK", "INODES", "SWAP"]);
        heading.extend(if self.pods { &["RX", "TX", "PROCESSES"][..] } else { &["POD"][..] });
        let bytes = |value: Option<u64>| value.map(size).unwrap_or_default();
        let plain = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
        let mut table = Table::new(&heading);
        for row in rows {
            let past = history.and_then(|history| history.get(&row.id));
            let mut cells =
                vec![short_id(&row.id), row.name.clone(), row.rate.map(|rate| format!("{:.2}", rate * 100.0)).unwrap_or_default()];
            cells.extend(trend.then(|| past.map(|past| spark::line(past.cpu.iter().copied())).unwrap_or_default()));
            cells.push(bytes(row.memory));
            cells.extend(trend.then(|| past.map(|past| spark::line(past.memory.iter().copied())).unwrap_or_default()));
            cells.extend([bytes(row.disk), plain(row.inodes), bytes(row.swap)]);
            if self.pods {
                cells.extend([bytes(row.network.map(|n| n.0)), bytes(row.network.map(|n| n.1)), plain(row.processes)]);
            } else {
                cells.push(self.names.get(&row.sandbox).cloned().unwrap_or_else(|| short_id(&row.sandbox)));
            }
            table.row(cells);
        }
        table
    }
}

/// The last values of a row.
struct History {
    counter: Counter,
    cpu: VecDeque<f64>,
    memory: VecDeque<f64>,
}

fn push(values: &mut VecDeque<f64>, value: f64) {
    if values.len() == HISTORY {
        values.pop_front();
    }
    values.push_back(value);
}

/// Fills the rates in and keeps what the sparklines show; rows that have gone are forgotten.
fn remember(history: &mut HashMap<String, History>, rows: &mut [Row]) {
    let here: BTreeSet<String> = rows.iter().map(|row| row.id.clone()).collect();
    history.retain(|id, _| here.contains(id));
    for row in rows {
        row.rate = row.rate_since(history.get(&row.id).map(|past| &past.counter));
        let new = || History { counter: row.counter, cpu: VecDeque::new(), memory: VecDeque::new() };
        let past = history.entry(row.id.clone()).or_insert_with(new);
        past.counter = row.counter;
        if let Some(rate) = row.rate {
            push(&mut past.cpu, rate);
        }
        push(&mut past.memory, row.memory.unwrap_or(0) as f64);
    }
}

/// Shows the table anew every `interval` until a signal comes: in place on a terminal, one after another elsewhere.
fn watch(client: &Client, query: &Query, interval: Duration, signals: &Receiver<Signal>) -> Outcome<u8> {
    let terminal = std::io::stdout().is_terminal();
    let _screen = terminal.then(Screen::enter).transpose()?;
    let mut history = HashMap::new();
    loop {
        let mut rows = query.rows(client)?;
        remember(&mut history, &mut rows);
        let table = query.table(&rows, Some(&history)).to_string();
        print(&if terminal { frame(&table, window()) } else { format!("{table}\n") })?;
        if let Ok(signal) = signals.recv_timeout(interval) {
            // Ctrl-C is how one leaves.
            return match signal {
                Signal::SIGINT => Ok(0),
                signal => Err(Failure::Silent(interrupt::exit_code(signal))),
            };
        }
    }
}

/// Columns and lines of the terminal, if it tells.
fn window() -> Option<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col.into(), size.ws_row.into()))
}

/// What overwrites the last frame: each line is cut to the window, and its old rest erased.
fn frame(table: &str, window: Option<(usize, usize)>) -> String {
    let (columns, lines) = window.unwrap_or((usize::MAX, usize::MAX));
    let shown = table.lines().take(lines.saturating_sub(1).max(1));
    let body: String = shown.map(|line| format!("{}\x1b[K\r\n", line.chars().take(columns).collect::<String>())).collect();
    format!("\x1b[H{body}\x1b[J")
}

/// The terminal's second screen, without a cursor; left on every way out.
struct Screen;

impl Screen {
    fn enter() -> Outcome<Screen> {
        print("\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J").map(|()| Screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = std::io::stdout();
        let _ = out.write_all(b"\x1b[?25h\x1b[?1049l").and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, used: u64, at: i64) -> Row {
        let mut stats = ContainerStats::new();
        stats.attributes.mut_or_insert_default().id = id.into();
        stats.attributes.mut_or_insert_default().metadata.mut_or_insert_default().name = "web".into();
        let cpu = stats.cpu.mut_or_insert_default();
        cpu.timestamp = at;
        cpu.usage_core_nano_seconds.mut_or_insert_default().value = used;
        stats.memory.mut_or_insert_default().working_set_bytes.mut_or_insert_default().value = 64_000_000;
        Row::container(&stats, Some(&"s1".to_owned()))
    }

    #[test]
    fn rates_come_from_the_daemon_or_from_two_samples() {
        let first = row("c1", 1_000_000_000, 10_000_000_000);
        let mut second = row("c1", 1_500_000_000, 12_000_000_000);
        assert_eq!(second.rate_since(None), None);
        assert_eq!(second.rate_since(Some(&first.counter)), Some(0.25));
        // The same sample twice, and a container that was restarted.
        assert_eq!(first.rate_since(Some(&first.counter)), None);
        assert_eq!(row("c1", 5, 12_000_000_000).rate_since(Some(&first.counter)), None);
        second.rate = Some(2.0);
        assert_eq!(second.rate_since(Some(&first.counter)), Some(2.0));
    }

    #[test]
    fn tables_leave_out_what_is_not_known() {
        let names = HashMap::from([("s1".to_owned(), "shop".to_owned())]);
        let query = Query { pods: false, all: false, id: String::new(), sandbox: String::new(), labels: Vec::new(), names };
        let mut rows = vec![row("0123456789abcdef", 1, 1)];
        let table = query.table(&rows, None).to_string();
        let cells: Vec<Vec<&str>> = table.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).collect()).collect();
        assert_eq!(
            cells[0].iter().map(|cell| cell.trim()).collect::<Vec<_>>(),
            ["CONTAINER", "NAME", "CPU %", "MEM", "DISK", "INODES", "SWAP", "POD"]
        );
        assert_eq!(
            cells[1].iter().map(|cell| cell.trim()).collect::<Vec<_>>(),
            ["0123456789abc", "web", "-", "64.0 MB", "-", "-", "-", "shop"]
        );
        let mut history = HashMap::new();
        remember(&mut history, &mut rows);
        let mut rows = vec![row("0123456789abcdef", 500_000_001, 1_000_000_001)];
        remember(&mut history, &mut rows);
        let table = query.table(&rows, Some(&history)).to_string();
        assert!(table.contains("50.00") && table.contains("██"), "{table}");
        remember(&mut history, &mut [row("other", 1, 1)]);
        assert_eq!(history.len(), 1);
    }

    #[test]
    fn frames_fit_the_window() {
        assert_eq!(frame("größer\nb\nc\n", Some((3, 3))), "\x1b[Hgrö\x1b[K\r\nb\x1b[K\r\n\x1b[J");
        assert_eq!(frame("a\n", None), "\x1b[Ha\x1b[K\r\n\x1b[J");
    }
}
