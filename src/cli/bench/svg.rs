//! A report as a picture: a bar per row and server.

use super::report::{number, Report};

const WIDTH: f64 = 860.0;
const LABELS: f64 = 330.0;
const BARS: f64 = 380.0;
const LINE: f64 = 18.0;
/// Colours that stay apart for the colour-blind.
const COLOURS: [&str; 4] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"];

/// The whole document.
pub fn svg(report: &Report) -> String {
    let mut body = String::new();
    let mut y = 10.0;
    for (at, name) in report.names.iter().enumerate() {
        y += LINE;
        let colour = COLOURS[at % COLOURS.len()];
        body += &format!("<rect x=\"10\" y=\"{:.0}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\n", y - 10.0);
        body += &text(28.0, y, "", name);
    }
    for section in &report.sections {
        y += LINE * 1.8;
        body += &text(10.0, y, " font-weight=\"bold\"", &section.title);
        for row in &section.rows {
            let most = report.scale(section, row);
            y += 4.0;
            for (at, entry) in row.cells.iter().enumerate() {
                let Some(cell) = entry.cell() else { continue };
                y += LINE;
                if row.cells[..at].iter().all(|entry| entry.cell().is_none()) {
                    body += &text(20.0, y, "", &row.label);
                }
                let scaled = |value: f64| if most > 0.0 { (value / most).clamp(0.0, 1.0) * BARS } else { 0.0 };
                let colour = COLOURS[at % COLOURS.len()];
                let width = scaled(cell.value).max(1.0);
                body += &format!("<rect x=\"{LABELS}\" y=\"{:.0}\" width=\"{width:.1}\" height=\"13\" fill=\"{colour}\"/>\n", y - 11.0);
                if let Some(high) = cell.p95 {
                    // A whisker to the 95th percentile, as far as there is room.
                    let (from, to, middle) = (LABELS + width, LABELS + scaled(high), y - 4.5);
                    body += &format!("<path d=\"M{from:.1} {middle:.1}H{to:.1}\" stroke=\"{colour}\"/>\n");
                }
                body += &text(LABELS + BARS + 8.0, y, "", &format!("{} {}", number(cell.value), row.unit));
            }
        }
    }
    let height = y + LINE;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn text(x: f64, y: f64, more: &str, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.0}\" y=\"{y:.0}\"{more}>{words}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_measured_value_has_a_bar_and_names_are_escaped() {
        let mut report = Report::new(vec!["ours <1>".into(), "theirs".into()], None);
        report.set("calls", "a & b", "ms", 0, Some(1.0.into()));
        report.set("calls", "a & b", "ms", 1, Some(2.0.into()));
        report.set("calls", "c", "ms", 0, None);
        let svg = svg(&report);
        assert_eq!(svg.matches("height=\"13\"").count(), 2);
        assert!(svg.contains("ours &lt;1&gt;") && svg.contains("a &amp; b") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("width=\"190.0\"") && svg.contains("width=\"380.0\""));
    }
}
