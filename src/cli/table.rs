//! Tables for people: aligned columns, short ids, ages, sizes.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use super::failure::one_line;

/// Characters of an id shown in tables; enough to be unique on a node, and what crictl shows.
const SHORT_ID: usize = 13;

/// Rows under a heading; as wide as they need, two spaces between columns.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heading: &[&str]) -> Table {
        Table { rows: vec![heading.iter().map(|word| (*word).to_owned()).collect()] }
    }

    /// Adds a row, one cell per column. Control characters become spaces; an empty cell is shown as `-`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let clean = |cell: String| if cell.is_empty() { "-".to_owned() } else { one_line(&cell) };
        self.rows.push(cells.into_iter().map(|cell| clean(cell.into())).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0))
            .collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// The first characters of an id, without the algorithm of a digest.
pub fn short_id(id: &str) -> String {
    id.strip_prefix("sha256:").unwrap_or(id).chars().take(SHORT_ID).collect()
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// How long before `now` something was (both in nanoseconds since the epoch), in its largest unit: `3 minutes ago`.
pub fn age(now: i64, then: i64) -> String {
    if then <= 0 {
        return "unknown".to_owned();
    }
    // A clock that was set back must not show negative ages.
    let seconds = now.saturating_sub(then).max(0) / 1_000_000_000;
    let units = [(365 * 86_400, "year"), (30 * 86_400, "month"), (7 * 86_400, "week"), (86_400, "day"), (3_600, "hour"), (60, "minute")];
    let (count, unit) = units.iter().find(|(length, _)| seconds >= *length).map_or((seconds, "second"), |(l, unit)| (seconds / l, *unit));
    match count {
        0 => "just now".to_owned(),
        1 => format!("1 {unit} ago"),
        _ => format!("{count} {unit}s ago"),
    }
}

/// Bytes in decimal units with up to three digits: `4.27 MB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 999.5 and more would print as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match value {
        _ if unit == 0 => format!("{bytes} B"),
        v if v < 9.995 => format!("{v:.2} {}", UNITS[unit]),
        v if v < 99.95 => format!("{v:.1} {}", UNITS[unit]),
        v => format!("{v:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let mut table = Table::new(&["ID", "NAME", "STATE"]);
        table.row(["1", "größer", "up"]);
        table.row(["12345", "", "a\tb\x1b"]);
        assert_eq!(table.to_string(), "ID     NAME    STATE\n1      größer  up\n12345  -       a b\n");
        assert_eq!(Table::new(&["A"]).to_string(), "A\n");
    }

    #[test]
    fn ages() {
        const S: i64 = 1_000_000_000;
        for (seconds, text) in [
            (-5, "just now"),
            (0, "just now"),
            (1, "1 second ago"),
            (59, "59 seconds ago"),
            (60, "1 minute ago"),
            (3 * 60 + 59, "3 minutes ago"),
            (7_200, "2 hours ago"),
            (86_400 * 6, "6 days ago"),
            (86_400 * 20, "2 weeks ago"),
            (86_400 * 364, "12 months ago"),
            (86_400 * 800, "2 years ago"),
        ] {
            assert_eq!(age(2_000_000_000 * S, (2_000_000_000 - seconds) * S), text);
        }
        assert_eq!(age(S, 0), "unknown");
    }

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.00 kB"),
            (9_994, "9.99 kB"),
            (9_996, "10.0 kB"),
            (99_960, "100 kB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (4_266_000, "4.27 MB"),
            (u64::MAX, "18447 PB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn short_ids() {
        assert_eq!(short_id("0123456789abcdef"), "0123456789abc");
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789abc");
        assert_eq!(short_id("ab"), "ab");
    }
}
