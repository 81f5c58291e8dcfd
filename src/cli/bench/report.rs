//! What was measured, of one server or of several side by side: a table or bars for people, JSON for programs.

use serde_json::{json, Map, Value};

use super::process::Memory;
use super::samples::Samples;

const LABEL: usize = 42;
const COLUMN: usize = 24;
/// Longest bar, columns of the terminal.
const BAR: f64 = 30.0;

/// One value, or the percentiles of many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// The value, or the median.
    pub value: f64,
    pub p95: Option<f64>,
    pub p99: Option<f64>,
}

impl From<f64> for Cell {
    fn from(value: f64) -> Cell {
        Cell { value, p95: None, p99: None }
    }
}

impl Cell {
    /// Milliseconds; None without samples.
    pub fn of(samples: &Samples) -> Option<Cell> {
        Some(Cell { value: samples.percentile(50)?, p95: samples.percentile(95), p99: samples.percentile(99) })
    }
}

/// Sections of rows; a column per server.
#[derive(Debug)]
pub struct Report {
    pub(super) names: Vec<String>,
    /// The column the others are compared with.
    yardstick: Option<usize>,
    pub(super) sections: Vec<Section>,
    facts: Map<String, Value>,
}

#[derive(Debug)]
pub(super) struct Section {
    pub(super) title: String,
    pub(super) rows: Vec<Row>,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) label: String,
    pub(super) unit: &'static str,
    /// More is better: rates.
    more: bool,
    pub(super) cells: Vec<Entry>,
}

/// One place of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Entry {
    /// Not measured.
    Nothing,
    /// The server has no such thing.
    Absent,
    Measured(Cell),
}

impl Entry {
    pub(super) fn cell(self) -> Option<Cell> {
        match self {
            Entry::Measured(cell) => Some(cell),
            Entry::Nothing | Entry::Absent => None,
        }
    }
}

impl Report {
    /// With a column for each of `names`, compared with that of `yardstick`; `facts` begin with those of the host.
    pub fn new(names: Vec<String>, yardstick: Option<usize>) -> Report {
        let mut report = Report { names, yardstick, sections: Vec::new(), facts: Map::new() };
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        report.fact("kernel", read("/proc/sys/kernel/osrelease"));
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let count = std::thread::available_parallelism().map_or(1, |count| count.get());
        report.fact("cpu", format!("{count} x {}", model.trim_start_matches([' ', '\t', ':'])));
        let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        report.fact("cgroups", if unified { "v2" } else { "v1" }.to_owned());
        report
    }

    /// Something to know about the run.
    pub fn fact(&mut self, name: &str, value: String) {
        self.facts.insert(name.to_owned(), Value::String(value));
    }

    /// Sets a value of `column`; section and row are made when they are new, and keep their order. None: the server has
    /// no such thing.
    pub fn set(&mut self, title: &str, label: &str, unit: &'static str, column: usize, cell: Option<Cell>) {
        *self.entry(title, label, unit, false, column) = cell.map_or(Entry::Absent, Entry::Measured);
    }

    /// A rate: more is better.
    pub fn set_rate(&mut self, title: &str, label: &str, unit: &'static str, column: usize, value: Option<f64>) {
        *self.entry(title, label, unit, true, column) = value.map_or(Entry::Absent, |value| Entry::Measured(value.into()));
    }

    fn entry(&mut self, title: &str, label: &str, unit: &'static str, more: bool, column: usize) -> &mut Entry {
        let count = self.names.len();
        let at = self.sections.iter().position(|section| section.title == title).unwrap_or_else(|| {
            self.sections.push(Section { title: title.to_owned(), rows: Vec::new() });
            self.sections.len() - 1
        });
        let rows = &mut self.sections[at].rows;
        let row = rows.iter().position(|row| row.label == label).unwrap_or_else(|| {
            rows.push(Row { label: label.to_owned(), unit, more, cells: vec![Entry::Nothing; count] });
            rows.len() - 1
        });
        &mut rows[row].cells[column]
    }

    /// Memory of the server and of its monitors with `pods` sandboxes of one container.
    pub fn memory(&mut self, title: &str, column: usize, pods: usize, (server, monitors): (Memory, Memory)) {
        let mib = |kib: u64| kib as f64 / 1024.0;
        let mut set = |label: String, unit, value: f64| self.set(title, &label, unit, column, Some(value.into()));
        set(format!("daemon RSS at {pods}"), "MiB", mib(server.rss));
        set(format!("daemon PSS at {pods}"), "MiB", mib(server.pss));
        if pods > 0 {
            set(format!("monitors' PSS at {pods}"), "MiB", mib(monitors.pss));
            set(format!("monitors' PSS per container at {pods}"), "MiB", mib(monitors.pss) / pods as f64);
            set(format!("monitors at {pods}"), "", monitors.processes as f64);
            set(format!("monitors' threads at {pods}"), "", monitors.threads as f64);
        }
    }

    fn heading(&self) -> String {
        let facts: Vec<_> = self.facts.iter().map(|(key, value)| format!("{key} {}", value.as_str().unwrap_or_default())).collect();
        facts.join("; ")
    }

    /// Columns side by side, with how many times better each is than the yardstick.
    pub fn table(&self) -> String {
        let mut text = format!("{}\np50 (p95)", self.heading());
        if let Some(yardstick) = self.yardstick {
            text += &format!("; x: how many times better than {}", self.names[yardstick]);
        }
        text += "\n";
        for section in &self.sections {
            let mut line = format!("\n{:<LABEL$}", section.title);
            self.names.iter().for_each(|name| line += &format!("{name:>COLUMN$}"));
            text += &format!("{line}\n");
            for row in &section.rows {
                let mut line = format!("{:<LABEL$}", format!("  {} [{}]", row.label, row.unit));
                (0..self.names.len()).for_each(|column| line += &format!("{:>COLUMN$}", self.cell(row, column)));
                text += &format!("{}\n", line.trim_end());
            }
        }
        text
    }

    fn cell(&self, row: &Row, column: usize) -> String {
        let cell = match row.cells[column] {
            Entry::Nothing => return String::new(),
            Entry::Absent => return "-".to_owned(),
            Entry::Measured(cell) => cell,
        };
        let mut text = number(cell.value);
        if let Some(high) = cell.p95 {
            text += &format!(" ({})", number(high));
        }
        match self.better(row, column) {
            Some(times) => format!("{text} {times:>5.1}x"),
            None => text,
        }
    }

    /// How many times better than the yardstick.
    fn better(&self, row: &Row, column: usize) -> Option<f64> {
        let other = row.cells[self.yardstick.filter(|&yardstick| yardstick != column)?].cell()?.value;
        let value = row.cells[column].cell()?.value;
        let times = if row.more { value / other } else { other / value };
        (value > 0.0 && other > 0.0 && times.is_finite()).then_some(times)
    }

    /// One column with all its percentiles and a bar per row; bars of a section and unit share a scale.
    pub fn chart(&self, column: usize) -> String {
        let mut text = format!("{}\n", self.heading());
        let wide = |rows: &[Row]| rows.iter().map(|row| row.label.chars().count()).max().unwrap_or(0);
        for section in &self.sections {
            let width = wide(&section.rows).max(section.title.chars().count().saturating_sub(2));
            text += &format!("\n{:<width$}  {:>9} {:>9} {:>9}\n", section.title, "p50", "p95", "p99", width = width + 2);
            for row in &section.rows {
                let Some(cell) = row.cells[column].cell() else {
                    text += &format!("  {:<width$}  {:>9}\n", row.label, "-");
                    continue;
                };
                let show = |value: Option<f64>| value.map_or(String::new(), number);
                let bar = bar(cell.value, self.scale(section, row), BAR);
                let line = format!(
                    "  {:<width$}  {:>9} {:>9} {:>9} {:<5} {bar}",
                    row.label,
                    number(cell.value),
                    show(cell.p95),
                    show(cell.p99),
                    row.unit
                );
                text += &format!("{}\n", line.trim_end());
            }
        }
        text
    }

    /// The greatest value of the section in the unit of `row`.
    pub(super) fn scale(&self, section: &Section, row: &Row) -> f64 {
        let alike = section.rows.iter().filter(|other| other.unit == row.unit);
        alike.flat_map(|row| &row.cells).filter_map(|entry| entry.cell()).map(|cell| cell.value).fold(0.0, f64::max)
    }

    pub fn json(&self) -> String {
        let sections: Vec<_> = self.sections.iter().map(|section| json!({ "title": section.title, "rows": self.rows(section) })).collect();
        let document = json!({ "host": self.facts, "peers": self.names, "sections": sections });
        format!("{document:#}\n")
    }

    fn rows(&self, section: &Section) -> Vec<Value> {
        let cell = |row: &Row, column: usize| {
            let cell = row.cells[column].cell()?;
            Some(json!({ "value": cell.value, "p95": cell.p95, "p99": cell.p99, "times_better": self.better(row, column) }))
        };
        let row = |row: &Row| {
            let cells: Map<_, _> = (0..self.names.len()).filter_map(|at| Some((self.names[at].clone(), cell(row, at)?))).collect();
            json!({ "label": row.label, "unit": row.unit, "peers": cells })
        };
        section.rows.iter().map(row).collect()
    }
}

/// A bar of blocks with eighths at its end.
fn bar(value: f64, most: f64, width: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    if most <= 0.0 || value <= 0.0 {
        return String::new();
    }
    let eighths = (value / most * width * 8.0).round().max(1.0) as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

/// Three significant digits.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let mut report = Report::new(vec!["ours <1>".into(), "theirs".into()], Some(1));
        report.set("calls", "Version", "ms", 0, Some(Cell { value: 0.5, p95: Some(1.0), p99: Some(2.0) }));
        report.set("calls", "Version", "ms", 1, Some(2.0.into()));
        report.set("calls", "Metrics", "ms", 0, Some(1.0.into()));
        report.set("calls", "Metrics", "ms", 1, None);
        report.set_rate("calls", "rate", "calls/s", 0, Some(300.0));
        report.set_rate("calls", "rate", "calls/s", 1, Some(100.0));
        report
    }

    #[test]
    fn rows_are_compared_with_the_yardstick() {
        let table = sample().table();
        assert!(table.contains("0.50 (1)   4.0x"), "{table}");
        assert!(table.contains("300   3.0x"), "{table}");
        let metrics = table.lines().find(|line| line.contains("Metrics")).unwrap();
        assert!(metrics.ends_with(" -"), "{metrics}");
        let json: Value = serde_json::from_str(&sample().json()).unwrap();
        assert_eq!(json["sections"][0]["rows"][0]["peers"]["ours <1>"]["times_better"], 4.0);
        assert_eq!(json["sections"][0]["rows"][0]["peers"]["ours <1>"]["p99"], 2.0);
        assert!(json["sections"][0]["rows"][1]["peers"].get("theirs").is_none());
    }

    #[test]
    fn bars_share_a_scale() {
        let chart = sample().chart(0);
        let length = |label: &str| chart.lines().find(|line| line.contains(label)).unwrap().matches('█').count();
        assert_eq!((length("Version"), length("Metrics")), (7, 15), "{chart}");
        assert_eq!((bar(0.0, 1.0, 9.0).as_str(), bar(1.0, 0.0, 9.0).as_str(), bar(0.001, 1.0, 9.0).as_str()), ("", "", "▏"));
    }
}
