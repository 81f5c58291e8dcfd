//! A strict reader of Prometheus's text format, version 0.0.4: what it does not know is an error.

use std::collections::BTreeMap;

/// Everything of one scrape.
#[derive(Debug, Default)]
pub struct Exposition {
    pub families: BTreeMap<String, Family>,
}

#[derive(Debug, Default)]
pub struct Family {
    pub kind: String,
    /// Name with suffix, labels in order, value.
    pub samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Exposition {
    /// The value of a sample with exactly these labels.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let wanted: BTreeMap<String, String> = labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let mut samples = self.families.values().flat_map(|f| &f.samples);
        samples.find(|(n, l, _)| n == name && *l == wanted).map(|(.., value)| *value)
    }
}

/// Reads a whole answer, or says what is wrong with which line.
pub fn parse(text: &str) -> Result<Exposition, String> {
    let mut all = Exposition::default();
    let mut current: Option<(String, Family)> = None;
    if !text.ends_with('\n') {
        return Err("the last line has no end".to_owned());
    }
    for line in text.lines() {
        let wrong = |why: &str| format!("{why}: {line:?}");
        if let Some(rest) = line.strip_prefix("# HELP ") {
            finish(&mut all, current.take())?;
            let (name, help) = rest.split_once(' ').ok_or_else(|| wrong("no help"))?;
            check_name(name).map_err(|e| wrong(&e))?;
            if help.trim().is_empty() {
                return Err(wrong("an empty help"));
            }
            current = Some((name.to_owned(), Family::default()));
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or_else(|| wrong("no type"))?;
            let family = current.as_mut().filter(|(n, f)| n == name && f.kind.is_empty()).ok_or_else(|| wrong("a type without help"))?;
            if !["counter", "gauge", "histogram"].contains(&kind) {
                return Err(wrong("an unknown type"));
            }
            family.1.kind = kind.to_owned();
        } else {
            let (name, family) = current.as_mut().filter(|(_, f)| !f.kind.is_empty()).ok_or_else(|| wrong("a sample without type"))?;
            let (sample, labels, value) = sample(line).map_err(|e| wrong(&e))?;
            let suffix = sample.strip_prefix(name.as_str()).ok_or_else(|| wrong("a sample of another family"))?;
            let suffixes = if family.kind == "histogram" { &["_bucket", "_sum", "_count"][..] } else { &[""] };
            if !suffixes.contains(&suffix) {
                return Err(wrong("an unknown suffix"));
            }
            if family.samples.iter().any(|(n, l, _)| *n == sample && *l == labels) {
                return Err(wrong("there twice"));
            }
            family.samples.push((sample, labels, value));
        }
    }
    finish(&mut all, current)?;
    Ok(all)
}

fn finish(all: &mut Exposition, family: Option<(String, Family)>) -> Result<(), String> {
    let Some((name, family)) = family else { return Ok(()) };
    if family.samples.is_empty() {
        return Err(format!("{name}: no samples"));
    }
    if family.kind == "counter" && !name.ends_with("_total") {
        return Err(format!("{name}: a counter's name ends in _total"));
    }
    if family.kind != "gauge" && family.samples.iter().any(|(.., v)| *v < 0.0 || v.is_nan()) {
        return Err(format!("{name}: counts something negative"));
    }
    if family.kind == "histogram" {
        check_histogram(&family).map_err(|e| format!("{name}: {e}"))?;
    }
    match all.families.insert(name.clone(), family) {
        Some(_) => Err(format!("{name}: there twice")),
        None => Ok(()),
    }
}

/// Buckets grow, and the last one is the count.
fn check_histogram(family: &Family) -> Result<(), String> {
    let mut series: BTreeMap<BTreeMap<String, String>, (f64, f64, Option<f64>)> = BTreeMap::new();
    for (name, labels, value) in &family.samples {
        let mut key = labels.clone();
        let bound = key.remove("le");
        let entry = series.entry(key).or_insert((f64::NEG_INFINITY, 0.0, None));
        match bound.as_deref() {
            Some(bound) => {
                let bound = number(bound)?;
                if bound <= entry.0 || *value < entry.1 {
                    return Err(format!("bucket {bound} is out of order"));
                }
                (entry.0, entry.1) = (bound, *value);
            }
            None if name.ends_with("_count") => entry.2 = Some(*value),
            None => {}
        }
    }
    for (last, sum, count) in series.values() {
        if *last != f64::INFINITY || Some(*sum) != *count {
            return Err("the buckets do not add up".to_owned());
        }
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    match !name.is_empty() && name.chars().all(good) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        true => Ok(()),
        false => Err(format!("a bad name {name:?}")),
    }
}

fn number(text: &str) -> Result<f64, String> {
    match text {
        "+Inf" => Ok(f64::INFINITY),
        "-Inf" => Ok(f64::NEG_INFINITY),
        "NaN" => Ok(f64::NAN),
        _ => text.parse().map_err(|_| format!("no number {text:?}")),
    }
}

/// `name{label="value",…} 1.5`
fn sample(line: &str) -> Result<(String, BTreeMap<String, String>, f64), String> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let name = &line[..end];
    check_name(name)?;
    let mut labels = BTreeMap::new();
    let mut rest = &line[end..];
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").ok_or("a label without value")?;
            check_name(label)?;
            let mut value = String::new();
            let mut chars = after.char_indices();
            let close = loop {
                match chars.next() {
                    Some((_, '\\')) => match chars.next() {
                        Some((_, 'n')) => value.push('\n'),
                        Some((_, c @ ('\\' | '"'))) => value.push(c),
                        _ => return Err("a bad escape".to_owned()),
                    },
                    Some((at, '"')) => break at,
                    Some((_, c)) => value.push(c),
                    None => return Err("an open value".to_owned()),
                }
            };
            if labels.insert(label.to_owned(), value).is_some() {
                return Err(format!("label {label} twice"));
            }
            rest = &after[close + 1..];
            match rest.strip_prefix(',') {
                Some(next) => rest = next,
                None => break,
            }
        }
        rest = rest.strip_prefix('}').ok_or("no } behind the labels")?;
    }
    let value = number(rest.strip_prefix(' ').ok_or("no space before the value")?)?;
    Ok((name.to_owned(), labels, value))
}

#[test]
fn the_reader_is_strict() {
    let good = "# HELP a_total x\n# TYPE a_total counter\na_total{l=\"v\\\"\\n\"} 1\na_total 2e3\n";
    assert_eq!(parse(good).unwrap().get("a_total", &[("l", "v\"\n")]), Some(1.0));
    for bad in [
        "a 1\n",
        "# HELP a x\n# TYPE a counter\na 1\n",
        "# HELP a x\n# TYPE a gauge\na 1",
        "# HELP a x\n# TYPE a gauge\nb 1\n",
        "# HELP a x\n# TYPE a gauge\na 1\na 1\n",
        "# HELP a x\n# TYPE a gauge\na{} 1\n",
        "# HELP a x\n# TYPE a gauge\na  1\n",
        "# HELP a x\n# TYPE a gauge\na one\n",
        "# HELP a x\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n",
        "# HELP a x\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_sum 1\na_count 2\n",
        "\n",
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}
