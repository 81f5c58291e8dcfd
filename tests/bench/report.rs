//! The table for people and the JSON for programs.

use std::path::Path;

use crisp::api::runtime::VersionRequest;
use serde_json::{json, Map, Value};

use crate::daemon::{crispd, find, shim, Daemon, Kind};
use crate::density::{Density, QUERIES};
use crate::life::{Life, Network, Pace, STEPS};
use crate::memory::Memory;
use crate::samples::Samples;
use crate::Peer;

const LABEL: usize = 42;
const COLUMN: usize = 24;

pub struct Report {
    names: Vec<String>,
    /// The column the others are compared with: containerd's, if it is there.
    yardstick: Option<usize>,
    sections: Vec<Section>,
    facts: Map<String, Value>,
}

struct Section {
    title: String,
    rows: Vec<Row>,
}

struct Row {
    label: String,
    unit: &'static str,
    /// Per peer: the value that counts, and the 95th percentile beside it.
    cells: Vec<Option<(f64, Option<f64>)>>,
}

impl Report {
    pub fn new(peers: &[Peer], daemons: &[Daemon]) -> Report {
        let names: Vec<_> = peers.iter().map(|peer| peer.name.clone()).collect();
        let yardstick = peers.iter().position(|peer| daemons[peer.daemon].kind == Kind::Containerd);
        let mut facts = Map::new();
        let mut add = |key: &str, value: String| {
            facts.insert(key.to_owned(), Value::String(value));
        };
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        add("kernel", read("/proc/sys/kernel/osrelease"));
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let count = std::thread::available_parallelism().map_or(1, |count| count.get());
        add("cpu", format!("{count} x {}", model.trim_start_matches([' ', '\t', ':'])));
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        add("cgroups", if unified { "v2" } else { "v1" }.to_owned());
        for daemon in daemons {
            if let Ok(version) = daemon.client().call(&VersionRequest::default()) {
                add(&version.runtime_name, version.runtime_version);
            }
        }
        let mut report = Report { names, yardstick, sections: Vec::new(), facts };
        report.binaries(peers, daemons);
        report
    }

    pub fn lives(&mut self, network: Network, pace: Pace, results: Vec<Life>) {
        let title = format!("{}, {}", network.name(), pace.name());
        let row = |step: usize| Row {
            label: STEPS[step].into(),
            unit: "ms",
            cells: results.iter().map(|life| percentiles(&life[step])).collect(),
        };
        self.sections.push(Section { title, rows: (0..STEPS.len()).map(row).collect() });
    }

    /// What was measured of the daemon of `peer`, in that peer's column.
    pub fn density(&mut self, peer: usize, density: Density) {
        let title = "many pods of one container, CNI".to_owned();
        let mut rows: Vec<(String, &'static str, f64, Option<f64>)> = vec![
            (format!("{} pods up, 4 clients", density.pods), "s", density.up.as_secs_f64(), None),
            (format!("{} pods down, 4 clients", density.pods), "s", density.down.as_secs_f64(), None),
        ];
        for (pods, memory) in density.memory {
            rows.extend(memory_rows(pods, memory));
        }
        for (name, samples) in QUERIES.into_iter().zip(&density.queries) {
            if let Some((middle, high)) = percentiles(samples) {
                rows.push((format!("{name} at {}", density.pods), "ms", middle, high));
            }
        }
        for (label, unit, value, high) in rows {
            self.set(&title, &label, unit, peer, (value, high));
        }
    }

    fn set(&mut self, title: &str, label: &str, unit: &'static str, peer: usize, cell: (f64, Option<f64>)) {
        let count = self.names.len();
        let at = self.sections.iter().position(|section| section.title == title).unwrap_or_else(|| {
            self.sections.push(Section { title: title.to_owned(), rows: Vec::new() });
            self.sections.len() - 1
        });
        let rows = &mut self.sections[at].rows;
        let row = rows.iter().position(|row| row.label == label).unwrap_or_else(|| {
            rows.push(Row { label: label.to_owned(), unit, cells: vec![None; count] });
            rows.len() - 1
        });
        rows[row].cells[peer] = Some(cell);
    }

    fn binaries(&mut self, peers: &[Peer], daemons: &[Daemon]) {
        for (index, daemon) in daemons.iter().enumerate() {
            let peer = peers.iter().position(|peer| peer.daemon == index).expect("each daemon has a peer");
            let (program, monitor) = match daemon.kind {
                Kind::Crispd => (Some(crispd()), Some(shim())),
                Kind::Containerd => (find("containerd"), find("containerd-shim-runc-v2")),
            };
            for (label, path) in [("daemon", program), ("monitor", monitor)] {
                if let Some(size) = path.and_then(|path| std::fs::metadata(path).ok()).map(|data| data.len()) {
                    self.set("programs on disk", label, "MiB", peer, (size as f64 / f64::from(1 << 20), None));
                }
            }
        }
    }

    pub fn table(&self) -> String {
        let mut text = String::new();
        let facts: Vec<_> = self.facts.iter().map(|(key, value)| format!("{key} {}", value.as_str().unwrap_or_default())).collect();
        text += &format!("{}\np50 (p95); x: how many times better than containerd\n", facts.join("; "));
        for section in &self.sections {
            let mut line = format!("\n{:<LABEL$}", section.title);
            self.names.iter().for_each(|name| line += &format!("{name:>COLUMN$}"));
            text += &format!("{line}\n");
            for row in &section.rows {
                let mut line = format!("{:<LABEL$}", format!("  {} [{}]", row.label, row.unit));
                (0..self.names.len()).for_each(|peer| line += &format!("{:>COLUMN$}", self.cell(row, peer)));
                text += &format!("{}\n", line.trim_end());
            }
        }
        text
    }

    fn cell(&self, row: &Row, peer: usize) -> String {
        let Some((value, high)) = row.cells[peer] else { return String::new() };
        let mut text = number(value);
        if let Some(high) = high {
            text += &format!(" ({})", number(high));
        }
        match self.yardstick.filter(|&yardstick| yardstick != peer).and_then(|yardstick| row.cells[yardstick]) {
            Some((other, _)) if value > 0.0 => format!("{text} {:>5.1}x", other / value),
            _ => text,
        }
    }

    pub fn json(&self) -> String {
        let sections: Vec<_> = self.sections.iter().map(|section| json!({ "title": section.title, "rows": self.rows(section) })).collect();
        let document = json!({ "host": self.facts, "peers": self.names, "sections": sections });
        serde_json::to_string_pretty(&document).expect("values of our own") + "\n"
    }

    fn rows(&self, section: &Section) -> Vec<Value> {
        let cell = |row: &Row, peer: usize| {
            let (value, high) = row.cells[peer]?;
            let other = self.yardstick.and_then(|yardstick| row.cells[yardstick]).map(|(other, _)| other / value);
            Some(json!({ "value": value, "p95": high, "times_better": other.filter(|times| times.is_finite()) }))
        };
        let row = |row: &Row| {
            let cells: Map<_, _> = (0..self.names.len()).filter_map(|peer| Some((self.names[peer].clone(), cell(row, peer)?))).collect();
            json!({ "label": row.label, "unit": row.unit, "peers": cells })
        };
        section.rows.iter().map(row).collect()
    }
}

fn memory_rows(pods: usize, memory: Memory) -> Vec<(String, &'static str, f64, Option<f64>)> {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let mut rows = vec![
        (format!("daemon RSS at {pods}"), "MiB", mib(memory.daemon_rss), None),
        (format!("daemon PSS at {pods}"), "MiB", mib(memory.daemon_pss), None),
    ];
    if pods > 0 {
        rows.push((format!("monitors' PSS at {pods}"), "MiB", mib(memory.monitors_pss), None));
        rows.push((format!("monitors' PSS per container at {pods}"), "MiB", mib(memory.monitors_pss) / pods as f64, None));
        rows.push((format!("monitors at {pods}"), "", memory.monitors as f64, None));
        rows.push((format!("monitors' threads at {pods}"), "", memory.threads as f64, None));
    }
    rows
}

fn percentiles(samples: &Samples) -> Option<(f64, Option<f64>)> {
    samples.percentile(50).map(|middle| (middle, samples.percentile(95)))
}

/// Three significant digits.
fn number(value: f64) -> String {
    match value {
        _ if value >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        _ if value >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
